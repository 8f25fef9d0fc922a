"""From an ONNX file to a TensorRT engine: profiles for the shapes, limits, progress, and one sentence if it fails."""

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from companion.engines.tensorrt.enginefile import EngineFile, Profile, Shape
from companion.engines.tensorrt.library import complaint, gpu, heard, library, library_name, logger
from companion.engines.tensorrt.network import Network, free_inputs, parse, read_network
from companion.errors import CompanionError
from companion.progress import progress_bar
from companion.units import format_bytes

Progress = Callable[[float, str], bool | None]
BATCH = (1, 4, 16)
FORMAT = 1  # of what is built from the same options; raised with every change to the builder below


@dataclass(frozen=True)
class Options:
    """How to build; `build` explains them."""

    batch: Sequence[int] = BATCH
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = ()
    precision: str = "fp32"
    workspace: int | None = None
    target: str | None = None


def build(
    source: str | os.PathLike[str] | bytes,
    *,
    batch: Sequence[int] = BATCH,
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = (),
    precision: str = "fp32",
    workspace: int | None = None,
    target: str | None = None,
    on_progress: Progress | None = None,
) -> EngineFile:
    """Build an engine with TensorRT, or with TensorRT for RTX, which needs no GPU to build.

    Every tensor has the type that the graph gives it (TensorRT calls that strongly typed), so a file that
    `companion.compress.quantize_onnx` made 8-bit is built as it is, if its biases were left in float.

    Args:
        source: an ``.onnx`` file, or what is in one.
        batch: for inputs of which only the first dimension is free: the smallest, the usual and the largest number of
            samples. The engine takes every number between, and is fastest at the usual one.
        profiles: other free dimensions, for each profile by input name: the smallest, the usual and the largest shape,
            such as ``[{"images": [(1, 3, 320, 320), (1, 3, 640, 640), (4, 3, 640, 640)]}]``. Inputs that are not in it
            follow ``batch``. An engine has at least one profile, and runs with one of them.
        precision: ``fp32``: as the file says, float32 being float32; ``tf32``: products of float32 with 10 bits of
            mantissa, which tensor cores take; ``fp16``: the graph converted to float16, inputs and outputs apart.
        workspace: the most bytes of GPU memory that a layer may use beside its tensors; if None, what the library
            thinks right.
        target: the compute capability to build for, such as ``8.6``, with TensorRT for RTX only; if None, each GPU from
            8.0 (Ampere) that it supports. TensorRT builds for the GPU that is there.
        on_progress: called often with the fraction done, 0 to 1, and what is being done; returning False cancels. A
            terminal or notebook shows a progress bar, too.

    Raises:
        CompanionError: no TensorRT here, not an ONNX file, weights that are missing, an operator that TensorRT cannot
            run, shapes that do not fit, a workspace that is too small, or cancelled.
        KeyboardInterrupt: Ctrl-C, after the library has stopped.

    Source: NVIDIA TensorRT, Developer Guide, "Working with Dynamic Shapes", "Strong Typing".
    """
    options = check_options(batch, profiles, precision, workspace, target)
    network = read_network(source if isinstance(source, bytes) else Path(source), precision)
    return build_network(network, options, on_progress)


def check_options(batch: Any, profiles: Any, precision: Any, workspace: Any, target: Any) -> Options:
    """The options of `build`, if they make sense for any network."""
    numbers = _ordered("batch", [(n,) for n in batch] if isinstance(batch, Sequence) else batch)
    if workspace is not None and (type(workspace) is not int or not 1 <= workspace < 2**63):
        raise CompanionError(f"workspace is {workspace!r}: give a number of bytes from 1.")
    if not isinstance(profiles, Sequence) or not all(isinstance(given, Mapping) for given in profiles):
        raise CompanionError(f"profiles is {profiles!r}: give a list of dicts of shapes by input name.")
    plain = tuple(
        {name: _ordered(f"the profile of {name}", shapes) for name, shapes in given.items()} for given in profiles
    )
    if target is not None and not re.fullmatch(r"\d+\.\d", str(target)):
        raise CompanionError(f"target is {target!r}: give a compute capability such as 8.6.")
    return Options(tuple(n for (n,) in numbers), plain, precision, workspace, target)


