"""Results to compare with: what was measured, on which machine and with which versions, in one checked file (2.4.3).

`companion bench` writes them, the site's tables and the notebooks' "yours against ours" read them. This file needs the
standard library only, so that the site is built without PyTorch.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import companion
from companion.errors import CompanionError
from companion.files import replacing, shipped

FORMAT = "companion-results-1"
LIMIT = 4 << 20  # bytes: a thousand times what a table on a page needs

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Measured:
    """A value that differs from one repetition to the next; `summarize` makes one from samples."""

    median: float
    low: float
    """First quartile of the repetitions."""
    high: float
    """Third quartile."""
    repeats: int
    """How many repetitions, runs or seeds the three come from."""
    unit: str
    """``ms``, ``images/s``, ``%``, …; empty for a ratio."""

    def __post_init__(self) -> None:
        for name in ("median", "low", "high"):
            if not isinstance(value := getattr(self, name), Real):
                raise CompanionError(f"{name} must be a number, not {value!r}.")
            object.__setattr__(self, name, float(value))  # also from NumPy, whose numbers JSON does not know
        if not isinstance(self.repeats, int):
            raise CompanionError(f"repeats must be a whole number, not {self.repeats!r}.")
        if not all(map(math.isfinite, (self.median, self.low, self.high))):
            raise CompanionError("a measured value must be finite.")
        if not self.low <= self.median <= self.high:
            raise CompanionError(f"the median {self.median} lies outside its quartiles, {self.low} to {self.high}.")
        if self.repeats < 1:
            raise CompanionError(f"a value measured {self.repeats} times was not measured.")


Value = Measured | str | int | float | bool


@dataclass(frozen=True)
class Row:
    """One line of a table: what was looked at, and what was found."""

    keys: dict[str, Scalar]
    """What sets this row apart from the others, such as ``{"network": "simple_cnn", "batch": 8}``."""
    values: dict[str, Value]
    """What was measured, and exact facts such as ``{"parameters": 545098}``; their names are the columns."""

    def __post_init__(self) -> None:
        if both := self.keys.keys() & self.values.keys():
            raise CompanionError(f"{sorted(both)[0]!r} is both a key and a value of a row.")
        _check_plain(self.keys)
        _check_plain({name: value for name, value in self.values.items() if not isinstance(value, Measured)})

    def flat(self) -> dict[str, Scalar]:
        """Keys and values by name, medians for what was measured: what `pareto_front` and data frames take."""
        medians = {name: v.median if isinstance(v, Measured) else v for name, v in self.values.items()}
        return self.keys | medians


def _check_plain(table: Mapping[Any, Any]) -> None:
    for name, value in table.items():
        if not isinstance(name, str):
            raise CompanionError(f"the name {name!r} must be a text.")
        if not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
            raise CompanionError(f"{name} must be a text, a finite number, True or False, not {value!r}.")


@dataclass(frozen=True)
class Hardware:
    """What a record tells of the machine: enough to judge its figures, and neither its name nor its owner's."""

    cpu: str
    cores: int
    """Those this process may use."""
    memory_gib: int | None
    system: str
    accelerators: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.cores < 1 or (self.memory_gib or 0) < 0:
            raise CompanionError(f"{self.cores} cores with {self.memory_gib} GiB are no machine.")

    def __str__(self) -> str:
        memory = [] if self.memory_gib is None else [f"{self.memory_gib} GiB"]
        cores = f"{self.cores} core" + "s" * (self.cores != 1)
        return ", ".join([self.cpu, cores, *memory, self.system, *self.accelerators])


Setting = str | int | float | bool | tuple[Scalar, ...]


