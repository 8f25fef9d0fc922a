"""ONNX files that compute in 8-bit integers: quantisation for use (2.1.2)."""

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.compress.quantization import check_observer, observe, quantize, sqnr
from companion.engines import load
from companion.engines.base import Engine, one_sentence, without_telemetry
from companion.engines.onnxfile import INTEGER, QUANTIZED, WEIGHTED
from companion.engines.ort import OnnxRuntimeEngine
from companion.errors import CompanionError
from companion.files import check_writable, replacing
from companion.metrics import model_bytes

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class QuantizedFile:
    """A file that `quantize_onnx` wrote."""

    path: Path
    mode: str
    backend: str
    bytes: int
    """Its size."""
    bytes_before: int
    """Of the file that it was made from."""
    layers: int
    """Convolutions and matrix products whose weights are integers now."""
    layers_before: int
    """Convolutions and matrix products with constant weights."""
    sqnr: float
    """Of the outputs, in dB, over the calibration data; with several outputs, of the worst."""

    @property
    def times_smaller(self) -> float:
        return self.bytes_before / self.bytes


def quantize_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Iterable[Any],
    *,
    mode: str = "static",
    backend: str = "onnxruntime",
    method: str = "minmax",
    percentile: float = 99.99,
    per_channel: bool = True,
    exclude: str | Collection[str] = (),
    bias: bool = True,
    weight_bits: int | None = None,
) -> QuantizedFile:
    """Write an ONNX file of the same network with 8-bit weights, and in the right mode 8-bit arithmetic.

    ``static`` is the way to speed: activations are uint8 on ranges seen in calibration, weights int8, symmetric, one
    scale per output channel, and every tensor says so by a pair of QuantizeLinear and DequantizeLinear nodes (QDQ),
    which engines fuse into integer kernels. (int8 activations would make ONNX Runtime three times slower on x86.)

    Of a network for texts the table of the words' vectors is stored as int8, too, and their mean is taken in float.

    The other two are there to be compared with. ``dynamic`` finds the range of each activation anew in each run: good
    for large linear layers, much slower than float for convolutions. ``weights`` stores the weights as int8 and
    computes in float: a smaller file, no faster.

    Args:
        path: an ``.onnx`` file, such as `companion.engines.export_onnx` writes; it is not changed. Normalisations that
            are left in it are folded.
        out: the file to write, which appears only when it is whole and runs; it keeps the description (labels, task,
            input size) of ``path``.
        calibration: batches of inputs: arrays (or tensors) for a network with one input, dicts of them by name for
            others. A few hundred samples like those it will meet. ``dynamic`` and ``weights`` only judge by them.
        mode: ``static``, ``dynamic`` or ``weights``.
        backend: what quantizes in mode ``static``: ``onnxruntime``, or ``nncf``, which also corrects biases. Either
            file runs in ONNX Runtime and in OpenVINO.
        method: how ONNX Runtime chooses the ranges: ``minmax``, or ``percentile``, which needs batches of one size and
            keeps all their activations in memory. (Its ``entropy`` tries no other range
            than the extremes, so it is not offered.)
        percentile: for that method, the share of the values in % that the range holds, 50 to 100.
        per_channel: a scale for each output channel of the weights, else one for each tensor.
        exclude: names of nodes to leave in float; ``first`` and ``last`` for the first and last layer with weights;
            ``head`` for all that comes after the last of these. A detector needs that: there pixels up to 640 and
            shares in 0..1 lie in one tensor, and of one scale for both nothing is left of the shares.
        bias: store biases as int32, too, in mode ``static`` by ONNX Runtime. TensorRT refuses such a file, and uint8
            activations: for it, give False, which leaves biases in float and activations symmetric, in int8.
        weight_bits: of the int8 that a weight takes, in mode ``static`` by ONNX Runtime: 8, or 7 for processors that
            add two products in 16 bits (see `saturates`), on which large ones would be cut off. If not given, what
            suits this processor; a file for others should name it.

    Returns:
        What was written, with its size and how far its answers are from those of ``path``.

    Raises:
        CompanionError: no such mode, backend, method or node, a backend that is missing, no calibration data or data
            that the network does not take, a file that is quantized already, has no weights to quantize or cannot be
            quantized, answers that are no numbers, ``out`` equal to ``path``, or a file that cannot be written.

    Source: Jacob et al., 2018, section 2; ONNX Runtime, Quantize ONNX models.
    """
    _check_choice("mode", mode, ("static", "dynamic", "weights"))
    _check_choice("backend", backend, ("onnxruntime", "nncf"))
    _check_choice("method", method, ("minmax", "percentile"))
    check_observer(method, percentile)
    if not bias and (mode, backend) != ("static", "onnxruntime"):
        raise CompanionError("biases are quantized in mode static by onnxruntime only: leave out bias.")
    if weight_bits is not None:
        _check_choice("weight_bits", weight_bits, (7, 8))
        if (mode, backend) != ("static", "onnxruntime"):
            raise CompanionError("weight_bits is for mode static by onnxruntime only: leave it out.")
    if backend == "nncf" and (mode, method, per_channel) != ("static", "minmax", True):
        raise CompanionError("nncf quantizes statically, by minmax and per channel only: keep these defaults.")
    out = Path(out)
    if out.suffix != ".onnx":
        raise CompanionError(f"{out} is no name for an ONNX file: it must end in .onnx.")
    check_writable(out)
    if not isinstance(path, str | os.PathLike):
        raise CompanionError("quantize_onnx takes an ONNX file: export the network first with engines.export_onnx.")
    with load(path) as engine:
        path = Path(path)
        if path.suffix != ".onnx":
            raise CompanionError(f"{path} is no ONNX file: export it first with engines.export_onnx.")
        if out.resolve() == path.resolve():
            raise CompanionError(f"{out} is the file to be quantized: give the new one another name.")
        batches = _batches(calibration, engine)
        if method == "percentile" and len({next(iter(batch.values())).shape for batch in batches}) > 1:
            raise CompanionError("the method percentile needs batches of one size: leave out the smaller one.")
        expected = [engine.run(batch) for batch in batches]
        texts = engine.metadata.task == "text"
    if not all(np.isfinite(array).all() for answer in expected for array in answer.values()):
        raise CompanionError(f"the answers of {path} are NaN or infinite: look at its weights.")
    make = {"static": _by_nncf if backend == "nncf" else _static, "dynamic": _dynamic, "weights": _weights_only}[mode]
    share = percentile if method == "percentile" else None
    with one_sentence(f"{path} cannot be quantized"), _quiet(), tempfile.TemporaryDirectory() as folder:
        model = _prepared(path, folder)
        nodes = _weighted(model)
        if not nodes:
            raise CompanionError(f"{path} has no weights to quantize: no convolution and no linear layer.")
        kept = [*_excluded(exclude, model), *(_mean(model) if texts else ())]
        narrow = saturates() if weight_bits is None else weight_bits == 7
        made = make(_Job(model, folder, batches, kept, per_channel, share, bias, narrow))
        content = _tidied(made, path)
    with OnnxRuntimeEngine(content, threads=1) as engine:
        found = [engine.run(batch) for batch in batches]
    worst = min(sqnr(_joined(expected, name), _joined(found, name)) for name in expected[0])
    with replacing(out) as file:
        file.write(content)
    return QuantizedFile(out, mode, backend, len(content), model_bytes(path), _integers(made), len(nodes), worst)


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's 8-bit products are cut off on this processor.

    Without the instructions called VNNI, x86 multiplies uint8 by int8 and adds two of the products in 16 bits:
    2·255·127 does not fit, 2·255·64 does. Tried with the largest numbers there are.

    Source: ONNX Runtime, Quantize ONNX models, "When and why do I need to try reduce_range?".
    """
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.INT8, (64, 1), [127] * 64)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, (1, 64))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 1))],
        [weights],
    )
    # Versions that the oldest ONNX Runtime here can read.
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 13)])
    with OnnxRuntimeEngine(model.SerializeToString(), threads=1) as engine:
        answer = engine.run({"x": np.full((1, 64), 255, np.uint8)})["y"]
    return bool(answer[0, 0] != 64 * 255 * 127)


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise CompanionError(f"{name} is {value!r}: choose one of {', '.join(map(str, choices))}.")


def _joined(answers: list[Batch], name: str) -> np.ndarray:
    return np.concatenate([answer[name].ravel() for answer in answers])


def _batches(calibration: Any, engine: Engine) -> list[Batch]:
    """The calibration data as inputs by name; whether they fit, the engine says when it runs them."""
    if isinstance(calibration, np.ndarray | Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise CompanionError("the calibration data must be a list of batches, each an array or a dict of arrays.")
    names = [info.name for info in engine.inputs]
    batches = []
    for given in calibration:
        if not isinstance(given, Mapping) and len(names) != 1:
            raise CompanionError(f"the network takes {', '.join(names)}: give each batch as a dict of arrays by name.")
        by_name = given if isinstance(given, Mapping) else {names[0]: given}
        batch = {name: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for name, x in by_name.items()}
        for name, x in batch.items():
            if isinstance(x, np.ndarray) and x.dtype.kind == "f" and not np.isfinite(x).all():
                raise CompanionError(f"the calibration data hold NaN or infinite values in {name}: leave them out.")
        batches.append(batch)
    if not batches:
        raise CompanionError("there is nothing to calibrate with: give at least one batch of inputs.")
    return batches


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizers' warnings, logs and progress bars."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _prepared(path: Path, folder: str) -> Any:
    """The network with its normalisations folded and the shapes of its tensors known, for the quantizers."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]

    if {node.op_type for node in onnx.load(path, load_external_data=False).graph.node} & QUANTIZED:
        raise CompanionError(f"{path} is quantized already: quantize the file that it was made from.")
    ready = Path(folder) / "prepared.onnx"
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)  # ONNX's own shapes are enough, and quicker
    model = onnx.load(ready)
    names = {node.name for node in model.graph.node}
    for number, node in enumerate(model.graph.node):  # which files of others may leave out
        if not node.name:
            node.name = next(name for n in count(number) if (name := f"{node.op_type}_{n}") not in names)
            names.add(node.name)
    return model