def _ordered(what: str, shapes: Any) -> tuple[tuple[int, ...], ...]:
    """Three shapes as plain numbers, each dimension from 1 and none smaller than in the one before."""
    try:
        low, usual, high = (tuple(index(n) for n in shape) for shape in shapes)
        sizes = list(zip(low, usual, high, strict=True))
    except (TypeError, ValueError):
        raise CompanionError(f"{what} must be the smallest, the usual and the largest, not {shapes!r}.") from None
    if not all(1 <= a <= b <= c < 2**31 for a, b, c in sizes):
        raise CompanionError(
            f"{what} must grow from 1 up, smallest, usual, largest, not {list(low)}, {list(usual)}, {list(high)}."
        )
    return low, usual, high


def key(network: Network, options: Options) -> str:
    """64 hexadecimal digits that stand for all that decides what an engine is: the file, options, library, GPU."""
    found = None if options.target else gpu()
    parts = [FORMAT, library().__name__, library().__version__, str(found), hashlib.sha256(network.content).hexdigest()]
    return hashlib.sha256(json.dumps([*parts, asdict(options)], sort_keys=True).encode()).hexdigest()


def build_network(network: Network, options: Options, on_progress: Progress | None = None) -> EngineFile:
    """As `build`, from a network that was read."""
    trt = library()
    with heard() as lines, _Watch(on_progress) as watch:
        builder = trt.Builder(logger())
        definition, _parser = parse(builder, network)
        config = builder.create_builder_config()
        config.progress_monitor = _monitor(watch.step)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine can tell its layers
        if options.precision != "tf32":
            config.clear_flag(trt.BuilderFlag.TF32)  # which is set by default
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.target is not None:
            _set_target(config, options.target)
        profiles = _profiles(free_inputs(definition), options, network.what)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, sizes in shapes.items():
                profile.set_shape(name, *sizes)
            if config.add_optimization_profile(profile) < 0:
                raise CompanionError(f"{library_name()} refuses the shapes {dict(shapes)}: {complaint(lines)}.")
        plan = builder.build_serialized_network(definition, config)
    watch.check()
    if plan is None:
        types = {layer.name: layer.type.name for layer in map(definition.get_layer, range(definition.num_layers))}
        raise CompanionError(_explain(network.what, lines, types, options))
    return EngineFile(
        plan=bytes(plan),
        library=trt.__name__,
        version=trt.__version__,
        device=f"compute capability {options.target}" if options.target else str(gpu() or "none"),
        precision=network.precision,
        profiles=tuple(profiles),
        layers=definition.num_layers,
        key=key(network, options),
        description=network.description,
    )


