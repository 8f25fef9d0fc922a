"""Horovod's workers, which ``horovodrun`` starts (2.2.3): the same training as with torch.distributed, and elastic.

Elastic, a run goes on when workers are lost or join: all that is left begins again from what was last committed. As the
batches stay as large as at the beginning, and each is divided anew, the run is the one that it would have been.

A. Sergeev and M. Del Balso, Horovod: fast and easy distributed deep learning in TensorFlow, 2018 (arXiv:1802.05799).
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.errors import CompanionError
from companion.train.workers import Job, Workers, WorkersLost, on_gpu

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
        if on_gpu(model) and not self.hvd.cuda_built():
            raise CompanionError(
                "this Horovod is built for CPUs, as `make horovod` does it: train with --device cpu, or on GPUs with "
                "--distributed ddp."
            )
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
            raise WorkersLost(self) from error


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
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    try:
        elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        yield (Elastic if elastic else Horovod)(hvd, compression)
    finally:
        hvd.shutdown()


@dataclass(frozen=True)
class Exchange:
    """One tensor's way over the network, as worker 0 saw it; seconds since the timeline's beginning."""

    tensor: str
    """Horovod's name of it; of gradients ``allreduce.`` and the parameter's name."""
    ready: float
    """When the first worker had it; from then on it waits for the others."""
    start: float
    """When all had it, and it went on its way."""
    end: float


def read_timeline(path: str | os.PathLike[str]) -> list[Exchange]:
    """The exchanges in a file of ``horovodrun --timeline-filename``, by the time at which they were ready.

    An exchange that had not ended when its run did is left out.

    Raises:
        CompanionError: the file cannot be read, or is none of Horovod's.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").rstrip().rstrip(",")  # a run that was killed leaves its list open
        events = json.loads(text if text.endswith("]") else text + "]")
        names: dict[int, str] = {}
        open_phases: dict[int, list[tuple[str, float]]] = defaultdict(list)
        ready: dict[int, float] = {}
        found = []
        for event in events:
            kind = event["ph"]
            if kind not in "MBE":
                continue
            row = event["pid"]
            if kind == "M" and "name" in event["args"]:
                names[row] = event["args"]["name"]
            elif kind == "B":
                open_phases[row].append((event["name"], event["ts"] / 1e6))
            elif kind == "E":
                phase, start = open_phases[row].pop()
                if phase.startswith("NEGOTIATE_"):
                    ready[row] = start
                elif not open_phases[row]:  # the whole of it; its parts are inside
                    found.append(Exchange(names[row], ready.pop(row), start, event["ts"] / 1e6))
    except OSError as error:
        raise CompanionError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CompanionError(f"{path} is no timeline of Horovod.") from error
    return sorted(found, key=lambda exchange: exchange.ready)
