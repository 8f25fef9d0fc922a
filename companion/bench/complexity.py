"""What the networks of the course need, counted (2.4.1): the same figures on every machine."""

from collections.abc import Iterator
from functools import partial

import torch

from companion import metrics, models
from companion.bench.runner import Bench, Cell
from companion.metrics.results import Row


def _count(name: str) -> list[Row]:
    with torch.device("meta"):
        model = models.create(name)
        side = models.image_size(name)
        assert side is not None
        image = torch.zeros(1, 3, side, side)
    found = metrics.count_complexity(model, image)
    return [
        Row(
            {"network": name, "input": f"3×{side}×{side}"},
            {
                "parameters": found.parameters,
                "MACs": found.macs,
                "FLOPs": found.flops,
                "MACs of a training step": metrics.count_macs(model, image, training=True),
                "state bytes": metrics.model_bytes(model),
                "activation bytes of inference": metrics.activation_bytes(model, image, training=False),
                "activation bytes of training at batch 32": metrics.activation_bytes(
                    model, torch.zeros(32, 3, side, side, device="meta"), training=True
                ),
                "FLOPs per byte": round(found.intensity, 1),
            },
        )
    ]


def _cells() -> Iterator[Cell]:
    for name in models.names():
        if models.task(name) != "text":  # which costs by the word
            yield Cell(name, partial(_count, name))


BENCH = Bench("complexity", "Parameters, MACs, FLOPs and memory of the networks of the course.", _cells)
