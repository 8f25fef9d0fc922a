"""ONNX files in half precision: the same graph with float16 weights and float16 arithmetic."""

from collections.abc import Collection
from typing import Any

import numpy as np

from companion.engines.base import one_sentence
from companion.engines.onnxfile import QUANTIZED, tensors
from companion.errors import CompanionError

LARGEST = 65504.0  # the largest number of float16


def to_float16(content: bytes, *, float_io: bool = True, exclude: Collection[str] = ()) -> bytes:
    """An ONNX file of the same network that stores and computes in float16: half the size, three decimal digits.

    Every float32 tensor of the graph becomes float16, but for what the operators themselves want in float32 (the
    scales of Resize), and for a few that have no float16 form in ONNX Runtime (Max, Min, TopK, …), around which Casts
    are put. So the precision is written in the graph, as TensorRT since 11 wants it, and every engine that follows
    the graph computes the same. Weights below float16's smallest number (6e-8) become that. Equal files make equal
    files; the description is kept.

    The conversion is ONNX Runtime's own: it comes with the engine that the course needs anyway, its graphs are tried
    by it, and it knows the operators that must stay in float32; onnxconverter-common, from which it was made, would
    be one package more.

    Args:
        content: what is in an ``.onnx`` file with float32 weights, all inside.
        float_io: leave inputs and outputs float32, so that callers see no difference; else they are float16 too.
        exclude: names of nodes that stay in float32.

    Raises:
        CompanionError: no ONNX file, weights in another file, in float16 or in 8 bits already, none in float32, finite
            ones beyond 65504, or no node of an excluded name.
    """
    import onnx

    if isinstance(exclude, str):
        raise CompanionError(f"exclude is {exclude!r}: give a list of node names.")
    try:
        model = onnx.load_from_string(content)
        if any(map(onnx.external_data_helper.uses_external_data, tensors(model))):
            raise CompanionError("the network keeps its weights in another file: save it with all weights inside.")
        onnx.checker.check_model(content)
    except CompanionError:
        raise
    except Exception as error:  # protobuf's and the checker's, which have no base class
        raise CompanionError("the network is not an ONNX file or is damaged.") from error
    _check(model, exclude)
    with one_sentence("the network cannot be converted to float16"):
        convert, sort = _converter()
        made = convert(model, keep_io_types=float_io, node_block_list=list(exclude))
        del made.graph.value_info[:]  # the types of before
        sort(made)  # it puts its Casts last
        content = made.SerializeToString(deterministic=True)
        onnx.checker.check_model(content, full_check=True)
    return content


def _converter() -> tuple[Any, Any]:
    """ONNX Runtime's conversion, and its sorting of nodes."""
    from onnxruntime.transformers.float16 import convert_float_to_float16  # type: ignore[import-untyped]
    from onnxruntime.transformers.onnx_model import OnnxModel  # type: ignore[import-untyped]

    return convert_float_to_float16, lambda model: OnnxModel(model).topological_sort(is_deterministic=True)


def _check(model: Any, exclude: Collection[str]) -> None:
    from onnx import numpy_helper

    nodes = {node.name for node in model.graph.node}
    if unknown := [name for name in exclude if name not in nodes]:
        raise CompanionError(f"there is no node {unknown[0]!r} to exclude.")
    if {node.op_type for node in model.graph.node} & QUANTIZED:
        raise CompanionError("the network is quantized to 8 bits: convert the file that it was made from.")
    weights = [tensor for tensor in tensors(model) if tensor.data_type == tensor.FLOAT]
    if any(tensor.data_type == tensor.FLOAT16 for tensor in tensors(model)):
        raise CompanionError("the network is in float16 already, in part at least.")
    if not weights:
        raise CompanionError("the network has no float32 weights to convert to float16.")
    kept = {name for node in model.graph.node if node.name in exclude for name in node.input}
    used = {name for node in model.graph.node if node.name not in exclude for name in node.input}
    for tensor in weights:
        if tensor.name in kept - used:
            continue
        values = np.abs(numpy_helper.to_array(tensor))
        # Bounds of a clip may be infinite, or float32's largest number, which means the same.
        finite = values[values < np.finfo(np.float32).max]
        if (largest := float(finite.max(initial=0.0))) > LARGEST:
            what = f"the weight {tensor.name}" if tensor.name else "a Constant node"
            raise CompanionError(
                f"{what} holds {largest:.3g}, and float16 ends at {LARGEST:.0f}: exclude the nodes that use it."
            )
