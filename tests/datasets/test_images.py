"""Folders and zips of images: what is read, and what is refused."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import CompanionError, datasets


def picture(seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write(root: Path, files: dict[str, np.ndarray | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.fromarray(content).save(path)
    return root


def zipped(folder: Path, target: Path, prefix: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(target, "w", compression) as file:
        for path in sorted(folder.rglob("*"), reverse=True):  # another order than that of the names
            file.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def tree(train: str = "train", test: str = "test") -> dict[str, np.ndarray | bytes]:
    """Two pictures per class to train and one to test with; the file's number is the picture's seed."""
    return {
        f"{train}/dog/1.png": picture(1),
        f"{train}/cat/2.png": picture(2),
        f"{train}/dog/3.png": picture(3),
        f"{train}/cat/more/4.PNG": picture(4),
        f"{test}/cat/5.png": picture(5),
        f"{test}/dog/6.png": picture(6),
    }


def load(path: Path, split: str = "train", **options: int):
    return datasets.load(f"folder:{path}", split=split, **options)


def assert_is(data, seeds: list[int], targets: list[int]) -> None:
    assert len(data) == len(seeds)
    for (image, label), seed, target in zip(data, seeds, targets, strict=True):
        assert image.dtype == torch.float32
        assert type(label) is int
        assert np.array_equal(image.numpy(), (picture(seed) / np.float32(255)).transpose(2, 0, 1))
        assert label == target
    assert data.targets.tolist() == targets


@pytest.mark.parametrize("test", ["test", "val", "valid", "Validation"])
def test_folders_say_what_is_for_testing(tmp_path, test):
    write(tmp_path, tree(test=test))
    data = load(tmp_path)
    assert (data.task, data.labels, data.augmentation) == ("classify", ("cat", "dog"), "shift_flip")
    assert_is(data, [2, 4, 1, 3], [0, 0, 1, 1])
    assert_is(load(tmp_path, "test"), [5, 6], [0, 1])


def test_test_goes_before_val(tmp_path):
    write(tmp_path, tree() | {"val/cat/9.png": picture(9), "val/dog/8.png": picture(8)})
    assert_is(load(tmp_path, "test"), [5, 6], [0, 1])


@pytest.mark.parametrize("prefix", ["", "my pets/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_is_the_same_as_its_folder(tmp_path, prefix, compression):
    write(tmp_path / "pets", tree())
    path = zipped(tmp_path / "pets", tmp_path / "pets.zip", prefix, compression)
    assert_is(load(path), [2, 4, 1, 3], [0, 0, 1, 1])
    assert_is(load(path, "test"), [5, 6], [0, 1])


def test_what_is_no_image_is_ignored(tmp_path):
    extra = {
        "README.txt": b"pets",
        "cover.png": picture(0),
        "train/cover.png": picture(0),
        "train/dog/notes.md": b"good dogs",
        "train/dog/.1.png": b"a Mac's",
        "train/.cache/1.png": picture(0),
        "__MACOSX/train/dog/1.png": b"a Mac's",
    }
    write(tmp_path / "pets", tree() | extra)
    assert_is(load(tmp_path / "pets"), [2, 4, 1, 3], [0, 0, 1, 1])
    assert_is(load(zipped(tmp_path / "pets", tmp_path / "pets.zip")), [2, 4, 1, 3], [0, 0, 1, 1])


def test_class_folders_alone_are_divided_the_same_way_every_time(tmp_path):
    sizes = {"ant": 10, "bee": 25, "cow": 2}
    write(tmp_path, {f"{label}/{i}.png": picture(i) for label, n in sizes.items() for i in range(n)})
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.labels == test.labels == ("ant", "bee", "cow")
    assert test.targets.bincount().tolist() == [2, 5, 1]  # a fifth of each class, at least one
    assert train.targets.bincount().tolist() == [8, 20, 1]
    everything = [f"{label}/{i}.png" for label, n in sizes.items() for i in range(n)]
    assert sorted(train.files + test.files) == sorted(everything)
    assert load(tmp_path).files == train.files
    assert test.files[:2] != ["ant/0.png", "ant/1.png"]  # drawn, not the first ones


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "gif"])
def test_formats(tmp_path, suffix):
    """A picture of one colour comes out in that colour, within what a lossy format may change."""
    colour = np.full((40, 40, 3), (200, 100, 50), np.uint8)
    write(
        tmp_path, {f"a/1.{suffix}": colour, f"a/2.{suffix}": colour, f"b/1.{suffix}": colour, f"b/2.{suffix}": colour}
    )
    image, _ = load(tmp_path)[0]
    assert image.shape == (3, 32, 32)
    assert np.allclose(image.mean(dim=(1, 2)) * 255, [200, 100, 50], atol=4)


def test_other_modes_become_rgb(tmp_path):
    gray = Image.new("L", (32, 32), 90)
    files = {"gray.png": gray, "palette.png": gray.convert("P"), "alpha.png": gray.convert("RGBA")}
    files |= {"cmyk.jpg": gray.convert("RGB").convert("CMYK"), "bits.png": gray.convert("1")}
    transparent = gray.convert("P")
    transparent.info["transparency"] = bytes(range(256))
    write(tmp_path, {"b/1.png": picture(1), "b/2.png": picture(2)})
    (tmp_path / "a").mkdir()
    for name, image in (files | {"transparent.png": transparent}).items():
        image.save(tmp_path / "a" / name)
    read = {
        Path(data.files[i]).name: data[i][0]
        for s in ("train", "test")
        for data in [load(tmp_path, s)]
        for i in range(len(data))
    }
    for name in (files | {"transparent.png": 0}).keys() - {"bits.png"}:
        assert read[name].shape == (3, 32, 32)
        assert torch.allclose(read[name] * 255, torch.tensor(90.0), atol=3), name
    assert set(read["bits.png"].unique().tolist()) <= {0.0, 1.0}


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    write(tmp_path, {"b/1.png": picture(1), "b/2.png": picture(2)})
    (tmp_path / "a").mkdir()
    for name in ("1.gif", "2.gif"):
        frames[0].save(tmp_path / "a" / name, save_all=True, append_images=frames[1:])
    assert load(tmp_path)[0][0].mean(dim=(1, 2)).tolist() == [1, 0, 0]


def test_size_and_exif_orientation(tmp_path):
    """A phone's picture: stored lying on its side, wider than high, with a note how to turn it."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100] = 255  # stored white on the left; orientation 6, turned clockwise, puts it on top
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    for name in ("1.jpg", "2.jpg"):
        Image.fromarray(pixels).save(tmp_path / "a" / name, exif=exif)
    write(tmp_path, {"b/1.png": picture(1), "b/2.png": picture(2)})
    image, _ = load(tmp_path, size=16)[0]
    assert image.shape == (3, 16, 16)
    assert image[:, :7].min() > 0.9
    assert image[:, 9:].max() < 0.1


