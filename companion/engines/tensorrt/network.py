"""What TensorRT is given: an ONNX file with its weights inside, in the precision wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.engines import onnxfile
from companion.engines.base import one_sentence
from companion.engines.half import to_float16
from companion.engines.tensorrt.library import complaint, heard, library, library_name, logger
from companion.errors import CompanionError

PRECISIONS = ("fp32", "tf32", "fp16")


@dataclass(frozen=True)
class Network:
    """An ONNX file that was read."""

    what: str
    """Its name, for messages."""
    content: bytes
    """The graph with all weights, as the parser gets it."""
    precision: str
    """In what it will be computed: ``fp32``, ``tf32``, ``fp16``, ``int8``, ``mixed``."""
    description: dict[str, str]
    """Its metadata, as `companion.engines.Metadata` writes and reads them."""


@dataclass(frozen=True)
class Layer:
    """A layer of the network that TensorRT makes of a file, before it fuses any."""

    name: str
    type: str
    precision: str
    """Of its first output: FLOAT, HALF, INT8, …"""
    shape: tuple[int, ...]
    """Of its first output; -1 where it depends on the input."""


def read_network(source: Path | bytes, precision: str = "fp32") -> Network:
    """Read an ONNX file, and convert it to fp16 if that is wanted.

    Raises:
        CompanionError: not an ONNX file, one whose weights are missing or outside its folder, no such precision, or a
            network that has no fp16 form.
    """
    if precision not in PRECISIONS:
        raise CompanionError(f"there is no precision {precision!r} here: choose one of {', '.join(PRECISIONS)}.")
    what = "the network" if isinstance(source, bytes) else str(source)
    model = onnxfile.read(source, check=False)
    with one_sentence(f"{what} has 2 GiB of weights or more, too many for one network"):
        content = model.SerializeToString(deterministic=True)  # with the weights of other files inside
    if precision == "fp16":
        content = to_float16(content)
    computes = onnxfile.precision(model) if precision == "fp32" else precision
    return Network(what, content, computes, {entry.key: entry.value for entry in model.metadata_props})


def parse(builder: Any, network: Network) -> tuple[Any, Any]:
    """The network in TensorRT's own terms (an INetworkDefinition), and the parser, which holds its weights.

    Neither keeps the other alive: both must be kept until the engine is built.

    Raises:
        CompanionError: an operator that it does not have, or something else that it refuses, with the node's name.
    """
    trt = library()
    # Types are those of the graph. The flag says so where it is not the only way, before TensorRT 11.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(flags)
    with heard() as lines:
        parser = trt.OnnxParser(definition, logger())
        if parser.parse(network.content):
            return definition, parser
        parser_error = parser.get_error(0) if parser.num_errors else None
        if parser_error is None or not parser_error.node_operator():
            raise CompanionError(f"{library_name()} cannot read {network.what}: {complaint(lines)}.")
        said = complaint([parser_error.desc().removeprefix(f"Invalid Node - {parser_error.node_name()}").strip()])
        if "Plugin not found" in said or " " not in said:  # a bare "false", say
            said = "it has no such operator"
        raise CompanionError(
            f"{library_name()} cannot run the operator {parser_error.node_operator()} "
            f"(node {parser_error.node_name() or parser_error.node()} of {network.what}): {said}; "
            "leave it out of the network, or choose another engine."
        )


def layers(source: Path | bytes, *, precision: str = "fp32") -> list[Layer]:
    """What TensorRT makes of an ONNX file: its layers one by one, with their precision, before it fuses any.

    Needs no GPU and builds nothing. What is left after the build, `TensorRTEngine.kernels` tells on a GPU.

    Args:
        source: an ``.onnx`` file, or what is in one.
        precision: as of `build`.

    Raises:
        CompanionError: as `build`, for what it says of the file.
    """
    network = read_network(source, precision)
    builder = library().Builder(logger())
    definition, _parser = parse(builder, network)
    rows = []
    for number in range(definition.num_layers):
        layer = definition.get_layer(number)
        tensor = layer.get_output(0)
        rows.append(Layer(layer.name, layer.type.name, tensor.dtype.name, _shape(tensor)))
    return rows


def _shape(tensor: Any) -> tuple[int, ...]:
    try:
        return tuple(tensor.shape)
    except ValueError:  # so the library says of a shape that only the run will tell
        return ()


def free_inputs(definition: Any) -> dict[str, Sequence[int]]:
    """Shapes of the inputs that have free dimensions, which are -1, by name."""
    tensors = [definition.get_input(number) for number in range(definition.num_inputs)]
    return {tensor.name: tuple(tensor.shape) for tensor in tensors if -1 in tuple(tensor.shape)}
