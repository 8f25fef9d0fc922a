"""What compression costs and brings on CIFAR-10: the reference run of 2.1.2.

Accuracy is that of ``cifar_resnet20``, trained again after each method for the same few epochs, over three seeds. Speed
is that of a batch on one thread against the uncompressed network in the same runtime, also on the wider
``cifar_resnet18``, which is not trained for it. The case study is ``cifar_resnet18`` at half its width.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from companion import compress, datasets, engines, metrics, models, train
from companion.bench.runner import Bench, Cell
from companion.datasets.arrays import ArrayImages
from companion.errors import CompanionError
from companion.metrics.results import Row, Scalar, Value

SEEDS = (0, 1, 2)
EPOCHS = 5
FIT: dict[str, Any] = {
    "batch_size": 128,
    "lr": 2e-3,
    "weight_decay": 5e-2,
    "precision": "fp32" if train.Precision.named("bf16").advice else "bf16",  # ten times slower where it cannot pay
    "validation": 0,  # nothing is chosen: the last epoch counts
    "progress": False,
}
MACS = 0.5
ZEROS = 0.8
LABELLED = 0.1  # of the training images, in the rows about distillation
RUNTIMES = ("torch_fused", "onnxruntime")
BATCH = 32  # of the latencies
SECONDS = 10.0  # a comparison of two networks in one runtime
CASE_STUDY = "prune=0.45,distill={teacher},quantize=int8"


# The networks to compress


def base_weights(seed: int) -> str:
    """Name among the shipped weights."""
    return f"cifar_resnet20_cifar10_seed{seed}"


WIDE = "cifar_resnet18_half_cifar10"


@cache
def _data(split: str) -> ArrayImages:
    return datasets.in_memory(datasets.load("cifar10", split=split))


# The methods


@dataclass(frozen=True)
class _Method:
    """One row of the table below."""

    make: Callable[[nn.Module, int], nn.Module]
    """(trained network, seed) → the compressed one."""
    trains: bool = True
    int8: bool = False
    """What counts is the quantized ONNX file."""
    plain: bool = True
    """The result has plain layers, so that there is a file and a speed; what was only rounded runs as before."""


def _tuned(model: nn.Module, seed: int, epochs: int = EPOCHS) -> nn.Module:
    if epochs:
        train.fit(model, _data("train"), epochs=epochs, seed=seed, **FIT)
    return model


def _unchanged(model: nn.Module, seed: int) -> nn.Module:
    return compress.make_permanent(model)  # a copy


def _more_epochs(model: nn.Module, seed: int, epochs: int = EPOCHS) -> nn.Module:
    return _tuned(_unchanged(model, seed), seed, epochs)


def _channels(model: nn.Module, seed: int, epochs: int = EPOCHS, importance: str = "l2") -> nn.Module:
    data = list(zip(*(each.split(64) for each in _sample(seed)), strict=True)) if importance == "taylor" else None
    example = engines.example_for(model)
    pruned = compress.prune_channels(model, example, macs=MACS, round_to=8, importance=importance, data=data)
    return _tuned(pruned, seed, epochs)


def _sample(seed: int) -> tuple[Tensor, Tensor]:
    """512 training images [N, C, H, W] of all classes, for criteria that look at gradients, and their labels [N]."""
    chosen = torch.randperm(len(_data("train")), generator=torch.Generator().manual_seed(seed))[:512].tolist()
    images, labels = zip(*(_data("train")[i] for i in chosen), strict=True)
    return torch.stack(images), torch.tensor(labels)


def _low_rank(model: nn.Module, seed: int, epochs: int = EPOCHS) -> nn.Module:
    return _tuned(compress.factorize(model, engines.example_for(model), macs=MACS, scheme="spatial"), seed, epochs)


def _zeros(model: nn.Module, seed: int, epochs: int = EPOCHS) -> nn.Module:
    if not epochs:
        return compress.make_permanent(compress.prune_weights(model, ZEROS))
    options = {key: value for key, value in FIT.items() if key != "validation"}
    return compress.make_permanent(
        compress.prune_gradually(model, _data("train"), ZEROS, epochs=epochs, seed=seed, **options)
    )


def _torch_pruning(importance: str, model: nn.Module, seed: int) -> nn.Module:
    """Of each layer the same share of its channels removed by Torch-Pruning, as near to the MACs as there is one."""
    import torch_pruning  # type: ignore[import-untyped]

    example = engines.example_for(model)
    wanted = MACS * metrics.count_macs(model, example)
    images, labels = _sample(seed)

    def pruned(share: float) -> nn.Module:
        smaller = _unchanged(model, seed).eval()
        cross_entropy(smaller(images), labels).backward()  # for the criterion that looks at gradients
        pruner = torch_pruning.pruner.BasePruner(
            smaller,
            example,
            importance=getattr(torch_pruning.importance, importance)(),
            pruning_ratio=share,
            ignored_layers=[smaller.fc],
        )
        pruner.step()
        smaller.zero_grad(set_to_none=True)
        return smaller

    def away(share: float) -> float:
        return metrics.count_macs(pruned(share), example) - wanted

    too_little, enough = 0.0, 0.9
    for _ in range(8):
        share = (too_little + enough) / 2
        if away(share) <= 0:
            enough = share
        else:
            too_little = share
    return _tuned(pruned(min(too_little, enough, key=lambda share: abs(away(share)))), seed)


def _rounded(weight_bits: int, activation_bits: int, model: nn.Module, seed: int, then: str = "nothing") -> nn.Module:
    """Weights and activations of few bits, those of the first and the last layer of 8."""
    prepared = compress.prepare_qat(model, weight_bits=weight_bits, activation_bits=activation_bits)
    batches = [torch.from_numpy(batch) for batch in compress.calibration_batches(_data("train"), seed=seed)]
    compress.calibrate(prepared, batches)
    if then == "statistics":
        prepared.train()
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
    elif then == "training":
        train.fit(prepared, _data("train"), epochs=EPOCHS, seed=seed, **FIT | {"lr": 1e-3})
    return prepared


METHODS = {
    "none": _Method(_unchanged, trains=False),
    "none, trained as long": _Method(_more_epochs, plain=False),
    "channels": _Method(_channels),
    "channels, Taylor": _Method(partial(_channels, importance="taylor")),
    "channels, Torch-Pruning, L2": _Method(partial(_torch_pruning, "GroupMagnitudeImportance")),
    "channels, Torch-Pruning, Taylor": _Method(partial(_torch_pruning, "GroupTaylorImportance")),
    "channels, Torch-Pruning, BN scale": _Method(partial(_torch_pruning, "BNScaleImportance")),
    "80 % zeros": _Method(_zeros),
    "low rank, spatial": _Method(_low_rank),
    "int8": _Method(_unchanged, trains=False, int8=True),
    **{
        f"{weights}-bit weights, {activations}-bit activations{what}": _Method(
            partial(_rounded, weights, activations, then=then), trains=then == "training", plain=False
        )
        for weights, activations in ((2, 4), (4, 4))
        for what, then in (("", "nothing"), (", statistics renewed", "statistics"), (", trained", "training"))
    },
}


# What is measured


def _result(method: str, seed: int, folder: str) -> float:
    """Compress, train and judge with one seed, in a process of its own; leaves its file in ``folder``; the accuracy."""
    torch.set_num_threads(1)
    base = models.pretrained(base_weights(seed))
    chosen = METHODS[method]
    model = chosen.make(base.to(memory_format=torch.channels_last), seed)
    if chosen.plain:
        path = Path(folder) / f"{seed}.safetensors"
        models.save(model, path)
    if chosen.int8:
        with engines.load(_quantized(model, folder, seed), "onnxruntime", threads=1) as engine:
            return train.evaluate(engines.as_module(engine), _data("test"), progress=False).main
    return train.evaluate(model, _data("test"), progress=False).main


def _quantized(model: nn.Module, folder: str, seed: int) -> Path:
    """Its int8 file, beside those of the other seeds, which are written at the same time."""
    plain, out = Path(folder) / f"{seed}.onnx", Path(folder) / f"{seed}.int8.onnx"
    engines.export_onnx(model, engines.example_for(model), plain)
    compress.quantize_onnx(plain, out, compress.calibration_batches(_data("train")))
    return out


def _percent(scores: list[float]) -> dict[str, Value]:
    """Accuracy over the seeds."""
    found = [100 * score for score in scores]
    return {"accuracy in %": round(mean(found), 2), "lowest": round(min(found), 2), "highest": round(max(found), 2)}


def _by_seed(function: Callable[[int], float]) -> list[float]:
    """One process for each seed, on one thread, all at once: fewer cores share them, and none is idle in the end."""
    with ProcessPoolExecutor(len(SEEDS), mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, SEEDS))


def _cost(network: nn.Module, before: nn.Module, quantized: Path | None = None) -> dict[str, Value]:
    """MACs, bytes of the ONNX file and speed of ``network`` (or of the file made from it) against ``before``."""
    example = engines.example_for(before)
    macs, all_macs = (metrics.count_macs(each, example) for each in (network, before))
    images = example.expand(BATCH, -1, -1, -1).numpy()
    values: dict[str, Value] = {"MACs in %": round(100 * macs / all_macs, 1)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for model, path in zip((before, network), files, strict=True):
            engines.export_onnx(model, example, path)
        files[1] = quantized or files[1]
        values["times smaller"] = round(files[0].stat().st_size / files[1].stat().st_size, 2)
        sources: dict[str, Sequence[Any]] = {"torch_fused": [before, network], "onnxruntime": files}
        for runtime in RUNTIMES[quantized is not None :]:
            old, new = (engines.load(source, runtime, threads=1) for source in sources[runtime])
            with old, new:
                found = metrics.compare_latency(
                    {
                        name: partial(engine.run, {engine.inputs[0].name: images})
                        for name, engine in (("old", old), ("new", new))
                    },
                    seconds=SECONDS,
                )
            ratio = found.ratios["new"]
            values[f"{runtime} speed-up"] = round(ratio.speedup, 3)
            values[f"{runtime} 95 %"] = f"{1 / ratio.high:.2f} to {1 / ratio.low:.2f}"
    return values


def _accuracy_and_cost(method: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        scores = _by_seed(partial(_result, method, folder=folder))
        values = _percent(scores)
        if METHODS[method].plain and method != "none":
            path = Path(folder) / f"{SEEDS[0]}.int8.onnx"
            before = models.pretrained(base_weights(SEEDS[0]))
            after = models.load(Path(folder) / f"{SEEDS[0]}.safetensors")
            values |= _cost(after, before, path if METHODS[method].int8 else None)
    return [Row({"network": "cifar_resnet20", "method": method}, values)]


FAST = ("channels", "low rank, spatial", "80 % zeros", "int8")
"""The methods whose speed is measured on the wider network, too."""


def _wide_cost(method: str) -> list[Row]:
    before = models.create("cifar_resnet18", seed=0).eval()
    chosen = METHODS[method]
    after = chosen.make(before, 0, **({"epochs": 0} if chosen.trains else {}))
    with tempfile.TemporaryDirectory() as folder:
        values = _cost(after, before, _quantized(after, folder, 0) if chosen.int8 else None)
    return [Row({"network": "cifar_resnet18", "method": method}, values)]


def _taught(how: str, seed: int) -> float:
    """A student with a tenth of the labels, in as many steps with a teacher as without one."""
    torch.set_num_threads(1)
    few = compress.few_labels(_data("train"), LABELLED, seed=seed)
    student = models.create("cifar_resnet14", labels=_data("train").labels, seed=seed)
    options = FIT | {"lr": 5e-3, "seed": seed}
    if how == "alone":
        train.fit(student, few.labelled, epochs=round(EPOCHS / LABELLED), **options)
    else:
        teacher = models.pretrained(base_weights(seed))
        student = compress.distill(student, teacher, few, epochs=EPOCHS, **options)
    return train.evaluate(student, _data("test"), progress=False).main


def _distillation(how: str) -> list[Row]:
    keys: dict[str, Scalar] = {"network": "cifar_resnet14", "method": f"{LABELLED:.0%} of the labels, {how}"}
    return [Row(keys, _percent(_by_seed(partial(_taught, how))))]


def _sparse_product(share: float) -> list[Row]:
    """A linear layer of 1024 by 1024 with zeros, and what it takes as a sparse matrix (CSR)."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 1024).eval()
    zeros = compress.make_permanent(compress.prune_weights(linear, share))
    assert isinstance(zeros, nn.Linear)
    x = torch.rand(64, 1024)
    networks: dict[str, nn.Module] = {"dense": linear, "zeros": zeros, "CSR": compress.to_csr(zeros)}
    with torch.inference_mode():
        found = metrics.compare_latency({name: partial(each, x) for name, each in networks.items()}, seconds=SECONDS)
    return [
        Row(
            {"network": "linear 1024, batch 64", "method": f"{share:.0%} zeros, {how}"},
            {
                "torch_fused speed-up": round(found.ratios[name].speedup, 3),
                "torch_fused 95 %": f"{1 / found.ratios[name].high:.2f} to {1 / found.ratios[name].low:.2f}",
            },
        )
        for name, how in (("zeros", "dense"), ("CSR", "CSR"))
    ]


