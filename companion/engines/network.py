"""What exporting and running a network need of it: a copy, an example, names for what it takes and returns."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from companion import models
from companion.engines.base import TASKS, Metadata, one_sentence
from companion.errors import CompanionError
from companion.metrics.probe import check_example
from companion.models import text, yolov5
from companion.models.registry import attach, blank


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU, in evaluation mode; the caller's is left alone.

    Raises:
        CompanionError: it cannot be copied, as while torch.nn.utils.prune masks its weights.
    """
    with one_sentence(f"{type(model).__name__} cannot be copied"):
        return copy.deepcopy(model).cpu().eval()


def example_for(model: nn.Module) -> Tensor:
    """Random input for a network of ours, always the same: an image float32 [1, 3, S, S] in 0..1, S the size it is made
    for, or the word ids of a text, int64 [1, 16], the last one padding.

    Raises:
        CompanionError: the network is not ours.
    """
    try:
        info = models.describe(model)
    except CompanionError as error:
        raise CompanionError(
            f"{type(model).__name__} does not say what it takes: give an example of its input."
        ) from error
    empty, generator = blank(info), torch.Generator().manual_seed(0)
    if empty.is_floating_point():
        return torch.rand(empty.shape, generator=generator)
    ids = torch.randint(1, info.configuration["vocabulary_size"], empty.shape, generator=generator)
    ids[:, -1] = text.PADDING
    return ids


def takes_any_size(model: nn.Module) -> bool:
    """Whether a network takes images of every height and width, or texts of every length: all of ours do whose
    configuration fixes none, and of others it is tried."""
    try:
        return "image_size" not in models.describe(model).configuration
    except CompanionError:
        return True


def takes_texts(said: Metadata) -> bool:
    """Whether a network is one of ours for texts, whose word ids [N, L] may be of any length."""
    return said.task == "text" and said.configuration is not None


def stride_of(model: nn.Module) -> int:
    """What height and width of its images must be multiples of, as far as is known."""
    return max(yolov5.STRIDES) if isinstance(model, yolov5.YOLOv5) else 1


def metadata_of(
    model: nn.Module, inputs: dict[str, Tensor], *, labels: Sequence[str] | None = None, task: str | None = None
) -> Metadata:
    """What is known of ``model``: everything of a network of ours, else its class, its input and what is given here.

    Raises:
        CompanionError: a task that is none or not the network's, labels that are no texts, or not as many as a network
            of ours has classes; of others an engine finds out.
    """
    if task is not None and task not in TASKS:
        raise CompanionError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}.")
    if labels is not None:
        if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(t, str) for t in labels):
            raise CompanionError(f"labels must be a list of texts, not {labels!r}.")
        labels = tuple(labels)
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
    normalisation = (info.configuration.get("mean"), info.configuration.get("std"))
    said = Metadata(info.name, info.configuration, info.task, info.labels, info.vocabulary, size, None, *normalisation)
    return replace(said, input_size=None) if takes_texts(said) else said


def check_batch(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """The example's tensors by name, all of which must have one number of samples in their first dimension.

    Raises:
        CompanionError: they do not, or the example is none.
    """
    check_example(model, example)
    arguments = example.values() if isinstance(example, dict) else example if isinstance(example, tuple) else [example]
    for argument in arguments:
        if isinstance(argument, list | tuple | dict):
            raise CompanionError(
                "the example must be a tensor, a tuple of the network's arguments, or a dict of them by name, "
                f"each a tensor and none a {type(argument).__name__}."
            )
    tensors = flatten(example, "input")
    sizes = {name: tuple(tensor.shape[:1]) for name, tensor in tensors.items()}
    if () in sizes.values() or len(set(sizes.values())) != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise CompanionError(
            f"every input of the example needs the same number of samples as its first dimension, not {shapes}."
        )
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CompanionError("the example is on the device meta, where tensors have no values: give one on the CPU.")
    return tensors


def random_like(example: Any, batch: int, generator: torch.Generator) -> Any:
    """Another example of the same form: fractions in its range; for whole numbers, maybe ids, its rows."""
    rows = torch.randint(len(tree_leaves(example)[0]), (batch,), generator=generator)

    def other(tensor: Tensor) -> Tensor:
        drawn = tensor[rows.to(tensor.device)]
        if not tensor.is_floating_point():
            return drawn
        low, high = tensor.min(), tensor.max()
        width = high - low if high > low else 1  # an example of zeros says nothing of the range
        return low + width * torch.rand(drawn.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)

    return tree_map(other, example)


@cache
def _numpy_has(dtype: torch.dtype) -> bool:
    with suppress(TypeError):
        torch.empty(0, dtype=dtype).numpy()
        return True
    return False


def flatten(value: Any, root: str) -> dict[str, Tensor]:
    """The tensors in what a network takes or returns, by name.

    A lone tensor is called ``root``, an entry of a dict by its key, of a tuple or list by ``root`` and its number:
    ``output_0``. What lies deeper joins its names with an underscore: ``{"boxes": (a, b)}`` has ``boxes_0`` and
    ``boxes_1``.

    Raises:
        CompanionError: it is empty, or something in it is not a tensor, has numbers that NumPy lacks, or shares its
            name with another.
    """
    leaves = [((), value)] if isinstance(value, Tensor) else tree_flatten_with_path(value)[0]
    if not leaves:
        raise CompanionError(f"the network has no {root}: it must take a tensor and return one.")
    named: dict[str, Tensor] = {}
    for path, leaf in leaves:
        steps = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", step)))) for step in path]
        by_number = not path or hasattr(path[0], "idx")
        name = root if by_number and len(leaves) == 1 else "_".join([root, *steps] if by_number else steps)
        if not isinstance(leaf, Tensor):
            raise CompanionError(f"{name} of the network is {type(leaf).__name__}: only tensors can go in and out.")
        if not _numpy_has(leaf.dtype):
            dtype = str(leaf.dtype).removeprefix("torch.")
            raise CompanionError(
                f"{name} of the network is {dtype}, which NumPy lacks: call the network's float() first."
            )
        if name in named:
            raise CompanionError(f"two tensors of the network would both be called {name}: rename one.")
        named[name] = leaf
    return named
