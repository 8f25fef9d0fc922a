"""Segmentation networks by picture size, memory layout, precision and threads (2.4.3)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from companion import metrics, models
from companion.bench.runner import Bench, Cell
from companion.bench.values import speed_up
from companion.metrics.results import Row, Value, summarize

SIZES = (96, 224)
SECONDS = 8.0  # a cell: all variants of one network, size and number of threads, in turn
VARIANTS = {
    "fp32": (torch.contiguous_format, torch.float32),
    "fp32, channels last": (torch.channels_last, torch.float32),
    "bf16, channels last": (torch.channels_last, torch.bfloat16),
}


def _runner(name: str, size: int, layout: torch.memory_format, dtype: torch.dtype) -> Callable[[], Any]:
    model = models.create(name, seed=0).eval().to(dtype).to(memory_format=layout)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return metrics.inference(model, image.to(dtype=dtype, memory_format=layout))


def _compare(name: str, size: int, threads: int) -> list[Row]:
    found = metrics.compare_latency(
        {variant: _runner(name, size, *how) for variant, how in VARIANTS.items()}, seconds=SECONDS, threads=threads
    )
    rows = []
    for variant, latency in found.latencies.items():
        values: dict[str, Value] = {
            "latency": summarize([1e3 * sample for sample in latency.samples], "ms"),
            **speed_up(found.ratios.get(variant)),
        }
        rows.append(Row({"network": name, "size": size, "threads": threads, "variant": variant}, values))
    return rows


def _cells() -> Iterator[Cell]:
    for name in ("unet", "lraspp_mobilenet_v3_large", "fcn_resnet50"):
        for size in SIZES:
            for threads in (1, 2):
                yield Cell(f"{name}, {size}×{size}, {threads} threads", partial(_compare, name, size, threads))


BENCH = Bench(
    "segmentation",
    "Latency of segmentation networks by size, layout and precision; speed-up over fp32 with its 95 % interval.",
    _cells,
    settings={"batch": 1, "seed": 0, "seconds": SECONDS},
)
