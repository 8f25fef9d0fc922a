"""Latency of the networks of the course, by engine and batch (2.4.1)."""

from collections.abc import Iterator
from functools import partial

import torch

from companion import engines, metrics, models
from companion.bench.runner import Bench, Cell
from companion.bench.values import speed_up
from companion.metrics.results import Row, Value, summarize

BATCHES = {
    "simple_cnn": (1, 32),
    "simple_cnn_3conv": (1, 32),
    "cifar_resnet20": (1, 32),
    "cifar_resnet18": (1, 32),
    "resnet18": (1,),
    "resnet50": (1,),
}
ENGINES = ("torch", "torch_fused", "onnxruntime")
SECONDS = 10.0  # a cell: all engines of one network and batch, in turn


def _compare(name: str, batch: int) -> list[Row]:
    model = models.create(name, seed=0).eval()
    image = engines.example_for(model).expand(batch, -1, -1, -1).numpy()
    ready = {each: engines.load(model, each, threads=1) for each in ENGINES}
    try:
        found = metrics.compare_latency(
            {each: partial(engine.run, {engine.inputs[0].name: image}) for each, engine in ready.items()},
            seconds=SECONDS,
            threads=1,
        )
    finally:
        for engine in ready.values():
            engine.close()
    rows = []
    for each, latency in found.latencies.items():
        values: dict[str, Value] = {
            "latency": summarize([1e3 * sample for sample in latency.samples], "ms"),
            "p95 in ms": round(1e3 * latency.p95, 3),
            **speed_up(found.ratios.get(each)),
        }
        rows.append(Row({"network": name, "batch": batch, "engine": each}, values))
    return rows


def _cells() -> Iterator[Cell]:
    torch.set_num_threads(1)
    for name, batches in BATCHES.items():
        for batch in batches:
            yield Cell(f"{name}, batch {batch}", partial(_compare, name, batch))


BENCH = Bench(
    "networks",
    "Latency of networks by engine and batch; speed-up over eager torch with its 95 % interval.",
    _cells,
    settings={"threads": 1, "seed": 0, "seconds": SECONDS},
    packages=("torch", "onnxruntime"),
)
