"""Train the networks of data/weights and note their checksums in data/manifest.json.

python tools/train_weights.py NAME ...    those of WEIGHTS; stopped, the same command goes on from build/NAME.checkpoint

CIFAR-10 must be there (`companion data list`); an epoch of cifar_resnet20 on it takes about two minutes of one core.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from companion import datasets, engines, files, models, train

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


@dataclass(frozen=True)
class Recipe:
    """How a network came about."""

    model: str
    data: str
    seed: int
    configuration: dict[str, Any]
    fit: dict[str, Any]
    layout: torch.memory_format = torch.contiguous_format
    load: dict[str, Any] = field(default_factory=dict)
    onnx: bool = False
    """Exported, too."""


# All training images, and the weights of the last epoch: nothing is chosen by how well it does.
CIFAR = {"batch_size": 128, "lr": 5e-3, "weight_decay": 5e-2, "precision": "bf16", "validation": 0}
WEIGHTS = {
    # As `companion train cifar_resnet14 --data hard_digits --epochs 10 --threads 1`.
    "cifar_resnet14_hard_digits": Recipe("cifar_resnet14", "hard_digits", 0, {}, {"epochs": 10}),
    **{
        f"cifar_resnet20_cifar10_seed{seed}": Recipe(
            "cifar_resnet20", "cifar10", seed, {}, {"epochs": 40} | CIFAR, torch.channels_last
        )
        for seed in range(3)
    },
    "cifar_resnet18_half_cifar10": Recipe(
        "cifar_resnet18", "cifar10", 0, {"width": 32}, {"epochs": 20} | CIFAR, torch.channels_last
    ),
    # As `companion train yolov5_tiny --data digit_scenes --threads 1`, in six CPU-minutes, and `companion export`.
    "yolov5_tiny_digit_scenes": Recipe(
        "yolov5_tiny",
        "digit_scenes",
        0,
        {},
        {"epochs": 25},
        load={"task": "detect"},
        onnx=True,
    ),
}


def make(name: str) -> None:
    """Train one and write it, with its checksum."""
    recipe = WEIGHTS[name]
    torch.set_num_threads(1)  # so that the result does not depend on how many cores there are
    data, test = (datasets.load(recipe.data, split=split, **recipe.load) for split in ("train", "test"))
    if data.task == "classify":
        data, test = map(datasets.in_memory, (data, test))
    model = models.create(recipe.model, labels=data.labels, seed=recipe.seed, **recipe.configuration)
    model = model.to(memory_format=recipe.layout)
    path = DATA / "weights" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    checkpoint = ROOT / "build" / f"{name}.checkpoint"
    checkpoint.parent.mkdir(exist_ok=True)
    train.fit(model, data, seed=recipe.seed, checkpoint=checkpoint, resume=True, **recipe.fit)
    models.save(model, path)
    checkpoint.unlink()
    made = [path]
    if recipe.onnx:
        made.append(engines.export_onnx(model, engines.example_for(model), path.with_suffix(".onnx")).path)
    manifest = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))
    entries = {f"weights/{each.name}": {"sha256": files.sha256(each), "bytes": each.stat().st_size} for each in made}
    manifest["shipped"] = dict(sorted((manifest["shipped"] | entries).items()))
    with files.replacing(DATA / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    found = (f"{score} {value:.2%}" for score, value in train.evaluate(model, test).metrics.items())
    print(f"{name}: {', '.join(found)} on the test split")


if __name__ == "__main__":
    names = sys.argv[1:]
    if not names or set(names) - WEIGHTS.keys():
        sys.exit(f"name some of {', '.join(WEIGHTS)}")
    for each in names:
        make(each)
