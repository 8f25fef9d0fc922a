"""A GPU that is none: memory, streams, and TensorRT's runtime on them, as strict as the real ones would be in silence.

Copies and computation wait on their stream until it is synchronised, so whoever reads too early gets noise. Memory
that was freed, a context that two threads use, an engine that goes before its contexts: each is noted in `faults`.
"""

import json
import threading
import time
import weakref
from contextlib import nullcontext
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

from companion.engines.tensorrt.memory import Buffer

NOISE = 0xA5
VERSION = "1.0.fake"


class Gpu:
    """Blocks of memory by address, and streams by handle."""

    def __init__(self):
        self.blocks, self.streams, self.faults = {}, {}, []
        self.allocated, self.contexts, self.executed = 0, 0, []
        self._next = 0x1000
        self._lock = threading.Lock()

    def allocate(self, size):
        assert size > 0
        with self._lock:
            address = self._next
            self._next += size + 0x1000
            self.allocated += 1
        self.blocks[address] = np.full(size, NOISE, np.uint8)
        return address

    def free(self, address):
        if self.blocks.pop(address, None) is None:
            self.faults.append(f"{address:#x} is freed, and not allocated")
        if any(self.streams.values()):
            self.faults.append("memory is freed while a stream has work left")

    def block(self, address, size):
        found = self.blocks.get(address)
        if found is None or len(found) < size:
            self.faults.append(f"{size} bytes at {address:#x} are used, and not allocated")
            return np.zeros(size, np.uint8)
        return found[:size]

    def stream(self):
        with self._lock:
            self._next += 1
            self.streams[self._next] = []
            return self._next

    def enqueue(self, stream, job):
        self.streams[stream].append(job)

    def synchronize(self, stream):
        jobs, self.streams[stream] = self.streams[stream], []
        for job in jobs:
            job()

    def close_stream(self, stream):
        if self.streams.pop(stream):
            self.faults.append("a stream is closed with work left")


class NumpyMemory:
    """The protocol `companion.engines.tensorrt.memory.Memory` on that GPU."""

    def __init__(self, gpu):
        self._gpu = gpu
        self.stream = gpu.stream()

    def active(self):
        return nullcontext()

    def allocate(self, size):
        return Buffer(self._gpu.allocate(size), np.full(size, NOISE, np.uint8), None)

    def upload(self, buffer, size):
        def copy():
            self._gpu.block(buffer.address, size)[:] = buffer.host[:size]

        self._gpu.enqueue(self.stream, copy)

    def download(self, buffer, size):
        def copy():
            buffer.host[:size] = self._gpu.block(buffer.address, size)

        self._gpu.enqueue(self.stream, copy)

    def synchronize(self):
        self._gpu.synchronize(self.stream)

    def free(self, buffer):
        self._gpu.free(buffer.address)

    def close(self):
        self._gpu.close_stream(self.stream)


class Mode(IntEnum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class Validity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = 0, 1, 2


class Diagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC = 1, 2


DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}


def plan(tensors=None, profiles=None):
    """Bytes for the fake runtime: what goes in and out. The n-th output is twice the n-th input plus 1."""
    tensors = tensors or [["x", "INPUT", "FLOAT", [-1, 3]], ["y", "OUTPUT", "FLOAT", [-1, 3]]]
    profiles = profiles or [{"x": [[1, 3], [4, 3], [16, 3]]}]
    return json.dumps({"tensors": tensors, "profiles": profiles}).encode()


