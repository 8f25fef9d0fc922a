"""Pictures in class folders: in a folder, or in a zip that is read without unpacking it."""

import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from companion.errors import CompanionError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval", "dev")
TEST_SHARE = 0.2  # of each class, where the folders do not say what is for testing
LARGEST_FILE = 64 * 2**20  # bytes, about twice a JPEG of 100 megapixels


class Folder:
    """The image files below a folder; links to folders are not followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> dict[str, int]:
        """Each file's name below the folder, with forward slashes, and its bytes."""

        def refuse(error: OSError) -> None:
            raise error

        found = [Path(folder, name) for folder, _, names in os.walk(self.path, onerror=refuse) for name in names]
        names = {path: path.relative_to(self.path).as_posix() for path in found}
        return {name: path.stat().st_size for path, name in names.items() if _is_image(name)}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip:
    """The image files in a zip. Each process opens it for itself: workers that share a handle disturb each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_process": 0}

    def _open(self) -> zipfile.ZipFile:
        if self._process != os.getpid():
            self._file, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._file

    def files(self) -> dict[str, int]:
        return {info.filename: info.file_size for info in self._open().infolist() if _is_image(info.filename)}

    def read(self, name: str) -> bytes:
        return self._open().read(name)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures that are read and decoded when they are asked for: (float32 [3, size, size] in 0..1, label)."""

    task = "classify"

    def __init__(
        self, name: str, source: Folder | Zip, files: dict[str, int], labels: tuple[str, ...], size: int
    ) -> None:
        self.name = name
        self.source = source
        self.files = list(files)
        self.targets = torch.tensor(list(files.values()))  # int64 [N]
        self.labels = labels
        self.size = size
        self.augmentation = "shift_flip"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        return decode(*read(self.source, file), self.size), int(self.targets[index])


def read(source: Folder | Zip, file: str) -> tuple[bytes, str]:
    """The bytes of an image file, and its name for messages.

    Raises:
        CompanionError: it cannot be read or unpacked.
    """
    name = f"{source.path}/{file}"
    try:
        return source.read(file), name
    except OSError as error:
        raise CompanionError(f"cannot read {name}: {error.strerror or error}.") from error
    except Exception as error:  # besides BadZipFile each kind of compression has errors of its own
        raise CompanionError(f"{name} is damaged: {error}.") from error


