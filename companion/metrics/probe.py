"""Run somebody's network once, to look at it, and leave it as it was."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from companion.errors import CompanionError


def check_example(model: nn.Module, example: Any) -> None:
    """Refuse what cannot be an example input.

    Raises:
        CompanionError: no network, no tensor among the inputs, all of them empty, or a lazy network without shapes.
    """
    if not isinstance(model, nn.Module):
        raise CompanionError(f"a network (torch.nn.Module) is needed, not {type(model).__name__}.")
    tensors = tensors_in(example)
    if not tensors:
        raise CompanionError(
            "the example must be a tensor, a tuple of the network's arguments, or a dict of them by name, "
            f"not {type(example).__name__} without a tensor."
        )
    if all(tensor.numel() == 0 for tensor in tensors):
        raise CompanionError("the example is empty: give at least one sample.")
    check_shapes(model)


def check_batches(batches: Any) -> None:
    """Refuse what does not give batches one after another; a single batch would be taken for many.

    Raises:
        CompanionError: it is one batch, or nothing of the kind.
    """
    try:
        iter(batches)
        alone = isinstance(batches, Tensor | Mapping | str)
    except TypeError:
        alone = True
    if alone:
        raise CompanionError(f"the data must be a list of batches, or a loader of them, not {type(batches).__name__}.")


def check_shapes(model: nn.Module) -> None:
    """Refuse a network whose lazy layers have no weights yet.

    Raises:
        CompanionError: it has such a layer.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise CompanionError("the network has lazy layers that do not know their shapes yet: run it once first.")


def call(model: Callable[..., Any], example: Any) -> Any:
    """``model(example)``; a tuple is its positional arguments, a dict its arguments by name."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, dict):
        return model(**example)
    return model(example)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, and in the attributes of plain objects such as dataclasses."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [inner for inner in tree_leaves(list(vars(leaf).values())) if isinstance(inner, Tensor)]
    return found


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


def copied(example: Any, device: str | None = None) -> Any:
    """The example with tensors of its own (a slice without the rest of its memory), perhaps on another device."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # One that needs a gradient stays behind its original in the graph: hooks want no leaves.
        return (leaf if leaf.requires_grad else leaf.detach()).to(device or leaf.device).clone()

    with torch.enable_grad():
        return tree_map(one, example)


@contextmanager
def borrowed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The network in the mode asked for, for a pass or two in which gradients can be had.

    Afterwards the modes and buffers are what they were, and so is torch's random generator, from which dropout draws.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with torch.inference_mode(False), undrawn(model):
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    buffer.copy_(before)
                    if getattr(module, name) is not buffer and not isinstance(module, torch.jit.ScriptModule):
                        setattr(module, name, buffer)


@contextmanager
def undrawn(model: nn.Module) -> Iterator[None]:
    """Leave torch's random generators, of the CPU and of the network's GPUs, as they are."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


@contextmanager
def separate_layers() -> Iterator[None]:
    """Have torch run an encoder layer as its parts, not as the one fused operator that it takes in evaluation."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


LONGEST = 200  # characters of somebody else's message


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
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(example))
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = re.split(r"\. (?=[A-Z])", line)[0][:LONGEST].rstrip(" .:")
        raise CompanionError(
            f"{type(model).__name__} cannot run {where} on an example of shape {shapes}: {reason}."
        ) from error