def _case_study() -> list[Row]:
    torch.set_num_threads(len(SEEDS) - 1)
    network = models.pretrained(WIDE).to(memory_format=torch.channels_last)
    steps = CASE_STUDY.format(teacher=datasets.shipped(f"weights/{WIDE}.safetensors"))
    found = compress.apply_steps(
        network, steps, _data("train"), _data("test"), epochs=EPOCHS, seconds=3 * SECONDS, **FIT
    )
    start = found.stages[0]
    rows = []
    for stage in found.stages:
        values: dict[str, Value] = {
            "accuracy in %": round(100 * stage.score, 2),
            "MACs in %": round(100 * stage.macs / start.macs, 1),
            "times smaller": round(start.bytes / stage.bytes, 2),
        }
        if stage.latency is not None:
            values["onnxruntime speed-up"] = round(stage.latency.speedup, 3)
            values["onnxruntime 95 %"] = f"{1 / stage.latency.high:.2f} to {1 / stage.latency.low:.2f}"
        name = stage.step.partition("=")[0] if stage.step.startswith("distill") else stage.step
        rows.append(Row({"network": "cifar_resnet18, half as wide", "method": name}, values))
    return rows


def _cells() -> Iterator[Cell]:
    torch.set_num_threads(1)
    for name in (*map(base_weights, SEEDS), WIDE):  # now rather than after an hour
        try:
            models.pretrained(name)
        except CompanionError as error:
            raise CompanionError(
                f"the bench needs {name}, which is not shipped: `python tools/train_weights.py {name}` makes it."
            ) from error
    for method in FAST:
        yield Cell(f"cifar_resnet18, {method}", partial(_wide_cost, method))
    for share in (0.5, 0.8, 0.9, 0.95, 0.99):
        yield Cell(f"linear, {share:.0%} zeros", partial(_sparse_product, share))
    for method in METHODS:
        yield Cell(f"cifar_resnet20, {method}", partial(_accuracy_and_cost, method))
    for how in ("alone", "with a teacher"):
        yield Cell(f"distillation, {how}", partial(_distillation, how))
    yield Cell("case study", _case_study)


BENCH = Bench(
    "compression",
    "Compression on CIFAR-10: accuracy over three seeds, bytes, and speed against the same runtime without it.",
    _cells,
    settings={
        "seeds": SEEDS,
        "epochs": EPOCHS,
        "precision": FIT["precision"],
        "threads": 1,
        "batch": BATCH,
        "seconds": SECONDS,
    },
    packages=("torch", "onnxruntime", "torch-pruning"),
)
