"""Runs a bench cell by cell, and remembers every finished one, so that it can be stopped and goes on where it was."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

from companion.errors import CompanionError
from companion.files import check_writable
from companion.metrics import results
from companion.metrics.results import Record, Row, Setting
from companion.progress import progress_bar

FORMAT = "companion-bench-1"


@dataclass(frozen=True)
class Cell:
    """The smallest part of a bench that is done whole or not at all.

    What is to be compared belongs into one cell, interleaved: two cells may be hours apart.
    """

    key: str
    """Its name, unlike all others of the bench and the same in every run."""
    measure: Callable[[], Iterable[Row]]
    """Does the work; no rows if there is nothing to measure here."""


@dataclass(frozen=True)
class Bench:
    """A measurement that ends in a record."""

    name: str
    description: str
    cells: Callable[[], Iterable[Cell]]
    """Prepares (sets threads, loads data) and returns the cells, the same and in the same order in every run."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Threads, seeds, repeats, …: what the record quotes. A run with others cannot go on from this one's."""
    packages: tuple[str, ...] = ("torch",)
    """Those whose versions matter, by their names on PyPI."""


def run(
    bench: Bench,
    *,
    out: str | os.PathLike[str],
    fresh: bool = False,
    progress: bool = True,
    on_cell: Callable[[str, int, int], None] | None = None,
) -> Record:
    """Measure every cell that is not done yet, and write the record to ``out`` when all are.

    Finished cells are kept in ``OUT.partial`` until then, safe from the moment they are done. A run that was stopped,
    killed or failed goes on from there, on the same machine with the same versions and settings; if the code was
    committed to or changed in between, the record's commit ends in ``+modified``.

    Args:
        bench: what to measure.
        out: the results file; an old one stays until the new one is whole.
        fresh: measure all cells again.
        progress: show a bar where somebody watches.
        on_cell: is given a cell's key when it is done, how many are done, and how many there are.

    Raises:
        CompanionError: ``out`` or ``OUT.partial`` cannot be written, another process works on it, ``OUT.partial`` is
            damaged, of another run or none of ours, a cell's rows do not fit the others, or no cell has any.
        KeyboardInterrupt: on Ctrl-C; its message says how to go on.
    """
    out = Path(out)
    check_writable(out)
    cells = list(bench.cells())
    keys = [cell.key for cell in cells]
    if len(set(keys)) < len(keys):
        raise CompanionError(f"two cells of {bench.name} have the same key.")
    draft = results.record(
        bench.name, (), description=bench.description, settings=bench.settings, packages=bench.packages
    )
    head = {"format": FORMAT, "cells": keys} | asdict(draft)
    first = _line(head)
    partial = out.with_name(out.name + ".partial")
    with _opened(partial) as file:
        if fresh:
            file.truncate(0)
        before, done = _read(file, partial)
        if done:
            _check_same(before, json.loads(first), partial, len(done))
            draft = replace(draft, commit=_commit(before["commit"], draft.commit))
        with progress_bar(show=progress, total=len(cells), initial=len(done), desc=bench.name, unit="cell") as bar:
            try:
                for cell in cells:
                    if cell.key in done:
                        continue
                    rows = _measure(cell)
                    if rows:
                        _check_rows(cell, draft, keys, done | {cell.key: rows})
                    line = _line({"cell": cell.key, "rows": [asdict(row) for row in rows]})
                    _append(file, partial, line if done else first + line)
                    done[cell.key] = rows
                    bar.update()
                    if on_cell is not None:
                        on_cell(cell.key, len(done), len(cells))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {len(done)} of {len(cells)} cells are done: the same command goes on from there."
                ) from None
        record = replace(_assemble(draft, keys, done), date=results.now())
        if record.rows:
            results.write(record, out)
        file.truncate(0)
    if not record.rows:
        raise CompanionError(f"{bench.name} found nothing to measure on this machine.")
    return record


