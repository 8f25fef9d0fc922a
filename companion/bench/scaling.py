"""What a second worker brings, and what its messages cost (2.2.1)."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from companion import models
from companion.bench.runner import Bench, Cell
from companion.metrics.results import Row, Value, summarize
from companion.train.parallel import average_gradients, launch, naive_all_reduce, ring_all_reduce
from companion.units import KIB, MIB

NETWORK, BATCH = "cifar_resnet20", 32
WORKERS = 2
ROUNDS = 15  # of all alternatives, in a random order
STEPS = 5  # of training, one after the other in a round
SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB)
SHORTEST = MIB  # smaller tensors are sent again and again, so many bytes in all
TIMEOUT = 3600.0

ALONE = "one worker"
EXCHANGES: dict[str, Callable[[nn.Module], Any] | None] = {
    ALONE: None,
    "nothing": None,
    "DistributedDataParallel": None,
    "average_gradients": average_gradients,
    "average_gradients, our ring": partial(average_gradients, all_reduce=ring_all_reduce),
}
ALL_REDUCES: dict[str, Callable[[torch.Tensor], Any]] = {
    "Gloo": distributed.all_reduce,
    "our ring": ring_all_reduce,
    "by way of worker 0": naive_all_reduce,
}

Seconds = dict[str, list[float]]


def _alternate(functions: Mapping[str, Callable[[], Any]], rounds: int, calls: int) -> Seconds:
    """Seconds a call, by round: each function in turn, all workers together."""
    found: Seconds = {name: [] for name in functions}
    for i in range(-1, rounds):  # the first only warms up
        for name in random.Random(i).sample(sorted(functions), len(functions)):
            distributed.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                functions[name]()
            if i >= 0:
                found[name].append((time.perf_counter() - start) / calls)
    return found


def _step(name: str, network: str) -> Callable[[], Any]:
    """A training step of this worker."""
    if name == ALONE and distributed.get_rank():
        return lambda: None
    model = models.create(network, seed=0).train()
    forward = DistributedDataParallel(model) if name == "DistributedDataParallel" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    exchange = EXCHANGES[name]
    inputs, targets = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(forward(inputs), targets).backward()
        if exchange is not None:
            exchange(model)
        optimizer.step()

    return step


def _train(network: str, rounds: int, steps: int) -> Seconds:
    return _alternate({name: _step(name, network) for name in EXCHANGES}, rounds, steps)


def _send(size: int, rounds: int) -> Seconds:
    values = torch.zeros(size // 4)
    functions = {name: partial(function, values) for name, function in ALL_REDUCES.items()}
    return _alternate(functions, rounds, max(1, SHORTEST // size))


def _slowest(found: list[Seconds]) -> Seconds:
    """A round is over when its last worker is done."""
    return {name: [max(times) for times in zip(*(one[name] for one in found), strict=True)] for name in found[0]}


def _training() -> list[Row]:
    seconds = _slowest(launch(_train, WORKERS, NETWORK, ROUNDS, STEPS, backend="gloo", timeout=TIMEOUT))
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
        }
        rows.append(Row(keys, values))
    return rows


def _name(size: int) -> str:
    return f"all-reduce of {size // KIB:,} KiB"


def _all_reduce(size: int) -> list[Row]:
    seconds = _slowest(launch(_send, WORKERS, size, ROUNDS, backend="gloo", timeout=TIMEOUT))
    rows = []
    for name, times in seconds.items():
        values: dict[str, Value] = {
            "time": summarize([1e3 * each for each in times], "ms"),
            "times Gloo's": summarize([a / b for a, b in zip(times, seconds["Gloo"], strict=True)], ""),
        }
        rows.append(Row({"what": _name(size), "workers": WORKERS, "exchanged by": name}, values))
    return rows


def _cells() -> Iterator[Cell]:
    yield Cell("training", _training)
    for size in SIZES:
        yield Cell(_name(size), partial(_all_reduce, size))


BENCH = Bench(
    "scaling",
    "Training on two workers, processes of one machine over Gloo, against one worker; time of an all-reduce by size.",
    _cells,
    settings={"threads of a worker": 1, "batch of a worker": BATCH, "rounds": ROUNDS, "steps": STEPS, "seed": 0},
)
