"""The models of a server: which file is which, what makes one, and when its file is another."""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from companion.errors import CompanionError

T = TypeVar("T")
LOADER = "loader"  # the name of threads that load a model
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Model:
    """What a server asks; made from a file, and replaced as a whole when the file is."""

    predict: Callable[[list[Any]], Sequence[Any]]
    """Items → an `Answer` or an exception for each."""
    example: Any
    """An item to warm up with."""
    takes: str = ""
    """In words, such as ``images of 32×32``: what another model in its place must take too."""
    labels: tuple[str, ...] | None = None
    """Class names, which another model in its place must have too."""
    release: Callable[[], None] | None = None
    """Frees what it holds."""

    def check_replaces(self, old: "Model") -> None:
        """
        Raises:
            CompanionError: clients of the old model would not get along with this one.
        """
        if self.takes != old.takes:
            raise CompanionError(f"it takes {self.takes}, not {old.takes}: start the server anew for that.")
        if self.labels != old.labels:
            raise CompanionError("its labels are others: start the server anew for that.")


def named(texts: Sequence[str]) -> dict[str, Path]:
    """The files of ``NAME=FILE`` and ``FILE`` by name; without one, it is the file's name without its ending.

    Raises:
        CompanionError: none, two of one name, or a name that is none.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            name, file = UNFIT.sub("-", Path(text).stem).lstrip("-._") or "model", text
        if not NAME.fullmatch(name):
            raise CompanionError(f"{name!r} is no name for a model: use letters, digits, dots, dashes and underscores.")
        if name in found:
            raise CompanionError(f"two models are called {name}: give them names, as in --model other={file}.")
        found[name] = Path(file)
    if not found:
        raise CompanionError("there is no model: name its file with --model.")
    return found


def signature(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that was there before; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def load_whole(path: Path | None, load: Callable[[], Model]) -> Model:
    """What ``load`` makes of the file.

    Raises:
        CompanionError: as ``load``; or the file was written meanwhile, so that half of it may be the old one's.
    """
    before = signature(path) if path else None
    model = load()
    if path and signature(path) != before:
        if model.release is not None:
            model.release()
        raise CompanionError(f"{path} was written while it was read: replace it in one step, by renaming.")
    return model


async def in_thread(function: Callable[[], T]) -> T:
    """What ``function`` returns, from a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(result)  # type: ignore[arg-type]
            else:
                done.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = RuntimeError(repr(caught)) if isinstance(caught, StopIteration) else caught
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=LOADER, daemon=True).start()
    return await done


def leave(code: int) -> None:
    """End the process at once if a model is still being loaded or asked: Python would wait for neither, but its end
    under a running network is a crash."""
    if any(thread.name in (LOADER, "batcher") for thread in threading.enumerate()):
        os._exit(code)
