"""The layers of a compressed network that `create` does not build: how to write them down and build them again.

A network is its name, its configuration and, if it was compressed, the *layers* that differ: by path, the arguments
of the layer that stands there now, such as a narrower convolution, or two in place of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companion.errors import CompanionError


@dataclass(frozen=True)
class _Kind:
    """One row of the table below."""

    build: type[nn.Module]
    arguments: tuple[str, ...]
    """Of its constructor, each also an attribute of the layer; ``bias`` there is a tensor or None."""


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
KINDS = {
    "Conv2d": _Kind(nn.Conv2d, (*_CONVOLUTION, "padding_mode")),
    "ConvTranspose2d": _Kind(nn.ConvTranspose2d, (*_CONVOLUTION, "output_padding")),
    "BatchNorm2d": _Kind(nn.BatchNorm2d, _NORM),
    "Linear": _Kind(nn.Linear, ("in_features", "out_features", "bias")),
    "Identity": _Kind(nn.Identity, ()),
}
"""Layers that a file can hold in place of another; besides these, a Sequential of them."""

_DIRECTIONS = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
"""Arguments of convolutions with one whole number for each direction, and the least that these can be."""

Specification = dict[str, Any]


def specification(module: nn.Module) -> Specification | None:
    """What it takes to build such a layer again, in plain values; None if it is none of `KINDS`."""
    name = type(module).__name__
    if type(module) is nn.Sequential:
        inner = [(key, specification(layer)) for key, layer in module.named_children()]
        if any(layer is None for _, layer in inner):
            return None
        return {"kind": "Sequential", "layers": [[key, layer] for key, layer in inner]}
    if name not in KINDS or type(module) is not KINDS[name].build:
        return None
    values = {key: getattr(module, key) for key in KINDS[name].arguments}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    return {"kind": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def build(found: Specification) -> nn.Module:
    """The layer of a `specification`, with fresh weights.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it was forged or damaged.
    """
    arguments = dict(found)
    name = arguments.pop("kind")
    if name == "Sequential":
        layers = nn.Sequential()
        for key, layer in arguments["layers"]:
            layers.add_module(key, build(layer))
        return layers
    if arguments.keys() != set(KINDS[name].arguments):
        raise ValueError(f"a {name} has other arguments")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    for key in values.keys() & _DIRECTIONS.keys():  # torch takes some of these, and fails when the layer computes
        value, least = values[key], _DIRECTIONS[key]
        pair = isinstance(value, tuple) and len(value) == 2 and all(type(x) is int and x >= least for x in value)
        if not pair and not (key == "padding" and value in ("same", "valid")):
            raise ValueError(f"its {key} is {value!r}")
    return KINDS[name].build(**values)


def changed_layers(model: nn.Module, plain: nn.Module) -> dict[str, Specification]:
    """By path, the layers of ``model`` that are not as in ``plain``, the network as `create` builds it.

    Raises:
        CompanionError: one of them cannot be written down.
    """
    changed: dict[str, Specification] = {}

    def compare(path: str, module: nn.Module, other: nn.Module) -> None:
        if parametrize.is_parametrized(module):
            raise CompanionError(
                f"the weight of {path or type(model).__name__} is computed from others: make it permanent first "
                "(compress.make_permanent after pruning, compress.freeze after prepare_qat)."
            )
        mine = specification(module)
        if mine is not None and mine == specification(other):
            return
        same = type(module) is type(other)
        children, others = dict(module.named_children()), dict(other.named_children())
        if same and children and children.keys() == others.keys():
            for name, child in children.items():
                compare(f"{path}.{name}".lstrip("."), child, others[name])
        elif mine is not None and path:
            changed[path] = mine
        elif not same or children or _shapes(module) != _shapes(other) or module.extra_repr() != other.extra_repr():
            raise CompanionError(
                f"the layer {path or type(model).__name__} ({type(module).__name__}) cannot be written to a file: "
                f"only {', '.join(KINDS)} and Sequential can differ from the network as it was made."
            )

    compare("", model, plain)
    return changed


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def replace_layers(model: nn.Module, layers: Mapping[str, Specification]) -> None:
    """Put the layers that `changed_layers` found into a network as `create` builds it, with fresh weights.

    Raises:
        CompanionError: there is no such place, no such layer, or they do not go together.
    """
    for path, found in layers.items():
        parent, _, name = path.rpartition(".")
        try:
            if not path:
                raise ValueError("the whole network is no layer")
            model.get_submodule(path)
            setattr(model.get_submodule(parent), name, build(found))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise CompanionError(f"the layer {path!r} cannot be built as the file says: {reason}.") from error


def check_runs(model: nn.Module, example: Tensor) -> int:
    """Run a network on the meta device, where nothing is computed, on an example that is there, too.

    Returns:
        How many numbers the layer that gives the most gives.

    Raises:
        CompanionError: its layers do not go together.
    """
    given = [0]

    def look(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        given.append(output.numel() if isinstance(output, Tensor) else 0)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(example)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise CompanionError(f"its layers do not go together: {str(error).partition(chr(10))[0]}.") from error
    finally:
        for handle in handles:
            handle.remove()
    return max(given)
