import copy
import gc
import statistics
from collections import Counter
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import benchmark

from companion import CompanionError
from companion.metrics.latency import (
    BLOCK,
    Latency,
    Ratio,
    Throughput,
    _ratio,
    compare_latency,
    inference,
    measure_latency,
    measure_throughput,
    training_step,
)


class Machine:
    """A clock that only moves when a function made here is called, and a log of those calls."""

    def __init__(self, slowdown=0.0):
        self.now, self.slowdown, self.log = 0.0, slowdown, []

    def clock(self):
        return self.now

    def function(self, *seconds, name=""):
        """Takes each of ``seconds`` once, then the last for good, times 1 + slowdown × the number of calls so far."""
        each = chain(seconds, repeat(seconds[-1]))

        def call():
            self.now += next(each) * (1 + self.slowdown * len(self.log))
            self.log.append(name)

        return call


def latency_of(*samples, calls=1, first=0.0):
    return Latency(tuple(samples), calls, first, 1, "cpu")


# What a latency says of its samples


def test_statistics_by_hand():
    latency = latency_of(0.4, 0.1, 0.3, 0.2)
    # Sorted, they lie at the places 0, 1, 2, 3; a share p is at the place 3p, on the line between its neighbours.
    assert latency.median == latency.p50 == pytest.approx(0.25)
    assert latency.quartiles == pytest.approx((0.175, 0.325))
    assert latency.iqr == pytest.approx(0.15)
    assert latency.p95 == pytest.approx(0.385)
    assert latency.p99 == pytest.approx(0.397)
    assert (latency.mean, latency.minimum, latency.maximum) == pytest.approx((0.25, 0.1, 0.4))
    assert latency.per_second == pytest.approx(4)


@given(st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=50))
def test_percentiles_are_those_of_the_standard_library(samples):
    expected = statistics.quantiles(samples, n=100, method="inclusive")
    found = [latency_of(*samples).percentile(percent) for percent in range(1, 100)]
    assert found == pytest.approx(expected)


def test_an_outlier_is_kept_and_does_not_move_the_median():
    machine = Machine()
    function = machine.function(*[1.0] * 30, 100.0, 1.0)
    latency = measure_latency(function, samples=100, clock=machine.clock)
    assert latency.samples.count(100.0) == 1
    assert latency.median == 1
    assert latency.maximum == 100
    assert latency.mean == pytest.approx((99 + 100) / 100)
    assert latency.p99 == pytest.approx(1 + 0.01 * 99)  # the place 98.01, between the last two


def test_drift_is_the_last_third_over_the_first():
    assert latency_of(1, 1, 1, 5, 5, 5, 2, 3, 2).drift == 2
    assert latency_of(3).drift == 1
    machine = Machine(slowdown=0.01)
    assert measure_latency(machine.function(1.0), samples=90, clock=machine.clock).drift > 1.3


def test_text():
    assert str(latency_of(1.2e-3, 1.2e-3, 1.2e-3)) == (
        "1.200 ms (quartiles 1.200 ms to 1.200 ms, p95 1.200 ms; 3 samples, 1 thread, cpu)"
    )
    assert "1 sample of 64 calls, 1 thread" in str(latency_of(2e-6, calls=64))


# How it is measured


def test_the_first_call_and_the_warm_up_are_no_samples():
    machine = Machine()
    function = machine.function(50.0, 7.0, 7.0, 1.0)
    latency = measure_latency(function, seconds=1, samples=5, warmup=2, clock=machine.clock)
    assert latency.first_call == 50
    assert latency.samples == (1.0,) * 5
    assert len(machine.log) == 1 + 2 + 5


def test_samples_are_in_the_order_measured():
    machine = Machine()
    function = machine.function(9.0, 9.0, 3.0, 1.0, 2.0, 5.0, 4.0)
    assert measure_latency(function, samples=5, warmup=1, clock=machine.clock).samples == (3, 1, 2, 5, 4)


def test_it_measures_as_long_as_it_is_told():
    machine = Machine()
    assert len(measure_latency(machine.function(0.25), seconds=10, samples=5, clock=machine.clock).samples) == 40
    assert len(measure_latency(machine.function(0.25), seconds=1, samples=50, clock=machine.clock).samples) == 50


