"""TensorRT's runtime as an engine: an execution context for each thread that computes, memory that stays."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from companion.engines.base import Engine, Metadata, TensorInfo
from companion.engines.tensorrt.builder import BATCH, check_options
from companion.engines.tensorrt.cache import cached
from companion.engines.tensorrt.enginefile import EngineFile, Shape, read_engine
from companion.engines.tensorrt.library import complaint, heard, library, library_name, logger, usable_gpu
from companion.engines.tensorrt.memory import Buffer, Memory, open_memory
from companion.engines.tensorrt.network import read_network
from companion.errors import CompanionError

# TensorRT's names of what NumPy has.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BOOL": "bool",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
}


class TensorRTEngine(Engine):
    """A network run by TensorRT, or by TensorRT for RTX, on an NVIDIA GPU.

    More samples than the engine was built for are run in parts.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int,
        memory: str | None = None,
        profile: int = 0,
        batch: Sequence[int] | None = None,
        profiles: Sequence[Any] | None = None,
        precision: str | None = None,
        workspace: int | None = None,
    ) -> None:
        """
        Args:
            source: an ``.engine`` file that `build` made, or an ``.onnx`` file or what is in one, from which it is
                built, which takes seconds to minutes; the next time it is found in the cache.
            threads: CPU threads; of no effect, as all work is the GPU's.
            memory: what allocates memory of the GPU: ``torch``, ``cuda-python`` or ``pycuda``; the first that works.
            profile: which of the engine's optimisation profiles to run with.
            batch, profiles, precision, workspace: how to build, as of `build`.

        Raises:
            CompanionError: no GPU or no TensorRT here, an engine for another GPU or of another version, or as `build`.
        """
        found = usable_gpu()
        built_with = {"batch": batch, "profiles": profiles, "precision": precision, "workspace": workspace}
        what = "the network" if isinstance(source, bytes) else str(source)
        if isinstance(source, Path) and source.suffix == ".engine":
            if given := [name for name, value in built_with.items() if value is not None]:
                raise CompanionError(f"{what} is built already: leave out {', '.join(given)}.")
            file = read_engine(source)
        else:
            options = check_options(
                BATCH if batch is None else batch, profiles or (), precision or "fp32", workspace, None
            )
            file = cached(read_network(source, options.precision), options)
        metadata = Metadata.from_text(file.description)
        self._memory = memory
        self._changed = threading.Condition()
        self._idle: list[_Lane] = []
        self._busy = 0
        self._released = False
        with heard() as lines:
            runtime = library().Runtime(logger())
            self._engine = _deserialize(runtime, file, what, str(found), lines)
        self._runtime = runtime  # set last, so that it goes last whatever happens: the engine needs it
        if type(profile) is not int or not 0 <= profile < self._engine.num_optimization_profiles:
            count = self._engine.num_optimization_profiles
            raise CompanionError(f"profile is {profile!r}: {what} has {count}, from 0.")
        self._profile = profile
        inputs, outputs = _describe(self._engine)
        # Smallest and largest shape of each input with free dimensions.
        self._limits: dict[str, tuple[Shape, Shape]] = {}
        for info in inputs:
            if None in info.shape:
                low, _, high = self._engine.get_tensor_profile_shape(info.name, profile)
                self._limits[info.name] = tuple(low), tuple(high)
        super().__init__("tensorrt", inputs, outputs, metadata, precision=file.precision)

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All samples at once, or in parts if there are more than the profile has."""
        in_batches = [info.name for info in self.inputs if info.shape[:1] == (None,)]
        if not in_batches or any(info.shape[:1] != (None,) for info in self.outputs):
            return self._run_part(inputs)
        count = len(inputs[in_batches[0]])
        most = min(self._limits[name][1][0] for name in in_batches)
        parts = []
        for rows in np.array_split(np.arange(count), -(-count // most)):  # of nearly one size: none below the smallest
            part = {name: inputs[name][rows[0] : rows[-1] + 1] for name in in_batches}
            parts.append(self._run_part(inputs | part))
        if len(parts) == 1:
            return parts[0]
        return {info.name: np.concatenate([part[info.name] for part in parts]) for info in self.outputs}

    def _run_part(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, (low, high) in self._limits.items():
            shape = inputs[name].shape
            if any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                raise CompanionError(
                    f"the input {name!r} has the shape {list(shape)}, and the engine takes {list(low)} to "
                    f"{list(high)}: build it for such shapes."
                )
        with self._lane() as lane, lane.memory.active(), heard() as lines:
            return lane.run(inputs, self.outputs, lines)

    @contextmanager
    def _lane(self) -> Iterator["_Lane"]:
        """A context that no other thread uses: one that is idle, or a new one.

        So there are as many as threads ever ran at once, and a server whose threads come and go does not gather more.
        """
        with self._changed:
            if self._released:
                raise CompanionError("this tensorrt engine is closed: load it again.")
            lane = self._idle.pop() if self._idle else None
            self._busy += 1
        try:
            if lane is None:
                lane = self._new_lane()
            yield lane
        finally:
            with self._changed:
                self._busy -= 1
                if lane is not None:
                    self._idle.append(lane)
                self._changed.notify_all()

    def _new_lane(self) -> "_Lane":
        lane = _Lane(open_memory(self._memory))
        try:
            with lane.memory.active(), heard() as lines:
                lane.context = self._engine.create_execution_context()
                if lane.context is None:
                    raise CompanionError(f"{library_name()} makes no execution context: {complaint(lines)}.")
                if self._profile:
                    if not lane.context.set_optimization_profile_async(self._profile, lane.memory.stream):
                        raise CompanionError(
                            f"{library_name()} refuses the profile {self._profile}: {complaint(lines)}."
                        )
                    lane.memory.synchronize()
        except BaseException:
            lane.close()
            raise
        return lane

    def kernels(self) -> str:
        """What the engine runs: its layers after fusion, with their tensors and tactics, as the library's own JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(library().LayerInformationFormat.JSON))

    def _release(self) -> None:
        with self._changed:
            self._released = True
            self._changed.wait_for(lambda: self._busy == 0)  # what runs may end: it uses the memory
        while self._idle:
            self._idle.pop().close()
        del self._engine  # in this order: what was made first goes last
        del self._runtime


