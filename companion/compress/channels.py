"""Pruning of whole channels: what is left is a smaller dense network, faster on any machine (2.1.2)."""

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from companion.compress.attention import Attention
from companion.compress.graph import (
    ATTENTION,
    CONVOLUTIONS,
    FROZEN,
    NORMS,
    TRANSPOSED,
    ChannelGraph,
    attributes,
    channel_graph,
    layer_of,
    parts,
    tensor_of,
    traced,
)
from companion.compress.importance import Loss, score_channels
from companion.errors import CompanionError
from companion.metrics import compare_latency, count_complexity, inference

SCOPES = ("uniform", "global")
NARROW, STEP = 32, 16
"""Above 32 channels only multiples of 16 pay, the floats of an AVX-512 register: a 3×3 convolution with 33 to 47
channels takes as long as one with 48 (see the staircase in the notebook 2_1_2_pruning)."""
FLOOR = 0.5
"""A global ranking leaves every width at least half of what a uniform cut to the same MACs would. Without a floor it
left 5 of 64 channels in single layers, and lost to a random choice."""


def prune_channels(
    model: nn.Module,
    example: Any,
    macs: float = 0.5,
    *,
    latency: float | None = None,
    importance: str = "l2",
    scope: str = "uniform",
    round_to: int | None = None,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Loss | None = None,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A smaller copy of ``model``: its least important channels are gone from every layer that they go through.

    Train it on afterwards: at half the MACs an accuracy falls to chance at first, and a few epochs bring it back.

    Args:
        model: any network that `torch.fx` can trace; it is not changed, and its mode (training or not) carries over.
        example: a tensor, a tuple of the network's arguments, or a dict of them by name. Shapes matter, and for
            ``latency`` the values and the batch too.
        macs: share of the multiply–adds to leave, above 0 and up to 1. What is left is at most that, and near to it
            where channels are many; multiples of 8 or 16 can leave narrow networks much less.
        latency: instead of ``macs``, the share of the time to leave: bisection over the share of MACs, each
            try measured against ``model`` by `metrics.compare_latency`, in the example's batch, in one thread.
            Takes some ten seconds, and differs a little from run to run.
        importance: what to remove first: ``l1``, ``l2``, ``taylor``, ``bn_scale`` or ``random``; see `score_channels`.
        scope: ``uniform`` leaves the same share of every width; ``global`` ranks the whole network's channels at once,
            each score divided by the mean of its width, and leaves every width at least `FLOOR` of the uniform share.
        round_to: leave multiples of so many channels (or all); attention heads are not rounded. None: above 32
            channels multiples of 16, below any number, which is what CPUs with AVX-512 like.
        data: for ``taylor``, batches (inputs, targets).
        loss: for ``taylor``, ``loss(outputs, targets)``; by default that of the network's task, or cross-entropy.
        exclude: layers, or blocks of them, by dotted name, that keep all their channels.
        seed: for ``random``.

    Returns:
        A network of the same class with smaller layers (attention that loses heads becomes `Attention`), on the same
        device. Prune it again, export or train it like any other; an optimizer needs its new parameters. Of its
        ``state_dict()`` `rebuild` makes it again; networks of `models.create` are saved by `models.save`.

    Raises:
        CompanionError: a network that cannot be traced, has nothing to remove or runs otherwise than its trace shows; a
            target that cannot be reached; weights that are not finite; an argument that makes no sense.
    """
    share = _share(macs, "macs") if latency is None else _share(latency, "latency")
    if scope not in SCOPES:
        raise CompanionError(f"scope is {scope!r}: choose one of {', '.join(SCOPES)}.")
    if round_to is not None and (type(round_to) is not int or round_to < 1):
        raise CompanionError(f"round_to is {round_to!r}: give a whole number from 1, or None.")
    graph = channel_graph(model, example, exclude=exclude)
    if not graph.widths:
        raise CompanionError(
            f"{type(model).__name__} has no channel that can be removed: all go to its output, "
            "or to layers that are excluded, masked or not understood."
        )
    scores = score_channels(model, graph, importance, data=data, loss=loss, seed=seed)
    plan = _Plan(model, example, graph, round_to)
    if latency is not None:
        return _reach_latency(plan, scores, scope, share)
    return plan.build(plan.keep(scores, plan.counts(scores, scope, share)))


def remove_channels(model: nn.Module, graph: ChannelGraph, keep: np.ndarray) -> nn.Module:
    """A copy of ``model`` without some groups of channels.

    Args:
        model: the network of the graph; it is not changed.
        graph: from `channel_graph`.
        keep: bool [graph.groups], True for each group that stays.

    Raises:
        CompanionError: ``keep`` has another length, or leaves nothing of a width; or the graph is of another network.
    """
    keep = np.asarray(keep, dtype=bool)
    if keep.shape != (graph.groups,):
        raise CompanionError(f"keep has the shape {keep.shape}, but the network has {graph.groups} groups of channels.")
    for width in graph.widths:
        if not keep[list(width.groups)].any():
            raise CompanionError(f"all channels of {width.name} would be removed: leave at least one.")
    pruned = copy.deepcopy(model)
    for (layer, side), labels in graph.labels.items():
        stays = labels == FROZEN
        stays[~stays] = keep[labels[~stays]]
        if not stays.all():
            _cut(pruned, layer, side, np.flatnonzero(stays), len(labels))
    return pruned


def rebuild(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with the weights of ``state``, and as narrow as they are: a pruned network from its file.

    The widths of a pruned network are the shapes of its weights. So ``torch.save(pruned.state_dict(), …)``, or a
    safetensors file, is all that it takes to keep one. (Networks of `models.create` have `models.save` and
    `models.load`.)

    Args:
        model: the network as its own code makes it, not pruned; it is not changed.
        state: the ``state_dict()`` of what `prune_channels` or `remove_channels` made of such a network.

    Returns:
        The pruned network, on the device and in the mode of ``model``.

    Raises:
        CompanionError: weights of another network, or of one that was changed otherwise than in its widths. Whether the
            widths of neighbours go together shows only when it runs.
    """
    if not isinstance(model, nn.Module):
        raise CompanionError(f"a network (torch.nn.Module) is needed, not {type(model).__name__}.")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CompanionError("the weights are no state_dict: give tensors by name, as state_dict() does.")
    result = copy.deepcopy(model)
    for name in dict(result.named_modules()):
        module = result.get_submodule(name)
        own = {key: state.get(f"{name}.{key}".lstrip(".")) for key in module._parameters | module._buffers}
        found = {key: value for key, value in own.items() if value is not None}
        if isinstance(module, ATTENTION):
            found["out_proj.weight"] = state.get(f"{name}.out_proj.weight".lstrip("."), module.out_proj.weight)
        if all(value.shape == tensor_of(module, key).shape for key, value in found.items()):
            continue
        try:
            if isinstance(module, nn.MultiheadAttention):
                module = Attention.of(module)
                result.set_submodule(name, module)
            _resize(module, {key: tuple(value.shape) for key, value in found.items()})
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CompanionError(f"the weights of {name or 'the network'} differ in more than their widths.") from error
        if any(math.prod(value.shape) > tensor_of(module, key).numel() for key, value in found.items()):
            raise CompanionError(f"the weights of {name or 'the network'} are wider than it is, not narrower.")
        for key, value in found.items():
            _put(module, key, tensor_of(module, key).detach().new_empty(value.shape))
    try:
        result.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1].split()).rstrip(". ")
        raise CompanionError(f"the weights do not fit {type(model).__name__}: {reason}.") from error
    return result