def test_a_fast_function_is_timed_in_blocks():
    machine = Machine()
    each = 2.0**-16
    latency = measure_latency(machine.function(each), seconds=0.01, clock=machine.clock)
    assert latency.calls_per_sample == 8  # 8 × 15.3 µs is the first power of two above 100 µs
    assert each * 8 >= BLOCK > each * 4
    assert set(latency.samples) == {each}
    assert latency.first_call == each


def test_an_interrupted_warm_up_does_not_make_the_blocks_short():
    machine = Machine()
    function = machine.function(2.0**-16, 1.0, 2.0**-16)  # the first block of the warm-up seems long enough
    assert measure_latency(function, seconds=0.01, clock=machine.clock).calls_per_sample == 8


def test_functions_that_take_about_as_long_have_blocks_and_leads_of_as_many_calls():
    machine = Machine()
    seconds = {"fast": 1e-6, "below": 0.9 * BLOCK / 2, "above": 1.1 * BLOCK / 2, "slow": 3 * BLOCK}
    compared = compare_latency(
        {name: machine.function(each, name=name) for name, each in seconds.items()}, rounds=8, clock=machine.clock
    )
    # Alone, "above" would need 2: but by it alone would "below", in blocks of 4, seem to differ.
    blocks = {name: latency.calls_per_sample for name, latency in compared.latencies.items()}
    assert blocks == {"fast": 128, "below": 4, "above": 4, "slow": 1}
    calls, rounds = Counter(machine.log), len(compared.latencies["slow"].samples)
    assert calls["above"] - 1 - 3 * (1 + 2) == calls["below"] - 1 - 3 * (1 + 2 + 4) == rounds * (4 + 12)


def test_a_sample_is_what_torch_measures():
    ours, theirs = Machine(), Machine()
    latency = measure_latency(ours.function(0.5), samples=3, clock=ours.clock)
    measured = benchmark.Timer("f()", globals={"f": theirs.function(0.5)}, timer=theirs.clock).timeit(3)
    assert latency.median == measured.median


def test_the_runner_can_be_replaced():
    asked = []

    def runner(function, number):
        asked.append(number)
        return 2.0 * number

    latency = measure_latency(lambda: None, seconds=7, samples=1, runner=runner)
    assert latency.samples == (2.0,) * 4  # 7 s are over after the fourth
    assert set(asked) == {1}


def test_real_functions_with_and_without_torch():
    for function in (lambda: sum(range(1000)), lambda: torch.ones(100) @ torch.ones(100)):
        latency = measure_latency(function, seconds=0.01, samples=5)
        assert len(latency.samples) >= 5
        assert 0 < latency.minimum <= latency.median <= latency.maximum
        assert latency.device == "cpu"


def test_threads_are_set_and_put_back():
    before, seen = torch.get_num_threads(), set()
    latency = measure_latency(lambda: seen.add(torch.get_num_threads()), seconds=0.01, threads=before + 1)
    assert seen == {before + 1}
    assert latency.threads == before + 1
    assert torch.get_num_threads() == before


def test_the_garbage_collector_rests_meanwhile_and_then_goes_on():
    seen = set()
    measure_latency(lambda: seen.add(gc.isenabled()), seconds=0.01)
    assert seen == {False}
    assert gc.isenabled()


@pytest.mark.parametrize("calls", [0, 2, 10, 60])
def test_an_error_passes_through_and_leaves_nothing_changed(calls):
    before, done = torch.get_num_threads(), []

    def function():
        if len(done) == calls:
            raise KeyError("mine")
        done.append(1)

    with pytest.raises(KeyError, match="mine"):
        compare_latency({"a": lambda: None, "b": function}, threads=before + 1)
    assert torch.get_num_threads() == before
    assert gc.isenabled()


# Comparisons


