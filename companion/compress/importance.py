"""How much a network would miss each group of channels: what pruning removes first is what scores lowest (2.1.2)."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from companion.compress.graph import FROZEN, NORMS, ChannelGraph, layer_of, parts, tensor_of
from companion.errors import CompanionError
from companion.metrics import probe
from companion.models import describe
from companion.train.tasks import TASKS

Loss = Callable[[Any, Any], Tensor]


def score_channels(
    model: nn.Module,
    graph: ChannelGraph,
    importance: str = "l2",
    *,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Tensor:
    """One number for each group of channels: the lower, the less the network should miss it.

    A group is everything that would be removed with it (see `channel_graph`): its rows of the layers that make the
    channel, its columns of the layers that read it (after flattening one for each pixel), its γ and β.

    ``l1``
        Sum of the absolute values of its weights and γ; biases and β are left out (Li et al., Pruning Filters for
        Efficient ConvNets, 2017, who take the first layer's only).
    ``l2``
        The same with the root of the sum of squares: the norm of all that goes (Fang et al., DepGraph, 2023).
    ``taylor``
        How much the loss changes, to first order, if the group is set to zero: in each of its layers, the square of
        the sum of gradient × value over its weights and biases, averaged over the batches; then the root of the sum
        over the layers (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, equation 8). In
        evaluation mode, because batch statistics would make a convolution before a normalisation look unimportant.
    ``bn_scale``
        Mean \\|γ\\| of its batch normalisations (Liu et al., Network Slimming, 2017). Groups without one, as in a
        classifier's hidden layer, are scored by ``l2``: compare scores within one width, not between.
    ``random``
        Uniform in 0..1 from ``seed``: what every other criterion must beat.

    Args:
        model: the network of the graph; it is not changed.
        graph: from `channel_graph`.
        importance: one of the above.
        data: for ``taylor``: batches (inputs, targets), such as a DataLoader; inputs as `model` takes them.
        loss: for ``taylor``: ``loss(outputs, targets)``; by default that of the network's task, or cross-entropy.
        seed: for ``random``.

    Returns:
        float64 [graph.groups], on the CPU.

    Raises:
        CompanionError: no such criterion, weights or a loss that are not finite, no data for ``taylor`` or data that
            the network or the loss cannot take, no batch normalisation for ``bn_scale``, or a graph of another network.
    """
    if importance not in IMPORTANCES:
        raise CompanionError(f"importance is {importance!r}: choose one of {', '.join(IMPORTANCES)}.")
    for (layer, side), labels in graph.labels.items():
        module = layer_of(model, layer, side, len(labels))
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise CompanionError(f"the weights of {layer} are not all finite numbers: train the network first.")
    if importance == "random":
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise CompanionError(f"seed is {seed!r}: give a whole number.")
        return torch.rand(graph.groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if importance == "taylor":
        return _taylor(model, graph, data, loss)
    return {"l1": _l1, "l2": _l2, "bn_scale": _bn_scale}[importance](model, graph)


IMPORTANCES = ("l1", "l2", "taylor", "bn_scale", "random")


def _sum_by_group(graph: ChannelGraph, values: dict[tuple[str, str], Tensor]) -> Tensor:
    """Values of the channels of each layer and side [channels], added up over each group."""
    total = torch.zeros(graph.groups, dtype=torch.float64)
    for use, found in values.items():
        labels = torch.as_tensor(graph.labels[use])
        free = labels != FROZEN
        total.index_add_(0, labels[free], found.detach().cpu().double()[free])
    return total


def _weights(model: nn.Module, graph: ChannelGraph) -> dict[tuple[str, str], Tensor]:
    """The weights (not biases) of each layer and side by channel: [channels, numbers]."""
    found = {}
    for layer, side in graph.labels:
        module = model.get_submodule(layer)
        rows = [part.rows(tensor_of(module, part.name)) for part in parts(module, side) if part.name.endswith("weight")]
        if rows:
            found[layer, side] = torch.cat(rows, dim=1)
    return found


def _l1(model: nn.Module, graph: ChannelGraph) -> Tensor:
    return _sum_by_group(graph, {use: rows.abs().sum(1) for use, rows in _weights(model, graph).items()})


def _l2(model: nn.Module, graph: ChannelGraph) -> Tensor:
    return _sum_by_group(graph, {use: rows.square().sum(1) for use, rows in _weights(model, graph).items()}).sqrt()


def _bn_scale(model: nn.Module, graph: ChannelGraph) -> Tensor:
    scales = {}
    for use in graph.labels:
        module: Any = model.get_submodule(use[0])
        if type(module) in NORMS and module.weight is not None:
            scales[use] = module.weight.abs()
    counts = _sum_by_group(graph, {use: torch.ones_like(scale) for use, scale in scales.items()})
    if not counts.any():
        raise CompanionError("bn_scale needs batch normalisations behind the channels, and there are none: take l2.")
    return torch.where(counts > 0, _sum_by_group(graph, scales) / counts.clamp(min=1), _l2(model, graph))


def _taylor(model: nn.Module, graph: ChannelGraph, data: Iterable[tuple[Any, Any]] | None, loss: Loss | None) -> Tensor:
    if not isinstance(data, Iterable):
        raise CompanionError("taylor needs data: batches (inputs, targets), such as a DataLoader.")
    loss = loss or _loss_of(model)
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    squares = torch.zeros(graph.groups, dtype=torch.float64)
    batches = 0
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise CompanionError("each batch of the data must be a pair: inputs and their targets.")
        inputs, targets = probe.copied(tuple(batch))  # networks may overwrite what they take
        twin.zero_grad()
        with torch.enable_grad():
            with probe.one_sentence(model, inputs, "with its loss on the data"):
                value = loss(probe.call(twin, inputs), targets)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise CompanionError("the loss must be one number that depends on the weights.")
            if not value.isfinite():
                raise CompanionError("the loss on the data is not finite: channels cannot be ranked by it.")
            value.backward()
        for layer, side in graph.labels:
            module = twin.get_submodule(layer)
            tensors = [(part, tensor_of(module, part.name)) for part in parts(module, side)]
            change = sum(part.rows(x.detach() * x.grad).sum(1) for part, x in tensors if x.grad is not None)
            if isinstance(change, Tensor):
                squares += _sum_by_group(graph, {(layer, side): change}).square()
        batches += 1
    if batches == 0:
        raise CompanionError("taylor needs data, and there is not one batch.")
    return (squares / batches).sqrt()


def _loss_of(model: nn.Module) -> Loss:
    try:
        task = TASKS[describe(model).task]
    except (CompanionError, KeyError):
        return cross_entropy
    return lambda outputs, targets: task.loss(model, outputs, targets)
