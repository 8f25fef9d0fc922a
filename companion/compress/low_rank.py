"""Low-rank factorisation: a layer becomes two or three thinner ones in a row (2.1.2)."""

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companion.compress.attention import Attention
from companion.compress.exclude import excluded
from companion.engines.base import one_sentence
from companion.errors import CompanionError
from companion.metrics import Complexity, count_complexity, probe

MINOR = 0.01
"""A layer with less than this share of both the MACs and the weights stays whole: there is nothing to gain."""

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Positions:
    """At how many places a layer computes, over all its calls and the whole batch; of a linear layer all are equal."""

    inputs: int
    """Samples × input height × input width."""
    between: int
    """Samples × output height × input width: what a vertical convolution leaves."""
    outputs: int
    """Samples × output height × output width."""


@dataclass(frozen=True)
class Split:
    """One way to split a layer: its spectrum, and for each rank the price and the layers."""

    energies: tuple[Tensor, ...]
    """σ² of each component, largest first; one spectrum for each rank to choose (Tucker has two)."""
    macs: Callable[..., int]
    """macs(positions, *ranks)"""
    build: Callable[..., nn.Sequential]
    """build(*ranks)"""

    @property
    def kept(self) -> list[Tensor]:
        """Of each spectrum, the share of the energy that the first 1, 2, … components have."""
        return [e.cumsum(0) / e.sum() if e.any() else torch.ones_like(e) for e in self.energies]


