"""Make neural networks smaller and faster, and measure it: the package behind the course.

``import companion`` is instant: a room such as ``companion.train`` is imported, and torch with it, when it is
first used.
"""

from importlib import import_module
from types import ModuleType

from companion.errors import CompanionError

__version__ = "0.1.0"
__all__ = [
    "CompanionError",
    "__version__",
    "bench",
    "compress",
    "datasets",
    "detect",
    "engines",
    "metrics",
    "models",
    "plots",
    "serve",
    "train",
]

ROOMS = ("bench", "compress", "datasets", "detect", "engines", "metrics", "models", "plots", "serve", "train")


def __getattr__(name: str) -> ModuleType:
    if name in ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