def _resize(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Let a layer count as many channels as its weights will have.

    Raises:
        ValueError, TypeError, KeyError, IndexError, ZeroDivisionError: these are not the shapes of such a layer.
    """
    kind: Any = type(module)
    layer: Any = module
    if kind is Attention:
        layer.num_heads = shapes["in_proj_weight"][0] // (3 * layer.head_dim)
        inner = layer.num_heads * layer.head_dim
        layer.out_proj.in_features = inner
        expected = {"in_proj_weight": (3 * inner, layer.embed_dim), "in_proj_bias": (3 * inner,)}
        expected["out_proj.weight"] = (layer.embed_dim, inner)
    elif kind in (*CONVOLUTIONS, *TRANSPOSED):
        count, others = shapes["weight"][:2]
        rows_of, columns_of = ("in_channels", "out_channels") if kind in TRANSPOSED else ("out_channels", "in_channels")
        if layer.groups > 1:  # whole groups go, such as the channels of a depthwise convolution
            layer.groups = count // (getattr(layer, rows_of) // layer.groups)
        setattr(layer, rows_of, count)
        setattr(layer, columns_of, others * layer.groups)
        expected = {"weight": (count, others, *layer.kernel_size), "bias": (layer.out_channels,)}
        if layer.groups > 1 and count % layer.groups:
            raise ValueError("not whole groups")
    elif kind is nn.Linear:
        layer.out_features, layer.in_features = shapes["weight"]
        expected = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    elif kind in NORMS or kind is nn.PReLU:
        (count,) = next(iter(shapes.values()))
        setattr(layer, attributes(layer, "out")[0], count)
        expected = {key: () if key == "num_batches_tracked" else (count,) for key in shapes}
    else:
        raise TypeError("not a layer that loses channels")
    if 0 in next(iter(expected.values())) or any(shape != expected[key] for key, shape in shapes.items()):
        raise ValueError("shapes that do not go together")


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of each convolution and linear layer, and heads of each attention, by dotted name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ATTENTION):
            found[name] = module.num_heads
        elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
            found[name] = module.out_channels
        elif isinstance(module, nn.Linear) and name.rpartition(".")[0] not in found:  # attention's own is no width
            found[name] = module.out_features
    return found


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise CompanionError(f"{name} is {value!r}: give the share to leave, above 0 and up to 1.")
    return float(value)


def _cut(model: nn.Module, layer: str, side: str, channels: np.ndarray, total: int) -> None:
    """Leave these channels of one side of a layer, of ``total`` that it has."""
    module = layer_of(model, layer, side, total)
    if isinstance(module, nn.MultiheadAttention):
        module = Attention.of(module)
        model.set_submodule(layer, module)
    for part in parts(module, side):
        _put(module, part.name, part.take(tensor_of(module, part.name).detach(), channels))
    for attribute in attributes(module, side):
        _put(module, attribute, tensor_of(module, attribute) * len(channels) // total)


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute, by its dotted name: a parameter remains one."""
    path, _, name = name.rpartition(".")
    owner = module.get_submodule(path)
    if name in owner._parameters:
        value = nn.Parameter(value, requires_grad=getattr(owner, name).requires_grad)
    setattr(owner, name, value)


class _Plan:
    """How many channels of each width to leave for a number of MACs.

    A convolution's MACs are proportional to its input channels and to its output channels, attention's to its heads. So
    those of the whole network follow from the numbers of channels, without building it.
    """

    def __init__(self, model: nn.Module, example: Any, graph: ChannelGraph, round_to: int | None) -> None:
        self.model, self.example, self.graph = model, example, graph
        self.trace = str(traced(model)[1])
        self.sizes = np.array([len(width.groups) for width in graph.widths])
        heads = [any(side == "heads" for _, side, _ in width.uses) for width in graph.widths]
        self.allowed = [
            _allowed(size, 1 if head else round_to) for size, head in zip(self.sizes.tolist(), heads, strict=True)
        ]
        cost = count_complexity(model, example)
        names = {module: name for name, module in model.named_modules()}
        every = dict(model.named_modules(remove_duplicate=False))  # a module in two places has two names
        by_layer: dict[str, int] = {}
        for name, found in cost.by_module.items():
            layer = names[every[name]]
            by_layer[layer] = by_layer.get(layer, 0) + found.macs
        layers = list(dict.fromkeys(layer for layer, _ in graph.labels))
        self.layer_macs = np.array([by_layer.get(layer, 0) for layer in layers], dtype=float)
        self.other_macs = cost.macs - self.layer_macs.sum()
        # By layer and side: its channels, and how many of them one group of each width is.
        row = {use: i for i, use in enumerate(graph.labels)}
        self.layer_of = np.array([layers.index(layer) for layer, _ in graph.labels])
        self.channels = np.array([len(labels) for labels in graph.labels.values()])
        self.per_group = np.zeros((len(row), len(graph.widths)))
        for column, width in enumerate(graph.widths):
            for layer, side, count in width.uses:
                self.per_group[row[layer, side], column] = count
        self.total = cost.macs
        if self.total == 0:
            raise CompanionError(f"{type(model).__name__} has no multiply–adds on this example to cut.")

    def macs(self, counts: np.ndarray) -> float:
        """MACs with so many channels left of each width."""
        left = 1 - self.per_group @ (self.sizes - counts) / self.channels
        of_layers = self.layer_macs.copy()
        np.multiply.at(of_layers, self.layer_of, left)
        return float(self.other_macs + of_layers.sum())

    def counts(self, scores: Tensor, scope: str, share: float) -> np.ndarray:
        """How many channels of each width to leave for at most this share of the MACs.

        Raises:
            CompanionError: even one channel in each width (or the smallest multiple) needs more.
        """
        target = share * self.total * (1 + 1e-9)
        smallest = self.macs(self.rounded(np.zeros(len(self.sizes))))
        if smallest > target:
            raise CompanionError(
                f"{share:.3g} of the MACs cannot be reached: with the fewest channels in every layer "
                f"{smallest / self.total:.3g} of them are left."
            )
        knob = self.largest(lambda knob: knob * self.sizes, target)
        wanted = knob * self.sizes
        if scope == "global":
            floor = FLOOR * wanted
            place = _places(scores, self.graph)  # of each group in the ranking of the whole network, as a share
            ranked = [np.sort(place[list(width.groups)]) for width in self.graph.widths]

            def chosen(knob: float) -> np.ndarray:
                return np.maximum(floor, [np.searchsorted(order, knob) for order in ranked])

            wanted = chosen(self.largest(chosen, target))
        counts = self.rounded(wanted)
        # What rounding left of the target: one step more where it rounded down the most, as long as it fits.
        for width in np.argsort(counts / np.maximum(wanted, 1e-9), kind="stable"):
            more = counts.copy()
            more[width] = next((n for n in self.allowed[width] if n > counts[width]), counts[width])
            if self.macs(more) <= target:
                counts = more
        return counts

    def largest(self, wanted: Any, target: float) -> float:
        """By bisection, the highest knob in 0..1 at which what is wanted, rounded, needs at most so many MACs."""
        low, high = 0.0, 1.0
        if self.macs(self.rounded(wanted(high))) <= target:
            return high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.macs(self.rounded(wanted(middle))) <= target else (low, middle)
        return low

    def rounded(self, wanted: np.ndarray) -> np.ndarray:
        """The allowed number next to each of these."""
        return np.array(
            [allowed[np.abs(allowed - want).argmin()] for allowed, want in zip(self.allowed, wanted, strict=True)]
        )

    def keep(self, scores: Tensor, counts: np.ndarray) -> np.ndarray:
        """The best groups of each width: bool [groups]."""
        keep = np.zeros(self.graph.groups, dtype=bool)
        for width, count in zip(self.graph.widths, counts, strict=True):
            groups = np.array(width.groups)
            keep[groups[np.argsort(-scores[groups].numpy(), kind="stable")[:count]]] = True
        return keep

    def build(self, keep: np.ndarray) -> nn.Module:
        """The smaller network, seen to run as the whole one does and to need the MACs that were planned.

        Raises:
            CompanionError: it does not, so the trace did not show all that the network does.
        """
        pruned = remove_channels(self.model, self.graph, keep)
        counts = np.array([keep[list(width.groups)].sum() for width in self.graph.widths])
        planned, found = self.macs(counts), count_complexity(pruned, self.example).macs
        if str(traced(pruned)[1]) != self.trace or not math.isclose(planned, found, rel_tol=1e-6):
            raise CompanionError(
                f"{type(self.model).__name__} runs otherwise without the channels (and needs {found} MACs; planned: "
                f"{planned:.0f}), as if it read the number of channels off a layer: exclude the layer."
            )
        return pruned


def _allowed(size: int, round_to: int | None) -> np.ndarray:
    """How many of ``size`` channels may stay, in rising order; all may."""
    if round_to is None:
        fewer = [*range(1, min(size, NARROW + 1)), *range(NARROW + STEP, size, STEP)]
    else:
        fewer = list(range(round_to, size, round_to))
    return np.array([*fewer, size])


def _places(scores: Tensor, graph: ChannelGraph) -> np.ndarray:
    """Where each group stands in the ranking of all, from 0 (the best) to 1, scores relative to their width's mean."""
    relative = scores.numpy().copy()
    for width in graph.widths:
        groups = list(width.groups)
        relative[groups] /= max(relative[groups].mean(), np.finfo(float).tiny)
    order = np.argsort(-relative, kind="stable")
    places = np.empty(len(order))
    places[order] = np.arange(len(order)) / len(order)
    return places


TRIES = 8
NEAR = 0.02
"""A measured share of the time so near below the target is good enough."""


def _reach_latency(plan: _Plan, scores: Tensor, scope: str, target: float) -> nn.Module:
    """The largest network found that needs at most this share of the time."""
    device = next((p.device for p in plan.model.parameters()), torch.device("cpu"))
    before = inference(plan.model, plan.example)
    smallest = plan.macs(plan.rounded(np.zeros(len(plan.sizes)))) / plan.total
    low, high, share, best, fastest = smallest, 1.0, max(target, smallest), None, math.inf
    for attempt in range(TRIES):
        if attempt == TRIES - 1 and best is None:
            share = smallest
        pruned = plan.build(plan.keep(scores, plan.counts(scores, scope, share)))
        functions = {"before": before, "after": inference(pruned, plan.example)}
        ratio = compare_latency(functions, seconds=1.0, threads=1, device=device).ratios["after"].value
        fastest = min(fastest, ratio)
        if ratio <= target:
            best, low = pruned, share
            if ratio >= target - NEAR:
                break
        else:
            high = share
        share = (low + high) / 2
    if best is None:
        raise CompanionError(
            f"{target:.3g} of the time cannot be reached: the smallest network that was tried needs {fastest:.3g}."
        )
    return best
