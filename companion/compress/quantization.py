"""Numbers on a grid: what quantisation does to one tensor, written out (2.1.2).

An integer q stands for the real number scale · (q − zero point). Everything else is the choice of the scale (the
observers), of who shares it (a tensor, or each of its channels), and of what happens to gradients (they pass).
"""

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companion.compress.exclude import excluded
from companion.engines.base import one_sentence
from companion.errors import CompanionError
from companion.metrics.probe import check_shapes

BITS = range(2, 9)
FLOATS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Where the output channels of each kind of weight are. Exact types: subclasses may use their weights otherwise.
CHANNEL_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # its reciprocal is still a finite number
SHARES = torch.linspace(1, 0.01, 100)  # of the largest range, tried by the observer "mse"


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers that can be written: scale · (q − zero point) for every whole q from ``low`` to ``high``."""

    scale: Tensor
    """Distance between neighbours: float32, a scalar [] or one per channel [channels]."""
    zero_point: Tensor
    """The q that means 0.0: int32, as many as scales."""
    low: int
    high: int
    axis: int | None = None
    """The dimension of the tensor that the channels are in; None for one scale for all of it."""

    @property
    def bits(self) -> int:
        """What one q takes."""
        return math.ceil(math.log2(self.high - self.low + 1))

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def values(self) -> Tensor:
        """Every number on the grid, in order: float32 [levels], or [channels, levels]."""
        steps = torch.arange(self.low, self.high + 1, device=self.scale.device)
        return (steps - self.zero_point[..., None]) * self.scale.detach()[..., None]

    def spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to be multiplied with ``x``.

        Raises:
            CompanionError: ``x`` has not as many channels.
        """
        if self.axis is None:
            return self.scale, self.zero_point
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != len(self.scale):
            raise CompanionError(
                f"the grid is for {len(self.scale)} channels in dimension {self.axis}, not for shape {tuple(x.shape)}."
            )
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)


def observe(
    x: Tensor,
    *,
    bits: int = 8,
    symmetric: bool = False,
    axis: int | None = None,
    observer: str = "minmax",
    percentile: float = 99.9,
) -> Grid:
    """Choose a grid for the values of a tensor.

    Args:
        x: float, any shape, at least one value.
        bits: of one integer, 2 to 8.
        symmetric: zero point 0 and the integers ±(2^(bits−1) − 1), as is usual for weights: at 2 bits −1, 0 and 1.
            Else *affine*: integers 0 … 2^bits − 1 and a zero point, as is usual for activations.
        axis: give each channel in this dimension a scale of its own.
        observer: how far the grid reaches: ``minmax`` to the extremes; ``percentile`` cuts off the values outside the
            given percentiles; ``mse`` tries hundredths of the extremes and keeps the least squared error.
        percentile: for that observer, 50 to 100.

    Returns:
        A grid on which 0.0 lies exactly (padding and ReLU make many zeros). All-zero channels get the scale 1.

    Raises:
        CompanionError: a number out of range, an empty tensor, or NaN or infinity in it.

    Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 2; Nagel et al., A White Paper on
    Neural Network Quantization, 2021, sections 2 and 3.
    """
    check_bits(bits)
    check_observer(observer, percentile)
    _check_values(x)
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise CompanionError(f"a tensor of shape {tuple(x.shape)} has no dimension {axis}: give another axis.")
    values = x.detach().float()
    _check_values(values)  # of float64, some may be too large now
    rows = values.reshape(1, -1) if axis is None else values.movedim(axis, 0).reshape(x.shape[axis], -1)
    reach = _percentiles(rows, percentile) if observer == "percentile" else (rows.amin(1), rows.amax(1))
    grid = grid_between(*reach, bits=bits, symmetric=symmetric, axis=0)
    if observer == "mse":
        grid = _least_error(rows, *reach, bits, symmetric)
    if axis is None:
        return Grid(grid.scale[0], grid.zero_point[0], grid.low, grid.high)
    return Grid(grid.scale, grid.zero_point, grid.low, grid.high, axis)


