"""What a small operation costs besides its arithmetic, in instructions (2.4.3)."""

from collections.abc import Iterator
from functools import partial

from companion import metrics
from companion.bench.runner import Bench, Cell
from companion.metrics.results import Row

SETUP = "x, y = torch.ones(64), torch.ones(64)"
STATEMENTS = ("pass", "x + 1", "x.add_(1)", "torch.add(x, 1, out=y)", "x * x + 1")
NUMBER = 100


def _count(statement: str) -> list[Row]:
    counted = metrics.count_instructions(statement, setup=SETUP, number=NUMBER)
    return [Row({"statement": statement}, {"instructions": counted})]


def _cells() -> Iterator[Cell]:
    for statement in STATEMENTS:
        yield Cell(statement, partial(_count, statement))


BENCH = Bench(
    "instructions",
    "Instructions of one run of a statement on 64 numbers, Python's own included, counted by Callgrind.",
    _cells,
    settings={"setup": SETUP, "runs": NUMBER},
)