@dataclass(frozen=True)
class Record:
    """The result of one bench, with all that a reader needs to trust it or to repeat it."""

    name: str
    description: str
    companion: str
    """Version of this package."""
    commit: str | None
    """Of this repository, with ``+modified`` if files differed from it; None outside a checkout."""
    date: str
    """When it was finished, ``2026-01-31T12:00:00Z``, in UTC."""
    machine: Hardware
    versions: dict[str, str]
    """Of Python and of the packages that matter to these figures."""
    settings: dict[str, Setting]
    """Threads, seeds, repeats and what else was chosen."""
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise CompanionError(f"the name {self.name!r} is not made of small letters, digits and _.")
        if self.commit is not None and not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?(\+modified)?", self.commit):
            raise CompanionError(f"the commit {self.commit!r} is none.")
        try:
            padded = datetime.strptime(self.date, "%Y-%m-%dT%H:%M:%SZ").isoformat() + "Z"
        except ValueError:
            padded = None
        if self.date != padded:
            raise CompanionError(f"the date {self.date!r} is not of the form 2026-01-31T12:00:00Z.")
        # As they are read back.
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()}
        object.__setattr__(self, "settings", settings)
        for name, setting in settings.items():
            for item in setting if isinstance(setting, tuple) else (setting,):
                _check_plain({name: item})
        seen: dict[tuple[Scalar, ...], int] = {}
        units: dict[str, str | None] = {}
        for i, row in enumerate(self.rows):
            if row.keys.keys() != self.rows[0].keys.keys():
                raise CompanionError(f"rows[{i}] has the keys {_list(row.keys)}, rows[0] {_list(self.rows[0].keys)}.")
            if (first := seen.setdefault(_identity(row), i)) != i:
                raise CompanionError(f"rows[{i}] has the same keys as rows[{first}].")
            for name, value in row.values.items():
                unit = value.unit if isinstance(value, Measured) else None
                if units.setdefault(name, unit) != unit:
                    before = units[name]
                    raise CompanionError(f"rows[{i}].values.{name} has the unit {unit}, and {before} in earlier rows.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all keys, then of all values, in the order in which they first come."""
        keys = [name for row in self.rows[:1] for name in row.keys]
        return tuple(dict.fromkeys([*keys, *(name for row in self.rows for name in row.values)]))

    def to_markdown(self, columns: Sequence[str] | None = None) -> str:
        """The table, and below it the machine, versions and settings.

        Args:
            columns: the names of some columns, in the order wanted; all if not given. Rows that have a value in none of
                them are left out.

        Raises:
            CompanionError: there is no such column.
        """
        columns = _chosen(self, columns)
        values = {name for row in self.rows for name in row.values}.intersection(columns)
        rows = [row for row in self.rows if not values or values.intersection(row.values)]
        cells = [{**row.keys, **row.values} for row in rows]
        lines = [[_text(row[name]) if name in row else "–" for name in columns] for row in cells]
        heads = [_head(name, [row[name] for row in cells if name in row]) for name in columns]
        numeric = [not any(isinstance(row.get(name), str) for row in cells) for name in columns]
        return f"{_table(heads, lines, numeric)}\n\n{self.provenance()}\n"

    def provenance(self) -> str:
        """How and where the figures came about, in a few sentences of Markdown."""
        repeats = sorted({v.repeats for row in self.rows for v in row.values.values() if isinstance(v, Measured)})
        runs = "–".join(str(number) for number in dict.fromkeys([repeats[0], repeats[-1]])) if repeats else ""
        measured = f"Median (quartiles) of {runs} repeat{'s' * (runs != '1')}. " if repeats else ""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        settings = "".join(f"; {name.replace('_', ' ')} {_setting(value)}" for name, value in self.settings.items())
        commit, _, modified = (self.commit or "").partition("+")
        source = f" ({commit[:7]}{', modified' * bool(modified)})" if commit else ""
        return measured + _escape(
            f"{self.machine}; {versions}, companion {self.companion}{source}{settings}; {self.date[:10]}."
        )

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


@dataclass(frozen=True)
class Pair:
    """One value in two records."""

    keys: dict[str, Scalar]
    name: str
    unit: str
    ours: float
    yours: float

    @property
    def ratio(self) -> float | None:
        """Yours divided by ours, so 2 is twice as much; None where ours is 0."""
        return self.yours / self.ours if self.ours else None


@dataclass(frozen=True)
class SideBySide:
    """Your figures against ours; in a notebook, a table."""

    ours: Record
    yours: Record
    pairs: tuple[Pair, ...]

    def to_markdown(self) -> str:
        """A line for each value, then both machines."""
        heads = [*map(_escape, self.pairs[0].keys), "what", "ours", "yours", "yours / ours"]
        lines = [
            [
                *map(_text, pair.keys.values()),
                _escape(f"{pair.name} in {pair.unit}" if pair.unit else pair.name),
                _number(pair.ours),
                _number(pair.yours),
                "–" if pair.ratio is None else f"{_number(pair.ratio)} ×",
            ]
            for pair in self.pairs
        ]
        keys = self.pairs[0].keys
        numeric = [not any(isinstance(pair.keys[name], str) for pair in self.pairs) for name in keys]
        table = _table(heads, lines, [*numeric, False, True, True, True])
        return f"{table}\n\nOurs: {self.ours.provenance()}\n\nYours: {self.yours.provenance()}\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def summarize(samples: Iterable[float], unit: str) -> Measured:
    """Median and quartiles of repetitions, as NumPy computes them (linear interpolation).

    Raises:
        CompanionError: there is no sample, or one is not finite.
    """
    values = sorted(map(float, samples))
    if not values:
        raise CompanionError("there are no samples to summarize.")
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Measured(middle, min(low, middle), max(middle, high), len(values), unit)  # rounding may swap equal ones


def record(
    name: str,
    rows: Iterable[Row],
    *,
    description: str = "",
    settings: Mapping[str, Setting] | None = None,
    packages: Sequence[str] = ("torch",),
) -> Record:
    """A record of what was just measured here: adds machine, versions, commit and date.

    Args:
        name: of the bench, in small letters, digits and ``_``.
        rows: all with the same keys, no two with equal ones; a column has one unit.
        description: one line.
        settings: threads, seeds, repeats, ….
        packages: those whose versions matter, by their names on PyPI; one that is not installed is left out.

    Raises:
        CompanionError: the rows do not fit together.
    """
    versions = {"Python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Record(
        name,
        description,
        companion.__version__,
        current_commit(),
        now(),
        this_machine(),
        versions,
        dict(settings or {}),
        tuple(rows),
    )


def now() -> str:
    """The time in UTC, as records have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def this_machine() -> Hardware:
    """The machine that runs this, NVIDIA GPUs included (also those that CUDA_VISIBLE_DEVICES hides)."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux only
        cpu = _named(Path("/proc/cpuinfo").read_text(encoding="utf-8")) or cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = None
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return Hardware(cpu, cores, memory, f"{platform.system()} {platform.machine()}", tuple(_gpus()))


def _named(cpuinfo: str) -> str | None:
    """The processor's name; one without a number, as clouds give, says less than its family and model."""
    found = dict(re.findall(r"(?m)^(model name|cpu family|model)\s*: (.+)$", cpuinfo))
    name = found.get("model name", "").strip()
    if name and not re.search(r"\d", name) and len(found) == 3:
        return f"{name} (family {found['cpu family']}, model {found['model']})"
    return name or None


def _gpus() -> Iterator[str]:
    with suppress(Exception):  # no driver, or one that will not tell: the record then names no GPU
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        for i in range(nvml.nvmlDeviceGetCount()):
            yield nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(i))


