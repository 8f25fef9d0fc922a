"""What an ONNX file says of itself, for engines that cannot be given every file: it is read and checked first."""

from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from companion.engines.base import Metadata, TensorInfo, reason
from companion.errors import CompanionError

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INTEGER = ("ConvInteger", "MatMulInteger")
QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", *INTEGER}


def tensors(model: Any) -> list[Any]:
    """The constants of a network (TensorProtos): weights, and the values of Constant nodes."""
    nodes = (node for node in model.graph.node if node.op_type == "Constant")
    return [*model.graph.initializer, *(each.t for node in nodes for each in node.attribute if each.name == "value")]


def read(source: Path | bytes, *, check: bool = True) -> Any:
    """The network in an ``.onnx`` file, or in its bytes, as a ModelProto with all weights inside and its nodes sorted.

    Args:
        check: look for operators that ONNX does not know and the like. An engine that says so itself need not be
            stricter than it is.

    Raises:
        CompanionError: no ONNX file or a damaged one, an operator that ONNX does not know, weights in a file that is
            not there or not in the same folder.
    """
    import onnx

    what = "the network" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        model = onnx.load_from_string(content)
    except OSError as error:
        raise CompanionError(f"{what} cannot be read: {error.strerror}.") from error
    except Exception as error:  # protobuf's
        raise CompanionError(f"{what} is not an ONNX file or is damaged.") from error
    if not model.graph.node:
        raise CompanionError(f"{what} is not an ONNX file or is damaged.")
    _sort(model.graph)
    external = onnx.external_data_helper
    if outside := [tensor for tensor in tensors(model) if external.uses_external_data(tensor)]:
        if isinstance(source, bytes):
            raise CompanionError(f"{what} keeps its weights in another file: give the name of the ONNX file.")
        for tensor in outside:
            file = source.parent / external.ExternalDataInfo(tensor).location
            if not file.is_file():
                raise CompanionError(f"{what} keeps its weights in another file, which is not there: {file}.")
        try:
            external.load_external_data_for_model(model, str(source.parent))
        except Exception as error:
            raise CompanionError(
                f"{what} keeps its weights in a file that lies outside its folder or is damaged: "
                "put both into one folder, or export it again."
            ) from error
    if check:
        try:
            onnx.checker.check_model(model)
        except Exception as error:
            raise CompanionError(f"{what} cannot be used: {reason(error)}.") from error
    return model


def _sort(graph: Any) -> None:
    """Put each node behind those that make its inputs, as ONNX asks: some converters append a Cast, say, at the end."""
    makers = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    before = {
        number: {makers[name] for name in _taken(node) if name in makers} for number, node in enumerate(graph.node)
    }
    if all(max(those, default=-1) < number for number, those in before.items()):
        return
    with suppress(CycleError):  # which the checker and every engine refuse
        order = list(TopologicalSorter(before).static_order())
        nodes = [type(graph.node[number]).FromString(graph.node[number].SerializeToString()) for number in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _taken(node: Any) -> list[str]:
    """Names of the tensors that a node takes, those in the bodies of If, Loop and Scan included."""
    bodies = [body for each in node.attribute for body in (each.g, *each.graphs)]
    return [*node.input, *(name for body in bodies for inner in body.node for name in _taken(inner))]


def describe(model: Any) -> tuple[list[TensorInfo], list[TensorInfo], list[list[str]], Metadata]:
    """Inputs, outputs, groups of inputs with the same number of samples, and the metadata.

    Raises:
        CompanionError: a type that NumPy lacks, or damaged metadata.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [value for value in model.graph.input if value.name not in weights]
    groups: dict[str, list[str]] = {}
    for node in nodes:
        first = next(iter(node.type.tensor_type.shape.dim), None)
        if first is not None and first.dim_param:
            groups.setdefault(first.dim_param, []).append(node.name)
    metadata = Metadata.from_text({entry.key: entry.value for entry in model.metadata_props})
    return list(map(_info, nodes)), list(map(_info, model.graph.output)), list(groups.values()), metadata


def _info(value: Any) -> TensorInfo:
    from onnx import TensorProto, helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    if dtype is None or dtype.kind not in "fiub":  # bfloat16 and the like are of another package
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise CompanionError(f"its {value.name} is a tensor({kind}), which NumPy lacks.")
    sizes = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    shape = tuple(size if size >= 0 else None for size in sizes)
    return TensorInfo(value.name, dtype.name, shape)


def precision(model: Any) -> str:
    """In what the graph has its convolutions and matrix products computed: ``int8``, ``fp16``, ``fp32``, ….

    ``int8`` where activations are quantized, ``mixed`` where some layers have float16 weights and some float32. An
    engine without instructions for it may compute in more digits than that.
    """
    from onnx import TensorProto

    if any("QuantizeLinear" in node.op_type and "Dequantize" not in node.op_type for node in model.graph.node):
        return "int8"
    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.DOUBLE: "fp64"}
    types = {tensor.name: names.get(tensor.data_type) for tensor in model.graph.initializer}
    found = {types.get(name) for node in model.graph.node if node.op_type in WEIGHTED for name in node.input} - {None}
    if not found:  # no weights: what goes in
        found = {names.get(value.type.tensor_type.elem_type) for value in model.graph.input} - {None}
    return str(found.pop()) if len(found) == 1 else "mixed" if found else "fp32"
