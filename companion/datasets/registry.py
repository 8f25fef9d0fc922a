"""Data sets by name."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.datasets.arrays import ArrayImages
from companion.datasets.cifar10 import cifar10
from companion.datasets.digits import digits
from companion.datasets.hard_digits import hard_digits
from companion.datasets.images import Pictures, folder
from companion.errors import CompanionError

SPLITS = ("train", "test")

_DATASETS: dict[str, Callable[..., ArrayImages | Pictures]] = {
    "digits": digits,
    "hard_digits": hard_digits,
    "cifar10": cifar10,
    "folder": folder,
}


def names() -> list[str]:
    """The names that `load` knows; besides them it takes ``folder:PATH``."""
    return [name for name in _DATASETS if name != "folder"]


def load(
    name: str, *, split: str, root: str | os.PathLike[str] | None = None, **options: Any
) -> ArrayImages | Pictures:
    """Open a data set; nothing is downloaded (see `get`).

    Args:
        name: one of `names`, or ``folder:PATH`` for images of your own.
        split: ``train`` or ``test``.
        root: where to look for ``cifar10`` instead of `data_folder`: a folder that holds it, or the
            zip or folder itself. The others need none.
        options: ``level`` of hard_digits, ``size`` of folder:PATH (the side in pixels, 32 if not given).

    Returns:
        A data set of samples ``(image, label)``: float32 [3, H, W] in 0..1 and int. It has ``name``,
        ``task`` (``classify``), ``labels`` (class names in order), ``targets`` (int64 [N], the labels of
        all samples) and ``augmentation`` (what suits it in training: ``shift``, ``shift_flip`` or None).
        Those made from digits also have ``groups`` (int64 [N]: images of one group come from one scan).

    Raises:
        CompanionError: no such data set, split or option, or data that is missing or unusable.
    """
    kind, _, path = name.partition(":")
    if kind not in _DATASETS or (kind == "folder") != bool(path):
        own = f" (for the folder or zip here: folder:{name})" if name and Path(name).exists() else ""
        raise CompanionError(f"there is no data set {name!r}: choose one of {', '.join(names())}, folder:PATH{own}.")
    if split not in SPLITS:
        raise CompanionError(f"there is no split {split!r}: choose train or test.")
    build = _DATASETS[kind]
    takes = list(inspect.signature(build).parameters)[1:]
    arguments = dict(options)
    if kind == "folder":
        arguments["path"] = path
        takes.remove("path")
    elif kind == "cifar10":
        arguments["root"] = root
        takes.remove("root")
    for key in options:
        if key not in takes:
            raise CompanionError(f"{kind} has no option {key!r}: it takes {', '.join(takes) or 'none'}.")
    return build(split, **arguments)
