"""Sizes that need no clock: parameters and bytes (2.4.1)."""

import os
from pathlib import Path

from torch import nn

from companion.errors import CompanionError


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters, a shared (tied) one counted once; buffers, such as BatchNorm's averages, are none."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def model_bytes(path_or_model: str | os.PathLike[str] | nn.Module) -> int:
    """Bytes of a file on disk, or of a network's state: its parameters and buffers, shared memory counted once.

    The two differ by the file's header and by buffers that are not saved. For a compressed network the
    file is the figure to quote: a state may keep float copies beside the packed weights.

    Raises:
        CompanionError: there is no such file.
    """
    if isinstance(path_or_model, nn.Module):
        storages = [t.untyped_storage() for t in (*path_or_model.parameters(), *path_or_model.buffers())]
        # By identity, not by address: on the meta device every address is zero.
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    path = Path(path_or_model)
    if not path.is_file():
        raise CompanionError(f"there is no file {path}.")
    return path.stat().st_size
