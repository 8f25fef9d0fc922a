"""Joules a call, from the best counter there is, or an estimate that says so (2.4.1).

Counters count a whole processor package or a whole GPU, not a process: on a machine that does other things at the
same time, their work is in the figure too.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from companion.errors import CompanionError

POWERCAP = Path("/sys/class/powercap")
POLL_SECONDS = 10.0
"""How often RAPL is read during a long call. Its counters begin again at 65 kJ or 262 kJ: not before four minutes even
at 270 W, and a reader that looks at least once a round misses none."""


class Reader(Protocol):
    """Something that knows how many joules were used so far."""

    source: str
    """What it counts, in words for a table."""
    estimated: bool
    """False for a counter."""
    poll_seconds: float | None
    """How often `read` must be called so that nothing is lost; None if it does not matter."""

    def read(self) -> float:
        """Joules since some moment in the past; never falls."""
        ...


class RaplReader:
    """The processor's own counter, from Linux' ``powercap`` folder: Intel since Sandy Bridge, AMD since Zen.

    Sums the packages, one for each socket (or die): cores, caches, memory controller and built-in graphics. Their parts
    (``core``, ``uncore``) are in that sum already. Memory (``dram``) is not, and stays out: only some Intel servers
    count it, and figures with and without it could not be compared. ``psys``, the whole board, holds the packages and
    is left out too, as is ``intel-rapl-mmio``, a second way to the same counter.

    Args:
        root: the folder to look in.

    Raises:
        CompanionError: there is no such counter (as on most virtual machines), or only root may read it: since Linux
            5.10 that is so, because power betrays what other programs compute (PLATYPUS, CVE-2020-8694).

    Source: Linux, Documentation/power/powercap; K. N. Khan et al., RAPL in Action, ACM TOMPECS 3(2), 2018.
    """

    estimated = False
    poll_seconds: float | None = POLL_SECONDS

    def __init__(self, root: str | os.PathLike[str] = POWERCAP) -> None:
        zones = [path for path in Path(root).glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", path.name)]
        packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
        if not packages:
            raise CompanionError(f"RAPL: no processor package has a counter in {root}.")
        # AMD's driver takes Intel's name, so the vendor is not told.
        self.source = f"RAPL, {len(packages)} package{'s' * (len(packages) > 1)}"
        self._counters = [zone / "energy_uj" for zone in packages]
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in packages]
        self._last = list(map(_microjoules, self._counters))
        self._total = 0
        self._lock = threading.Lock()

    def read(self) -> float:
        """Joules since this reader was made; right if it is called at least once while a counter goes round."""
        with self._lock:
            for i, counter in enumerate(self._counters):
                now = _microjoules(counter)
                self._total += now - self._last[i] + (self._ranges[i] if now < self._last[i] else 0)
                self._last[i] = now
            return self._total / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except PermissionError as error:
        raise CompanionError(
            f"RAPL: {path} is there, but only root may read it: `sudo chmod a+r {path.parent.parent}/*/energy_uj` "
            "allows it until the next start."
        ) from error
    except OSError as error:
        raise CompanionError(f"RAPL: {path} cannot be read: {error.strerror or error}.") from error


def _microjoules(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise CompanionError(f"RAPL: {path} holds {text!r}, which is no number of microjoules.")
    return int(text)


class NvmlReader:
    """The counter of an NVIDIA GPU, Volta or later: the whole board, memory and fans included.

    It moves every 20 to 100 ms, so measure for a second or more.

    Args:
        gpu: its index as ``nvidia-smi`` shows it (CUDA_VISIBLE_DEVICES does not matter), or its UUID, ``GPU-…``.
        nvml: stands in for the module ``pynvml``.

    Raises:
        CompanionError: there is no driver, no such GPU, or it does not count.

    Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption.
    """

    estimated = False
    poll_seconds: float | None = None  # 64 bits of millijoules last longer than the GPU

    def __init__(self, gpu: int | str = 0, *, nvml: Any = None) -> None:
        nvml = self._nvml = nvml or import_module("pynvml")
        try:
            nvml.nvmlInit()
            find = nvml.nvmlDeviceGetHandleByUUID if isinstance(gpu, str) else nvml.nvmlDeviceGetHandleByIndex
            self._handle = find(gpu)
            self.source = f"NVML, GPU {gpu}: {nvml.nvmlDeviceGetName(self._handle)}"
        except nvml.NVMLError as error:
            raise CompanionError(f"NVML: there is no GPU {gpu} to ask ({error}).") from error
        self.read()

    def read(self) -> float:
        """Joules since the driver was loaded."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError as error:
            raise CompanionError(f"NVML: the GPU does not count its energy ({error}).") from error


