"""Layers split over workers: where the cuts are, equal training, and the memory of each worker."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from companion import CompanionError, models
from companion.metrics import count_complexity
from companion.train.parallel import Stage, WorkerError, balance, launch, measure_footprint, split

STEPS = 10


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(48, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5)
        )


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 4, 4, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in [8] * (STEPS - 1) + [3]  # a last batch that is smaller is no special case
    ]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def alone(model):
    optimizer, losses = adamw(model.parameters()), []
    for x, y in batches():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_balance_by_hand():
    assert balance([1, 2, 3, 4, 5, 6], 3) == [range(0, 3), range(3, 5), range(5, 6)]  # 6, 9, 6
    assert balance([9, 1, 1, 1], 2) == [range(0, 1), range(1, 4)]
    assert balance([0, 5, 0, 3, 0], 2) == [range(0, 3), range(3, 5)]  # what costs nothing stays with what is before it
    assert balance([0, 0, 0], 3) == [range(0, 1), range(1, 2), range(2, 3)]  # none is empty
    assert balance([7.5], 1) == [range(0, 1)]


def test_split_balances_what_it_is_asked_to():
    model = models.create("simple_cnn", seed=0)
    first, second = split(model, 2)  # nearly all parameters are in the first linear layer
    assert [name for name, _ in (*first.named_children(), *second.named_children())] == list(model._modules)
    assert "fc1" in second._modules
    assert {**first.state_dict(), **second.state_dict()}.keys() == model.state_dict().keys()
    assert second.fc1 is model.fc1
    x = torch.rand(2, 3, 32, 32)
    macs = {name: cost.macs for name, cost in count_complexity(model, x).by_module.items()}
    assert macs["conv2"] > sum(macs[name] for name in ("conv1", "fc1", "fc2"))
    first, second = split(model, 2, example=x)
    assert list(first._modules)[-1] == "pool1"
    torch.testing.assert_close(second(first(x)), model(x))


def works(fails=False):
    rank, stages = distributed.get_rank(), distributed.get_world_size()
    stage = Stage(split(network(), stages)[rank])
    optimizer, losses = adamw(stage.parameters()), []

    def step(x, y):
        optimizer.zero_grad()
        out = stage(x) if stage.first else stage()
        loss = cross_entropy(out, y) if stage.last else out
        loss.backward()
        optimizer.step()
        return loss.item()

    if fails:
        stage()
    losses = [step(x, y) for x, y in batches()]
    weights = {name: value.clone() for name, value in stage.layers.state_dict().items()}
    with torch.no_grad():
        x, _ = batches()[0]
        logits = stage(x) if stage.first else stage()
    return weights, losses, logits, measure_footprint(stage, optimizer, lambda: step(*batches()[0]))


def test_three_stages_equal_one_process_with_adamw_and_need_less_memory_each():
    model, start = network(), network().state_dict()
    losses = alone(model)
    stages = launch(works, 3)
    weights = {name: value for part, *_ in stages for name, value in part.items()}
    assert weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-2, name
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    assert stages[-1][1] == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(stages[-1][2], model(batches()[0][0]).detach(), rtol=0, atol=1e-5)

    prints = [footprint for *_, footprint in stages]
    parameters = sum(p.nbytes for p in model.parameters())
    assert sum(footprint.weights for footprint in prints) == parameters
    for footprint, part in zip(prints, split(model, 3), strict=True):
        own = sum(p.nbytes for p in part.parameters())
        tensors = len(list(part.parameters()))
        assert (footprint.weights, footprint.gradients, footprint.optimizer) == (own, own, 2 * own + 4 * tensors)
        assert footprint.step.allocated > 0
        assert footprint.total == 4 * own + 4 * tensors + footprint.step.allocated

    optimizer = adamw(model.parameters())
    x, y = batches()[0]

    def step():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    whole = measure_footprint(model, optimizer, step)
    budget = max(footprint.total for footprint in prints)
    assert whole.total > budget
    for footprint in prints:
        footprint.check(budget)
    with pytest.raises(CompanionError, match=r"training needs .* and the device has .*: split the network"):
        whole.check(budget)
    assert [line.split()[0] for line in str(whole).splitlines()] == [
        "weights", "gradients", "optimizer", "activations", "total",
    ]  # fmt: skip


def test_wrong_input():
    with pytest.raises(CompanionError, match="7 layers cannot be split into 8 stages: give from 1 to 7"):
        split(network(), 8)
    with pytest.raises(CompanionError, match="into 0 stages"):
        split(network(), 0)
    with pytest.raises(CompanionError, match="a Linear cannot be cut between its layers"):
        split(nn.Linear(2, 2), 2)
    with pytest.raises(WorkerError, match=r"worker 0 of 1 failed: .*the first stage needs the batch"):
        launch(works, 1, True)
