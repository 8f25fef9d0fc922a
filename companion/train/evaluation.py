"""Judge a network on a data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import CompanionError
from companion.models import describe
from companion.progress import progress_bar
from companion.train.amp import Precision
from companion.train.batches import Batches, own_randomness
from companion.train.device import move, pick_device, placed
from companion.train.tasks import Task, attribute, task_of
from companion.train.workers import ALONE, Workers


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found."""

    samples: int
    loss: float
    """Mean over the samples; of masks, over all pixels that are not void; of boxes NaN, for they do not tell it."""
    metrics: dict[str, float]
    """Scores by name, in 0..1, the task's main one first."""

    @property
    def main(self) -> float:
        """The score that chooses between epochs."""
        return next(iter(self.metrics.values()))


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int | None = None,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
    workers: Workers = ALONE,
) -> Scores:
    """Loss and scores of ``model`` over all of ``data``; the network itself is left as it was.

    Args:
        model: takes a batch of the data's samples.
        data: a data set of companion.datasets, or any map-style one of (input, target) samples.
        batch_size: samples at a time; 256, of masks and boxes 32, if not given.
        precision, device, num_workers, progress: as in `fit`.
        workers: those of `joined`, if there are several: each judges its share, once, and all get the whole result.

    Raises:
        CompanionError: data that does not fit the network, or a sample that cannot be read.
    """
    task = task_of(data)
    with (
        workers.losses(),
        _evaluation(model, data, batch_size, precision, device, num_workers, progress, workers) as (policy, stream),
    ):
        return score(model, stream, task, policy, workers)


def predict(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int | None = None,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """The outputs of ``model`` for all of ``data``, float32 [N, …] on the CPU, and the targets [N, …], in its order.

    Arguments and errors are those of `evaluate`.
    """
    with _evaluation(model, data, batch_size, precision, device, num_workers, progress) as (policy, stream):
        pairs = [(outputs.float().cpu(), targets.cpu()) for outputs, targets in _forward(model, stream, policy)]
    outputs, targets = zip(*pairs, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def check_match(model: nn.Module, data: Any) -> None:
    """Refuse data that this network cannot be trained or judged on; networks that are not ours pass unchecked.

    Raises:
        CompanionError: no samples, another task, or other classes.
    """
    if len(data) == 0:
        raise CompanionError("the data set is empty.")
    with own_randomness():
        sample = data[0]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise CompanionError("each sample of a data set must be a pair: an input and its target.")
    try:
        info = describe(model)
    except CompanionError:
        return
    name = attribute(data, "name", "the data set")
    task, labels = attribute(data, "task", info.task), attribute(data, "labels")
    if task != info.task:
        raise CompanionError(f"{info.name} is for the task {info.task!r}, {name} is for {task!r}.")
    size = info.configuration.get("image_size")
    if size is not None and (shape := tuple(getattr(sample[0], "shape", ()))) != (3, size, size):
        raise CompanionError(f"{info.name} takes tensors of shape {(3, size, size)}, {name} has {shape or sample[0]}.")
    vocabulary = attribute(data, "vocabulary")
    if None not in (vocabulary, info.vocabulary) and tuple(vocabulary) != info.vocabulary:
        raise CompanionError(
            f"{info.name} knows other words than {name} was read with: load the data with the network's vocabulary."
        )
    if labels is None:
        return
    classes = info.configuration.get("classes", len(labels))
    if len(labels) != classes:
        raise CompanionError(f"{info.name} has {classes} classes, {name} has {len(labels)}: name the data it is for.")
    if info.labels is not None and tuple(labels) != info.labels:
        different = next((ours, theirs) for ours, theirs in zip(info.labels, labels, strict=True) if ours != theirs)
        raise CompanionError(
            f"{info.name} was trained for other classes than those of {name}: {different[0]!r} is not {different[1]!r}."
        )


@contextmanager
def _evaluation(
    model: nn.Module,
    data: Any,
    batch_size: int | None,
    precision: str,
    device: str | torch.device | None,
    num_workers: int,
    progress: bool,
    workers: Workers = ALONE,
) -> Iterator[tuple[Precision, Iterator[Any]]]:
    """What `evaluate` and `predict` share: everything checked, the network in place, the batches of the data."""
    task = task_of(data)
    batch_size = task.evaluation_batch if batch_size is None else batch_size
    if batch_size < 1:
        raise CompanionError(f"batch_size is {batch_size}: give a whole number from 1.")
    policy = Precision.named(precision, pick_device(device))
    check_match(model, data)
    batches = Batches(
        data, batch_size * workers.size, task.collate, seed=0, shuffle=False, rank=workers.rank, size=workers.size
    )
    modes = {module: module.training for module in model.modules()}
    with placed(model, policy.device), policy.arithmetic(), own_randomness():
        stream = batches.iterate(range(batches.steps), num_workers=num_workers, pin_memory=policy.pin_memory)
        with progress_bar(show=progress and workers.rank == 0, total=batches.steps, unit="batch") as bar:
            try:
                yield policy, _counted(stream, bar)
            finally:
                for module, training in modes.items():
                    module.training = training


def _counted(stream: Iterator[Any], bar: Any) -> Iterator[Any]:
    for batch in stream:
        yield batch
        bar.update()


def _forward(model: nn.Module, stream: Iterator[Any], policy: Precision) -> Iterator[tuple[Any, Any]]:
    """Outputs and targets of each batch, in evaluation mode and without gradients."""
    model.eval()
    for inputs, targets in chain.from_iterable(stream):
        targets = move(targets, policy.device)
        with torch.inference_mode(), policy.autocast():
            outputs = model(move(inputs, policy.device))
        yield outputs, targets


def score(model: nn.Module, stream: Iterator[Any], task: Task, policy: Precision, workers: Workers = ALONE) -> Scores:
    """Loss and scores over the batches of a stream, and of all workers'; leaves the network in evaluation mode."""
    meter, loss_sum, weight_sum, samples = task.meter(), 0.0, 0, 0
    for outputs, targets in _forward(model, stream, policy):
        meter.update(outputs, targets)
        weight = int(task.weight(targets))
        with policy.autocast():  # which computes losses in float32, even of 16-bit outputs
            loss_sum += task.loss(model, outputs, targets).item() * weight
        weight_sum += weight
        samples += len(targets)
    if workers.size > 1:
        meters, *sums = zip(*workers.gather((meter, loss_sum, weight_sum, samples)), strict=True)
        meter = task.meter()
        for each in meters:
            meter.merge(each)
        loss_sum, weight_sum, samples = map(sum, sums)
    metrics = meter.compute()  # refuses what has nothing to judge by
    return Scores(samples, loss_sum / weight_sum, metrics)
