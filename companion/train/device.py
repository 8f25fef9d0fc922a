"""Where a network computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import CompanionError


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device called ``name``; None takes a CUDA GPU if there is one, else the CPU.

    Raises:
        CompanionError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise CompanionError(
            f"there is no device {str(name)!r} here: `companion doctor` lists those there are."
        ) from error
    return device


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The network on ``device`` and channels-last, which convolutions like best; afterwards back, in plain layout."""
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    volumes = any(p.dim() == 5 for p in model.parameters())  # of 3-D convolutions, for which there is no such layout
    layout = torch.preserve_format if volumes else torch.channels_last
    plain = torch.preserve_format if volumes else torch.contiguous_format
    # The type hints of Module.to leave memory_format out.
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(device=home, memory_format=plain)  # type: ignore[call-overload]


def move(value: Any, device: torch.device) -> Any:
    """Tensors, alone or in tuples, lists and tables, on the device; images channels-last."""
    if isinstance(value, Tensor):
        layout = torch.channels_last if value.dim() == 4 else torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=layout)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value
