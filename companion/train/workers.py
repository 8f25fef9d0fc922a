"""What joins the processes of one training: nothing, torch.distributed, or Horovod; `fit` and `evaluate` cannot tell.

Each process is a worker with a rank from 0. It computes on its share of every batch, and all apply the mean of their
gradients, so that their weights stay alike. Rank 0 alone reads and writes files.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from companion.errors import CompanionError

TIMEOUT = 300.0
"""Seconds until a worker counts as lost if it does not take part in what the others wait for."""
COMPRESSIONS = ("none", "fp16")


class Job(Protocol):
    """A training, as far as its workers need to know it: that of `fit`."""

    def begin(self) -> None:
        """Make all workers' states that of the first."""

    def go_on(self) -> None:
        """Train to the end."""

    def copy(self) -> dict[str, Any]:
        """The state as it is now, whatever becomes of it."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Workers:
    """One process on its own. Those that join several replace what differs."""

    name = "alone"
    rank = 0
    size = 1
    commit_steps = 0
    """How often to `commit` within an epoch; 0 for never."""

    def sum(self, values: Tensor) -> Tensor:
        """Add up ``values``, a tensor of one shape on every worker, in place; returns it."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every worker's ``value``, any picklable object, by rank."""
        return [value]

    def share(self, value: Any) -> Any:
        """Rank 0's ``value``, any picklable object."""
        return value

    def join(self, model: nn.Module, optimizer: Optimizer, parts: int) -> tuple[nn.Module, Optimizer]:
        """What to call forward and what to step, so that each step applies the mean of all workers' gradients.

        The network's weights and the optimizer's state must be alike by then; a step has at most ``parts`` backward
        passes.
        """
        return model, optimizer

    def keep(self, forward: nn.Module) -> AbstractContextManager:
        """In here, a backward pass only adds to this worker's own gradients: more of its share is to come."""
        return nullcontext()

    def average(self, optimizer: Optimizer) -> None:
        """Wait until the gradients are the mean over all workers; after the last backward pass of a step."""

    def step(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Change the weights by gradients that are averaged by now."""
        scaler.step(optimizer)

    def run(self, job: Job) -> None:
        """Train from where the job is to its end."""
        job.begin()
        job.go_on()

    def commit(self) -> None:
        """At the end of an epoch, and every ``commit_steps``: after a loss of workers the run may begin again here."""

    def leave(self, optimizer: Optimizer) -> None:
        """The training is over: the optimizer of `join` is not used again."""

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Turns the many ways to lose another worker into one sentence."""
        yield


ALONE = Workers()


def gather(value: Any) -> list[Any]:
    """Every worker's ``value``, any picklable object, by rank, over torch.distributed."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


class Distributed(Workers):
    """The workers of torch.distributed's default process group; gradients by DistributedDataParallel."""

    name = "ddp"

    def __init__(self, compression: str) -> None:
        self.compression = compression
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        return gather(value)

    def share(self, value: Any) -> Any:
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def join(self, model: nn.Module, optimizer: Optimizer, parts: int) -> tuple[nn.Module, Optimizer]:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if on_gpu(model) and here > gpus:
            raise CompanionError(
                f"{here} workers need as many GPUs, and there are {gpus}: start fewer, or train with --device cpu."
            )
        # The running statistics of batch normalisation are averaged by fit, not taken from rank 0 at every step.
        new = "forward_sync_buffers"  # the argument's name from torch 2.14 on
        known = inspect.signature(DistributedDataParallel).parameters
        own = {new if new in known else "broadcast_buffers": False}
        joined = DistributedDataParallel(model, **own)  # type: ignore[arg-type]
        if self.compression == "fp16":
            joined.register_comm_hook(None, fp16_compress_hook)
        return joined, optimizer

    def keep(self, forward: nn.Module) -> AbstractContextManager:
        assert isinstance(forward, DistributedDataParallel)
        return forward.no_sync()

    @contextmanager
    def losses(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if isinstance(error, distributed.DistError) or "gloo" in text or "connection" in text:
                raise WorkersLost(self) from error
            raise


def on_gpu(model: nn.Module) -> bool:
    return any(parameter.device.type == "cuda" for parameter in model.parameters())


class WorkersLost(CompanionError):
    """The refusal to go on without the other workers."""

    def __init__(self, workers: Workers) -> None:
        super().__init__(
            f"worker {workers.rank} of {workers.size} lost the others (one died, or the network between them): "
            "start all of them again, with --resume to go on from the last checkpoint."
        )


@contextmanager
def _torchrun(timeout: float, compression: str) -> Iterator[Workers]:
    if distributed.is_initialized():  # by whoever started this process, such as `parallel.launch`
        yield Distributed(compression)
        return
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise CompanionError(
            f"--distributed ddp is for workers that torchrun starts ({missing[0]} is not set): "
            "torchrun --nproc-per-node 2 -m companion train … --distributed ddp."
        )
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        patience = timedelta(seconds=timeout)
        store, rank, size = next(distributed.rendezvous("env://", timeout=patience))
        # When torchrun starts all workers again, its store still has the addresses of those before.
        attempt = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]  # several count restarts apart
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=attempt if one_host else store,
            rank=rank,
            world_size=size,
            timeout=patience,
        )
    except (distributed.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise CompanionError(
            f"the workers did not find each other at {where} ({str(error).splitlines()[0].rstrip('.')}): "
            "is the port free, and are all workers there?"
        ) from error
    try:
        yield Distributed(compression)
    finally:
        distributed.destroy_process_group()


def joined(name: str | None, *, timeout: float = TIMEOUT, compression: str = "none") -> AbstractContextManager[Workers]:
    """Join the other workers of this training, for as long as the context lasts.

    Args:
        name: ``ddp`` for workers that `torchrun` (or ``parallel.launch``) started, ``horovod`` for those of
            ``horovodrun``, None for a process on its own.
        timeout: seconds until workers that do not answer count as lost, of ``ddp``; ``horovodrun`` has an option.
        compression: of the gradients while they are sent: ``none``, or ``fp16`` for half the bytes.

    Raises:
        CompanionError: no such way to join, Horovod is not built, or the others cannot be found.
    """
    if compression not in COMPRESSIONS:
        raise CompanionError(f"there is no compression {compression!r}: choose one of {', '.join(COMPRESSIONS)}.")
    if name is None:
        return nullcontext(ALONE)
    if name == "ddp":
        return _torchrun(timeout, compression)
    if name == "horovod":
        from companion.train.horovod import horovodrun

        return horovodrun(compression)
    raise CompanionError(f"there is no way {name!r} to join workers: choose ddp or horovod.")
