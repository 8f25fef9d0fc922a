"""How long a call takes, which of two is faster, and how many samples a second go through (2.4.3).

Measured and reported as in T. Hoefler and R. Belli, Scientific Benchmarking of Parallel Computing Systems, SC 2015:
the first call apart, then warm-up, every sample kept, medians and quartiles, ratios with an interval. Quantiles are
numpy's: linear between the two nearest samples (type 7 of Hyndman and Fan, 1996).

`torch.utils.benchmark` gives the clock, which waits for the accelerator before it reads, and sets the threads. Its
``Timer.timeit`` would make two more calls, which do not count, before every sample.
"""

import copy
import gc
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from companion.errors import CompanionError
from companion.metrics import probe
from companion.units import format_seconds, format_table

BLOCK = 1e-4
"""Seconds that a block, which is what the clock times, lasts at least: to read the clock takes 1e-7, 1e-5 with a GPU.
Shorter is better on a busy machine: a block of 1e-4 s is seldom interrupted, one of 5e-3 s nearly always."""
LEAD = 5e-4
"""Seconds of calls, at least one, before each block of a comparison, untimed: the alternative before it has filled the
caches. Without them, a 0.3 ms network took twice its time after a larger one; with them, 0 to 15 % more."""
RESAMPLES = 10_000

Function = Callable[[], Any]
Clock = Callable[[], float]
Runner = Callable[[Function, int], float]


@dataclass(frozen=True)
class Latency:
    """Seconds per call.

    Raises:
        CompanionError: there are no samples.
    """

    samples: tuple[float, ...]
    """In the order measured, outliers kept. Each is the mean of a block of ``calls_per_sample`` calls."""
    calls_per_sample: int
    """1, unless a call is shorter than `BLOCK`: then p95 and p99 are those of blocks, and hide what single calls do."""
    first_call: float
    """The very first call, before warm-up: often much slower, and none of the samples."""
    threads: int
    """Of torch within an operator; other engines have their own setting."""
    device: str

    def __post_init__(self) -> None:
        if not self.samples:
            raise CompanionError("a latency needs samples: measure at least one.")

    def percentile(self, percent: float) -> float:
        """Below which that share (0 to 100) of the samples lies."""
        return float(np.percentile(self.samples, percent))

    @property
    def median(self) -> float:
        return self.percentile(50)

    p50 = median

    @property
    def p95(self) -> float:
        return self.percentile(95)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the samples lie between these."""
        return self.percentile(25), self.percentile(75)

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        low, high = self.quartiles
        return high - low

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples))

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def maximum(self) -> float:
        return max(self.samples)

    @property
    def drift(self) -> float:
        """Median of the last third of the samples over that of the first; above 1, the machine became slower."""
        third = math.ceil(len(self.samples) / 3)
        return float(np.median(self.samples[-third:]) / np.median(self.samples[:third]))

    @property
    def per_second(self) -> float:
        """Calls per second, one after the other: 1 / median."""
        return 1 / self.median

    def __str__(self) -> str:
        low, high = map(format_seconds, self.quartiles)
        blocks = f" of {self.calls_per_sample} calls" if self.calls_per_sample > 1 else ""
        return (
            f"{format_seconds(self.median)} (quartiles {low} to {high}, p95 {format_seconds(self.p95)}; "
            f"{_plural(len(self.samples), 'sample')}{blocks}, {_plural(self.threads, 'thread')}, {self.device})"
        )


@dataclass(frozen=True)
class Ratio:
    """Time of an alternative over time of the baseline: below 1, the alternative is faster."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    @property
    def noise(self) -> bool:
        """The interval contains 1: the measurement shows no difference, which does not prove that there is none."""
        return self.low <= 1 <= self.high

    @property
    def speedup(self) -> float:
        return 1 / self.value

    @property
    def verdict(self) -> str:
        """``1.80x faster``, ``1.10x slower`` or ``no difference: noise``."""
        if self.noise:
            return "no difference: noise"
        return f"{self.speedup:.2f}x faster" if self.value < 1 else f"{self.value:.2f}x slower"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" + ": noise" * self.noise


