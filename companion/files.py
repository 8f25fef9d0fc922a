"""Files that are either whole or absent: write to a temporary name, then rename. And where those we ship lie."""

import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import companion
from companion.errors import CompanionError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that becomes ``path`` only when the block ends well.

    Until then the bytes are in a hidden file beside it (so the rename stays on one file system), which an error
    removes, and which the next writer removes if the process was killed. The old ``path`` survives every
    failure; a link is followed and stays.

    Raises:
        CompanionError: the file cannot be written (read-only or missing folder, full disk, …).
    """
    with _writable(path) as target:
        part = working_path(target)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a rename must not reach the disk before the bytes do
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_named(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `replacing`, for libraries that want a name, and look at its ending: yields one in a hidden folder.

    Raises:
        CompanionError: ``path`` cannot be written. What goes wrong in the block stays what it is.
    """
    with _writable(path) as target:
        folder = working_path(target)
        folder.mkdir(exist_ok=True)
    try:
        part = folder / target.name
        yield part
        with _writable(path):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse now, rather than after hours of work, an output path that cannot be written; leaves nothing behind.

    Raises:
        CompanionError: as `replacing` would.
    """
    with _writable(path) as target:
        probe = working_path(target)
        probe.touch()
        probe.unlink()


def working_path(path: Path) -> Path:
    """A name beside ``path`` for this process to work under; what killed processes left under theirs is removed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = leftover.name.split(".")[-2]
        if process.isdigit() and not _alive(int(process)):
            with suppress(OSError):  # it may be somebody else's
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _writable(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The file that ``path`` leads to; a failure to write it is one sentence."""
    try:
        target = Path(path).resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle, for one
        raise CompanionError(f"cannot write {path}: it leads nowhere.") from error
    try:
        if target.is_dir():
            raise CompanionError(f"cannot write {path}: it is a folder; name a file in it.")
        if target.exists() and not target.is_file():
            raise CompanionError(f"cannot write {path}: it is not an ordinary file.")
        yield target
    except OSError as error:
        raise CompanionError(f"cannot write {path}: {error.strerror or error}.") from error


def cache_folder() -> Path:
    """The folder ``companion`` in the user's cache folder; it need not exist."""
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "companion"


def shipped(name: str) -> Path:
    """The path of a file that the project ships: in ``data/`` of a checkout, in ``_data`` of an installed package.

    Raises:
        CompanionError: there is no such file.
    """
    package = Path(companion.__file__).parent
    for folder in (package / "_data", package.parent / "data"):
        if (folder / name).is_file():
            return folder / name
    raise CompanionError(f"the file {name} that companion ships is missing: install companion again.")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
