"""`companion profile`: what one network costs, on one page."""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from companion import engines, metrics, models
from companion.errors import CompanionError
from companion.metrics.complexity import Complexity, Cost
from companion.metrics.latency import Latency, inference, measure_latency
from companion.units import format_bytes, format_count, format_seconds

TORCHVISION = "torchvision:"
TEXT = 16  # words
TORCHVISION_INPUT = (1, 3, 224, 224)  # what its classifiers were trained on


@dataclass(frozen=True)
class Profile:
    """What `profile` found."""

    target: str
    input: tuple[int, ...]
    """Shape of the example, the batch first."""
    complexity: Complexity
    activation_bytes: int
    """Peak of inference."""
    saved_bytes: int | None
    """Kept by a training step for its backward pass; None where there is none: an ONNX file cannot be trained, and
    batch normalisation cannot average over a single value."""
    bytes: int
    """Of the file; of the weights and buffers where there is no file."""
    on_disk: bool
    engine: str
    """What ran: ``torch`` or ``onnxruntime``."""
    latency: Latency


def profile(
    target: str | os.PathLike[str],
    *,
    input: tuple[int, ...] | None = None,
    threads: int = 1,
    seconds: float = 1.0,
) -> Profile:
    """Measure a network on an example of random numbers.

    Args:
        target: a name of `models.names`, a ``.safetensors`` or ``.onnx`` file, or ``torchvision:NAME``.
        input: shape of the example, the batch first; one sample of what the network is made for if not given.
        threads: CPU threads of the timing.
        seconds: how long to time.

    Raises:
        CompanionError: no such network or file, or one that does not take such an input.
    """
    if input is not None and (len(input) < 1 or min(input) < 1):
        raise CompanionError(f"an input of shape {input} is empty: give whole numbers from 1, such as 1,3,32,32.")
    path = Path(target)
    if path.suffix.lower() == ".onnx":
        return _profile_onnx(path, input, threads, seconds)
    name = os.fspath(target)
    on_disk = path.suffix.lower() == ".safetensors"
    if name.startswith(TORCHVISION):
        model, example = _torchvision(name.removeprefix(TORCHVISION)), _random(input or TORCHVISION_INPUT)
    else:
        if not on_disk and name not in models.names() and path.exists():
            raise CompanionError(f"{name} is neither a .safetensors nor an .onnx file.")
        model = models.load(path) if on_disk else models.create(name, seed=0)
        whole = models.describe(model).task == "text"
        example = engines.example_for(model) if input is None else _random(input, whole=whole)
    model.eval()
    return Profile(
        target=name,
        input=tuple(example.shape),
        complexity=metrics.count_complexity(model, example),
        activation_bytes=metrics.activation_bytes(model, example, training=False),
        saved_bytes=_saved_bytes(model, example),
        bytes=metrics.model_bytes(path if on_disk else model),
        on_disk=on_disk,
        engine="torch",
        latency=measure_latency(inference(model, example), threads=threads, seconds=seconds),
    )


def _torchvision(name: str) -> nn.Module:
    import torchvision

    if name not in torchvision.models.list_models():
        raise CompanionError(f"torchvision has no network {name!r}: see torchvision.models.list_models().")
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # or it would be downloaded
    return torchvision.models.get_model(name, **options)


def _random(shape: tuple[int, ...], *, whole: bool = False) -> torch.Tensor:
    """Fractions; or where whole numbers are wanted, which may be the ids of words, ones."""
    try:
        if whole:
            return torch.ones(shape, dtype=torch.int64)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, MemoryError) as error:
        raise CompanionError(f"an input of shape {shape} does not fit into the memory: make it smaller.") from error


def _saved_bytes(model: nn.Module, example: torch.Tensor) -> int | None:
    try:
        return metrics.activation_bytes(model, example, training=True)
    except CompanionError:  # the same example did run in evaluation mode
        return None