def test_a_ratio_by_hand():
    machine = Machine()
    functions = {"a": machine.function(1.0), "b": machine.function(1.25), "c": machine.function(0.5)}
    found = compare_latency(functions, clock=machine.clock)
    assert found.baseline == "a"
    assert found.ratios == {"b": Ratio(1.25, 1.25, 1.25), "c": Ratio(0.5, 0.5, 0.5)}
    assert [ratio.noise for ratio in found.ratios.values()] == [False, False]
    assert [ratio.verdict for ratio in found.ratios.values()] == ["1.25x slower", "2.00x faster"]
    assert found.ratios["c"].speedup == 2
    assert [latency.median for latency in found.latencies.values()] == [1, 1.25, 0.5]
    assert str(found) == (
        "   median    quartiles             ratio [95 % interval]\n"
        "a  1.000 s   1.000 s to 1.000 s    1                      baseline\n"
        "b  1.250 s   1.250 s to 1.250 s    1.250 [1.250, 1.250]   1.25x slower\n"
        "c  500.0 ms  500.0 ms to 500.0 ms  0.500 [0.500, 0.500]   2.00x faster"
    )


def test_any_function_can_be_the_baseline():
    machine = Machine()
    functions = {"a": machine.function(1.0), "b": machine.function(1.25)}
    found = compare_latency(functions, baseline="b", clock=machine.clock)
    assert found.ratios == {"a": Ratio(0.8, 0.8, 0.8)}


def test_text_of_a_ratio():
    assert str(Ratio(1.1, 1.08, 1.13)) == "1.100 [1.080, 1.130]"
    assert str(Ratio(1.001, 0.98, 1.02)) == "1.001 [0.980, 1.020]: noise"
    assert Ratio(1.001, 0.98, 1.02).verdict == "no difference: noise"
    assert Ratio(1.0, 1.0, 1.0).noise


def test_slow_first_calls_and_outliers_do_not_move_a_ratio():
    machine = Machine()
    slow_start = machine.function(500.0, *[1.0] * 20, 90.0, 90.0, 1.0)  # one of two calls in a round is timed
    found = compare_latency({"a": slow_start, "b": machine.function(1.0)}, rounds=50, clock=machine.clock)
    assert found.latencies["a"].first_call == 500
    assert found.latencies["a"].maximum == 90
    assert found.ratios["b"] == Ratio(1, 1, 1)


def test_drift_of_the_machine_cancels():
    machine = Machine(slowdown=0.01)
    found = compare_latency(
        {"a": machine.function(1.0), "b": machine.function(1.1)}, rounds=101, seconds=1e-9, clock=machine.clock
    )
    assert found.latencies["a"].drift > 1.5
    assert found.ratios["b"].value == pytest.approx(1.1, rel=0.01)
    assert 1 < found.ratios["b"].low < 1.1 < found.ratios["b"].high


def test_every_round_has_every_function_once_each_after_a_call_of_its_own_that_is_not_timed():
    machine = Machine()
    functions = {name: machine.function(1.0, name=name) for name in "abc"}
    compare_latency(functions, rounds=64, seconds=1, warmup=2, clock=machine.clock)
    warm, measured = machine.log[:9], machine.log[9:]
    assert warm == [*"aaabbbccc"]  # a first call and two more
    assert measured[::2] == measured[1::2]
    rounds = ["".join(measured[start : start + 6 : 2]) for start in range(0, len(measured), 6)]
    assert len(rounds) == 64
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    for start in range(0, 64, 8):  # so that no place favours anybody
        assert Counter(rounds[start : start + 8]) == Counter(order[::-1] for order in rounds[start : start + 8])
    assert rounds[:8] != rounds[8:16]


