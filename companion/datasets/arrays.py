"""Labelled images that fit into memory."""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from companion.errors import CompanionError


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Images kept as bytes and handed out as float32 [3, H, W] in 0..1 with an int label.

    The bytes are a torch tensor, so that DataLoader workers share them instead of copying them.
    """

    task = "classify"

    def __init__(
        self,
        name: str,
        images: NDArray[np.uint8],
        targets: NDArray[np.int64],
        labels: tuple[str, ...],
        *,
        scans: NDArray[np.int64] | None = None,
        augmentation: str | None = None,
    ) -> None:
        self.name = name
        self.images = torch.from_numpy(images)  # uint8 [N, 3, H, W]
        self.targets = torch.from_numpy(targets)  # int64 [N]
        self.labels = labels
        self.scans = scans
        """For digits: the numbers of the scans that each image was made from [N, 1 or 2]."""
        self.groups = None if scans is None else scans[:, 0]
        """Images [N] of one group were made from the same scan, so training and validation must not share them."""
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float().div(255), int(self.targets[index])

    def sha256(self) -> str:
        """SHA-256 of all pixels and then all labels (one byte each), as 64 hexadecimal digits."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.targets.numpy().astype(np.uint8).tobytes())
        return digest.hexdigest()


def in_memory(data: Any) -> ArrayImages:
    """The samples of a labelled image data set, read once and kept as bytes: for many epochs over many files.

    Args:
        data: of `companion.datasets` or alike: samples (float image [3, H, W] in 0..1, int label), all of one size, and
            their ``labels``, or a `Subset` of such. Its ``name`` and ``augmentation`` are kept.

    Returns:
        ``data`` itself if it is in memory.

    Raises:
        CompanionError: there are no samples, they are no such images with a class each (a byte cannot hold a
            normalised pixel), or they differ in size.
    """
    if isinstance(data, ArrayImages):
        return data
    if len(data) == 0:
        raise CompanionError("there is nothing to read: the data set is empty.")
    owner = data
    while not hasattr(owner, "labels") and hasattr(owner, "dataset"):
        owner = owner.dataset
    if not hasattr(owner, "labels"):
        raise CompanionError("the data set has no labels: give one of companion.datasets, or set its class names.")
    first = _image(data, 0)[0]
    images = np.empty((len(data), *first.shape), np.uint8)
    targets = np.empty(len(data), np.int64)
    for i in range(len(data)):
        image, targets[i] = _image(data, i)
        if image.shape != first.shape:
            raise CompanionError(
                f"image {i} is {list(image.shape)}, the first {list(first.shape)}: give them one size."
            )
        images[i] = (255 * image).round().byte().numpy()
    name, augmentation = getattr(owner, "name", type(owner).__name__), getattr(owner, "augmentation", None)
    return ArrayImages(name, images, targets, tuple(owner.labels), augmentation=augmentation)


def _image(data: Any, i: int) -> tuple[Tensor, int]:
    """A sample whose image a byte a pixel can hold."""
    image, target = data[i]
    if not (isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3):
        raise CompanionError(f"sample {i} has no float image [3, H, W].")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise CompanionError(f"image {i} has values outside 0..1: give images that are not normalised.")
    try:
        return image, int(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CompanionError(f"sample {i} has no class, a whole number, as its label.") from error
