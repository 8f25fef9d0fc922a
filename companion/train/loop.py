"""The training loop: one for every task, every network, every precision, and any number of workers."""

import hashlib
import math
import operator
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
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
from companion.train.parallel.data import synchronized_batch_norm
from companion.train.tasks import Task, attribute, task_of
from companion.train.workers import ALONE, Workers

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
    """The same of the validation split, after the epoch; None without one, and of boxes, which do not tell it."""
    validation_score: float | None
    """The task's main score in 0..1 (accuracy, mean IoU, mAP) on the validation split after the epoch."""
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
    accumulate: int = 1,
    clip_norm: float | None = None,
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
    workers: Workers = ALONE,
    sync_batch_norm: bool = False,
) -> History:
    """Train ``model`` in place with AdamW; it ends in evaluation mode with the weights of its best epoch.

    The best epoch is the one with the highest score on the validation split (the lower loss breaks a tie).
    The test set has no part in it. With equal arguments on one CPU thread, runs end bit for bit
    alike, however often they were killed and resumed and however many processes read the samples.

    With several ``workers``, each calls this with the same arguments. They share every batch, of ``batch_size`` samples
    for each of them, and its step is the one that a single process would do with all of it, at ``lr`` times their
    number (Goyal et al., 2017, Accurate, Large Minibatch SGD, section 2). A run keeps both when it is resumed with
    fewer or more workers. Batch normalisation takes its statistics from each worker's own samples, unless
    ``sync_batch_norm``; the running ones are averaged.

    Args:
        model: takes a batch of the data's samples. Its initial weights are the caller's (``models.create(seed=…)``).
        train_data: a data set of companion.datasets, or any map-style one of (input, target) samples.
        epochs: passes over the training data.
        task: how samples become batches, the loss, and the score that chooses the best epoch; None takes the task that
            ``train_data`` names. For another loss on the same data: ``dataclasses.replace(task_of(data), loss=…)``.
        batch_size: samples a step, of each worker.
        lr: peak learning rate, for each worker; it rises over the first 5 % of the steps and falls to zero along a
            cosine.
        weight_decay: AdamW's.
        precision: ``fp32``, ``bf16``, or on a GPU ``fp16`` and ``tf32``; the weights stay float32.
        accumulate: parts in which a worker computes its samples of a step, one after the other: the step is the same
            (but for batch normalisation, which sees a part at a time), and activations take as much less memory. A
            run that is resumed with fewer workers may need more parts.
        clip_norm: the longest gradient that a step may apply, as the 2-norm over all weights; a longer one is
            shortened to it.
        validation: a data set, or the share of ``train_data`` to hold out (chosen by the seed), or 0 for none:
            then the last epoch counts as the best. Samples of one group, if the data set has ``groups`` [N] (such as
            several images made from one scan), are held out together.
        augment: ``shift`` (by up to 4 pixels), ``shift_flip`` (and mirrored), ``letterbox`` (half of them shrunk, on
            gray) or None; "default" takes what the data set says suits it.
        seed: of the order, the hold-out, the augmentation, dropout, and the transforms of the samples.
        device: where to compute; None takes a CUDA GPU if there is one. The network returns to where it was.
        num_workers: processes that read samples ahead, of each worker. Safe where processes are spawned, if the data
            set's class can be imported (not defined in a notebook).
        checkpoint: file for the state of the unfinished run, which the first worker writes. It stays when the run is
            done: delete it once the weights are saved.
        resume: go on from ``checkpoint`` if it exists.
        checkpoint_seconds: how often to write it.
        on_epoch: called with each epoch's figures as soon as they are known, on every worker.
        progress: show a progress bar on a terminal or in a notebook, of the first worker.
        workers: those of `joined`, if there are several.
        sync_batch_norm: batch normalisation over the samples of all workers (``parallel.synchronized_batch_norm``).
            In a last batch with fewer samples than workers, those without one count the first sample once more.

    Raises:
        CompanionError: arguments out of range, data that does not fit the network, a sample that cannot be read, a
            checkpoint that exists without ``resume`` or belongs to another run, a loss that is no longer finite, or
            workers that differ or are lost.
    """
    try:
        epochs, batch_size, accumulate, num_workers, seed = map(
            operator.index, (epochs, batch_size, accumulate, num_workers, seed)
        )
        lr, weight_decay = float(lr), float(weight_decay)  # NumPy's numbers cannot go into a checkpoint
        clip_norm = math.inf if clip_norm is None else float(clip_norm)
    except (TypeError, ValueError) as error:
        raise CompanionError(
            "epochs, batch_size, accumulate, num_workers and seed must be whole numbers, "
            "lr, weight_decay and clip_norm numbers."
        ) from error
    for name, value, good, wanted in (
        ("epochs", epochs, epochs >= 1, "a whole number from 1"),
        ("batch_size", batch_size, batch_size >= 1, "a whole number from 1"),
        ("accumulate", accumulate, 1 <= accumulate <= batch_size, "a whole number from 1 to the batch size"),
        ("clip_norm", clip_norm, clip_norm > 0, "a number above 0"),
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
    if held_out is not None:
        task.meter()  # what judging lacks shows now, not after an epoch
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
        "clip_norm": clip_norm,
        "sync_batch_norm": sync_batch_norm,
        "augment": augment,
        "seed": seed,
        **task.settings,
    }
    if checkpoint is not None:
        settings |= {"data": _digest(training), "validation data": held_out and _digest(held_out)}
    job = Job(
        model=model,
        optimizer=AdamW(model.parameters(), lr=lr, weight_decay=weight_decay),
        scaler=policy.scaler(),
        task=task,
        policy=policy,
        workers=workers,
        change=change,
        training=training,
        held_out=held_out,
        settings=settings,
        accumulate=accumulate,
        clip_norm=clip_norm,
        num_workers=num_workers,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        on_epoch=on_epoch,
        progress=progress,
        run=_Run(workers=workers.size),
    )
    together = synchronized_batch_norm(model, all_reduce=workers.sum) if sync_batch_norm else nullcontext()
    with own_randomness(), placed(model, policy.device), policy.arithmetic(), workers.losses(), together:
        workers.run(job)
        workers.leave(job.optimizer)
        assert job.run.best is not None  # epochs >= 1
        model.load_state_dict(job.run.best["weights"])
    model.eval()
    return History(tuple(Epoch(**row) for row in job.run.epochs), job.run.best["score"], job.run.best["epoch"])