def test_the_seed_chooses_the_order_and_nothing_else_is_drawn_from():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    logs = []
    for seed in (1, 1, 2):
        machine = Machine()
        compare_latency({name: machine.function(1.0, name=name) for name in "ab"}, seed=seed, clock=machine.clock)
        logs.append(machine.log)
    assert logs[0] == logs[1] != logs[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_samples_of_one_round_belong_together():
    machine = Machine(slowdown=1e-3)
    found = compare_latency({"a": machine.function(1.0), "b": machine.function(2.0)}, clock=machine.clock)
    ratios = np.divide(found.latencies["b"].samples, found.latencies["a"].samples)
    assert np.allclose(ratios, 2, rtol=0.01)
    assert found.ratios["b"].value == pytest.approx(np.exp(np.median(np.log(ratios))))


def test_seconds_are_those_of_all_functions_and_their_untimed_calls_together():
    machine = Machine()
    found = compare_latency(
        {"a": machine.function(1.0), "b": machine.function(3.0)}, seconds=400, rounds=6, clock=machine.clock
    )
    assert len(found.latencies["a"].samples) == 50  # a round takes 2 × 1 s + 2 × 3 s


@pytest.mark.parametrize("rounds", [7, 20, 51, 200])
def test_the_interval_is_the_bootstraps_one_rank_wider(rounds):
    rng = np.random.default_rng(rounds)
    times = rng.lognormal(0, 0.3, rounds)
    found = _ratio(latency_of(*times), latency_of(*[1.0] * rounds), np.random.default_rng(0))
    resampled = np.median(rng.choice(times, size=(20_000, rounds)), axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    order = np.sort(times)
    ranks = np.searchsorted(order, [found.low, low, high, found.high])
    assert found.value == pytest.approx(np.exp(np.median(np.log(times))))
    # For an even number a resample's median lies between two ranks, so the plain interval may be one rank off.
    assert 0 <= ranks[1] - ranks[0] <= 2
    assert 0 <= ranks[3] - ranks[2] <= 2


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=6, max_size=40),
    st.floats(0.01, 100),
)
def test_properties_of_a_ratio(pairs, scale):
    a, b = (latency_of(*column) for column in zip(*pairs, strict=True))
    ratio = _ratio(a, b, np.random.default_rng(0))
    assert ratio.low <= ratio.value <= ratio.high
    scaled = _ratio(latency_of(*(scale * time for time in a.samples)), b, np.random.default_rng(0))
    found = (scaled.value, scaled.low, scaled.high)
    assert found == pytest.approx((scale * ratio.value, scale * ratio.low, scale * ratio.high))
    assert _ratio(b, a, np.random.default_rng(0)).value == pytest.approx(1 / ratio.value)


