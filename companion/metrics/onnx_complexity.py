"""The work and memory of an ONNX file, from the shapes in its graph: nothing runs."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from companion.errors import CompanionError
from companion.metrics.complexity import Complexity, Cost

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OnnxComplexity:
    """What `count_onnx` counted."""

    complexity: Complexity
    """Modules are the graph's nodes. A node with an unknown shape, because it depends on values or because the operator
    is not ONNX's own, is named in ``uncounted``. Parameters are the numbers that the file stores, but for shapes and
    indices (int64): folded normalisation is part of the convolutions' weights, and quantisation adds scales."""
    activation_bytes: int
    """Peak of the tensors that are needed at once if nodes run in the file's order; an engine may reuse memory."""


def count_onnx(path: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]]) -> OnnxComplexity:
    """Count the work of one run of an ONNX file on inputs of these shapes.

    Args:
        path: the file.
        shapes: for every input of the graph, by name.

    Raises:
        CompanionError: not a readable ONNX file, or a shape that does not fit.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path))
        _set_shapes(model.graph, shapes)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True)
    except CompanionError:
        raise
    except FileNotFoundError as error:
        raise CompanionError(f"there is no file {error.filename or path}.") from error
    except Exception as error:  # protobuf's and onnx's own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompanionError(
            f"{path} cannot be counted as an ONNX file with inputs {dict(shapes)}: {reason}."
        ) from error
    return _count(model.graph)


def _set_shapes(graph: "onnx.GraphProto", shapes: Mapping[str, Sequence[int]]) -> None:
    stored = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in stored}
    if set(inputs) != set(shapes):
        raise CompanionError(
            f"the inputs are {', '.join(inputs)}; shapes were given for {', '.join(shapes) or 'none'}."
        )
    for name, value in inputs.items():
        dimensions, wanted = value.type.tensor_type.shape.dim, tuple(shapes[name])
        fits = len(dimensions) == len(wanted) and all(
            size >= 1 and (not dimension.HasField("dim_value") or dimension.dim_value == size)
            for dimension, size in zip(dimensions, wanted, strict=True)
        )
        if not fits:
            has = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dimensions]
            raise CompanionError(f"input {name} has shape ({', '.join(map(str, has))}), which {wanted} does not fit.")
        for dimension, size in zip(dimensions, wanted, strict=True):
            dimension.dim_value = size


def _count(graph: "onnx.GraphProto") -> OnnxComplexity:
    from onnx import TensorProto

    tensors = list(graph.initializer)
    constants = [node for node in graph.node if node.op_type == "Constant"]
    tensors += [attribute.t for node in constants for attribute in node.attribute if attribute.name == "value"]
    stored = {tensor.name for tensor in graph.initializer}
    shape_of: dict[str, Shape] = {}
    bytes_of: dict[str, int] = {}
    for name, shape, element in _described(graph):
        size = _bits(element)
        if size is not None:
            shape_of[name], bytes_of[name] = shape, -(-prod(shape) * size // 8)

    total = Cost()
    by_node: dict[str, Cost] = {}
    by_operator: dict[str, Cost] = defaultdict(Cost)
    uncounted: list[str] = []
    for index, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{index}"
        touched = [tensor for tensor in (*node.input, *node.output) if tensor]
        own = node.domain in ("", "ai.onnx")
        known = own and node.op_type not in _UNKNOWN and all(tensor in shape_of for tensor in touched)
        cost = Cost()
        if set(filter(None, node.input)) <= stored:  # constants, and weights that are unpacked when the file is loaded
            stored |= set(node.output)
        elif own and node.op_type in _FREE:
            pass
        elif known:
            rule = _RULES.get(node.op_type)
            moved = sum(bytes_of[tensor] for tensor in set(touched))
            if node.op_type in _GATHERS:  # read as many elements as they give, not all that there are
                moved = 2 * bytes_of[node.output[0]] + bytes_of[node.input[1]]
            cost = Cost(rule(node, shape_of) if rule else 0, moved)
        else:
            uncounted.append(f"{name}: {'::'.join(filter(None, (node.domain, node.op_type)))}")
        total += cost
        by_node[name] = by_node.get(name, Cost()) + cost
        by_operator[node.op_type] += cost
    return OnnxComplexity(
        Complexity(
            total=total,
            parameters=sum(prod(tensor.dims) for tensor in tensors if tensor.data_type != TensorProto.INT64),
            by_module=by_node,
            by_operator=dict(sorted(by_operator.items(), key=lambda item: -item[1].macs)),
            uncounted=tuple(uncounted),
        ),
        _peak(graph, bytes_of, stored),
    )


def _described(graph: "onnx.GraphProto") -> Iterator[tuple[str, Shape, int]]:
    """Name, shape and element type of every tensor whose shape is known."""
    for tensor in graph.initializer:
        yield tensor.name, tuple(tensor.dims), tensor.data_type
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dimension.HasField("dim_value") for dimension in kind.shape.dim):
            yield value.name, tuple(dimension.dim_value for dimension in kind.shape.dim), kind.elem_type


def _bits(element: int) -> int | None:
    """Bits of a number of this type; None of what has no fixed size."""
    from onnx import TensorProto, helper

    packed = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}  # several in a byte
    try:
        return packed.get(TensorProto.DataType.Name(element)) or 8 * helper.tensor_dtype_to_np_dtype(element).itemsize
    except KeyError:
        return None


def _peak(graph: "onnx.GraphProto", bytes_of: Mapping[str, int], stored: set[str]) -> int:
    """Most bytes alive at once: a tensor lives from the node that makes it to the last one that reads it."""
    kept = stored | {value.name for value in graph.input}
    last = {tensor: index for index, node in enumerate(graph.node) for tensor in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.node):
        alive |= {tensor: bytes_of.get(tensor, 0) for tensor in node.output if tensor and tensor not in kept}
        peak = max(peak, sum(alive.values()))
        alive = {tensor: size for tensor, size in alive.items() if last.get(tensor, -1) > index}
    return peak


def _attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    from onnx.helper import get_attribute_value

    return next((get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _convolution(weight: int) -> Callable[[Any, Mapping[str, Shape]], int]:
    """Weight [M, C / groups, k…] at this input: every output takes C / groups × taps."""
    return lambda node, shapes: prod(shapes[node.output[0]]) * prod(shapes[node.input[weight]][1:])


def _transposed(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Weight [C, M / groups, k…]: every input goes to M / groups × taps."""
    return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])


def _product(first: int) -> Callable[[Any, Mapping[str, Shape]], int]:
    """A [..., n, k] at this input: every output is a sum of k products."""
    return lambda node, shapes: prod(shapes[node.output[0]]) * shapes[node.input[first]][-1]


def _gemm(node: Any, shapes: Mapping[str, Shape]) -> int:
    return prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if _attribute(node, "transA", 0) else 1]


# Operators of ONNX itself that multiply matrices: the multiply–adds of a node.
_RULES: dict[str, Callable[[Any, Mapping[str, Shape]], int]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _product(0),
    "MatMulInteger": _product(0),
    "QLinearMatMul": _product(0),
}
_UNKNOWN = ("Attention", "DeformConv", "DFT", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan", "STFT")
_GATHERS = ("Gather", "GatherElements", "GatherND")
# Do not touch the tensors' memory.
_FREE = ("Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze")
