"""What number formats do to a network, made visible: to each operator, and to its gradients (2.2.2)."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from companion.errors import CompanionError
from companion.metrics import probe
from companion.train.amp import Precision


@dataclass(frozen=True)
class NumberFormat:
    """A binary floating-point format: a sign, an exponent, a fraction; with subnormal numbers, infinities and NaN.

    Source: IEEE 754-2019, section 3; a normal number is ±1.fraction × 2^exponent.
    """

    name: str
    exponent_bits: int
    fraction_bits: int

    @property
    def top(self) -> int:
        """Exponent of the largest numbers."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def epsilon(self) -> float:
        """From 1 to the next number; rounding moves a normal number by half of it at most, relative to its size."""
        return 2.0**-self.fraction_bits

    @property
    def largest(self) -> float:
        return (2 - self.epsilon) * 2.0**self.top

    @property
    def smallest_normal(self) -> float:
        """Below it, numbers are subnormal: every halving costs a digit."""
        return 2.0 ** (1 - self.top)

    @property
    def smallest(self) -> float:
        """The last subnormal number above zero."""
        return self.smallest_normal * self.epsilon

    # Halves round to the even neighbour: that is zero below `smallest`, infinity above `largest` and `smallest_normal`
    # below it.

    @property
    def to_zero(self) -> float:
        """Magnitudes up to this one, included, round to zero."""
        return self.smallest / 2

    @property
    def to_normal(self) -> float:
        """Magnitudes from this one, included, round to normal numbers."""
        return self.smallest_normal - self.smallest / 2

    @property
    def to_infinity(self) -> float:
        """Magnitudes from this one, included, round to infinity."""
        return (2 - self.epsilon / 2) * 2.0**self.top


FORMATS = {
    each.name: each
    for each in (
        NumberFormat("fp32", 8, 23),
        NumberFormat("tf32", 8, 10),
        NumberFormat("bf16", 8, 7),
        NumberFormat("fp16", 5, 10),
    )
}
"""By the names of the precisions. tf32 exists inside a GPU's multiplier only: what it reads and writes is fp32."""


