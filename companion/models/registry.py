"""Networks by name: `create` builds one and notes on it everything needed to build it again."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from companion.errors import CompanionError
from companion.models import cnn, resnet


@dataclass(frozen=True)
class ModelInfo:
    """What a weights file says besides the weights: enough to rebuild the network and to use it."""

    name: str
    """The name that `create` knows."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """Every argument of the network, defaults included, so that a file outlives a change of a default."""
    task: str = "classify"
    """``classify``, ``text``, ``segment`` or ``detect``: which samples, loss and score belong to it."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of the outputs."""
    vocabulary: tuple[str, ...] | None = None
    """For text: the words, in the order of their ids."""


@dataclass(frozen=True)
class _Network:
    build: Callable[..., nn.Module]
    task: str = "classify"
    image_size: int = 32
    """Side of the square images it is made for, in pixels."""


_NETWORKS = {
    "simple_cnn": _Network(cnn.simple_cnn),
    "simple_cnn_3conv": _Network(cnn.simple_cnn_3conv),
    "cifar_resnet14": _Network(resnet.cifar_resnet14),
    "cifar_resnet20": _Network(resnet.cifar_resnet20),
    "cifar_resnet56": _Network(resnet.cifar_resnet56),
    "cifar_resnet18": _Network(resnet.cifar_resnet18),
    "cifar_resnet50": _Network(resnet.cifar_resnet50),
    "resnet18": _Network(resnet.resnet18, image_size=224),
    "resnet50": _Network(resnet.resnet50, image_size=224),
}


def names() -> list[str]:
    """The names that `create` knows."""
    return list(_NETWORKS)


def image_size(name: str) -> int:
    """Side of the square images that the network called ``name`` is made for, in pixels.

    Raises:
        CompanionError: no such network.
    """
    return _network(name).image_size


def _network(name: str) -> _Network:
    if name not in _NETWORKS:
        raise CompanionError(f"there is no network {name!r}: choose one of {', '.join(_NETWORKS)}.")
    return _NETWORKS[name]


def create(
    name: str, *, labels: Sequence[str] | None = None, seed: int | None = None, **configuration: Any
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: one of `names`.
        labels: class names in the order of the outputs; kept with the network and in its file.
        seed: draw the weights from this seed and leave torch's global generator alone; None draws from that.
        configuration: the network's own arguments, for example ``width=8`` or ``classes=4``.

    Returns:
        The network, in training mode. `describe` tells what it is. Every image network takes float
        images [N, 3, H, W] in 0..1 and returns scores (logits) [N, classes]; normalisation is inside.

    Raises:
        CompanionError: no such network, or an argument that it does not take.
    """
    network = _network(name)
    parameters = inspect.signature(network.build).parameters
    for key in configuration:
        if key not in parameters:
            raise CompanionError(f"{name} has no setting {key!r}: it takes {', '.join(parameters)}.")
    full = {key: parameter.default for key, parameter in parameters.items()} | configuration
    # JSON, in which the configuration travels, has lists only: make both forms one.
    full = {key: tuple(value) if isinstance(value, list) else value for key, value in full.items()}
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model = network.build(**full)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CompanionError(f"{name} cannot be built from {configuration}: {error}.") from error
    return attach(model, ModelInfo(name, full, network.task, tuple(labels) if labels is not None else None))


def attach(model: nn.Module, info: ModelInfo) -> nn.Module:
    """Note on ``model`` what it is.

    Raises:
        CompanionError: the number of labels is not the number of the network's classes.
    """
    classes = info.configuration.get("classes")
    if info.labels is not None and classes is not None and len(info.labels) != classes:
        raise CompanionError(f"{info.name} has {classes} classes, but {len(info.labels)} labels were given.")
    model.__dict__["companion_info"] = info  # plain data: not a module, a parameter or a buffer
    return model


def describe(model: nn.Module) -> ModelInfo:
    """What ``model`` is: its name, configuration, task, labels and vocabulary.

    Raises:
        CompanionError: the network does not come from `create` or `load`.
    """
    info = model.__dict__.get("companion_info")
    if info is None:
        raise CompanionError(
            f"this {type(model).__name__} was not made by models.create, so it cannot be described or saved by name."
        )
    return info