@dataclass(frozen=True)
class Outputs:
    """What a layer gave over some data: mean [outputs] and covariance [outputs, outputs] over all places, float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class LayerRank:
    """What became of one layer."""

    name: str
    ranks: tuple[int, ...]
    """The channels or features between its parts; none if it stayed whole."""
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class Factorization:
    """What `factorization` found; ``print`` shows it as a table."""

    layers: tuple[LayerRank, ...]
    macs_before: int
    """Of the whole network."""
    macs_after: int

    @property
    def share(self) -> float:
        """Multiply–adds left, of those before."""
        return self.macs_after / self.macs_before

    def __str__(self) -> str:
        rows = [("layer", "rank", "MACs before", "after", "left")]
        for x in self.layers:
            rank = "×".join(map(str, x.ranks)) or "whole"
            rows.append((x.name, rank, *_macs_row(x.macs_before, x.macs_after)))
        rows.append(("network", "", *_macs_row(self.macs_before, self.macs_after)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _macs_row(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.0%}" if before else ""


def factorize(
    model: nn.Module,
    example: Any,
    macs: float = 0.5,
    *,
    energy: float | None = None,
    scheme: str = "spatial",
    data: Iterable[Any] | None = None,
    exclude: Collection[str] = (),
    round_to: int = 8,
) -> nn.Module:
    """A copy of ``model`` in which layers are replaced by two or three thinner ones that come near to them.

    Train it on afterwards: the accuracy falls at first, and an epoch or more brings it back.

    Args:
        model: any network of `nn.Conv2d` and `nn.Linear`; it is not changed, and its mode carries over.
        example: a tensor, a tuple of the network's arguments, or a dict of them by name.
        macs: share of the network's multiply–adds to leave, above 0 and up to 1. What is left is at most that.
        energy: instead of ``macs``, the share of its squared singular values that each layer keeps (of its outputs'
            variance, for ``pca``), above 0 and up to 1. For ``macs``, too, all layers keep one energy: with the same
            share of their full rank they lost more (85 % accuracy instead of 96 % before any training on).
        scheme: how a convolution is split: ``spatial`` (k×1, 1×k), ``channel`` (k×k, 1×1), ``tucker`` (1×1, k×k, 1×1)
            or ``pca`` (k×k, 1×1, by what the layer computes on ``data``); ``svd`` leaves those with a kernel whole.
            Linear layers and 1×1 convolutions are split as matrices in every scheme.
        data: for ``pca``, batches of inputs, each as ``example``; a few hundred images will do.
        exclude: names of layers, or of modules with layers inside, to leave whole.
        round_to: make ranks multiples of so many, or of a quarter of the full rank where that is less. Runtimes pack
            channels by 8 or 16: at half of its multiply–adds cifar_resnet18 was 2.0 times faster in ONNX Runtime with
            multiples of 8, and 1.7 times with any ranks.

    Returns:
        The network with an `nn.Sequential` of standard layers in place of each layer that was split: train, save,
        export or compress it like any other. Layers stay whole where a split would save no multiply–adds, where there
        is next to nothing to save (see `MINOR`), if they are grouped (depthwise) or of any other class, and inside
        `nn.TransformerEncoderLayer` and `Attention`, which read their weights themselves.
        `factorization` tells what became of each.

    Raises:
        CompanionError: a target that cannot be reached, nothing to split, weights or outputs that are not finite,
            no data for ``pca``, a layer or scheme that does not exist, or a network that does not run.
    """
    for name, share in {"macs": macs}.items() if energy is None else {"energy": energy}.items():
        if not (isinstance(share, int | float) and 0 < share <= 1):
            raise CompanionError(f"{name} is {share}: give a share above 0 and up to 1.")
    if scheme not in SCHEMES:
        raise CompanionError(f"there is no scheme {scheme!r}: choose one of {', '.join(SCHEMES)}.")
    if (data is None) == (scheme == "pca"):
        raise CompanionError("the scheme pca needs data, batches of inputs, and the others take none.")
    if data is not None:
        probe.check_batches(data)
    if type(round_to) is not int or round_to < 1:
        raise CompanionError(f"round_to is {round_to!r}: give a whole number from 1.")
    probe.check_example(model, example)
    with one_sentence(f"{type(model).__name__} cannot be copied"):
        result = copy.deepcopy(model)

    whole = count_complexity(model, example)
    layers = _layers(result, whole, scheme, exclude)
    positions = _positions(result, example, layers)
    statistics = {} if data is None else _statistics(result, data, layers)
    choices = [
        _Choice(_split(layers[name], scheme, statistics.get(name)), at, _macs(whole, name), round_to)
        for name, at in positions.items()
    ]
    if not choices:
        raise CompanionError(
            f"the scheme {scheme} finds nothing to split in {type(model).__name__}: "
            "grouped convolutions, other classes, excluded and minor layers stay whole."
        )
    if energy is None:
        energy = _energy_for(choices, whole.total.macs, macs)
    new: dict[nn.Module, nn.Module] = {}
    for layer, choice in zip((layers[name] for name in positions), choices, strict=True):
        if ranks := choice.ranks(energy):
            new[layer] = _like(layer, choice.split.build(*ranks))
    result = _replaced(result, new)
    _run(result, [example])  # which a network that reads its layers' weights by itself cannot
    return result


def factorization(model: nn.Module, factorized: nn.Module, example: Any) -> Factorization:
    """What became of each layer of ``model`` in ``factorized``: its rank, and its multiply–adds before and after.

    Raises:
        CompanionError: the second network was not made from the first by `factorize`, or one does not run.
    """
    before, after = (count_complexity(network, example) for network in (model, factorized))
    now = dict(factorized.named_modules())
    layers = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if name not in now:
            raise CompanionError(f"the factorized network has no {name}: give the network that it was made from first.")
        parts = list(now[name]) if isinstance(now[name], nn.Sequential) else []
        ranks = tuple(part.weight.shape[0] for part in parts[:-1])
        layers.append(LayerRank(name, ranks, _macs(before, name), _macs(after, name)))
    return Factorization(tuple(layers), before.total.macs, after.total.macs)


def factorize_layer(layer: Layer, *ranks: int, scheme: str = "spatial") -> nn.Sequential:
    """One layer, split with a given rank; see `factorize`.

    Args:
        layer: a linear layer or an ungrouped convolution; it is not changed.
        ranks: one, or for Tucker the two of the channels in and out.
        scheme: any but ``pca``, which needs data.

    Raises:
        CompanionError: the scheme is none for such a layer, or a rank is 0 or above the full one.
    """
    split = _single(layer, scheme)
    full = tuple(map(len, split.energies))
    if len(ranks) != len(full) or not all(type(r) is int and 1 <= r <= top for r, top in zip(ranks, full, strict=True)):
        raise CompanionError(f"the ranks are {ranks}: give one for each of {full}, from 1 to that.")
    return _like(layer, split.build(*ranks))


def singular_values(layer: Layer, scheme: str = "spatial") -> Tensor:
    """σ of a layer's weights as the scheme arranges them, largest first: float64 [full rank].

    Of Tucker's two arrangements, the one along the outputs.

    Raises:
        CompanionError: the scheme is none for such a layer.
    """
    return _single(layer, scheme).energies[-1].sqrt()


def split_linear(linear: nn.Linear) -> Split:
    """W ≈ B·A: to r features and from there to the outputs, by truncated SVD.

    No other A and B of rank r are nearer to W in the sum of squares (Eckart & Young, 1936). (Denton et al., 2014,
    Exploiting linear structure within convolutional networks for efficient evaluation.)
    """
    outputs, inputs = linear.weight.shape
    u, s, vh = svd(linear.weight)

    def macs(at: Positions, rank: int) -> int:
        return at.outputs * rank * (inputs + outputs)

    def build(rank: int) -> nn.Sequential:
        a, b = _balanced(s[:rank, None] * vh[:rank], u[:, :rank])
        return nn.Sequential(_linear(a), _linear(b, linear.bias))

    return Split((s**2,), macs, build)


def split_channel(conv: nn.Conv2d) -> Split:
    """k×k to r channels, then 1×1 to all: the SVD of the weights as a matrix [outputs, inputs·k·k].

    (Zhang et al., 2016, Accelerating very deep convolutional networks for classification and detection, without
    their non-linear refinement.)
    """
    u, s, vh = svd(conv.weight.flatten(1))
    height, width = conv.kernel_size

    def macs(at: Positions, rank: int) -> int:
        return at.outputs * rank * (conv.in_channels * height * width + conv.out_channels)

    def build(rank: int) -> nn.Sequential:
        a, b = _balanced(s[:rank, None] * vh[:rank], u[:, :rank])
        return nn.Sequential(
            _conv(conv, a.reshape(rank, -1, height, width)), _conv(None, b[:, :, None, None], conv.bias)
        )

    return Split((s**2,), macs, build)


def split_spatial(conv: nn.Conv2d) -> Split:
    """k×1 to r channels, then 1×k to all: the SVD of the weights as a matrix [inputs·k, outputs·k].

    Component j is a sum over channels of a vertical filter times a horizontal one. (Jaderberg et al., 2014, Speeding
    up convolutional neural networks with low rank expansions; Tai et al., 2016, give this closed form.)
    """
    outputs, inputs, height, width = conv.weight.shape
    u, s, vh = svd(conv.weight.permute(1, 2, 0, 3).reshape(inputs * height, outputs * width))

    def macs(at: Positions, rank: int) -> int:
        return rank * (at.between * inputs * height + at.outputs * outputs * width)

    def build(rank: int) -> nn.Sequential:
        horizontal, vertical = _balanced(s[:rank, None] * vh[:rank], u[:, :rank])
        first = vertical.t().reshape(rank, inputs, height, 1)
        second = horizontal.reshape(rank, outputs, 1, width).transpose(0, 1)
        return nn.Sequential(_conv(conv, first, along=0), _conv(conv, second, conv.bias, along=1))

    return Split((s**2,), macs, build)


def split_tucker(conv: nn.Conv2d) -> Split:
    """1×1 to r₁ channels, k×k to r₂, 1×1 to all: the higher-order SVD of the weights along both channel axes.

    Each axis keeps the leading singular vectors of the weights unfolded along it. (Kim et al., 2016, Compression of
    deep convolutional neural networks for fast and low power mobile applications.)
    """
    outputs, inputs, height, width = conv.weight.shape
    weight = conv.weight.detach().double()
    to_outputs, s_outputs, _ = svd(weight.flatten(1))
    to_inputs, s_inputs, _ = svd(weight.transpose(0, 1).flatten(1))

    def macs(at: Positions, r_in: int, r_out: int) -> int:
        core = at.outputs * r_in * r_out * height * width
        return at.inputs * inputs * r_in + core + at.outputs * r_out * outputs

    def build(r_in: int, r_out: int) -> nn.Sequential:
        into, out = to_inputs[:, :r_in], to_outputs[:, :r_out]
        core = torch.einsum("oihw,ia,ob->bahw", weight, into, out)
        return nn.Sequential(
            _conv(None, into.t()[:, :, None, None]),
            _conv(conv, core),
            _conv(None, out[:, :, None, None], conv.bias),
        )

    return Split((s_inputs**2, s_outputs**2), macs, build)


def split_pca(layer: Layer, outputs: "Outputs") -> Split:
    """The layer to the r principal components of its outputs, then from those back to the outputs.

    y ≈ U·Uᵀ·(y − mean) + mean with the leading eigenvectors U of the outputs' covariance over given inputs; the mean
    goes into the bias. Where `split_channel` and `split_linear` keep the weights, this keeps what the layer really
    computes: no other r-dimensional (affine) subspace is nearer to its outputs in the sum of squares. The price is
    theirs. (Zhang et al., 2016, section 3.1.)
    """
    variances, components = torch.linalg.eigh(outputs.covariance)  # rising
    u, variances = components.flip(1), variances.flip(0).clamp(min=0)
    weight = layer.weight.detach().double()
    bias = 0 if layer.bias is None else layer.bias.detach().double()

    def macs(at: Positions, rank: int) -> int:
        return at.outputs * rank * (weight[0].numel() + len(weight))

    def build(rank: int) -> nn.Sequential:
        a, b = _balanced(u[:, :rank].t() @ weight.flatten(1), u[:, :rank])
        shift = outputs.mean + u[:, :rank] @ (u[:, :rank].t() @ (bias - outputs.mean))
        if isinstance(layer, nn.Linear):
            return nn.Sequential(_linear(a), _linear(b, shift))
        return nn.Sequential(_conv(layer, a.reshape(rank, *weight.shape[1:])), _conv(None, b[:, :, None, None], shift))

    return Split((variances,), macs, build)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition U·diag(σ)·Vᵀ of [m, n] in float64: U [m, k], σ [k], largest first, Vᵀ [k, n].

    k is the smaller of m and n. By the eigenvectors of matrix·matrixᵀ, which for the flat matrices of layers takes a
    tenth of `torch.linalg.svd`'s time; σ below 10⁻⁸ of the largest are noise.
    """
    matrix = matrix.detach().double()
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = svd(matrix.t())
        return vh.t(), s, u.t()
    _, u = torch.linalg.eigh(matrix @ matrix.t())  # eigenvalues rise
    u = u.flip(1)
    vh = u.t() @ matrix
    s = torch.linalg.vector_norm(vh, dim=1)
    return u, s, vh / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product b·a with each component's size shared equally, so that both layers learn at one pace."""
    size = torch.linalg.vector_norm(a, dim=1) / torch.linalg.vector_norm(b, dim=0)
    scale = torch.where(size > 0, size, 1).sqrt()
    return a / scale[:, None], b * scale


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these weights [outputs, inputs]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _filled(layer, weight, bias)