def current_commit() -> str | None:
    """The commit of the checkout that this package runs from, as records have it.

    Changes under ``data/results`` do not count: there the results of one bench would make the next one's look modified.
    """
    root = Path(companion.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, perhaps somewhere inside another project's repository
        return None
    try:
        head, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=60).stdout
            for words in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--", ".", ":(exclude)data/results"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + "+modified" * bool(changes)


def dumps(record: Record) -> str:
    """The text of a results file, the same for equal records: JSON, one line for each row.

    Raises:
        CompanionError: a part is not of the type that its class says, there are no rows, or it is larger than 4 MiB.
    """
    head = {"format": FORMAT} | asdict(record)
    rows = head.pop("rows")
    try:
        top = json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False)
        lines = ",\n    ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        text = f'{top[:-2]},\n  "rows": [\n    {lines}\n  ]\n}}\n'
        size = len(text.encode())
    except (TypeError, ValueError) as error:  # a NumPy integer, a tensor, half of a surrogate pair
        raise CompanionError(f"a record holds plain texts and finite numbers only: {error}.") from error
    _check_size(size)
    loads(text)
    return text


def loads(text: str) -> Record:
    """Read the text of a results file.

    Raises:
        CompanionError: the text is not JSON, or a field is missing, unknown or not what it should be.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number in JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError(f"an object names a part twice ({_list(name for name, _ in pairs)})")
        return table

    try:
        table = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CompanionError(f"it is not JSON: {error}.") from error
    if not isinstance(table, dict) or table.pop("format", None) != FORMAT:
        raise CompanionError(f"its format is not {FORMAT!r}.")
    found: Record = from_json(Record, table)
    if not found.rows:
        raise CompanionError("it has no rows.")
    return found


def write(record: Record, path: str | os.PathLike[str]) -> None:
    """Check a record and write it as a results file, whole or not at all.

    Raises:
        CompanionError: the record breaks the schema, or the file cannot be written.
    """
    try:
        text = dumps(record)
    except CompanionError as error:
        raise CompanionError(f"cannot write {path}: {error}") from error
    with replacing(path) as file:
        file.write(text.encode())


def read(path: str | os.PathLike[str]) -> Record:
    """Read and check a results file.

    Raises:
        CompanionError: it is missing, larger than 4 MiB, or not a results file; says which field is wrong.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LIMIT + 1)
        _check_size(len(content))
        return loads(content.decode())
    except OSError as error:
        raise CompanionError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise CompanionError(f"{path} is not a results file: it is not UTF-8 text.") from error
    except CompanionError as error:
        raise CompanionError(f"{path} is not a results file: {error}") from error


