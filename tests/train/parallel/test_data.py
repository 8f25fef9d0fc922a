"""Data parallel by hand and by DistributedDataParallel against one process that has the whole batch."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from companion import models
from companion.errors import CompanionError
from companion.models.resnet import ResNet
from companion.train.parallel import (
    average_gradients,
    broadcast_model,
    launch,
    loss_weight,
    ring_all_reduce,
    synchronized_batch_norm,
)

EVEN = {2: (6, 6), 4: (3, 3, 3, 3)}
UNEVEN = {2: (9, 3), 4: (5, 4, 3, 0)}


def network(name, dtype):
    model = models.create(name, seed=0).train().to(dtype)
    if name == "cifar_resnet14":
        for i, module in enumerate(list(model.modules())):
            if isinstance(module, nn.BatchNorm2d):  # other than ones and zeros, so that mistakes in gradients show
                generator = torch.Generator().manual_seed(i)
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
            # A rounded statistic may put a value on the other side of a ReLU's kink, in one process as well: float32
            # gradients are then 1e-4 from those of float64.
            for child, kind in list(module.named_children()):
                if isinstance(kind, nn.ReLU) and dtype is torch.float32:
                    setattr(module, child, nn.SiLU())
    return model


def batch(model):
    generator = torch.Generator().manual_seed(5)
    size = 16 if isinstance(model, ResNet) else 32
    inputs = torch.rand(12, 3, size, size, generator=generator, dtype=next(model.parameters()).dtype)
    return inputs, torch.randint(0, 10, (12,), generator=generator)


def step(model, forward, inputs, targets, weight, average):
    """Gradients and state after one step; a share of no samples has a loss of 0 that still depends on the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = forward(inputs)
    loss = cross_entropy(outputs, targets) if len(targets) else outputs.sum()
    (loss * weight).backward()
    average(model)
    optimizer.step()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    return gradients, {key: value.detach().clone() for key, value in model.state_dict().items()}


def steps(name, dtype, shares):
    """The network after one step on this worker's share: by hand, by hand around the ring, and by DDP."""
    rank, end = distributed.get_rank(), sum(shares[: distributed.get_rank() + 1])
    found = {}
    for way in ("by hand", "ring", "DDP"):
        all_reduce = ring_all_reduce if way == "ring" else distributed.all_reduce
        model = network(name, dtype)
        inputs, targets = (part[end - shares[rank] : end] for part in batch(model))
        with synchronized_batch_norm(model, all_reduce=all_reduce):
            forward = DistributedDataParallel(model) if way == "DDP" else model

            def average(model, way=way, all_reduce=all_reduce):
                if way != "DDP":
                    average_gradients(model, all_reduce=all_reduce)

            weight = loss_weight(len(targets), all_reduce=all_reduce)
            found[way] = step(model, forward, inputs, targets, weight, average)
    return found


NORMS = {
    "rows": (nn.BatchNorm1d(5), (12, 5)),
    "signals": (nn.BatchNorm1d(5), (12, 5, 7)),
    "images": (nn.BatchNorm2d(5), (12, 5, 4, 3)),
    "volumes": (nn.BatchNorm3d(5), (12, 5, 2, 3, 4)),
    "no weights": (nn.BatchNorm2d(5, affine=False), (12, 5, 4, 3)),
    "cumulative average": (nn.BatchNorm2d(5, momentum=None), (12, 5, 4, 3)),
    "nothing tracked": (nn.BatchNorm2d(5, track_running_stats=False), (12, 5, 4, 3)),
    "momentum 0.5, eps 0.1": (nn.BatchNorm2d(5, momentum=0.5, eps=0.1), (12, 5, 4, 3)),
}


def normalized(name, dtype, shift, share, synchronized):
    """Output, gradients and running statistics of a batch normalisation, twice, for this share of the samples."""
    module, shape = copy.deepcopy(NORMS[name])
    module.to(dtype).train()
    if module.affine:
        nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    with synchronized_batch_norm(module) if synchronized else nullcontext():
        for seed in (2, 3):
            generator = torch.Generator().manual_seed(seed)
            inputs, pull = (torch.randn(shape, generator=generator, dtype=dtype)[share] for _ in range(2))
            inputs = (3 * inputs + shift).to(memory_format=layout).requires_grad_()
            outputs = module(inputs)
            (outputs * pull).sum().backward()
    assert outputs.dtype == dtype
    assert outputs.stride() == inputs.stride()
    gradients = {key: value.grad for key, value in module.named_parameters()}
    return outputs.detach(), inputs.grad, gradients, dict(module.named_buffers())


