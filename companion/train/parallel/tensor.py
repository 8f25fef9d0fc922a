"""Tensor parallelism (2.2.1): the layers themselves are split, so that all workers compute each of them at once.

Of two linear layers in a row the first gives each worker some of its outputs (column), the second takes them as some
of its inputs (row), and one all-reduce adds what the workers found. In a transformer, attention is such a pair, with
whole heads for each worker, and the MLP is another.

"Column" and "row" are those of the matrix A in y = x A; torch stores A transposed, so that a column is a row of
``nn.Linear.weight``.

Source: M. Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019,
section 3.
"""

import copy
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from companion.errors import CompanionError


class Block(nn.Module):
    """A transformer block for one device: attention, then an MLP, each with normalisation before it and a bypass.

    The rows of ``qkv`` are queries, keys and values of the first head, then of the second, …, so that heads that stand
    side by side are rows that do.

    Args:
        width: of the tokens.
        heads: a divisor of the width.
        hidden: width of the MLP, by default four times that of the tokens.

    Raises:
        CompanionError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, hidden: int | None = None) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise CompanionError(f"{heads} heads do not divide a width of {width}: choose a divisor.")
        hidden = hidden or 4 * width
        self.heads, self.hidden, self.head_dim = heads, hidden, width // heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, L, width] to tokens [N, L, width]. How many heads there are here, ``qkv`` tells by its outputs."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.head_dim))  # [N, L, heads, 3, head_dim]
        q, k, v = heads.permute(3, 0, 2, 1, 4)  # each [N, heads, L, head_dim]
        mixed = scaled_dot_product_attention(q, k, v)  # [N, heads, L, head_dim]
        x = x + self.out(mixed.transpose(1, 2).flatten(2))  # [N, L, heads·head_dim] -> [N, L, width]
        return x + self.down(gelu(self.up(self.norm2(x))))


class SumGradient(Function):
    """Megatron-LM's *f*, where the same input goes to all workers: each finds a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _sum(gradients[0], ctx.group), None


class SumOutput(Function):
    """Megatron-LM's *g*, where each worker has a summand of the output: the gradient of a summand is the sum's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _sum(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, group=group)
    return x


class ColumnLinear(nn.Module):
    """A worker's share of a linear layer whose outputs are split: [N, …, in] to [N, …, out / workers].

    Args:
        whole: the same on all workers; each copies its rows of the weight [out, in] and of the bias [out].
        group: the workers, by default all.

    Raises:
        CompanionError: the outputs cannot be divided evenly.
    """

    def __init__(self, whole: nn.Linear, group: Any = None) -> None:
        super().__init__()
        self.group = group
        self.weight = _share(whole.weight, 0, "outputs", group)  # [out / workers, in]
        self.bias = None if whole.bias is None else _share(whole.bias, 0, "outputs", group)  # [out / workers]

    def forward(self, x: Tensor) -> Tensor:
        return linear(SumGradient.apply(x, self.group), self.weight, self.bias)


class RowLinear(nn.Module):
    """A worker's share of a linear layer whose inputs are split: [N, …, in / workers] to [N, …, out].

    Args:
        whole: the same on all workers; each copies its columns of the weight [out, in], and all of the bias.
        group: the workers, by default all.

    Raises:
        CompanionError: the inputs cannot be divided evenly.
    """

    def __init__(self, whole: nn.Linear, group: Any = None) -> None:
        super().__init__()
        self.group = group
        self.weight = _share(whole.weight, 1, "inputs", group)  # [out, in / workers]
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach().clone())  # [out]

    def forward(self, x: Tensor) -> Tensor:
        y = SumOutput.apply(linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias  # once, not by each worker


def _share(whole: Tensor, dim: int, what: str, group: Any) -> nn.Parameter:
    workers = distributed.get_world_size(group)
    if whole.shape[dim] % workers:
        raise CompanionError(f"{whole.shape[dim]} {what} of a layer cannot be divided among {workers} workers.")
    return nn.Parameter(whole.detach().chunk(workers, dim)[distributed.get_rank(group)].clone())


_COLUMN, _ROW = ("qkv", "up"), ("out", "down")
"""How the linear layers of a `Block` are split."""


def shard(network: nn.Module, group: Any = None) -> nn.Module:
    """This worker's share of a network: a copy in which every `Block` has its linear layers split; the rest is whole.

    The weights are those of the group's first worker, and all must compute on the same batch. `gather` is the way back.

    Raises:
        CompanionError: there is no `Block`, or the heads or the MLP cannot be divided among the workers.
    """
    network = _of_the_first(network, group)
    shares: dict[int, Any] = {}
    for block in _blocks(network, distributed.get_world_size(group)).values():
        shares |= {id(layer): ColumnLinear(layer, group) for layer in (getattr(block, name) for name in _COLUMN)}
        shares |= {id(layer): RowLinear(layer, group) for layer in (getattr(block, name) for name in _ROW)}
    return copy.deepcopy(network, shares)  # in place of a layer by this identity, its share


def shard_dtensor(network: nn.Module, mesh: Any) -> nn.Module:
    """The same as `shard`, by torch.distributed.tensor: weights become DTensors, which know how they are split.

    Args:
        network: as for `shard`.
        mesh: a DeviceMesh with one dimension.

    Raises:
        CompanionError: as `shard`.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # takes a second

    network = _of_the_first(network, mesh.get_group())
    plan: dict[str, Any] = {}
    for path in _blocks(network, mesh.size()):
        plan |= {f"{path}.{name}".lstrip("."): ColwiseParallel() for name in _COLUMN}
        plan |= {f"{path}.{name}".lstrip("."): RowwiseParallel() for name in _ROW}
    return parallelize_module(network, mesh, plan)


def _of_the_first(network: nn.Module, group: Any) -> nn.Module:
    """A copy with the weights of the group's first worker, as DistributedDataParallel begins, too."""
    network = copy.deepcopy(network)
    for value in network.state_dict().values():
        distributed.broadcast(value, group=group, group_src=0)
    return network


def _blocks(network: nn.Module, workers: int) -> dict[str, Block]:
    """By path."""
    found = {path: module for path, module in network.named_modules() if isinstance(module, Block)}
    if not found:
        raise CompanionError("the network has no Block, and only the layers of a Block are split.")
    for block in found.values():
        for number, what in ((block.heads, "heads"), (block.hidden, "units of an MLP")):
            if number % workers:
                raise CompanionError(f"{number} {what} cannot be divided among {workers} workers.")
    return found


def gather(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole network, on every worker; all of them have to call this.

    Args:
        network: from `shard` or `shard_dtensor`.
    """
    whole = {}
    for name, value in network.state_dict().items():
        path, _, key = name.rpartition(".")
        layer = network.get_submodule(path)
        if hasattr(value, "full_tensor"):  # a DTensor
            whole[name] = value.full_tensor().clone()
        elif isinstance(layer, ColumnLinear):
            whole[name] = _join(value, 0, layer.group)
        elif isinstance(layer, RowLinear) and key == "weight":
            whole[name] = _join(value, 1, layer.group)
        else:
            whole[name] = value.clone()
    return whole


def _join(share: Tensor, dim: int, group: Any) -> Tensor:
    shares = [torch.empty_like(share) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(shares, share, group=group)
    return torch.cat(shares, dim)
