"""How well the roofline foretells the time of a layer (2.4.1)."""

from collections.abc import Iterator
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from companion import metrics
from companion.bench.runner import Bench, Cell
from companion.metrics.results import Row, Value

ROUNDS = 15
SLOW = 100e-6  # seconds: what takes less is overhead

NETWORKS = {
    "resnet18": partial(torchvision.models.resnet18, weights=None),
    "mobilenet_v2": partial(torchvision.models.mobilenet_v2, weights=None),
    "encoder layer, width 256": partial(nn.TransformerEncoderLayer, 256, 4, 1024, batch_first=True),
}


def _example(name: str, batch: int, layout: str) -> Tensor:
    if "encoder" in name:
        return torch.randn(4 * batch, 64, 256)
    image = torch.randn(batch, 3, 224, 224)
    return image.to(memory_format=torch.channels_last) if layout == "channels last" else image


def _place(name: str, batch: int, layout: str) -> list[Row]:
    model = NETWORKS[name]()
    if layout == "channels last":
        model = model.to(memory_format=torch.channels_last)
    found = metrics.measure_roofline(model, _example(name, batch, layout), rounds=ROUNDS, threads=1)
    layers = [layer for layer in found.layers if layer.measured > SLOW and layer.kind.endswith(("Conv2d", "Linear"))]
    ratios = sorted(layer.ratio for layer in layers)
    values: dict[str, Value] = {"layers over 100 µs": len(ratios)}
    if ratios:
        values["within a factor of 2"] = round(sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios), 3)
        values["median of measured / predicted"] = round(ratios[len(ratios) // 2], 2)
        values["largest"] = round(ratios[-1], 1)
    values["GFLOPS"] = round(found.roof.flops_per_second / 1e9, 1)
    values["GB/s"] = round(found.roof.bytes_per_second / 1e9, 1)
    return [Row({"network": name, "batch": batch, "layout": layout}, values)]


def _cells() -> Iterator[Cell]:
    torch.manual_seed(0)
    for name in NETWORKS:
        for batch in (1, 4):
            for layout in ("contiguous",) if "encoder" in name else ("contiguous", "channels last"):
                yield Cell(f"{name}, batch {batch}, {layout}", partial(_place, name, batch, layout))


BENCH = Bench(
    "roofline",
    "Layers whose time the roofline predicts within a factor of 2, and the two ceilings of the machine.",
    _cells,
    settings={"threads": 1, "rounds": ROUNDS},
)
