"""Which channels of a network belong together: what can only be removed as a whole.

A convolution's output channel is also a channel of the normalisation after it, an input channel of the next
convolution and, where a residual addition joins two branches, a channel of the other branch. So the network is traced
(`torch.fx`) and every value that flows through it is labelled: one number for each channel, fresh where a layer makes
channels. Layers that read a value write its labels down; an addition declares two labels equal, position by position;
a concatenation writes one list after the other. In the end the labels that were declared equal are one *group*, and
groups that go through the same layers are one *width*: how many of them stay can be chosen freely. (The dependency
graph of Fang et al., DepGraph, CVPR 2023, followed by labels instead of by pairs of layers.)

What this file does not know keeps its channels, and so does what mixes them: unknown operators, LayerNorm and GroupNorm
(their averages go over channels), convolutions in groups that are not depthwise, splits and views at numbers written
into the network, weights that are used twice, and the inputs and outputs of the whole network.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from companion.compress.attention import Attention, replaceable
from companion.compress.exclude import excluded
from companion.errors import CompanionError
from companion.metrics import probe

Labels = np.ndarray
"""int64 [channels]: which group each channel belongs to."""

FROZEN = -1
"""In place of a group's number: this channel always stays."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ATTENTION = (nn.MultiheadAttention, Attention)


@dataclass(frozen=True)
class Part:
    """A tensor of a layer, and where its channels lie.

    Along dimension ``axis`` the tensor is ``copies`` (queries, keys, values) of all channels, and each channel is
    ``size`` rows (the width of a head); nearly always one copy of one row.
    """

    name: str
    axis: int = 0
    copies: int = 1
    size: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        """What belongs to each channel: [channels, numbers]."""
        split = tensor.movedim(self.axis, 0).unflatten(0, (self.copies, -1, self.size))
        return split.transpose(0, 1).flatten(1)

    def take(self, tensor: Tensor, channels: Labels) -> Tensor:
        """The tensor with these channels only."""
        positions = np.arange(tensor.shape[self.axis]).reshape(self.copies, -1, self.size)[:, channels].ravel()
        taken = tensor.index_select(self.axis, torch.as_tensor(positions, device=tensor.device))
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return taken.contiguous(memory_format=torch.channels_last) if last else taken


def parts(module: nn.Module, side: str) -> list[Part]:
    """The tensors of a layer that have the channels of one side: ``out``, ``in``, ``through`` (both) or ``heads``."""
    kind = type(module)
    if kind in ATTENTION:
        size: Any = module.head_dim
        found = [
            Part("in_proj_weight", 0, 3, size),
            Part("in_proj_bias", 0, 3, size),
            Part("out_proj.weight", 1, 1, size),
        ]
    elif side == "in":
        return [Part("weight", 0 if kind in TRANSPOSED else 1)]
    elif side == "out":
        found = [Part("weight", 1 if kind in TRANSPOSED else 0), Part("bias")]
    else:
        found = [Part(name) for name in ("weight", "bias", "running_mean", "running_var")]
    return [part for part in found if tensor_of(module, part.name) is not None]


def attributes(module: nn.Module, side: str) -> tuple[str, ...]:
    """The numbers of a layer that count the channels of one side."""
    kind = type(module)
    if kind in ATTENTION:
        return ("num_heads", "out_proj.in_features")
    if kind is nn.Linear:
        return (f"{side}_features",)
    if kind is nn.PReLU:
        return ("num_parameters",)
    if kind in NORMS:
        return ("num_features",)
    return ("in_channels", "out_channels", "groups") if side == "through" else (f"{side}_channels",)


def tensor_of(module: nn.Module, name: str) -> Any:
    """A tensor by its dotted name below the module, or None."""
    for part in name.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module


