"""Pruning of single weights: masks that hold the smallest at zero (2.1.2).

A masked network has as many weights, and takes as long, as before: see `to_csr` for when zeros pay.
"""

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companion import train
from companion.compress.attention import Attention
from companion.compress.exclude import excluded
from companion.compress.qat import FakeQuantizer
from companion.compress.quantization import check_network
from companion.engines.base import one_sentence
from companion.errors import CompanionError

SCOPES = ("global", "layer")
RAMP = 0.75  # share of the steps in which `prune_gradually` prunes; in the rest the network recovers
TIGHTENINGS = 50  # in how many equal strides it does so

_PRUNABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
    Attention,
)


class Mask(nn.Module):
    """A parametrization that holds some of a weight's elements at zero, whatever training does to them.

    ``mask`` is boolean, of the weight's shape; it belongs to the network's state.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)  # weight * mask would leave −0, which a zip file does not take for 0


@dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one layer."""

    name: str
    weights: int
    """How many it has, biases and normalisations not counted."""
    zeros: int

    @property
    def share(self) -> float:
        return self.zeros / self.weights


@dataclass(frozen=True)
class Sparsity:
    """What `sparsity` found; ``print`` shows it as a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def total(self) -> LayerSparsity:
        """Of all layers together."""
        return LayerSparsity("total", sum(layer.weights for layer in self.layers), sum(x.zeros for x in self.layers))

    @property
    def share(self) -> float:
        """Zeros among all weights, in 0..1."""
        return self.total.share

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in (*self.layers, self.total))
        heads = f"{'layer':<{width}}  {'weights':>10}  {'zeros':>10}  sparsity"
        rows = (
            f"{x.name:<{width}}  {x.weights:>10,}  {x.zeros:>10,}  {x.share:>8.1%}" for x in (*self.layers, self.total)
        )
        return "\n".join((heads, *rows))


@dataclass(frozen=True)
class Sensitivity:
    """How well a network does with one layer pruned alone."""

    layer: str
    weights: int
    sparsities: tuple[float, ...]
    scores: tuple[float, ...]
    """The task's main score in 0..1, one for each of ``sparsities``."""


@dataclass(frozen=True)
class _Weight:
    """One weight tensor that can be pruned: ``module.<tensor>``."""

    name: str
    module: nn.Module
    tensor: str

    @property
    def value(self) -> Tensor:
        """As the layer computes with it, so with its zeros."""
        return getattr(self.module, self.tensor).detach()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What training changes: of a parametrized weight, what it is computed from."""
        lists = _parametrizations(self.module)
        if self.tensor in lists:
            return list(lists[self.tensor].parameters(recurse=False))
        return [getattr(self.module, self.tensor)]

    @property
    def parts(self) -> list[nn.Module]:
        """What is done to it before it is used, one after the other."""
        return list(_parametrizations(self.module).get(self.tensor, ()))

    @property
    def masks(self) -> list[Mask]:
        return [part for part in self.parts if isinstance(part, Mask)]

    @property
    def kept(self) -> Tensor:
        """Where it is not held at zero: boolean, of the weight's shape."""
        return self.masks[0].mask if self.masks else torch.ones_like(self.value, dtype=torch.bool)


def prune_weights(
    model: nn.Module, sparsity: float, *, scope: str = "global", exclude: Collection[str] = ()
) -> nn.Module:
    """A copy of ``model`` whose smallest weights are held at zero, also while it is trained.

    The weights of linear, convolution and attention layers are ranked by magnitude; biases and normalisations
    stay. (Han et al., 2015, Learning both weights and connections for efficient neural networks.) The masks equal
    those of `torch.nn.utils.prune`'s ``global_unstructured`` or ``l1_unstructured``. Pruned again with a higher
    sparsity, what was zero stays zero; a layer (or network) that is sparser already stays as it is. Once trained,
    `make_permanent` makes it a plain network again, to be saved, exported or compressed in other ways.

    Args:
        model: any network; it is not changed.
        sparsity: share of the weights to hold at zero, from 0 to below 1.
        scope: ``global`` ranks all layers' weights together, ``layer`` prunes the same share of each.
        exclude: names of layers, or of modules with layers inside, to leave alone.

    Raises:
        CompanionError: a sparsity or scope that is none, a layer that does not exist, nothing to prune, or a weight
            that is not finite.
    """
    _check_share(sparsity)
    if scope not in SCOPES:
        raise CompanionError(f"there is no scope {scope!r}: choose one of {', '.join(SCOPES)}.")
    pruned = _copy(model)
    weights = _weights(pruned, exclude)
    for weight in weights:
        _check_finite(weight.name, weight.value)
        if any(isinstance(part, FakeQuantizer) for part in weight.parts):
            raise CompanionError(f"{weight.name} has a grid of prepare_qat: make it plain with compress.freeze first.")
        if not weight.masks:
            parametrize.register_parametrization(weight.module, weight.tensor, Mask(weight.kept))
    _tighten(weights, sparsity, scope)
    return pruned


