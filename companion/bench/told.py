"""What `companion.serve.simulate` has to be told of a server, each measured by itself and none from the load that is
to be foretold (2.3.2)."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from companion.bench.servers import Running
from companion.errors import CompanionError

SIZES = (1, 2, 4, 8, 16, 32)  # of batches; between them the cost is taken to be linear
CALLS = 200  # of the model or of nothing, for what is measured within this process
BURST = 0.001  # seconds of Python beside a call


@dataclass(frozen=True)
class Told:
    """All times in seconds; as the arguments of `companion.serve.simulate`."""

    costs: Mapping[int, float]
    http: float
    away: float
    generator: float
    wake: float
    shared: float

    def cost(self, size: int) -> float:
        return float(np.interp(size, list(self.costs), list(self.costs.values())))

    def simulate(self, **options: Any) -> Any:
        """As `companion.serve.simulate`, with a batch no larger than the largest that was timed."""
        from companion.serve import simulate

        return simulate(
            self.cost, http=self.http, away=self.away, generator=self.generator, wake=self.wake, shared=self.shared,
            **{"max_batch_size": max(self.costs)} | options,
        )  # fmt: skip


def form(images: Sequence[bytes]) -> Any:
    """One request for all ``images``, as a `companion.serve.load.Request`."""
    from companion.serve.load import Request

    edge = b"image-file"
    head = b'Content-Disposition: form-data; name="files"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
    parts = b"".join(b"--" + edge + b"\r\n" + head + image + b"\r\n" for image in images)
    return Request(parts + b"--" + edge + b"--\r\n", f"multipart/form-data; boundary={edge.decode()}")


def call_costs(server: Running, request: Callable[[int], Any], seconds: float) -> dict[int, float]:
    """Items in a call → seconds of it, by what the server counts for one client.

    Args:
        server: with nobody else asking.
        request: makes a `companion.serve.load.Request` of so many items.
        seconds: for each size.
    """
    from companion.serve.load import load

    found = {}
    for size in SIZES:
        before = server.metric("model_seconds_sum"), server.metric("model_seconds_count")
        load(server.url, [request(size)], concurrency=1, seconds=seconds)
        after = server.metric("model_seconds_sum"), server.metric("model_seconds_count")
        calls = after[1] - before[1]
        if not calls:
            raise CompanionError(f"{server.url} made no batch of {size}: look at what it logs.")
        found[size] = (after[0] - before[0]) / calls
    return found


def hand_over() -> float:
    """Seconds from one thread to the other in which neither of them works: a batcher with nothing to do."""
    from companion.serve import Batcher
    from companion.serve.load import complete

    async def measure() -> float:
        async with Batcher(list) as batcher:
            began, worked = time.perf_counter(), time.process_time()
            for item in range(CALLS):
                await batcher.submit(item)
            return (time.perf_counter() - began - (time.process_time() - worked)) / CALLS

    return max(0.0, complete(measure()) / 2)  # there and back


def shared(predict: Callable[[list[Any]], Sequence[Any]], images: Sequence[Any], *, calls: int = CALLS) -> float:
    """The share of Python's work in one thread that a call of the model in another waits for, in 0..1.

    Calls with and without a burst of such work beside them take turns; the medians are compared.
    """
    from companion.serve import Batcher
    from companion.serve.load import complete

    taken: dict[bool, list[float]] = {False: [], True: []}

    async def measure() -> None:
        # Where the loop rests there is nothing beside the call.
        async with Batcher(predict, rest=False, on_batch=lambda report: seconds.append(report.seconds)) as batcher:
            for number in range(calls):
                answers = batcher.enqueue(images)
                for _ in range(4):  # the batch begins after two turns of the loop
                    await asyncio.sleep(0)
                if beside := bool(number % 2):
                    end = time.thread_time() + BURST
                    while time.thread_time() < end:
                        pass
                await asyncio.gather(*answers)
                taken[beside].append(seconds.pop())

    seconds: list[float] = []
    complete(measure())
    longer = median(taken[True]) - median(taken[False])
    return min(max(longer / BURST, 0.0), 1.0)