def number_format(name: str) -> NumberFormat:
    """The format called ``fp32``, ``tf32``, ``bf16`` or ``fp16``.

    Raises:
        CompanionError: there is no such format.
    """
    if name not in FORMATS:
        raise CompanionError(f"there is no number format {name!r}: choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True)
class OperatorPrecision:
    """The calls of one operator with operands of the same formats."""

    operator: str
    """As torch calls it inside: ``convolution``, ``addmm``; ``_to_copy`` is a cast."""
    inputs: tuple[str, ...]
    """Formats of its tensors of floats, in the order of its arguments, each named once."""
    output: str
    count: int


def operator_precisions(
    model: nn.Module,
    example: Any,
    target: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    precision: str = "bf16",
) -> tuple[OperatorPrecision, ...]:
    """What autocast makes of each operator of a forward pass and its loss, in the order of their first calls.

    The backward pass is not listed: it computes each derivative in the format of the operator that it is of.

    Args:
        model: run in training mode, as a copy; stays as it is.
        example: on the network's device: a tensor, a tuple of arguments, or a dict of them by name.
        target: what the loss compares with; class numbers [N] for the default loss.
        loss: ``loss(outputs, target)``, or ``loss(outputs)`` without a target; by default cross-entropy with a target,
            else none.
        precision: as in `fit`.

    Raises:
        CompanionError: the example holds no tensor, or as `Precision.named`.
    """
    probe.check_example(model, example)
    device = probe.tensors_in(example)[0].device
    policy = Precision.named(precision, device)
    network = copy.deepcopy(model).train()
    if loss is None and target is not None:
        loss = nn.functional.cross_entropy
    record = _Record()
    with policy.arithmetic(), record, policy.autocast():
        outputs = probe.call(network, example)
        if loss is not None:
            loss(outputs, *(() if target is None else (target,)))
    return tuple(OperatorPrecision(*call, count) for call, count in record.calls.items())


class _Record(TorchDispatchMode):
    """Counts operators that compute floats; below autocast, so that it sees the casts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[str, ...], str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _names((args, kwargs)), _names(out)
        if inputs and outputs and not func.is_view:
            self.calls[func.overloadpacket.__name__, inputs, outputs[0]] += 1
        return out


_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _names(values: Any) -> tuple[str, ...]:
    floats = (v.dtype for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point())
    return tuple(dict.fromkeys(_SHORT.get(name := str(dtype).removeprefix("torch."), name) for dtype in floats))


@contextmanager
def layer_gradients(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[dict[str, Tensor]]:
    """While open, gathers the gradients of the layers' outputs: forward and backward pass belong inside.

    With a ``dtype`` it rounds them, and the parameters' gradients, on the way: each layer hands down what it could
    store in that format. So a CPU shows what training in float16 would do; what it leaves out is the rounding of
    activations and weights.

    Args:
        model: its layers are the modules that have none inside.
        dtype: what to round to, and back; None changes nothing.

    Yields:
        The gradients by the name of the layer, as rounded; of a layer used twice, its first use's. The backward pass
        fills it.
    """
    found: dict[str, Tensor] = {}

    def rounded(gradient: Tensor) -> Tensor:
        return gradient if dtype is None else gradient.to(dtype).to(gradient.dtype)

    def keep(name: str, gradient: Tensor) -> Tensor:
        found[name] = rounded(gradient)
        return found[name]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tree_map_only(
                Tensor,
                lambda t: t.register_hook(lambda gradient: keep(name, gradient)) if t.requires_grad else t,
                output,
            )

        return hook

    handles = [p.register_hook(rounded) for p in model.parameters() if p.requires_grad]
    layers = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles += [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Magnitudes:
    """How large the numbers of some tensors are, and what becomes of them in a format."""

    format: NumberFormat
    scale: float
    """All were multiplied by it before they were counted."""
    counts: Mapping[int, int]
    """Exponent e → how many have a magnitude from 2^e to below 2^(e+1); zeros and what is not finite have none."""
    zeros: int
    """Zero to begin with, which no scale changes."""
    to_zero: int
    """Not zero, but in the format they would be."""
    to_subnormal: int
    """These keep some of their digits only."""
    to_infinity: int
    """Too large for the format, or not finite to begin with."""
    nonfinite: int
    """The latter alone: infinite or not a number."""

    @property
    def nonzero(self) -> int:
        """All but the zeros, which is what the shares are of."""
        return sum(self.counts.values()) + self.nonfinite

    @property
    def lost(self) -> float:
        """Share that becomes zero."""
        return self.to_zero / max(1, self.nonzero)

    @property
    def subnormal(self) -> float:
        """Share that becomes subnormal."""
        return self.to_subnormal / max(1, self.nonzero)

    @property
    def overflow(self) -> float:
        """Share that becomes infinite."""
        return self.to_infinity / max(1, self.nonzero)


def gradient_magnitudes(
    gradients: nn.Module | Iterable[Tensor], *, scale: float = 1.0, format: str = "fp16"
) -> Magnitudes:
    """Count gradients by power of two, and those that a format cannot hold when it rounds to nearest, halves to even.

    Args:
        gradients: a network after ``backward``, of which the parameters' are taken; or tensors of floats of any shape,
            such as the values of `layer_gradients`.
        scale: multiplies them first, as a `LossScaler` would.
        format: ``fp16``, ``bf16``, ``tf32`` or ``fp32``.

    Raises:
        CompanionError: no gradients, a scale that is not a positive number, or no such format.
    """
    if isinstance(gradients, nn.Module):
        gradients = [p.grad for p in gradients.parameters() if p.grad is not None]
    tensors = list(gradients)
    if not tensors:
        raise CompanionError("there are no gradients: call backward() first.")
    if not 0 < scale < math.inf:
        raise CompanionError(f"scale is {scale}: give a positive number.")
    target = number_format(format)
    counts: Counter[int] = Counter()
    zeros = lost = subnormal = infinite = nonfinite = 0
    for tensor in tensors:
        size = tensor.detach().double().abs() * scale  # in float64, which neither over- nor underflows here
        zeros += int((size == 0).sum())
        nonfinite += int((~size.isfinite()).sum())
        lost += int(((size > 0) & (size <= target.to_zero)).sum())
        subnormal += int(((size > target.to_zero) & (size < target.to_normal)).sum())
        infinite += int((~(size < target.to_infinity)).sum())  # so that NaN counts
        exponents = size[(size > 0) & size.isfinite()].frexp().exponent - 1  # frexp's mantissa is from 1/2
        counts.update(dict(zip(*(x.tolist() for x in exponents.unique(return_counts=True)), strict=True)))
    return Magnitudes(target, scale, dict(sorted(counts.items())), zeros, lost, subnormal, infinite, nonfinite)
