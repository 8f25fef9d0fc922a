"""From a torch network to one ONNX file that every engine reads, checked before it is there."""

import inspect
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from companion.engines.base import Engine, Metadata, one_sentence, reason
from companion.engines.half import to_float16
from companion.engines.network import (
    check_batch,
    flatten,
    metadata_of,
    own_copy,
    random_like,
    stride_of,
    takes_any_size,
    takes_texts,
)
from companion.errors import CompanionError
from companion.files import check_writable, replacing
from companion.metrics import model_bytes
from companion.metrics.probe import call

# ONNX is stored as protobuf, whose messages end at 2 GiB; a mebibyte is left for the graph.
MAX_BYTES = 2**31 - 2**20
OPSET = 20  # what torch 2.14 exports by default, and every engine of the course reads
OLDEST_OPSET = 18  # the exporter writes this one; older ones it makes from that, not always
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}  # of answers, relative to the largest: rounding in each of twenty layers
BATCHES = (1, 7)  # batch sizes tried besides the example's


@dataclass(frozen=True)
class Export:
    """A file that `export_onnx` wrote."""

    path: Path
    bytes: int
    """Its size."""
    largest_difference: float
    """From torch's answers, relative to the largest of them where that is above 1."""
    batches: tuple[int, ...]
    """The batch sizes at which it was looked for."""


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    task: str | None = None,
    precision: str = "fp32",
    dynamic_size: bool = False,
    opset: int = OPSET,
    tolerance: float | None = None,
) -> Export:
    """Write ``model`` to an ``.onnx`` file: weights inside, a batch of any size, a description, checked against torch.

    The file appears only after ONNX Runtime has given torch's answers for the example and for random inputs. Equal
    networks make equal files, and nothing of this machine is in them. Inputs and outputs are called ``input`` and
    ``output``; of several in a tuple ``input_0``, ``input_1``, in a dict their keys.

    Args:
        model: the network; it is copied, and exported in evaluation mode.
        example: what it takes: a tensor, a tuple of its arguments, or a dict of them by name, each with the samples in
            the first dimension. The other dimensions are fixed by it, but for the length of our texts.
        path: the file; an existing one is replaced.
        labels: class names in the order of the outputs, if not those the network already carries.
        task: ``classify``, ``text``, ``segment`` or ``detect``, for a network that is not ours.
        precision: ``fp32`` leaves the weights as they are; ``fp16`` converts the graph (`to_float16`), with float32
            inputs and outputs. (8 bits are `companion.compress.quantize_onnx`.)
        dynamic_size: leave height and width of images [N, C, H, W] open, too. YOLOv5 takes multiples of 32, which the
            file says.
        opset: version of ONNX's operators, from 18.
        tolerance: how far ONNX Runtime may be from torch, relative to the largest output where that is above 1; None
            for 1e-4, and for ``fp16`` 1e-2. Networks that have 16 bits themselves need about 1e-2.

    Raises:
        CompanionError: a network that torch cannot export, at any size if that is asked for, or ONNX Runtime cannot
            run; answers that differ by more than the tolerance or are no numbers, weights beyond float16, labels that
            are not as many as the classes, 2 GiB of weights, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise CompanionError(f"{path} is no name for an ONNX file: it must end in .onnx.")
    check_writable(path)
    content, largest, batches = onnx_bytes(
        model,
        example,
        labels=labels,
        task=task,
        precision=precision,
        dynamic_size=dynamic_size,
        opset=opset,
        tolerance=tolerance,
    )
    with replacing(path) as file:
        file.write(content)
    return Export(path, len(content), largest, batches)


def onnx_bytes(
    model: nn.Module,
    example: Any,
    *,
    labels: Sequence[str] | None = None,
    task: str | None = None,
    precision: str = "fp32",
    dynamic_size: bool = False,
    opset: int = OPSET,
    tolerance: float | None = None,
) -> tuple[bytes, float, tuple[int, ...]]:
    """What `export_onnx` writes, with the largest difference and the batch sizes; arguments and errors are its."""
    if type(opset) is not int or opset < OLDEST_OPSET:
        raise CompanionError(f"opset is {opset!r}: give a whole number from {OLDEST_OPSET}.")
    if precision not in list(TOLERANCES):
        raise CompanionError(f"precision is {precision!r}: choose one of {', '.join(TOLERANCES)}.")
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    if not isinstance(tolerance, int | float) or not tolerance >= 0:  # NaN is not
        raise CompanionError(f"tolerance is {tolerance!r}: give a number from 0.")
    inputs = check_batch(model, example)
    # In plain layout: from channels-last tensors torch would make another graph.
    example = tree_map(lambda tensor: tensor.detach().cpu().contiguous(), example)
    model = own_copy(model).to(memory_format=torch.contiguous_format)
    said = metadata_of(model, inputs, labels=labels, task=task)
    examples = [example]
    if dynamic_size:
        if not isinstance(example, Tensor) or example.dim() != 4 or not takes_any_size(model):
            raise CompanionError(f"{said.model} does not take images of any size: leave out dynamic_size.")
        said = replace(said, stride=stride_of(model))
        examples.append(_larger(example, stride_of(model)))
    elif takes_texts(said):
        examples.append(example.repeat(1, 3)[:, :-1])
    content = _convert(model, example, opset, said)
    content = to_float16(content) if precision == "fp16" else content
    return content, *_compare(model, examples, content, tolerance)


def _larger(images: Tensor, stride: int) -> Tensor:
    """Images that go on one stride below and two to the right."""
    height, width = images.shape[2:]
    return images.repeat(1, 1, 2, 3)[:, :, : height + stride, : width + 2 * stride]


def _convert(model: nn.Module, example: Any, opset: int, metadata: Metadata) -> bytes:
    """The network as the bytes of an ONNX file; height and width are open if the metadata have a stride, and so is the
    length of texts."""
    import onnx

    if (weights := model_bytes(model)) > MAX_BYTES:
        raise CompanionError(
            f"the weights take {weights / 2**30:.1f} GiB, and one ONNX file holds less than 2: make it smaller."
        )
    answers = outputs_of(model, example)
    for name, tensor in answers.items():
        if tensor.isnan().any():
            raise CompanionError(f"{name} of the network is not a number (NaN) for the example: give another one.")
    # Two samples at least: what torch sees once, it may take for fixed.
    example = tree_map(lambda tensor: torch.cat([tensor] * (2 if len(tensor) == 1 else 1)), example)
    by_name = example if isinstance(example, dict) else {}
    arguments = () if by_name else example if isinstance(example, tuple) else (example,)
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if (stride := metadata.stride) is not None:
        height, width = torch.export.Dim("h"), torch.export.Dim("w")
        free |= {2: height, 3: width} if stride == 1 else {2: stride * height, 3: stride * width}
    if takes_texts(metadata):
        free |= {1: torch.export.Dim("length")}
    try:
        with quiet():
            # By the parameters' names, for *args is one parameter.
            parameters = dict(inspect.signature(model.forward).bind(*arguments, **by_name).arguments)
            program = torch.onnx.export(
                model,
                arguments,
                kwargs=by_name,
                dynamo=True,
                dynamic_shapes=tree_map(lambda _: free, parameters),
                input_names=list(flatten(example, "input")),
                output_names=list(answers),
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
        _strip(proto)
        onnx.helper.set_model_props(proto, metadata.to_text())
        content = proto.SerializeToString(deterministic=True)
        onnx.checker.check_model(content)
    except Exception as error:  # of torch.export, onnxscript and onnx, which have no base class
        raise CompanionError(f"{type(model).__name__} cannot be exported to ONNX: {reason(root_of(error))}.") from error
    found = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if found != opset:
        raise CompanionError(f"{type(model).__name__} cannot be exported with opset {opset}, only with {found}.")
    return content


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings, logs and listings: its exceptions say what a user can act on."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def outputs_of(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """The network's outputs by name, for a copy of the example, which it may overwrite."""
    count = len(tree_leaves(example)[0])
    with (
        one_sentence(f"{type(model).__name__} does not run on {count} samples like the example"),
        torch.no_grad(),  # what networks keep from an inference mode, torch.export refuses
    ):
        outputs = flatten(call(model, tree_map(torch.clone, example)), "output")
        return {name: tensor.detach().clone() for name, tensor in outputs.items()}


