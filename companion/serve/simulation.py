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
from companion.serve.batching import REST, TICK, BatchQueue, Entry, QueueFull

INSTANT = 1e-6  # seconds; the fastest of real clients take longer


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
        """A percentile of the latencies in seconds; not a number if there is none."""
        return float(np.percentile(self.latencies, percentile)) if len(self.latencies) else math.nan


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
    generator: float = 0.0,
    wake: float = 0.0,
    shared: float = 0.0,
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
        cost: items in a call of the model → seconds it takes, above 0; such as `CallCost.seconds`.
        clients: how many, from 1.
        rate: requests a second.
        http: seconds of the event loop for each request: a quarter to read it, a quarter to queue it a turn later, and
            half to answer. The loop does one thing at a time, and rests while a short call of the model runs; a long
            one runs beside it.
        away: seconds from an answer to the client's next request, for its own work and the network both ways. That is
            the average of 0.5 to 1.5 times as much: real clients are not in step.
        generator: seconds that a load generator works for each request, half to send it and half to take the answer.
            All clients share it, and it does one thing at a time; 0 for clients with machines of their own.
        wake: seconds until the model's thread hears of a batch, and again until the loop hears of the answers.
        shared: the share of the loop's work that a call of the model which runs meanwhile waits for, in 0..1: 1 where
            both need the one lock of the interpreter.
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
    for name, value in (("http", http), ("away", away), ("generator", generator), ("wake", wake)):
        if not 0 <= value < math.inf:
            raise CompanionError(f"{name} is {value!r}: give a finite number from 0.")
    if not 0 <= shared <= 1:
        raise CompanionError(f"shared is {shared!r}: give a share from 0 to 1.")
    if clients is not None and http + away + generator < INSTANT and clients > max_queue:
        raise CompanionError("clients who are refused and ask again at once would never let time pass: give away.")

    def seconds_of(size: int) -> float:
        if not 0 < (found := cost(size)) < math.inf:  # or time would stand still
            raise CompanionError(f"the model takes {found!r} s for a batch of {size}: give a cost above 0.")
        return found

    one = seconds_of(1)
    queue = BatchQueue(max_batch_size=max_batch_size, max_wait=max_wait_ms / 1e3, max_queue=max_queue, policy=policy)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order = count()
    latencies: list[float] = []
    sizes: list[int] = []
    rejected, warm = 0, seconds / 10
    # The event loop does what is ready, then reads what has come meanwhile, which makes more ready: that is a turn.
    ready: list[Callable[[float], float]] = []
    inbox: list[Callable[[float], float]] = []
    asleep, looks, timer = True, False, 0
    worked = 0.0  # seconds of the loop
    generator_free = 0.0

    def at(when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(order), what))

    def arrive(what: Callable[[float], float], now: float) -> None:
        """Something that the loop reads when it has time."""
        nonlocal asleep
        inbox.append(what)
        if asleep:
            asleep = False
            at(now, partial(work, inbox, True))

    def work(todo: list[Callable[[float], float]], reads: bool, began: float) -> None:
        nonlocal asleep, worked
        now, doing = began, todo.copy()
        todo.clear()
        for what in doing:
            before, now = now, what(now)
            worked += now - before
        asleep = reads and not ready
        if not asleep:
            at(now, partial(work, ready if reads else inbox, not reads))

    def generate(what: Callable[[float], None], now: float) -> None:
        """The load generator does one thing after the other, half a request each."""
        nonlocal generator_free
        generator_free = max(now, generator_free) + generator / 2
        what(generator_free)

    def ask(due: float | None, now: float) -> None:
        began = now - generator / 2
        at(now, partial(arrive, partial(read, began if due is None else due)))

    def read(due: float, now: float) -> float:
        ready.append(partial(add, due))
        return now + http / 4

    def add(due: float, now: float) -> float:
        nonlocal rejected
        now += http / 4
        try:
            queue.add([due], now)
        except QueueFull:
            rejected += now >= warm
            ready.append(partial(reply, due, False))
        else:
            wake_up(now)
        return now

    def wake_up(now: float) -> float:
        nonlocal looks, timer
        timer += 1  # so that one that was set is for nobody
        if not looks and not queue.busy:
            looks = True
            ready.append(look)
        return now

    def look(now: float) -> float:
        nonlocal looks, worked
        looks = False
        found = queue.look(now)
        if isinstance(found, list):
            sizes.append(len(found))
            taken = seconds_of(len(found))
            ends = now + wake + taken + wake
            awake = min(ends, now + REST) if queue.short() else now
            if ends <= awake:
                queue.finish(ends, taken)
                ready.extend(partial(reply, entry.item, True) for entry in found)
                return wake_up(ends)
            at(ends, partial(end, found, taken, worked))
            worked -= awake - now  # rest is no work
            return awake
        if found == now:
            wake_up(now)
        elif found is not None:
            at(max(found, now + TICK), partial(arrive, partial(ring, timer)))
        return now

    def ring(number: int, now: float) -> float:
        return wake_up(now) if number == timer else now

    def end(batch: list[Entry], taken: float, before: float, now: float) -> None:
        if (meanwhile := shared * (worked - before)) > 0:
            at(now + meanwhile, partial(end, batch, taken + meanwhile, worked))
        else:
            arrive(partial(hear, batch, taken), now)

    def hear(batch: list[Entry], taken: float, now: float) -> float:
        ready.append(partial(finish, batch, taken))
        return now

    def finish(batch: list[Entry], taken: float, now: float) -> float:
        queue.finish(now, taken)
        wake_up(now)  # before the answers
        ready.extend(partial(reply, entry.item, True) for entry in batch)
        return now

    def reply(due: float, right: bool, now: float) -> float:
        now += http / 2
        at(now, partial(generate, partial(answer, due, right)))
        return now

    def answer(due: float, right: bool, now: float) -> None:
        if right and warm <= now < seconds:
            latencies.append(now - due)
        if clients is not None:
            at(now + away * random.uniform(0.5, 1.5), partial(generate, partial(ask, None)))

    random = np.random.default_rng(seed)
    if clients is None:
        for arrival in open_loop(rate or 0.0, seconds, seed).tolist():
            at(arrival, partial(generate, partial(ask, arrival)))
    else:
        # One after the other: were they in step from the start, nothing might ever bring them out of it.
        for start in random.uniform(0, clients * (http + one), clients).tolist():
            at(start, partial(generate, partial(ask, None)))
    while events and events[0][0] < seconds:
        when, _, what = heapq.heappop(events)
        what(when)
    return Simulated(len(latencies) / (seconds - warm), np.array(latencies), np.array(sizes), rejected)
