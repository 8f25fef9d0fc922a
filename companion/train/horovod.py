"""Horovod's workers, which ``horovodrun`` starts (2.2.3): the same training as with torch.distributed, and elastic.

Elastic, a run goes on when workers are lost or join: all that is left begins again from what was last committed. As the
batches stay as large as at the beginning, and each is divided anew, the run is the one that it would have been.

A. Sergeev and M. Del Balso, Horovod: fast and easy distributed deep learning in TensorFlow, 2018 (arXiv:1802.05799).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.errors import CompanionError
from companion.train.workers import Job, Workers, lost

COMMIT = 10
"""Steps after which an elastic run keeps a copy of its state: what the loss of a worker may cost."""

HOW = (
    "--distributed horovod is for workers that horovodrun starts: "
    "horovodrun -np 2 companion train … --distributed horovod."
)


class Horovod(Workers):
    """All workers of one ``horovodrun``; gradients by ``hvd.DistributedOptimizer``."""

    name = "horovod"

    def __init__(self, hvd: Any, compression: str) -> None:
        self.hvd, self.compression = hvd, compression

    # Asked for each time: in an elastic run they change.

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.hvd.rank()

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.hvd.size()

    # Horovod joins what has the same name. Its default names count the calls, and workers that join late count less.

    def sum(self, values: Tensor) -> Tensor:
        name = f"sum.{values.dtype}.{tuple(values.shape)}"
        return self.hvd.allreduce_(values, op=self.hvd.Sum, name=name)

    def gather(self, value: Any) -> list[Any]:
        return self.hvd.allgather_object(value, name="gather")

    def share(self, value: Any) -> Any:
        return self.hvd.broadcast_object(value, name="share")

    def join(self, model: nn.Module, optimizer: Optimizer, parts: int) -> tuple[nn.Module, Optimizer]:
        state = optimizer.state_dict()  # the wrapped one begins without
        joined = self.hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            backward_passes_per_step=parts,
            compression=_Dense(getattr(self.hvd.Compression, self.compression)),
        )
        joined.load_state_dict(state)
        return model, joined

    def average(self, optimizer: Any) -> None:
        optimizer.synchronize()

    def step(self, scaler: torch.amp.GradScaler, optimizer: Any) -> None:
        with optimizer.skip_synchronize():
            scaler.step(optimizer)

    def leave(self, optimizer: Any) -> None:
        optimizer._grad_accs.clear()  # else it would go on sending gradients, beside the optimizer of a next training

    @contextmanager
    def losses(self) -> Iterator[None]:
        from horovod.common.exceptions import HorovodInternalError

        try:
            yield
        except HorovodInternalError as error:
            raise lost(self) from error


class Elastic(Horovod):
    """Workers of which some may be lost, and others join, while they train."""

    commit_steps = COMMIT

    def run(self, job: Job) -> None:
        from horovod.common.elastic import State

        class Committed(State):
            """Horovod's view of the job: what to keep, to go back to, and to hand on."""

            def save(self) -> None:
                self.kept = job.copy()

            def restore(self) -> None:
                job.load(self.kept)

            def sync(self) -> None:
                job.begin()
                self.save()

        self.committed = Committed(self.share, self.hvd.rank)
        self.committed.save()  # for one that is lost before all have begun
        self.hvd.elastic.run(lambda _: job.go_on())(self.committed)

    def commit(self) -> None:
        self.committed.commit()


class _Dense:
    """A compression of gradients for a network in channels-last layout: Horovod sends contiguous tensors only."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        sent, context = self.inner.compress(tensor.contiguous())
        return sent, (context, torch.channels_last if channels_last else torch.contiguous_format)

    def decompress(self, tensor: Tensor, context: Any) -> Tensor:
        context, layout = context
        return self.inner.decompress(tensor, context).contiguous(memory_format=layout)


@contextmanager
def horovodrun(compression: str) -> Iterator[Workers]:
    """The workers that ``horovodrun`` started.

    Raises:
        CompanionError: Horovod is not built, or this process was started by something else.
    """
    try:
        import horovod.torch as hvd
        import horovod.torch.elastic  # noqa: F401, which hvd does not import by itself
    except ImportError as error:
        raise CompanionError(
            "Horovod is not built here: `make horovod` in a clone of companion builds it on Linux; "
            "--distributed ddp under torchrun does the same everywhere."
        ) from error
    if "HOROVOD_CONTROLLER" not in os.environ:
        raise CompanionError(HOW)
    hvd.init()
    try:
        elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        yield (Elastic if elastic else Horovod)(hvd, compression)
    finally:
        hvd.shutdown()
