"""Methods one after another, with what each gained and cost; and the search for the steps that meet a target (2.1.2).

Every stage is an ONNX file that ONNX Runtime runs: its accuracy is that file's, its bytes are the file's, and the
latencies of all of them are measured in turn at the end. So an int8 file and a network that was only pruned are
compared as they would be deployed, and none with a baseline in a slower runtime.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from companion import engines, metrics, models, train
from companion.compress.channels import prune_channels
from companion.compress.distill import distill, task_to_teach
from companion.compress.int8 import quantize_onnx
from companion.compress.low_rank import factorize
from companion.compress.masks import make_permanent, prune_weights
from companion.compress.quantization import check_network
from companion.errors import CompanionError
from companion.files import check_writable, replacing
from companion.metrics.latency import Ratio
from companion.train.evaluation import check_match
from companion.train.tasks import attribute
from companion.units import format_table

ROUND = 8
"""Pruned widths are multiples of it, or of half of it, where they come `NEAR` the target: ONNX Runtime computes 8 or 16
channels at once. At half the MACs a cifar_resnet20 takes 0.75 of the time with such widths, 0.88 with any. Multiples of
16 would take 0.55, but leave a narrow network too little choice: cifar_resnet14 at half the MACs, trained for an epoch,
kept 84 % of the hard digits instead of 98."""
NEAR = 0.1
"""So much less may be left, of the MACs that were asked for."""
CALIBRATION = 16
"""Batches of training images from which the ranges of int8 activations are taken."""


@dataclass(frozen=True)
class Stage:
    """What a step led to, as a file that ONNX Runtime runs."""

    step: str
    """``start``, or the step as it was given: ``prune=0.5``."""
    score: float
    """The task's main score in 0..1 (accuracy, mean IoU) on the test data."""
    untrained: float | None
    """The same right after the step, before it was trained again; None where nothing is trained or there is none."""
    macs: int
    """For one sample. Quantisation and zeros leave them as they are."""
    bytes: int
    """Of the ONNX file."""
    latency: Ratio | None
    """Time of a batch over that of the start; None for the start itself."""


@dataclass(frozen=True)
class Compressed:
    """A compressed network, and how it became that; ``print`` shows the stages as a table."""

    model: nn.Module
    """After all steps but the quantisation, which only the file has."""
    stages: tuple[Stage, ...]
    """The start and every step, in order."""
    score: str
    """Name of the score: ``accuracy``, ``mean_iou``."""

    def __str__(self) -> str:
        return table(self.stages, self.score)

    def to_json(self) -> dict[str, Any]:
        """The score's name and the stages, in plain values; latencies are ratios with their interval."""
        return {"score": self.score, "stages": [asdict(stage) for stage in self.stages]}


def table(stages: Sequence[Stage], score: str) -> str:
    """Stages as aligned text, each against the first."""
    first = stages[0]
    rows = [("step", score, "before training", "MACs", "bytes", "time of a batch")]
    for stage in stages:
        before = "" if stage.untrained is None else f"{stage.untrained:.2%}"
        time = "1" if stage.latency is None else str(stage.latency)
        rows.append(
            (
                stage.step,
                f"{stage.score:.2%}",
                before,
                f"{stage.macs / first.macs:.0%}",
                f"{stage.bytes:,} ({stage.bytes / first.bytes:.0%})",
                time,
            )
        )
    return format_table(rows)


@dataclass(frozen=True)
class Step:
    """One step: the name of a method of `METHODS`, and its setting."""

    name: str
    setting: float | Path | str

    def __str__(self) -> str:
        value = f"{self.setting:g}" if isinstance(self.setting, float) else str(self.setting)
        return f"{self.name}={value}"


def parse_steps(text: str) -> tuple[Step, ...]:
    """Steps from text such as ``prune=0.5,distill=teacher.safetensors,quantize=int8``.

    Raises:
        CompanionError: no such step, a setting that it does not take, or an order that cannot be.
    """
    steps = []
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        _check_name(name)
        steps.append(Step(name, METHODS[name].read(name, value)))
    check_order(steps)
    return tuple(steps)