def grid_between(
    smallest: Tensor, largest: Tensor, *, bits: int, symmetric: bool = False, axis: int | None = None
) -> Grid:
    """The grid that reaches from ``smallest`` to ``largest``, and to zero; arguments as of `observe`."""
    bottom, top = smallest.double().clamp(max=0), largest.double().clamp(min=0)  # differences of float32 may overflow
    if symmetric:
        low, high = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
        step = torch.maximum(-bottom, top) / high
    else:
        low, high = 0, 2**bits - 1
        step = (top - bottom) / high
    scale = torch.where(step > 0, step.clamp(min=SMALLEST_SCALE), 1.0).float()
    zero = torch.zeros_like(scale) if symmetric else (low - bottom / scale.double()).round().clamp(low, high)
    return Grid(scale, zero.int(), low, high, axis)


def _percentiles(rows: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The values of each row that so many per cent lie above and below, by nearest rank."""
    ordered = rows.sort(1).values
    last = round((rows.shape[1] - 1) * percentile / 100)
    return ordered[:, rows.shape[1] - 1 - last], ordered[:, last]


def _least_error(rows: Tensor, smallest: Tensor, largest: Tensor, bits: int, symmetric: bool) -> Grid:
    best = torch.full_like(smallest, math.inf, dtype=torch.float64)
    share_of = torch.ones_like(smallest)
    for share in SHARES.to(rows.device):
        grid = grid_between(share * smallest, share * largest, bits=bits, symmetric=symmetric, axis=0)
        error = (fake_quantize(rows, grid) - rows).square_().sum(1, dtype=torch.float64)
        share_of = torch.where(error < best, share, share_of)
        best = torch.minimum(error, best)
    return grid_between(share_of * smallest, share_of * largest, bits=bits, symmetric=symmetric, axis=0)


def quantize(x: Tensor, grid: Grid, *, like: str = "onnx") -> Tensor:
    """The nearest integers: q = clip(round(x / scale) + zero point), halves to the even neighbour.

    Args:
        x: float, any shape.
        grid: see `observe`.
        like: whose arithmetic, bit for bit. ``onnx`` divides by the scale (QuantizeLinear); ``torch`` multiplies by its
            rounded reciprocal (torch.fake_quantize_*). They part where x / scale is within rounding of a half.

    Returns:
        int8 if the grid is signed, else uint8; the shape of ``x``.

    Raises:
        CompanionError: NaN or infinity in ``x``, or not the grid's channels.
    """
    _check_values(x)
    scale, zero = grid.spread(x)
    q = (_ratio(x.detach(), scale, like).round_() + zero).clamp_(grid.low, grid.high)
    return q.to(torch.int8 if grid.signed else torch.uint8)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """What the integers stand for: scale · (q − zero point), float32 (ONNX's DequantizeLinear)."""
    scale, zero = grid.spread(q)
    return (q.int() - zero) * scale


def fake_quantize(x: Tensor, grid: Grid, *, like: str = "torch") -> Tensor:
    """``x`` moved to the nearest numbers of the grid, still float, with a gradient to train by.

    Rounding has the derivative 0 almost everywhere, from which nothing can be learned. The *straight-through
    estimator* takes 1 instead where x is within the grid, and 0 where it was clipped. If ``grid.scale`` needs a
    gradient, it gets that of a learned step size: round(x/s) − x/s within the grid, the bound where x was clipped.

    Args:
        x: float, any shape. NaN stays NaN (torch's own makes a number of it), so that a training run notices.
        grid: see `observe`.
        like: see `quantize`; values and gradients of ``torch`` are those of torch.fake_quantize_per_tensor_affine and
            _per_channel_affine.

    Returns:
        The dtype and shape of ``x``.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013; Esser et al., Learned
    Step Size Quantization, 2020, equation 3.
    """
    scale, zero = grid.spread(x)
    return _FakeQuantize.apply(x, scale, zero, grid.low, grid.high, like)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, like: str) -> Tensor:
        ratio = _ratio(x, scale, like)
        level = ratio.round().add_(zero)
        inside = (level >= low) & (level <= high)
        steps = level.clamp_(low, high).sub_(zero)
        error = steps - ratio * inside if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, error)
        ctx.scale_shape = scale.shape
        return (steps * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inside, error = ctx.saved_tensors
        of_scale = None if error is None else (gradient * error).sum_to_size(ctx.scale_shape)
        return gradient * inside, of_scale, None, None, None, None


def _ratio(x: Tensor, scale: Tensor, like: str) -> Tensor:
    """x / scale in float32 (float64 of float64), as one of the two divides."""
    if like not in ("onnx", "torch"):
        raise CompanionError(f"like is {like!r}: choose onnx or torch.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / scale if like == "onnx" else x * (1 / scale)


def sqnr(reference: Any, value: Any) -> float:
    """Signal-to-quantisation-noise ratio in decibels: 10·log10(Σ reference² / Σ (reference − value)²).

    6 dB are one bit; 20 dB mean that the error is a tenth of the signal. Equal tensors give infinity.

    Args:
        reference: what is exact; a tensor or array.
        value: what is to be judged, of the same shape.

    Raises:
        CompanionError: other shapes, nothing in them, or NaN or infinity.
    """
    a, b = (torch.as_tensor(side).detach().cpu().double() for side in (reference, value))
    if a.shape != b.shape:
        raise CompanionError(f"sqnr compares tensors of one shape, not {tuple(a.shape)} with {tuple(b.shape)}.")
    _check_values(a)
    _check_values(b)
    signal, noise = float(a.square().sum()), float((a - b).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def quantize_weights(
    model: nn.Module,
    bits: int | str = 8,
    *,
    per_channel: bool = True,
    symmetric: bool = True,
    observer: str = "minmax",
    percentile: float = 99.9,
    exclude: Collection[str] = (),
    backend: str = "companion",
) -> nn.Module:
    """A copy of ``model`` whose convolution and linear weights lie on a grid: weight-only quantisation.

    The arithmetic stays float, so nothing runs faster; this shows what rounding does to the answers. Biases and
    normalisations stay as they are, and so does `nn.MultiheadAttention`, which keeps its weights as no such layers.
    A batch normalisation multiplies whole channels, and so does a scale per channel, so it makes no difference whether
    it is folded first; with one scale per tensor, fold it first (`companion.engines.fusion.fold_batch_norms`), because
    an engine will.

    Args:
        model: any network; it is not changed.
        bits: 2 to 8, or a float format that each weight is rounded to: ``fp16``, ``bf16``, ``fp8_e4m3``, ``fp8_e5m2``.
            The 8-bit floats get a scale too, which brings the largest weight to the format's largest number.
        per_channel: one scale for each output channel, else one for each tensor.
        symmetric, observer, percentile: as of `observe`.
        exclude: names of layers to leave alone, as ``model.named_modules()`` has them.
        backend: ``companion``: the above. ``torchao``: linear layers only, kept as integers by that library: bits 2
            to 8, per channel, symmetric, to the extremes.

    Raises:
        CompanionError: no such bits, observer, backend or layer, no layer to quantize, a network prepared for training
            with quantisation, weights that are NaN, infinite or too large for the format, or torchao is missing.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, section 3, for the float formats' scale.
    """
    if bits not in list(FLOATS):
        check_bits(bits, also=FLOATS)
    check_observer(observer, percentile)
    result = own_copy(model)
    layers = dict(quantizable(result, exclude))
    if backend == "torchao":
        if not (bits in BITS and per_channel and symmetric and observer == "minmax"):
            raise CompanionError(
                "torchao quantizes to 2 to 8 bits, per channel, symmetric, minmax: leave the defaults."
            )
        return _by_torchao(result, layers, int(bits))
    if backend != "companion":
        raise CompanionError(f"there is no backend {backend!r} for weights: choose companion or torchao.")
    with torch.no_grad():
        for name, layer in layers.items():
            weight: Any = layer.weight
            axis = CHANNEL_AXIS[type(layer)] if per_channel else None
            with in_layer(name):
                if isinstance(bits, str):
                    rounded = _round_float(weight, bits, axis)
                else:
                    grid = observe(
                        weight, bits=bits, symmetric=symmetric, axis=axis, observer=observer, percentile=percentile
                    )
                    rounded = fake_quantize(weight, grid)
            weight.copy_(rounded)
    return result


def _round_float(weight: Tensor, name: str, axis: int | None) -> Tensor:
    _check_values(weight)
    largest = torch.finfo(FLOATS[name]).max
    if name.startswith("fp8"):
        others = [i for i in range(weight.ndim) if axis is None or i != axis]
        scale = weight.abs().amax(others, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, 1).clamp(min=SMALLEST_SCALE)
    else:
        scale = torch.ones((), device=weight.device)
        if weight.abs().max() > largest:
            raise CompanionError(f"a weight is larger than {largest:g}, the largest number of {name}.")
    return (weight / scale).clamp(-largest, largest).to(FLOATS[name]).to(weight.dtype) * scale


def _by_torchao(model: nn.Module, layers: dict[str, nn.Module], bits: int) -> nn.Module:
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_  # type: ignore[import-not-found]
    except ImportError as error:
        raise CompanionError("the backend torchao needs that package: pip install torchao.") from error
    linear = {layer for layer in layers.values() if type(layer) is nn.Linear}
    if not linear:
        raise CompanionError("torchao quantizes linear layers only, and this network has none: use quantize_onnx.")
    for name, layer in layers.items():
        with in_layer(name):
            _check_values(layer.weight)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0))
    with one_sentence("torchao cannot quantize this network"):
        quantize_(model, config, filter_fn=lambda module, _: module in linear)
    return model


def own_copy(model: nn.Module) -> nn.Module:
    """A copy to change, where the original is.

    Raises:
        CompanionError: no network, one with lazy layers, one prepared by `prepare_qat`, or one that cannot be copied.
    """
    check_network(model)
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise CompanionError(
            "some weights of the network are computed from others: make them permanent first "
            "(compress.freeze after prepare_qat, compress.make_permanent after pruning)."
        )
    with one_sentence(f"{type(model).__name__} cannot be copied"):
        return copy.deepcopy(model)


def check_network(model: Any) -> None:
    """Refuse what is no network, or one with lazy layers.

    Raises:
        CompanionError: it is.
    """
    if not isinstance(model, nn.Module):
        raise CompanionError(f"a network (torch.nn.Module) is needed, not {type(model).__name__}.")
    check_shapes(model)


def quantizable(model: nn.Module, exclude: Collection[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The convolutions and linear layers of ``model`` by name, in its order, but for the excluded.

    Raises:
        CompanionError: none is left, or an excluded name is no such layer.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in CHANNEL_AXIS}
    exclude = excluded(exclude, layers)
    if len(layers) == len(set(exclude)):
        raise CompanionError("there is no convolution or linear layer to quantize.")
    yield from ((name, layer) for name, layer in layers.items() if name not in exclude)


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Say which layer's tensor was refused.

    Raises:
        CompanionError: in place of one that does not say it.
    """
    try:
        yield
    except CompanionError as error:
        raise CompanionError(f"the weight of {name or 'the network'} cannot be quantized: {error}") from error


def check_bits(bits: Any, also: Collection[str] = ()) -> None:
    """Refuse what is no whole number from 2 to 8.

    Raises:
        CompanionError: it is not.
    """
    if type(bits) is not int or bits not in BITS:
        raise CompanionError(f"bits is {bits!r}: give " + ", ".join(["a whole number from 2 to 8", *also]) + ".")


def check_observer(observer: Any, percentile: Any) -> None:
    """Refuse an unknown observer, or a percentile that cuts off half of the values or more.

    Raises:
        CompanionError: one of these.
    """
    if observer not in ("minmax", "percentile", "mse"):
        raise CompanionError(f"there is no observer {observer!r}: choose minmax, percentile or mse.")
    if not isinstance(percentile, int | float) or not 50 < percentile <= 100:
        raise CompanionError(f"percentile is {percentile!r}: give a number above 50, at most 100.")


def _check_values(x: Any) -> None:
    if not isinstance(x, Tensor) or x.numel() == 0:
        raise CompanionError("there are no values to quantize: give a tensor with at least one.")
    if x.is_complex():
        raise CompanionError("complex numbers have no order and so no grid: quantize their parts.")
    if not bool(x.isfinite().all()):
        raise CompanionError("the tensor holds NaN or infinite values, for which there is no grid.")