@dataclass
class Job:
    """All that a run needs, and how far it is."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    task: Task
    policy: Precision
    workers: Workers
    change: Callable[[Any, Any, Sequence[int], int], tuple[Any, Any]]
    training: Any
    held_out: Any
    settings: dict[str, Any]
    accumulate: int
    clip_norm: float
    num_workers: int
    checkpoint: Path | None
    resume: bool
    checkpoint_seconds: float
    on_epoch: Callable[[Epoch], None] | None
    progress: bool
    run: "_Run"
    forward: nn.Module | None = None
    """What to call forward, once it has joined the other workers."""

    def batches(self) -> Batches:
        """This worker's shares of the training batches, which stay as large as those that the run began with."""
        return Batches(
            self.training,
            self.settings["batch_size"] * self.run.workers,
            self.task.collate,
            self.settings["seed"],
            shuffle=True,
            parts=self.accumulate,
            rank=self.workers.rank,
            size=self.workers.size,
            lend=True,
        )

    def validations(self) -> Batches:
        """This worker's shares of the batches of the validation split."""
        return Batches(
            self.held_out,
            self.task.evaluation_batch * self.workers.size,
            self.task.collate,
            self.settings["seed"],
            shuffle=False,
            rank=self.workers.rank,
            size=self.workers.size,
        )

    @property
    def parts(self) -> dict[str, Any]:
        """What has a state, besides the run itself."""
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, from which the run goes on."""
        return {"run": vars(self.run), **{name: part.state_dict() for name, part in self.parts.items()}}

    def copy(self) -> dict[str, Any]:
        """The `state` as it is now, whatever becomes of it."""
        run = vars(self.run) | {"epochs": list(self.run.epochs)}
        return {"run": run, **{name: deepcopy(part.state_dict()) for name, part in self.parts.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.run = _Run.restored(state["run"])
        total = self.settings["epochs"] * self.batches().steps
        if self.run.step not in range(total + 1) or (self.run.best is None and self.run.step == total):
            raise ValueError("no such step")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def _take_up(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoint is None:
            return
        check_writable(self.checkpoint)
        if self.checkpoint.exists():
            if not self.resume:
                raise CompanionError(
                    f"{self.checkpoint} holds an unfinished run: resume it, or delete it to start again."
                )
            state = checkpoints.load(self.checkpoint, self.settings)
            try:
                self.load(state)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise checkpoints.damaged(self.checkpoint) from error

    def begin(self) -> None:
        """Give all workers the state of the first, after a look at whether they do the same."""
        refusal = None
        if self.forward is None and self.workers.rank == 0:
            try:
                self._take_up()
            except CompanionError as error:
                if self.workers.size == 1:
                    raise
                refusal = str(error)  # of all workers, or the others would wait for this one
        if self.workers.size > 1:
            shapes = {key: (tuple(value.shape), str(value.dtype)) for key, value in self.model.state_dict().items()}
            ours = shapes | self.settings | {"accumulate": self.accumulate}
            for rank, theirs in enumerate(self.workers.gather(ours)):
                for key in ours | theirs:
                    if repr(ours.get(key)) != repr(theirs.get(key)):
                        raise CompanionError(
                            f"workers {self.workers.rank} and {rank} differ in {key}, {ours.get(key)} and "
                            f"{theirs.get(key)}: start all of them with the same network and arguments."
                        )
            refusal, state = self.workers.share((refusal, self.state()))
            if refusal:
                raise CompanionError(refusal)
            self.load(state)
        if self.forward is None:
            self.forward, self.optimizer = self.workers.join(self.model, self.optimizer, self.accumulate)

    def go_on(self) -> None:
        """From where the run is to its end."""
        run, workers, policy, model = self.run, self.workers, self.policy, self.model
        batches = self.batches()
        total = self.settings["epochs"] * batches.steps
        peak = self.settings["lr"] * run.workers

        # One stream of batches for the whole run, and one for all its validations: processes start once and read ahead.
        stream = batches.iterate(range(run.step, total), num_workers=self.num_workers, pin_memory=policy.pin_memory)
        validations: Iterator[Any] = iter(())
        if self.held_out is not None:
            held_out = self.validations()
            done = len(run.epochs) * held_out.steps
            validations = held_out.iterate(
                range(done, self.settings["epochs"] * held_out.steps),
                num_workers=self.num_workers,
                pin_memory=policy.pin_memory,
            )

        model.train()
        epoch_started = last_saved = time.monotonic()
        # Read once an epoch: reading makes a GPU wait. Over this worker's samples; the first has what was before, too.
        first = workers.rank == 0
        before = (run.loss_sum, run.weight_sum) if first else (0.0, 0)
        loss_sum, weight_sum = (torch.tensor(x, device=policy.device) for x in before)
        with progress_bar(show=self.progress and first, total=total, initial=run.step, unit="step") as bar:
            for parts in stream:
                saves = self.checkpoint is not None and (
                    run.step + 1 == total or time.monotonic() - last_saved >= self.checkpoint_seconds
                )
                for group in self.optimizer.param_groups:
                    group["lr"] = peak * schedule(run.step, total)
                changed = [self._change(batches, part, i) for i, part in enumerate(parts)]
                weights = [0 if batches.idle(run.step) else self.task.weight(targets) for _, targets in changed]
                shares: list[Any] = [1.0]
                if workers.size > 1 or len(parts) > 1:
                    whole = torch.tensor([float(sum(weights)), first and saves], dtype=torch.float64)
                    whole_weight, saving = workers.sum(whole).tolist()
                    saves = bool(saving)  # by the clock of the first, so that all do the same
                    shares = [float(weight) * workers.size / max(1, whole_weight) for weight in weights]
                losses = self._step(changed, shares)
                for loss, weight in zip(losses, weights, strict=True):
                    loss_sum += loss * weight
                    weight_sum += weight
                run.step += 1
                bar.update()

                ends_epoch = run.step % batches.steps == 0
                commits = ends_epoch or (workers.commit_steps > 0 and run.step % workers.commit_steps == 0)
                if commits or saves:
                    own = torch.tensor([loss_sum.item(), weight_sum.item()], dtype=torch.float64)
                    run.loss_sum, weight = workers.sum(own).tolist()
                    run.weight_sum = int(weight)
                    if not (math.isfinite(run.loss_sum) and _finite(model)):
                        raise CompanionError(
                            f"the loss or a weight is no longer finite in epoch {len(run.epochs) + 1}: "
                            f"train with a lower learning rate than {peak:g}."
                        )
                    _average_running_statistics(model, workers)
                if ends_epoch:
                    validated = None
                    if self.held_out is not None:
                        shown = islice(validations, held_out.steps)
                        validated = score(model, shown, self.task, policy, workers)
                        model.train()
                        bar.set_postfix(validation=f"{validated.main:.3f}")
                    epoch = run.end_epoch(model, self.optimizer, validated, time.monotonic() - epoch_started)
                    if self.on_epoch is not None:
                        with bar.external_write_mode():
                            self.on_epoch(epoch)
                    loss_sum.zero_()
                    weight_sum.zero_()
                    epoch_started = time.monotonic()
                if saves:
                    if first:
                        assert self.checkpoint is not None
                        checkpoints.save(self.checkpoint, self.state(), self.settings)
                    last_saved = time.monotonic()
                if commits:
                    workers.commit()

    def _change(self, batches: Batches, part: Any, number: int) -> tuple[Any, Any]:
        """A part of a batch on the device, augmented; draws what dropout will draw from."""
        seed, step = self.settings["seed"], self.run.step
        inputs, targets = (move(value, self.policy.device) for value in part)
        seed_everything(derive_seed(seed, STEP, step))
        return self.change(inputs, targets, batches.share(step)[number], batches.samples(step))

    def _step(self, parts: list[tuple[Any, Any]], shares: list[Any]) -> list[Tensor]:
        """One change of the weights, by the sum of the parts' gradients times their shares, and the mean over workers.

        Returns the mean loss of each part before it, on the device.
        """
        losses, optimizer = [], self.optimizer
        assert self.forward is not None
        optimizer.zero_grad()
        for i, ((inputs, targets), share) in enumerate(zip(parts, shares, strict=True)):
            if (self.workers.rank, i) != (0, 0):  # other samples, other units dropped
                seed_everything(derive_seed(self.settings["seed"], STEP, self.run.step, self.workers.rank, i))
            with nullcontext() if i == len(parts) - 1 else self.workers.keep(self.forward):
                with self.policy.autocast():
                    loss = self.task.loss(self.model, self.forward(inputs), targets)
                # Scaled for float16 only, whose smallest gradients would round to zero.
                self.scaler.scale(loss * share).backward()
            losses.append(loss.detach())
        # In this order: an overflow or a long gradient of one worker is all workers', and a length is of what is real.
        self.workers.average(optimizer)
        if self.clip_norm < math.inf:
            self.scaler.unscale_(optimizer)
            clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.workers.step(self.scaler, optimizer)  # none, if float16's gradients overflowed
        self.scaler.update()
        return losses


def _average_running_statistics(model: nn.Module, workers: Workers) -> None:
    """Batch normalisation's, which each worker took from its own samples."""
    if workers.size == 1:
        return
    running = [
        value
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for value in (module.running_mean, module.running_var)
        if value is not None
    ]
    if running:
        whole = workers.sum(torch.cat([value.flatten() for value in running])) / workers.size
        for value, mean in zip(running, whole.split([value.numel() for value in running]), strict=True):
            value.copy_(mean.reshape(value.shape))


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: linear warm-up, then a cosine to zero."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


