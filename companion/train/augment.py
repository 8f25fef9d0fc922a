"""Random changes to a batch of images [N, C, H, W] that keep its targets right, drawn from torch's global generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from companion.errors import CompanionError

PADDING = 4  # pixels on each side, as in He et al. (2016), section 4.2
SMALLEST = 0.6  # of an image's size, in a letterbox
GRAY = 114 / 255  # around the pictures that YOLOv5 gets to see
VOID = 255  # the class of a mask's pixels that neither loss nor score counts


@dataclass(frozen=True)
class Placement:
    """Where each pixel comes from: its row [N, H] and column [N, W] in the image with 4 more pixels on each side."""

    rows: Tensor
    columns: Tensor
    outside: float = 0.0
    """What images have around them."""

    def __call__(self, images: Tensor, outside: float | None = None) -> Tensor:
        """Images or masks [N, C, H, W], placed so; what comes from outside is filled.

        One gather for the whole batch, so that it costs next to nothing beside a training step.
        """
        padded = pad(images, [PADDING] * 4, value=self.outside if outside is None else outside)
        batch = torch.arange(len(images), device=images.device)
        rows, columns = self.rows.to(images.device), self.columns.to(images.device)
        # Indices on both sides of the slice put the channels last: [N, H, W, C].
        return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes [N, K, 4] as x1, y1, x2, y2 around the pixels that are theirs now; all zeros if none is left."""
        sides = []
        for low, sources in enumerate((self.columns, self.rows)):
            sources = sources[:, None].to(boxes.device) - PADDING
            theirs = (boxes[..., low, None] <= sources) & (sources < boxes[..., low + 2, None])  # [N, K, W or H]
            first = theirs.int().argmax(2)  # of equal ones the first
            sides.append((first, first + theirs.sum(2)))
        (x1, x2), (y1, y2) = sides
        left = ((x2 > x1) & (y2 > y1))[..., None]
        return torch.stack((x1, y1, x2, y2), 2).to(boxes.dtype) * left


def shift(n: int, height: int, width: int) -> Placement:
    """Shift each image by up to 4 pixels in both directions; what it leaves behind is black, and void in a mask."""
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n, 1))
    return Placement(top + torch.arange(height), left + torch.arange(width))


def shift_flip(n: int, height: int, width: int) -> Placement:
    """`shift`, and half of the images mirrored left to right: for photographs, not for digits."""
    mirrored = torch.rand(n, 1) < 0.5
    shifted = shift(n, height, width)
    last = width + 2 * PADDING - 1
    return Placement(shifted.rows, torch.where(mirrored, last - shifted.columns, shifted.columns))


def letterbox(n: int, height: int, width: int) -> Placement:
    """Half of the images shrunk, to no less than 0.6 of their size, somewhere on gray: for detectors.

    They get pictures of all proportions, with gray at two edges, and find things in gray that they never saw.
    """
    scale = torch.where(torch.rand(n, 1) < 0.5, 1.0, SMALLEST + (1 - SMALLEST) * torch.rand(n, 1))
    rows, columns = (_shrunk(scale, torch.rand(n, 1), size) for size in (height, width))
    return Placement(rows, columns, outside=GRAY)


def _shrunk(scale: Tensor, place: Tensor, size: int) -> Tensor:
    """Sources [N, size] of pixels in a row; 0, which is outside, for those around the shrunken one."""
    start = (place * (1 - scale) * size).floor()
    source = ((torch.arange(size) - start) / scale).floor().long()
    return torch.where((source >= 0) & (source < size), source + PADDING, 0)


AUGMENTATIONS: dict[str, Callable[[int, int, int], Placement]] = {
    "shift": shift,
    "shift_flip": shift_flip,
    "letterbox": letterbox,
}


def augmentation(
    name: str | None, follow: Callable[[Any, Placement], Any] | None
) -> Callable[[Any, Any, Sequence[int], int], tuple[Any, Any]]:
    """The augmentation called ``name`` of a part of a batch; None changes nothing.

    What it gives takes images and targets, which samples of the batch they are, and how many the batch has: a sample is
    changed alike however the batch is divided.

    Args:
        name: ``shift``, ``shift_flip``, ``letterbox`` or None.
        follow: what becomes of the targets when the images are placed otherwise; None if there is no saying.

    Raises:
        CompanionError: no such augmentation, or targets that cannot follow.
    """
    if name is None:
        return lambda images, targets, part, n: (images, targets)
    if name not in AUGMENTATIONS:
        raise CompanionError(f"there is no augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}.")
    if follow is None:
        raise CompanionError(f"the augmentation {name!r} is for images with labels or masks: choose None.")

    def change(images: Tensor, targets: Any, part: Sequence[int], n: int) -> tuple[Tensor, Any]:
        whole = AUGMENTATIONS[name](n, *images.shape[2:])
        placement = Placement(whole.rows[list(part)], whole.columns[list(part)], whole.outside)
        return placement(images), follow(targets, placement)

    return change
