"""CamVid: road scenes from a driving car, each pixel labelled."""

import os
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import Dataset

from companion.datasets.images import Folder, Zip, decode, decode_mask, open_source, read
from companion.datasets.store import data_folder, put_by_hand
from companion.errors import CompanionError

SPLITS = ("train", "val", "test")
# In the order of SegNet's masks, whose twelfth class stands for all that the others leave out.
LABELS = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
FILE_VOID, VOID = len(LABELS), 255  # in the files, and as a task's masks have it
FORMS = "camvid.zip or a folder camvid (train, val and test, each with images and masks)"


class RoadScenes(Dataset[tuple[Tensor, Tensor]]):
    """Pictures and masks, read when they are asked for: float32 [3, H, W] in 0..1 and int64 [H, W], void 255."""

    name = "camvid"
    task = "segment"
    labels = LABELS
    augmentation = "shift_flip"

    def __init__(self, source: Folder | Zip, files: list[tuple[str, str]]) -> None:
        self.source = source
        self.files = files
        """The names of each image and its mask."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_file, mask_file = self.files[index]
        image = decode(*read(self.source, image_file))
        data, name = read(self.source, mask_file)
        mask = decode_mask(data, name).long()
        if mask.shape != image.shape[1:]:
            sizes = [f"{width}×{height}" for height, width in (mask.shape, image.shape[1:])]
            raise CompanionError(f"{name} has {sizes[0]} pixels, its image {sizes[1]}: they must be equal.")
        if mask.max() > FILE_VOID:
            raise CompanionError(f"{name} has a class {mask.max()}: CamVid's are 0 to {FILE_VOID}.")
        return image, torch.where(mask == FILE_VOID, VOID, mask)


def find(root: str | os.PathLike[str] | None = None) -> Path | None:
    """Where CamVid lies, a zip or a folder; None if nowhere.

    ``root`` is one of these itself or a folder that holds it; without it `data_folder` is searched.
    """
    place = data_folder() if root is None else Path(os.path.expanduser(root))
    if root is not None and (place.is_file() or (place / "train").is_dir()):
        return place
    candidates = (place / name for name in ("camvid.zip", "camvid_small.zip", "camvid"))
    return next((path for path in candidates if path.exists()), None)


def locate(root: str | os.PathLike[str] | None = None) -> Path:
    """What `find` finds.

    Raises:
        CompanionError: nothing; the message says what to put where.
    """
    return put_by_hand(find(root), "CamVid", FORMS, root)


def trouble(path: Path) -> str | None:
    """What is wrong with the copy at ``path`` (from `find`), after reading all of it; None if nothing is."""
    try:
        for split in SPLITS:
            data = camvid(split, root=path)
            for i in range(len(data)):
                data[i]
    except CompanionError as error:
        return str(error)
    return None


def camvid(split: str, root: str | os.PathLike[str] | None = None) -> RoadScenes:
    """CamVid in the reduced form of SegNet's tutorial: road scenes in 11 classes, and void.

    It cannot be downloaded with `get`: put ``camvid.zip``, or a folder ``camvid``, into `data_folder`. Either holds
    ``train``, ``val`` and ``test``, each with ``images`` (JPEG or PNG) and ``masks`` (PNG of the same names, whose
    values are the classes 0 to 10, and 11 for void). Images stay as large as they are. Terms: CC BY-NC 4.0.

    The pictures are frames of a few drives, so neighbours look alike. ``val`` is the data set's own validation split:
    pass it to `fit` as ``validation``, which would otherwise hold out frames from between those that it trains on.

    Source: G. Brostow, J. Fauqueur and R. Cipolla, Semantic Object Classes in Video: A High-Definition Ground Truth
    Database, Pattern Recognition Letters 30, 2009; the 11 classes: V. Badrinarayanan, A. Kendall and R. Cipolla,
    SegNet, 2017.

    Raises:
        CompanionError: it is not there or is damaged, an image has no mask, or a mask no image. A damaged file, a mask
            of another size than its image, or one with other classes is named when it is read.
    """
    path = locate(root)
    source, files = open_source(path)
    pairs: dict[str, dict[str, str]] = {"images": {}, "masks": {}}
    for file in files:
        name = PurePosixPath(file)
        if name.parts[-3:-1] in ((split, "images"), (split, "masks")):
            kind = pairs[name.parts[-2]]
            if name.stem in kind:
                raise CompanionError(f"{path} has {kind[name.stem]} and {file}: remove one of them.")
            kind[name.stem] = file
    images, masks = pairs["images"], pairs["masks"]
    if not images:
        raise CompanionError(f"{path} is not CamVid: it has no images in {split}/images.")
    for stem in sorted(images.keys() ^ masks.keys()):
        lonely, other = (images[stem], "mask") if stem in images else (masks[stem], "image")
        raise CompanionError(f"{path}/{lonely} has no {other} of the same name: add it, or remove this file.")
    return RoadScenes(source, [(images[stem], masks[stem]) for stem in sorted(images)])
