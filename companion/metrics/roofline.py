"""The roofline: whether arithmetic or memory bounds a layer, and what time follows from that (2.4.1).

Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model for multicore
architectures". A machine can do so many FLOPs a second and move so many bytes a second. Work that does few FLOPs for
each byte waits for memory: making its arithmetic cheaper cannot pay.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from companion.errors import CompanionError
from companion.metrics import probe
from companion.metrics.complexity import Cost, count_complexity
from companion.metrics.latency import find_device


@dataclass(frozen=True)
class Roof:
    """The two ceilings of a processor with its memory."""

    name: str
    flops_per_second: float
    """FLOPS."""
    bytes_per_second: float
    source: str
    """``measured``, or the data sheet."""

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which the ceilings meet; work below it is bound by memory."""
        return self.flops_per_second / self.bytes_per_second

    def seconds(self, cost: Cost) -> float:
        """The least time for this work: that of its arithmetic or that of its bytes, whichever is longer."""
        return max(cost.flops / self.flops_per_second, cost.bytes_moved / self.bytes_per_second)

    def bound(self, cost: Cost) -> str:
        """``arithmetic`` or ``memory``: which of the two is longer."""
        return "arithmetic" if cost.intensity >= self.ridge else "memory"


# Peaks of dense arithmetic (no sparsity), in the format of the name, as their makers publish them. The book's section
# 2.1 names these kinds; nothing here was measured.
ACCELERATORS = (
    Roof("GPU with Tensor Cores: NVIDIA A100 80 GB, bf16", 312e12, 2039e9, "NVIDIA, A100 data sheet (2021)"),
    Roof("TPU: Google TPU v4, bf16", 275e12, 1200e9, "Jouppi et al., TPU v4, ISCA (2023)"),
    Roof("FPGA: AMD Alveo U280, int8", 24.5e12, 460e9, "AMD, Alveo U280 data sheet DS963 (2021)"),
    Roof("ASIC: AWS Inferentia2, bf16", 190e12, 820 * 2**30, "AWS, Neuron documentation: Inferentia2 (2023)"),
)


@dataclass(frozen=True)
class Layer:
    """One layer under the roof."""

    name: str
    kind: str
    """Class of the module, such as ``Conv2d``; a grouped convolution says so."""
    cost: Cost
    predicted: float
    """Seconds by the roofline."""
    bound: str
    """``arithmetic`` or ``memory``."""
    measured: float
    """Median seconds in the running network."""

    @property
    def ratio(self) -> float:
        """Measured over predicted time: how many times slower than the roof allows."""
        return self.measured / self.predicted

    @property
    def flops_per_second(self) -> float:
        """FLOPS reached."""
        return self.cost.flops / self.measured


@dataclass(frozen=True)
class Roofline:
    """What `measure_roofline` found."""

    roof: Roof
    layers: tuple[Layer, ...]
    """Those with MACs, in the order in which they first ran."""
    placed: float
    """Share of the network's MACs that these layers do; the rest is in no layer of its own, such as an attention
    that a block computes by a function."""


def measure_roof(
    *,
    rounds: int = 15,
    threads: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = "this machine",
) -> Roof:
    """Both ceilings of this machine as a network can reach them: medians, with ``threads`` threads, in ``dtype``.

    Arithmetic: the better of a large matrix product and a large 3×3 convolution, because libraries tune them apart.
    Memory: a stream that reads and writes far more than any cache holds (as in McCalpin's STREAM, 1995), so data that
    the caches keep between layers move faster than this.

    Raises:
        CompanionError: rounds or threads below 1, or no such device or format.
    """
    _check(rounds, threads)
    place = find_device(device)
    if place.type == "meta" or not dtype.is_floating_point:
        raise CompanionError(f"{dtype} on {place} cannot be measured: take a real device and a float format.")
    ceilings = _Ceilings(place, dtype)
    with _threads(threads), torch.inference_mode():
        for _ in range(rounds + 1):
            ceilings.round()
    ceilings.forget_first_round()
    return ceilings.roof(name)