def prune_gradually(
    model: nn.Module,
    data: Any,
    sparsity: float,
    *,
    epochs: int,
    batch_size: int = 32,
    scope: str = "global",
    exclude: Collection[str] = (),
    **options: Any,
) -> nn.Module:
    """A copy of ``model``, trained on ``data`` while its weights are pruned more and more.

    In one `train.fit` the sparsity rises along the cubic schedule of `cubic_sparsity`, from what the network has
    to what is asked for after three quarters of the steps. (Zhu & Gupta, 2017, To prune, or not to prune.)
    The weights are those of the last epoch: the best one on a validation split might have been before the last cut.

    Args:
        model: a trained network; it is not changed.
        data: training data, as for `train.fit`.
        sparsity, scope, exclude: as for `prune_weights`.
        epochs, batch_size: as for `train.fit`.
        options: other arguments of `train.fit`, but ``validation``, ``checkpoint`` and ``resume``.

    Raises:
        CompanionError: as `prune_weights` and `train.fit`, or an option that has no place here.
    """
    for name in ("validation", "checkpoint", "resume"):
        if name in options:
            raise CompanionError(
                f"prune_gradually takes no {name}: it keeps the last epoch's weights, "
                "the first with all their zeros, and cannot be resumed."
            )
    _check_share(sparsity)
    pruned = prune_weights(model, 0, scope=scope, exclude=exclude)
    weights = _weights(pruned, exclude)
    begin = sum(int((w.value == 0).sum()) for w in weights) / sum(w.value.numel() for w in weights)
    try:
        end = int(RAMP * (epochs * -(-len(data) // batch_size) - 1))
    except (TypeError, ZeroDivisionError):
        end = 0  # fit says what is wrong
    stride = max(1, end // TIGHTENINGS)
    step = itertools.count()

    def tighten(network: nn.Module, _: Any) -> None:
        if network.training:
            now = next(step)
            if now == end or (now < end and now % stride == 0):
                _tighten(weights, cubic_sparsity(now, 0, end, sparsity, begin), scope)

    hook = pruned.register_forward_pre_hook(tighten)
    try:
        train.fit(pruned, data, epochs=epochs, batch_size=batch_size, validation=0, **options)
    finally:
        hook.remove()
    return pruned


def cubic_sparsity(step: float, begin: float, end: float, final: float, initial: float = 0.0) -> float:
    """The sparsity to have at ``step``: fast at first, when there is much to spare, and slow at the end.

    final + (initial − final) · (1 − (step − begin) / (end − begin))³ between ``begin`` and ``end``, ``initial``
    before, ``final`` from ``end`` on. (Zhu & Gupta, 2017, To prune, or not to prune, section 3.)
    """
    if step >= end:
        return final
    remaining = 1 - max(0.0, step - begin) / (end - begin)
    return final + (initial - final) * remaining**3


def make_permanent(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without masks: plain weights with the zeros in them, which can be saved and exported.

    Training would now change the zeros, too.

    Raises:
        CompanionError: a masked weight has another parametrization as well.
    """
    plain = _copy(model)
    for weight in list(_prunable(plain)):
        if not weight.masks:
            continue
        parts = _parametrizations(weight.module)
        if any(len(part) > 1 or not isinstance(part[0], Mask) for part in parts.values()):
            raise CompanionError(f"{weight.name} has another parametrization besides its mask: remove that one first.")
        values = {
            tensor: nn.Parameter(getattr(weight.module, tensor).detach(), part.original.requires_grad)
            for tensor, part in parts.items()
        }
        # Not by parametrize.remove_parametrizations: it takes the weight from the class that torch made for this layer,
        # and so from the caller's layer, too, of which this is a copy.
        weight.module.__class__ = type(weight.module).__bases__[0]
        del weight.module.parametrizations
        weight.module._parameters = {**values, **weight.module._parameters}
    return plain


def sparsity(model: nn.Module) -> Sparsity:
    """How many of the weights that `prune_weights` would prune are zero: masked, or zero by themselves.

    Raises:
        CompanionError: the network has no such weights.
    """
    return Sparsity(tuple(LayerSparsity(w.name, w.value.numel(), int((w.value == 0).sum())) for w in _weights(model)))


def sensitivity(
    model: nn.Module,
    data: Any,
    sparsities: float | Iterable[float] = (0.5, 0.8, 0.9, 0.95),
    *,
    exclude: Collection[str] = (),
    **options: Any,
) -> tuple[Sensitivity, ...]:
    """Prune one layer at a time and judge the network each time: which layers can spare their weights?

    Layers pruned together lose more than each of them alone.

    Args:
        model: a trained network; it is not changed.
        data: what to judge it on; better not the test set.
        sparsities: of the one layer.
        exclude: names of layers, or of modules with layers inside, to leave out.
        options: arguments of `train.evaluate`, such as ``batch_size``.

    Returns:
        One row for each layer, in the network's order.

    Raises:
        CompanionError: as `prune_weights` and `train.evaluate`, or no sparsities.
    """
    sparsities = tuple(sparsities) if isinstance(sparsities, Iterable) else (sparsities,)
    if not sparsities:
        raise CompanionError("there are no sparsities to try: give one or more from 0 to below 1.")
    for share in sparsities:
        _check_share(share)
    scanned = prune_weights(model, 0, exclude=exclude)
    found = []
    for weight in _weights(scanned, exclude):
        (mask,) = weight.masks
        before = mask.mask.clone()
        scores = []
        for share in sparsities:
            mask.mask.copy_(before)
            _tighten([weight], share, "layer")
            scores.append(train.evaluate(scanned, data, **options).main)
        mask.mask.copy_(before)
        found.append(Sensitivity(weight.name, weight.value.numel(), sparsities, tuple(scores)))
    return tuple(found)


class CsrLinear(nn.Module):
    """A linear layer without gradients that stores and multiplies its non-zero weights only.

    Row r has the weights ``values[rows[r]:rows[r + 1]]`` in the columns ``columns[rows[r]:rows[r + 1]]``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        sparse = linear.weight.detach().to_sparse_csr()
        self.shape = sparse.shape
        # Its parts, because a network that holds the sparse tensor itself cannot be copied.
        self.register_buffer("rows", sparse.crow_indices().int())
        self.register_buffer("columns", sparse.col_indices().int())
        self.register_buffer("values", sparse.values())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sparse_csr_tensor(self.rows, self.columns, self.values, self.shape, check_invariants=False)
        # Not torch.nn.functional.linear, which multiplies from the other side and takes ten times as long.
        y = (weight @ x.reshape(-1, x.shape[-1]).t()).t()
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


def to_csr(linear: nn.Linear) -> CsrLinear:
    """A linear layer in compressed sparse rows: for inference, and to see from which sparsity on zeros save time.

    Each weight that is left costs an index and an irregular access, so this is slower than the dense product until
    about four of five weights are zero: a Linear 1024 at batch 64 on one thread takes twice as long at 50 % zeros and
    half the time at 90 %. torch has no sparse convolution.

    Raises:
        CompanionError: not a linear layer, or a weight that is not finite.
    """
    if not isinstance(linear, nn.Linear):
        raise CompanionError(
            f"a linear layer is needed, not {type(linear).__name__}: torch has no other sparse layers."
        )
    _check_finite("the layer", linear.weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # "in beta state", said once
        return CsrLinear(linear)


def _tighten(weights: Sequence[_Weight], sparsity: float, scope: str) -> None:
    """Have the masks, in place, hold the share ``sparsity`` of the weights at zero, and never fewer than before."""
    for group in [weights] if scope == "global" else [[weight] for weight in weights]:
        kept = torch.cat([weight.kept.flatten() for weight in group])
        magnitudes = torch.cat([weight.value.abs().flatten() for weight in group])
        # What is masked counts, and is not ranked again: of equal weights one that is masked could come back.
        more = round(sparsity * len(kept)) - int((~kept).sum())
        if more <= 0:
            continue
        candidates = kept.nonzero().flatten()
        kept[candidates[magnitudes[candidates].topk(more, largest=False).indices]] = False
        for weight, part in zip(group, kept.split([w.value.numel() for w in group]), strict=True):
            weight.masks[0].mask.copy_(part.view_as(weight.value))


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    """The lists of what is done to a module's tensors before they are used, by the tensors' names."""
    return dict(getattr(module, "parametrizations", {}))


def _prunable(model: nn.Module) -> Iterator[_Weight]:
    for name, module in model.named_modules():
        if not isinstance(module, _PRUNABLE):
            continue
        parameters = [key for key, value in module._parameters.items() if value is not None]
        for tensor in [*_parametrizations(module), *parameters]:
            if tensor.endswith("weight"):
                yield _Weight(name or type(module).__name__, module, tensor)


def _weights(model: nn.Module, exclude: Collection[str] = ()) -> list[_Weight]:
    """The weights to prune.

    Raises:
        CompanionError: there are none, a name to exclude is none, or two layers share a weight.
    """
    check_network(model)
    names = dict(model.named_modules())
    exclude = excluded(exclude, names)
    weights = [w for w in _prunable(model) if not any(f"{w.name}.".startswith(f"{name}.") for name in exclude)]
    if not weights:
        raise CompanionError("there is nothing to prune: the network has no linear, convolution or attention weights.")
    uses = Counter(id(parameter) for module in names.values() for parameter in module._parameters.values())
    for weight in weights:
        if any(uses[id(parameter)] > 1 for parameter in weight.parameters):
            raise CompanionError(f"{weight.name} shares its weight with another layer: exclude it.")
    return weights


def _copy(model: nn.Module) -> nn.Module:
    check_network(model)
    with one_sentence(f"{type(model).__name__} cannot be copied"):
        return copy.deepcopy(model)


def _check_share(sparsity: float) -> None:
    if not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
        raise CompanionError(
            f"the sparsity is {sparsity}: give a share from 0 to below 1, for 1 would remove everything."
        )


def _check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise CompanionError(f"{name} has weights that are not finite: a network that has diverged cannot be pruned.")