def _weighted(model: Any) -> list[Any]:
    """The nodes that multiply with constant float weights, in the order in which they run."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in WEIGHTED
        and (weight := constants.get(node.input[1])) is not None
        and weight.data_type == weight.FLOAT
        and len(weight.dims) >= 2
    ]


def _excluded(exclude: str | Collection[str], model: Any) -> list[str]:
    """Names of nodes, with ``first``, ``last`` and ``head`` replaced by theirs."""
    nodes = _weighted(model)
    parts = {"first": [nodes[0].name], "last": [nodes[-1].name], "head": _head(model, nodes)}
    names = {node.name for node in model.graph.node}
    given = [exclude] if isinstance(exclude, str) else exclude
    wanted = [each for name in given for each in parts.get(name, [name])]
    for name in wanted:
        if name not in names:
            layers = ", ".join(node.name for node in nodes)
            raise CompanionError(f"there is no node {name!r} to exclude: its layers are {layers}.")
    if {node.name for node in nodes} <= set(wanted):
        raise CompanionError("every layer is excluded: leave at least one to quantize.")
    return wanted


def _head(model: Any, weighted: list[Any]) -> list[str]:
    """Names of the nodes after which no layer with weights comes."""
    layers = {node.name for node in weighted}
    needed: set[str] = set()
    head = []
    for node in reversed(model.graph.node):
        if node.name in layers or needed.intersection(node.output):
            needed.update(node.input)
        else:
            head.append(node.name)
    return head


def _mean(model: Any) -> list[str]:
    """Names of what takes the mean of the words' vectors: on one scale with 900 words, a count of 3 would be none."""
    first = _weighted(model)[0].name
    ahead = takewhile(lambda node: node.name != first, model.graph.node)
    return [node.name for node in ahead if node.op_type != "Gather"]