def _check_size(size: int) -> None:
    if size > LIMIT:
        raise CompanionError(f"it is larger than {LIMIT >> 20} MiB.")


def shipped_file(name: str) -> Path:
    """Where the course's results of a bench lie.

    Raises:
        CompanionError: there are none of that name; says which there are.
    """
    if name not in names():
        raise CompanionError(f"there are no results called {name!r}: there are {_list(names()) or 'none yet'}.")
    return shipped(f"results/{name}.json")


def load(name: str) -> Record:
    """The course's own results of a bench, ``data/results/NAME.json``.

    Raises:
        CompanionError: there are none of that name, or the file was damaged.
    """
    return read(shipped_file(name))


def names() -> list[str]:
    """Names of the results that come with the course."""
    return sorted(path.stem for path in (shipped("manifest.json").parent / "results").glob("*.json"))


def compare(ours: Record, yours: Record, columns: Sequence[str] | None = None) -> SideBySide:
    """Every number that two records have in common, matched by the keys of its row: medians, and their ratio.

    Rows and values that only one of them has are left out, so yours may be a small part of ours.

    Args:
        ours: such as `load` returns.
        yours: such as `record` returns.
        columns: the names of some values; all if not given.

    Raises:
        CompanionError: they have nothing in common, a value has another unit, or ours has no such column.
    """
    columns = _chosen(ours, columns)
    known = {_identity(row): row for row in ours.rows}
    pairs = []
    for row in yours.rows:
        other = known.get(_identity(row), Row({}, {}))
        for name, mine in row.values.items():
            theirs = other.values.get(name)
            if not (name in columns and _is_number(mine) and _is_number(theirs)):
                continue
            (their_median, their_unit), (my_median, my_unit) = _median(theirs), _median(mine)
            if my_unit != their_unit:
                raise CompanionError(
                    f"{name} is in {their_unit or 'no unit'} in ours and in {my_unit or 'no unit'} in yours."
                )
            pairs.append(Pair(row.keys, name, my_unit, their_median, my_median))
    if not pairs:
        raise CompanionError(f"{yours.name} has no row and value in common with our {ours.name}.")
    return SideBySide(ours, yours, tuple(pairs))