@dataclass(frozen=True)
class Width:
    """Groups of channels that go through the same layers: of these, any number can stay."""

    groups: tuple[int, ...]
    """Their numbers."""
    uses: tuple[tuple[str, str, int], ...]
    """Where they lie: (layer, side, how many of the layer's channels one group is; after flattening, one for each
    pixel)."""

    @property
    def name(self) -> str:
        """The first layer that makes these channels."""
        return next(layer for layer, side, _ in self.uses if side in ("out", "heads"))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, by dotted name, in the order in which they run."""
        return tuple(dict.fromkeys(layer for layer, _, _ in self.uses))


@dataclass(frozen=True)
class ChannelGraph:
    """What `channel_graph` found."""

    widths: tuple[Width, ...]
    """In the order in which the network makes them."""
    labels: dict[tuple[str, str], Labels]
    """For each layer (dotted name) and side, the group of each of its channels, `FROZEN` for one that must stay.
    Sides: ``out`` and ``in`` of a convolution or linear layer, ``through`` of a normalisation or depthwise convolution,
    ``heads`` of attention."""

    @property
    def groups(self) -> int:
        """How many groups there are, of all widths."""
        return sum(len(width.groups) for width in self.widths)


def channel_graph(model: nn.Module, example: Any, *, exclude: Collection[str] = ()) -> ChannelGraph:
    """Find the groups of channels that must be removed as a whole.

    Args:
        model: any network that `torch.fx` can trace; it is not changed, and no weight is read.
        example: a tensor, a tuple of the network's arguments, or a dict of them by name. Only shapes matter.
        exclude: layers, or blocks of them, by dotted name, that keep all their channels.

    Raises:
        CompanionError: the network cannot be traced or does not run on the example, or ``exclude`` names nothing.
    """
    probe.check_example(model, example)
    exclude = excluded(exclude, dict(model.named_modules()))
    twin, graph = traced(model)
    graphs = [(twin, graph)]
    if layers_without_trace := _layers(twin) - _called(graph):
        # Branches that run in training only, as the auxiliary classifiers of GoogLeNet, lose the same channels.
        with suppress(CompanionError):
            other = traced(model, training=True)
            if layers_without_trace & _called(other[1]):
                graphs.append(other)
    values: dict[fx.Node, Any] = {}
    with (
        probe.one_sentence(model, example, "on the meta device (shapes, no values)"),
        probe.separate_layers(),
        probe.undrawn(model),
        torch.no_grad(),
    ):
        for network, graph in graphs:
            runner = _Runner(fx.GraphModule(network.eval(), graph))
            runner.run(*probe.copied(_arguments(network, example), "meta"))
            values |= runner.values
    return _Follower(twin, [graph for _, graph in graphs], values, exclude).follow()


def traced(model: nn.Module, *, training: bool = False) -> tuple[nn.Module, fx.Graph]:
    """A copy of the network without values (on the meta device), and its trace.

    Raises:
        CompanionError: `torch.fx` cannot trace it.
    """
    twin = probe.on_meta(model).train(training)
    try:
        return twin, _Tracer().trace(twin)
    except Exception as error:  # whatever the network does with a value that is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")[: probe.LONGEST]
        raise CompanionError(
            f"{type(model).__name__} cannot be traced by torch.fx, so its channels cannot be followed: {reason}."
        ) from error


def _layers(model: nn.Module) -> set[str]:
    """Names of the layers that hold weights."""
    return {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def layer_of(model: nn.Module, layer: str, side: str, channels: int) -> nn.Module:
    """The layer of this name, seen to have so many channels on this side.

    Raises:
        CompanionError: the graph that says so was made of another network.
    """
    try:
        module = model.get_submodule(layer)
        fits = all(
            tensor_of(module, part.name).shape[part.axis] == part.copies * part.size * channels
            for part in parts(module, side)
        )
    except (AttributeError, IndexError):
        fits = False
    if not fits:
        raise CompanionError(
            f"the graph was made of another network: {layer} is not as it says; make one with channel_graph."
        )
    return module


def _arguments(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """The example in the order of the network's parameters."""
    positional = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    bound = inspect.signature(model.forward).bind(*positional, **(example if isinstance(example, dict) else {}))
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def _below(layer: str, name: str) -> bool:
    return bool(layer) and f"{layer}.".startswith(f"{name}.")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Attention) or super().is_leaf_module(m, module_qualified_name)


