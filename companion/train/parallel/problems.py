"""Common problems of training with several workers: what shows each of them, and what cures it (2.2).

A loader that starves the step
    `Waiting` shows it; a loader with worker processes that read ahead cures it.
Out of memory
    `largest_batch` finds what fits. For more: `backward_in_parts` (gradient accumulation) and `recomputed` (activation
    checkpointing).
A straggler, for whom all others wait in every step
    `gather_pace` names it; shares in proportion to speed, `Pace.shares` with `loss_weight`, cure it.
A hang, because some worker does not take part in what the others wait for
    The time-out of `launch` says where each of them is, ``torch.distributed.monitored_barrier`` who is missing, and the
    environment variable ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` which calls do not belong together.
Workers that diverge
    `check_in_step` names the first parameter that differs; `broadcast_model` at the start cures it.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from companion.errors import CompanionError
from companion.train.workers import gather
from companion.units import format_seconds


class Waiting:
    """Hands on what ``stream`` gives, and tells the time spent waiting for it from the time spent working on it::

        steps = Waiting(loader)
        for inputs, targets in steps:
            ...
        print(steps)

    On a GPU the work has to include waiting for its result, such as reading the loss.

    Args:
        stream: a loader, or anything else to iterate over.
        clock: returns seconds.
    """

    def __init__(self, stream: Iterable[Any], *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stream, self.clock = stream, clock
        self.waited: list[float] = []
        """Seconds, of each step; the first includes the start of the loader's processes."""
        self.worked: list[float] = []
        """The same, from when a batch is handed out until the next one is asked for."""

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.stream)
        while True:
            asked = self.clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            got = self.clock()
            self.waited.append(got - asked)
            try:
                yield batch
            finally:  # also if the loop is left
                self.worked.append(self.clock() - got)

    @property
    def share(self) -> float:
        """Of all the time but the first step's, the share that was spent waiting, 0 to 1.

        Raises:
            CompanionError: there were fewer than two steps.
        """
        waited, worked = sum(self.waited[1:]), sum(self.worked[1:])
        if not waited + worked:
            raise CompanionError("iterate over at least two batches before asking how long they took.")
        return waited / (waited + worked)

    def __str__(self) -> str:
        share = self.share
        waited, worked = (format_seconds(sum(times[1:]) / len(times[1:])) for times in (self.waited, self.worked))
        return f"{share:.0%} of the time is spent waiting for data: {waited} a step, beside {worked} of work"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def largest_batch(attempt: Callable[[int], Any], *, limit: int = 4096) -> int:
    """The largest batch that does not run out of memory, by doubling and then halving the interval.

    On a CPU without a limit of memory, a system may rather swap or kill than refuse: set ``limit``.

    Args:
        attempt: does a training step with a batch of so many samples; its other errors pass through.
        limit: try no more samples than that.

    Raises:
        CompanionError: not even one sample fits.
    """
    if limit < 1:
        raise CompanionError(f"limit is {limit}: give a whole number from 1.")

    def fits(samples: int) -> bool:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(samples)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    fitting, samples = 0, 1
    while fits(samples):
        if samples == limit:
            return limit
        fitting, samples = samples, min(2 * samples, limit)
    while samples - fitting > 1:
        middle = (fitting + samples) // 2
        fitting, samples = (middle, samples) if fits(middle) else (fitting, middle)
    if not fitting:
        raise CompanionError("not even a batch of one sample fits into memory.")
    return fitting


def backward_in_parts(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, loss: Callable[[Any, Tensor], Tensor], parts: int
) -> Tensor:
    """Gradient accumulation: the gradient of a batch, with the activations of one part of it at a time.

    It is added to the parameters' gradients, and is that of the whole batch unless a layer joins the samples of a
    batch, as batch normalisation does in training mode: then that sees one part at a time.

    Args:
        model: if it is a DistributedDataParallel, workers exchange gradients once, with the last part.
        inputs, targets: [N, …] each.
        loss: (outputs, targets) → mean over the samples.
        parts: as many, or one for each sample if there are fewer.

    Returns:
        The mean loss of the batch, [].

    Raises:
        CompanionError: no samples, or parts below 1.
    """
    if parts < 1 or not len(inputs):
        raise CompanionError(f"{len(inputs)} samples cannot be computed in {parts} parts: give at least one of each.")
    parts = min(parts, len(inputs))
    total = torch.zeros((), device=inputs.device)
    for i, (x, y) in enumerate(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True), start=1):
        wait = isinstance(model, DistributedDataParallel) and i < parts
        with model.no_sync() if wait else nullcontext():  # type: ignore[operator]
            part = loss(model(x), y) * (len(x) / len(inputs))
            part.backward()
        total += part.detach()
    return total


