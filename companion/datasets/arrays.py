"""Labelled images that fit into memory."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


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
