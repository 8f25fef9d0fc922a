"""What a policy of `companion.serve.batching` brings, computed instead of measured: clients, an event loop and a model
as a list of events (2.3.2). The decisions are those of the real `BatchQueue`; only the clock is made up."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray

from companion.errors import CompanionError
from companion.serve.batching import BatchQueue, Entry, QueueFull


@dataclass(frozen=True)
class Simulated:
    """What the clients saw; the first tenth of the time is left out."""

    throughput: float
    """Answers a second."""
    latencies: NDArray[np.float64]
    """Seconds from the sending of a request to its answer, [N], by the time of the answer."""
    batch_sizes: NDArray[np.int64]
    """Of all calls of the model."""
    rejected: int
    """Requests that found the queue full."""

    def latency(self, percentile: float = 50.0) -> float:
        """A percentile of the latencies in seconds."""
        return float(np.percentile(self.latencies, percentile))


def open_loop(rate: float, seconds: float, seed: int = 0) -> NDArray[np.float64]:
    """When the requests of a Poisson process arrive: seconds, rising, below ``seconds``; on average rate·seconds."""
    random = np.random.default_rng(seed)
    # Given how many they are, the arrivals are uniform.
    return np.sort(random.uniform(0, seconds, size=random.poisson(rate * seconds)))


def simulate(
    cost: Callable[[int], float],
    *,
    clients: int | None = None,
    rate: float | None = None,
    http: float = 0.0002,
    away: float = 0.0005,
    policy: str = "idle",
    max_batch_size: int = 32,
    max_wait_ms: float = 2.0,
    max_queue: int = 1024,
    seconds: float = 10.0,
    seed: int = 0,
) -> Simulated:
    """Run a server that never was.

    Give either ``clients``, who send their next request when they have the answer to the last (a closed loop), or
    ``rate``, the requests a second of many who know nothing of each other (an open loop, Poisson arrivals).

    Args:
        cost: items in a call of the model → seconds it takes.
        clients: how many, from 1.
        rate: requests a second.
        http: seconds of the event loop for each request, half to read it and half to answer. The loop does one thing at
            a time, and the model runs beside it.
        away: seconds from an answer to the client's next request, for its own work and the network both ways. That is
            the average of 0.5 to 1.5 times as much: real clients are not in step.
        policy, max_batch_size, max_wait_ms, max_queue: as those of `Batcher`.
        seconds: of the made-up clock.
        seed: of the arrivals.

    Raises:
        CompanionError: neither or both of clients and rate, or a value that is out of range.
    """
    if (clients is None) == (rate is None):
        raise CompanionError("give either clients (a closed loop) or rate (an open one).")
    if clients is not None and (isinstance(clients, bool) or not isinstance(clients, int) or clients < 1):
        raise CompanionError(f"clients is {clients!r}: give a whole number from 1.")
    for name, value in (("rate", rate), ("seconds", seconds)):
        if value is not None and not 0 < value < math.inf:
            raise CompanionError(f"{name} is {value!r}: give a finite number above 0.")
    for name, value in (("http", http), ("away", away)):
        if not 0 <= value < math.inf:
            raise CompanionError(f"{name} is {value!r}: give a finite number from 0.")
    if clients is not None and http + away == 0 and clients > max_queue:
        raise CompanionError("clients who are refused and ask again at once would never let time pass: give away.")
    queue = BatchQueue(max_batch_size=max_batch_size, max_wait=max_wait_ms / 1e3, max_queue=max_queue, policy=policy)
    events: list[tuple[float, int, Callable[[float], float]]] = []
    order = count()
    latencies: list[float] = []
    sizes: list[int] = []
    rejected, warm = 0, seconds / 10
    timer = -1  # the number of the look that counts: it replaces those before it

    def at(when: float, what: Callable[[float], float]) -> None:
        """Have the loop do something from ``when`` on; it says when it is done with it."""
        heapq.heappush(events, (when, next(order), what))

    def send(when: float) -> None:
        at(when, lambda now: receive(when, now + http / 2))

    def receive(sent: float, now: float) -> float:
        nonlocal rejected
        try:
            queue.add([sent], now)
        except QueueFull:
            rejected += now >= warm
            return answer(sent, now, counts=False)
        wake(now)
        return now

    def wake(now: float) -> None:
        if not queue.busy:
            look_at(now)

    def look(number: int, now: float) -> float:
        if number != timer:
            return now
        found = queue.look(now)
        if isinstance(found, list):
            sizes.append(len(found))
            seconds = cost(len(found))
            at(now + seconds, lambda then: finish(found, seconds, then))
        elif found is not None:
            look_at(found)
        return now

    def look_at(when: float) -> None:
        nonlocal timer
        timer = next(order)
        what: Callable[[float], float] = partial(look, timer)
        heapq.heappush(events, (when, timer, what))

    def finish(batch: list[Entry], seconds: float, now: float) -> float:
        queue.finish(now, seconds)
        for entry in batch:
            at(now, partial(reply, entry.item))
        wake(now)
        return now

    def reply(sent: float, now: float) -> float:
        return answer(sent, now + http / 2)

    def answer(sent: float, now: float, counts: bool = True) -> float:
        if counts and now >= warm:
            latencies.append(now - sent)
        if clients is not None:
            send(now + away * random.uniform(0.5, 1.5))
        return now

    random = np.random.default_rng(seed)
    for start in (np.zeros(clients or 0) if rate is None else open_loop(rate, seconds, seed)).tolist():
        send(start)
    free = 0.0  # when the loop is
    while events and max(events[0][0], free) < seconds:
        when, _, what = heapq.heappop(events)
        free = what(max(when, free))
    return Simulated(len(latencies) / (seconds - warm), np.array(latencies), np.array(sizes), rejected)
