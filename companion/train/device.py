"""Where a network computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    hooks = [_keep_plain(conv) for conv in model.modules() if device.type == "cpu" and _overruns(conv)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(device=home, memory_format=plain)  # type: ignore[call-overload]


NARROW = 16  # channels: oneDNN's blocks have 8 with AVX2, and 16 with AVX-512


def _overruns(module: nn.Module) -> bool:
    """Whether oneDNN writes past its memory in the backward pass of this layer if it is channels-last: a 1×1
    convolution with a stride, of fewer channels than a block (oneDNN issue 6035). Pruned networks have such layers."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < NARROW
    )


def _keep_plain(conv: nn.Module) -> RemovableHandle:
    """Have the layer compute in plain layout, until the hook is removed."""
    for parameter in conv.parameters():
        # Of 1×1 filters both layouts are one and only the strides tell: contiguous() would leave them.
        parameter.data = parameter.data.flatten().view(parameter.shape)
    return conv.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


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
