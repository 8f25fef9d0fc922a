"""Engines that were built are kept: the same file, options, library and GPU need not wait again."""

import threading
import warnings
from contextlib import suppress
from pathlib import Path

from companion.engines.tensorrt.builder import Options, Progress, build_network, key
from companion.engines.tensorrt.enginefile import EngineFile, read_engine
from companion.engines.tensorrt.network import Network
from companion.errors import CompanionError
from companion.files import cache_folder

# Threads of one process would write under one name; processes have one each, and the last to finish wins.
_one_at_a_time = threading.Lock()


def engine_folder() -> Path:
    """Where engines are kept; deleting it costs nothing but the time to build them again."""
    return cache_folder() / "engines"


def cached(network: Network, options: Options, on_progress: Progress | None = None) -> EngineFile:
    """The engine of a network: the one that is kept, or, where there is none or it is damaged, a new one.

    Raises:
        CompanionError: it cannot be built. That it cannot be kept is a warning only.
    """
    name = key(network, options)
    path = engine_folder() / f"{name}.engine"
    with _one_at_a_time:
        with suppress(CompanionError):
            if (kept := read_engine(path)).key == name:
                return kept
        made = build_network(network, options, on_progress)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.write(path)
        except (CompanionError, OSError) as error:
            warnings.warn(f"the engine will have to be built again, for it cannot be kept: {error}", stacklevel=2)
    return made