def small(seed):
    torch.manual_seed(seed)
    first, second = (nn.Conv2d(c, 4, 3, bias=False) for c in (3, 4))
    return nn.Sequential(
        first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


def fifty_steps():
    """From a start of its own, with samples of its own: what this worker's networks are after 50 steps."""
    rank, found = distributed.get_rank(), {}
    for way in ("by hand", "DDP"):
        model = small(seed=rank)
        with synchronized_batch_norm(model):
            forward = model
            if way == "DDP":
                forward = DistributedDataParallel(model)
            else:
                broadcast_model(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            generator = torch.Generator().manual_seed(rank)
            for _ in range(50):
                inputs = torch.rand(2, 3, 8, 8, generator=generator)
                targets = torch.randint(0, 10, (2,), generator=generator)
                cross_entropy(forward(inputs), targets).backward()
                if way == "by hand":
                    average_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
        found[way] = model.state_dict()
    return found


def small_things():
    """What this worker gets of a gradient that not all have, and for shares of 3, 2, 1 and 0 samples."""
    rank, n = distributed.get_rank(), distributed.get_world_size()
    model = nn.ModuleDict({"both": nn.Linear(1, 1, bias=False), "first": nn.Linear(1, 1, bias=False).bfloat16()})
    model["fixed"] = nn.Linear(1, 1).requires_grad_(False)
    model["both"].weight.grad = torch.full((1, 1), 1.0 + rank)
    if rank == 0:
        model["first"].weight.grad = torch.full((1, 1), float(n), dtype=torch.bfloat16)
    average_gradients(model)
    gradients = [None if p.grad is None else p.grad.item() for p in model.parameters()]
    return gradients, model["first"].weight.grad.dtype, loss_weight(max(0, 3 - rank))


def everything(cases):
    rank, n = distributed.get_rank(), distributed.get_world_size()
    share = slice(rank * 12 // n, (rank + 1) * 12 // n) if n == 2 else slice(*[(0, 1), (1, 1), (1, 6), (6, 12)][rank])
    norms = {
        (name, dtype, shift): normalized(name, dtype, shift, share, synchronized=True)
        for name in NORMS
        for dtype, shift in ((torch.float64, 0), (torch.float32, 1e4), (torch.bfloat16, 0))
    }
    return {case: steps(*case) for case in cases}, norms, fifty_steps(), small_things()


@pytest.fixture(scope="module", params=[2, 4])
def answers(request):
    n = request.param
    dtypes, shares = (torch.float64, torch.float32), (EVEN[n], UNEVEN[n])
    cases = [(name, dtype, share) for name in NAMES for dtype in dtypes for share in shares]
    return list(zip(*launch(everything, n, cases), strict=True))


def distance(found, wanted) -> float:
    """The largest over all tensors of: the largest difference, relative to the largest value."""
    assert found.keys() == wanted.keys()
    return max(
        ((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        for key, value in wanted.items()
        if value.is_floating_point()
    )


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], value) for key, value in b.items())


NAMES = ("simple_cnn", "cifar_resnet14")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_step_is_that_of_one_process_with_all_samples(answers, name, dtype):
    model = network(name, dtype)
    gradients, state = step(model, model, *batch(model), 1.0, lambda _: None)
    # Sums in another order: float32 gradients agree to about 5e-6 of the largest.
    limits = (1e-12, 1e-12) if dtype is torch.float64 else (2e-5, 1e-6)
    for case in (case for case in answers[0][0] if case[:2] == (name, dtype)):
        for way in ("by hand", "ring", "DDP"):
            first, *others = (answer[case][way] for answer in answers[0])
            assert distance(first[0], gradients) < limits[0], (case, way)
            assert distance(first[1], state) < limits[1], (case, way)
            assert all(same(x, y) for other in others for x, y in zip(other, first, strict=True)), (case, way)


def test_weights_are_alike_bit_for_bit_after_50_steps(answers):
    for way in ("by hand", "DDP"):
        first, *others = (answer[way] for answer in answers[2])
        assert all(same(other, first) for other in others)
        assert not same(first, small(seed=0).state_dict())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "shift", "tolerance"), [(torch.float64, 0, 1e-13), (torch.float32, 1e4, 2e-3), (torch.bfloat16, 0, 2e-2)]
)
def test_synchronised_batch_norm_is_torchs_on_all_samples(answers, name, dtype, shift, tolerance):
    # With a mean of 10,000 float32 inputs keep three digits, and E[x²] - E[x]² would have none.
    found = [answer[name, dtype, shift] for answer in answers[1]]
    outputs, gradient, gradients, buffers = normalized(name, dtype, shift, slice(None), synchronized=False)
    close = {"rtol": tolerance, "atol": tolerance * outputs.abs().max().item()}
    torch.testing.assert_close(torch.cat([part[0] for part in found]), outputs, **close)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), gradient, **close)
    for key, value in gradients.items():
        torch.testing.assert_close(sum(part[2][key] for part in found), value, rtol=tolerance, atol=20 * tolerance)
    for part in found:
        assert part[3].keys() == buffers.keys()
        for key, value in buffers.items():
            torch.testing.assert_close(part[3][key], value, rtol=tolerance, atol=tolerance)


