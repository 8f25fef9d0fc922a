"""What exporting and running a network need of it: a copy, an example, names for what it takes and returns."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from companion import models
from companion.engines.base import Metadata, reason
from companion.errors import CompanionError
from companion.metrics.probe import check_example
from companion.models.registry import attach

TASKS = ("classify", "text", "segment", "detect")


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU, in evaluation mode; the caller's is left alone.

    Raises:
        CompanionError: it cannot be copied, as while torch.nn.utils.prune masks its weights.
    """
    try:
        return copy.deepcopy(model).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise CompanionError(f"{type(model).__name__} cannot be copied: {reason(error)}.") from error


def example_for(model: nn.Module) -> Tensor:
    """A random image for a network of ours, always the same: float32 [1, 3, S, S] in 0..1, S the size it is made for.

    Raises:
        CompanionError: the network is not ours, or takes no images.
    """
    try:
        info = models.describe(model)
    except CompanionError:
        info = None
    if info is None or info.task == "text":
        name = type(model).__name__ if info is None else info.name
        raise CompanionError(f"{name} does not say which images it takes: give an example of its input.")
    side = info.configuration.get("image_size", models.image_size(info.name))
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def takes_any_size(model: nn.Module) -> bool:
    """Whether a network of ours takes images of every height and width: all do whose configuration fixes none."""
    return "image_size" not in models.describe(model).configuration


def metadata_of(
    model: nn.Module, inputs: dict[str, Tensor], *, labels: Sequence[str] | None = None, task: str | None = None
) -> Metadata:
    """What is known of ``model``: everything of a network of ours, else its class, its input and what is given here.

    Raises:
        CompanionError: a task that is none or not the network's, or not as many labels as it has classes.
    """
    if task is not None and task not in TASKS:
        raise CompanionError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}.")
    labels = None if labels is None else tuple(labels)
    size = tuple(next(iter(inputs.values())).shape[1:])
    try:
        info = models.describe(model)
    except CompanionError:
        return Metadata(model=type(model).__name__, task=task, labels=labels, input_size=size)
    if task not in (None, info.task):
        raise CompanionError(f"{info.name} is for the task {info.task!r}, not {task!r}.")
    if labels is not None:
        info = replace(info, labels=labels)
        attach(nn.Identity(), info)  # which checks their number
    return Metadata(info.name, info.configuration, info.task, info.labels, info.vocabulary, size)


def check_batch(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """The example's tensors by name, all of which must have one number of samples in their first dimension.

    Raises:
        CompanionError: they do not, or the example is none.
    """
    check_example(model, example)
    tensors = flatten(example, "input")
    sizes = {name: tuple(tensor.shape[:1]) for name, tensor in tensors.items()}
    if () in sizes.values() or len(set(sizes.values())) != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise CompanionError(
            f"every input of the example needs the same number of samples as its first dimension, not {shapes}."
        )
    return tensors


def flatten(value: Any, root: str) -> dict[str, Tensor]:
    """The tensors in what a network takes or returns, by name.

    A lone tensor is called ``root``, an entry of a dict by its key, of a tuple or list by ``root`` and its number:
    ``output_0``. What lies deeper joins its names with an underscore: ``{"boxes": (a, b)}`` has ``boxes_0`` and
    ``boxes_1``.

    Raises:
        CompanionError: something in it is not a tensor, has numbers that NumPy lacks, or shares its name with another.
    """
    leaves, _ = tree_flatten_with_path(value)
    named: dict[str, Tensor] = {}
    for path, leaf in leaves:
        steps = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", step)))) for step in path]
        by_number = not path or hasattr(path[0], "idx")
        name = root if by_number and len(leaves) == 1 else "_".join([root, *steps] if by_number else steps)
        if not isinstance(leaf, Tensor):
            raise CompanionError(f"{name} of the network is {type(leaf).__name__}: only tensors can go in and out.")
        if leaf.dtype == torch.bfloat16:
            raise CompanionError(
                f"{name} of the network is bfloat16, which NumPy lacks: call the network's float() first."
            )
        if name in named:
            raise CompanionError(f"two tensors of the network would both be called {name}: rename one.")
        named[name] = leaf
    return named


def numpy_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32: the two libraries call the same numbers the same, bfloat16 apart."""
    return str(dtype).removeprefix("torch.")
