"""What data there is, and whether it is what it should be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from companion.datasets import ag_news, camvid, cifar10
from companion.datasets.arrays import ArrayImages
from companion.datasets.digit_scenes import DigitScenes, digit_scenes
from companion.datasets.digits import digits
from companion.datasets.hard_digits import hard_digits
from companion.datasets.registry import SPLITS
from companion.datasets.store import archive_name, data_folder, manifest, shipped
from companion.errors import CompanionError
from companion.files import sha256

GENERATED: dict[str, Callable[[str], ArrayImages | DigitScenes]] = {
    "digits": digits,
    "hard_digits": hard_digits,
    "digit_scenes": digit_scenes,
}
OTHERS = {"cifar10": cifar10, "camvid": camvid, "ag_news": ag_news}  # not always there
RIGHT = "as it should be"


@dataclass(frozen=True)
class Entry:
    """A data set that `load` knows."""

    name: str
    task: str
    source: str
    state: str
    """``built in``, ``present`` or ``missing``."""
    size: str
    terms: str


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    what: str
    ok: bool
    message: str


def catalogue() -> list[Entry]:
    """Every data set by name: what it is for, where it comes from, whether it is here, its size and terms of use."""
    uci = "UCI, Alpaydin & Kaynak 1998, from scikit-learn"
    mebibytes = manifest()["downloads"]["cifar10"]["bytes"] >> 20
    state = {name: "missing" if room.find() is None else "present" for name, room in OTHERS.items()}
    return [
        Entry("digits", "classify", uci, "built in", "1,797 images", "CC BY 4.0"),
        Entry("hard_digits", "classify", f"made from digits ({uci})", "built in", "6,000 images", "CC BY 4.0"),
        Entry(
            "digit_scenes",
            "segment",
            f"made from digits ({uci})",
            "built in",
            "2,500 images, masks, boxes",
            "CC BY 4.0",
        ),
        Entry("docstrings", "text", "the library of this Python", "built in", "about 6,500 texts", "PSF licence"),
        Entry(
            "cifar10",
            "classify",
            "Krizhevsky 2009",
            state["cifar10"],
            f"60,000 images, {mebibytes} MiB to download",
            "for research and teaching; cite the source",
        ),
        Entry(
            "camvid",
            "segment",
            "Brostow et al. 2009",
            state["camvid"],
            "no download: bring it",
            "CC BY-NC 4.0; cite the source",
        ),
        Entry(
            "ag_news",
            "text",
            "Zhang et al. 2015",
            state["ag_news"],
            "no download: bring it",
            "for research, not commercial",
        ),
    ]


def verify() -> list[Check]:
    """Check what is here against the manifest: shipped files, generated images, downloaded archives."""
    table = manifest()
    checks = [_shipped(name, wanted) for name, wanted in table["shipped"].items()]
    checks += [
        _generated(name, split, table["generated"][name][split]) for name in table["generated"] for split in SPLITS
    ]
    for wanted in table["downloads"].values():
        archive = data_folder() / archive_name(wanted)
        if archive.is_file():
            ok = sha256(archive) == wanted["sha256"]
            checks.append(Check(str(archive), ok, RIGHT if ok else "has the wrong checksum: remove it"))
    for room in OTHERS.values():
        if (path := room.find()) is not None:
            trouble = room.trouble(path)
            checks.append(Check(str(path), trouble is None, trouble or RIGHT))
    return checks


def _shipped(name: str, wanted: dict[str, Any]) -> Check:
    try:
        path = shipped(name)
        ok = path.stat().st_size == wanted["bytes"] and sha256(path) == wanted["sha256"]
    except CompanionError as error:
        return Check(name, False, str(error))
    return Check(name, ok, RIGHT if ok else "was changed since it was shipped: install companion again")


def _generated(name: str, split: str, wanted: str) -> Check:
    ok = GENERATED[name](split).sha256() == wanted
    return Check(
        f"{name} {split}",
        ok,
        RIGHT if ok else "differs from the course's images: use its versions of numpy and scikit-learn",
    )
