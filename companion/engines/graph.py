"""What an engine makes of a graph: its operators before and after, which were fused, and in what it computes each."""

import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from companion.engines import onnxfile
from companion.engines.base import one_sentence
from companion.errors import CompanionError


@dataclass(frozen=True)
class Graph:
    """The nodes of a network, as a file has them or as an engine runs them."""

    source: str
    """``file``, or the engine and how much it rewrites."""
    operators: dict[str, int]
    """Nodes by kind, most frequent first; constants are none."""
    precisions: dict[str, int]
    """Nodes by what they are computed in, where the engine tells; else empty."""

    @property
    def nodes(self) -> int:
        return sum(self.operators.values())

    def new_in(self, other: "Graph") -> dict[str, int]:
        """Kinds of nodes that ``other`` has and this has not: what was fused, or added to change layouts."""
        return {kind: count for kind, count in other.operators.items() if kind not in self.operators}


def file_graph(path: str | os.PathLike[str]) -> Graph:
    """The graph of an ``.onnx`` file as it is.

    Raises:
        CompanionError: not an ONNX file, or weights that are not there.
    """
    return Graph("file", _operators(onnxfile.read(_onnx(path))), {})


def onnxruntime_graph(path: str | os.PathLike[str], optimization: str = "all") -> Graph:
    """The graph that ONNX Runtime runs on a CPU, one thread.

    Fused nodes have names of their own: FusedConv is a convolution with the activation after it, and what it adds to;
    ReorderInput and ReorderOutput put channels in blocks as wide as the processor's vectors. Precisions are those
    of the weights of convolutions and matrix products: a float16 file is float32 here where the processor has no
    float16 arithmetic.

    Args:
        path: an ``.onnx`` file.
        optimization: how much is rewritten: ``none``, ``basic``, ``extended`` or ``all``.

    Raises:
        CompanionError: a file that ONNX Runtime cannot load, or no such level.
    """
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    from companion.engines.ort import session_options

    path = _onnx(path)
    with tempfile.TemporaryDirectory() as folder, one_sentence(f"ONNX Runtime cannot load {path}"):
        options = session_options(threads=1, optimization=optimization)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    types = {tensor.name: _TYPES.get(tensor.data_type, "other") for tensor in model.graph.initializer}
    weighted = (node for node in model.graph.node if node.op_type.removeprefix("Fused") in onnxfile.WEIGHTED)
    found = [types[node.input[1]] for node in weighted if node.input[1] in types]
    integers = sum(node.op_type in _INTEGERS for node in model.graph.node)
    precisions = Counter(found) + Counter({"int8": integers})
    return Graph(f"onnxruntime, {optimization}", _operators(model), _sorted(precisions))


_INTEGERS = {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
_TYPES = {1: "fp32", 10: "fp16", 11: "fp64"}  # of onnx.TensorProto


def openvino_graph(path: str | os.PathLike[str], precision: str = "fp32") -> Graph:
    """The graph that OpenVINO runs: its kinds of layers, and in what each is computed.

    Of memory OpenVINO tells nothing.

    Args:
        path: an ``.onnx`` file.
        precision: as the engine ``openvino`` takes it.

    Raises:
        CompanionError: OpenVINO is not installed, a file that it cannot load, or no such precision.
    """
    from companion.engines.registry import load

    with load(_onnx(path), "openvino", precision=precision) as engine:
        layers = engine.layers()  # type: ignore[attr-defined]
    operators = Counter(kind for kind, _ in layers)
    return Graph(f"openvino, {precision}", _sorted(operators), _sorted(Counter(used for _, used in layers)))


@dataclass(frozen=True)
class Memory:
    """Bytes that ONNX Runtime takes for activations, beside weights, inputs and outputs."""

    needed: int
    """The most that is alive at once, while each is allocated when it is made and freed after its last use."""
    planned: int
    """The one block that ONNX Runtime lays them out in as soon as it has seen the shapes, to allocate no more."""


def onnxruntime_memory(path: str | os.PathLike[str], inputs: dict[str, np.ndarray]) -> Memory:
    """What activations take in a run, by ONNX Runtime's own accounts: its profile of the first two runs.

    Args:
        path: an ``.onnx`` file.
        inputs: as the engine takes them; the memory is for their shapes.

    Raises:
        CompanionError: a file that ONNX Runtime cannot load or inputs that do not fit, or one that keeps no accounts.
    """
    import onnxruntime

    from companion.engines.ort import session_options

    path = _onnx(path)
    with tempfile.TemporaryDirectory() as folder, one_sentence(f"ONNX Runtime cannot run {path}"):
        options = session_options(threads=1, optimization="all")
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(2):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event["args"] for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    if not nodes or "mem_bytes_in_use" not in nodes[0]:
        raise CompanionError("this ONNX Runtime does not tell its memory: pip install --upgrade onnxruntime.")
    in_use = [int(node["mem_bytes_in_use"]) for node in nodes]
    before = in_use[0] - int(nodes[0]["mem_in_use_delta"])
    first, second = in_use[: len(in_use) // 2], in_use[len(in_use) // 2 :]
    return Memory(max(first) - before, second[0] - before)


def _onnx(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file() or path.suffix != ".onnx":
        raise CompanionError(f"{path} is no ONNX file: export it first with engines.export_onnx.")
    return path


def _operators(model: Any) -> dict[str, int]:
    return _sorted(Counter(node.op_type for node in model.graph.node if node.op_type != "Constant"))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """By falling count, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
