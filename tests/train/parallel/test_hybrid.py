"""Two by two: the model split along one side of the grid, the data along the other."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from companion import CompanionError
from companion.train.parallel import Block, gather, grid, hybrid, launch

STEPS = 10


class First(nn.Module):
    """The first token."""

    def forward(self, x):
        return x[:, 0]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), Block(8, 2), Block(8, 2), First(), nn.Linear(8, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(STEPS)
    ]


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def works():
    mesh = grid(2, 2)
    row = mesh["data"].get_local_rank()
    layers, tensor = hybrid(network(), mesh, by="layers"), hybrid(network(), mesh, by="tensor")
    first, last = layers.module.first, layers.module.last
    optimizers = [momentum(layers), momentum(tensor)]
    for batch in batches():
        x, y = (values.chunk(2)[row] for values in batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        out = layers(x) if first else layers()
        (cross_entropy(out, y) if last else out).backward()
        cross_entropy(tensor(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    sentences = []
    for wrong in (lambda: grid(2, 3), lambda: hybrid(network(), mesh, by="heads")):
        try:
            wrong()
        except CompanionError as error:
            sentences.append(str(error))
    place = row, mesh["model"].get_local_rank()
    return place, layers.module.layers.state_dict(), gather(tensor.module), sentences


def test_four_workers_equal_one_process_with_momentum():
    one, start = network(), network().state_dict()
    optimizer = momentum(one)
    for x, y in batches():
        optimizer.zero_grad()
        cross_entropy(one(x), y).backward()
        optimizer.step()
    workers = launch(works, 4)
    assert [place for place, *_ in workers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    by_layers = [workers[0][1] | workers[1][1], workers[2][1] | workers[3][1]]
    by_tensor = [tensor for _, _, tensor, _ in workers]
    for name, value in one.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-3, name
        for found in (*by_layers, *by_tensor):
            assert found.keys() == start.keys()
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert workers[0][1].keys().isdisjoint(workers[1][1])
    for *_, sentences in workers:
        assert sentences == [
            "a grid of 2 × 3 needs 6 workers, and there are 4.",
            "a network is not split by 'heads': choose layers or tensor.",
        ]
