"""Quantisation of a whole network, weights and activations, simulated in float: calibrated, and trained with (2.1.2).

``prepare_qat`` puts a grid before each layer and on its weights. Calibrated and used as it is, that is post-training
quantisation; trained with ``companion.train.fit``, quantisation-aware training.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companion.compress.quantization import (
    CHANNEL_AXIS,
    Grid,
    check_bits,
    check_network,
    check_observer,
    fake_quantize,
    in_layer,
    observe,
    own_copy,
    quantizable,
)
from companion.engines.base import one_sentence as reason_in_one_sentence
from companion.errors import CompanionError
from companion.metrics.probe import borrowed, call, check_batches, one_sentence

KEPT = 2**14  # values of each batch that a range is chosen from, and its extremes


class FakeQuantizer(nn.Module):
    """Moves a tensor to a grid whose step is learned: the forward pass is `fake_quantize`.

    The parameter is the step's logarithm relative to where the observer put it. So it begins at 0, one learning rate
    fits every layer (AdamW moves each parameter by about that much, here a share of the step), the step stays
    positive, and weight decay draws it back to what was observed.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, axis: int | None = None, channels: int | None = None) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.bits, self.axis = bits, axis
        self.ready = False
        """Whether there is a grid yet."""
        self.seen: list[Tensor] | None = None
        """While it is being calibrated: what came by."""
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.log_step = nn.Parameter(torch.zeros(shape))
        self.low = 0 if axis is None else 1 - 2 ** (bits - 1)
        self.high = 2**bits - 1 if axis is None else 2 ** (bits - 1) - 1
        self.register_load_state_dict_post_hook(_see_whether_ready)

    def set(self, grid: Grid) -> None:
        """Start from this grid."""
        with torch.no_grad():
            self.scale.copy_(grid.scale)
            self.zero_point.copy_(grid.zero_point)
            self.log_step.zero_()
        self.ready = True

    @property
    def grid(self) -> Grid:
        """The grid as it is now; its scale needs a gradient."""
        return Grid(self.scale * self.log_step.exp(), self.zero_point, self.low, self.high, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(_sample(x))
            return x
        if not self.ready:
            raise CompanionError(
                "the activations have no ranges yet: call compress.calibrate(network, batches) before it is used."
            )
        return fake_quantize(x, self.grid)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}, ready={self.ready}"


def _see_whether_ready(quantizer: nn.Module, _: Any) -> None:
    assert isinstance(quantizer, FakeQuantizer)
    quantizer.ready = bool((quantizer.scale > 0).all())


