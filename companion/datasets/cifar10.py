"""CIFAR-10: 60,000 photographs of ten kinds of things, 32×32."""

import os
import warnings
import zipfile
from pathlib import Path

import numpy as np

from companion.datasets.arrays import ArrayImages
from companion.datasets.images import Pictures, open_pictures
from companion.datasets.store import data_folder
from companion.errors import CompanionError

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = "cifar-10-batches-py"  # the folder in the original archive


def find(root: str | os.PathLike[str] | None = None) -> Path | None:
    """Where CIFAR-10 lies: a zip or a folder of images, or the original batches; None if nowhere.

    ``root`` is one of these itself or a folder that holds it; without it `data_folder` is searched.
    """
    if root is not None:
        place = Path(os.path.expanduser(root))
        if place.is_file() or (place / "train").is_dir() or place.name == BATCHES:
            return place
    else:
        place = data_folder()
    zipped, *folders = (place / name for name in ("cifar10.zip", "cifar10", BATCHES))
    return zipped if zipped.is_file() else next((path for path in folders if path.is_dir()), None)


def trouble(path: Path) -> str | None:
    """What is wrong with the copy at ``path`` (from `find`), by its checksums; None if nothing is."""
    if path.name == BATCHES:
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import check_integrity

        files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        bad = next((name for name, md5 in files if not check_integrity(path / name, md5)), None)
    elif path.is_file():
        try:
            with zipfile.ZipFile(path) as file:
                bad = file.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            return str(error)
    else:
        return None  # a folder of images has no checksums
    return bad and f"{bad} is not what it should be"


def cifar10(split: str, root: str | os.PathLike[str] | None = None) -> ArrayImages | Pictures:
    """CIFAR-10, 50,000 images to train and 10,000 to test (a zip or folder of images may hold fewer).

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Raises:
        CompanionError: it is not there, is damaged, or has other classes.
    """
    path = find(root)
    if path is None:
        place = data_folder() if root is None else root
        raise CompanionError(
            f"CIFAR-10 is not there: type `companion data get cifar10`, or put cifar10.zip into {place}."
        )
    if path.name == BATCHES:
        return _batches(path, split)
    data = open_pictures("cifar10", path, split, size=32)
    if data.labels != LABELS:
        raise CompanionError(f"{path} is not CIFAR-10: its classes are not {', '.join(LABELS)}.")
    return data


def _batches(path: Path, split: str) -> ArrayImages:
    """The original archive's pickles, which torchvision opens only if their checksums are right."""
    from torchvision.datasets import CIFAR10

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about the age of the pickles
            source = CIFAR10(str(path.parent), train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise CompanionError(
            f"{path} is damaged or incomplete: remove it and type `companion data get cifar10`."
        ) from error
    images = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))  # [N, H, W, 3] → [N, 3, H, W]
    return ArrayImages("cifar10", images, np.array(source.targets, dtype=np.int64), LABELS, augmentation="shift_flip")
