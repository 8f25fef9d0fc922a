"""Random changes to a batch of images [N, C, H, W] that keep its labels right, drawn from torch's global generator."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from companion.errors import CompanionError

PADDING = 4  # pixels on each side, as in He et al. (2016), section 4.2


def shift(images: Tensor) -> Tensor:
    """Shift each image by up to 4 pixels in both directions; what it leaves behind fills with zeros (black).

    One gather for the whole batch, so that it costs next to nothing beside a training step.
    """
    n, _, height, width = images.shape
    padded = pad(images, [PADDING] * 4)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n, 1)).to(images.device)
    rows = top + torch.arange(height, device=images.device)  # [N, H]
    columns = left + torch.arange(width, device=images.device)  # [N, W]
    batch = torch.arange(n, device=images.device)
    # Indices on both sides of the slice put the channels last: [N, H, W, C].
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def shift_flip(images: Tensor) -> Tensor:
    """`shift`, and half of the images mirrored left to right: for photographs, not for digits."""
    mirrored = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    return shift(torch.where(mirrored, images.flip(3), images))


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"shift": shift, "shift_flip": shift_flip}


def augmentation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The augmentation called ``name``; None changes nothing.

    Raises:
        CompanionError: no such augmentation.
    """
    if name is None:
        return lambda images: images
    if name not in AUGMENTATIONS:
        raise CompanionError(f"there is no augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}.")
    return AUGMENTATIONS[name]
