"""Networks by name: `create` builds one and notes on it everything needed to build it again."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    task: str


_NETWORKS = {
    "simple_cnn": _Network(cnn.simple_cnn, "classify"),
    "simple_cnn_3conv": _Network(cnn.simple_cnn_3conv, "classify"),
    "cifar_resnet14": _Network(resnet.cifar_resnet14, "classify"),
    "cifar_resnet20": _Network(resnet.cifar_resnet20, "classify"),
    "cifar_resnet56": _Network(resnet.cifar_resnet56, "classify"),
    "cifar_resnet18": _Network(resnet.cifar_resnet18, "classify"),
    "cifar_resnet50": _Network(resnet.cifar_resnet50, "classify"),
    "resnet18": _Network(resnet.resnet18, "classify"),
    "resnet50": _Network(resnet.resnet50, "classify"),
}


def names() -> list[str]:
    """The names that `create` knows."""
    return list(_NETWORKS)


def create(name: str, *, labels: Sequence[str] | None = None, **configuration: Any) -> nn.Module:
    """Build a network with fresh weights (drawn from torch's global generator).

    Args:
        name: one of `names`.
        labels: class names in the order of the outputs; kept with the network and in its file.
        configuration: the network's own arguments, for example ``width=8`` or ``classes=4``.

    Returns:
        The network, in training mode. `describe` tells what it is. Every image network takes float
        images [N, 3, H, W] in 0..1 and returns scores (logits) [N, classes]; normalisation is inside.

    Raises:
        CompanionError: no such network, or an argument that it does not take.
    """
    if name not in _NETWORKS:
        raise CompanionError(f"there is no network {name!r}: choose one of {', '.join(_NETWORKS)}.")
    network = _NETWORKS[name]
    parameters = inspect.signature(network.build).parameters
    for key in configuration:
        if key not in parameters:
            raise CompanionError(f"{name} has no setting {key!r}: it takes {', '.join(parameters)}.")
    full = {key: parameter.default for key, parameter in parameters.items()} | configuration
    # JSON, in which the configuration travels, has lists only: make both forms one.
    full = {key: tuple(value) if isinstance(value, list) else value for key, value in full.items()}
    try:
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
