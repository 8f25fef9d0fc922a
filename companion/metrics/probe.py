"""Run somebody's network once, to look at it, and leave it as it was."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from companion.errors import CompanionError


def check_example(model: nn.Module, example: Any) -> None:
    """Refuse what cannot be an example input.

    Raises:
        CompanionError: no network, no tensor among the inputs, an empty one, or a lazy network without shapes.
    """
    if not isinstance(model, nn.Module):
        raise CompanionError(f"a network (torch.nn.Module) is needed, not {type(model).__name__}.")
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors:
        raise CompanionError(
            "the example must be a tensor, a tuple of the network's arguments, or a dict of them by name, "
            f"not {type(example).__name__} without a tensor."
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        raise CompanionError("the example is empty: give at least one sample.")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise CompanionError("the network has lazy layers that do not know their shapes yet: run it once first.")


def call(model: Callable[..., Any], example: Any) -> Any:
    """``model(example)``; a tuple is its positional arguments, a dict its arguments by name."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, dict):
        return model(**example)
    return model(example)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the ``meta`` device, where tensors have shapes and no memory.

    ``copy.deepcopy`` would copy the weights first. It looks into its memo before it copies a thing, so every
    tensor's stand-in is put there beforehand; what was tied stays tied.

    Raises:
        CompanionError: it holds something that cannot be copied, such as a lock or an open file.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *tree_leaves(_plain(module))):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("meta")
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CompanionError(f"{type(model).__name__} cannot be copied to be looked at: {error}.") from error


def _plain(module: nn.Module) -> list[Any]:
    """Tensors that a module keeps as plain attributes, perhaps in lists or dicts."""
    return [value for value in vars(module).values() if isinstance(value, Tensor | list | tuple | dict)]


def move(example: Any, device: str) -> Any:
    """The example on another device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)


@contextmanager
def borrowed(model: nn.Module, *, training: bool) -> Iterator[tuple[Callable[..., Any], list[Tensor]]]:
    """Something to call in place of ``model``, in the mode asked for, and the state that it works on.

    That is the network's own weights and copies of its buffers, which a forward pass may change.

    Afterwards the modes are what they were, and so is torch's random generator, from which dropout draws.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [d.index for d in {p.device for p in model.parameters()} if d.type == "cuda" and d.index is not None]
    try:
        with torch.random.fork_rng(devices=devices):
            model.train(training)
            run = partial(_call_with, model, buffers)
            yield run, [*model.parameters(), *buffers.values()]
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def separate_layers() -> Iterator[None]:
    """Have torch run an encoder layer as its parts, not as the one fused operator that it takes in evaluation."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _call_with(model: nn.Module, buffers: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(model, buffers, args, kwargs)


@contextmanager
def one_sentence(model: nn.Module, example: Any, where: str) -> Iterator[None]:
    """Turn what a network raises in its forward pass into one sentence.

    Raises:
        CompanionError: in place of any other error of the network.
    """
    try:
        yield
    except CompanionError:
        raise
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CompanionError(
            f"{type(model).__name__} cannot run {where} on an example of shape {', '.join(map(str, shapes))}: {reason}."
        ) from error
