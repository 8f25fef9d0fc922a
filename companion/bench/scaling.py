"""What a second worker brings, and what its messages cost (2.2.1)."""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from companion import models
from companion.bench.runner import Bench, Cell
from companion.metrics.results import Row, Value, summarize
from companion.train.parallel import average_gradients, launch, naive_all_reduce, ring_all_reduce
from companion.train.workers import Distributed
from companion.units import KIB, MIB

NETWORK, BATCH = "cifar_resnet20", 32
WORKERS = 2
MORE_WORKERS = 4  # of an all-reduce, to see what depends on their number
ROUNDS = 15  # of all alternatives, in a random order
STEPS = 5  # of training, one after the other in a round
SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB)
SHORTEST = MIB  # smaller tensors are sent again and again, so many bytes in all
TIMEOUT = 3600.0

ALONE, DDP = "one worker", "DistributedDataParallel"
HOROVOD = {"Horovod": 1, "Horovod, cycles of 10 ms": 10}
"""How often its thread looks for gradients, in ms; 1 is its default."""
BY_HAND: dict[str, Callable[[nn.Module], Any]] = {
    "average_gradients": average_gradients,
    "average_gradients, our ring": partial(average_gradients, all_reduce=ring_all_reduce),
}
ALL_REDUCES: dict[str, Callable[[torch.Tensor], Any]] = {
    "Gloo": distributed.all_reduce,
    "our ring": ring_all_reduce,
    "by way of worker 0": naive_all_reduce,
}

Seconds = dict[str, list[float]]


