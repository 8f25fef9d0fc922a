"""CamVid from a folder or a zip: a tiny one of our own, and the reduced one where it is."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import CompanionError, datasets
from companion.datasets import camvid


def picture(seed: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(seed: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 12, (height, width), dtype=np.uint8)


def write(root: Path, name: str, content: np.ndarray | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)


SEEDS = {"train": (1, 2, 3), "val": (4,), "test": (5, 6)}


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, seeds in SEEDS.items():
        for seed in seeds:
            write(tmp_path / "camvid", f"{split}/images/{seed:04}.png", picture(seed))
            write(tmp_path / "camvid", f"{split}/masks/{seed:04}.png", mask_of(seed))
    return tmp_path / "camvid"


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as file:
        for path in sorted(folder.rglob("*.*"), reverse=True):  # another order than that of the names
            file.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def assert_is_ours(root: Path | None) -> None:
    for split, seeds in SEEDS.items():
        data = datasets.load("camvid", split=split, root=root)
        assert len(data) == len(seeds)
        for (image, mask), seed in zip(data, seeds, strict=True):
            assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
            assert np.array_equal(image, picture(seed).transpose(2, 0, 1) / np.float32(255))
            expected = mask_of(seed).astype(int)
            assert np.array_equal(mask, np.where(expected == 11, 255, expected))


def test_what_it_says_of_itself(folder):
    data = datasets.load("camvid", split="train", root=folder)
    assert (data.name, data.task, data.augmentation) == ("camvid", "segment", "shift_flip")
    assert len(data.labels) == 11
    assert data.labels[3] == "road"
    assert datasets.splits("camvid") == ("train", "val", "test")


@pytest.mark.parametrize("prefix", ["", "CamVid/", "a/b/"])
def test_a_folder_or_a_zip_itself_or_what_holds_it(folder, tmp_path, prefix):
    path = zipped(folder, tmp_path / "elsewhere" / "camvid.zip", prefix)
    for root in (folder, folder.parent, path, path.parent, str(path)):
        assert_is_ours(root)


def test_is_found_in_the_data_folder(folder, data_folder):
    zipped(folder, data_folder / "camvid_small.zip")
    assert_is_ours(None)
    assert datasets.get("camvid") == data_folder / "camvid_small.zip"
    assert next(entry.state for entry in datasets.catalogue() if entry.name == "camvid") == "present"


@pytest.mark.parametrize("ask", [lambda: datasets.load("camvid", split="test"), lambda: datasets.get("camvid")])
def test_says_what_to_put_where(data_folder, ask):
    with pytest.raises(CompanionError) as caught:
        ask()
    assert str(caught.value) == (
        "CamVid is not there, and cannot be downloaded: put camvid.zip or a folder camvid (train, val and test, "
        f"each with images and masks) into {data_folder}."
    )
    assert not data_folder.exists()


def refused(root: Path, says: str) -> None:
    """When it is opened, or when the sample is read; and `companion data verify` finds it too."""
    with pytest.raises(CompanionError, match=says) as caught:
        list(datasets.load("camvid", split="train", root=root))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    trouble = camvid.trouble(root)
    assert trouble is not None
    assert str(caught.value) == trouble


def test_nothing_wrong_is_found_in_a_good_copy(folder):
    assert camvid.trouble(folder) is None


def test_verify_reports_a_bad_copy(folder, data_folder):
    (folder / "val/masks/0004.png").write_bytes(b"no mask")
    zipped(folder, data_folder / "camvid.zip")
    check = datasets.verify()[-1]
    assert check.what == str(data_folder / "camvid.zip")
    assert not check.ok
    assert "val/masks/0004.png is damaged" in check.message


@pytest.mark.parametrize(("missing", "kind"), [("masks", "mask"), ("images", "image")])
def test_an_image_or_a_mask_without_its_partner(folder, missing, kind):
    (folder / f"train/{missing}/0002.png").unlink()
    refused(folder, rf"train/\w+/0002.png has no {kind} of the same name")


def test_two_images_of_one_name(folder):
    write(folder, "train/images/0002.jpg", picture(2))
    refused(folder, "has train/images/0002.jpg and train/images/0002.png")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (mask_of(2, 8, 6), "0002.png has 6×8 pixels, its image 8×6"),
        (np.full((6, 8), 12, np.uint8), "0002.png has a class 12: CamVid's are 0 to 11"),
        (np.full((6, 8), 255, np.uint8), "0002.png has a class 255"),
        (picture(2), "0002.png is no mask"),
        (np.ones((6, 8), np.uint16), "0002.png is no mask"),
        (b"\x89PNG\r\n\x1a\n", "0002.png is damaged or not an image"),
    ],
)
def test_unusable_masks(folder, tmp_path, content, says):
    write(folder, "train/masks/0002.png", content)
    refused(folder, says)
    refused(zipped(folder, tmp_path / "x.zip"), says)


def test_a_palette_holds_class_numbers_too(folder):
    image = Image.fromarray(mask_of(2))
    image.putpalette(list(range(256)) * 3)
    assert image.mode == "P"
    image.save(folder / "train/masks/0002.png")
    assert_is_ours(folder)


def test_a_zip_of_something_else(tmp_path):
    write(tmp_path / "pets", "train/cat/1.png", picture(1))
    refused(zipped(tmp_path / "pets", tmp_path / "pets.zip"), r"is not CamVid: it has no images in train/images")


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "camvid.zip").write_bytes(b"no zip")
    refused(tmp_path / "camvid.zip", "damaged or not a zip")


full_size = Path(os.environ.get("COMPANION_TEST_DATA", "nowhere")) / "camvid_small.zip"


@pytest.mark.skipif(not full_size.is_file(), reason="COMPANION_TEST_DATA has no camvid_small.zip")
@pytest.mark.parametrize(("split", "n"), [("train", 92), ("val", 34), ("test", 39)])
def test_the_reduced_one(split, n):
    data = datasets.load("camvid", split=split, root=full_size.parent)
    assert len(data) == n
    image, mask = data[n - 1]
    assert image.shape == (3, 180, 240)
    with zipfile.ZipFile(full_size) as file:
        names = sorted(name for name in file.namelist() if name.startswith(f"{split}/masks"))
        with file.open(names[-1]) as content:
            expected = np.array(Image.open(content)).astype(int)
    assert np.array_equal(mask, np.where(expected == 11, 255, expected))
    # Road is below, sky above: the classes are in the order that the labels say.
    present = [data.labels[k] for k in mask[-20:].flatten().bincount()[:11].argsort(descending=True)[:1]]
    assert present == ["road"]
