"""Training in fewer bits: steps a second, memory, and what the accuracy says to it (2.2.2)."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import mean, median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from companion import datasets, metrics, models, train
from companion.bench.runner import Bench, Cell
from companion.bench.values import speed_up
from companion.metrics.results import Row, Value, summarize
from companion.units import MIB

_Variants = dict[str, tuple[str, torch.memory_format]]

NETWORKS = {"cifar_resnet20": 128, "cifar_resnet18": 32, "cifar_resnet50": 16}
"""Those trained on a CPU, and how many images a step has."""
GPU_NETWORKS = {"cifar_resnet50": 128, "resnet50": 64}
DEFAULT, BASELINE = "fp32, default layout", "fp32, channels last"
VARIANTS: _Variants = {
    DEFAULT: ("fp32", torch.contiguous_format),
    BASELINE: ("fp32", torch.channels_last),
    "bf16, channels last": ("bf16", torch.channels_last),
}
GPU_VARIANTS: _Variants = {
    f"{name}, channels last": (name, torch.channels_last) for name in ("fp32", "tf32", "bf16", "fp16")
}
SECONDS = 60.0  # a comparison: all variants of one network, in turn
ROUNDS = 12
SEEDS = (0, 1, 2)
EPOCHS = 10
ISA = "ONEDNN_MAX_CPU_ISA"
"""What oneDNN, whose kernels torch uses on x86, reads when it starts: the newest instructions that it may use."""


def _step(
    name: str, batch: int, precision: str, layout: torch.memory_format, device: torch.device
) -> Callable[[], Any]:
    """A training step as `companion.train.fit` takes it, at a learning rate of 0: each does the same work."""
    policy = train.Precision.named(precision, device)
    model = models.create(name, seed=0).train().to(device=device, memory_format=layout)  # type: ignore[call-overload]
    size = models.image_size(name)
    assert size is not None
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    images, labels = images.to(device=device, memory_format=layout), (torch.arange(batch) % 10).to(device)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.0), policy.scaler()

    def step() -> None:
        with policy.arithmetic():
            with policy.autocast():
                loss = cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return step


def _compare(name: str, batch: int, variants: _Variants, device: str = "cpu", where: str = "CPU") -> list[Row]:
    place = torch.device(device)
    steps = {variant: _step(name, batch, *how, place) for variant, how in variants.items()}
    found = metrics.compare_latency(steps, baseline=BASELINE, rounds=ROUNDS, seconds=SECONDS, device=device)
    rows = []
    for variant, latency in found.latencies.items():
        values: dict[str, Value] = {
            "step": summarize([1e3 * sample for sample in latency.samples], "ms"),
            **speed_up(found.ratios.get(variant)),
        }
        if DEFAULT in variants:  # sample by sample: those at one place are of one round
            pairs = zip(found.latencies[DEFAULT].samples, latency.samples, strict=True)
            values["over default layout"] = round(median(slow / fast for slow, fast in pairs), 3)
        if place.type == "cuda":
            values["MiB of a step"] = round(metrics.measure_memory(steps[variant], device=device).allocated / MIB)
        rows.append(Row({"where": where, "network": name, "batch": batch, "variant": variant}, values))
    return rows


def _on_cpu(name: str, instructions: bool = True) -> list[Row]:
    """With ``instructions`` off, in a process that is told to leave those for bfloat16 alone, as older CPUs must."""
    if instructions:
        return _compare(name, NETWORKS[name], VARIANTS)
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return []
    before = os.environ.get(ISA)
    os.environ[ISA] = "AVX512_CORE"
    try:
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            where = "CPU, its bf16 instructions off"
            return pool.submit(_compare, name, NETWORKS[name], VARIANTS, where=where).result()
    finally:
        if before is None:
            del os.environ[ISA]
        else:
            os.environ[ISA] = before


def _on_gpu(name: str) -> list[Row]:
    if not torch.cuda.is_available():
        return []
    return _compare(name, GPU_NETWORKS[name], GPU_VARIANTS, "cuda", torch.cuda.get_device_name())


def _data(split: str) -> Any:
    return datasets.load("hard_digits", split=split)


def _accuracy(precision: str) -> list[Row]:
    """cifar_resnet20 on hard_digits from three seeds; nothing is chosen, the last epoch counts."""
    learn, test = _data("train"), _data("test")
    scores = []
    for seed in SEEDS:
        model = models.create("cifar_resnet20", labels=learn.labels, seed=seed)
        train.fit(
            model,
            learn,
            epochs=EPOCHS,
            batch_size=128,
            lr=5e-3,
            validation=0,
            seed=seed,
            precision=precision,
            device="cpu",
            progress=False,
        )
        scores.append(100 * train.evaluate(model, test, precision=precision, device="cpu", progress=False).main)
    values: dict[str, Value] = {
        "accuracy in %": round(mean(scores), 2),
        "lowest": round(min(scores), 2),
        "highest": round(max(scores), 2),
    }
    variant = f"{precision}, {EPOCHS} epochs of hard_digits"
    return [Row({"where": "CPU", "network": "cifar_resnet20", "batch": 128, "variant": variant}, values)]


def _cells() -> Iterator[Cell]:
    torch.set_num_threads(1)
    for name in NETWORKS:
        yield Cell(f"{name}, CPU", partial(_on_cpu, name))
    yield Cell("cifar_resnet20, without instructions", partial(_on_cpu, "cifar_resnet20", instructions=False))
    for name in GPU_NETWORKS:
        yield Cell(f"{name}, GPU", partial(_on_gpu, name))
    for precision in ("fp32", "bf16"):
        yield Cell(f"accuracy, {precision}", partial(_accuracy, precision))


BENCH = Bench(
    "precision",
    "A training step by number format and memory layout; speed-up over fp32, channels last, with its 95 % interval.",
    _cells,
    settings={"threads": 1, "seeds": SEEDS, "epochs": EPOCHS, "rounds": ROUNDS, "seconds": SECONDS},
)
