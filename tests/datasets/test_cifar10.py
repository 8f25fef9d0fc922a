"""CIFAR-10 in each of the forms that it comes in."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import CompanionError, datasets

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def picture(split: str, label: str) -> np.ndarray:
    return np.full(
        (32, 32, 3), 10 * CLASSES.index(label.replace("tram", "truck")) + (5 if split == "test" else 0), np.uint8
    )


def image_folder(path: Path, classes: list[str] = CLASSES) -> Path:
    for split in ("train", "test"):
        for label in classes:
            (path / split / label).mkdir(parents=True)
            Image.fromarray(picture(split, label)).save(path / split / label / "0000.png")
    return path


def image_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for split in ("train", "test"):
            for label in reversed(CLASSES):
                buffer = io.BytesIO()
                Image.fromarray(picture(split, label)).save(buffer, "PNG")
                file.writestr(f"{split}/{label}/0000.png", buffer.getvalue())
    return path


def assert_is_ours(split: str, root: Path | None = None) -> None:
    data = datasets.load("cifar10", split=split, root=root)
    assert list(data.labels) == CLASSES
    assert (data.name, data.task, data.augmentation) == ("cifar10", "classify", "shift_flip")
    for i, label in enumerate(CLASSES):
        image, target = data[i]
        assert target == i
        assert np.array_equal(image.numpy(), picture(split, label).transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("split", ["train", "test"])
def test_is_found_in_the_data_folder(data_folder, split):
    data_folder.mkdir(parents=True)
    image_folder(data_folder / "cifar10")
    assert_is_ours(split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_root_is_the_thing_itself_or_a_folder_that_holds_it(tmp_path, split):
    path = image_zip(tmp_path / "cifar10.zip")
    folder = image_folder(tmp_path / "elsewhere" / "cifar10")
    for root in (path, path.parent, folder, folder.parent, str(folder)):
        assert_is_ours(split, root)


def test_a_zip_goes_before_the_others(tmp_path):
    image_zip(tmp_path / "cifar10.zip")
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert_is_ours("test", tmp_path)


def unpack(content: bytes, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if member.isfile() and ".." not in member.name:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder / "cifar-10-batches-py"


@pytest.mark.parametrize(("split", "n"), [("train", 100), ("test", 20)])
def test_the_original_batches(tmp_path, tiny_cifar10, split, n):
    folder = unpack(tiny_cifar10.content, tmp_path)
    for root in (tmp_path, folder):
        data = datasets.load("cifar10", split=split, root=root)
        assert len(data) == n
        assert list(data.labels) == CLASSES
        assert data.augmentation == "shift_flip"
        assert np.array_equal(data.images, tiny_cifar10.images[split])
        assert data.targets.tolist() == tiny_cifar10.targets[split]
        image, target = data[n - 1]
        assert image.dtype == torch.float32
        assert np.array_equal(image, tiny_cifar10.images[split][-1] / np.float32(255))
        assert target == tiny_cifar10.targets[split][-1]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_forged_batches_are_not_unpickled(tmp_path, monkeypatch, tiny_cifar10):
    import pickle

    monkeypatch.chdir(tmp_path)
    folder = unpack(tiny_cifar10.content, tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(Evil(), protocol=2))
    for split in ("train", "test"):
        with pytest.raises(CompanionError, match=r"cifar-10-batches-py is damaged or incomplete.*get cifar10`\.$"):
            datasets.load("cifar10", split=split, root=tmp_path)
    assert not (tmp_path / "executed").exists()


def test_refuses_batches_that_are_incomplete(tmp_path, tiny_cifar10):
    (unpack(tiny_cifar10.content, tmp_path) / "batches.meta").unlink()
    with pytest.raises(CompanionError, match="damaged or incomplete"):
        datasets.load("cifar10", split="train", root=tmp_path)


@pytest.mark.parametrize("root", [None, "empty"])
def test_says_how_to_get_it(tmp_path, data_folder, root):
    place = data_folder if root is None else tmp_path / root
    with pytest.raises(CompanionError) as caught:
        datasets.load("cifar10", split="train", root=root and place)
    assert str(caught.value) == (
        f"CIFAR-10 is not there: type `companion data get cifar10`, or put cifar10.zip into {place}."
    )
    assert not data_folder.exists()


def test_refuses_other_classes(tmp_path):
    image_folder(tmp_path / "cifar10", [*CLASSES[:-1], "tram"])
    with pytest.raises(CompanionError, match=r"is not CIFAR-10: its classes are not airplane, .*\.$"):
        datasets.load("cifar10", split="train", root=tmp_path)


full_size = os.environ.get("COMPANION_TEST_DATA", "")


@pytest.mark.skipif(not Path(full_size, "cifar10.zip").is_file(), reason="COMPANION_TEST_DATA has no cifar10.zip")
@pytest.mark.parametrize(("split", "per_class"), [("train", 5000), ("test", 800)])
def test_full_size(split, per_class):
    data = datasets.load("cifar10", split=split, root=full_size)
    assert list(data.labels) == CLASSES
    assert data.targets.bincount().tolist() == [per_class] * 10
    with zipfile.ZipFile(Path(full_size, "cifar10.zip")) as file:
        for label in ("airplane", "frog", "truck"):
            content = file.read(f"{split}/{label}/0042.jpg")
            expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            image, target = data[CLASSES.index(label) * per_class + 42]
            assert target == CLASSES.index(label)
            assert np.array_equal(image, expected.transpose(2, 0, 1) / np.float32(255))
