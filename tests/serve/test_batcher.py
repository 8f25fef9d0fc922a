"""The state machine in an event loop, with a real thread that runs the model."""

import asyncio
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from companion import CompanionError
from companion.serve import Batcher, BatcherClosed, DeadlineExceeded, ItemFailed, QueueFull


class Model:
    """Doubles numbers; notes its batches; waits at a gate, if it is shut."""

    def __init__(self, *, bad=(), every=None):
        self.batches, self.bad, self.every = [], set(bad), every
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, items):
        self.batches.append(list(items))
        self.entered.release()
        assert self.gate.wait(60)
        if self.bad & set(items) or (self.every and len(self.batches) % self.every == 0):
            raise ValueError("one of these")
        return [2 * item for item in items]


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def loop(request, monkeypatch):
    """Every test on both event loops; their clocks differ."""
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
        monkeypatch.setattr(asyncio, "run", uvloop.run)


def run(scenario, model=None, **options):
    """What ``scenario(batcher, model)`` returns, within a minute."""
    model = Model() if model is None else model

    async def main():
        async with Batcher(model, **options) as batcher:
            return await scenario(batcher, model)

    async def bounded():
        return await asyncio.wait_for(main(), 60)

    return asyncio.run(bounded())


async def occupied(batcher, model):
    """A task whose item is in the model, which holds it until the gate opens."""
    model.gate.clear()
    task = asyncio.create_task(batcher.submit(0))
    await asyncio.to_thread(model.entered.acquire)
    return task


def test_one_item():
    async def scenario(batcher, model):
        return await batcher.submit(21)

    assert run(scenario) == 42


@pytest.mark.parametrize("policy", ["idle", "fixed", "hold"])
def test_two_hundred_at_once_each_get_their_own_answer(policy):
    async def scenario(batcher, model):
        async def client(number):
            return [await batcher.submit(number * 1000 + turn) for turn in range(5)]

        answers = await asyncio.gather(*map(client, range(200)))
        return answers, model.batches

    answers, batches = run(scenario, policy=policy, max_batch_size=32)
    assert answers == [[2 * (number * 1000 + turn) for turn in range(5)] for number in range(200)]
    assert sum(map(len, batches)) == 1000
    assert max(map(len, batches)) <= 32


def test_a_request_of_many_is_split_and_joined_in_order():
    async def scenario(batcher, model):
        return await batcher.submit_many(range(200)), [len(batch) for batch in model.batches]

    answers, sizes = run(scenario, max_batch_size=32)
    assert answers == [2 * number for number in range(200)]
    assert sizes == [32] * 6 + [8]


def test_a_request_of_none():
    async def scenario(batcher, model):
        return await batcher.submit_many([])

    assert run(scenario) == []