def measure_roofline(model: nn.Module, example: Any, *, rounds: int = 15, threads: int = 1) -> Roofline:
    """Each layer of ``model`` on ``example``: what the roofline predicts, and what it takes in the running network.

    The machine is measured again in every round, between two passes of the network, so that another program's load
    weighs on both sides of the comparison. Layers are timed where they run, by hooks, because a layer
    that runs alone again and again finds everything in the caches. Bytes are counted as if no cache
    kept anything between operators.

    Args:
        model: evaluated as it is (device, dtype, memory format) and not changed.
        example: a tensor, a tuple of the network's positional arguments, or a dict of its arguments by name.
        rounds: passes; medians are over them.
        threads: of the CPU.

    Raises:
        CompanionError: rounds or threads below 1, a network that does not run on the example, or one without MACs.
    """
    _check(rounds, threads)
    found = count_complexity(model, example)
    costs = found.by_module if any(cost.macs for cost in found.by_module.values()) else {"": found.total}
    # Layers are the innermost modules that do the work: of multi-head attention the whole, which calls no child.
    names = [name for name, cost in costs.items() if cost.macs and not _child_counts(name, costs)]
    if not names:
        raise CompanionError(f"{type(model).__name__} has no layer that multiplies, so there is nothing to place.")
    tensors = [*model.parameters(), *probe.tensors_in(example)]
    if tensors[0].is_meta:
        raise CompanionError("a network on the meta device takes no time: give it on a real one.")
    example = probe.copied(example)
    ceilings = _Ceilings(tensors[0].device, tensors[0].dtype if tensors[0].is_floating_point() else torch.float32)
    passes: list[dict[str, float]] = []
    with (
        probe.one_sentence(model, example, "as it is"),
        _threads(threads),
        probe.separate_layers(),
        probe.borrowed(model, training=False),
        torch.inference_mode(),
        _stopwatches(model, names) as seconds,
    ):
        for _ in range(rounds + 1):
            seconds.clear()
            probe.call(model, example)
            passes.append(dict(seconds))
            ceilings.round()
    ceilings.forget_first_round()
    roof = ceilings.roof("this machine")
    return Roofline(
        roof,
        tuple(
            Layer(
                name,
                _kind(model.get_submodule(name)),
                cost := costs[name],
                roof.seconds(cost),
                roof.bound(cost),
                median(one[name] for one in passes[1:]),  # the first pass warmed up
            )
            for name in names
            if all(name in one for one in passes)  # what runs only where there are no values is no layer
        ),
        sum(costs[name].macs for name in names) / found.macs,
    )


def timer() -> float:
    """Seconds on a clock, once everything that was sent to a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def _check(rounds: int, threads: int) -> None:
    for what, number in (("rounds", rounds), ("threads", threads)):
        if not isinstance(number, int) or number < 1:
            raise CompanionError(f"{what} is {number!r}: give a whole number from 1.")


def _child_counts(name: str, costs: Mapping[str, Cost]) -> bool:
    return any(other.startswith(f"{name}.") and cost.macs for other, cost in costs.items())


def _kind(module: nn.Module) -> str:
    groups, channels = getattr(module, "groups", 1), getattr(module, "in_channels", 0)
    prefix = "" if groups == 1 else "depthwise " if groups == channels else "grouped "
    return prefix + type(module).__name__


@contextmanager
def _stopwatches(model: nn.Module, names: list[str]) -> Iterator[dict[str, float]]:
    """Seconds by layer of what runs inside, added up."""
    seconds: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}

    def start(name: str, *_: Any) -> None:
        started[name] = timer()

    def stop(name: str, *_: Any) -> None:
        seconds[name] += timer() - started[name]

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(start, name)).remove)
            stack.callback(module.register_forward_hook(partial(stop, name)).remove)
        yield seconds


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


REPEATS = 3  # of each probe in a round


class _Ceilings:
    """The three probes of a machine.

    On a CPU some milliseconds each, as long as the layers that they are compared with: on a busy machine the scheduler
    interrupts whatever runs longer. The stream is larger than the last cache all the same.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        large = device.type != "cpu"
        n, batch, stream = (8192, 256, 2**28) if large else (512, 1, 2**23)
        channels, side = 128, 28
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it is
            a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
            convolution = nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype)
            image = torch.randn(batch, channels, side, side).to(device, dtype)
        product = torch.empty_like(a)
        convolution = convolution.to(memory_format=torch.channels_last)  # what the libraries are fastest in
        image = image.to(memory_format=torch.channels_last)
        source = torch.ones(stream, device=device, dtype=dtype)
        target = torch.empty_like(source)
        self.probes: dict[str, tuple[float, Callable[[], Any]]] = {
            "product": (2 * n**3, lambda: torch.mm(a, b, out=product)),
            "convolution": (2 * batch * side**2 * 9 * channels**2, lambda: convolution(image)),
            "stream": (2 * stream * source.element_size(), lambda: torch.mul(source, 2, out=target)),
        }
        self.rates: dict[str, list[float]] = {name: [] for name in self.probes}

    def round(self) -> None:
        for _ in range(REPEATS):
            for name, (work, run) in self.probes.items():
                start = timer()
                run()
                self.rates[name].append(work / (timer() - start))

    def forget_first_round(self) -> None:
        """It warmed up."""
        for rates in self.rates.values():
            del rates[:REPEATS]

    def roof(self, name: str) -> Roof:
        product, convolution, stream = (median(self.rates[probe]) for probe in self.probes)
        return Roof(name, max(product, convolution), stream, "measured")
