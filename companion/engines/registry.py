"""Engines by name: `load` opens a network or a file with one of them, `available` says which there are here."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import nn

from companion import models
from companion.engines.base import Engine
from companion.engines.export import onnx_bytes
from companion.engines.network import example_for
from companion.errors import CompanionError


@dataclass(frozen=True)
class _Row:
    """One row of the table below."""

    takes: Literal["network", "onnx"]
    """What the engine is made from: a torch network in memory, or an ONNX file."""
    needs: str
    """The module that must be there for it."""
    install: str
    """What brings that module."""
    where: str
    """Our module and class, imported when the engine is first used."""


_ENGINES = {
    "onnxruntime": _Row("onnx", "onnxruntime", "onnxruntime", "companion.engines.ort:OnnxRuntimeEngine"),
    "torch": _Row("network", "torch", "torch", "companion.engines.pytorch:TorchEngine"),
    "torch_fused": _Row("network", "torch", "torch", "companion.engines.pytorch:FusedTorchEngine"),
}


def available() -> list[str]:
    """The names of the engines that work here: those whose module can be imported."""
    return [name for name, row in _ENGINES.items() if _importable(row.needs)]


def _importable(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # not there, or there and broken
        return False
    return True


def load(
    path_or_model: str | os.PathLike[str] | nn.Module,
    engine: str = "onnxruntime",
    *,
    threads: int = 1,
    **options: Any,
) -> Engine:
    """Make an engine ready to run a network.

    Args:
        path_or_model: an ``.onnx`` file, a ``.safetensors`` file of ours, or a network in memory, which the engine
            copies. An engine that runs ONNX files has the other two exported first, in memory, which takes seconds.
        engine: one of `available`: ``onnxruntime``, ``torch`` or ``torch_fused``.
        threads: CPU threads. One by default: on busy cores more are slower, and they make timings hard to compare.
        options: the engine's own. ``torch`` and ``torch_fused``: ``device`` ("cpu"). ``onnxruntime``: ``provider``
            ("cpu") and ``optimization`` ("all"; or "extended", "basic", "none"). With a network that is not ours, each
            engine takes ``example``: what the network takes, as a tensor, a tuple of its arguments, or a dict by name.

    Raises:
        CompanionError: no such engine or option, one whose module is not installed, or something that it cannot load.
    """
    if engine not in list(_ENGINES):
        raise CompanionError(f"there is no engine {engine!r}: choose one of {', '.join(_ENGINES)}.")
    row = _ENGINES[engine]
    if not _importable(row.needs):
        raise CompanionError(
            f"the engine {engine} needs {row.needs}, which does not work here: pip install {row.install}."
        )
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise CompanionError(f"threads is {threads!r}: give a whole number from 1.")
    source = path_or_model if isinstance(path_or_model, nn.Module) else _open(path_or_model)
    module, _, name = row.where.partition(":")
    make = getattr(import_module(module), name)
    exports = row.takes == "onnx" and isinstance(source, nn.Module)
    _check_options(engine, make, options, also={"example"} if exports else set())
    if row.takes == "network":
        if not isinstance(source, nn.Module):
            raise CompanionError(f"{engine} runs networks and .safetensors files, not {source}: choose another engine.")
        return make(source, threads=threads, **options)
    if not isinstance(source, nn.Module):
        return make(source, threads=threads, **options)
    example = options.pop("example", None)
    content, _, _ = onnx_bytes(source, example_for(source) if example is None else example)
    return make(content, threads=threads, **options)


def _open(path: Any) -> nn.Module | Path:
    """The network in a weights file, or the path of an ONNX file."""
    if not isinstance(path, str | os.PathLike):
        raise CompanionError(f"load takes the name of a file or a network (torch.nn.Module), not {path!r}.")
    path = Path(path)
    if path.is_dir():
        raise CompanionError(f"{path} is a folder: name a file in it.")
    if not path.is_file():
        raise CompanionError(f"there is no file {path}.")
    if path.suffix == ".safetensors":
        return models.load(path)
    if path.suffix != ".onnx":
        raise CompanionError(f"{path} is no model file: its name must end in .onnx or .safetensors.")
    return path


def _check_options(engine: str, make: Callable[..., Engine], options: dict[str, Any], also: set[str]) -> None:
    parameters = inspect.signature(make).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} | also
    for key in options:
        if key not in known:
            raise CompanionError(
                f"the engine {engine} has no option {key!r} here: it takes {', '.join(sorted(known))}."
            )