def test_gradients_that_not_all_workers_have_and_uneven_shares(answers):
    n = len(answers[3])
    for gradients, dtype, _ in answers[3]:
        assert gradients == [sum(range(1, n + 1)) / n, 1.0, None, None]
        assert dtype == torch.bfloat16
    weights = [weight for *_, weight in answers[3]]
    assert weights == pytest.approx([6 / 5, 4 / 5] if n == 2 else [2, 4 / 3, 2 / 3, 0])


def alone(values):
    """The all-reduce of a worker without others."""


def refuse(values):
    raise AssertionError("nothing is to be sent")


def test_evaluation_sends_nothing_and_afterwards_all_is_as_before():
    model = models.create("cifar_resnet14", seed=0).train()
    kinds, before = list(map(type, model.modules())), copy.deepcopy(model.state_dict())
    inputs = torch.rand(2, 3, 32, 32)
    wanted = model.eval()(inputs)
    with synchronized_batch_norm(model, all_reduce=refuse):
        assert torch.equal(model(inputs), wanted)
        with pytest.raises(AssertionError, match="nothing is to be sent"):
            model.train()(inputs)
        assert model.state_dict().keys() == before.keys()
        assert list(map(type, model.modules())) != kinds
    assert list(map(type, model.modules())) == kinds
    assert same(model.state_dict(), before)
    assert "all_reduce" not in vars(model.bn1)


def test_it_ends_also_after_an_error_and_works_on_a_lone_layer():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(AssertionError), synchronized_batch_norm(layer, all_reduce=refuse):
        layer(torch.randn(4, 3))
    assert type(layer) is nn.BatchNorm1d


def test_its_gradient_is_that_of_finite_differences():
    layer = nn.BatchNorm2d(2, track_running_stats=False).double()
    inputs = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    with synchronized_batch_norm(layer, all_reduce=alone):
        assert torch.autograd.gradcheck(layer, (inputs,))


def test_statistics_are_float32_under_autocast():
    torch.manual_seed(0)
    layer, inputs = nn.BatchNorm2d(2), (torch.randn(64, 2, 8, 8) + 8).bfloat16()
    wanted = nn.BatchNorm2d(2)
    wanted(inputs.float())
    with synchronized_batch_norm(layer, all_reduce=alone), torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, wanted.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var, wanted.running_var, rtol=1e-5, atol=0)


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("layer", [Own(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()])
def test_what_cannot_be_synchronised_is_refused_and_left_alone(layer):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    name = type(layer).__name__
    with pytest.raises(CompanionError, match=f"^1 is a {name}: BatchNorm1d"), synchronized_batch_norm(model):
        pass
    assert type(model[0]) is nn.BatchNorm2d


def test_too_few_samples_are_refused():
    layer = nn.BatchNorm1d(3)
    with (
        synchronized_batch_norm(layer, all_reduce=alone),
        pytest.raises(CompanionError, match="more than one value per channel over all workers"),
    ):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0
    with pytest.raises(CompanionError, match="no worker has a sample"):
        loss_weight(0, all_reduce=alone)


def test_a_network_without_gradients_has_nothing_to_average():
    average_gradients(nn.ReLU(), all_reduce=refuse)