@contextmanager
def recomputed(*modules: nn.Module) -> Iterator[None]:
    """Activation checkpointing: in here, these modules keep their inputs only, and run again in the backward pass.

    That saves the memory of all between their inputs and outputs, for the time of a second forward pass. Results are
    the same: dropout draws the same numbers again, and batch normalisation counts a batch once. The modules themselves
    are changed while the context lasts, and afterwards are what they were.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            again = partial(_passes, module)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=again)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _passes(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the first and of the second forward pass."""
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


@dataclass(frozen=True)
class Pace:
    """How fast each worker is on its own."""

    samples: tuple[int, ...]
    """That each worker computed, by rank,"""
    seconds: tuple[float, ...]
    """and how long that took, without waiting for the others."""

    @property
    def slowest(self) -> int:
        """Rank of the worker that all others wait for."""
        return self.seconds.index(max(self.seconds))

    @property
    def idle(self) -> float:
        """Of all workers' time, the share that is spent waiting for the slowest, 0 to 1."""
        return 1 - sum(self.seconds) / (len(self.seconds) * max(self.seconds))

    def shares(self, batch: int) -> list[int]:
        """Samples for each worker, ``batch`` together, such that all are done at the same time: as each one's speed."""
        speeds = [samples / seconds for samples, seconds in zip(self.samples, self.seconds, strict=True)]
        exact = [batch * speed / sum(speeds) for speed in speeds]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda rank: shares[rank] - exact[rank])
        for rank in by_remainder[: batch - sum(shares)]:
            shares[rank] += 1
        return shares

    def __str__(self) -> str:
        times = max(self.seconds) / median(self.seconds)
        return (
            f"worker {self.slowest} of {len(self.seconds)} is the last, with {times:.2f} times the median: "
            f"{self.idle:.0%} of the workers' time is spent waiting"
        )


def gather_pace(samples: int, seconds: float, *, gather: Callable[[Any], list[Any]] = gather) -> Pace:
    """Every worker's pace, on every worker.

    Args:
        samples: that this worker computed.
        seconds: it took for them, forward and backward, up to where it waits for the others.
        gather: value → every worker's, by rank; by default torch.distributed's, and Horovod has ``allgather_object``.

    Raises:
        CompanionError: a worker took no time, or no worker computed a sample.
    """
    pairs = gather((samples, seconds))
    if not all(seconds > 0 for _, seconds in pairs) or not any(samples for samples, _ in pairs):
        raise CompanionError("the pace of workers is known only after each of them took some time for some samples.")
    return Pace(*zip(*pairs, strict=True))


def check_in_step(model: nn.Module, *, buffers: bool = False, gather: Callable[[Any], list[Any]] = gather) -> None:
    """Refuse to go on if the parameters of all workers are not the same bit for bit; every worker has to call it.

    Sent are digests, not weights.

    Args:
        model: this worker's network.
        buffers: compare these, too. Running statistics of batch normalisation differ unless it is synchronised.
        gather: as in `gather_pace`.

    Raises:
        CompanionError: on all workers, with the first parameter that differs, and whose it is.
    """
    tensors = dict(model.named_parameters()) | (dict(model.named_buffers()) if buffers else {})
    everyone = gather({name: _description(tensor) for name, tensor in tensors.items()})
    for name in dict.fromkeys(name for table in everyone for name in table):
        found = [table.get(name, "missing") for table in everyone]
        usual = Counter(found).most_common(1)[0][0]
        other = found.index(usual)
        for rank, description in enumerate(found):
            if description != usual:
                own, theirs = (text.partition(" #")[0] for text in (description, usual))
                what = f"differs from worker {other}'s" if own == theirs else f"is {own}, worker {other}'s is {theirs}"
                raise CompanionError(
                    f"worker {rank} of {len(found)} is out of step: its {name} {what}; "
                    "start with the same network and broadcast_model, and average every gradient."
                )


def _description(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return f"{kind} #{hashlib.sha256(content).hexdigest()}"