def test_reduced_pictures_are_averaged(tmp_path):
    """Stripes finer than the reduced picture's pixels become their mean; taking every eighth pixel would keep them."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    write(tmp_path, {f"{label}/{i}.{suffix}": stripes for label in "ab" for i in (1, 2) for suffix in ("png", "jpg")})
    for image, _ in load(tmp_path):
        assert (image - 0.5).abs().max() < 0.02


def test_a_copy_for_another_process_is_small_and_reads_by_itself(tmp_path):
    path = zipped(write(tmp_path / "pets", tree()), tmp_path / "pets.zip")
    data = load(path)
    image = data[0][0]
    content = pickle.dumps(data)
    assert len(content) < 2000
    assert torch.equal(pickle.loads(content)[0][0], image)


WORKERS = """
import sys
import torch
from torch.utils.data import DataLoader
from companion import datasets

def main():
    for data in (datasets.load(f"folder:{sys.argv[1]}", split="train"), datasets.load("digits", split="test")):
        expected = [data[i] for i in range(len(data))]
        for method in sys.argv[2:]:
            loader = DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context=method)
            images, labels = (torch.cat(parts) for parts in zip(*loader))
            assert torch.equal(images, torch.stack([image for image, _ in expected])), method
            assert labels.tolist() == [label for _, label in expected], method
    print("equal")

