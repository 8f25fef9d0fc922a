"""Where data lies: what the project ships, and what was downloaded."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from companion.errors import CompanionError
from companion.files import cache_folder, shipped


def data_folder() -> Path:
    """Where downloaded and own data lie: ``COMPANION_DATA``, or ``companion`` in the user's cache folder.

    The folder need not exist: it is made when something is first written into it.
    """
    if chosen := os.environ.get("COMPANION_DATA"):
        return Path(os.path.expanduser(chosen))
    return cache_folder()


def put_by_hand(found: Path | None, name: str, forms: str, root: str | os.PathLike[str] | None) -> Path:
    """``found``, a data set that nothing downloads.

    Args:
        found: where it lies, or None.
        name: of the data set, for people.
        forms: the files or folders that it may come in.
        root: where it was looked for; None is `data_folder`.

    Raises:
        CompanionError: it lies nowhere; the message says what to put where.
    """
    if found is None:
        place = data_folder() if root is None else root
        raise CompanionError(f"{name} is not there, and cannot be downloaded: put {forms} into {place}.")
    return found


def manifest() -> dict[str, Any]:
    """Checksums of what is shipped (results apart), generated and downloaded: ``data/manifest.json``."""
    table: dict[str, Any] = json.loads(shipped("manifest.json").read_text(encoding="utf-8"))
    return table


def archive_name(download: dict[str, Any]) -> str:
    """The file name of one of the manifest's downloads: what its address ends in."""
    return PurePosixPath(urlsplit(download["url"]).path).name