def check_order(steps: Sequence[Step]) -> None:
    """Refuse an order that cannot be.

    Raises:
        CompanionError: there is no step, one is none or has a setting that it does not take, one follows quantisation,
            or weights are removed after some became zeros.
    """
    for step in steps:
        if not isinstance(step, Step):
            raise CompanionError(f"{step!r} is no step: give text such as prune=0.5,quantize=int8, or a list of Step.")
        _check_name(step.name)
        METHODS[step.name].read(step.name, str(step.setting))
    if not steps:
        raise CompanionError("there is no step: give one or more, such as prune=0.5,quantize=int8.")
    names = [step.name for step in steps]
    if "quantize" in names[:-1]:
        raise CompanionError(
            "quantize must be the last step: what comes out of it is a file that is no longer trained."
        )
    if "sparsify" in names and set(names[names.index("sparsify") + 1 :]) & {"prune", "low_rank"}:
        raise CompanionError("prune and low_rank must come before sparsify: they would undo its zeros.")


def _check_name(name: str) -> None:
    if name not in METHODS:
        raise CompanionError(f"there is no step {name!r}: choose of {', '.join(METHODS)}, such as prune=0.5.")


def _share(name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise CompanionError(f"{name} takes a share between 0 and 1, such as {name}=0.5, not {value!r}.")
    return share


def _weights_file(name: str, value: str) -> Path:
    if not value.endswith(".safetensors"):
        raise CompanionError(
            f"{name} takes the weights file of a teacher, such as {name}=T.safetensors, not {value!r}."
        )
    return Path(value)


def _format(name: str, value: str) -> str:
    if value != "int8":
        raise CompanionError(f"{name} takes int8, not {value!r}.")
    return value


@dataclass(frozen=True)
class _Job:
    """What the steps work with."""

    train_data: Any
    example: Tensor
    options: Mapping[str, Any]
    """Of `train.fit`, for every step that trains."""
    teachers: Mapping[Any, nn.Module]
    """By the setting of their step."""


def _prune(model: nn.Module, share: Any, job: _Job) -> nn.Module:
    wanted = (1 - NEAR) * share * metrics.count_macs(model, job.example)
    for multiple in (ROUND, ROUND // 2):
        with suppress(CompanionError):
            pruned = prune_channels(model, job.example, macs=share, round_to=multiple)
            if metrics.count_macs(pruned, job.example) >= wanted:
                return pruned
    return prune_channels(model, job.example, macs=share, round_to=1)  # or says what is wrong


def _low_rank(model: nn.Module, share: Any, job: _Job) -> nn.Module:
    return factorize(model, job.example, macs=share)


def _sparsify(model: nn.Module, share: Any, job: _Job) -> nn.Module:
    return prune_weights(model, share)


def _fine_tune(model: nn.Module, setting: Any, job: _Job) -> nn.Module:
    train.fit(model, job.train_data, **job.options)
    return model


def _distill(model: nn.Module, path: Any, job: _Job) -> nn.Module:
    return distill(model, job.teachers[path], job.train_data, **job.options)


@dataclass(frozen=True)
class _Method:
    """One row of the table below."""

    read: Callable[[str, str], float | Path | str]
    """Its setting from text."""
    change: Callable[[nn.Module, Any, _Job], nn.Module] | None = None
    """The smaller network; None if it stays."""
    fit: Callable[[nn.Module, Any, _Job], nn.Module] | None = None
    """Trains it again."""


METHODS = {
    "prune": _Method(_share, _prune, _fine_tune),
    "low_rank": _Method(_share, _low_rank, _fine_tune),
    "sparsify": _Method(_share, _sparsify, _fine_tune),
    "distill": _Method(_weights_file, None, _distill),
    "quantize": _Method(_format),
}
"""Steps by name: ``prune`` and ``low_rank`` leave that share of the MACs they find, ``sparsify`` makes that share of
the weights zero, ``distill`` trains with a teacher, ``quantize`` writes int8."""


def apply_steps(
    model: nn.Module,
    steps: str | Sequence[Step],
    train_data: Any,
    test_data: Any,
    *,
    onnx: str | os.PathLike[str] | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    timed_batch: int = 32,
    seconds: float = 4.0,
    seed: int = 0,
    on_stage: Callable[[Stage], None] | None = None,
    **options: Any,
) -> Compressed:
    """Take the steps in the order given, training after each that removes something.

    Args:
        model: a trained network of ours; stays as it is.
        steps: such as ``prune=0.5,low_rank=0.7,sparsify=0.8,distill=teacher.safetensors,quantize=int8``. See `METHODS`.
        train_data: what it is trained again on, and what the ranges of int8 are taken from.
        test_data: what every stage is judged by.
        onnx: the file to write the last stage to; none if not given.
        epochs, lr: of each training.
        timed_batch: samples in the batch that is timed,
        seconds: for so long, all stages together, on one thread.
        seed: of all that is drawn.
        on_stage: is given each stage when it is done, its latency not yet measured.
        options: more of `train.fit`'s, such as ``batch_size`` and ``precision``; ``validation`` is 0 unless given: the
            last epoch counts.

    Raises:
        CompanionError: a step that there is not or that cannot be done, data that does not fit, as `train.fit`.
    """
    chosen = parse_steps(steps) if isinstance(steps, str) else tuple(steps) if isinstance(steps, Iterable) else (steps,)
    check_order(chosen)
    check_network(model)
    example = engines.example_for(model)
    # Before hours of training, not after.
    teachers = {step.setting: models.load(str(step.setting)) for step in chosen if step.name == "distill"}
    if teachers:
        task_to_teach(train_data)
    for each in (model, *teachers.values()):
        check_match(each, train_data)
    fitting = {"epochs": epochs, "lr": lr, "seed": seed, "validation": 0} | options
    job = _Job(train_data, example, fitting, teachers)
    judging = {key: options[key] for key in ("device", "num_workers", "progress") if key in options}
    if onnx is not None:
        check_writable(onnx)
    with tempfile.TemporaryDirectory(prefix="companion-") as folder, ExitStack() as stack:
        running: dict[str, engines.Engine] = {}
        stages: list[Stage] = []
        score = ""

        def finish(step: str, network: nn.Module, path: Path, untrained: float | None) -> None:
            nonlocal score
            engine = stack.enter_context(engines.load(path, "onnxruntime", threads=1))
            running[f"{len(stages)} {step}"] = engine
            scores = train.evaluate(engines.as_module(engine), test_data, **judging | {"device": "cpu"})
            score = next(iter(scores.metrics))
            macs = metrics.count_macs(network, example)
            stages.append(Stage(step, scores.main, untrained, macs, path.stat().st_size, None))
            if on_stage is not None:
                on_stage(stages[-1])

        network, path = model, Path(folder) / "0.onnx"
        engines.export_onnx(network, example, path)
        finish("start", network, path, None)
        for i, step in enumerate(chosen, 1):
            method, before, path = METHODS[step.name], path, Path(folder) / f"{i}.onnx"
            untrained = None
            if step.name == "quantize":
                kept = ("head",) if attribute(train_data, "task") == "detect" else ()
                quantize_onnx(before, path, calibration_batches(train_data, seed=seed), exclude=kept)
            else:
                if method.change is not None:
                    network = method.change(network, step.setting, job)
                    untrained = train.evaluate(network, test_data, **judging).main
                if method.fit is not None:
                    network = method.fit(network, step.setting, job)
                engines.export_onnx(make_permanent(network), example, path)
            finish(str(step), network, path, untrained)
        inputs = next(calibration_batches(test_data, batches=1, batch_size=timed_batch, seed=seed))
        compared = metrics.compare_latency(
            {name: partial(engine.run, {engine.inputs[0].name: inputs}) for name, engine in running.items()},
            seconds=seconds,
            threads=1,
            seed=seed,
        )
        timed = [replace(stage, latency=compared.ratios.get(name)) for name, stage in zip(running, stages, strict=True)]
        if onnx is not None:
            with replacing(onnx) as file:
                file.write(path.read_bytes())
    return Compressed(make_permanent(network), tuple(timed), score)


def calibration_batches(
    data: Any, *, batches: int = CALIBRATION, batch_size: int = 32, seed: int = 0
) -> Iterator[np.ndarray]:
    """Inputs drawn from a data set without their targets: arrays [batch_size, …], fewer if the data set is smaller,
    texts padded to the longest of a batch.

    Raises:
        CompanionError: the data set is empty.
    """
    if len(data) == 0:
        raise CompanionError("there is nothing to calibrate with: the data set is empty.")
    order = np.random.default_rng(seed).permutation(len(data))[: batches * batch_size]
    collate = train.task_of(data).collate
    for start in range(0, len(order), batch_size):
        yield collate([data[int(i)] for i in order[start : start + batch_size]])[0].numpy()


GRID = ("", "prune=0.7", "prune=0.5", "prune=0.3", "low_rank=0.5", "prune=0.6,low_rank=0.6")
"""What `search` tries, each as it is and followed by ``quantize=int8``."""

TARGETS = ("latency", "bytes", "macs", "points")


@dataclass(frozen=True)
class Target:
    """What a compressed network must meet; None is no matter."""

    latency: float | None = None
    """At most this share of the start's time,"""
    bytes: float | None = None
    """of its file's bytes,"""
    macs: float | None = None
    """and of its MACs."""
    points: float = 1.0
    """At most so many points of the score lost, of 100."""

    def missed(self, stage: Stage, start: Stage) -> dict[str, float]:
        """By name, what ``stage`` has more of than it may; points are compared to a millionth."""
        found = {
            "latency": 1.0 if stage.latency is None else stage.latency.value,
            "bytes": stage.bytes / start.bytes,
            "macs": stage.macs / start.macs,
            "points": round(100 * (start.score - stage.score), 6),
        }
        most = asdict(self)
        return {name: has for name, has in found.items() if most[name] is not None and not has <= most[name]}


def parse_target(text: str) -> Target:
    """A target from text such as ``latency=0.5,points=1``.

    Raises:
        CompanionError: there is no such target, one is there twice, or a value makes no sense.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in TARGETS:
            raise CompanionError(f"there is no target {name!r}: choose of {', '.join(TARGETS)}, such as latency=0.5.")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 100 or (name != "points" and not 0 < number < 1):
            wanted = "points from 0 to 100" if name == "points" else "a share between 0 and 1"
            raise CompanionError(f"{name} takes {wanted}, such as {name}=0.5, not {value!r}.")
        if name in found:
            raise CompanionError(f"{name} is there twice: give it once.")
        found[name] = number
    return Target(**found)


@dataclass(frozen=True)
class Search:
    """What `search` tried, and the best of it."""

    best: tuple[Step, ...] | None
    """The steps of the most accurate one that meets the target, the smaller file if equal; None if none does."""
    tried: tuple[tuple[str, Stage], ...]
    """Steps, and what they led to on the held-out data; the start first."""
    score: str
    refused: tuple[tuple[str, str], ...] = ()
    """Steps that cannot be done on this network, and why."""

    def __str__(self) -> str:
        rows = table([replace(stage, step=steps or "start") for steps, stage in self.tried], self.score)
        return "\n".join([rows, *(f"{steps} was left out: {why}" for steps, why in self.refused)])

    def to_json(self) -> dict[str, Any]:
        """The same in plain values: the stages with their steps, and what was left out and why."""
        tried = [asdict(stage) | {"step": steps or "start"} for steps, stage in self.tried]
        return {"score": self.score, "tried": tried, "refused": dict(self.refused)}


def search(model: nn.Module, target: Target, train_data: Any, *, seed: int = 0, **options: Any) -> Search:
    """Try the steps of `GRID`, and choose by a tenth of the training data that is held out from their training.

    The test data has no part in the choice: run `apply_steps` with the best steps on it, and all the training data.

    Args:
        model: a trained network of ours; stays as it is.
        target: what must be met.
        train_data: a tenth of it (chosen by the seed) judges, the rest trains.
        seed, options: as in `apply_steps`.

    Raises:
        CompanionError: as `apply_steps`, if not one of the steps that train can be done.
    """
    training, held_out = train.hold_out(train_data, 0.1, seed)
    tried: dict[str, Stage] = {}
    refused: dict[str, str] = {}
    score = ""
    for steps in GRID:
        both = ",".join(filter(None, (steps, "quantize=int8")))
        try:
            found = apply_steps(model, both, training, held_out, seed=seed, **options)
        except CompanionError as error:
            refused[steps] = str(error)
            if not steps or len(refused) == len(GRID) - 1:  # it is not the steps
                raise
            continue
        score = found.score
        *_, before, quantized = found.stages
        tried |= {steps: before, both: quantized}
    start = tried[""]
    good = [steps for steps, stage in tried.items() if steps and not target.missed(stage, start)]
    best = max(good, key=lambda steps: (tried[steps].score, -tried[steps].bytes), default=None)
    return Search(None if best is None else parse_steps(best), tuple(tried.items()), score, tuple(refused.items()))