@dataclass(frozen=True)
class _Job:
    """What each of the ways below is given; each returns a network, and may spoil ``model``."""

    model: Any
    folder: str
    batches: list[Batch]
    exclude: list[str]
    per_channel: bool
    percentile: float | None
    """None for the extremes."""
    bias: bool
    narrow: bool
    """Weights of 7 bits."""


def _static(job: _Job) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static  # type: ignore[import-untyped]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(job.batches)

        def get_next(self) -> Batch | None:
            return next(self.batches, None)

    before, out = Path(job.folder) / "before.onnx", Path(job.folder) / "static.onnx"
    onnx.save(job.model, before)  # it takes networks in memory too, and then fails on their weights
    quantize_static(
        before,
        out,
        Reader(),
        # With int8 in ONNX Runtime, ResNet-18 is three times slower; TensorRT takes nothing else, and no zero point.
        activation_type=QuantType.QUInt8 if job.bias else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=job.per_channel,
        reduce_range=job.narrow,
        nodes_to_exclude=job.exclude,
        calibrate_method=CalibrationMethod.MinMax if job.percentile is None else CalibrationMethod.Percentile,
        extra_options={"QuantizeBias": job.bias, "ActivationSymmetric": not job.bias}
        | ({} if job.percentile is None else {"CalibPercentile": job.percentile}),
    )
    return onnx.load(out)


