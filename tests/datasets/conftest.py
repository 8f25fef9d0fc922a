"""Nothing here may touch the data of whoever runs the tests."""

import io
import pickle
import tarfile
from dataclasses import dataclass

import numpy as np
import pytest

from companion.datasets import cifar10


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """An empty place for downloaded data, which does not exist yet."""
    folder = tmp_path / "cache" / "companion"
    monkeypatch.setenv("COMPANION_DATA", str(folder))
    return folder


@dataclass
class Archive:
    """An archive of the original's shape, with few images."""

    content: bytes
    images: dict[str, np.ndarray]
    targets: dict[str, list[int]]


@pytest.fixture
def tiny_cifar10(monkeypatch):
    """CIFAR-10's original archive with 20 images per file, and torchvision's checksums changed to match."""
    import hashlib

    from torchvision.datasets import CIFAR10

    random = np.random.default_rng(0)
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    files = {"batches.meta": pickle.dumps({"label_names": list(cifar10.LABELS)}, protocol=2)}
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    targets: dict[str, list[int]] = {"train": [], "test": []}
    for split in names:
        for name in names[split]:
            pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
            labels = random.integers(0, 10, 20).tolist()
            files[name] = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
            images[split].append(pixels.reshape(20, 3, 32, 32))  # each row: 1,024 red, 1,024 green, 1,024 blue
            targets[split] += labels
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names["train"]])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5[name]] for name in names["test"]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        evil = tarfile.TarInfo("cifar-10-batches-py/../../evil")
        tar.addfile(evil, io.BytesIO())
        link = tarfile.TarInfo("cifar-10-batches-py/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Archive(buffer.getvalue(), {split: np.concatenate(images[split]) for split in images}, targets)