@dataclass(frozen=True)
class Comparison:
    """What `compare_latency` found; ``print`` shows it as a table."""

    baseline: str
    latencies: dict[str, Latency]
    """Of every function; samples at the same place are from the same round."""
    ratios: dict[str, Ratio]
    """Of every function but the baseline."""

    def __str__(self) -> str:
        rows = [("", "median", "quartiles", "ratio [95 % interval]", "")]
        for name, latency in self.latencies.items():
            ratio = self.ratios.get(name)
            numbers = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else "1"
            quartiles = " to ".join(map(format_seconds, latency.quartiles))
            verdict = ratio.verdict if ratio else "baseline"
            rows.append((name, format_seconds(latency.median), quartiles, numbers, verdict))
        return format_table(rows)


@dataclass(frozen=True)
class Throughput:
    """Latency of a batch."""

    batch_size: int
    latency: Latency

    @property
    def per_second(self) -> float:
        """Samples (not batches) per second: batch size / median."""
        return self.batch_size / self.latency.median

    def __str__(self) -> str:
        return (
            f"batch {self.batch_size}: {self.per_second:,.1f} samples per second, {format_seconds(self.latency.median)}"
        )


def measure_latency(
    function: Function,
    *,
    seconds: float = 1.0,
    samples: int = 20,
    warmup: int = 3,
    threads: int = 1,
    device: str | torch.device = "cpu",
    clock: Clock | None = None,
    runner: Runner | None = None,
) -> Latency:
    """Call ``function`` again and again, and keep how long each call took.

    A function that takes less than `BLOCK` is timed in blocks of calls. An error that it raises passes through.
    The garbage collector rests while the clock runs.

    Args:
        function: takes no arguments; need not use torch. See `inference` and `training_step`.
        seconds: measure for at least so long,
        samples: and at least so many.
        warmup: calls (blocks, if it is fast) after the first call and before the samples.
        threads: torch's within an operator; put back afterwards.
        device: where the function computes, ``cpu`` or ``cuda:0``.
        clock: returns seconds; by default `torch.utils.benchmark.timer`. For calls of milliseconds on the CPU of a busy
            machine, ``time.process_time`` leaves out what other programs take, and all waiting.
        runner: ``runner(function, number)`` calls the function so many times and returns the seconds; by default,
            reads ``clock`` before and after.

    Raises:
        CompanionError: an argument makes no sense, there is no such device, or the clock stands still.
    """
    _check_counts(samples=samples, warmup=warmup, threads=threads)
    return _measure([function], seconds, samples, warmup, threads, device, 0, clock, runner)[0]


def compare_latency(
    functions: Mapping[str, Function],
    *,
    baseline: str | None = None,
    rounds: int = 20,
    seconds: float = 2.0,
    warmup: int = 3,
    threads: int = 1,
    device: str | torch.device = "cpu",
    seed: int = 0,
    clock: Clock | None = None,
    runner: Runner | None = None,
) -> Comparison:
    """Time of each function relative to the baseline's, on a machine that may be busy.

    In each round every function is timed once, in a random order that comes as often as its reverse. So a machine that
    becomes slower slows both parts of a round's ratio, and of two equal functions each is the faster one as often,
    however the noise depends on the past or on the place. The ratio is the median over the rounds: a few interruptions
    do not move it. Its interval is the percentile bootstrap over rounds (B. Efron and R. Tibshirani, An Introduction to
    the Bootstrap, 1993, chapter 13), one rank wider at each end, because for few rounds it would be too narrow: of
    equal functions, about 5 % of comparisons or fewer leave out 1. That is for one alternative; of twenty equal ones,
    one may seem to differ.

    Args:
        functions: by name; see `measure_latency`.
        baseline: name of the one to divide by; by default the first.
        rounds: measure at least so many (6 or more),
        seconds: and at least so long, all functions and their untimed calls together. The longer, the smaller the
            differences that are found; slow functions on a busy machine need more.
        seed: of the order and of the bootstrap; torch's and numpy's own generators are left alone.
        warmup, threads, device, clock, runner: see `measure_latency`.

    Raises:
        CompanionError: there are no functions, or as `measure_latency`.
    """
    if not functions:
        raise CompanionError("there are no functions to compare: give a dict of them by name.")
    _check_counts(rounds=rounds, warmup=warmup, threads=threads)
    if rounds < 6:
        raise CompanionError(f"rounds must be at least 6, not {rounds}: fewer cannot give a 95 % interval.")
    names = list(functions)
    baseline = names[0] if baseline is None else baseline
    if baseline not in functions:
        raise CompanionError(f"the baseline {baseline!r} is none of the functions: {', '.join(names)}.")
    found = _measure(list(functions.values()), seconds, rounds, warmup, threads, device, seed, clock, runner)
    latencies = dict(zip(names, found, strict=True))
    rng = np.random.default_rng(seed)
    ratios = {name: _ratio(latencies[name], latencies[baseline], rng) for name in names if name != baseline}
    return Comparison(baseline, latencies, ratios)


