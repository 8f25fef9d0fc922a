"""The training loop: one for every task, every network and every precision."""

import hashlib
import math
import operator
import os
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import ConcatDataset, Subset

from companion.errors import CompanionError
from companion.files import check_writable
from companion.models import describe
from companion.progress import progress_bar
from companion.train import checkpoint as checkpoints
from companion.train.amp import Precision
from companion.train.augment import augmentation
from companion.train.batches import (
    HOLDOUT,
    STEP,
    Batches,
    derive_seed,
    own_randomness,
    permutation,
    seed_everything,
)
from companion.train.device import move, pick_device, placed
from companion.train.evaluation import Scores, check_match, score
from companion.train.tasks import Task, attribute, task_of

WARM_UP = 0.05  # share of the steps in which the learning rate rises to its peak


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data gave."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    """At the epoch's last step."""
    train_loss: float
    """Mean over the epoch's samples (of masks: pixels that are not void), while the weights were changing."""
    validation_loss: float | None
    """The same of the validation split, after the epoch; None without one."""
    validation_score: float | None
    """The task's main score in 0..1 (accuracy, mean IoU) on the validation split after the epoch."""
    seconds: float
    """Wall time of the epoch, validation included; of a resumed epoch, the part after the resume."""


@dataclass(frozen=True)
class History:
    """What `fit` did, epoch by epoch."""

    epochs: tuple[Epoch, ...]
    score: str
    """Name of the validation score; empty without a validation split."""
    best_epoch: int
    """The epoch (from 1) whose weights the network now has."""


