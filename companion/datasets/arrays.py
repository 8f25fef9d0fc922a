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
            their ``labels``. Its ``name`` and ``augmentation`` are kept.

    Returns:
        ``data`` itself if it is in memory.

    Raises:
        CompanionError: there are no samples, or the images differ in size.
    """
    if isinstance(data, ArrayImages):
        return data
    if len(data) == 0:
        raise CompanionError("there is nothing to read: the data set is empty.")
    first, _ = data[0]
    images = np.empty((len(data), *first.shape), np.uint8)
    targets = np.empty(len(data), np.int64)
    for i in range(len(data)):
        image, targets[i] = data[i]
        if image.shape != first.shape:
            raise CompanionError(
                f"image {i} is {list(image.shape)}, the first {list(first.shape)}: give them one size."
            )
        images[i] = (255 * image).round().byte().numpy()
    name, augmentation = getattr(data, "name", type(data).__name__), getattr(data, "augmentation", None)
    return ArrayImages(name, images, targets, tuple(data.labels), augmentation=augmentation)