def measure_throughput(
    function: Callable[[Any], Any],
    example: Any,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    rounds: int = 20,
    seconds: float = 3.0,
    warmup: int = 3,
    threads: int = 1,
    device: str | torch.device = "cpu",
    seed: int = 0,
    clock: Clock | None = None,
    runner: Runner | None = None,
) -> tuple[Throughput, ...]:
    """Samples per second against batch size, the sizes interleaved as in `compare_latency`.

    Args:
        function: takes a batch; a network is run as by `inference`.
        example: samples [n, …], a tensor or a numpy array, repeated along dimension 0 to each batch size.
        batch_sizes: how many samples.
        rounds, seconds, seed, warmup, threads, device, clock, runner: see `compare_latency`.

    Raises:
        CompanionError: there is no batch size or no sample, or as `measure_latency`.
    """
    _check_counts(rounds=rounds, warmup=warmup, threads=threads)
    if not batch_sizes or min(batch_sizes) < 1:
        raise CompanionError(f"batch_sizes must be one or more numbers of 1 or more, not {tuple(batch_sizes)}.")
    if not getattr(example, "shape", ()) or len(example) == 0:
        raise CompanionError("the example must be a tensor or an array [n, …] of one or more samples.")
    if isinstance(function, nn.Module):
        function = partial(_forward, copy.deepcopy(function).eval())
    batches = [example[[i % len(example) for i in range(size)]] for size in batch_sizes]
    calls = [partial(function, batch) for batch in batches]
    found = _measure(calls, seconds, rounds, warmup, threads, device, seed, clock, runner)
    return tuple(map(Throughput, batch_sizes, found))


def inference(model: nn.Module, example: Any) -> Function:
    """A function to measure: one forward pass of a copy of the network, in evaluation and inference mode.

    Args:
        model: stays as it is; what is done to it later does not change the function.
        example: on the network's device: a tensor, a tuple of arguments, or a dict of them by name.

    Raises:
        CompanionError: the example holds no tensor.
    """
    probe.check_example(model, example)
    return partial(_forward, copy.deepcopy(model).eval(), example)