@dataclass
class _Run:
    """Where a run is: with network, optimiser and scaler all that a checkpoint holds. Plain values and tensors only."""

    workers: int = 1
    """How many it began with: they set its batches and its learning rate."""
    step: int = 0
    loss_sum: float = 0.0
    weight_sum: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    @classmethod
    def restored(cls, found: dict[str, Any]) -> "_Run":
        """From a checkpoint; raises whatever comes of one that was forged."""
        if found.keys() != vars(cls()).keys():
            raise ValueError("not all of a run")
        run = cls(**found)
        if run.workers not in range(1, 2**31):
            raise ValueError("no such number of workers")
        for row in run.epochs:
            Epoch(**row)
        if run.best is not None and run.best.keys() != {"epoch", "rank", "score", "weights"}:
            raise ValueError("no such weights")
        return run

    def end_epoch(self, model: nn.Module, optimizer: Optimizer, validated: Scores | None, seconds: float) -> Epoch:
        number = len(self.epochs) + 1
        epoch = Epoch(
            epoch=number,
            learning_rate=optimizer.param_groups[0]["lr"],
            train_loss=self.loss_sum / max(1, self.weight_sum),  # 0 pixels, if all are void
            validation_loss=None if validated is None or math.isnan(validated.loss) else validated.loss,
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
        self.loss_sum, self.weight_sum = 0.0, 0
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