def _sample(x: Tensor) -> Tensor:
    """Some of the values, evenly spread, and the extremes, so that the observers see the range as it is."""
    values = x.detach().flatten()
    every = -(-len(values) // KEPT)
    return torch.cat([values[::every], torch.stack(values.aminmax())]).cpu()


def prepare_qat(
    model: nn.Module,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    first_last_bits: int | None = 8,
    observer: str = "mse",
    exclude: Collection[str] = (),
) -> nn.Module:
    """A copy of ``model`` that computes as if its weights and activations were integers of few bits.

    Each convolution and linear layer gets its weights on a symmetric grid with a scale per output channel, and its
    input on an affine grid with one scale. Additions, pooling and normalisations between them stay float.

    Call `calibrate` next. Then evaluate it (post-training quantisation), or train it with ``companion.train.fit`` and
    evaluate it (quantisation-aware training: weights by the straight-through estimator, steps learned).

    Batch normalisations stay where they are, and learn along. Folded into the layer before, one multiplies each of its
    output channels by a number; a scale per channel is multiplied likewise and the integers are the same. So nothing
    is lost by folding them later, and training is easier before.

    Args:
        model: any network; it is not changed. Layers whose exact type is one of torch's convolutions or ``nn.Linear``.
        weight_bits: 2 to 8; at 2 bits a weight is −s, 0 or s.
        activation_bits: 2 to 8, or None to leave activations float.
        first_last_bits: of weights and activations of the first and the last of these layers, in the order of
            ``model.named_modules()``: they have few weights and harm the most. None: as all others.
        observer: chooses where each weight grid starts: ``minmax``, ``percentile`` or ``mse``; see `observe`.
        exclude: names of layers to leave alone.

    Returns:
        The copy, on the device and in the mode of ``model``.

    Raises:
        CompanionError: bits out of range, no such observer or layer, no layer to quantize, a network that is prepared
            already, or weights that are NaN or infinite.

    Source: Jacob et al., 2018, section 3 (simulated quantisation); Esser et al., Learned Step Size Quantization, 2020.
    """
    for bits in (weight_bits, *(b for b in (activation_bits, first_last_bits) if b is not None)):
        check_bits(bits)
    check_observer(observer, 99.9)
    result = own_copy(model)
    ends = [list(dict(quantizable(model)))[i] for i in (0, -1)] if first_last_bits else []
    for name, layer in list(quantizable(result, exclude)):
        more = first_last_bits if name in ends else None
        weight: Any = layer.weight
        axis = CHANNEL_AXIS[type(layer)]
        quantizer = FakeQuantizer(more or weight_bits, axis, weight.shape[axis]).to(weight.device)
        with in_layer(name):
            quantizer.set(observe(weight, bits=quantizer.bits, symmetric=True, axis=axis, observer=observer))
        parametrize.register_parametrization(layer, "weight", quantizer)
        if activation_bits is not None:
            layer.add_module("input_quantizer", FakeQuantizer(more or activation_bits).to(weight.device))
            layer.register_forward_pre_hook(_quantize_input)
        layer.train(layer.training)
    return result


def _quantize_input(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Any = layer.input_quantizer
    return quantizer(arguments[0]), *arguments[1:]


def calibrate(
    prepared: nn.Module, batches: Iterable[Any], *, observer: str = "mse", percentile: float = 99.9
) -> nn.Module:
    """Set the ranges of the activations, in place, from what passes through the network in evaluation mode.

    A few hundred samples like those it will meet are enough; labels are not needed.

    Args:
        prepared: from `prepare_qat`. What was learned of its activations' ranges is replaced.
        batches: inputs of the network: tensors, tuples of its arguments, or dicts of them by name.
        observer, percentile: as of `observe`.

    Returns:
        ``prepared``.

    Raises:
        CompanionError: not such a network, no batch, one that it cannot run, NaN or infinity in what passes through;
            the ranges are then what they were before.
    """
    check_observer(observer, percentile)
    check_network(prepared)
    check_batches(batches)
    quantizers = dict(_of_activations(prepared))
    if not quantizers:
        raise CompanionError("this network has no activations to calibrate: make it with compress.prepare_qat.")
    for quantizer in quantizers.values():
        quantizer.seen = []
    try:
        with borrowed(prepared, training=False), torch.no_grad():
            for batch in batches:
                with one_sentence(prepared, batch, "for calibration"):
                    call(prepared, batch)
        if not any(quantizer.seen for quantizer in quantizers.values()):
            raise CompanionError("there is nothing to calibrate with: give at least one batch of inputs.")
        grids = {}
        for name, quantizer in quantizers.items():
            if quantizer.seen:  # layers that no batch reaches stay without
                try:
                    values = torch.cat(quantizer.seen)
                    grids[name] = observe(values, bits=quantizer.bits, observer=observer, percentile=percentile)
                except CompanionError as error:
                    raise CompanionError(f"the input of {name} cannot be quantized: {error}") from error
    finally:
        for quantizer in quantizers.values():
            quantizer.seen = None
    for name, grid in grids.items():
        quantizers[name].set(grid)
    return prepared


def _of_activations(model: nn.Module) -> list[tuple[str, FakeQuantizer]]:
    return [
        (name, module.input_quantizer)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "input_quantizer", None), FakeQuantizer)
    ]


def freeze(prepared: nn.Module) -> nn.Module:
    """A plain network again, with the weights that ``prepared`` computes with: each on its layer's grid.

    Its activations are float: it is what is saved, exported, and given to `quantize_onnx`.

    Args:
        prepared: from `prepare_qat`, trained or not; it is not changed.

    Raises:
        CompanionError: it is no such network.
    """
    check_network(prepared)
    with reason_in_one_sentence(f"{type(prepared).__name__} cannot be copied"):
        result = copy.deepcopy(prepared)
    layers = [(name, module) for name, module in result.named_modules() if parametrize.is_parametrized(module)]
    if not layers:
        raise CompanionError("this network was not made by compress.prepare_qat: there is nothing to freeze.")
    for name, layer in layers:
        parts: Any = layer.parametrizations
        if list(parts) != ["weight"] or [type(part) for part in parts.weight] != [FakeQuantizer]:
            raise CompanionError(f"{name} has another parametrization than its grid: make that one permanent first.")
        weight = nn.Parameter(layer.weight.detach(), requires_grad=parts.weight.original.requires_grad)
        # Not by parametrize.remove_parametrizations: it takes the weight from the class that torch made for this layer,
        # and so from the caller's layer, too, of which this is a copy.
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer._parameters = {"weight": weight, **layer._parameters}
        if hasattr(layer, "input_quantizer"):
            del layer.input_quantizer
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _quantize_input]:
                del layer._forward_pre_hooks[key]
    return result