def root_of(error: BaseException) -> BaseException:
    """What it all began with: the exporter wraps its errors in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _strip(message: Any) -> None:
    """Remove what the exporter notes on every node about itself: stack traces with this machine's paths, mostly."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _compare(model: nn.Module, examples: list[Any], content: bytes, tolerance: float) -> tuple[float, tuple[int, ...]]:
    """The largest difference between ONNX Runtime and torch, and the batch sizes at which it was looked for.

    Raises:
        CompanionError: ONNX Runtime cannot run the file, or the difference is above the tolerance.
    """
    from companion.engines.ort import OnnxRuntimeEngine

    batches = tuple(sorted({*BATCHES, len(tree_leaves(examples[0])[0])}))
    with OnnxRuntimeEngine(content, threads=1) as engine:
        for info in engine.inputs:
            if info.shape[0] is not None:
                raise CompanionError(
                    f"{type(model).__name__} cannot be exported to ONNX: torch takes its batch for always "
                    f"{info.shape[0]}, as after len(x) or int(), in place of which x.shape[0] helps."
                )
        return max(compare(model, each, engine, tolerance, batches, "ONNX Runtime") for each in examples), batches


def compare(
    model: nn.Module, example: Any, engine: Engine, tolerance: float, batches: Sequence[int], who: str
) -> float:
    """The largest difference between an engine and torch, for the example and for random inputs like it.

    Raises:
        CompanionError: the engine cannot run, or the difference is above the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for inputs in (example, *(random_like(example, batch, generator) for batch in batches)):
        batch = len(tree_leaves(inputs)[0])
        expected = outputs_of(model, inputs)
        found = engine.run({name: tensor.numpy() for name, tensor in flatten(inputs, "input").items()})
        if set(expected) != set(found):
            raise CompanionError(
                f"the network returns {', '.join(expected)} at batch {batch}, {', '.join(found)} for the example: "
                "what it returns must not depend on the batch."
            )
        for name, tensor in expected.items():
            difference = _difference(tensor.numpy(), found[name])
            if not difference <= tolerance:  # NaN is not
                raise CompanionError(
                    f"{who}'s {name} differs from torch's by {difference:.1e} at batch {batch}, "
                    f"and {tolerance:.1e} is allowed: no file was written."
                )
            largest = max(largest, difference)
    return largest


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference between two arrays, relative to the largest number in the first where that is above 1."""
    if expected.shape != found.shape:
        return math.inf
    a, b = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):  # equal infinities
        distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(distance.max(initial=0.0) / np.abs(a[np.isfinite(a)]).max(initial=1.0))