def _set_target(config: Any, target: str) -> None:
    """Build for GPUs of this compute capability."""
    trt = library()
    if not hasattr(config, "set_compute_capability"):
        raise CompanionError("TensorRT builds for the GPU that is here: leave out the target.")
    known = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    name = f"SM{target.replace('.', '')}"
    if name not in known:
        there = ", ".join(f"{each[2:-1]}.{each[-1]}" for each in sorted(known, key=lambda each: int(each[2:])))
        raise CompanionError(
            f"{library_name()} builds nothing for the compute capability {target}: choose one of {there}."
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _profiles(free: Mapping[str, Sequence[int]], options: Options, what: str) -> list[Profile]:
    """Smallest, usual and largest shape of each input with free dimensions, for each profile."""
    for given in options.profiles:
        if unknown := [name for name in given if name not in free]:
            there = ", ".join(free) or "none"
            raise CompanionError(
                f"{what} has no input {unknown[0]!r} with free dimensions, which a profile could say: it has {there}."
            )
    if not free:
        return []
    return [
        {name: _sizes(name, shape, given.get(name), options.batch, what) for name, shape in free.items()}
        for given in options.profiles or [{}]
    ]


def _sizes(
    name: str, shape: Sequence[int], given: Sequence[Sequence[int]] | None, batch: Sequence[int], what: str
) -> tuple[Shape, Shape, Shape]:
    if given is None:
        if -1 in shape[1:]:
            raise CompanionError(
                f"the input {name!r} of {what} has the shape {_text(shape)}: say in a profile how large it can be."
            )
        given = [(n, *shape[1:]) for n in batch]
    for sizes in given:
        if len(sizes) != len(shape) or any(a not in (-1, b) for a, b in zip(shape, sizes, strict=True)):
            raise CompanionError(f"the input {name!r} of {what} has the shape {_text(shape)}, not {_text(sizes)}.")
    low, usual, high = (tuple(map(int, sizes)) for sizes in given)
    return low, usual, high


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if n == -1 else str(n) for n in shape) + "]"


def _explain(what: str, lines: Sequence[str], types: Mapping[str, str], options: Options) -> str:
    """Why nothing was built, as one sentence, from what the library logged."""
    said, name = "\n".join(lines), library_name()
    if found := re.search(r"(\S+) has no runners that implement it", said):
        layer = f"{found[1]} ({types.get(found[1], 'one of its own')})"
        return (
            f"{name} can read the layer {layer} of {what}, but has no kernel for it: "
            "leave it out of the network and compute it afterwards, or choose another engine."
        )
    if "workspace" in said or "OutOfMemory" in said:
        if options.workspace is None:
            return f"there is too little memory to build {what}: close what uses the GPU, or build for smaller batches."
        given = format_bytes(options.workspace)
        return f"the workspace of {given} is too small to build {what}: give more, or leave the choice to {name}."
    return f"{name} cannot build {what}: {complaint(lines)}."


class _Watch:
    """Follows a build: draws its bar, asks the caller and minds Ctrl-C, which the library would not survive."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._on_progress = on_progress
        self._error: BaseException | None = None
        self._bar = progress_bar(total=100, desc="building", bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}")

    def __enter__(self) -> Self:
        # An exception must not cross the library's C++: the handler only notes it, and the next step stops the build.
        # Handlers of the program's own stay.
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._bar.close()

    def _interrupt(self, number: int, frame: Any) -> None:
        self._error = KeyboardInterrupt()

    def step(self, fraction: float, phase: str) -> bool:
        """Note how far it is; False stops the build."""
        try:
            self._bar.set_description(phase, refresh=False)
            self._bar.update(round(100 * fraction) - self._bar.n)
            if self._error is None and self._on_progress is not None and self._on_progress(fraction, phase) is False:
                self._error = CompanionError("the build was cancelled, and nothing was written.")
        except BaseException as error:
            self._error = error
        return self._error is None

    def check(self) -> None:
        """Raise what stopped the build, if anything did."""
        if self._error is not None:
            raise self._error


def _monitor(step: Callable[[float, str], bool]) -> Any:
    """The library's steps within phases within phases as one fraction that grows, handed to ``step``."""
    trt = library()

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done
            self._fraction = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, num_steps, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step_number: int) -> bool:
            parent, steps, _ = self._phases.get(phase_name, (None, 1, 0))
            self._phases[phase_name] = (parent, steps, step_number + 1)
            fraction, name = 0.0, phase_name
            while name in self._phases:  # a phase is one step of its parent
                parent, steps, done = self._phases[name]
                fraction = (min(done, steps) + fraction) / max(steps, 1)
                name = parent or ""
            self._fraction = max(self._fraction, min(fraction, 1.0))
            return step(self._fraction, phase_name)

    return Monitor()