def _profile_onnx(path: Path, shape: tuple[int, ...] | None, threads: int, seconds: float) -> Profile:
    with engines.load(path, "onnxruntime", threads=threads) as engine:
        if len(engine.inputs) != 1:
            raise CompanionError(f"{path} takes {len(engine.inputs)} inputs: only a single one can be made up here.")
        taken = engine.inputs[0]
        if shape is None:
            shape = tuple(1 if i == 0 and size is None else size or 0 for i, size in enumerate(taken.shape))
            sample = (TEXT,) if engine.metadata.task == "text" else engine.metadata.input_size
            if 0 in shape and sample is not None:
                shape = (shape[0], *sample)
            if 0 in shape:
                raise CompanionError(f"{path} takes {taken}: say which size with --input.")
        array = _random(shape, whole="int" in taken.dtype).numpy().astype(taken.dtype)
        counted = metrics.count_onnx(path, {taken.name: shape})
        return Profile(
            target=str(path),
            input=shape,
            complexity=counted.complexity,
            activation_bytes=counted.activation_bytes,
            saved_bytes=None,
            bytes=metrics.model_bytes(path),
            on_disk=True,
            engine=engine.name,
            latency=measure_latency(lambda: engine.run({taken.name: array}), threads=threads, seconds=seconds),
        )


def to_rows(found: Profile) -> list[tuple[str, str, str]]:
    """What a person reads: name, figure, remark."""
    counted, latency = found.complexity, found.latency
    low, high = latency.quartiles
    threads = f"{latency.threads} thread" + "s" * (latency.threads != 1)
    rows = [
        ("network", found.target, f"input {'×'.join(map(str, found.input))}, {found.engine}, {threads}"),
        ("parameters", f"{counted.parameters:,}", ""),
        ("size", format_bytes(found.bytes), "of the file" if found.on_disk else "of weights and buffers in memory"),
        ("MACs", format_count(counted.macs), "multiply–adds of matrix products, convolutions and attention"),
        ("FLOPs", format_count(counted.flops), "2 × MACs"),
        ("bytes moved", format_bytes(counted.bytes_moved), "if every operator reads from memory and writes to it"),
        ("intensity", f"{counted.intensity:.1f}", "FLOPs per byte moved"),
        ("activations", format_bytes(found.activation_bytes), "peak of inference"),
    ]
    if found.saved_bytes is not None:
        rows.append(("", format_bytes(found.saved_bytes), "kept by a training step for its backward pass"))
    rows += [
        (
            "latency",
            format_seconds(latency.median),
            f"median; quartiles {format_seconds(low)} to {format_seconds(high)}",
        ),
        ("", format_seconds(latency.p95), f"95th percentile of {len(latency.samples)} samples"),
        ("throughput", f"{(found.input or (1,))[0] / latency.median:,.1f}", "samples per second"),
    ]
    return rows + [
        ("NOT COUNTED", operator, "work unknown: MACs and FLOPs are too low") for operator in counted.uncounted
    ]


def module_rows(found: Profile) -> list[tuple[str, str, str, str]]:
    """A line for each module (or node of an ONNX graph): MACs, their share, bytes moved."""
    total = max(1, found.complexity.macs)
    return [
        (name, format_count(cost.macs), f"{100 * cost.macs / total:.1f} %", format_bytes(cost.bytes_moved))
        for name, cost in found.complexity.by_module.items()
    ]


def to_json(found: Profile) -> dict[str, Any]:
    """What a program reads: whole numbers of bytes and operations, seconds."""
    counted, latency = found.complexity, found.latency

    def table(costs: dict[str, Cost]) -> dict[str, dict[str, int]]:
        return {name: {"macs": cost.macs, "bytes_moved": cost.bytes_moved} for name, cost in costs.items()}

    return {
        "network": found.target,
        "input": list(found.input),
        "engine": found.engine,
        "parameters": counted.parameters,
        "bytes": found.bytes,
        "bytes_of": "file" if found.on_disk else "state",
        "macs": counted.macs,
        "flops": counted.flops,
        "bytes_moved": counted.bytes_moved,
        "intensity": counted.intensity,
        "activation_bytes": {"inference": found.activation_bytes, "training": found.saved_bytes},
        "latency_seconds": {
            "median": latency.median,
            "quartiles": list(latency.quartiles),
            "p50": latency.p50,
            "p95": latency.p95,
            "p99": latency.p99,
            "samples": len(latency.samples),
            "threads": latency.threads,
        },
        "samples_per_second": (found.input or (1,))[0] / latency.median,
        "uncounted": list(counted.uncounted),
        "by_module": table(counted.by_module),
        "by_operator": table(counted.by_operator),
    }
