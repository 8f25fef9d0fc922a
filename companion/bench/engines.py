"""One network on every engine: latency, error, size, and what loading and the first call take (2.3.1)."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from companion import engines, metrics, models
from companion.bench.runner import Bench, Cell
from companion.bench.values import speed_up
from companion.compress import quantize_onnx
from companion.engines import Engine, graph
from companion.errors import CompanionError
from companion.metrics.results import Row, Value, summarize

NETWORK = "resnet18"
BASELINE = "torch_fused"
SECONDS = 120.0  # all engines, in turn
ROUNDS = 40
CALIBRATION = 16  # random images, for the ranges of int8

# Engines that run the network from memory; and files by what is in them, with the engines that run them.
FROM_MEMORY = ("torch", "torch_fused", "torch_compile")
FILES = {
    "fp32": ("onnxruntime", "openvino", "openvino, bf16"),
    "fp16": ("onnxruntime",),
    "int8": ("onnxruntime", "openvino"),
}


@dataclass(frozen=True)
class _Ready:
    """An engine that has run once."""

    name: str
    """Of the engine, with the precision that was asked of it."""
    engine: Engine
    file: str
    """What it was made from."""
    computes_in: str
    bytes: int
    load: float
    """Seconds."""
    first: float
    """Seconds of the first call."""
    answer: np.ndarray


def _write(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The network's files by what is in them: fp32, fp16, int8, and a LiteRT file if its converter is here."""
    example = engines.example_for(model)
    paths = {name: folder / f"{name}.onnx" for name in FILES}
    for precision in ("fp32", "fp16"):
        engines.export_onnx(model, example, paths[precision], precision=precision)
    images = torch.rand(CALIBRATION, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    quantize_onnx(paths["fp32"], paths["int8"], list(images.split(1)))
    try:
        paths["litert"] = engines.export_tflite(model, example, folder / "fp32.tflite").path
    except CompanionError as error:
        if "litert-convert" not in str(error):
            raise
    return paths


def _start(source: Path | nn.Module, name: str, file: str, image: np.ndarray) -> _Ready:
    """Load an engine and run it once; ``name`` may say a precision after a comma."""
    engine_name, _, precision = name.partition(", ")
    start = time.perf_counter()
    options: dict[str, Any] = {"precision": precision} if precision else {}
    engine = engines.load(source, engine_name, **options)
    loaded = time.perf_counter()
    (answer,) = engine.run({engine.inputs[0].name: image}).values()
    first = time.perf_counter() - loaded
    computes_in = engine.precision
    if engine_name == "onnxruntime":  # whose engine says what the file asks for
        assert isinstance(source, Path)
        computes_in = next(iter(graph.onnxruntime_graph(source).precisions), computes_in)
    return _Ready(name, engine, file, computes_in, metrics.model_bytes(source), loaded - start, first, answer)


def _compare() -> list[Row]:
    model = models.create(NETWORK, seed=0).eval()
    image = engines.example_for(model).numpy()
    caches = torch.compiler.config.force_disable_caches
    torch.compiler.config.force_disable_caches = True  # so that the first call compiles, as it does on a new machine
    try:
        with ExitStack() as stack:
            paths = _write(model, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            wanted: list[tuple[str, Path | nn.Module, str]] = [(name, model, "weights") for name in FROM_MEMORY]
            wanted += [(name, paths[what], f"{what} .onnx") for what, names in FILES.items() for name in names]
            wanted += [("litert", paths["litert"], "fp32 .tflite")] if "litert" in paths else []
            there = engines.available()
            ready = {}
            for name, source, file in wanted:
                if name.partition(",")[0] in there:
                    ready[f"{name} {file}"] = started = _start(source, name, file, image)
                    stack.callback(started.engine.close)
            run: dict[str, Callable[[], object]] = {
                key: partial(each.engine.run, {each.engine.inputs[0].name: image}) for key, each in ready.items()
            }
            found = metrics.compare_latency(
                run, baseline=f"{BASELINE} weights", rounds=ROUNDS, seconds=SECONDS, threads=1
            )
    finally:
        torch.compiler.config.force_disable_caches = caches
    expected = ready["torch weights"].answer
    rows = []
    for key, each in ready.items():
        latency = found.latencies[key]
        values: dict[str, Value] = {
            "latency": summarize([1e3 * sample for sample in latency.samples], "ms"),
            "p95 in ms": round(1e3 * latency.p95, 3),
            **speed_up(found.ratios.get(key)),
            "largest error": float(f"{np.abs(each.answer - expected).max() / np.abs(expected).max():.2g}"),
            "load in ms": round(1e3 * each.load, 2),
            "first call in ms": round(1e3 * each.first, 2),
            "bytes": each.bytes,
        }
        rows.append(Row({"engine": each.name, "from": each.file, "computes in": each.computes_in}, values))
    return rows


def _cells() -> Iterator[Cell]:
    torch.set_num_threads(1)
    yield Cell(NETWORK, _compare)


BENCH = Bench(
    "engines",
    "resnet18 at batch 1 on every engine that is installed (LiteRT: and its converter); speed-up over torch_fused with "
    "its 95 % interval, largest error relative to torch's largest output.",
    _cells,
    settings={"threads": 1, "seed": 0, "seconds": SECONDS, "rounds": ROUNDS, "calibration images": CALIBRATION},
    packages=("torch", "onnxruntime", "openvino", "ai-edge-litert", "litert-torch"),
)
