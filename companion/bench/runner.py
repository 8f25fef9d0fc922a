"""Runs a bench cell by cell, and remembers every finished one, so that it can be stopped and goes on where it was."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

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
        CompanionError: ``out`` cannot be written, another process works on it, ``OUT.partial`` is damaged or of
            another run, or a cell's rows do not fit the others.
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
    partial = out.with_name(out.name + ".partial")
    with _opened(partial) as file:
        if fresh:
            file.truncate(0)
        head = {"format": FORMAT, "cells": keys} | json.loads(json.dumps(asdict(draft)))
        commit, done = _finished(file, partial, head)
        draft = replace(draft, commit=commit)
        with progress_bar(show=progress, total=len(cells), initial=len(done), desc=bench.name, unit="cell") as bar:
            try:
                for cell in cells:
                    if cell.key in done:
                        continue
                    rows = tuple(cell.measure())
                    if rows:
                        _check(cell, draft, keys, done | {cell.key: rows})
                    line = {"cell": cell.key, "rows": [asdict(row) for row in rows]}
                    _append(file, *([] if done else [head]), line)
                    done[cell.key] = rows
                    bar.update()
                    if on_cell is not None:
                        on_cell(cell.key, len(done), len(cells))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {len(done)} of {len(cells)} cells are done: the same command goes on from there."
                ) from None
        record = replace(_assemble(draft, keys, done), date=results.now())
        results.write(record, out)
        file.truncate(0)
    return record


def _assemble(draft: Record, keys: list[str], done: Mapping[str, tuple[Row, ...]]) -> Record:
    """The record of the finished cells, in the order of the bench."""
    return replace(draft, rows=tuple(row for key in keys for row in done.get(key, ())))


def _check(cell: Cell, draft: Record, keys: list[str], done: Mapping[str, tuple[Row, ...]]) -> None:
    """Refuse now, not hours later, rows that cannot be written."""
    try:
        results.dumps(_assemble(draft, keys, done))
    except CompanionError as error:
        raise CompanionError(f"the rows of cell {cell.key!r} cannot be used: {error}") from error


# The journal of finished cells: a line that says which run it is of, then one for each cell.

# What must be as it was for a run to go on.
_SAME = ("format", "name", "cells", "settings", "companion", "versions", "machine")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The journal, for reading and appending and for one process at a time; removed if it is empty in the end."""
    with path.open("a+b") as file:
        if os.name != "nt":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system takes it back from a killed process
            except BlockingIOError as error:
                raise CompanionError(f"another process is working on {path}: wait until it is done.") from error
        try:
            yield file
        finally:
            empty = not os.fstat(file.fileno()).st_size
            file.close()  # or Windows would not remove it
            if empty:
                path.unlink(missing_ok=True)


def _append(file: IO[bytes], *lines: Any) -> None:
    file.write(b"".join(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _finished(file: IO[bytes], path: Path, head: dict[str, Any]) -> tuple[str | None, dict[str, tuple[Row, ...]]]:
    """The commit to quote, and the cells finished before; empties a journal that has none."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))  # what a kill left of the last line
    try:
        old, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
        done = {line["cell"]: results.from_json(tuple[Row, ...], line["rows"], line["cell"]) for line in lines}
        found = {name: old[name] for name in (*_SAME, "commit")} if done else head
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CompanionError(f"{path} is damaged: delete it to start again.") from error
    if not done:
        file.truncate(0)
    for name in _SAME:
        if found[name] != head[name]:
            raise CompanionError(
                f"{path} holds {len(done)} finished cells of another run: its {name} is {_brief(found[name])}, this "
                f"one's {_brief(head[name])}; go on with that, or give --fresh to start again."
            )
    commit: str | None = found["commit"]
    if commit is not None and commit != head["commit"]:
        commit = commit.removesuffix("+modified") + "+modified"
    return commit, done


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"
