"""Where data lies: what the project ships, and what was downloaded."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from companion.files import cache_folder, shipped


def data_folder() -> Path:
    """Where downloaded and own data lie: ``COMPANION_DATA``, or ``companion`` in the user's cache folder.

    The folder need not exist: it is made when something is first written into it.
    """
    if chosen := os.environ.get("COMPANION_DATA"):
        return Path(os.path.expanduser(chosen))
    return cache_folder()


def manifest() -> dict[str, Any]:
    """Checksums of what is shipped (results apart), generated and downloaded: ``data/manifest.json``."""
    table: dict[str, Any] = json.loads(shipped("manifest.json").read_text(encoding="utf-8"))
    return table


def archive_name(download: dict[str, Any]) -> str:
    """The file name of one of the manifest's downloads: what its address ends in."""
    return PurePosixPath(urlsplit(download["url"]).path).name
