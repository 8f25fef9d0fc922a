"""Model parallelism as the book defines it (2.2.1): the layers of a network spread over devices.

Activations go forward from worker to worker, gradients come back the same way. Only one worker computes at a time:
what is gained is room, since each holds its own layers, their gradients and their optimiser state. `pipeline` makes
them compute at once.

Source of the balance: Y. Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism,
NeurIPS 2019.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function

from companion.errors import CompanionError
from companion.metrics import Memory, count_complexity, count_parameters, measure_memory
from companion.train.parallel.launch import device
from companion.units import format_bytes, format_table


def balance(costs: Sequence[float], parts: int) -> list[range]:
    """Cut a row into neighbouring parts, none empty, whose costs have the least variance (GPipe, section 2.2).

    Args:
        costs: [n], of layers in their order. One that costs nothing stays with the one before it.
        parts: how many, at most n.

    Raises:
        CompanionError: there are fewer costs than parts.
    """
    if not 1 <= parts <= len(costs):
        raise CompanionError(f"{len(costs)} layers cannot be split into {parts} stages: give from 1 to {len(costs)}.")

    @cache
    def best(start: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """Sum of the squared costs of the parts from ``start`` on, and where they end. The mean is the same for all."""
        if parts == 1:
            return sum(costs[start:]) ** 2, (len(costs),)
        found = []
        for end in range(len(costs) - parts + 1, start, -1):
            rest, ends = best(end, parts - 1)
            found.append((sum(costs[start:end]) ** 2 + rest, (end, *ends)))
        return min(found, key=lambda option: option[0])  # the first of equals, which is the latest cut

    return [range(*cut) for cut in pairwise((0, *best(0, parts)[1]))]


def split(network: nn.Sequential, stages: int, *, example: Any = None) -> list[nn.Sequential]:
    """The layers of a network as networks of their own, one for each stage.

    The layers are the very objects, not copies, under the names that they had: the state dicts of all stages together
    are that of the network.

    Args:
        network: runs its layers one after the other.
        stages: how many.
        example: an input; with one the stages are balanced by MACs (time), without by parameters (memory).

    Raises:
        CompanionError: not a Sequential, more stages than layers, or it does not run on the example.
    """
    if not isinstance(network, nn.Sequential):
        raise CompanionError(
            f"a {type(network).__name__} cannot be cut between its layers: give an nn.Sequential of them."
        )
    layers = list(network.named_children())
    if example is None:
        costs = [count_parameters(layer) for _, layer in layers]
    else:
        found = count_complexity(network, example).by_module
        costs = [found[name].macs if name in found else 0 for name, _ in layers]
    return [nn.Sequential(OrderedDict(layers[i] for i in part)) for part in balance(costs, stages)]


class Stage(nn.Module):
    """This worker's layers. The group's ranks are the stages in their order.

    Every worker runs the same three lines; what ``forward`` returns on all but the last is a zero, whose backward
    pass waits for the gradient::

        out = stage(x) if stage.first else stage()
        loss = cross_entropy(out, y) if stage.last else out
        loss.backward()

    ``layers.state_dict()`` has the names of the whole network.

    Args:
        layers: this worker's, see `split`.
        group: the workers, by default all.
    """

    def __init__(self, layers: nn.Module, *, group: Any = None) -> None:
        super().__init__()
        self.layers = layers
        self.group = group
        self.rank = distributed.get_rank(group)
        self.first = self.rank == 0
        self.last = self.rank == distributed.get_world_size(group) - 1

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Take the batch [N, …] (first stage) or the activations of the stage before; outputs [N, …] (last) or 0."""
        # Autograd calls a function's backward only if an input needs a gradient, and a batch does not.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        if not self.first:
            x = Receive.apply(anchor, self.rank - 1, self.group)
        elif x is None:
            raise CompanionError("the first stage needs the batch: call stage(x).")
        x = self.layers(x)
        return x if self.last else Send.apply(x, anchor, self.rank + 1, self.group)


class Send(Function):
    """Forward: the activation goes to the next stage. Backward: its gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, peer: int, group: Any) -> Tensor:
        ctx.like, ctx.peer, ctx.group = (x.shape, x.dtype), peer, group
        distributed.send_object_list([x.shape, x.dtype], group=group, group_dst=peer)
        distributed.send(x.contiguous(), group=group, group_dst=peer)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        shape, dtype = ctx.like
        gradient = torch.empty(shape, dtype=dtype, device=device())
        distributed.recv(gradient, group=ctx.group, group_src=ctx.peer)
        return gradient, None, None, None


class Receive(Function):
    """Forward: the activation of the stage before. Backward: its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, peer: int, group: Any) -> Tensor:
        ctx.peer, ctx.group = peer, group
        header: list[Any] = [None, None]
        distributed.recv_object_list(header, group=group, group_src=peer)
        shape, dtype = header
        x = torch.empty(shape, dtype=dtype, device=device())
        distributed.recv(x, group=group, group_src=peer)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        distributed.send(gradients[0].contiguous(), group=ctx.group, group_dst=ctx.peer)
        return None, None, None


@dataclass(frozen=True)
class Footprint:
    """Memory that training needs on one device, in bytes."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    step: Memory
    """Peak of a step above these three."""

    @property
    def activations(self) -> int:
        """What torch allocated for a step: mostly these, unless the batch is small; the optimizer needs some, too."""
        return self.step.allocated

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def check(self, budget: int) -> None:
        """Raise a CompanionError if a device with ``budget`` bytes is too small."""
        if self.total > budget:
            raise CompanionError(
                f"training needs {format_bytes(self.total)} and the device has {format_bytes(budget)}: "
                "split the network over more devices."
            )

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations", "total")
        return format_table([(name, format_bytes(getattr(self, name))) for name in names])


def measure_footprint(network: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> Footprint:
    """Memory of this worker while it trains.

    Args:
        network: the layers that this worker holds.
        optimizer: its optimiser.
        step: one whole training step, zeroing of the gradients included. It is called three times and does train. If
            it talks to other workers, they have to measure at the same time.
    """
    parameters = list(network.parameters())
    peak = measure_memory(step, device=parameters[0].device)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return Footprint(
        weights=_bytes([*parameters, *network.buffers()]),
        gradients=_bytes([parameter.grad for parameter in parameters if parameter.grad is not None]),
        optimizer=_bytes(state),
        step=peak,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
