"""Data sets by name."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.datasets import camvid
from companion.datasets.ag_news import ag_news
from companion.datasets.arrays import ArrayImages
from companion.datasets.cifar10 import cifar10
from companion.datasets.digit_scenes import DigitScenes, digit_scenes
from companion.datasets.digits import digits
from companion.datasets.docstrings import docstrings
from companion.datasets.hard_digits import hard_digits
from companion.datasets.images import Pictures, folder
from companion.datasets.texts import Texts
from companion.errors import CompanionError

SPLITS = ("train", "test")
Samples = ArrayImages | Pictures | DigitScenes | camvid.RoadScenes | Texts

_DATASETS: dict[str, Callable[..., Samples]] = {
    "digits": digits,
    "hard_digits": hard_digits,
    "digit_scenes": digit_scenes,
    "docstrings": docstrings,
    "cifar10": cifar10,
    "camvid": camvid.camvid,
    "ag_news": ag_news,
    "folder": folder,
}


def names() -> list[str]:
    """The names that `load` knows; besides them it takes ``folder:PATH``."""
    return [name for name in _DATASETS if name != "folder"]


def splits(name: str) -> tuple[str, ...]:
    """The splits that `load` knows of a data set: ``train`` and ``test``, of ``camvid`` also ``val``.

    Raises:
        CompanionError: no such data set.
    """
    return camvid.SPLITS if _kind(name) == "camvid" else SPLITS


def load(name: str, *, split: str, root: str | os.PathLike[str] | None = None, **options: Any) -> Samples:
    """Open a data set; nothing is downloaded (see `get`).

    Args:
        name: one of `names`, or ``folder:PATH`` for images of your own.
        split: ``train`` or ``test``, of camvid also ``val``.
        root: where to look for ``cifar10``, ``camvid`` and ``ag_news`` instead of `data_folder`: a folder that holds
            it, or the file or folder itself. The others need none.
        options: ``level`` of hard_digits; ``task``, ``size`` and ``scenes`` of digit_scenes; ``size`` of folder:PATH
            (the side in pixels, 32 if not given); ``vocabulary`` of docstrings and ag_news, if not that of their own
            training split.

    Returns:
        A data set of samples whose image is float32 [3, H, W] in 0..1, or of texts. It has ``name``, ``labels``
        (class names in order), ``augmentation`` (what suits it in training: ``shift``, ``shift_flip`` or None)
        and ``task``, which says what a sample is. ``classify``: ``(image, label)``, the label an int; the
        labels of all samples are in ``targets`` (int64 [N]). ``segment``: ``(image, mask)``, the mask int64 [H,
        W] with 255 for void. ``detect``: ``(image, {"boxes", "labels"})``, float32 [K, 4] as x1, y1, x2, y2 in
        pixels, and int64 [K]. ``text``: ``(ids, label)``, the ids of the text's words int64 [L], as places in
        ``vocabulary``; the texts themselves are in ``texts``, the labels in ``targets``. Those made from digits
        also have ``groups`` (int64 [N]: images of different groups share no scan, but for the fragments in
        hard_digits).

    Raises:
        CompanionError: no such data set, split or option, or data that is missing or unusable.
    """
    kind = _kind(name)
    if split not in splits(name):
        *others, last = splits(name)
        raise CompanionError(f"there is no split {split!r} of {kind}: choose {', '.join(others)} or {last}.")
    build = _DATASETS[kind]
    takes = list(inspect.signature(build).parameters)[1:]
    arguments = dict(options)
    if kind == "folder":
        arguments["path"] = name.partition(":")[2]
        takes.remove("path")
    elif "root" in takes:
        arguments["root"] = root
        takes.remove("root")
    for key in options:
        if key not in takes:
            raise CompanionError(f"{kind} has no option {key!r}: it takes {', '.join(takes) or 'none'}.")
    return build(split, **arguments)


def _kind(name: str) -> str:
    kind, _, path = name.partition(":")
    if kind not in _DATASETS or (kind == "folder") != bool(path):
        own = f" (for the folder or zip here: folder:{name})" if name and Path(name).exists() else ""
        raise CompanionError(f"there is no data set {name!r}: choose one of {', '.join(names())}, folder:PATH{own}.")
    return kind
