"""Gather what arrives one by one into batches, without web or torch: a state machine, and asyncio around it (2.3.2).

`BatchQueue` decides and knows no clock: whoever drives it says what time it is. `Batcher` drives it with asyncio and a
thread, `companion.serve.simulation` with a list of events, so both form the same batches.
"""

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from companion.errors import CompanionError

HELD = 0.2  # of a call's fixed cost: longer, and a call for those who came would have been over sooner
TICK = 0.001  # seconds: shorter waits uvloop takes for none
REST = 0.02  # seconds: while a call that is shorter runs, the event loop rests
REMEMBERED = 0.1  # the weight of the newest call among those of its size


class QueueFull(CompanionError):
    """Too many are waiting."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds until the queue will have been worked off, going by what calls took so far."""


class DeadlineExceeded(CompanionError):
    """The answer was not there in time."""


class BatcherClosed(CompanionError):
    """No more items are taken."""


class ItemFailed(CompanionError):
    """The model cannot answer this item; why is its ``__cause__``."""


class CallCost:
    """What a call of the model takes: seconds = a·n + b for n items."""

    def __init__(self) -> None:
        self._mean: dict[int, tuple[int, float]] = {}  # size → how often, seconds

    def observe(self, size: int, seconds: float) -> None:
        times, mean = self._mean.get(size, (0, 0.0))
        # The sizes are kept apart, so that one that became rare still says what it cost.
        weight = max(1 / (times + 1), REMEMBERED)
        self._mean[size] = times + 1, mean + weight * (seconds - mean)

    def line(self) -> tuple[float, float]:
        """a and b in seconds, neither below 0, by least squares over the sizes seen; of one size, all is a's."""
        sizes = list(self._mean)
        seconds = [mean for _, mean in self._mean.values()]
        if not sizes:
            return 0.0, 0.0
        n, t = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        spread = sum((size - n) ** 2 for size in sizes)
        slope = sum((s - n) * (each - t) for s, each in zip(sizes, seconds, strict=True)) / spread if spread else t / n
        slope = min(max(slope, 0.0), t / n)  # so that b is not below 0
        return slope, t - slope * n

    def seconds(self, size: int) -> float:
        """What a call for so many is expected to take."""
        slope, fixed = self.line()
        return slope * size + fixed


@dataclass(eq=False, slots=True)
class Entry:
    """An item in the queue."""

    item: Any
    arrived: float
    """Seconds, by the driver's clock."""
    request: int
    """Items of one request have one number."""
    alone: bool
    """Nobody else was there when its request came, and nobody was about to return."""
    bucket: Hashable = None
    future: Any = None
    """The driver's, to answer."""
    timer: Any = None
    """The driver's, at the deadline."""