def _measure(cell: Cell) -> tuple[Row, ...]:
    found: Any = cell.measure()
    rows = tuple(found) if isinstance(found, Iterable) else (found,)
    for row in rows:
        if not isinstance(row, Row):
            raise CompanionError(f"the rows of cell {cell.key!r} cannot be used: {row!r} is no Row.")
    return rows


def _assemble(draft: Record, keys: list[str], done: Mapping[str, tuple[Row, ...]]) -> Record:
    """The record of the finished cells, in the order of the bench."""
    return replace(draft, rows=tuple(row for key in keys for row in done.get(key, ())))


def _check_rows(cell: Cell, draft: Record, keys: list[str], done: Mapping[str, tuple[Row, ...]]) -> None:
    """Refuse now, not hours later, rows that cannot be written."""
    try:
        results.dumps(_assemble(draft, keys, done))
    except CompanionError as error:
        raise CompanionError(f"the rows of cell {cell.key!r} cannot be used: {error}") from error


# The journal of finished cells: a line that says which run it is of, then one for each cell.

_START = f'{{"format": "{FORMAT}", "cells": '.encode()

# What must be as it was for a run to go on.
_SAME = ("name", "cells", "settings", "companion", "versions", "machine")


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """The journal, for reading and appending and for one process at a time; removed if it is empty in the end."""
    with _locked(path) as file:
        file.seek(0)
        if not _START.startswith(file.read(len(_START))):  # a kill may have left less
            raise CompanionError(f"{path} is not a journal of the format {FORMAT}: move it away.")
        try:
            yield file
        finally:
            empty = not os.fstat(file.fileno()).st_size
            if os.name == "nt":
                file.close()  # or Windows would not remove it; elsewhere it goes before the lock does
            if empty:
                path.unlink(missing_ok=True)


def _locked(path: Path) -> FileIO:
    """The file called ``path``, which no other process has; the system takes the lock back from a killed one."""
    while True:
        try:
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise CompanionError(f"cannot write {path}: {error.strerror or error}.") from error
        if os.name == "nt":
            return file
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in what a cell forks
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:  # who had it removed it before we locked it
            pass
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise CompanionError(f"another process is working on {path}: wait until it is done.") from error
        file.close()


def _line(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except ValueError as error:  # half of a surrogate pair
        raise CompanionError(f"a record holds plain texts and finite numbers only: {error}.") from error


def _append(file: FileIO, path: Path, content: bytes) -> None:
    try:
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise CompanionError(
            f"cannot write {path}: {error.strerror or error}; with room for it, the same command goes on from there."
        ) from error


def _read(file: FileIO, path: Path) -> tuple[dict[str, Any], dict[str, tuple[Row, ...]]]:
    """The journal's first line, and the rows of the cells finished before; neither if there is no such cell."""
    file.seek(0)
    content = file.read()
    lines = content.split(b"\n")[:-1]  # without what a kill left of the last one
    if len(lines) < 2:
        file.truncate(0)
        return {}, {}
    file.truncate(content.rfind(b"\n") + 1)
    try:
        head, *cells = map(json.loads, lines)
        results.from_json(Record, {name: head[name] for name in head if name not in ("format", "cells")})
        done = {cell["cell"]: results.from_json(tuple[Row, ...], cell["rows"], cell["cell"]) for cell in cells}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CompanionError(f"{path} is damaged: delete it to start again.") from error
    return head, done


def _check_same(before: dict[str, Any], head: dict[str, Any], path: Path, done: int) -> None:
    for name in _SAME:
        if before[name] != head[name]:
            raise CompanionError(
                f"{path} holds {done} finished cells of another run: its {name} is {_brief(before[name])}, this "
                f"one's {_brief(head[name])}; go on with that, or give --fresh to start again."
            )


def _commit(before: str | None, now: str | None) -> str | None:
    """The one to quote for a run that was stopped under ``before`` and goes on under ``now``."""
    if before is None or before == now:
        return before
    return before.removesuffix("+modified") + "+modified"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"
