"""The state machine: exact, with a clock made of numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from companion import CompanionError
from companion.serve import BatchQueue, CallCost, QueueFull
from companion.serve.batching import POLICIES


def items(batch):
    return [entry.item for entry in batch]


def taken(queue, now):
    """The next batch, however long the policy lets it wait."""
    while not isinstance(found := queue.look(now), list):
        now = max(found, now)
    return found


def ran(queue, values, now, seconds):
    """Queue values, run what is taken, and say what that was."""
    queue.add(values, now)
    batch = taken(queue, now)
    queue.finish(now + seconds, seconds)
    return items(batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lone_item_goes_in_the_next_turn(policy):
    queue = BatchQueue(policy=policy, max_wait=0.1)
    assert queue.look(5.0) is None
    queue.add(["a"], 5.0)
    assert queue.look(5.0) == 5.0  # once more, for whoever is being read
    assert items(queue.look(5.0)) == ["a"]
    assert queue.busy
    assert queue.look(5.0) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_lone_items_one_after_the_other_never_wait(policy):
    queue = BatchQueue(policy=policy, max_wait=0.1)
    for turn in range(5):
        queue.add([turn], turn * 0.011)
        assert queue.look(turn * 0.011) == turn * 0.011
        assert items(queue.look(turn * 0.011)) == [turn]
        queue.finish(turn * 0.011 + 0.01, 0.01)


def test_what_the_loop_reads_in_the_same_turns_comes_along():
    queue = BatchQueue()
    queue.add([1], 0.0)
    assert queue.look(0.0) == 0.0
    queue.add([2, 3], 0.0)
    assert queue.look(0.0) == 0.0
    assert items(queue.look(0.0)) == [1, 2, 3]


def test_a_busy_worker_gets_nothing_and_then_all_that_queued():
    queue = BatchQueue()
    queue.add([0], 0.0)
    taken(queue, 0.0)
    for number in range(1, 6):
        queue.add([number], 0.1 * number)
        assert queue.look(0.1 * number) is None
    queue.finish(1.0, 1.0)
    assert items(taken(queue, 1.0)) == [1, 2, 3, 4, 5]


def test_two_hundred_with_a_cap_of_thirty_two_are_seven_batches_in_order():
    queue = BatchQueue(max_batch_size=32)
    queue.add(list(range(200)), 0.0)
    sizes, seen = [], []
    while len(queue):
        batch = taken(queue, 0.0)
        queue.finish(0.0, 0.0)
        sizes.append(len(batch))
        seen += items(batch)
    assert sizes == [32] * 6 + [8]
    assert seen == list(range(200))


def add(queue, values, now):
    """A request for each value."""
    for value in values:
        queue.add([value], now)


def test_fixed_waits_for_the_oldest_or_a_full_batch():
    queue = BatchQueue(policy="fixed", max_wait=0.01, max_batch_size=3)
    queue.add([1], 0.0)
    queue.add([2], 0.004)
    assert queue.look(0.004) == 0.004
    assert queue.look(0.005) == pytest.approx(0.01)
    queue.add([3], 0.006)
    assert items(queue.look(0.006)) == [1, 2, 3]
    queue.finish(0.02, 0.014)
    add(queue, [4, 5], 0.02)
    assert queue.look(0.02) == 0.02
    assert queue.look(0.02) == pytest.approx(0.03)
    assert items(queue.look(0.03)) == [4, 5]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lone_request_of_many_does_not_wait_for_others(policy):
    queue = BatchQueue(policy=policy, max_wait=0.1)
    for turn in range(3):
        queue.add(list(range(10)), turn)
        assert queue.look(turn) == turn
        assert len(queue.look(turn)) == 10
        queue.finish(turn + 0.5, 0.5)


def test_fixed_does_not_wait_when_everybody_has_long_gone():
    queue = BatchQueue(policy="fixed", max_wait=0.01)
    add(queue, [1, 2, 3], 0.0)
    taken(queue, 0.0)
    queue.finish(0.05, 0.04)
    assert queue.expected == 3
    queue.add([4], 0.1)
    assert queue.look(0.1) == 0.1
    assert items(queue.look(0.1)) == [4]


def test_fixed_waits_for_those_just_answered():
    queue = BatchQueue(policy="fixed", max_wait=0.01)
    add(queue, [1, 2], 0.0)
    queue.look(0.0)
    assert items(queue.look(0.01)) == [1, 2]
    queue.finish(0.02, 0.01)
    queue.add([3], 0.021)  # one of the two is back
    assert queue.look(0.021) == 0.021
    assert queue.look(0.021) == pytest.approx(0.031)


def test_hold_waits_for_those_just_answered_no_longer_than_a_fifth_of_the_fixed_cost():
    queue = BatchQueue(policy="hold", max_wait=1.0)
    ran(queue, [1], 0.0, 0.012)  # 2 n + 10 milliseconds
    add(queue, range(8), 10.0)
    assert items(taken(queue, 10.0)) == list(range(8))
    queue.finish(10.026, 0.026)
    assert queue.cost.line() == pytest.approx((0.002, 0.010))
    assert queue.expected == 8
    add(queue, range(5), 10.026)
    assert queue.look(10.026) == 10.026
    assert queue.look(10.026) == pytest.approx(10.028)
    add(queue, range(3), 10.027)
    assert queue.look(10.027) == 10.027
    assert len(queue.look(10.027)) == 8  # all are back
    queue.finish(10.053, 0.026)
    queue.add([1], 10.053)
    queue.look(10.053)
    assert queue.look(10.0549) == pytest.approx(10.055)
    assert items(queue.look(10.0551)) == [1]  # nobody else came


def test_hold_is_bounded_by_the_longest_wait():
    queue = BatchQueue(policy="hold", max_wait=0.001)
    ran(queue, [1], 0.0, 0.1)
    add(queue, [1, 2, 3], 1.0)
    taken(queue, 1.0)
    queue.finish(1.1, 0.1)
    queue.add([1], 1.1)
    queue.look(1.1)
    assert queue.look(1.1) == pytest.approx(1.101)


def test_one_that_left_the_queue_is_not_run():
    queue = BatchQueue()
    first, second, third = queue.add([1, 2, 3], 0.0)
    assert queue.discard(second)
    assert not queue.discard(second)
    assert taken(queue, 0.0) == [first, third]
    assert not queue.discard(first)  # it runs


def test_an_item_whose_bucket_cannot_be_told_is_its_senders_trouble():
    queue = BatchQueue(bucket=len)
    queue.add(["a"], 0.0)
    with pytest.raises(TypeError):
        queue.add([7], 0.0)
    assert items(taken(queue, 0.0)) == ["a"]


def test_a_call_that_says_nothing_of_others_is_not_counted():
    queue = BatchQueue()
    queue.add([1], 0.0)
    taken(queue, 0.0)
    queue.finish(9.0, None)
    assert queue.cost.line() == (0.0, 0.0)


def test_a_full_queue_takes_all_of_a_request_or_none():
    queue = BatchQueue(max_queue=4, max_batch_size=2)
    ran(queue, [0], 0.0, 0.5)
    ran(queue, [0, 0], 1.0, 0.6)
    queue.add([1, 2, 3], 2.0)
    with pytest.raises(QueueFull, match="3 items wait already, and 4 may") as full:
        queue.add([4, 5], 2.0)
    assert full.value.retry_after == pytest.approx(2 * 0.6)  # two calls of two
    assert len(queue) == 3
    queue.add([4], 2.0)
    with pytest.raises(CompanionError, match="may have 4 items, not 5: send several"):
        BatchQueue(max_queue=4).add([0] * 5, 0.0)


def test_buckets_share_a_batch_and_the_oldest_decides():
    queue = BatchQueue(bucket=len, max_batch_size=3)
    queue.add(["aa", "b", "cc", "d", "ee", "ff"], 0.0)
    batches = []
    while len(queue):
        batches.append(items(taken(queue, 0.0)))
        queue.finish(0.0, 0.0)
    assert batches == [["aa", "cc", "ee"], ["b", "d"], ["ff"]]


@settings(deadline=None)
@given(st.floats(1e-6, 1.0), st.floats(0.0, 1.0), st.lists(st.integers(1, 64), min_size=2, max_size=30, unique=True))
def test_the_cost_of_a_call_is_found_from_calls(slope, fixed, sizes):
    cost = CallCost()
    for size in sizes:
        cost.observe(size, slope * size + fixed)
    assert cost.line() == pytest.approx((slope, fixed), abs=1e-9, rel=1e-6)


def test_the_cost_is_numpys_fit_and_never_below_zero():
    cost, random = CallCost(), np.random.default_rng(0)
    sizes, seconds = np.arange(1, 20), 0.01 + 0.002 * np.arange(1, 20) + random.normal(0, 0.003, 19)
    for size, each in zip(sizes.tolist(), seconds.tolist(), strict=True):
        cost.observe(size, each)
    assert cost.line() == pytest.approx(tuple(np.polyfit(sizes, seconds, 1)))
    steep = CallCost()
    for size in (1, 2, 3):
        steep.observe(size, size**3)
    assert steep.line() == (6.0, 0.0)  # a line through the means (2, 12) and the origin
    flat = CallCost()
    flat.observe(1, 2.0)
    flat.observe(9, 1.0)
    assert flat.line() == (0.0, 1.5)


def test_the_cost_follows_a_machine_that_slows_down():
    cost = CallCost()
    for seconds in [1.0] * 10 + [2.0] * 60:
        cost.observe(4, seconds)
    assert cost.seconds(4) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0: give a whole number from 1"),
        ({"max_batch_size": True}, "max_batch_size is True"),
        ({"max_queue": 1.5}, "max_queue is 1.5"),
        ({"max_wait": -1}, "the longest wait is -1: give a number from 0"),
        ({"max_wait": float("nan")}, "the longest wait is nan"),
        ({"policy": "eager"}, "no policy 'eager': choose one of idle, fixed, hold"),
    ],
)
def test_wrong_values_are_refused(options, said):
    with pytest.raises(CompanionError, match=said):
        BatchQueue(**options)


def test_a_call_is_short_if_those_before_were():
    queue = BatchQueue()
    assert ran(queue, [1, 2], 0.0, 0.01) == [1, 2]
    queue.add([3, 4], 1.0)
    taken(queue, 1.0)
    assert queue.short()
    queue.finish(2.0, 1.0)
    queue.add([5], 3.0)
    taken(queue, 3.0)
    assert not queue.short()


class Traffic(RuleBasedStateMachine):
    """Anything may happen in any order: nobody is lost, doubled, overtaken or kept waiting for ever."""

    def __init__(self):
        super().__init__()
        self.now, self.next = 0.0, 0
        self.queue = None

    @precondition(lambda self: self.queue is None)
    @rule(policy=st.sampled_from(sorted(POLICIES)), cap=st.integers(1, 5))
    def begin(self, policy, cap):
        self.queue = BatchQueue(policy=policy, max_batch_size=cap, max_wait=0.5, max_queue=12)
        self.waiting, self.running = [], []

    @precondition(lambda self: self.queue is not None)
    @rule(count=st.integers(1, 6))
    def arrive(self, count):
        values = list(range(self.next, self.next + count))
        try:
            entries = self.queue.add(values, self.now)
        except QueueFull:
            assert len(self.waiting) + count > 12
            return
        assert items(entries) == values
        self.next += count
        self.waiting += entries

    @precondition(lambda self: self.queue is not None and self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        entry = data.draw(st.sampled_from(self.waiting))
        assert self.queue.discard(entry)
        self.waiting.remove(entry)

    @precondition(lambda self: self.queue is not None)
    @rule()
    def look(self):
        found = self.queue.look(self.now)
        if isinstance(found, list):
            assert not self.running
            assert found == self.waiting[: self.queue.max_batch_size]
            self.waiting, self.running = self.waiting[len(found) :], found
        elif found is None:
            assert self.running or not self.waiting
        else:
            # The wait of the oldest has an end, and so has that of the worker.
            bound = max(self.waiting[0].arrived, self.queue.freed) + self.queue.max_wait
            assert self.now <= found <= max(bound, self.now)

    @precondition(lambda self: self.queue is not None and self.running)
    @rule(seconds=st.floats(0.0, 1.0))
    def finish(self, seconds):
        self.now += seconds
        self.queue.finish(self.now, seconds)
        self.running = []

    @precondition(lambda self: self.queue is not None)
    @rule(seconds=st.floats(0.0, 1.0))
    def passes(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.queue is not None)
    @invariant()
    def adds_up(self):
        assert len(self.queue) == len(self.waiting) <= 12
        assert self.queue.busy == bool(self.running)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(deadline=None)
