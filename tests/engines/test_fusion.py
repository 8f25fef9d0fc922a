"""Folding is checked by its answers, and against torch.fx's own."""

import copy

import pytest
import torch
from engine_cases import OURS, lively, small_mobilenet, torch_answer
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from companion import engines
from companion.engines.fusion import fold_batch_norms

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norms(model):
    return sum(isinstance(module, NORMS) for module in model.modules())


def busy(model):
    """In evaluation mode, its normalisations with numbers of their own."""
    for norm in (module for module in model.modules() if isinstance(module, NORMS)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def check(model, x, folded):
    """Folds ``folded`` of the network's normalisations; the answers stay, to rounding."""
    before = norms(model)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norms(model, x) == folded
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert norms(model) == before - folded


@pytest.mark.parametrize("name", [*OURS, "mobilenet"])
def test_nothing_is_left_of_normalisations_that_follow_convolutions(name, exported):
    found = exported(name)
    with engines.load(found.model, "torch_fused", example=found.example) as engine:
        assert norms(engine._model) == 0
    assert norms(found.model) > 0 or "cnn" in name


def test_weights_are_those_of_torch_fx():
    model = lively(small_mobilenet()).eval()
    other = fuse(model)
    fold_batch_norms(model, torch.rand(1, 3, 32, 32))
    ours, theirs = ([(m.weight, m.bias) for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (model, other))
    assert len(ours) == len(theirs) > 5
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 8)),
        (nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8, affine=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, eps=0.1), (2, 4, 9, 8)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 5, 6)),
    ],
    ids=["1d", "no bias", "grouped, no weight", "reflect", "3d"],
)
def test_kinds_of_convolutions(conv, norm, shape):
    check(busy(nn.Sequential(conv, norm, nn.ReLU())), torch.rand(shape), 1)


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.way = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.way(self, x)


def pair():
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)}


def twice(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def changed_in_place(net, x):
    y = net.conv(x)
    y.add_(1)
    return net.norm(y)


def viewed(net, x):
    y = net.conv(x)
    seen = y.view(-1)
    return net.norm(y) + seen.sum()


@pytest.mark.parametrize(
    "forward",
    [
        twice,
        changed_in_place,
        viewed,
        lambda net, x: torch.cat([(y := net.conv(x)), net.norm(y)]),
        lambda net, x: net.norm(net.conv(net.conv(x))),
        lambda net, x: net.norm(net.conv(net.norm(x))),
        lambda net, x: net.norm(torch.relu(net.conv(x))),
        lambda net, x: net.conv(net.norm(x)),
    ],
    ids=["added", "in place", "viewed", "joined", "conv twice", "norm twice", "relu between", "norm first"],
)
def test_what_cannot_be_folded_is_left_alone(forward):
    check(busy(Net(forward, **pair())), torch.rand(2, 3, 8, 8), 0)


def test_a_result_that_is_returned_too_is_left_alone():
    model = busy(Net(lambda net, x: {"raw": (y := net.conv(x)), "normal": net.norm(y)}, **pair()))
    check(model, torch.rand(2, 3, 8, 8), 0)


def test_normalisation_without_averages_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    check(model, torch.rand(2, 3, 8, 8), 0)


def test_modules_with_hooks_are_left_alone():
    model = busy(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    check(model, torch.rand(2, 3, 8, 8), 0)


def test_no_hooks_are_left_behind():
    model = busy(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    fold_batch_norms(model, torch.rand(1, 3, 4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_convolutions_that_share_weights_are_left_alone():
    model = busy(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].weight = model[0].weight
    check(model, torch.rand(2, 3, 8, 8), 0)


def trains(net, x):
    net.norm.train()
    return net.norm(net.conv(x))


class Reads(nn.Module):
    """Looks at the normalisation itself, which a folded one no longer is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.a(x)) * self.b.weight.view(-1, 1, 1)


@pytest.mark.parametrize(
    "model",
    [
        Net(lambda net, x: F.conv_transpose2d(torch.relu(net.norm(net.conv(x))), net.conv.weight), **pair()),
        Net(lambda net, x: net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, net.conv.bias, padding=1), **pair()),
        Net(lambda net, x: (net.norm(net.conv(x)), net.conv.weight), **pair()),
        Net(lambda net, x: net.norm(net.conv(x)) + net.conv.bias.sum(), **pair()),
        Net(lambda net, x: net.norm(net.conv(x)) + isinstance(net.norm, nn.BatchNorm2d), **pair()),
        Net(trains, **pair()),
        Reads(),
    ],
    ids=["tied", "used again", "returned", "bias", "asks its kind", "trains", "reads"],
)
def test_networks_that_look_at_their_parts_answer_as_before(model):
    x = torch.rand(2, 3, 8, 8)
    model = busy(model)
    parameters = [parameter.clone() for parameter in model.parameters()]
    expected = tree_leaves(torch_answer(copy.deepcopy(model), x[:1]))
    with engines.load(model, "torch_fused", example=x) as engine:
        assert norms(engine._model) == 1
        answers = [torch.from_numpy(answer) for answer in engine.run({"input": x[:1].numpy()}).values()]
    torch.testing.assert_close(answers, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(model.parameters()), parameters, rtol=0, atol=0)


def test_a_branch_that_random_values_take_is_seen():
    """The example's values skip the second use of the filters; others do not."""

    def forward(net, x):
        y = net.norm(net.conv(x))
        return y + F.conv2d(x, net.conv.weight, padding=1) if float(x.flatten()[0]) > 0 else y

    x = torch.rand(2, 3, 8, 8)
    x[:, 0, 0, 0] = -1e-3
    check(busy(Net(forward, **pair())), x, 0)


def test_python_of_any_kind_in_the_network():
    """What a tracer would stumble over: a loop as long as the image is high."""

    def forward(net, x):
        y = net.norm(net.conv(x))
        for row in range(int(x.shape[2])):
            if float(y[:, :, row].mean()) > 0:
                y = y + row
        return y

    check(busy(Net(forward, **pair())), torch.rand(2, 3, 8, 8), 1)


def test_images_and_filters_are_channels_last(exported):
    found, seen = exported("unet"), []
    with engines.load(found.model, "torch_fused") as engine:
        for module in engine._model.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        answer = engine.run({"input": torch.rand(2, 3, 96, 96).numpy()})["output"]
    assert len(seen) > 10
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)
    assert answer.flags.c_contiguous


def test_three_dimensional_networks_run_too():
    """There is no channels-last for 2-D images in them, but theirs are left in peace."""
    model = busy(nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)))
    x = torch.rand(2, 2, 4, 5, 6)
    with engines.load(copy.deepcopy(model), "torch_fused", example=x) as engine:
        answer = torch.from_numpy(engine.run({"input": x.numpy()})["output"])
    torch.testing.assert_close(answer, torch_answer(model, x))