def _conv(like: nn.Conv2d | None, weight: Tensor, bias: Tensor | None = None, along: int | None = None) -> nn.Conv2d:
    """A convolution with these weights [outputs, inputs, height, width], with the steps and edges of another.

    Args:
        like: the layer to take stride, padding and dilation from; None for a 1×1 convolution at every place.
        weight, bias: its parameters.
        along: take them in this direction only, 0 for vertical and 1 for horizontal; None for both.
    """
    steps: dict[str, Any] = {}
    if like is not None:
        for key, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            both = getattr(like, key)  # padding can be a word, which suits each direction
            one_way = along is None or isinstance(both, str)
            steps[key] = both if one_way else tuple(x if axis == along else neutral for axis, x in enumerate(both))
        steps["padding_mode"] = like.padding_mode
    outputs, inputs, height, width = weight.shape
    layer = nn.Conv2d(inputs, outputs, (height, width), bias=bias is not None, device="meta", **steps)
    return _filled(layer, weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


# By scheme, how a convolution with a kernel is split; 1×1 convolutions and linear layers are matrices in all of them.
SCHEMES: dict[str, Callable[[nn.Conv2d], Split] | None] = {
    "spatial": split_spatial,
    "channel": split_channel,
    "tucker": split_tucker,
    "svd": None,
    "pca": None,
}


@dataclass(frozen=True)
class _Choice:
    """A layer whose rank is to be chosen."""

    split: Split
    at: Positions
    whole: int
    """Its multiply–adds before."""
    round_to: int

    def ranks(self, energy: float) -> tuple[int, ...]:
        """The least that keep this share of each spectrum; none where the layer had better stay whole."""
        ranks = []
        for kept in self.split.kept:
            rank = int((kept < energy).sum()) + 1
            step = max(1, min(self.round_to, len(kept) // 4))
            ranks.append(min(-(-rank // step) * step, len(kept)))
        return tuple(ranks) if self.split.macs(self.at, *ranks) < self.whole else ()

    def macs(self, energy: float) -> int:
        ranks = self.ranks(energy)
        return self.split.macs(self.at, *ranks) if ranks else self.whole


def _energy_for(choices: list[_Choice], total: int, share: float) -> float:
    """The most energy that all layers can keep within ``share`` of the network's ``total`` multiply–adds."""
    budget = round(share * total)
    fixed = total - sum(choice.whole for choice in choices)

    def left(energy: float) -> int:
        return fixed + sum(choice.macs(energy) for choice in choices)

    # Ranks change only where the energy passes a partial sum of a spectrum: search among those.
    levels = [kept for choice in choices for kept in choice.split.kept]
    steps = torch.cat([*levels, torch.tensor([0.0, 1.0], dtype=torch.float64)]).unique().tolist()
    if left(steps[0]) > budget:
        least = math.ceil(1000 * left(steps[0]) / total) / 1000
        raise CompanionError(
            f"{share:.1%} of the MACs cannot be reached: with the lowest ranks {least:.1%} are left, "
            f"so give macs from {least}{' or a smaller round_to' * (choices[0].round_to > 1)}."
        )
    low, high = 0, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(steps[middle]) <= budget else (low, middle)
    return steps[low]


def _layers(model: nn.Module, whole: Complexity, scheme: str, exclude: Collection[str]) -> dict[str, Layer]:
    """By name, the layers that the scheme can split, that are worth it and not excluded.

    Raises:
        CompanionError: a name to exclude is none, or a layer is masked or not finite.
    """
    names = dict(model.named_modules())
    exclude = excluded(exclude, names)
    found = {}
    for name, layer in names.items():
        if isinstance(names[name.rpartition(".")[0]], nn.TransformerEncoderLayer | Attention):
            continue  # these read their layers' weights, or widths, themselves
        if not isinstance(layer, nn.Conv2d | nn.Linear) or any(f"{name}.".startswith(f"{x}.") for x in exclude):
            continue
        if parametrize.is_parametrized(layer):
            raise CompanionError(f"{name} has masks or another parametrization: make it permanent first.")
        macs = _macs(whole, name)
        minor = macs < MINOR * whole.total.macs and layer.weight.numel() < MINOR * whole.parameters
        if not minor and _way(layer, scheme) is not None:
            _check_finite(name or "the layer", layer)
            found[name] = layer
    return found


def _macs(found: Complexity, name: str) -> int:
    """Of a layer by name, which may be the whole network; 0 if it is not called."""
    return found.by_module[name].macs if name in found.by_module else found.total.macs if not name else 0


def _way(layer: nn.Module, scheme: str) -> Callable[..., Split] | None:
    """How the scheme splits a layer; None if it does not."""
    if type(layer) is nn.Linear:
        return split_pca if scheme == "pca" else split_linear
    if type(layer) is not nn.Conv2d or layer.groups > 1:
        return None
    if scheme == "pca":
        return split_pca
    height, width = layer.kernel_size
    if height == width == 1:
        return split_channel
    if scheme == "spatial" and 1 in (height, width):
        return None  # it has one direction only
    return SCHEMES[scheme]


def _positions(model: nn.Module, example: Any, layers: Mapping[str, Layer]) -> dict[str, Positions]:
    """Where each layer computes when the network runs on ``example``; without those that the network does not call."""
    found: dict[str, Positions] = {}

    def look(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        before = found.get(name, Positions(0, 0, 0))
        if isinstance(layers[name], nn.Linear):
            here = Positions(*[output.numel() // output.shape[-1]] * 3)
        else:
            samples = 1 if x.dim() == 3 else len(x)
            (height, width), (high, wide) = x.shape[-2:], output.shape[-2:]
            here = Positions(samples * height * width, samples * high * width, samples * high * wide)
        found[name] = Positions(*map(operator.add, astuple(before), astuple(here)))

    _run(model, [example], layers, look)
    return found


def _statistics(model: nn.Module, data: Iterable[Any], layers: Mapping[str, Layer]) -> dict[str, Outputs]:
    """Mean and covariance of what each layer gives over all of ``data``.

    Raises:
        CompanionError: no data, or outputs that are not finite.
    """
    counts: Counter[str] = Counter()
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def look(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y = output.detach().double()
        y = y.reshape(-1, y.shape[-1]) if isinstance(layers[name], nn.Linear) else y.movedim(-3, -1).flatten(0, -2)
        counts[name] += len(y)
        sums[name] = sums.get(name, 0) + y.sum(0)
        squares[name] = squares.get(name, 0) + y.t() @ y

    _run(model, data, layers, look)
    if not counts:
        raise CompanionError("there are no data to take principal components of: give one batch of inputs or more.")
    found = {}
    for name, n in counts.items():
        mean = sums[name] / n
        covariance = squares[name] / n - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            raise CompanionError(f"{name} gives numbers that are not finite on the data.")
        found[name] = Outputs(mean, covariance)
    return found


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, Layer] | None = None,
    look: Callable[..., None] | None = None,
) -> None:
    """Run the network on each batch, in evaluation mode, and have ``look`` see what goes in and out of the layers."""
    handles = [layer.register_forward_hook(partial(look, name)) for name, layer in (layers or {}).items() if look]
    try:
        with probe.borrowed(model, training=False), torch.no_grad():
            for batch in batches:
                with probe.one_sentence(model, batch, "on the data"):
                    probe.call(model, probe.copied(batch))
    finally:
        for handle in handles:
            handle.remove()


def _split(layer: Layer, scheme: str, outputs: Outputs | None) -> Split:
    """The layer's split by a scheme, which can split it."""
    way = _way(layer, scheme)
    assert way is not None
    return way(layer) if outputs is None else way(layer, outputs)


def _single(layer: nn.Module, scheme: str) -> Split:
    """The split of a layer for which somebody asks by name.

    Raises:
        CompanionError: there is none.
    """
    if scheme not in SCHEMES or scheme == "pca":
        schemes = ", ".join(name for name in SCHEMES if name != "pca")
        raise CompanionError(f"a single layer cannot be split by {scheme!r}: choose one of {schemes}.")
    way = _way(layer, scheme)
    if way is None:
        raise CompanionError(
            f"the scheme {scheme} does not split such a {type(layer).__name__}: "
            "give a linear layer or an ungrouped convolution, for svd one of 1×1."
        )
    _check_finite("the layer", layer)
    return way(layer)


def _like(layer: Layer, parts: nn.Sequential) -> nn.Sequential:
    """On the layer's device, in its dtype and mode, and trained if it is."""
    parts = parts.to(layer.weight.device, layer.weight.dtype).train(layer.training)
    return parts.requires_grad_(layer.weight.requires_grad)


def _check_finite(name: str, layer: nn.Module) -> None:
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise CompanionError(f"{name} has weights that are not finite: a network that diverged cannot be factorized.")


def _replaced(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The network with other layers wherever one of the keys of ``new`` is."""
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
    return model
