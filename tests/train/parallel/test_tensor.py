"""Tensor parallelism by hand and by torch.distributed.tensor: equal training, its cost, and the way back."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from companion import CompanionError
from companion.train.parallel import (
    Block,
    ColumnLinear,
    RowLinear,
    gather,
    launch,
    shard,
    shard_dtensor,
)

STEPS = 10


def network(heads=4, hidden=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), Block(16, heads, hidden), Block(16, heads, hidden), nn.Linear(16, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 5, n, generator=generator).split(1) for n in [6] * STEPS]  # two of [1, 4, 5, 6]


def train(model):
    """SGD with momentum. Adam would divide by its own size the gradient of the keys' bias, which is rounding alone:
    the softmax does not see what is added to all keys."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[0]), y[0, ..., :3]).backward()
        optimizer.step()


class Reference(nn.Module):
    """A `Block` out of torch's own attention."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)
        self.attention = nn.MultiheadAttention(16, block.heads, batch_first=True)
        shape = (block.heads, 3, block.head_dim, -1)
        with torch.no_grad():
            weight = block.qkv.weight.view(shape).transpose(0, 1).reshape(48, 16)  # all queries, all keys, all values
            bias = block.qkv.bias.view(shape).transpose(0, 1).reshape(48)
            self.attention.in_proj_weight.copy_(weight)
            self.attention.in_proj_bias.copy_(bias)
            self.attention.out_proj.load_state_dict(block.out.state_dict())

    def forward(self, x):
        y = self.block.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.block.down(nn.functional.gelu(self.block.up(self.block.norm2(x))))


def test_a_block_computes_what_torchs_attention_does():
    block = network()[1]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block(x), Reference(block)(x), rtol=0, atol=1e-6)


def works():
    group = distributed.group.WORLD
    workers = distributed.get_world_size()
    whole = network(seed=distributed.get_rank())  # what counts are the weights of the first
    sharded, dtensor = shard(whole), shard_dtensor(whole, init_device_mesh("cpu", (workers,)))
    begun = gather(sharded)
    for model in (sharded, dtensor):
        train(model)

    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    communications = []
    for block in (shard(whole)[1], shard_dtensor(whole, init_device_mesh("cpu", (workers,)))[1]):
        with CommDebugMode() as forward:
            y = block(x)
        with CommDebugMode() as backward:
            y.sum().backward()
        communications.append((forward.get_total_counts(), backward.get_total_counts()))

    sentences = []
    for wrong in (
        lambda: shard(network(heads=1)),
        lambda: shard(network(hidden=7)),
        lambda: shard_dtensor(network(heads=1), init_device_mesh("cpu", (workers,))),
        lambda: shard(nn.Linear(2, 2)),
        lambda: ColumnLinear(nn.Linear(4, 3), group),
        lambda: RowLinear(nn.Linear(5, 4), group),
    ):
        try:
            wrong()
        except CompanionError as error:
            sentences.append(str(error))
    plain = RowLinear(nn.Linear(4, 3, bias=False)), ColumnLinear(nn.Linear(4, 4, bias=False))
    assert all(layer.bias is None for layer in plain)
    shapes = {name: tuple(value.shape) for name, value in sharded.state_dict().items()}
    return begun, gather(sharded), gather(dtensor), shapes, communications, sentences


def test_by_hand_and_by_dtensor_equal_one_process_with_momentum():
    one = network()
    train(one)
    start = network().state_dict()
    workers = launch(works, 2)
    for begun, by_hand, by_torch, shapes, communications, sentences in workers:
        for name, value in one.state_dict().items():
            torch.testing.assert_close(begun[name], start[name], rtol=0, atol=0)
            torch.testing.assert_close(by_hand[name], value, rtol=0, atol=1e-5)
            torch.testing.assert_close(by_torch[name], value, rtol=0, atol=1e-5)
        assert by_hand.keys() == by_torch.keys() == start.keys()
        assert {name: shape for name, shape in shapes.items() if name.startswith("1.")} == {
            "1.norm1.weight": (16,), "1.norm1.bias": (16,),
            "1.qkv.weight": (24, 16), "1.qkv.bias": (24,),
            "1.out.weight": (16, 8), "1.out.bias": (16,),
            "1.norm2.weight": (16,), "1.norm2.bias": (16,),
            "1.up.weight": (32, 16), "1.up.bias": (32,),
            "1.down.weight": (16, 32), "1.down.bias": (16,),
        }  # fmt: skip
        assert communications == [(2, 2), (2, 2)]  # Megatron-LM, figure 4
        assert sentences == [
            "1 heads cannot be divided among 2 workers.",
            "7 units of an MLP cannot be divided among 2 workers.",
            "1 heads cannot be divided among 2 workers.",
            "the network has no Block, and only the layers of a Block are split.",
            "3 outputs of a layer cannot be divided among 2 workers.",
            "5 inputs of a layer cannot be divided among 2 workers.",
        ]
    for name, value in one.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-3, name


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(CompanionError, match="3 heads do not divide a width of 16"):
        Block(16, 3)
