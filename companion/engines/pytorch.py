"""torch itself as an engine, plain and tuned, and the way back: an engine as a torch module."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from companion.engines.base import Engine, TensorInfo, reason
from companion.engines.fusion import fold_batch_norms
from companion.engines.network import (
    check_batch,
    example_for,
    flatten,
    metadata_of,
    numpy_name,
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

    def __init__(self, model: nn.Module, *, threads: int, example: Any = None, device: str = "cpu") -> None:
        """
        Args:
            model: the network.
            threads: CPU threads while it runs. torch has one number for the whole process: it is set and put back.
            example: what the network takes: a tensor, a tuple of its arguments, or a dict of them by name, each with
                the samples in the first dimension. It fixes the other dimensions. Our image networks need none, and
                take images of any size that suits them.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

        Raises:
            CompanionError: no example where one is needed, one that the network cannot run on, or no such device.
        """
        any_size = example is None
        if example is None:
            example = example_for(model)
            any_size = takes_any_size(model)
        tensors = {name: tensor.detach().cpu() for name, tensor in check_batch(model, example).items()}
        self._form = tree_flatten(example)[1]
        self._threads = threads
        self._device = device
        self._model: nn.Module | None = own_copy(model)
        try:
            self._model.to(device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise CompanionError(
                f"there is no device {device!r} here: `companion doctor` lists those there are."
            ) from error

        # Run on two sizes: a dimension of an output is free if it follows the input's.
        one = {name: tensor[:1] for name, tensor in tensors.items()}
        two = {name: torch.cat([tensor[:1]] * 2) for name, tensor in tensors.items()}
        try:
            self._prepare(one)
            first = self._forward(one)
            if any_size:  # without memory or arithmetic: four times the pixels may take long
                two = {name: tensor.to("meta").repeat(1, 1, 2, 2) for name, tensor in two.items()}
                second = flatten(call(on_meta(self._model), tree_unflatten(list(two.values()), self._form)), "output")
            else:
                second = self._forward(two)
        except CompanionError:
            raise
        except Exception as error:  # whatever somebody's network raises
            raise CompanionError(f"{type(model).__name__} does not run on the example: {reason(error)}.") from error
        super().__init__(self.name, _infos(one, two), _infos(first, second), metadata_of(model, one))

    def _prepare(self, inputs: dict[str, Tensor]) -> None:
        """What is done to the network before it runs for the first time."""

    def _arguments(self, inputs: dict[str, Tensor]) -> Any:
        """The inputs in the form in which the network takes them."""
        return tree_unflatten([tensor.to(self._device) for tensor in inputs.values()], self._form)

    def _forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self._model is not None
        with torch.inference_mode(), _threads(self._threads):
            outputs = flatten(call(self._model, self._arguments(inputs)), "output")
            return {name: tensor.cpu().contiguous() for name, tensor in outputs.items()}

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # torch knows no read-only memory and warns of it.
        owned = {name: array if array.flags.writeable else array.copy() for name, array in inputs.items()}
        outputs = self._forward({name: torch.from_numpy(array) for name, array in owned.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def _release(self) -> None:
        self._model = None


class FusedTorchEngine(TorchEngine):
    """As `TorchEngine`, after the two changes that cost nothing: batch normalisations folded into the convolutions
    before them, and images and filters stored channels-last, as convolution kernels read them."""

    name = "torch_fused"

    def _prepare(self, inputs: dict[str, Tensor]) -> None:
        assert self._model is not None
        fold_batch_norms(self._model, super()._arguments(inputs))
        for parameter in self._model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def _arguments(self, inputs: dict[str, Tensor]) -> Any:
        images_last = {
            name: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for name, tensor in inputs.items()
        }
        return super()._arguments(images_last)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _infos(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[TensorInfo]:
    """Names, dtypes and shapes; a dimension is None where the two differ."""
    return [
        TensorInfo(
            name,
            numpy_name(tensor.dtype),
            tuple(a if a == b else None for a, b in zip(tensor.shape, second[name].shape, strict=True)),
        )
        for name, tensor in first.items()
    ]


class _EngineModule(nn.Module):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

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
