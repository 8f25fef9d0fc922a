"""Memory of the values between the layers (2.4.1): for training usually more than the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion.metrics import probe
from companion.metrics.memory import peak_allocated


def activation_bytes(model: nn.Module, example: Any, *, training: bool) -> int:
    """Bytes of activations that one pass of ``model`` over ``example`` needs, beside weights and buffers.

    Training: what the forward pass keeps for the backward pass, exactly: every tensor that autograd saves, a memory
    that several of them share counted once, the network's own state left out. The input counts where a first layer
    saves it for its weights' gradient.

    Inference: the peak of what the forward pass has made and still holds, the result included and the input not, as the
    device's allocator saw it: with what kernels borrow inside, such as weights in another order.

    The network runs where it is, because devices keep different things (fused attention keeps no scores). On the
    ``meta`` device it runs without any memory, and kernels borrow nothing: there the tensors alone are counted.

    Args:
        model: in any mode; it is not changed.
        example: a tensor, a tuple of the network's positional arguments, or a dict of its arguments by name.
        training: see above.

    Raises:
        CompanionError: the network does not run on such an example.
    """
    probe.check_example(model, example)
    with probe.one_sentence(model, example, "as it is"), probe.borrowed(model, training=training):
        example, state = probe.copied(example), [*model.parameters(), *model.buffers()]
        if training:
            kept: dict[int, Any] = {}  # storages by identity, held so that no identity is used twice
            own = {tensor.untyped_storage()._cdata for tensor in state}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = probe.call(model, example)  # held: saved tensors die with the graph
            del outputs
            return sum(storage.nbytes() for storage in kept.values())
        with torch.no_grad():
            device = [*state, *probe.tensors_in(example)][0].device
            if device.type in ("cpu", "cuda"):
                return peak_allocated(lambda: probe.call(model, example), device)
            with _Peak(state, example) as peak:
                probe.call(model, example)
            return peak.bytes


class _Peak(TorchDispatchMode):
    """Follows the memory of every tensor that an operator makes until nothing refers to it any more."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.known = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves(known) if isinstance(t, Tensor)}
        self.alive: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.alive = {reference: size for reference, size in self.alive.items() if not reference.expired()}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self.known:
                    self.alive[reference] = storage.nbytes()
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return out