@contextmanager
def opened(data: bytes, name: str) -> "Iterator[Image]":
    """Open the bytes of an image file; whatever goes wrong while it is decoded becomes one sentence.

    Raises:
        CompanionError: ``name`` is not a whole JPEG, PNG, WebP, BMP or GIF, or has absurdly many pixels.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                yield file
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise CompanionError(f"{name} has too many pixels for a photograph: make it smaller or remove it.") from error
    except CompanionError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise CompanionError(f"{name} is damaged or not an image: replace or remove it.") from error


# Metadata that may say which way up a picture is. Pillow's search for it takes a fifth of the time of a small picture.
_ORIENTED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


def decode(data: bytes, name: str, size: int | None = None) -> Tensor:
    """Turn the bytes of an image file into float32 [3, H, W] in 0..1; arguments and errors are those of `pixels`."""
    return torch.from_numpy(pixels(data, name, size)).permute(2, 0, 1).contiguous().float().div(255)


def pixels(data: bytes, name: str, size: int | None = None, *, most: int | None = None) -> np.ndarray:
    """Turn the bytes of an image file into uint8 [H, W, 3]: upright (by EXIF), red first.

    With a ``size`` it is squeezed to a square of so many pixels a side; without, it stays as large as it is.

    Raises:
        CompanionError: as `opened`, or ``name`` has 16 bits per pixel, or more than ``most`` pixels.
    """
    from PIL import Image, ImageOps

    with opened(data, name) as file:
        if most is not None and file.width * file.height > most:
            raise CompanionError(
                f"{name} has {file.width}×{file.height} pixels, and {most:,} are taken: make it smaller."
            )
        if size is not None:
            file.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at ½, ¼ or ⅛, several times faster
        mode = file.mode
        file.load()  # after which all metadata are known, a PNG's too
        image = ImageOps.exif_transpose(file) if _ORIENTED & file.info.keys() else file
        if image.mode != "RGB":
            image = image.convert("RGB")
    if mode.startswith("I"):  # Pillow's conversion would make nearly all of it white
        raise CompanionError(f"{name} has 16 bits per pixel: save it with 8.")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def decode_mask(data: bytes, name: str) -> Tensor:
    """Turn the bytes of a mask into class numbers, uint8 [H, W]: gray levels, or places in a palette.

    Raises:
        CompanionError: as `opened`, or ``name`` has no class numbers because it is in colour, or 16 bits per pixel.
    """
    with opened(data, name) as file:
        mode, mask = file.mode, np.array(file)
    if mode not in ("L", "P"):
        raise CompanionError(f"{name} is no mask: save it with one byte per pixel, the number of its class.")
    return torch.from_numpy(mask)


def open_source(path: Path) -> tuple[Folder | Zip, list[str]]:
    """The images of a folder or zip, and their names in order.

    Raises:
        CompanionError: nothing there, a damaged zip, no images, or an absurdly large file.
    """
    if not path.exists():
        raise CompanionError(f"there is no folder or zip {path}.")
    source = Folder(path) if path.is_dir() else Zip(path)
    try:
        files = source.files()
    except OSError as error:
        raise CompanionError(f"cannot read {error.filename or path}: {error.strerror or error}.") from error
    except Exception as error:  # a forged index can make zipfile stumble anywhere
        raise CompanionError(f"{path} is damaged or not a zip: {error}.") from error
    for file, size_in_bytes in files.items():
        if size_in_bytes > LARGEST_FILE:
            raise CompanionError(f"{path}/{file} has {size_in_bytes >> 20} MiB, too much for an image: remove it.")
    if not files:
        raise CompanionError(f"{path} holds no images: put JPEG, PNG, WebP, BMP or GIF files there.")
    return source, sorted(files)


def open_pictures(name: str, path: Path, split: str, size: int) -> Pictures:
    """The pictures of one split; their classes are the names of the folders that they lie in.

    Raises:
        CompanionError: as `open_source`, fewer than two classes, or other classes in one split than in the other.
    """
    source, files = open_source(path)
    splits = _splits(path, files)
    labels = _labels(path, splits)
    members = sorted((file, labels.index(label)) for label, files in splits[split].items() for file in files)
    return Pictures(name, source, dict(members), labels, size)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden and not name.endswith("/")


Classes = dict[str, list[str]]  # the files of each class


def _splits(path: Path, files: list[str]) -> dict[str, Classes]:
    parts = {file: file.split("/") for file in files}
    while True:
        folders = {p[0].lower(): p[0] for p in parts.values() if len(p) > 1}
        # One folder around everything, as zips often have, is no class: there are folders below it.
        if len(folders) != 1 or max(map(len, parts.values())) < 3:
            break
        parts = {file: p[1:] for file, p in parts.items() if len(p) > 1}
    train, test = (
        next((folders[name] for name in names if name in folders), None) for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train and test:
        return {
            split: _classes({file: p[1:] for file, p in parts.items() if p[0] == folder})
            for split, folder in (("train", train), ("test", test))
        }
    if train or test:
        missing = "test" if train else "train"
        raise CompanionError(f"{path} has a folder {train or test!r} but no {missing!r}: add it, or rename it.")
    return _divide(path, _classes(parts))


def _classes(parts: dict[str, list[str]]) -> Classes:
    classes: Classes = {}
    for file, p in parts.items():
        if len(p) > 1:  # a picture beside the class folders belongs to none
            classes.setdefault(p[0], []).append(file)
    return classes


def _divide(path: Path, classes: Classes) -> dict[str, Classes]:
    """Take the same share of each class for testing, the same pictures every time."""
    random = np.random.RandomState(0)  # its streams are frozen for ever (NEP 19)
    splits: dict[str, Classes] = {"train": {}, "test": {}}
    for label, files in sorted(classes.items()):
        if len(files) < 2:
            raise CompanionError(f"{path} has one image of {label!r}: two are needed, one of them to test with.")
        order = [files[i] for i in random.permutation(len(files))]
        tests = max(1, round(TEST_SHARE * len(files)))
        splits["test"][label], splits["train"][label] = order[:tests], order[tests:]
    return splits


def _labels(path: Path, splits: dict[str, Classes]) -> tuple[str, ...]:
    train, test = splits["train"], splits["test"]
    for label in sorted(train.keys() ^ test.keys()):
        here, there = ("train", "test") if label in train else ("test", "train")
        raise CompanionError(f"{path} has images of {label!r} to {here} with but none to {there} with: add some.")
    if not train:
        raise CompanionError(f"{path} has images but no class folders: put them into a folder per class.")
    if len(train) < 2:
        raise CompanionError(
            f"{path} has only one class, {next(iter(train))!r}: there must be at least two to tell apart."
        )
    return tuple(sorted(train))


def folder(split: str, path: str, size: int = 32) -> Pictures:
    """Images of your own: a folder or zip with ``train/`` and ``test/`` (or ``val/``) folders of class folders.

    Without those two the class folders themselves: a fifth of each, always the same pictures, is for testing.

    Raises:
        CompanionError: as `open_pictures`, or the size is not a number of pixels from 8 to 1024.
    """
    if not isinstance(size, int) or isinstance(size, bool) or not 8 <= size <= 1024:
        raise CompanionError(f"images can be resized to 8 to 1024 pixels, not {size!r}.")
    return open_pictures(f"folder:{path}", Path(os.path.expanduser(path)), split, size)