def _chosen(record: Record, columns: Sequence[str] | None) -> Sequence[str]:
    if columns is None:
        return record.columns
    columns = [columns] if isinstance(columns, str) else columns
    for name in columns:
        if name not in record.columns:
            raise CompanionError(f"{record.name} has no column {name!r}: it has {_list(record.columns)}.")
    return columns


def _is_number(value: Any) -> bool:
    return isinstance(value, Measured | int | float) and not isinstance(value, bool)


def _median(value: Any) -> tuple[float, str]:
    return (value.median, value.unit) if isinstance(value, Measured) else (value, "")


def _identity(row: Row) -> tuple[Any, ...]:
    # With the types: True is not 1 here, although Python holds them equal.
    return tuple((name, type(row.keys[name]).__name__, row.keys[name]) for name in sorted(row.keys))


# The schema is the classes above: their fields, the types of these, and what their __post_init__ demands.
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
    dict: "an object",
}


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """A value of JSON as the type, class or union ``kind``, at the place ``where`` of a file.

    Raises:
        CompanionError: it is not one; says which field is wrong.
    """
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    found = next((kind for kind in kinds if type(value) in _json_types(kind)), None)
    if found is None:
        wanted = dict.fromkeys(_WORDS[_json_types(kind)[0]] for kind in kinds)
        raise CompanionError(f"{where or 'all of it'} must be {' or '.join(wanted)}, not {_brief(value)}.")
    if isinstance(value, int | float) and not abs(value) < 1e300:  # also 1e999, which JSON reads as infinite
        raise CompanionError(f"{where} is too large a number.")
    if found is float:
        return float(value)
    if is_dataclass(found):
        return _object(found, value, where)
    if get_origin(found) is tuple:
        return tuple(from_json(get_args(found)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(found) is dict:
        return {name: from_json(get_args(found)[1], item, f"{where}.{name}") for name, item in value.items()}
    return value


def _json_types(kind: Any) -> tuple[type, ...]:
    """What Python's JSON reader makes of such a value."""
    if is_dataclass(kind) or get_origin(kind) is dict:
        return (dict,)
    if get_origin(kind) is tuple:
        return (list,)
    return (float, int) if kind is float else (kind,)


_field_types = cache(get_type_hints)  # of a dataclass: its fields in their order


def _object(kind: Any, value: dict[str, Any], where: str) -> Any:
    types = _field_types(kind)
    path = f"{where}." if where else ""
    for name in types:
        if name not in value:
            raise CompanionError(f"{path}{name} is missing.")
    for name in value:
        if name not in types:
            raise CompanionError(f"{path}{name} is unknown.")
    parts = {name: from_json(wanted, value[name], f"{path}{name}") for name, wanted in types.items()}
    try:
        return kind(**parts)
    except CompanionError as error:
        raise CompanionError(f"{where}: {error}" if where else str(error)) from error


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


# How tables are written.


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    rule = ["---:" if right else ":---" for right in numeric]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def _head(name: str, values: Sequence[Value]) -> str:
    unit = next((value.unit for value in values if isinstance(value, Measured)), "")
    return _escape(f"{name} in {unit}" if unit else name)


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return _escape(value)
    if not isinstance(value, Measured):
        return _number(value)
    if value.low == value.high:
        return _number(value.median)
    digits = max(_decimals(value.median), _decimals(value.high - value.low, 1))  # so that the quartiles differ
    median, low, high = (f"{number:z,.{digits}f}" for number in (value.median, value.low, value.high))
    return f"{median} ({low}–{high})"


def _setting(value: Setting) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _number(value: float) -> str:
    """``545,098``, ``1,234``, ``12.3``, ``0.00123``: whole numbers in full, others with three digits or more."""
    return f"{value:,}" if isinstance(value, int) else f"{value:z,.{_decimals(value)}f}"


def _decimals(value: float, digits: int = 3) -> int:
    """Decimals that leave so many significant digits: more would be noise."""
    return min(max(0, digits - 1 - math.floor(math.log10(abs(value)))), 12) if value else 0


def _escape(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>&#$|~])", r"\\\1", " ".join(text.split()))