class _Lane:
    """An execution context with a stream and memory of its own."""

    def __init__(self, memory: Memory) -> None:
        self.context: Any = None
        self.memory = memory
        self._buffers: dict[str, Buffer] = {}

    def run(
        self, inputs: dict[str, np.ndarray], outputs: Sequence[TensorInfo], lines: list[str]
    ) -> dict[str, np.ndarray]:
        """Copy in, compute, copy out, each begun without waiting for the one before; wait once, at the end."""
        # No name of its own for the context: whoever keeps the exception of a run would keep it alive.
        memory = self.memory
        for name, array in inputs.items():
            if not self.context.set_input_shape(name, array.shape):
                raise CompanionError(f"{library_name()} refuses the shape of {name}: {complaint(lines)}.")
        arrays = {}
        for info in outputs:
            shape = tuple(self.context.get_tensor_shape(info.name))
            if min(shape, default=1) < 0:
                raise CompanionError(
                    f"the size of its output {info.name!r} depends on the values that go in: "
                    "leave that part (non-maximum suppression, say) out of the network and compute it afterwards."
                )
            arrays[info.name] = np.empty(shape, info.dtype)
        for name, array in (inputs | arrays).items():
            if not self.context.set_tensor_address(name, self._buffer(name, array.nbytes).address):
                raise CompanionError(f"{library_name()} refuses the memory of {name}: {complaint(lines)}.")
        try:
            for name, array in inputs.items():
                self._buffers[name].host[: array.nbytes] = array.reshape(-1).view(np.uint8)
                memory.upload(self._buffers[name], array.nbytes)
            if not self.context.execute_async_v3(memory.stream):
                raise CompanionError(f"{library_name()} cannot run: {complaint(lines)}.")
            for name, array in arrays.items():
                memory.download(self._buffers[name], array.nbytes)
        finally:
            memory.synchronize()  # even if it failed: the next run writes into the same memory
        for name, array in arrays.items():
            # Into an array of the caller's own: the next run overwrites the buffer.
            array.reshape(-1).view(np.uint8)[:] = self._buffers[name].host[: array.nbytes]
        return arrays

    def _buffer(self, name: str, size: int) -> Buffer:
        """The buffer of a tensor, larger than before if need be."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer.host) < size:
            if buffer is not None:
                self.memory.free(self._buffers.pop(name))
            self._buffers[name] = self.memory.allocate(max(size, 1))
        return self._buffers[name]

    def close(self) -> None:
        """Free everything, the context first: it knows the addresses."""
        with self.memory.active():
            self.context = None
            while self._buffers:
                self.memory.free(self._buffers.popitem()[1])
            self.memory.close()


def _deserialize(runtime: Any, file: EngineFile, what: str, device: str, lines: list[str]) -> Any:
    """The engine in a file, if this library and this GPU can run it."""
    trt, name = library(), library_name()
    if (file.library, file.version) != (trt.__name__, trt.__version__):
        raise CompanionError(
            f"{what} was built by {file.library} {file.version}, and here is {trt.__name__} {trt.__version__}: "
            "build it again."
        )
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(file.plan)
        if validity == trt.EngineValidity.INVALID:
            raise CompanionError(
                f"{name} cannot run {what} on {device}: {_diagnosis(diagnostics)}; it was built for {file.device}."
            )
    engine = runtime.deserialize_cuda_engine(file.plan)
    if engine is None:
        raise CompanionError(
            f"{name} cannot run {what} on {device}: {complaint(lines)}; it was built for {file.device}."
        )
    return engine


def _diagnosis(bits: int) -> str:
    """The names of what `get_engine_validity` objects to."""
    kinds = library().EngineInvalidityDiagnostics
    names = [name for name in dir(kinds) if name.isupper() and int(getattr(kinds, name)) & int(bits)]
    return ", ".join(name.lower().replace("_", " ") for name in names) or "it does not say why"


def _describe(engine: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """What goes in and what comes out."""
    trt = library()
    inputs, outputs = list[TensorInfo](), list[TensorInfo]()
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise CompanionError(f"its {name} is {dtype}, which NumPy lacks.")
        shape = tuple(None if n < 0 else int(n) for n in engine.get_tensor_shape(name))
        side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        side.append(TensorInfo(name, _DTYPES[dtype], shape))
    return inputs, outputs
