"""Engines by name: `load` opens a network or a file with one of them, `available` says which there are here."""

import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from companion import models
from companion.engines.base import Engine, without_telemetry
from companion.engines.export import onnx_bytes
from companion.engines.network import example_for
from companion.errors import CompanionError


@dataclass(frozen=True)
class _Row:
    """One row of the table below."""

    takes: tuple[str, ...]
    """What the engine's class is made from: ``network`` (in memory), or the endings of file names. A weights file of
    ours is opened as a network, and a network is exported for an engine that takes ``.onnx``."""
    needs: str
    """The module that must be there for it."""
    install: str
    """What brings that module."""
    where: str
    """Our module and class, imported when the engine is first used."""
    check: str = ""
    """Our module and function that raises where it does not work, for one that takes more than its module."""


def _extra(name: str) -> str:
    return f'-c constraints.txt -e ".[{name}]"'


_NETWORK = "network"
_ENGINES = {
    "onnxruntime": _Row((".onnx",), "onnxruntime", "onnxruntime", "companion.engines.ort:OnnxRuntimeEngine"),
    "openvino": _Row((".onnx",), "openvino", _extra("openvino"), "companion.engines.openvino:OpenVinoEngine"),
    "litert": _Row(
        (".tflite",), "ai_edge_litert.interpreter", _extra("litert"), "companion.engines.litert:LiteRtEngine"
    ),
    "torch": _Row((_NETWORK,), "torch", "torch", "companion.engines.pytorch:TorchEngine"),
    "torch_fused": _Row((_NETWORK,), "torch", "torch", "companion.engines.pytorch:FusedTorchEngine"),
    "torch_compile": _Row((_NETWORK,), "torch", "torch", "companion.engines.pytorch:CompiledTorchEngine"),
    "tensorrt": _Row(
        (".onnx", ".engine"),
        "companion.engines.tensorrt",  # either of two libraries, and a GPU
        _extra("tensorrt"),
        "companion.engines.tensorrt:TensorRTEngine",
        "companion.engines.tensorrt:usable_gpu",
    ),
}
_WEIGHTS = ".safetensors"


def available() -> list[str]:
    """The names of the engines that work here: those whose module can be imported, and TensorRT if it has a GPU."""
    return [name for name, row in _ENGINES.items() if _importable(row.needs) and _passes(row)]


def _passes(row: _Row) -> bool:
    with suppress(CompanionError):
        if row.check:
            _named(row.check)()
        return True
    return False


def _named(where: str) -> Any:
    """What ``module:name`` stands for."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def _importable(module: str) -> bool:
    without_telemetry()
    try:
        import_module(module)
    except Exception:  # not there, or there and broken
        return False
    return True


def suited(path: str | os.PathLike[str]) -> str:
    """The usual engine for a file, by the ending of its name: ``onnxruntime``, where there is no better one."""
    suffix = Path(path).suffix.lower()
    if suffix == _WEIGHTS:
        return "torch_fused"
    return next((name for name, row in _ENGINES.items() if suffix in row.takes), "onnxruntime")


def load(
    path_or_model: str | os.PathLike[str] | nn.Module,
    engine: str = "onnxruntime",
    *,
    threads: int = 1,
    **options: Any,
) -> Engine:
    """Make an engine ready to run a network.

    Args:
        path_or_model: an ``.onnx`` file, a ``.safetensors`` file of ours, a network in memory, which the engine copies,
            for ``litert`` a ``.tflite`` file, or for ``tensorrt`` an ``.engine`` file. An engine that runs ONNX files
            has networks exported first, in memory, which takes seconds.
        engine: one of `available`: ``onnxruntime``, ``openvino``, ``litert``, ``torch``, ``torch_fused``,
            ``torch_compile`` or ``tensorrt``.
        threads: CPU threads. One by default: on busy cores more are slower, and they make timings hard to compare.
        options: the engine's own. torch's three: ``device`` ("cpu"). ``onnxruntime``: ``provider`` ("cpu") and
            ``optimization`` ("all"; or "extended", "basic", "none"). ``openvino``: ``precision`` ("fp32"; or "bf16",
            "default"). ``tensorrt``: those of `companion.engines.tensorrt.TensorRTEngine`. With a network that is not
            ours, each engine takes ``example``: what the network takes, as a tensor, a tuple of its arguments, or a
            dict by name.

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
    if row.check:
        _named(row.check)()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise CompanionError(f"threads is {threads!r}: give a whole number from 1.")
    source = path_or_model if isinstance(path_or_model, nn.Module) else _open(path_or_model)
    _check_kind(engine, row, source)
    make = _named(row.where)
    exports = isinstance(source, nn.Module) and _NETWORK not in row.takes
    _check_options(engine, make, options, also={"example"} if exports else set())
    if isinstance(source, nn.Module) and exports:
        example = options.pop("example", None)
        content, _, _ = onnx_bytes(source, example_for(source) if example is None else example)
        return make(content, threads=threads, **options)
    return make(source, threads=threads, **options)


def _open(path: Any) -> nn.Module | Path:
    """The network in a weights file, or the path of a file that some engine takes."""
    if not isinstance(path, str | os.PathLike):
        raise CompanionError(f"load takes the name of a file or a network (torch.nn.Module), not {path!r}.")
    path = Path(path)
    if path.is_dir():
        raise CompanionError(f"{path} is a folder: name a file in it.")
    if not path.is_file():
        raise CompanionError(f"there is no file {path}.")
    if path.suffix == _WEIGHTS:
        return models.load(path)
    kinds = dict.fromkeys(kind for row in _ENGINES.values() for kind in row.takes if kind != _NETWORK)
    if path.suffix not in kinds:
        raise CompanionError(f"{path} is no model file: its name must end in {', '.join(kinds)} or {_WEIGHTS}.")
    return path


def _check_kind(engine: str, row: _Row, source: nn.Module | Path) -> None:
    """Refuse what the engine cannot be made from, and say what can."""
    kind = _NETWORK if isinstance(source, nn.Module) else source.suffix
    if kind in row.takes or (kind == _NETWORK and ".onnx" in row.takes):
        return
    runs = [f"{kind} files" for kind in row.takes if kind != _NETWORK]
    if _NETWORK in row.takes or ".onnx" in row.takes:
        runs += ["networks", f"{_WEIGHTS} files"]
    what = "networks" if isinstance(source, nn.Module) else str(source)
    others = [name for name, other in _ENGINES.items() if kind in other.takes]
    advice = f"choose the engine {' or '.join(others)}"
    if row.takes == (".tflite",):
        advice = "convert the network with engines.export_tflite first"
    raise CompanionError(f"{engine} runs {' and '.join(runs)}, not {what}: {advice}.")


def _check_options(engine: str, make: Callable[..., Engine], options: dict[str, Any], also: set[str]) -> None:
    parameters = inspect.signature(make).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} | also
    for key in options:
        if key not in known:
            raise CompanionError(
                f"the engine {engine} has no option {key!r} here: it takes {', '.join(sorted(known))}."
            )
