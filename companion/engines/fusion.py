"""Batch normalisation folded into the convolution before it: one operation less per layer, the same answers."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from companion.engines.network import random_like
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

    Which convolution feeds which normalisation is seen by running ``model`` on ``example``, so the network need not be
    traceable. Left alone are a convolution whose result or weights are used elsewhere too, a normalisation in training
    mode, a module that runs twice, one with hooks, and subclasses. If the answers are not the same afterwards, for
    ``example`` and for random values, or the network fails, nothing is folded.

    What a network does for other inputs is not seen: one that takes another branch for other values or another batch,
    and there uses a convolution without its normalisation, gives wrong answers.

    Args:
        model: a network in evaluation mode.
        example: a tensor, a tuple of the network's arguments, or a dict of them by name.
    """
    tests = [example, random_like(example, len(tree_leaves(example)[0]), torch.Generator().manual_seed(0))]
    before = [_answers(model, test) for test in tests]
    pairs = _pairs(model, example)
    kept = [(conv, conv.weight, conv.bias) for conv, _ in pairs]
    identities: dict[nn.Module, nn.Module] = {norm: nn.Identity() for _, norm in pairs}
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    _replace(model, identities)
    try:
        if all(_same(b, _answers(model, test)) for b, test in zip(before, tests, strict=True)):
            return len(pairs)
    except Exception:  # the network looks at its normalisations
        pass
    for conv, weight, bias in kept:
        conv.weight, conv.bias = weight, bias
    _replace(model, {identity: norm for norm, identity in identities.items()})
    return 0


def _pairs(model: nn.Module, example: Any) -> list[tuple[Any, Any]]:
    """The convolutions and the normalisations that can be folded into them."""
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
        if not module.training:
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
            returned = {id(leaf) for leaf in tree_leaves(call(model, _clone(example)))}
    finally:
        for handle in handles:
            handle.remove()

    pairs = []
    for norm, result in taken:
        conv, _ = made.get(result, (None, None))
        if conv is None or runs[conv] > 1 or runs[norm] > 1:
            continue
        used = (result, id(conv.weight), *([] if conv.bias is None else [id(conv.bias)]))
        if all(counter.uses[tensor] == 1 and tensor not in returned for tensor in used):
            pairs.append((conv, norm))
    return pairs


def _clone(example: Any) -> Any:
    """A copy for one run: networks may overwrite what they take."""
    return tree_map(torch.clone, example)


def _answers(model: nn.Module, example: Any) -> list[Any]:
    with torch.no_grad():
        return [
            leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(call(model, _clone(example)))
        ]


def _same(before: list[Any], after: list[Any]) -> bool:
    """Equal up to rounding: to half of a fraction's digits, relative to the largest number."""
    if len(before) != len(after):
        return False
    for old, new in zip(before, after, strict=True):
        if not isinstance(old, Tensor) or not old.is_floating_point():
            if not (torch.equal(old, new) if isinstance(old, Tensor) else old == new):
                return False
            continue
        numbers = old[old.isfinite()].double()
        # GPUs convolve in TF32, which has ten bits of mantissa.
        eps = max(torch.finfo(old.dtype).eps, 2**-10 if old.is_cuda else 0)
        allowed = eps**0.5 * float(numbers.abs().max()) if len(numbers) else 0.0
        if old.shape != new.shape or not torch.allclose(
            old.double(), new.double(), rtol=0, atol=allowed, equal_nan=True
        ):
            return False
    return True


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put another module wherever one of the keys of ``new`` is."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
