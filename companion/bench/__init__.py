"""The measurements behind the site's tables: `companion bench NAME` runs one and writes its record."""

from importlib import import_module

from companion.bench.runner import Bench, Cell, run
from companion.errors import CompanionError

__all__ = ["BENCHES", "Bench", "Cell", "get", "names", "run"]

# Name → the module that defines it as BENCH, in the order of the chapter.
BENCHES: dict[str, str] = {
    "compression": "companion.bench.compression",
    "scaling": "companion.bench.scaling",
    "precision": "companion.bench.precision",
    "complexity": "companion.bench.complexity",
    "networks": "companion.bench.networks",
    "engines": "companion.bench.engines",
    "roofline": "companion.bench.roofline",
    "instructions": "companion.bench.instructions",
    "serving": "companion.bench.serving",
    "segmentation": "companion.bench.segmentation",
}


def names() -> list[str]:
    """Names of all benches."""
    return list(BENCHES)


def get(name: str) -> Bench:
    """The bench called ``name``.

    Raises:
        CompanionError: there is none; says which there are.
    """
    if name not in BENCHES:
        raise CompanionError(f"there is no bench {name!r}: there are {', '.join(names()) or 'none yet'}.")
    bench: Bench = import_module(BENCHES[name]).BENCH
    return bench