def _alternate(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: int,
    around: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> Seconds:
    """Seconds a call, by round: each function in turn, in what it needs ``around`` it, all workers together."""
    found: Seconds = {name: [] for name in functions}
    for i in range(-1, rounds):  # the first only warms up
        for name in random.Random(i).sample(sorted(functions), len(functions)):
            with (around or {}).get(name, nullcontext)():
                functions[name]()  # what begins anew in each round is not timed
                distributed.barrier()
                start = time.perf_counter()
                for _ in range(calls):
                    functions[name]()
                seconds = (time.perf_counter() - start) / calls
                distributed.barrier()  # or one that has nothing to do in it would begin with the next
                if i >= 0:
                    found[name].append(seconds)
    return found


@contextmanager
def _horovod(cycle: int) -> Iterator[None]:
    """Horovod, for as long as it is measured: its thread would take time from the others."""
    import horovod.torch as hvd
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    os.environ["HOROVOD_CYCLE_TIME"] = str(cycle)
    # A meeting point of its own each time: the launcher's may still tell the addresses of the time before.
    meeting, port = RendezvousServer(), [0]
    if distributed.get_rank() == 0:
        port = [meeting.start()]
        meeting.init(get_host_assignments(parse_hosts(f"localhost:{WORKERS}"), WORKERS))
    distributed.broadcast_object_list(port)
    os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = str(port[0])
    hvd.init()
    try:
        yield
    finally:
        hvd.shutdown()
        if distributed.get_rank() == 0:
            meeting.stop()


def _step(name: str, network: str) -> Callable[[], Any]:
    """A training step of this worker."""
    if name == ALONE and distributed.get_rank():
        return lambda: None
    model = models.create(network, seed=0).train()
    forward: nn.Module = model
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if name == DDP:
        forward, optimizer = Distributed("none").join(model, optimizer, 1)
    elif name in HOROVOD:
        import horovod.torch as hvd

        from companion.train.horovod import Horovod

        with _horovod(HOROVOD[name]):
            forward, optimizer = Horovod(hvd, "none").join(model, optimizer, 1)
    exchange = BY_HAND.get(name, lambda _: None)
    inputs, targets = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(forward(inputs), targets).backward()
        exchange(model)
        optimizer.step()

    return step


def _train(network: str, rounds: int, steps: int, horovod: bool) -> Seconds:
    names = (ALONE, "nothing", DDP, *(HOROVOD if horovod else ()), *BY_HAND)
    around = {name: partial(_horovod, cycle) for name, cycle in HOROVOD.items()}
    return _alternate({name: _step(name, network) for name in names}, rounds, steps, around)


def _started_by_horovod(store: str, arguments: tuple[Any, ...]) -> Seconds:
    """`_train` by a worker of Horovod's launcher, which joins torch.distributed too."""
    for name in ("HOROVOD_CYCLE_TIME", "HOROVOD_CACHE_CAPACITY"):  # "(None,)" by an error of Horovod 0.28.1: read as 0
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    rank, size = (int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE"))
    distributed.init_process_group("gloo", store=distributed.FileStore(store, size), rank=rank, world_size=size)
    try:
        return _train(*arguments)
    finally:
        distributed.destroy_process_group()


def _trainings() -> list[Seconds]:
    arguments = (NETWORK, ROUNDS, STEPS)
    if find_spec("horovod") is None:
        return launch(_train, WORKERS, *arguments, False, backend="gloo", timeout=TIMEOUT)
    import horovod

    with tempfile.TemporaryDirectory() as folder:
        started = str(Path(folder) / "store"), (*arguments, True)
        return horovod.run(_started_by_horovod, started, num_proc=WORKERS, use_gloo=True)


def _send(size: int, rounds: int) -> Seconds:
    values = torch.zeros(size // 4)
    functions = {name: partial(function, values) for name, function in ALL_REDUCES.items()}
    return _alternate(functions, rounds, max(1, SHORTEST // size))


def _slowest(found: list[Seconds]) -> Seconds:
    """A round is over when its last worker is done."""
    return {name: [max(times) for times in zip(*(one[name] for one in found), strict=True)] for name in found[0]}


def _training() -> list[Row]:
    seconds = _slowest(_trainings())
    rows = []
    for name, times in seconds.items():
        keys: dict[str, str | int | float | bool] = {
            "what": f"a training step of {NETWORK}",
            "workers": 1 if name == ALONE else WORKERS,
            "exchanged by": "–" if name == ALONE else name,
        }
        values: dict[str, Value] = {
            "time": summarize([1e3 * each for each in times], "ms"),
            "steps per second": summarize([1 / each for each in times], ""),
            # 1 if a worker is as fast as the one alone: then n of them train n times as many samples.
            "efficiency": summarize([a / b for a, b in zip(seconds[ALONE], times, strict=True)], ""),
            "steps for each of DDP's": summarize([a / b for a, b in zip(seconds[DDP], times, strict=True)], ""),
        }
        rows.append(Row(keys, values))
    return rows


def _name(size: int) -> str:
    return f"all-reduce of {size // KIB:,} KiB"


def _all_reduce(size: int, workers: int) -> list[Row]:
    seconds = _slowest(launch(_send, workers, size, ROUNDS, backend="gloo", timeout=TIMEOUT))
    rows = []
    for name, times in seconds.items():
        values: dict[str, Value] = {
            "time": summarize([1e3 * each for each in times], "ms"),
            "times Gloo's": summarize([a / b for a, b in zip(times, seconds["Gloo"], strict=True)], ""),
        }
        rows.append(Row({"what": _name(size), "workers": workers, "exchanged by": name}, values))
    return rows


def _cells() -> Iterator[Cell]:
    yield Cell("training", _training)
    for workers in (WORKERS, MORE_WORKERS):
        for size in SIZES:
            yield Cell(f"{_name(size)}, {workers} workers", partial(_all_reduce, size, workers))


BENCH = Bench(
    "scaling",
    "Training on two workers, processes of one machine over Gloo, against one worker; time of an all-reduce by size.",
    _cells,
    settings={"threads of a worker": 1, "batch of a worker": BATCH, "rounds": ROUNDS, "steps": STEPS, "seed": 0},
    packages=("torch", "horovod"),
)
