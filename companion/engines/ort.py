"""ONNX Runtime: the default engine, for CPUs and, in its GPU build, for CUDA."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from companion.engines import onnxfile
from companion.engines.base import Engine, Metadata, TensorInfo, reason
from companion.errors import CompanionError

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_SILENT = 4  # only fatal errors: the others become exceptions, and would also be printed


class OnnxRuntimeEngine(Engine):
    """An ONNX file, or its bytes, run by ONNX Runtime.

    Its `precision` is that of the file. On processors without arithmetic in float16, which are all of x86 here, ONNX
    Runtime computes such a file in float32 and rounds in between.
    """

    def __init__(self, source: Path | bytes, *, threads: int, provider: str = "cpu", optimization: str = "all") -> None:
        """
        Args:
            source: an ``.onnx`` file, or what is in one.
            threads: CPU threads within an operation; operations run one after the other.
            provider: which hardware: ``cpu``, ``cuda`` or another execution provider of the installed ONNX Runtime.
            optimization: how much the graph is rewritten first: ``none``, ``basic``, ``extended`` or ``all``.

        Raises:
            CompanionError: not an ONNX file, one that lacks its weights or has operations that ONNX Runtime does not
                know, or no such provider or level here.
        """
        options = session_options(threads, optimization)
        wanted = _provider(provider)
        what = "the network" if isinstance(source, bytes) else str(source)
        try:
            # Without the fallback to the CPU, which would be taken for the GPU's speed.
            self._session = onnxruntime.InferenceSession(source, options, providers=[wanted], enable_fallback=False)
        except Exception as error:  # ONNX Runtime's have no base class of their own
            raise CompanionError(_explain(what, error)) from error
        if self._session.get_providers()[0] != wanted:
            raise CompanionError(
                f"ONNX Runtime's {wanted} does not work here: its libraries or its hardware are missing."
            )
        nodes = self._session.get_inputs()
        try:
            metadata = Metadata.from_text(self._session.get_modelmeta().custom_metadata_map)
            inputs, outputs = (list(map(_info, side)) for side in (nodes, self._session.get_outputs()))
            super().__init__("onnxruntime", inputs, outputs, metadata, _batches(nodes), precision=_precision(source))
        except CompanionError as error:
            raise CompanionError(f"{what} cannot be used: {error}") from error

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [info.name for info in self.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _release(self) -> None:
        del self._session


def session_options(threads: int, optimization: str) -> Any:
    """What a session is told: arguments and errors as of the engine."""
    if optimization not in list(_LEVELS):
        raise CompanionError(f"there is no optimization {optimization!r}: choose one of {', '.join(_LEVELS)}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = _LEVELS[optimization]
    options.log_severity_level = _SILENT
    return options


def _precision(source: Path | bytes) -> str:
    """Read from the file, for a session does not tell."""
    import onnx

    return onnxfile.precision(onnx.load_from_string(source if isinstance(source, bytes) else source.read_bytes()))


def _provider(name: Any) -> str:
    """The full name of an execution provider: ``CUDAExecutionProvider`` for ``cuda``."""
    there = {full.removesuffix("ExecutionProvider").lower(): full for full in onnxruntime.get_available_providers()}
    short = str(name).removesuffix("ExecutionProvider").lower()
    if short not in there:
        advice = ": install onnxruntime-gpu in place of onnxruntime" if short == "cuda" else ""
        raise CompanionError(f"this ONNX Runtime has no provider {name!r}, only {', '.join(there)}{advice}.")
    return there[short]


def _batches(nodes: list[onnxruntime.NodeArg]) -> list[list[str]]:
    """Groups of inputs with the same number of samples: those whose first dimensions have one name."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        if node.shape and isinstance(node.shape[0], str):
            groups.setdefault(node.shape[0], []).append(node.name)
    return list(groups.values())


def _info(node: onnxruntime.NodeArg) -> TensorInfo:
    if node.type not in _DTYPES:
        raise CompanionError(f"its {node.name} is a {node.type}, which NumPy lacks.")
    # A free dimension has a name, or none at all.
    return TensorInfo(node.name, _DTYPES[node.type], tuple(n if isinstance(n, int) else None for n in node.shape))


def _explain(what: str, error: Exception) -> str:
    """ONNX Runtime's complaint about a file as one sentence."""
    text, said = str(error), reason(error)
    if "External data path" in text:
        if "does not exist" in text:
            missing = text.rpartition("does not exist: ")[2]
            return f"{what} keeps its weights in another file, which is not there: {missing}."
        return f"{what} keeps its weights in a file outside its folder, which is not read: put both into one folder."
    if "protobuf" in text.lower():
        return f"{what} is not an ONNX file or is damaged."
    said = said.removeprefix(f"Load model from {what}").removeprefix(" failed:").lstrip()
    return f"ONNX Runtime cannot load {what}: {said}."
