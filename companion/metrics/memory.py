"""The most memory that a call needs at once (2.4.3). `torch.utils.benchmark` measures time, not memory."""

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from companion.errors import CompanionError
from companion.metrics.latency import find_device
from companion.units import format_bytes

CALL = "companion: the call that counts"
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """Peak during a call, in bytes above what was there before it. Weights and the input are not in it."""

    allocated: int
    """What torch's allocator of the device had handed out. Exact, and the same in every run."""
    resident: int | None
    """Main memory of the process, as Linux counts it in pages: also what other libraries allocate. None elsewhere."""

    def __str__(self) -> str:
        resident = "" if self.resident is None else f", {format_bytes(self.resident)} resident"
        return f"{format_bytes(self.allocated)} allocated{resident}"


def measure_memory(function: Callable[[], Any], *, device: str | torch.device = "cpu") -> Memory:
    """Peak memory of one call of ``function``, which is called three times: to warm up, and for each of the figures.

    What a first call makes and later ones find (an optimizer's state, caches) is therefore not counted. What it writes
    to standard error in the warm-up is dropped; an error that it raises passes through.

    Args:
        function: takes no arguments. See `companion.metrics.inference` and `training_step`.
        device: the one whose allocator is watched, ``cpu`` or ``cuda:0``.

    Raises:
        CompanionError: there is no such device, or it is neither a CPU nor a CUDA GPU.

    Source: torch.profiler and torch.cuda.max_memory_allocated; Linux, Documentation/filesystems/proc.rst, clear_refs.
    """
    place = find_device(device)
    if place.type not in ("cpu", "cuda"):
        raise CompanionError(f"memory can be measured on cpu and cuda, not on {place}.")
    return Memory(peak_allocated(function, place), _resident(function))


def peak_allocated(function: Callable[[], Any], device: torch.device) -> int:
    """The first figure of `measure_memory` alone, which calls ``function`` twice."""
    return _on_cuda(function, device) if device.type == "cuda" else _on_cpu(function)


def _on_cuda(function: Callable[[], Any], device: torch.device) -> int:
    function()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(function: Callable[[], Any]) -> int:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silence():
        profiler.start()
    try:
        # The profiler knows the size of what is freed only if it saw it allocated: so it watches the warm-up too, and
        # its warnings of what is older are not ours to pass on.
        with _silence():
            function()
        with record_function(CALL):
            function()
    finally:
        with _silence():
            profiler.stop()
    kineto: Any = profiler.profiler
    events = sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns())
    names = [event.name() for event in events]
    during = [event for event in events[names.index(CALL) :] if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in during if event.device_type().name == "CPU"), initial=0))


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what torch's profiler logs, which is C++ and has no setting for it, and Python's warnings."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _resident(function: Callable[[], Any]) -> int | None:
    """Peak of the resident set above its size before, or None where the kernel does not tell."""
    try:
        # Free memory that the C library keeps for later would hide as much of what is allocated; glibc gives it back.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
        (PROCESS / "clear_refs").write_text("5")  # the peak begins again at the present size
        before = _kibibytes("VmRSS")
    except (OSError, TypeError):
        return None
    function()
    return max(0, _kibibytes("VmHWM") - before) * 1024


def _kibibytes(name: str) -> int:
    for line in (PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{PROCESS / 'status'} has no {name}")