class _Runner(fx.Interpreter):
    """Runs the traced network and keeps every value: on the meta device, its shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


@dataclass(frozen=True, eq=False)
class _Channels:
    """Labels of a value, and the dimension along which its channels lie."""

    labels: Labels
    axis: int


# By name, as functions, methods (``x.add``) and in-place forms (``add_``, ``iadd``) come under the same.
_JOINING = {"add", "sub", "mul", "truediv", "div", "maximum", "minimum", "floordiv", "pow", "where", "rsub"}
_JOINING |= {"iadd", "isub", "imul", "itruediv", "subtract", "multiply", "divide"}
_EACH = {"relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid"}
_EACH |= {
    "hardtanh",
    "sigmoid",
    "tanh",
    "softplus",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
}
_EACH |= {"abs", "neg", "exp", "sqrt", "square", "clamp", "clone", "contiguous", "detach", "float", "to"}
_EACH |= {"stochastic_depth", "threshold", "logsigmoid", "softsign"}
_OVER_SPACE = {"interpolate", "pad"} | {
    f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")
}
_AVERAGES = {"mean", "sum", "amax", "amin", "std", "var"}
_SHAPES = {"getattr", "size", "dim", "numel", "len"}
_RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}

_EACH_LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity),
)
_SPATIAL_LAYERS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
)


class _Follower:
    """Goes through the traced network (if it trains otherwise, through both traces) and labels every value.

    A value without labels (None) has channels that always stay.
    """

    def __init__(
        self, model: nn.Module, graphs: list[fx.Graph], values: dict[fx.Node, Any], exclude: tuple[str, ...]
    ) -> None:
        self.nodes = [node for graph in graphs for node in graph.nodes]
        self.values = values
        self.modules = dict(model.named_modules())
        self.leader: list[int] = [0]  # of each label, the label that it was declared equal to; 0 is what must stay
        self.seen: dict[tuple[str, str], Labels] = {}
        self.found: dict[fx.Node, Any] = {}  # _Channels, None, or a tuple of these
        used = Counter(id(p) for m in set(self.modules.values()) for p in m.parameters(recurse=False))
        # Layers whose weights somebody else also uses, or that stand in for them (masks, parametrisations), stay.
        self.fixed = {
            name
            for name, module in self.modules.items()
            if any(used[id(p)] > 1 for p in module.parameters())
            or any(_below(name, other) for other in exclude)
            or not _plain(module)
        }
        self.fixed |= {str(node.target).rpartition(".")[0] for node in self.nodes if node.op == "get_attr"}

    # Labels: a forest in which every label points towards the leader of its group.

    def fresh(self, count: int) -> Labels:
        start = len(self.leader)
        self.leader += range(start, start + count)
        return np.arange(start, start + count)

    def root(self, label: int) -> int:
        while self.leader[label] != label:
            self.leader[label] = self.leader[self.leader[label]]
            label = self.leader[label]
        return label

    def join(self, a: Labels, b: Labels) -> None:
        for one, other in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self.root(one), self.root(other)))
            self.leader[high] = low  # so that what must stay, 0, leads

    def freeze(self, value: Any) -> None:
        for channels in tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, _Channels)):
            if isinstance(channels, _Channels):
                self.join(channels.labels, np.zeros_like(channels.labels))

    def note(self, layer: str, side: str, labels: Labels) -> Labels:
        """Write down the labels of a layer's channels; a layer that runs twice has one set."""
        before = self.seen.setdefault((layer, side), labels)
        self.join(before, labels)
        if layer in self.fixed:
            self.freeze(_Channels(labels, 0))
        return before

    def follow(self) -> ChannelGraph:
        for node in self.nodes:
            tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.values[node]))
            if node.op == "output":
                self.freeze(self.of(node.args))
            elif node.op == "call_module":
                self.found[node] = self.layer(node)
            elif node.op in ("call_function", "call_method") and not tensors:
                self.found[node] = None if _name(node) in _SHAPES else self.unknown(node)
            elif node.op in ("call_function", "call_method"):
                self.found[node] = self.operation(node)
            else:
                self.found[node] = None  # an input, or a weight used directly
        return self.result()

    def of(self, argument: Any) -> Any:
        """Labels of an argument: nodes are looked up, also in lists."""
        return fx.node.map_arg(argument, lambda node: self.found[node])

    def shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.values[node].shape)

    def unknown(self, node: fx.Node) -> Any:
        """Keep all channels of what goes in; of a layer also those that it has shown elsewhere, if it runs twice."""
        self.freeze(self.of((node.args, node.kwargs)))
        if node.op == "call_module":
            self.fixed.add(str(node.target))
            for (layer, _), labels in self.seen.items():
                if layer == node.target:
                    self.freeze(_Channels(labels, 0))

    def layer(self, node: fx.Node) -> Any:
        module, name = self.modules[str(node.target)], str(node.target)
        kind: Any = type(module)
        source = node.args[0] if node.args else None
        value = self.found[source] if isinstance(source, fx.Node) else None
        if kind in ATTENTION:
            if not (kind is Attention or replaceable(module)) or self.shows_heads(node):
                return self.unknown(node)
            self.freeze(self.of((node.args, node.kwargs)))  # what goes in and out stays; the heads are its own
            heads: Any = module.num_heads
            self.note(name, "heads", self.fresh(heads))
            return None
        if not isinstance(source, fx.Node) or len(node.all_input_nodes) > 1:
            return self.unknown(node)
        if not isinstance(self.values[node], Tensor):  # a recurrent layer's states, pooling's indices
            return self.unknown(node)
        ndim = len(self.shape(node))
        if kind in CONVOLUTIONS or kind in TRANSPOSED:
            axis = ndim - 1 - len(module.kernel_size)
            return self.convolution(node, name, module, value, axis)
        if kind is nn.Linear:
            if value is not None and value.axis != ndim - 1:
                return self.unknown(node)
            self.note(name, "in", _labels(value, module.in_features))
            return self.made(name, module.out_features, ndim - 1)
        if kind in NORMS or (kind is nn.PReLU and module.num_parameters > 1):
            if value is not None and value.axis != 1:
                return self.unknown(node)
            self.note(name, "through", _labels(value, self.shape(node)[1]))
            return value
        if value is None:
            return None
        if kind in _EACH_LAYERS or kind is nn.PReLU:
            return value
        if kind in _SPATIAL_LAYERS and self.over_space(node, value, kind.__name__):
            return value
        if kind is nn.Flatten:
            return self.reshape(node, source, value)
        return self.unknown(node)

    def shows_heads(self, node: fx.Node) -> bool:
        """Whether the rest of the network sees the heads of attention: it uses their weights, or masks each apart."""
        others = [
            user for user in node.users if not (_name(user) == "getitem" and (user.args[1] == 0 or not user.users))
        ]
        weights = self.values[node][1] is not None and bool(others)
        mask = node.kwargs.get("attn_mask", node.args[5] if len(node.args) > 5 else None)
        mask = self.values[mask] if isinstance(mask, fx.Node) else mask
        return weights or (isinstance(mask, Tensor) and mask.dim() == 3)

    def made(self, name: str, count: Any, axis: int) -> _Channels:
        labels = self.seen.get((name, "out"))
        return _Channels(self.note(name, "out", self.fresh(count) if labels is None else labels), axis)

    def convolution(self, node: fx.Node, name: str, module: Any, value: Any, axis: int) -> Any:
        if value is not None and value.axis != axis:
            return self.unknown(node)
        if module.groups == 1:
            self.note(name, "in", _labels(value, module.in_channels))
            return self.made(name, module.out_channels, axis)
        depthwise = module.groups == module.in_channels and (
            type(module) in CONVOLUTIONS or module.out_channels == module.in_channels
        )
        if not depthwise or value is None:
            return self.unknown(node)
        # Output j comes from input j // (outputs per input).
        labels = np.repeat(value.labels, module.out_channels // module.in_channels)
        return _Channels(self.note(name, "through", labels), axis)

    def operation(self, node: fx.Node) -> Any:
        name = _name(node)
        source = node.args[0] if node.args else None
        if name in ("cat", "concat", "concatenate"):
            return self.concatenate(node)
        if name in _JOINING:
            return self.joined(node)
        value = self.found[source] if isinstance(source, fx.Node) else None
        if name == "getitem":
            return self.item(node, source, value)
        others = [n for n in node.all_input_nodes if n is not source and isinstance(self.values[n], Tensor)]
        if not isinstance(value, _Channels) or others:
            return self.unknown(node)
        if node.target in ("squeeze_", "unsqueeze_", "transpose_"):
            return self.unknown(node)  # what came before has another shape now
        if name in _EACH:
            return value
        if name in _OVER_SPACE and self.over_space(node, value, name):
            return value
        if name in _AVERAGES:
            return self.average(node, source, value)
        if name in _RESHAPES:
            return self.reshape(node, source, value)
        if name in ("permute", "transpose"):
            return self.permuted(node, source, value, name)
        if name in ("chunk", "split"):
            return self.pieces(node, value, name)
        return self.unknown(node)

    def over_space(self, node: fx.Node, value: _Channels, name: str) -> bool:
        """Whether an operator leaves dimension 1, the channels, alone: ``…2d`` takes two dimensions after that."""
        shape = self.shape(node)
        dimensions = re.search(r"(\d)d$", name.lower())
        if dimensions and len(shape) != 2 + int(dimensions[1]):
            return False
        if name == "pad":
            amounts = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
            if not isinstance(amounts, list | tuple) or len(amounts) > 2 * (len(shape) - 2):
                return False
        return value.axis == 1 and len(shape) > 1 and shape[1] == len(value.labels)

    def joined(self, node: fx.Node) -> Any:
        """Numbers combined place by place: the channels at one place stay or go together."""
        out = self.shape(node)
        inputs = [n for n in node.all_input_nodes if isinstance(self.values[n], Tensor)]
        if any(n not in inputs and n.op != "placeholder" for n in node.all_input_nodes):
            return self.unknown(node)  # a number that the network takes from a shape, perhaps that of the channels
        values = [(self.found[n], self.shape(n)) for n in inputs]
        # Dimensions are counted from the right, as in broadcasting. One channel for all places joins nothing.
        axes = {
            value: value.axis - len(shape)
            for value, shape in values
            if isinstance(value, _Channels) and len(value.labels) == out[value.axis - len(shape)]
        }
        if len(set(axes.values())) != 1:
            return self.unknown(node)
        first, axis = next(iter(axes.items()))
        for value, shape in values:
            if value in axes:
                self.join(first.labels, value.labels)
                continue
            self.freeze(value)
            if len(shape) >= -axis and shape[axis] != 1:  # a constant for each channel
                self.freeze(first)
        return _Channels(first.labels, len(out) + axis)

    def concatenate(self, node: fx.Node) -> Any:
        tensors = list(node.all_input_nodes)
        out = self.shape(node)
        dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
        known = [self.found[n] for n in tensors]
        axes = {value.axis for value in known if isinstance(value, _Channels)}
        listed = node.args[0] if node.args else node.kwargs.get("tensors")
        if not isinstance(dim, int) or len(axes) != 1 or not isinstance(listed, list | tuple):
            return self.unknown(node)
        axis, dim = axes.pop(), dim % len(out)
        if dim != axis:  # one after the other in space: place by place the same channels
            return self.joined_along(node, listed, axis)
        labels = [_labels(self.found[n], self.shape(n)[axis]) for n in listed]
        return _Channels(np.concatenate(labels), axis)

    def joined_along(self, node: fx.Node, listed: Any, axis: int) -> Any:
        values = [self.found[n] for n in listed]
        if any(value is None for value in values):
            return self.unknown(node)
        for value in values[1:]:
            self.join(values[0].labels, value.labels)
        return _Channels(values[0].labels, axis)

    def item(self, node: fx.Node, source: Any, value: Any) -> Any:
        index: Any = node.args[1]
        if isinstance(value, tuple):
            return value[index] if isinstance(index, int) else self.unknown(node)
        if not isinstance(value, _Channels):
            return self.unknown(node)
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, int | slice | fx.Node) for i in index):
            return self.unknown(node)
        if len(index) > value.axis and index[value.axis] != slice(None):
            return self.unknown(node)
        if any(isinstance(i, fx.Node) and not isinstance(self.values[i], int) for i in index):
            return self.unknown(node)
        return _Channels(value.labels, value.axis - sum(not isinstance(i, slice) for i in index[: value.axis]))

    def average(self, node: fx.Node, source: Any, value: _Channels) -> Any:
        shape = self.shape(source)
        dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, list | tuple) or not all(type(d) is int for d in dims):
            return self.unknown(node)  # over everything
        gone = {d % len(shape) for d in dims}
        if value.axis in gone:
            return self.unknown(node)
        kept = len(self.shape(node)) == len(shape)
        return _Channels(value.labels, value.axis if kept else value.axis - sum(d < value.axis for d in gone))

    def reshape(self, node: fx.Node, source: Any, value: _Channels) -> Any:
        """The channels stay where they are, or each becomes as many as it has pixels."""
        before, after, axis = self.shape(source), self.shape(node), value.axis
        if before[:axis] != after[:axis] or len(after) <= axis:
            return self.unknown(node)
        if node.target in ("view", "reshape") or getattr(node.target, "__name__", "") == "reshape":
            rest = node.args[1:]
            sizes: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
            if len(sizes) <= axis or (isinstance(sizes[axis], int) and sizes[axis] != -1):
                return self.unknown(node)  # a number written into the network
        if after[axis] == before[axis]:
            return value
        if len(after) == axis + 1:
            return _Channels(np.repeat(value.labels, math.prod(before[axis + 1 :])), axis)
        return self.unknown(node)

    def permuted(self, node: fx.Node, source: Any, value: _Channels, name: str) -> Any:
        ndim = len(self.shape(source))
        dims: Any = node.args[1:] or tuple(node.kwargs.values())
        dims = dims[0] if len(dims) == 1 else dims
        if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims):
            return self.unknown(node)
        order = [d % ndim for d in dims]
        if name == "transpose":
            a, b = order
            order = list(range(ndim))
            order[a], order[b] = b, a
        return _Channels(value.labels, order.index(value.axis))

    def pieces(self, node: fx.Node, value: _Channels, name: str) -> Any:
        dim: Any = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        shapes = [tuple(piece.shape) for piece in self.values[node]]
        if not isinstance(dim, int):
            return self.unknown(node)
        if dim % len(shapes[0]) != value.axis:
            return (value,) * len(shapes)
        # A split at fixed sizes stays. Equal chunks stay equal if each loses the same places.
        if name == "split" or len({shape[value.axis] for shape in shapes}) > 1:
            return self.unknown(node)
        pieces = np.split(value.labels, len(shapes))
        for piece in pieces[1:]:
            self.join(pieces[0], piece)
        return tuple(_Channels(piece, value.axis) for piece in pieces)

    def result(self) -> ChannelGraph:
        """Number the groups, and gather those that go through the same layers."""
        roots = {key: np.array([self.root(label) for label in labels]) for key, labels in self.seen.items()}
        uses: dict[int, list[tuple[str, str, int]]] = {}
        for (layer, side), labels in roots.items():
            for root, count in zip(*np.unique(labels, return_counts=True), strict=True):
                uses.setdefault(int(root), []).append((layer, side, int(count)))
        uses.pop(0, None)
        widths: dict[tuple[Any, ...], list[int]] = {}
        for root in sorted(uses):
            if any(side in ("out", "heads") for _, side, _ in uses[root]):
                widths.setdefault(tuple(uses[root]), []).append(root)
        number = np.full(len(self.leader), FROZEN)
        found: list[Width] = []
        count = 0
        for key, members in widths.items():
            groups = range(count, count + len(members))
            number[members] = groups
            found.append(Width(tuple(groups), key))
            count += len(members)
        return ChannelGraph(tuple(found), {key: number[labels] for key, labels in roots.items()})


def _name(node: fx.Node) -> str:
    """Of a function or a method, without the mark of its in-place form."""
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).rstrip("_")


def _labels(value: _Channels | None, count: Any) -> Labels:
    """Those of a value; of one without labels, those of channels that stay."""
    return np.zeros(count, dtype=np.int64) if value is None else value.labels


def _plain(module: nn.Module) -> bool:
    """Whether a layer's weight is a parameter of its own, not computed from others as masks and weight norms do."""
    own = [name for name in ("weight", "in_proj_weight") if getattr(module, name, None) is not None]
    return all(name in module._parameters for name in own) and not any(
        is_parametrized(inner) for inner in module.modules()
    )