class Estimate:
    """No counter: seconds × stated watts. Good for "twice the time, twice the energy", and for nothing finer.

    Args:
        watts: what the machine draws while it works, such as the processor's TDP.
        instead_of: why each counter that would have been better cannot be read.
        clock: counts seconds.

    Raises:
        CompanionError: ``watts`` is not a positive number.
    """

    estimated = True
    poll_seconds: float | None = None

    def __init__(
        self, watts: float, *, instead_of: tuple[str, ...] = (), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not _is_number(watts) or not 0 < watts < math.inf:
            raise CompanionError(f"watts must be a positive number, not {watts!r}.")
        self._watts, self._clock, self._start = watts, clock, clock()
        self.instead_of = instead_of
        self.source = f"estimate, seconds × {watts:g} W as stated"

    def read(self) -> float:
        """Joules since this reader was made."""
        return self._watts * (self._clock() - self._start)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Energy:
    """What `measure_energy` found. Text, table and JSON of an estimate say that it is one."""

    joules: float
    """For one call."""
    calls: int
    """How many were measured together."""
    seconds: float
    """What they took together."""
    source: str
    """What was counted, or ``estimate, …``."""
    estimated: bool
    """True if no counter was read."""
    idle_watts: float | None = None
    """Mean power before the calls, while this process slept; None if it was not asked for."""
    instead_of: tuple[str, ...] = ()
    """Why each counter that would have been better was not used."""

    def __post_init__(self) -> None:
        if self.calls < 1 or not self.seconds > 0:
            raise CompanionError(f"{self.calls} calls in {self.seconds:g} s cannot be measured: look at the clock.")

    @property
    def watts(self) -> float:
        """Mean power during the calls."""
        return self.joules * self.calls / self.seconds

    @property
    def joules_above_idle(self) -> float:
        """For one call, less what the machine would have drawn without it (``idle_watts``, 0 if unknown)."""
        return self.joules - (self.idle_watts or 0.0) * self.seconds / self.calls

    @property
    def unit(self) -> str:
        """``J``, or ``J (estimate)``: the unit to put in a table."""
        return "J (estimate)" if self.estimated else "J"

    def __str__(self) -> str:
        above = "" if self.idle_watts is None else f", {self.joules_above_idle:.3g} J above idle"
        return (
            f"{self.joules:.3g} {self.unit} a call{above}, {self.watts:.3g} W over {self.seconds:.2g} s ({self.source})"
        )


def measure_energy(
    function: Callable[[], Any],
    *,
    reader: Reader | None = None,
    watts: float | None = None,
    device: Any = None,
    seconds: float = 1.0,
    idle_seconds: float = 0.0,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Any] = time.sleep,
) -> Energy:
    """Joules that one call of ``function`` takes: it is called again and again, and what was used in all is shared out.

    The first call is not counted. Use the same ``seconds`` for what you compare, and look at ``source``: joules of a
    package, of a GPU and of an estimate are different things.

    Args:
        function: takes no arguments.
        reader: a counter or estimate of your choice; by default, what `energy_reader` finds.
        watts: what the machine draws, for an estimate if there is no counter.
        device: where the work runs, ``cpu`` or ``cuda:0``; see `energy_reader`.
        seconds: call for at least so long: counters move every millisecond (RAPL) to 100 ms (NVML).
        idle_seconds: first sleep so long and note the power, for ``Energy.joules_above_idle``.
        synchronize: waits until the work of all calls is done, such as ``torch.cuda.synchronize``; needed if
            ``function`` only starts it.
        clock: counts seconds.
        sleep: waits so many seconds.

    Raises:
        CompanionError: no counter and no ``watts``, a counter or a clock that does not move or is broken, an unknown
            device, a ``function`` that cannot be called, or times that make no sense.
    """
    if not callable(function):
        raise CompanionError(f"function must be something to call, not {function!r}.")
    times = _is_number(seconds) and _is_number(idle_seconds)
    if not times or not 0 < seconds < math.inf or not 0 <= idle_seconds < math.inf:
        raise CompanionError(
            f"seconds must be positive and idle_seconds 0 or more, not {seconds!r} and {idle_seconds!r}."
        )
    reader = reader or energy_reader(watts=watts, device=device)
    if reader.estimated and idle_seconds:
        raise CompanionError("an estimate cannot tell idling from work: leave idle_seconds out.")
    wait = synchronize or (lambda: None)
    function()
    wait()
    with _polled(reader):
        idle_watts = None
        if idle_seconds:
            joules, start = reader.read(), clock()
            sleep(idle_seconds)
            idle_watts = Energy(_used(reader, joules), 1, clock() - start, reader.source, reader.estimated).watts
        calls = 0
        joules, start = reader.read(), clock()
        while calls == 0 or clock() - start < seconds:
            function()
            calls += 1
        wait()
        joules, elapsed = _used(reader, joules), clock() - start
    if not joules:
        raise CompanionError(
            f"the counter ({reader.source}) did not move in {elapsed:.2g} s: it may be that of a virtual machine, or "
            "another device's; for an estimate, give reader=Estimate(watts)."
        )
    return Energy(
        joules / calls,
        calls,
        elapsed,
        reader.source,
        reader.estimated,
        idle_watts,
        getattr(reader, "instead_of", ()),
    )