def test_what_arrives_while_the_model_works_is_the_next_batch():
    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        rest = [asyncio.create_task(batcher.submit(number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        model.gate.set()
        await asyncio.gather(first, *rest)
        return model.batches

    assert run(scenario) == [[0], [1, 2, 3, 4, 5]]


def test_one_bad_item_fails_alone():
    async def scenario(batcher, model):
        return await batcher.submit_many(range(8)), len(model.batches)

    answers, calls = run(scenario, Model(bad={5}))
    assert [answer for number, answer in enumerate(answers) if number != 5] == [0, 2, 4, 6, 8, 12, 14]
    assert isinstance(answers[5], ItemFailed)
    assert isinstance(answers[5].__cause__, ValueError)
    assert str(answers[5]) == "the model cannot answer this item: ValueError."
    assert calls == 1 + 2 * 3  # 8, then halves of 4, of 2, and the two singles


def test_an_exception_in_place_of_an_answer_is_that_items():
    async def scenario(batcher, model):
        return await batcher.submit_many([1, 2, 3])

    calls = []

    def model(items):
        calls.append(items)
        return [KeyError("two") if item == 2 else item for item in items]

    first, second, third = run(scenario, model)
    assert (first, third, len(calls)) == (1, 3, 1)
    assert isinstance(second.__cause__, KeyError)


@pytest.mark.parametrize("answers", [[1], [], [1, 2, 3]])
def test_a_model_that_gives_another_number_of_answers_is_told(answers):
    async def scenario(batcher, model):
        return await batcher.submit_many([1, 2])

    found = run(scenario, lambda items: answers if len(items) == 2 else [])
    assert all(isinstance(answer, ItemFailed) for answer in found)
    assert "0 answers to 1 items" in str(found[0].__cause__)


def test_a_model_that_raises_every_tenth_call_keeps_nobody_from_an_answer():
    async def scenario(batcher, model):
        answers = [await batcher.submit_many([number, number + 1]) for number in range(50)]
        return answers, len(model.batches)

    answers, calls = run(scenario, Model(every=10))
    assert answers == [[2 * number, 2 * number + 2] for number in range(50)]
    assert calls > 50


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, MemoryError])
def test_a_model_that_raises_for_good_leaves_the_worker_alive(error):
    async def scenario(batcher, model):
        answers = await batcher.submit_many([1, 2, 3])
        batcher.predict = lambda items: items  # as in a reload
        return answers, await batcher.submit(4)

    def model(items):
        raise error

    failed, answer = run(scenario, model)
    assert all(isinstance(each.__cause__, error) for each in failed)
    assert answer == 4


def test_whoever_is_cancelled_in_the_queue_is_not_run():
    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        gone = [asyncio.create_task(batcher.submit(number)) for number in range(1, 200)]
        stays = asyncio.create_task(batcher.submit(1000))
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        model.gate.set()
        return await first, await stays, model.batches

    assert run(scenario) == (0, 2000, [[0], [1000]])


def test_whoever_is_cancelled_in_a_batch_does_not_disturb_it():
    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        after = asyncio.create_task(batcher.submit(3))
        model.gate.set()
        return await after

    assert run(scenario) == 6


def test_a_cancelled_request_of_many_takes_all_of_them_along():
    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        many = asyncio.create_task(batcher.submit_many(range(1, 50)))
        await asyncio.sleep(0)
        assert len(batcher.queue) == 49
        many.cancel()
        with suppress(asyncio.CancelledError):
            await many
        await asyncio.sleep(0)
        left = len(batcher.queue)
        model.gate.set()
        await first
        return left, model.batches

    assert run(scenario) == (0, [[0]])


def test_too_late_in_the_queue_never_reaches_the_model():
    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        with pytest.raises(DeadlineExceeded, match="not there in time"):
            await batcher.submit(1, timeout=0.01)
        model.gate.set()
        return await first, await batcher.submit(2, timeout=10), model.batches

    assert run(scenario) == (0, 4, [[0], [2]])


def test_too_late_in_the_model():
    async def scenario(batcher, model):
        model.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(1, timeout=0.01)
        model.gate.set()
        return await batcher.submit(2)

    assert run(scenario) == 4


def test_a_full_queue_refuses_and_recovers():
    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        waits = asyncio.create_task(batcher.submit_many([1, 2, 3]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.submit_many([4, 5])
        model.gate.set()
        await first
        return await waits, await batcher.submit_many([4, 5])

    assert run(scenario, max_queue=4) == ([2, 4, 6], [8, 10])


def test_the_end_of_the_block_answers_what_was_accepted():
    async def main():
        model = Model()
        async with Batcher(model) as batcher:
            first = await occupied(batcher, model)
            rest = [asyncio.create_task(batcher.submit(number)) for number in range(1, 40)]
            await asyncio.sleep(0)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0)
            with pytest.raises(BatcherClosed, match="takes no more"):
                await batcher.submit(99)
            model.gate.set()
            await closing
        return await asyncio.gather(first, *rest)

    assert asyncio.run(main()) == [2 * number for number in range(40)]
    assert not any(thread.name == "batcher" and thread.is_alive() for thread in _settled_threads())


def _settled_threads():
    for thread in threading.enumerate():
        if thread.name == "batcher":
            thread.join(5)
    return threading.enumerate()


def test_a_grace_that_ends_answers_those_who_still_wait():
    async def main():
        model = Model()
        batcher = await Batcher(model).__aenter__()
        running = await occupied(batcher, model)
        waiting = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0)
        await batcher.close(grace=0.01)
        for task in (waiting, running):
            with pytest.raises(BatcherClosed, match="before this item was answered"):
                await task
        model.gate.set()
        return model.batches

    assert asyncio.run(main()) == [[0]]


def test_what_has_been_closed_need_not_wait_for_the_model_any_more():
    """As in a block whose end follows a grace that was too short for the model's last call."""

    async def main():
        model = Model()
        async with Batcher(model) as batcher:
            task = await occupied(batcher, model)
            await batcher.close(grace=0.01)
        at_work = batcher.queue.busy
        model.gate.set()
        await asyncio.gather(task, return_exceptions=True)
        return at_work

    async def bounded():
        return await asyncio.wait_for(main(), 30)

    assert asyncio.run(bounded())


def test_a_grace_that_ends_when_some_have_just_given_up():
    async def main():
        model = Model()
        batcher = await Batcher(model).__aenter__()
        await occupied(batcher, model)
        futures = batcher.enqueue([1, 2, 3])
        closing = asyncio.create_task(batcher.close(grace=0.0))
        futures[0].cancel()
        await closing
        model.gate.set()
        return [future.cancelled() or type(future.exception()) for future in futures]

    assert asyncio.run(main()) == [True, BatcherClosed, BatcherClosed]


def test_a_loop_that_ends_before_the_model_does(capfd):
    """The thread has nobody to tell, and says nothing."""
    model = Model()

    async def main():
        batcher = await Batcher(model).__aenter__()
        running = await occupied(batcher, model)
        await batcher.close(grace=0.0)
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    model.gate.set()
    _settled_threads()
    assert capfd.readouterr().err == ""


def test_before_it_is_opened():
    async def main():
        with pytest.raises(BatcherClosed):
            await Batcher(Model()).submit(1)

    asyncio.run(main())


def test_each_call_is_reported():
    reports = []

    times = iter(range(1000))  # each look at the clock is a second later

    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        rest = asyncio.create_task(batcher.submit_many([1, 2, 3]))
        await asyncio.sleep(0)
        model.gate.set()
        await first
        await rest

    run(scenario, Model(bad={2}), on_batch=reports.append, clock=lambda: next(times))
    one, three = reports
    assert (one.size, one.failed) == (1, 0)
    assert (three.size, three.failed) == (3, 1)
    assert len(set(three.waited)) == 1
    assert len(three.waited) == 3
    assert three.waited[0] > one.waited[0] > 0
    assert one.seconds >= 1


def test_the_length_of_the_queue_is_told_when_it_changes():
    told = []

    async def scenario(batcher, model):
        first = await occupied(batcher, model)
        futures = batcher.enqueue([1, 2, 3])
        futures[0].cancel()
        late = asyncio.create_task(batcher.submit(4, timeout=0.01))
        await asyncio.gather(late, return_exceptions=True)
        before = list(told)
        model.gate.set()
        await asyncio.gather(first, *futures[1:])
        return before

    assert run(scenario, on_queue=told.append) == [1, 0, 3, 2, 3, 2]
    assert told == [1, 0, 3, 2, 3, 2, 0]


def test_a_closed_batcher_has_no_queue():
    told = []

    async def scenario(batcher, model):
        await occupied(batcher, model)
        futures = batcher.enqueue([1, 2])
        await batcher.close(grace=0.0)
        model.gate.set()
        await asyncio.gather(*futures, return_exceptions=True)

    run(scenario, on_queue=told.append)
    assert told == [1, 0, 2, 0]


@pytest.mark.parametrize("policy", ["idle", "fixed", "hold"])
def test_a_batch_takes_a_few_looks_and_an_idle_batcher_none(policy):
    """No polling, and no spinning until a clock moves on."""

    async def scenario(batcher, model):
        looks = []
        look = batcher._look
        batcher._look = lambda: (looks.append(None), look())
        for number in range(50):
            await asyncio.gather(batcher.submit(number), batcher.submit(number))
        busy = len(looks)
        await asyncio.sleep(0.05)
        return busy, len(looks) - busy

    busy, idle = run(scenario, policy=policy, max_wait_ms=1.4)
    assert busy <= 50 * 8
    assert idle == 0


@pytest.mark.parametrize("value", [-1, float("nan"), "2", True])
def test_wrong_waits_are_refused(value):
    with pytest.raises(CompanionError, match="max_wait_ms is"):
        Batcher(Model(), max_wait_ms=value)


class Counting:
    """Notes how many turns the loop makes during each call, which takes ``seconds``."""

    def __init__(self, seconds):
        self.seconds, self.turns, self.during = seconds, 0, []

    def __call__(self, items):
        before = self.turns
        time.sleep(self.seconds)
        self.during.append(self.turns - before)
        return items

    async def turn(self):
        while True:
            await asyncio.sleep(0)
            self.turns += 1


@pytest.mark.parametrize(
    ("seconds", "options", "rests"),
    [
        (0.002, {}, True),
        (0.05, {}, False),
        (0.002, {"rest": False}, False),
        (0.002, {"policy": "hold"}, False),
        (0.002, {"policy": "fixed"}, False),
    ],
)
def test_the_loop_rests_while_a_short_call_runs(seconds, options, rests):
    async def scenario(batcher, model):
        turning = asyncio.create_task(model.turn())
        for item in range(5):
            assert await batcher.submit(item) == item
        turning.cancel()
        # The first call may be anything, and a thread may sleep longer than it was told to.
        return sorted(model.during[1:])[1]

    turns = run(scenario, Counting(seconds), **options)
    assert (turns == 0) == rests


def test_the_loop_does_not_rest_for_a_call_that_does_not_end():
    async def scenario(batcher, model):
        assert await batcher.submit(1) == 2
        model.gate.clear()
        answer = batcher.submit(2)
        # The call ends only when the loop goes on and opens the gate.
        asyncio.get_running_loop().call_later(0.001, model.gate.set)
        return await answer, await batcher.submit(3)

    assert run(scenario) == (4, 6)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pthread_kill")
def test_ctrl_c_while_the_loop_rests_loses_no_batch():
    def predict(items):
        if items == ["again"]:
            time.sleep(0.005)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # who is in the middle of the wait
            time.sleep(0.01)
        return items

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # whose first Ctrl-C would cancel
        running = runner.get_loop()
        batcher = running.run_until_complete(Batcher(predict).__aenter__())
        assert running.run_until_complete(batcher.submit("once")) == "once"
        (answer,) = running.run_until_complete(queued(batcher, "again"))
        with pytest.raises(KeyboardInterrupt):
            running.run_until_complete(answer)
        running.run_until_complete(asyncio.wait_for(batcher.close(), 30))
        assert answer.result() == "again"


async def queued(batcher, item):
    return batcher.enqueue([item])