def noisy_runner(kind, seed):
    """Times of a machine whose noise is of this kind; it is as long as its exponent is 0."""
    rng = np.random.default_rng(seed)
    calls, state = 0, 0.0

    def run(function, number):
        nonlocal calls, state
        calls += 1
        if kind == "independent":
            state = 0.05 * rng.normal()
        elif kind == "heavy tails":
            state = float(np.clip(0.02 * rng.standard_cauchy(), -5, 5))
        elif kind == "interrupted":
            state = 0.02 * rng.normal() + (rng.random() < 0.3) * np.log(3)
        elif kind == "slow waves":
            state = 0.95 * state + 0.05 * rng.normal()
        elif kind == "zigzag":
            state = -0.8 * state + 0.03 * rng.normal()
        elif kind == "drift":
            state = 0.005 * calls + 0.03 * rng.normal()
        elif kind == "two speeds" and rng.random() < 0.02:
            state = 0.5 - state
        elif kind == "every fourth":
            state = 0.1 * (calls // 2 % 4 == 0) + 0.03 * rng.normal()
        return number * function() * np.exp(state)

    return run


NOISES = ["independent", "heavy tails", "interrupted", "slow waves", "zigzag", "drift", "two speeds", "every fourth"]


@pytest.mark.parametrize("kind", NOISES)
def test_equal_functions_are_told_apart_in_at_most_one_comparison_of_twenty(kind):
    functions = {"a": lambda: 1e-3, "b": lambda: 1e-3}
    found = [
        compare_latency(functions, rounds=41, seconds=1e-9, seed=seed, runner=noisy_runner(kind, 1000 + seed))
        for seed in range(300)
    ]
    # Of 300, 15 are one in twenty; by luck there are more than 24 once in a hundred times. The seeds are fixed.
    assert sum(not comparison.ratios["b"].noise for comparison in found) <= 24
    assert all(comparison.ratios["b"].low < 1.1 for comparison in found)


@pytest.mark.parametrize("kind", NOISES)
def test_ten_percent_are_found_in_noise(kind):
    functions = {"a": lambda: 1e-3, "b": lambda: 1.1e-3}
    ratios = [
        compare_latency(functions, rounds=99, seconds=1e-9, seed=seed, runner=noisy_runner(kind, seed)).ratios["b"]
        for seed in range(100)
    ]
    assert sum(ratio.low > 1 for ratio in ratios) >= 95
    assert sum(ratio.low <= 1.1 <= ratio.high for ratio in ratios) >= 90


def test_whoever_comes_second_is_slower_and_that_is_no_difference():
    for seed in range(20):
        place = 0

        def runner(function, number):
            nonlocal place
            place += 1
            return 2.0 if place % 4 in (0, 3) else 1.0  # an untimed and a timed block of one, then of the other

        # First call and warm-up of both take 4 runs, so that a round begins at a multiple of 4.
        found = compare_latency(
            {"a": lambda: None, "b": lambda: None}, rounds=48, seconds=1, warmup=1, seed=seed, runner=runner
        )
        times = np.array([latency.samples for latency in found.latencies.values()])
        assert (times.sum(0) == 3).all()  # one of each pair came second
        assert found.ratios["b"].noise
        assert found.ratios["b"].value == 1


# Throughput


def test_throughput_by_hand():
    machine = Machine()
    shapes = []

    def function(batch):
        shapes.append(tuple(batch.shape))
        machine.now += 1 + 0.5 * len(batch)

    found = measure_throughput(function, torch.zeros(1, 3), batch_sizes=(1, 4), rounds=7, clock=machine.clock)
    assert [each.batch_size for each in found] == [1, 4]
    assert [each.latency.median for each in found] == [1.5, 3.0]
    assert [each.per_second for each in found] == pytest.approx([1 / 1.5, 4 / 3])
    assert str(found[1]) == "batch 4: 1.3 samples per second, 3.000 s"
    measured = shapes[8:][::2]  # after 4 calls to warm up for each size, and without the untimed ones
    assert all({*measured[i : i + 2]} == {(1, 3), (4, 3)} for i in range(0, 14, 2))  # interleaved
    assert measured[:14] != measured[:2] * 7  # in changing order


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_samples_are_repeated_to_the_batch_size(convert):
    batches = {}
    example = convert([[1.0, 2.0], [3.0, 4.0]])
    found = measure_throughput(
        lambda batch: batches.setdefault(len(batch), batch), example, batch_sizes=(1, 3), rounds=2, seconds=0.01
    )
    assert len(found) == 2
    assert all(type(batch) is type(example) for batch in batches.values())
    assert batches[1].tolist() == [[1, 2]]
    assert batches[3].tolist() == [[1, 2], [3, 4], [1, 2]]


def test_the_layout_of_a_batch_is_that_of_the_example():
    example = torch.rand(1, 3, 8, 8).to(memory_format=torch.channels_last)
    seen = set()
    measure_throughput(
        lambda batch: seen.add(batch.is_contiguous(memory_format=torch.channels_last)),
        example,
        batch_sizes=(4,),
        seconds=0.01,
    )
    assert seen == {True}


def test_throughput_of_a_network():
    model = Probe()
    (found,) = measure_throughput(model, torch.rand(1, 3), batch_sizes=[2], seconds=0.01)
    assert isinstance(found, Throughput)
    assert Probe.seen == {(False, True, (2, 3))}
    assert model.training


class Probe(nn.Module):
    """Notes how it is called: in training mode, in inference mode, with which shape."""

    seen: set = set()  # noqa: RUF012

    def __init__(self):
        super().__init__()
        Probe.seen = set()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        Probe.seen.add((self.training, torch.is_inference_mode_enabled(), tuple(x.shape)))
        return self.norm(x)


# What there is to measure of a network


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_inference_is_a_forward_pass_in_evaluation_mode_that_changes_nothing():
    model, x = Probe(), torch.rand(4, 3)
    before = state_of(model)
    result = inference(model, x)()
    assert Probe.seen == {(False, True, (4, 3))}
    assert model.training
    assert same(state_of(model), before)
    assert torch.equal(result, copy.deepcopy(model).eval()(x))
    assert torch.equal(result, inference(model, (x,))())
    assert torch.equal(result, inference(model, {"x": x})())


def test_inference_does_not_follow_later_changes():
    model, x = nn.Linear(3, 2), torch.rand(1, 3)
    function = inference(model, x)
    expected = model(x)
    nn.init.zeros_(model.weight)
    assert torch.equal(function(), expected)


def test_training_step_does_forward_backward_and_an_optimizer_step_on_a_copy():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0)).eval()
    x, target = torch.rand(8, 3), torch.arange(8) % 4
    before, gradients = state_of(model), []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    step = training_step(model, x, target, optimizer=Recorder)
    losses = [step() for _ in range(3)]
    assert same(state_of(model), before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    reference = copy.deepcopy(model).train()
    expected = nn.functional.cross_entropy(reference(x), target)
    expected.backward()
    assert all(
        loss == pytest.approx(expected.item()) for loss in losses
    )  # a learning rate of 0: every step is the same
    assert len(gradients) == 3
    for found in gradients:
        for one, parameter in zip(found, reference.parameters(), strict=True):
            assert torch.allclose(one, parameter.grad)


def test_training_step_with_other_losses():
    model, x, y = nn.Linear(3, 2), torch.rand(5, 3), torch.rand(5, 2)
    outputs = model(x)
    assert training_step(model, x)() == pytest.approx(outputs.square().mean().item())
    assert training_step(model, x, y, loss=nn.functional.l1_loss)() == pytest.approx((outputs - y).abs().mean().item())
    assert training_step(model, x, loss=torch.sum)() == pytest.approx(outputs.sum().item())


def test_frozen_parameters_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    training_step(model, torch.rand(5, 3))()
    with pytest.raises(CompanionError, match="nothing to train"):
        training_step(model.requires_grad_(False), torch.rand(5, 3))


# Bad input


def nothing():
    pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Latency((), 1, 0.0, 1, "cpu"), "needs samples"),
        (lambda: measure_latency(nothing, samples=0), "samples must be a whole number of 1 or more, not 0"),
        (lambda: measure_latency(nothing, threads=0), "threads must be a whole number of 1 or more, not 0"),
        (lambda: measure_latency(nothing, threads=1.5), "threads must be a whole number of 1 or more, not 1.5"),
        (lambda: measure_latency(nothing, warmup=0), "warmup must be a whole number"),
        (lambda: measure_latency(nothing, seconds=0), "seconds must be a positive number, not 0"),
        (lambda: measure_latency(nothing, seconds=float("nan")), "seconds must be a positive number, not nan"),
        (lambda: measure_latency(nothing, seconds=float("inf")), "seconds must be a positive number, not inf"),
        (lambda: measure_latency(torch.ones(1)), "without arguments is needed, not Tensor"),
        (lambda: measure_latency(nothing, device="warp"), "no device 'warp' here"),
        (lambda: measure_latency(nothing, clock=lambda: 0.0), "clock did not move"),
        (lambda: measure_latency(nothing, runner=lambda f, n, times=[1.0] * 4: times.pop() if times else 0.0), "clock"),
        (lambda: compare_latency({}), "no functions to compare"),
        (lambda: compare_latency({"a": nothing}, baseline="b"), "the baseline 'b' is none of the functions: a"),
        (lambda: compare_latency({"a": nothing}, rounds=5), "rounds must be at least 6, not 5"),
        (lambda: compare_latency({"a": nothing}, threads=0), "threads must be"),
        (lambda: compare_latency({"a": nothing, "b": 3}), "not int: use a lambda"),
        (lambda: measure_throughput(nothing, torch.ones(1, 2), batch_sizes=()), "batch_sizes must be"),
        (lambda: measure_throughput(nothing, torch.ones(1, 2), batch_sizes=(4, 0)), "not \\(4, 0\\)"),
        (lambda: measure_throughput(nothing, torch.ones(0, 2)), "one or more samples"),
        (lambda: measure_throughput(nothing, torch.tensor(1.0)), "one or more samples"),
        (lambda: measure_throughput(nothing, [1, 2]), "one or more samples"),
        (lambda: measure_throughput(nothing, torch.ones(1, 2), threads=0), "threads must be"),
        (lambda: inference(nn.Linear(2, 2), [1, 2]), "example must be a tensor"),
        (lambda: training_step(nn.Linear(2, 2), None), "example must be a tensor"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(CompanionError, match=message) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_one_function_alone_has_nothing_to_be_compared_with():
    found = compare_latency({"only": nothing}, seconds=0.01)
    assert found.ratios == {}
    assert "baseline" in str(found)


@pytest.mark.gpu
def test_the_clock_waits_for_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    a = torch.rand(4096, 4096, device="cuda")
    one = measure_latency(lambda: a @ a, seconds=0.1, device="cuda")
    ten = measure_latency(lambda: [a @ a for _ in range(10)], seconds=0.1, device="cuda")
    assert ten.device == "cuda:0"
    assert 5 < ten.median / one.median < 20  # started and not awaited, they would take nearly the same