if __name__ == "__main__":
    main()
"""


def test_workers_read_the_same(tmp_path):
    """Forked workers start with the zip already open, spawned ones with a pickled copy."""
    files = {f"{label}/{i}.png": picture(i) for label in "ab" for i in range(100)}
    path = zipped(write(tmp_path / "many", files), tmp_path / "many.zip")
    program = tmp_path / "program.py"
    program.write_text(WORKERS)
    methods = ["spawn"] if sys.platform in ("win32", "darwin") else ["fork", "spawn"]
    done = subprocess.run(
        [sys.executable, "-W", "error", program, path, *methods],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def refused(path: Path, match: str, split: str = "train", **options: int) -> None:
    with pytest.raises(CompanionError, match=match) as caught:
        load(path, split, **options)
    assert_one_sentence(caught.value)


def assert_one_sentence(error: CompanionError) -> None:
    assert str(error).endswith(".")
    assert "\n" not in str(error)


def test_refuses_what_is_not_there(tmp_path):
    refused(tmp_path / "nothing", "there is no folder or zip .*nothing")


def test_refuses_a_file_that_is_no_zip(tmp_path):
    refused(write(tmp_path, {"notes.txt": b"no zip"}) / "notes.txt", "notes.txt is damaged or not a zip")


@pytest.mark.parametrize("files", [{}, {"a/readme.txt": b"no image"}])
def test_refuses_no_images(tmp_path, files):
    refused(write(tmp_path, files), "holds no images")
    refused(zipped(tmp_path, tmp_path.with_suffix(".zip")), "holds no images")


def test_refuses_images_without_class_folders(tmp_path):
    refused(write(tmp_path, {"1.png": picture(1), "2.png": picture(2)}), "images but no class folders")


def test_refuses_one_class(tmp_path):
    refused(write(tmp_path / "auto", {f"cat/{i}.png": picture(i) for i in range(4)}), "only one class, 'cat'")
    write(tmp_path / "split", {"train/cat/1.png": picture(1), "test/cat/2.png": picture(2)})
    refused(tmp_path / "split", "only one class, 'cat'")


def test_refuses_a_class_with_one_image(tmp_path):
    write(tmp_path, {f"{label}/{i}.png": picture(i) for label in "ab" for i in (1, 2)} | {"c/1.png": picture(1)})
    refused(tmp_path, "one image of 'c'")


@pytest.mark.parametrize("split", ["train", "test"])
def test_refuses_splits_with_different_classes(tmp_path, split):
    write(tmp_path / "more", tree() | {"train/emu/1.png": picture(1)})
    refused(tmp_path / "more", "'emu' to train with but none to test with", split)
    write(tmp_path / "less", tree() | {"test/emu/1.png": picture(1)})
    refused(tmp_path / "less", "'emu' to test with but none to train with", split)


@pytest.mark.parametrize("size", [0, 7, 1025, -1, 32.0, True, "32"])
def test_refuses_a_size_that_is_none(tmp_path, size):
    refused(write(tmp_path, tree()), "8 to 1024 pixels", size=size)


def refused_when_read(tmp_path: Path, content: bytes, match: str, suffix: str = "png") -> None:
    """A bad picture among good ones is named when it is read, from a folder and from a zip."""
    name = f"train/cat/bad.{suffix}"
    folder = write(tmp_path / "pets", tree() | {name: content})
    for path in (folder, zipped(folder, tmp_path / "pets.zip")):
        data = load(path)
        with pytest.raises(CompanionError, match=f"{name} {match}") as caught:
            [data[i] for i in range(len(data))]
        assert_one_sentence(caught.value)


def encoded(format: str, image: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(picture(7, 64))).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_names_a_truncated_image(tmp_path, format):
    content = encoded(format)
    refused_when_read(tmp_path, content[: len(content) // 2], "is damaged or not an image", format.lower())


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(7)])
def test_names_what_is_no_image(tmp_path, content):
    refused_when_read(tmp_path, content, "is damaged or not an image")


def test_names_an_image_of_a_kind_that_is_not_listed(tmp_path):
    refused_when_read(tmp_path, encoded("TIFF"), "is damaged or not an image")


def png_header(side: int) -> bytes:
    """The start of a black-and-white PNG of side × side pixels, and a little data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 50_000])  # Pillow warns of the one and refuses the other
