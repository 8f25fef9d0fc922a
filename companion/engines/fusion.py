"""Batch normalisation folded into the convolution before it: one operation less per layer, the same answers."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion.metrics.probe import call

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _CountUses(TorchDispatchMode):
    """Counts in how many operations each tensor is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.uses.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def fold_batch_norms(model: nn.Module, example: Any) -> int:
    """Fold, in place, every batch normalisation that can be into its convolution, and return how many were.

    In evaluation a batch normalisation is γ·(y − μ)/√(σ² + ε) + β per channel, which a convolution y = w∗x + b
    can compute itself with the weights w·γ/√(σ² + ε) and the bias (b − μ)·γ/√(σ² + ε) + β.
    (Ioffe & Szegedy, 2015; Jacob et al., 2018, section 3.2.)

    Which convolution feeds which normalisation is seen by running ``model`` once on ``example``, so the network
    need not be traceable. Left alone are a convolution whose result is used elsewhere too, a module that runs
    twice, one with hooks, and subclasses.

    Args:
        model: a network in evaluation mode.
        example: a tensor, a tuple of the network's arguments, or a dict of them by name.
    """
    made: dict[int, tuple[Any, Tensor]] = {}  # by the result's id, which no other tensor gets while it is kept
    taken: list[tuple[Any, int]] = []
    runs: Counter[nn.Module] = Counter()
    counter = _CountUses()

    def after_convolution(module: nn.Module, _: Any, result: Tensor) -> None:
        runs[module] += 1
        made[id(result)] = (module, result)
        counter.uses[id(result)] = 0

    def before_normalisation(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        taken.append((module, id(inputs[0])))

    handles = []
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if type(module) in _CONVOLUTIONS:
            handles.append(module.register_forward_hook(after_convolution))
        elif type(module) in _NORMALISATIONS and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before_normalisation))
    try:
        with torch.no_grad(), counter:
            returned = {id(leaf) for leaf in tree_leaves(call(model, example))}
    finally:
        for handle in handles:
            handle.remove()

    folded = 0
    for norm, result in taken:
        conv, _ = made.get(result, (None, None))
        if conv is None or runs[conv] > 1 or runs[norm] > 1 or counter.uses[result] > 1 or result in returned:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        _replace(model, norm, nn.Identity())
        folded += 1
    return folded


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