def _by_nncf(job: _Job) -> Any:
    without_telemetry()
    try:
        import nncf
    except ImportError as error:
        raise CompanionError("the backend nncf needs that package: pip install nncf.") from error
    return nncf.quantize(
        job.model,
        nncf.Dataset(job.batches),
        subset_size=len(job.batches),
        ignored_scope=nncf.IgnoredScope(names=job.exclude),
    )


def _dynamic(job: _Job) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # With the shapes that torch's exporter notes, ONNX Runtime 1.31 ends in a ShapeInferenceError at linear layers.
    del job.model.graph.value_info[:]
    before, out = Path(job.folder) / "before.onnx", Path(job.folder) / "dynamic.onnx"
    onnx.save(job.model, before)
    quantize_dynamic(
        before,
        out,
        weight_type=QuantType.QUInt8,  # its integer convolutions take no signed weights
        per_channel=job.per_channel,
        # Linear layers become a product and an addition first, by names of their own.
        nodes_to_exclude=[*job.exclude, *(f"{name}_MatMul" for name in job.exclude)],
    )
    return onnx.load(out)


def _weights_only(job: _Job) -> Any:
    """Put int8 and a DequantizeLinear in the place of each weight."""
    import onnx
    from onnx import helper, numpy_helper

    graph = job.model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ahead = []
    for node in _weighted(job.model):
        if node.name in job.exclude:
            continue
        name = node.input[1]
        weight = torch.from_numpy(numpy_helper.to_array(constants[name]).copy())
        grid = observe(weight, symmetric=True, axis=_channels(node, weight) if job.per_channel else None)
        parts = {
            f"{name}_int8": quantize(weight, grid),
            f"{name}_scale": grid.scale,
            f"{name}_zero": grid.zero_point.to(torch.int8),
        }
        if f"{name}_int8" not in constants:  # two layers may share a weight
            tensors = [numpy_helper.from_array(tensor.numpy(), part) for part, tensor in parts.items()]
            graph.initializer.extend(tensors)
            constants |= {tensor.name: tensor for tensor in tensors}
            axis: Any = {} if grid.axis is None else {"axis": grid.axis}
            ahead.append(
                helper.make_node("DequantizeLinear", list(parts), [f"{name}_float"], f"{name}_dequantize", **axis)
            )
        node.input[1] = f"{name}_float"
    used = {name for node in graph.node for name in node.input}
    nodes = [*ahead, *graph.node]
    kept = [tensor for tensor in graph.initializer if tensor.name in used | {n for node in ahead for n in node.input}]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.checker.check_model(job.model)
    return job.model


def _channels(node: Any, weight: Tensor) -> int:
    """The dimension of the output channels in a node's weight."""
    if node.op_type == "Gemm":
        return 0 if any(field.name == "transB" and field.i for field in node.attribute) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": weight.ndim - 1}[node.op_type]


def _integers(model: Any) -> int:
    """How many convolutions and products have integer weights."""
    constants = {tensor.name for tensor in model.graph.initializer}
    dequantized = {
        node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    return sum(
        node.op_type in INTEGER or (node.op_type in WEIGHTED and node.input[1] in dequantized)
        for node in model.graph.node
    )


def _tidied(model: Any, path: Path) -> bytes:
    """The file's bytes: with the description that ``path`` had, without what the quantizers note of themselves."""
    import onnx

    del model.metadata_props[:]
    model.metadata_props.extend(onnx.load(path, load_external_data=False).metadata_props)
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:], model.graph.value_info[:]
    model.opset_import.extend(kept)
    model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    return model.SerializeToString(deterministic=True)