def test_names_a_decompression_bomb(tmp_path, side):
    refused_when_read(tmp_path, png_header(side), "has too many pixels")


def test_names_16_bit_images(tmp_path):
    deep = Image.fromarray(np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16))
    refused_when_read(tmp_path, encoded("PNG", deep), "has 16 bits per pixel")


def test_names_a_file_that_went_away(tmp_path):
    data = load(write(tmp_path, tree()))
    (tmp_path / "train/dog/1.png").unlink()
    with pytest.raises(CompanionError, match=r"train/dog/1.png: No such file.*\.$"):
        data[2]


def test_refuses_a_file_too_large_for_an_image(tmp_path):
    folder = write(tmp_path / "pets", tree())
    with (folder / "train/cat/big.png").open("wb") as file:
        file.truncate(65 * 2**20)  # a hole: it takes no room
    refused(folder, "train/cat/big.png has 65 MiB")
    path = zipped(folder, tmp_path / "pets.zip", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    refused(path, "train/cat/big.png has 65 MiB")


def test_refuses_a_truncated_zip(tmp_path):
    path = zipped(write(tmp_path / "pets", tree()), tmp_path / "pets.zip")
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "pets.zip is damaged or not a zip")


def test_names_a_zip_entry_whose_checksum_is_wrong(tmp_path):
    path = zipped(write(tmp_path / "pets", tree()), tmp_path / "pets.zip")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("train/dog/1.png").header_offset
    content[at + 200] ^= 1
    path.write_bytes(content)
    data = load(path)
    with pytest.raises(CompanionError, match=r"train/dog/1.png is damaged: Bad CRC-32 .*\.$") as caught:
        data[2]
    assert_one_sentence(caught.value)


def test_names_an_encrypted_zip_entry(tmp_path):
    path = zipped(write(tmp_path / "pets", tree()), tmp_path / "pets.zip")
    content = path.read_bytes().replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01")
    path.write_bytes(content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"))
    data = load(path)
    with pytest.raises(CompanionError, match="encrypted"):
        data[0]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_names_an_unreadable_folder(tmp_path):
    write(tmp_path, tree())
    (tmp_path / "train/cat").chmod(0)
    refused(tmp_path, "cannot read .*train/cat")
    (tmp_path / "train/cat").chmod(0o700)


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("train", "dev"), ("training", "valid")])
def test_split_folders_go_by_many_names(tmp_path, train, test):
    for folder, count in ((train, 3), (test, 2)):
        for label in ("cat", "dog"):
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / folder / label / f"{i}.png")
    for split, count in (("train", 6), ("test", 4)):
        data = datasets.load(f"folder:{tmp_path}", split=split)
        assert data.labels == ("cat", "dog")
        assert len(data) == count


def test_several_folders_around_and_stray_pictures_beside(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "a" / "b" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "a" / "b" / split / label / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "logo.png")
    assert datasets.load(f"folder:{tmp_path}", split="test").labels == ("cat", "dog")


@pytest.mark.parametrize("lonely", ["train", "Test"])
def test_a_split_without_its_partner_is_no_class(tmp_path, lonely):
    for folder in (lonely, "other"):
        (tmp_path / folder / "cat").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / "cat" / f"{i}.png")
    with pytest.raises(CompanionError, match=f"has a folder '{lonely}' but no"):
        datasets.load(f"folder:{tmp_path}", split="train")