def library(gpu, *, has_validity=True, refuses="", executes=True, contexts=True):
    """A module like ``tensorrt_rtx``, for running only."""

    class ILogger:
        ERROR = 1

    class Runtime:
        def __init__(self, logger):
            self.logger, self.engines = logger, 0

        def deserialize_cuda_engine(self, content):
            if refuses:
                self.logger.log(1, f"IRuntime::deserialize: Error Code 1: Internal Error ({refuses})")
                return None
            return Engine(self, json.loads(content))

        def __del__(self):
            if self.engines:
                gpu.faults.append("the runtime goes before its engine")

    if has_validity:
        Runtime.get_engine_validity = lambda self, content: (
            (Validity.INVALID, Diagnostics.UNSUPPORTED_CC) if refuses else (Validity.VALID, 0)
        )

    class Engine:
        def __init__(self, runtime, said):
            self._leave = _counted(runtime, "engines")
            self.tensors, self.profiles, self.contexts = said["tensors"], said["profiles"], 0
            self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.profiles)

        def get_tensor_name(self, number):
            return self.tensors[number][0]

        def find(self, name):
            return next(row for row in self.tensors if row[0] == name)

        def get_tensor_mode(self, name):
            return Mode[self.find(name)[1]]

        def get_tensor_dtype(self, name):
            return SimpleNamespace(name=self.find(name)[2])

        def get_tensor_shape(self, name):
            return tuple(self.find(name)[3])

        def get_tensor_profile_shape(self, name, profile):
            return [tuple(shape) for shape in self.profiles[profile][name]]

        def create_execution_context(self):
            return Context(self) if contexts else None

        def create_engine_inspector(self):
            return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": ["a", "b"], "form": form}))

        def __del__(self):
            if self.contexts:
                gpu.faults.append("the engine goes before its contexts")
            self._leave()

    class Context:
        def __init__(self, engine):
            self._leave = _counted(engine, "contexts")
            self.rows, self.profiles = engine.tensors, engine.profiles
            self.profile, self.shapes, self.addresses = 0, {}, {}
            self.user, self.pending = None, 0
            gpu.contexts += 1

        def _used(self):
            """Between its first setting and the end of its execution a context belongs to one thread."""
            if self.user not in (None, threading.get_ident()):
                gpu.faults.append("two threads use one context")
            self.user = threading.get_ident()

        def set_optimization_profile_async(self, profile, stream):
            self.profile = profile
            return True

        def set_input_shape(self, name, shape):
            self._used()
            low, _, high = self.profiles[self.profile].get(name, [[], [], []])
            if len(low) != len(shape) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return False
            self.shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name):
            inputs = [row[0] for row in self.rows if row[1] == "INPUT"]
            row = next(row for row in self.rows if row[0] == name)
            if name in self.shapes:
                return self.shapes[name]
            first = self.shapes.get(inputs[0], (-1,))
            sizes = first if len(first) == len(row[3]) else (first[0], *row[3][1:])
            # Only a free dimension follows the input; -2 stands for one that no shape tells.
            return tuple(-1 if n == -2 else m if n == -1 else n for n, m in zip(row[3], sizes, strict=True))

        def set_tensor_address(self, name, address):
            self._used()
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream):
            self._used()
            inputs = [row for row in self.rows if row[1] == "INPUT"]
            outputs = [row for row in self.rows if row[1] == "OUTPUT"]
            if not executes:
                log = "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (out of memory)"
                _loggers[-1].log(1, log)
                return False
            if missing := [row[0] for row in self.rows if row[0] not in self.addresses]:
                gpu.faults.append(f"no address for {missing}")
                return False
            if missing := [row[0] for row in inputs if row[0] not in self.shapes]:
                gpu.faults.append(f"no shape for {missing}")
                return False
            if stream not in gpu.streams:
                gpu.faults.append("an unknown stream, or the default one")
                return False
            self.pending += 1
            gpu.executed.append((self.shapes[inputs[0][0]] or (1,))[0])

            def compute():
                time.sleep(0.001)  # time for another thread to come in between
                for source, target in zip(inputs, outputs, strict=True):
                    a = self._view(source)
                    self._view(target)[...] = 2 * a + 1 if a.dtype != np.bool_ else ~a
                self.pending -= 1
                self.user = None

            gpu.enqueue(stream, compute)
            return True

        def _view(self, row):
            shape, dtype = self.get_tensor_shape(row[0]), DTYPES[row[2]]
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return gpu.block(self.addresses[row[0]], size).view(dtype).reshape(shape)

        def __del__(self):
            if self.pending:
                gpu.faults.append("a context goes while it computes")
            self._leave()

    _loggers = []

    def remember(logger):
        _loggers.append(logger)
        return Runtime(logger)

    return SimpleNamespace(
        __name__="tensorrt",
        __version__=VERSION,
        ILogger=ILogger,
        Runtime=remember,
        TensorIOMode=Mode,
        EngineValidity=Validity,
        EngineInvalidityDiagnostics=Diagnostics,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )


def _counted(owner, name):
    """Count one more on the owner; returns what counts one less, without keeping the owner alive."""
    setattr(owner, name, getattr(owner, name) + 1)
    reference = weakref.ref(owner)

    def leave():
        if (there := reference()) is not None:
            setattr(there, name, getattr(there, name) - 1)

    return leave
