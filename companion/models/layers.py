"""Layers that several networks share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(image − mean) / std per channel, as part of the network, so that no client can get it wrong.

    Takes and returns float images [N, C, H, W]; ``mean`` and ``std`` have one number per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, numbers in (("mean", mean), ("std", std)):
            # Whole numbers would be int64, whose arithmetic with float32 is slow.
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.get_default_dtype()).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