class BatchQueue:
    """Who waits, who runs, and when the next batch begins. Times are seconds of one clock, given with each call.

    The worker is free or runs one batch. A batch is formed when the worker is free, never earlier, so that whoever
    comes while it works joins the next one. What is read in the same turn of the event loop comes along: `look` takes
    a batch only when the turn before brought nobody new. The policies:

    - ``idle``: take what is queued.
    - ``fixed``: wait until ``max_wait`` after the oldest came, or the batch is full.
    - ``hold``: as idle; but clients that wait for an answer before they ask again would split into groups that take
      turns, so wait for those just answered, at most a fifth of a call's fixed cost and ``max_wait``.

    A request that is alone waits in none of them, be it of one item or of many.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 32,
        max_wait: float = 0.002,
        max_queue: int = 1024,
        policy: str = "idle",
        bucket: Callable[[Any], Hashable] | None = None,
    ) -> None:
        """
        Args:
            max_batch_size: no batch is larger.
            max_wait: seconds that the policies ``fixed`` and ``hold`` wait at most.
            max_queue: items that may wait at most.
            policy: ``idle``, ``fixed`` or ``hold``.
            bucket: item → what it shares with those it may be batched with, such as a class of length. The oldest
                item decides whose turn it is, so nobody starves. None batches all with all.

        Raises:
            CompanionError: a value that is out of range, or no such policy.
        """
        for name, value in (("max_batch_size", max_batch_size), ("max_queue", max_queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompanionError(f"{name} is {value!r}: give a whole number from 1.")
        if isinstance(max_wait, bool) or not isinstance(max_wait, int | float) or not 0 <= max_wait < math.inf:
            raise CompanionError(f"the longest wait is {max_wait!r}: give a number from 0.")
        if policy not in POLICIES:
            raise CompanionError(f"there is no policy {policy!r}: choose one of {', '.join(POLICIES)}.")
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait, max_queue
        self.cost = CallCost()
        self.expected = 0
        """Requests that waited for an answer when the last batch ended, those of the batch included."""
        self.freed = -math.inf
        """When the worker became free."""
        self._wait_until = POLICIES[policy]
        self._policy = policy
        self._bucket = bucket
        self._waiting: dict[Entry, None] = {}  # in the order of arrival; a dict, to leave from the middle
        self._requests = 0
        self._running: list[Entry] = []
        self._grown = False
        """Whether somebody came since the last look."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether the worker runs a batch."""
        return bool(self._running)

    @property
    def running(self) -> list[Entry]:
        """The batch that the worker runs."""
        return self._running

    @property
    def oldest(self) -> Entry:
        return next(iter(self._waiting))

    def add(self, items: Sequence[Any], now: float) -> list[Entry]:
        """Queue the items of one request, all or none.

        Raises:
            QueueFull: there is no room for them now.
            CompanionError: there never is.
        """
        if len(items) > self.max_queue:
            raise CompanionError(f"a request may have {self.max_queue} items, not {len(items)}: send several.")
        if len(self._waiting) + len(items) > self.max_queue:
            batches = math.ceil((len(self._running) + len(self._waiting)) / self.max_batch_size)
            raise QueueFull(
                f"{len(self._waiting)} items wait already, and {self.max_queue} may: send this again later.",
                batches * self.cost.seconds(self.max_batch_size),
            )
        # Whoever was just answered could be back within max_wait, if at all.
        alone = not self._waiting and not self._running and (self.expected < 2 or now - self.freed > self.max_wait)
        self._requests += 1
        bucket = self._bucket or _one_for_all
        entries = [Entry(item, now, self._requests, alone, bucket(item)) for item in items]
        self._waiting.update(dict.fromkeys(entries))
        self._grown = True
        return entries

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue, whose answer nobody wants any more; False if it is not in there."""
        return entry in self._waiting and self._waiting.pop(entry) is None

    def clear(self) -> list[Entry]:
        """Take out all entries."""
        taken, self._waiting = list(self._waiting), {}
        return taken

    def look(self, now: float) -> list[Entry] | float | None:
        """What to do: run this batch, look again at that time (``now``: in the next turn), or await the next event."""
        if self._running or not self._waiting:
            return None
        full = len(self._waiting) >= self.max_batch_size
        if self._grown and not full:
            self._grown = False
            return now
        if not full and (until := self._wait_until(self, now)) > now:
            return until
        alike = (entry for entry in self._waiting if entry.bucket == self.oldest.bucket)
        self._running = list(islice(alike, self.max_batch_size))
        for entry in self._running:
            del self._waiting[entry]
        return self._running

    def short(self) -> bool:
        """Whether the batch that runs is expected to be over so soon that the event loop had better rest meanwhile.

        Both would run on cores of their own, but there is one interpreter, which they hand to and fro. With a small
        network on ONNX Runtime that cost more than the work side by side brought; on torch it was level. Only
        under ``idle``: the other policies have to see who comes while a call runs.
        """
        return self._policy == "idle" and self.cost.seconds(len(self._running)) <= REST

    def finish(self, now: float, seconds: float | None) -> None:
        """The batch that `look` gave has been run.

        Args:
            now: as everywhere.
            seconds: that the model took; None if they say nothing of other calls.
        """
        if seconds is not None:
            self.cost.observe(len(self._running), seconds)
        self.expected = self.waiting_requests + len({entry.request for entry in self._running})
        self._running, self.freed = [], now

    @property
    def waiting_requests(self) -> int:
        """Requests with items in the queue."""
        return len({entry.request for entry in self._waiting})


def _one_for_all(item: Any) -> Hashable:
    return None


def _idle(queue: BatchQueue, now: float) -> float:
    return now


def _fixed(queue: BatchQueue, now: float) -> float:
    alone = queue.oldest.alone and queue.waiting_requests == 1
    return now if alone else queue.oldest.arrived + queue.max_wait


def _hold(queue: BatchQueue, now: float) -> float:
    if queue.waiting_requests >= queue.expected:
        return now
    return queue.freed + min(queue.max_wait, HELD * queue.cost.line()[1])


POLICIES: dict[str, Callable[[BatchQueue, float], float]] = {"idle": _idle, "fixed": _fixed, "hold": _hold}
"""Name → the time until which a batch that is not full waits."""


@dataclass(frozen=True)
class BatchReport:
    """One call of the model."""

    size: int
    waited: tuple[float, ...]
    """Seconds in the queue, of each item."""
    seconds: float
    """Of the call, with all repetitions after errors."""
    failed: int
    """Items without an answer."""


class Batcher:
    """Answers items one by one with a function that answers many at once, in a thread of its own.

    ::

        async with Batcher(predict, max_batch_size=32) as batcher:
            answer = await batcher.submit(item)

    An item that makes ``predict`` raise fails alone: the batch is halved and tried again until the culprit is found,
    which costs about 2·log2(n) more calls. At the end of the ``async with`` block, what was accepted is answered.

    Under the policy ``idle`` the event loop rests while a call runs that is expected to take 20 ms or less, so whatever
    else it has to do comes up to 20 ms late, deadlines too.
    """

    def __init__(
        self,
        predict: Callable[[list[Any]], Sequence[Any]],
        *,
        max_batch_size: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
        policy: str = "idle",
        bucket: Callable[[Any], Hashable] | None = None,
        on_batch: Callable[[BatchReport], None] | None = None,
        on_queue: Callable[[int], None] | None = None,
        rest: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            predict: items → an answer for each, in their order. An exception in place of an answer is that item's.
            max_batch_size, max_queue, policy, bucket: as those of `BatchQueue`.
            max_wait_ms: milliseconds that the policies ``fixed`` and ``hold`` wait at most.
            on_batch: called after each batch, in the event loop.
            on_queue: called with how many wait, whenever that has changed, in the event loop.
            rest: whether the loop may rest while a short call runs; not where it has more to do, such as a second
                batcher.
            clock: seconds. (Event loops have clocks of their own, uvloop's of whole milliseconds.)

        Raises:
            CompanionError: a value that is out of range, or no such policy.
        """
        if isinstance(max_wait_ms, bool) or not isinstance(max_wait_ms, int | float) or not 0 <= max_wait_ms < math.inf:
            raise CompanionError(f"max_wait_ms is {max_wait_ms!r}: give a number from 0.")
        self.predict = predict
        """May be replaced at any time: the next batch runs the new one."""
        self.queue = BatchQueue(
            max_batch_size=max_batch_size,
            max_wait=max_wait_ms / 1e3,
            max_queue=max_queue,
            policy=policy,
            bucket=bucket,
        )
        self._on_batch, self._on_queue, self._clock = on_batch, on_queue, clock
        self.rest, self._resting = rest, False
        self._open = False
        self._soon = False
        """Whether there will be a look in the next turn of the loop."""
        self._later: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._jobs: SimpleQueue[tuple[list[Entry], float] | asyncio.Future[None] | None] = SimpleQueue()
        self._ended: SimpleQueue[tuple[list[Entry], float, float, list[Any]]] = SimpleQueue()
        Thread(target=self._work, name="batcher", daemon=True).start()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, *, grace: float | None = None) -> None:
        """Take nothing more, answer what was accepted, and end the thread.

        Args:
            grace: seconds for that; then those without an answer get a `BatcherClosed`, and the thread is left to its
                last call. None takes the time it needs.
        """
        self._open = False
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            for entry in (*self.queue.running, *self.queue.clear()):
                if not entry.future.done():
                    entry.future.set_exception(BatcherClosed("the batcher was closed before this item was answered."))
            self._note_queue()
            self._idle.set()  # nobody has anything to wait for any more, least of all whoever closes it again
        finally:
            self._jobs.put(None)

    async def submit(self, item: Any, *, timeout: float | None = None) -> Any:
        """The answer to ``item``.

        A caller that is cancelled takes its item out of the queue, so that the model does not run for nobody.

        Args:
            item: what ``predict`` takes a list of.
            timeout: seconds until it is too late, in the queue or in the model; None waits.

        Raises:
            QueueFull, DeadlineExceeded, BatcherClosed, ItemFailed: as their names say.
        """
        (future,) = self.enqueue([item], timeout=timeout)
        return await future

    async def submit_many(self, items: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
        """The answers to all ``items`` in their order, in as many batches as it takes.

        Arguments and errors are those of `submit`; but an item that failed has its `ItemFailed` in its place.
        """
        answers = await asyncio.gather(*self.enqueue(items, timeout=timeout), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ItemFailed):
                raise answer
        return answers

    async def replace(self, predict: Callable[[list[Any]], Sequence[Any]]) -> None:
        """Run the next batch with this function; returns when the one before runs no more."""
        self.predict = predict
        passed = self._loop.create_future()
        self._jobs.put(passed)
        await passed

    def enqueue(self, items: Sequence[Any], *, timeout: float | None = None) -> list[asyncio.Future[Any]]:
        """Queue the items of one request, all or none: a future for each. To cancel one takes it out of the queue."""
        if not self._open:
            raise BatcherClosed("this batcher is closed: it takes no more items.")
        entries = self.queue.add(items, self._clock())
        for entry in entries:
            entry.future = self._loop.create_future()
            entry.future.add_done_callback(lambda future, entry=entry: self._settled(entry))
            if timeout is not None:
                entry.timer = self._loop.call_later(timeout, self._expire, entry)
        if entries:
            self._note_queue()
            self._idle.clear()
            self._wake()
        return [entry.future for entry in entries]

    def _settled(self, entry: Entry) -> None:
        """Answered, too late or cancelled, whichever came first."""
        if entry.timer is not None:
            entry.timer.cancel()
        if self.queue.discard(entry):
            self._note_queue()
            self._check_idle()

    def _expire(self, entry: Entry) -> None:
        if not entry.future.done():
            entry.future.set_exception(DeadlineExceeded("the answer was not there in time."))

    def _wake(self) -> None:
        """Look in the next turn of the loop, when it has read what there is to read."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if not self._soon and not self.queue.busy and len(self.queue):
            self._soon = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._soon = False
        now = self._clock()
        found = self.queue.look(now)
        if isinstance(found, list):
            self._note_queue()
            if self.rest and self.queue.short():
                self._run_and_rest((found, now))
            else:
                self._jobs.put((found, now))
        elif found == now:
            self._wake()
        elif found is not None:
            self._later = self._loop.call_later(max(found - now, TICK), self._wake)

    def _run_and_rest(self, job: tuple[list[Entry], float]) -> None:
        """Keep the loop from running until the call has ended, or does not end."""
        try:
            self._resting = True
            self._jobs.put(job)
            self._hear(REST)
        finally:  # after Ctrl-C, too
            self._resting = False
            self._hear()  # what ended just now, when the thread thought that somebody waits for it

    def _hear(self, seconds: float = 0.0) -> None:
        """Finish the batch whose call has ended, or ends within these seconds."""
        try:
            ended = self._ended.get(seconds > 0, seconds)
        except Empty:
            return
        self._finish(*ended)

    def _work(self) -> None:
        """The thread."""
        while (job := self._jobs.get()) is not None:
            if isinstance(job, asyncio.Future):
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(_pass, job)
                continue
            batch, formed = job
            began = self._clock()
            answers = _answers(self.predict, [entry.item for entry in batch])
            seconds = self._clock() - began
            self._ended.put((batch, formed, seconds, answers))
            if not self._resting:
                with suppress(RuntimeError):  # the loop has ended, and with it those who asked
                    self._loop.call_soon_threadsafe(self._hear)

    def _finish(self, batch: list[Entry], formed: float, seconds: float, answers: list[Any]) -> None:
        failed = sum(isinstance(answer, BaseException) for answer in answers)
        self.queue.finish(self._clock(), None if failed else seconds)
        if not self._resting:
            self._wake()  # before the answers, so that the model works while they are written
        for entry, answer in zip(batch, answers, strict=True):
            if entry.future.done():  # meanwhile too late, or cancelled
                continue
            if isinstance(answer, BaseException):
                entry.future.set_exception(answer)
            else:
                entry.future.set_result(answer)
        self._wake()
        self._check_idle()
        if self._on_batch is not None:
            waited = tuple(formed - entry.arrived for entry in batch)
            self._on_batch(BatchReport(len(batch), waited, seconds, failed))

    def _note_queue(self) -> None:
        if self._on_queue is not None:
            self._on_queue(len(self.queue))

    def _check_idle(self) -> None:
        if not self.queue.busy and not len(self.queue):
            self._idle.set()


def _pass(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _answers(predict: Callable[[list[Any]], Sequence[Any]], items: list[Any]) -> list[Any]:
    """An answer for each item, or the `ItemFailed` of one that ``predict`` cannot answer; nothing is raised."""
    try:
        answers = list(predict(items))
        if len(answers) != len(items):
            raise CompanionError(f"the model gave {len(answers)} answers to {len(items)} items.")
    except BaseException as error:  # the thread goes on, whatever the model does
        if len(items) == 1:
            return [_failure(error)]
        half = len(items) // 2
        return _answers(predict, items[:half]) + _answers(predict, items[half:])
    return [_failure(answer) if isinstance(answer, BaseException) else answer for answer in answers]


def _failure(error: BaseException) -> ItemFailed:
    failure = ItemFailed(f"the model cannot answer this item: {type(error).__name__}.")
    failure.__cause__ = error
    return failure
