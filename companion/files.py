"""Files that are either whole or absent: write to a temporary name, then rename."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from companion.errors import CompanionError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that becomes ``path`` only when the block ends well.

    Until then the bytes are in ``.NAME.part`` beside it (so the rename stays on one file system), which
    an error removes and a killed process leaves for the next try to overwrite. The old ``path``
    survives every failure.

    Raises:
        CompanionError: the file cannot be written (read-only or missing folder, full disk, …).
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a rename must not reach the disk before the bytes do
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CompanionError(f"cannot write {path}: {error.strerror or error}.") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse now, rather than after hours of work, an output path that cannot be written; leaves nothing behind.

    Raises:
        CompanionError: as `replacing` would.
    """
    path = Path(path)
    if path.is_dir():
        raise CompanionError(f"cannot write {path}: it is a folder; name a file in it.")
    probe = path.with_name(f".{path.name}.part")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CompanionError(f"cannot write {path}: {error.strerror or error}.") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