def training_step(
    model: nn.Module,
    example: Any,
    target: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> Function:
    """A function to measure: forward, backward and optimizer step of a copy of the network in training mode.

    The learning rate is 0, so that every step does the same work on the same weights. Returns the loss.

    Args:
        model: stays as it is.
        example: see `inference`.
        target: what the loss compares with; class numbers [N] for the default loss.
        loss: ``loss(outputs, target)``, or ``loss(outputs)`` without a target; by default cross-entropy with a
            target, else the mean square of the outputs.
        optimizer: ``optimizer(parameters, lr=0.0)`` makes one.

    Raises:
        CompanionError: the example holds no tensor, or the network has nothing to train.
    """
    probe.check_example(model, example)
    network = copy.deepcopy(model).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise CompanionError("the network has no parameter that requires a gradient: there is nothing to train.")
    update = optimizer(parameters, lr=0.0)
    loss = loss or (_mean_square if target is None else cross_entropy)
    targets = () if target is None else (target,)

    def step() -> Tensor:
        value = loss(probe.call(network, example), *targets)
        value.backward()
        update.step()
        update.zero_grad()  # last, so that between steps there are no gradients and their memory counts as the step's
        return value.detach()

    return step


def _mean_square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def _forward(network: Callable[..., Any], example: Any) -> Any:
    with torch.inference_mode():
        return probe.call(network, example)


def _measure(
    functions: Sequence[Function],
    seconds: float,
    rounds: int,
    warmup: int,
    threads: int,
    device: str | torch.device,
    seed: int,
    clock: Clock | None,
    runner: Runner | None,
) -> list[Latency]:
    """Every function once in each round, in random order, until there are enough rounds and seconds."""
    for function in functions:
        if not callable(function):
            raise CompanionError(
                f"a function without arguments is needed, not {type(function).__name__}: use a lambda."
            )
    if not 0 < seconds < math.inf:
        raise CompanionError(f"seconds must be a positive number, not {seconds}.")
    place = find_device(device)
    benchmark = quiet_benchmark()
    run = runner or partial(_run, clock or benchmark.timer)
    rng = np.random.default_rng(seed)
    alone = len(functions) == 1
    first, warm = [], []
    blocks: list[list[float]] = [[] for _ in functions]
    orders: list[np.ndarray] = []
    spent = 0.0
    # The clock waits for the accelerator that is the current one.
    with benchmark.set_torch_threads(threads), torch.accelerator.device_index(place.index):
        for function in functions:
            first.append(run(function, 1))
            warm.append(_warm_up(run, function, warmup))
        calls, lead = _treat_alike(warm)
        while len(blocks[0]) < rounds or spent < seconds:
            orders = orders or _orders(len(functions), rng)
            for i in orders.pop():
                if not alone:
                    spent += run(functions[i], lead[i])
                block = run(functions[i], calls[i])
                if not block > 0:
                    raise _stands_still(calls[i])
                spent += block
                blocks[i].append(block / calls[i])
    return [Latency(tuple(blocks[i]), calls[i], first[i], threads, str(place)) for i in range(len(functions))]


def quiet_benchmark() -> ModuleType:
    """`torch.utils.benchmark`, imported without its warning of a CUDA compiler but no GPU; nothing is compiled here."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from torch.utils import benchmark
    finally:
        log.setLevel(level)
    return benchmark


def _run(clock: Clock, function: Function, number: int) -> float:
    """Seconds of so many calls; the loop and the care for the garbage collector are those of Python's `timeit`."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in itertools.repeat(None, number):
            function()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def _warm_up(run: Runner, function: Function, repeats: int) -> tuple[int, float]:
    """How many calls make a block, a power of two, and about the seconds of one of them."""
    calls = 1
    while (fastest := min(run(function, calls) for _ in range(repeats))) < BLOCK:
        calls *= 2
        if calls > 2**20:
            raise _stands_still(calls)
    return calls, fastest / calls


def _treat_alike(warm: list[tuple[int, float]]) -> tuple[list[int], list[int]]:
    """Calls of each function's block and of its lead, given what `_warm_up` found: the same within a factor of two.

    The first call of a block costs more than the next. So a function in blocks of two calls seems some percent slower
    than the same one in blocks of four, and a warm-up on a busy machine does not always find the same.
    """
    calls, lead = [0] * len(warm), [0] * len(warm)
    slower = sorted(range(len(warm)), key=lambda i: warm[i][1])
    while slower:
        # The fastest left, and all after it as long as each takes at most twice the one before.
        alike = [slower.pop(0)]
        while slower and warm[slower[0]][1] <= 2 * warm[alike[-1]][1]:
            alike.append(slower.pop(0))
        for i in alike:
            calls[i] = max(warm[j][0] for j in alike)
            lead[i] = math.ceil(LEAD / warm[alike[0]][1])
    return calls, lead


def _orders(functions: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Of eight rounds, shuffled: four at random and their reverses, so that no place favours anybody."""
    orders = [rng.permutation(functions) for _ in range(4)]
    orders += [order[::-1] for order in orders]
    return [orders[i] for i in rng.permutation(8)]


def _stands_still(calls: int) -> CompanionError:
    return CompanionError(f"the clock did not move during {_plural(calls, 'call')}: give one that counts seconds.")


def _ratio(alternative: Latency, baseline: Latency, rng: np.random.Generator) -> Ratio:
    ratios = np.sort(np.divide(alternative.samples, baseline.samples))
    n = len(ratios)
    # The median of a resample is the ratio in the middle of n ranks drawn with replacement. The middle one of n uniform
    # numbers follows a beta distribution, so it is drawn at once: the same as n × RESAMPLES draws, and much faster.
    ranks = n * rng.beta((n + 1) / 2, (n + 1) / 2, RESAMPLES)
    low, high = np.percentile(ranks, [2.5, 97.5]).astype(int)
    # Of an even number, the geometric mean of the middle two: with the baseline and the alternative exchanged, 1 / it.
    value = math.sqrt(ratios[(n - 1) // 2] * ratios[n // 2])
    return Ratio(value, float(ratios[max(low - 1, 0)]), float(ratios[min(high + 1, n - 1)]))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise CompanionError(f"{name} must be a whole number of 1 or more, not {count}.")


def find_device(device: str | torch.device) -> torch.device:
    """The device with its index.

    Raises:
        CompanionError: this machine has no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CompanionError(
            f"there is no device {str(device)!r} here: `companion doctor` lists those there are."
        ) from error


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
