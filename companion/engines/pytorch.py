"""torch itself as an engine, plain and tuned, and the way back: an engine as a torch module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from companion.engines.base import Engine, TensorInfo, one_sentence, reason
from companion.engines.fusion import fold_batch_norms
from companion.engines.network import (
    check_batch,
    example_for,
    flatten,
    metadata_of,
    own_copy,
    takes_any_size,
)
from companion.errors import CompanionError
from companion.metrics.probe import call, on_meta
from companion.models import ModelInfo
from companion.models.registry import attach


class TorchEngine(Engine):
    """A network run by torch as it is (eager mode), on a copy of its own.

    Its input is called ``input`` (of several in a tuple ``input_0``, …, in a dict their keys), its output likewise.
    """

    name = "torch"
    order = "K"
    _images = torch.contiguous_format
    """How images lie in memory."""

    def __init__(self, model: nn.Module, *, threads: int, example: Any = None, device: str = "cpu") -> None:
        """
        Args:
            model: the network.
            threads: CPU threads while it runs: torch's number for the thread that calls, set and put back.
            example: what the network takes: a tensor, a tuple of its arguments, or a dict of them by name, each with
                the samples in the first dimension. It fixes the other dimensions. Our own networks need none, and
                take images of any size that suits them, or texts of any length.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

        Raises:
            CompanionError: no example where one is needed, one that the network cannot run on, no such device, or one
                without the memory for it.
        """
        any_size = False
        if example is None:
            example, any_size = example_for(model), takes_any_size(model)
        tensors = check_batch(model, example)
        one = {name: tensor[:1].detach().cpu().numpy() for name, tensor in tensors.items()}
        self._form = tree_flatten(example)[1]
        self._threads = threads
        self._device = _device(device)
        with one_sentence(f"{type(model).__name__} cannot be moved to {device}"):
            self._model: nn.Module | None = own_copy(model).to(self._device)
        with one_sentence(f"{type(model).__name__} does not run on the example"):
            self._prepare(one)
            inputs, outputs = self._describe(one, any_size)
        super().__init__(self.name, inputs, outputs, metadata_of(model, tensors), precision=_precision(model))

    def _prepare(self, inputs: dict[str, np.ndarray]) -> None:
        """What is done to the network before it runs for the first time."""

    def _describe(self, one: dict[str, np.ndarray], any_size: bool) -> tuple[list[TensorInfo], list[TensorInfo]]:
        """What goes in and comes out, seen on two sizes: a dimension is free if it follows that of the inputs."""
        outputs = self._run(one)
        if not any_size:
            two = {name: np.concatenate([array, array]) for name, array in one.items()}
            return _infos(one, two), _infos(outputs, self._run(two))
        # Without memory or arithmetic: four times the pixels may take long.
        assert self._model is not None
        # Of images [N, C, H, W] the channels stay; texts are [N, L].
        times = {4: (2, 1, 2, 2), 2: (2, 2)}
        large = {name: torch.from_numpy(a).to("meta").repeat(times[a.ndim]) for name, a in one.items()}
        answers = call(on_meta(self._model), tree_unflatten(list(large.values()), self._form))
        return _infos(one, large), _infos(outputs, flatten(answers, "output"))

    def _arguments(self, inputs: dict[str, np.ndarray]) -> Any:
        """The inputs in the form in which the network takes them, as copies, which it may overwrite."""
        return tree_unflatten([self._tensor(array) for array in inputs.values()], self._form)

    def _tensor(self, array: np.ndarray) -> Tensor:
        # Several times faster than torch.tensor, but not for arrays that lie backwards, or that nobody may write to.
        plain = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        tensor = torch.from_numpy(array if plain else array.copy())
        layout = self._images if tensor.dim() == 4 else torch.contiguous_format
        return tensor.to(self._device, copy=True, memory_format=layout)

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self._model is not None
        with torch.inference_mode(), _threads(self._threads):
            outputs = flatten(call(self._model, self._arguments(inputs)), "output")
            # Copied, for they may be the network's own weights, or views of each other.
            return {name: t.cpu().clone(memory_format=torch.contiguous_format).numpy() for name, t in outputs.items()}

    def _release(self) -> None:
        self._model = None


class FusedTorchEngine(TorchEngine):
    """As `TorchEngine`, after the two changes that cost nothing: batch normalisations folded into the convolutions
    before them, and images and filters stored channels-last, as convolution kernels read them."""

    name = "torch_fused"
    _images = torch.channels_last

    def _prepare(self, inputs: dict[str, np.ndarray]) -> None:
        assert self._model is not None
        with _threads(self._threads):
            fold_batch_norms(self._model, self._arguments(inputs))
        for parameter in self._model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._images)


class CompiledTorchEngine(FusedTorchEngine):
    """As `FusedTorchEngine`, compiled by torch.compile: loops are written for this network, in C++ on a CPU.

    Writing and compiling them happens in the first `run`, and takes from seconds to minutes; once more at the first
    batch of another size, which makes the code one for any. It needs a compiler, and keeps what it made in a folder
    for temporary files.
    """

    name = "torch_compile"

    def __init__(self, model: nn.Module, *, threads: int, example: Any = None, device: str = "cpu") -> None:
        """Arguments and errors are those of `TorchEngine`."""
        super().__init__(model, threads=threads, example=example, device=device)
        assert self._model is not None
        self._model.compile()


def _precision(model: nn.Module) -> str:
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
    found = {names[p.dtype] for p in model.parameters() if p.dtype in names} or {"fp32"}
    return found.pop() if len(found) == 1 else "mixed"


def _device(name: str) -> torch.device:
    """The device called ``name``, if torch can use it here and tensors on it have values."""
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:
        raise CompanionError(
            f"there is no device {name!r} here, which `companion doctor` would list: {reason(error)}."
        ) from error
    if device.type == "meta":
        raise CompanionError("networks on the device meta have no values: choose one that `companion doctor` lists.")
    return device


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:  # setting it costs as much as a small layer
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _infos(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray | Tensor]) -> list[TensorInfo]:
    """Names, dtypes and shapes; a dimension is None where the two differ."""
    if list(first) != list(second):
        raise CompanionError(
            f"the network returns {', '.join(first)} for one sample and {', '.join(second)} for two: "
            "what it returns must not depend on their number."
        )
    infos = []
    for name, array in first.items():
        shape, other = array.shape, tuple(second[name].shape)
        if len(shape) != len(other):
            raise CompanionError(
                f"{name} of the network has the shape {list(shape)} for one sample and {list(other)} for two: "
                "the number of its dimensions must not depend on that of the samples."
            )
        free = tuple(a if a == b else None for a, b in zip(shape, other, strict=True))
        infos.append(TensorInfo(name, array.dtype.name, free))
    return infos


class _EngineModule(nn.Module):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise CompanionError("an engine in place of a network cannot be copied or exported: take the network itself.")

    def forward(self, *inputs: Tensor) -> Any:
        names = [info.name for info in self.engine.inputs]
        if len(inputs) != len(names):
            raise CompanionError(f"this network takes {', '.join(names)}; {len(inputs)} inputs were given.")
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        device = inputs[0].device
        outputs = {name: torch.from_numpy(array).to(device) for name, array in self.engine.run(arrays).items()}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def as_module(engine: Engine) -> nn.Module:
    """``engine`` as a network, so that what judges networks (`companion.train.evaluate`) judges engines too.

    Its forward takes a tensor for each input, in their order, and returns the output, or a dict of several by name,
    on the device of the first. It has no parameters, knows its task and labels if the engine does, and works until
    the engine is closed.

    Raises:
        CompanionError: the engine's labels are not as many as its classes.
    """
    module, said = _EngineModule(engine).eval(), engine.metadata
    if said.model is not None and said.task is not None:
        attach(module, ModelInfo(said.model, said.configuration or {}, said.task, said.labels, said.vocabulary))
    return module