def _used(reader: Reader, before: float) -> float:
    now = reader.read()
    if not 0 <= now - before < math.inf:
        raise CompanionError(f"the counter ({reader.source}) is broken: it went from {before} J to {now} J.")
    return now - before


@contextmanager
def _polled(reader: Reader) -> Iterator[None]:
    """Have the counter read now and then, also during one call that lasts longer than a round of it."""
    if reader.poll_seconds is None:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        while not done.wait(reader.poll_seconds):
            with suppress(CompanionError):  # the read after the calls will say it again
                reader.read()

    thread = threading.Thread(target=poll, name="energy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def energy_reader(*, watts: float | None = None, device: Any = None) -> Reader:
    """The best reader there is: RAPL, else NVML, else an estimate from ``watts``.

    Args:
        watts: what the machine draws, for the estimate.
        device: where the work runs, ``cpu`` or ``cuda:0``, or a ``torch.device``: then only a counter of that one will
            do, for a GPU's knows nothing of work on the CPU, and the other way round. If None, the first there is.

    Raises:
        CompanionError: there is no counter, and no watts are stated; says why there is none. Or another device.
    """
    if device is not None and not re.fullmatch(r"(cpu|cuda)(:\d+)?", str(device)):
        raise CompanionError(f"device must be cpu or cuda:0, not {str(device)!r}.")
    on_gpu = str(device).startswith("cuda")
    counters: list[Callable[[], Reader]] = [] if on_gpu else [lambda: RaplReader(POWERCAP)]
    if device is None or on_gpu:
        counters.append(lambda: NvmlReader(_gpu(device)))
    reasons = []
    for counter in counters:
        try:
            return counter()
        except CompanionError as error:
            reasons.append(str(error).rstrip("."))
    if watts is None:
        raise CompanionError(
            f"no energy counter can be read here ({'; '.join(reasons)}): for an estimate, say what the machine draws, "
            "such as watts=65."
        )
    return Estimate(watts, instead_of=tuple(reasons))


def _gpu(device: Any) -> int | str:
    """NVML numbers GPUs in an order of its own, so one of torch's is asked for by its UUID."""
    if device is None:
        return 0
    import torch

    try:
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except (RuntimeError, AssertionError) as error:
        raise CompanionError(f"NVML: there is no device {str(device)!r} here.") from error