def fit(
    model: nn.Module,
    train_data: Any,
    *,
    epochs: int,
    task: Task | None = None,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
    precision: str = "fp32",
    validation: Any = 0.1,
    augment: str | None = "default",
    seed: int = 0,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 15.0,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = True,
) -> History:
    """Train ``model`` in place with AdamW; it ends in evaluation mode with the weights of its best epoch.

    The best epoch is the one with the highest score on the validation split (the lower loss breaks a tie).
    The test set has no part in it. With equal arguments on one CPU thread, runs end bit for bit
    alike, however often they were killed and resumed and however many workers read the samples.

    Args:
        model: takes a batch of the data's samples. Its initial weights are the caller's (``models.create(seed=…)``).
        train_data: a data set of companion.datasets, or any map-style one of (input, target) samples.
        epochs: passes over the training data.
        task: how samples become batches, the loss, and the score that chooses the best epoch; None takes the task that
            ``train_data`` names. For another loss on the same data: ``dataclasses.replace(task_of(data), loss=…)``.
        batch_size: samples a step.
        lr: peak learning rate; it rises over the first 5 % of the steps and falls to zero along a cosine.
        weight_decay: AdamW's.
        precision: ``fp32``, ``bf16`` or ``fp16`` (GPU only); the weights stay float32.
        validation: a data set, or the share of ``train_data`` to hold out (chosen by the seed), or 0 for none:
            then the last epoch counts as the best. Samples of one group, if the data set has ``groups`` [N] (such as
            several images made from one scan), are held out together.
        augment: ``shift`` (by up to 4 pixels), ``shift_flip`` (and mirrored) or None; "default" takes what the data set
            says suits it.
        seed: of the order, the hold-out, the augmentation, dropout, and the transforms of the samples.
        device: where to compute; None takes a CUDA GPU if there is one. The network returns to where it was.
        num_workers: processes that read samples ahead. Safe where processes are spawned, if the data set's class
            can be imported (not defined in a notebook).
        checkpoint: file for the state of the unfinished run. It stays when the run is done: delete it once the
            weights are saved.
        resume: go on from ``checkpoint`` if it exists.
        checkpoint_seconds: how often to write it.
        on_epoch: called with each epoch's figures as soon as they are known.
        progress: show a progress bar on a terminal or in a notebook.

    Raises:
        CompanionError: arguments out of range, data that does not fit the network, a sample that cannot be read, a
            checkpoint that exists without ``resume`` or belongs to another run, or a loss that is no longer finite.
    """
    try:
        epochs, batch_size, num_workers, seed = map(operator.index, (epochs, batch_size, num_workers, seed))
        lr, weight_decay = float(lr), float(weight_decay)  # NumPy's numbers cannot go into a checkpoint
    except (TypeError, ValueError) as error:
        raise CompanionError(
            "epochs, batch_size, num_workers and seed must be whole numbers, lr and weight_decay numbers."
        ) from error
    for name, value, good, wanted in (
        ("epochs", epochs, epochs >= 1, "a whole number from 1"),
        ("batch_size", batch_size, batch_size >= 1, "a whole number from 1"),
        ("lr", lr, 0 < lr <= 1000, "a number above 0, at most 1000"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number from 0"),
        ("num_workers", num_workers, num_workers >= 0, "a whole number from 0"),
        ("seed", seed, seed >= 0, "a whole number from 0"),
    ):
        if not good:
            raise CompanionError(f"{name} is {value}: give {wanted}.")
    policy = Precision.named(precision, pick_device(device))
    task = task_of(train_data) if task is None else task
    check_match(model, train_data)
    augment = attribute(train_data, "augmentation") if augment == "default" else augment
    change = augmentation(augment, task.follow)
    training, held_out = hold_out(train_data, validation, seed)
    settings = {
        **_identity(model),
        "labels": attribute(train_data, "labels"),
        "samples": len(training),
        "validation": 0 if held_out is None else len(held_out),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "precision": precision,
        "augment": augment,
        "seed": seed,
        **task.settings,
    }
    if checkpoint is not None:
        settings |= {"data": _digest(training), "validation data": held_out and _digest(held_out)}
    batches = Batches(training, batch_size, task.collate, seed, shuffle=True)
    total = epochs * batches.steps

    with own_randomness(), placed(model, policy.device):
        optimizer = AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        scaler = policy.scaler()
        run = _Run()
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
        if checkpoint is not None:
            check_writable(checkpoint)
            if Path(checkpoint).exists():
                if not resume:
                    raise CompanionError(
                        f"{checkpoint} holds an unfinished run: resume it, or delete it to start again."
                    )
                state = checkpoints.load(checkpoint, settings)
                try:
                    run = _Run.restored(state["run"], total)
                    for name, part in parts.items():
                        part.load_state_dict(state[name])
                except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    raise checkpoints.damaged(checkpoint) from error

        # One stream of batches for the whole run, and one for all its validations: workers start once and read ahead.
        stream = batches.iterate(range(run.step, total), num_workers=num_workers, pin_memory=policy.pin_memory)
        validations: Iterator[Any] = iter(())
        if held_out is not None:
            held_out_batches = Batches(held_out, task.evaluation_batch, task.collate, seed, shuffle=False)
            done = len(run.epochs) * held_out_batches.steps
            validations = held_out_batches.iterate(
                range(done, epochs * held_out_batches.steps),
                num_workers=num_workers,
                pin_memory=policy.pin_memory,
            )

        model.train()
        epoch_started = last_saved = time.monotonic()
        # Read once an epoch: reading makes a GPU wait.
        loss_sum, weight_sum = (torch.tensor(x, device=policy.device) for x in (run.loss_sum, run.weight_sum))
        with progress_bar(show=progress, total=total, initial=run.step, unit="step") as bar:
            for inputs, targets in stream:
                seed_everything(derive_seed(seed, STEP, run.step))
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(run.step, total)
                inputs, targets = change(move(inputs, policy.device), move(targets, policy.device))
                loss = train_step(model, inputs, targets, task, policy, optimizer, scaler)
                weight = task.weight(targets)
                loss_sum += loss * weight
                weight_sum += weight
                run.step += 1
                bar.update()

                ends_epoch = run.step % batches.steps == 0
                saves = checkpoint is not None and (
                    run.step == total or time.monotonic() - last_saved >= checkpoint_seconds
                )
                if (ends_epoch or saves) and not (loss_sum.isfinite() and _finite(model)):
                    raise CompanionError(
                        f"the loss or a weight is no longer finite in epoch {len(run.epochs) + 1}: "
                        f"train with a lower learning rate than {lr:g}."
                    )
                if ends_epoch:
                    validated = None
                    if held_out is not None:
                        validated = score(model, islice(validations, held_out_batches.steps), task, policy)
                        model.train()
                        bar.set_postfix(validation=f"{validated.main:.3f}")
                    train_loss = loss_sum.item() / max(1, int(weight_sum))  # 0 pixels, if all are void
                    epoch = run.end_epoch(model, optimizer, train_loss, validated, time.monotonic() - epoch_started)
                    if on_epoch is not None:
                        with bar.external_write_mode():
                            on_epoch(epoch)
                    loss_sum.zero_()
                    weight_sum.zero_()
                    epoch_started = time.monotonic()
                if saves:
                    run.loss_sum, run.weight_sum = loss_sum.item(), int(weight_sum)
                    states = {name: part.state_dict() for name, part in parts.items()}
                    assert checkpoint is not None
                    checkpoints.save(checkpoint, {"run": vars(run), **states}, settings)
                    last_saved = time.monotonic()
        assert run.best is not None  # epochs >= 1
        model.load_state_dict(run.best["weights"])
    model.eval()
    return History(tuple(Epoch(**row) for row in run.epochs), run.best["score"], run.best["epoch"])


def train_step(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    task: Task,
    policy: Precision,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Forward, backward, and one change of the weights; returns the mean loss of the batch before it, on the device."""
    with policy.autocast():
        loss = task.loss(model, model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # scales float16's gradients only, and for those skips a step that overflowed
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: linear warm-up, then a cosine to zero."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


@dataclass
class _Run:
    """Where a run is: with network, optimiser and scaler all that a checkpoint holds. Plain values and tensors only."""

    step: int = 0
    loss_sum: float = 0.0
    weight_sum: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    @classmethod
    def restored(cls, found: dict[str, Any], total: int) -> "_Run":
        """From a checkpoint; raises whatever comes of one that was forged."""
        if found.keys() != vars(cls()).keys():
            raise ValueError("not all of a run")
        run = cls(**found)
        if run.step not in range(total + 1) or (run.best is None and run.step == total):
            raise ValueError("no such step")
        for row in run.epochs:
            Epoch(**row)
        if run.best is not None and run.best.keys() != {"epoch", "rank", "score", "weights"}:
            raise ValueError("no such weights")
        return run

    def end_epoch(
        self, model: nn.Module, optimizer: AdamW, train_loss: float, validated: Scores | None, seconds: float
    ) -> Epoch:
        number = len(self.epochs) + 1
        epoch = Epoch(
            epoch=number,
            learning_rate=optimizer.param_groups[0]["lr"],
            train_loss=train_loss,
            validation_loss=None if validated is None else validated.loss,
            validation_score=None if validated is None else validated.main,
            seconds=seconds,
        )
        self.epochs.append(asdict(epoch))
        # Without a validation split every epoch beats the one before.
        rank = (float(number), 0.0) if validated is None else (validated.main, -validated.loss)
        if self.best is None or rank > tuple(self.best["rank"]):
            weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
            score = "" if validated is None else next(iter(validated.metrics))
            self.best = {"epoch": number, "rank": rank, "score": score, "weights": weights}
        return epoch


def _identity(model: nn.Module) -> dict[str, Any]:
    try:
        info = describe(model)
    except CompanionError:
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        return {"model": type(model).__name__, "shapes": shapes}
    return {"model": info.name, "configuration": info.configuration}


def hold_out(data: Any, validation: Any, seed: int) -> tuple[Any, Any]:
    """Training and validation data.

    Args:
        data: a data set; samples of one group, if it has ``groups`` [N], stay together.
        validation: a data set, which is handed back, or the share of ``data`` to split off; 0 for None.
        seed: chooses which.

    Raises:
        CompanionError: not a share, or too few samples or groups for it.
    """
    if not isinstance(validation, int | float):
        return data, validation
    if not 0 <= validation < 1:
        raise CompanionError(f"validation is {validation}: give a share from 0 to below 1, or a data set.")
    if validation == 0:
        return data, None
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(_groups(data)):
        members.setdefault(group, []).append(i)
    groups = list(members.values())
    wanted = max(1, round(validation * len(data)))
    held_out: list[int] = []
    for k in permutation(len(groups), derive_seed(seed, HOLDOUT)):
        if len(held_out) + len(groups[k]) <= wanted:
            held_out += groups[k]
    held_out = held_out or min(groups, key=len)
    if len(held_out) == len(data):
        raise CompanionError(
            f"{len(data)} samples of {len(groups)} groups are too few to hold out {validation:.0%} for validation."
        )
    kept = sorted(set(range(len(data))) - set(held_out))
    return Subset(data, kept), Subset(data, sorted(held_out))


def _groups(data: Any) -> list[Hashable]:
    """For each sample what those share that come from one source (``data.groups`` [N]), else something of its own."""
    if isinstance(data, Subset):
        whole = _groups(data.dataset)
        return [whole[i] for i in data.indices]
    if isinstance(data, ConcatDataset):
        return [group for part in data.datasets for group in _groups(part)]
    groups = getattr(data, "groups", None)
    if groups is None:
        return [(id(data), i) for i in range(len(data))]
    return groups.tolist() if hasattr(groups, "tolist") else list(groups)


def _digest(data: Any) -> str:
    """Tells other data of the same size apart, by eight samples; no help if those differ each time they are read."""
    found = set()
    for _ in range(2):
        digest = hashlib.sha256()
        with own_randomness():
            for i in range(0, len(data), -(-len(data) // 8)):
                seed_everything(0)  # for samples with random transforms
                _add(digest, data[i])
        found.add(digest.hexdigest())
    return found.pop() if len(found) == 1 else "random"


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict | list | tuple):
        for item in value.items() if isinstance(value, dict) else value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())


def _finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
