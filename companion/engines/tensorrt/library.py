"""TensorRT or TensorRT for RTX, whichever is installed; what it complains of; the GPU it would run on."""

import ctypes
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from companion.errors import CompanionError

# TensorRT first: it runs on every NVIDIA GPU. The other has the same names, is made for RTX GPUs, and builds
# engines on machines without any.
MODULES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


@cache
def library() -> Any:
    """The installed library as a module; the two have one interface.

    Raises:
        CompanionError: neither works here.
    """
    for name in MODULES:
        with suppress(Exception):  # not there, or there without its libraries
            module = import_module(name)
            if hasattr(module, "Runtime"):  # a mere folder of this name is a module, too
                return module
    raise CompanionError(
        "neither TensorRT nor TensorRT for RTX works here: "
        'pip install -c constraints.txt -e ".[tensorrt]" brings the second.'
    )


def library_name() -> str:
    """``TensorRT`` or ``TensorRT for RTX``."""
    return MODULES[library().__name__]


class _Heard(threading.local):
    lines: Sequence[str] = ()


_heard = _Heard()


@contextmanager
def heard() -> Iterator[list[str]]:
    """The errors that the library logs in this thread while the block runs, as a list that grows."""
    before, lines = _heard.lines, list[str]()
    _heard.lines = lines
    try:
        yield lines
    finally:
        _heard.lines = before


@cache
def logger() -> Any:
    """Where the library logs to: one for the process, as it ignores a second one while anything uses the first."""
    trt = library()

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() would not do for a class written in C++

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and isinstance(_heard.lines, list):
                _heard.lines.append(message)

    return Logger()


def complaint(lines: Sequence[str]) -> str:
    """What the library says went wrong, as part of a sentence: without error codes, function names, source lines."""
    # That there is no driver comes up at every turn on a machine without a GPU, where it does no harm.
    said_all = [line for text in lines for line in text.splitlines()]
    said = next((line for line in said_all if "cudaError 35" not in line), (said_all or ["it does not say why"])[0])
    said = re.sub(r".*Error Code \d+: [^(]*\((.*)\)$", r"\1", said)
    said = re.sub(r"\s*In \w+ at /\S+", "", said)
    said = re.sub(r"\[\S+\.cpp:\d+: \w+\] ", "", said)
    said = re.sub(r"[.!?;]+\s+(?=[A-Z])", "; ", said)
    return said.strip(" .:;")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]
    """Compute capability: (9, 0) for Hopper."""
    cuda: int
    """Version of CUDA that the driver knows: 13000 for 13.0."""

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]}, CUDA {self.cuda})"


# Of CUdevice_attribute in cuda.h.
_MAJOR, _MINOR = 75, 76


def gpu() -> Gpu | None:
    """The first GPU that CUDA shows to this process, or None. Asks the driver itself, so no CUDA package is needed."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetName(name, len(name), device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        lambda: cuda.cuDriverGetVersion(ctypes.byref(version)),
    )
    if any(call() != 0 for call in calls):  # a driver without a GPU, for one
        return None
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), version.value)


def usable_gpu() -> Gpu:
    """The GPU that engines run on.

    Raises:
        CompanionError: there is none, or neither library.
    """
    if (found := gpu()) is None:
        raise CompanionError(
            "TensorRT runs on NVIDIA GPUs, and there is none here: choose another engine; "
            "`companion build` works without one."
        )
    library()
    return found
