import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from companion import CompanionError, compress, engines, metrics, models, train
from companion.compress.low_rank import Outputs, split_pca, svd

CONVOLUTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (2, 0)},
    {"dilation": 2, "padding": 2},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular"},
    {"kernel_size": (5, 3), "padding": (2, 1), "stride": (2, 1)},
    {"kernel_size": (3, 5), "padding": (1, 2), "dilation": (2, 1)},
]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(inputs=6, outputs=7, kernel_size=3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(inputs, outputs, kernel_size, **options)


def linear(inputs=9, outputs=6, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs, bias)


def full(layer, scheme):
    o, i, h, w = layer.weight.shape
    return {"spatial": (min(i * h, o * w),), "channel": (min(o, i * h * w),), "tucker": (i, o)}[scheme]


def lone(module):
    """A network that is nothing but one layer, with what surrounds it."""
    return nn.Sequential(module)


# What a split is


@pytest.mark.parametrize("scheme", ["spatial", "channel", "tucker"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_full_rank_convolution_equals_the_original(scheme, options):
    layer, x = conv(**options), rand(2, 6, 12, 14)
    parts = compress.factorize_layer(layer, *full(layer, scheme), scheme=scheme)
    torch.testing.assert_close(parts(x), layer(x), rtol=1e-5, atol=1e-5)
    assert parts(x).shape == layer(x).shape


@pytest.mark.parametrize("stride", [1, 2])
def test_full_rank_of_a_1x1_convolution(stride):
    layer, x = conv(kernel_size=1, stride=stride), rand(2, 6, 9, 9)
    for scheme in ("spatial", "channel", "tucker", "svd"):
        parts = compress.factorize_layer(layer, 6, scheme=scheme)
        torch.testing.assert_close(parts(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 6), (6, 9), (5, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_linear_equals_the_original(inputs, outputs, bias):
    layer, x = linear(inputs, outputs, bias), rand(3, 2, inputs)
    parts = compress.factorize_layer(layer, min(inputs, outputs))
    torch.testing.assert_close(parts(x), layer(x), rtol=1e-5, atol=1e-5)
    assert [type(part) for part in parts] == [nn.Linear, nn.Linear]


def test_svd_by_hand():
    u, s, vh = svd(torch.tensor([[0.0, 3.0, 0.0], [-4.0, 0.0, 0.0]]))
    torch.testing.assert_close(s, torch.tensor([4.0, 3.0]).double())
    torch.testing.assert_close(u.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
    torch.testing.assert_close(vh.abs(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_svd_equals_torchs(rows, columns, seed):
    matrix = rand(rows, columns, seed=seed).double()
    u, s, vh = svd(matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(u * s @ vh, matrix)
    k = min(rows, columns)
    torch.testing.assert_close(
        (u if rows <= columns else vh.t()).t() @ (u if rows <= columns else vh.t()), torch.eye(k).double()
    )


def test_svd_of_zeros_is_zero():
    u, s, vh = svd(torch.zeros(3, 4))
    assert not s.any()
    assert (u * s @ vh).isfinite().all()


def product(parts):
    """The matrix that two linear layers make together."""
    return (parts[1].weight @ parts[0].weight).detach().double()


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_other_pair_of_layers_is_nearer(rank, seed):
    """Eckart & Young: the error is what the left out singular values hold, and any other product has more."""
    layer = linear()
    weight = layer.weight.detach().double()
    parts = compress.factorize_layer(layer, rank)
    error = (product(parts) - weight).square().sum()
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=1e-6)
    basis = torch.linalg.qr(rand(6, rank, seed=seed).double()).Q  # the best product with any other columns
    assert (basis @ basis.t() @ weight - weight).square().sum() >= error - 1e-6
    nudged = parts[1].weight.detach().double() + 0.05 * rand(6, rank, seed=seed + 1).double()
    assert (nudged @ parts[0].weight.detach().double() - weight).square().sum() >= error - 1e-6


def kernel(parts):
    """The weights [outputs, inputs, height, width] of the one convolution that those in a row make together."""
    inputs = parts[0].in_channels
    size = 15
    impulse = torch.zeros(inputs, inputs, size, size)
    impulse[range(inputs), range(inputs), size // 2, size // 2] = 1
    y = impulse
    for part in parts:
        y = nn.functional.conv2d(y, part.weight, padding=[k // 2 for k in part.kernel_size])
    return y.flip(2, 3).transpose(0, 1)[:, :, size // 2 - 1 : size // 2 + 2, size // 2 - 1 : size // 2 + 2].detach()


def arranged(weight, scheme):
    o, i, h, w = weight.shape
    if scheme == "channel":
        return weight.reshape(o, -1)
    rows = [[weight[b, a, y, x] for b in range(o) for x in range(w)] for a in range(i) for y in range(h)]
    return torch.tensor(rows)


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_a_convolution_is_the_tail_of_its_spectrum(scheme, rank):
    layer = conv(bias=False)
    expected = torch.linalg.svdvals(arranged(layer.weight.detach(), scheme).double())
    torch.testing.assert_close(compress.singular_values(layer, scheme), expected, rtol=1e-5, atol=1e-6)
    error = (kernel(compress.factorize_layer(layer, rank, scheme=scheme)) - layer.weight.detach()).double()
    torch.testing.assert_close(error.square().sum(), expected[rank:].square().sum(), rtol=1e-3, atol=1e-6)


def test_separable_filters_need_rank_one():
    """A Sobel filter is a vertical times a horizontal one."""
    layer = conv(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 1.0]]).t() @ torch.tensor([[-1.0, 0.0, 1.0]]))
    x = rand(1, 1, 8, 8)
    torch.testing.assert_close(compress.factorize_layer(layer, 1)(x), layer(x), rtol=1e-5, atol=1e-5)
    values = compress.singular_values(layer)
    torch.testing.assert_close(values, torch.tensor([12.0**0.5, 0, 0]).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [(2, 3), (6, 1), (1, 7)])
def test_tucker_error_is_within_both_tails(ranks):
    """The higher-order SVD loses at most the sum of what its two projections lose, and at least each of them."""
    layer = conv(bias=False)
    weight = layer.weight.detach().double()
    error = (kernel(compress.factorize_layer(layer, *ranks, scheme="tucker")).double() - weight).square().sum()
    tails = [
        torch.linalg.svdvals(unfolded.flatten(1))[rank:].square().sum()
        for unfolded, rank in zip((weight.transpose(0, 1), weight), ranks, strict=True)
    ]
    assert max(tails) - 1e-5 <= error <= sum(tails) + 1e-5


def test_both_parts_have_weights_of_one_size():
    for layer in (linear(), conv()):
        first, second = (part.weight.flatten(1) for part in compress.factorize_layer(layer, 3, scheme="channel"))
        torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))


# Principal components


def correlated(n=200):
    """Inputs that live in 2 of 9 dimensions, and there where the weights are small."""
    return rand(n, 2) @ torch.eye(9)[:2]


def weak_there():
    layer = linear()
    with torch.no_grad():
        layer.weight[:, :2] *= 0.1
    return layer


def test_pca_is_exact_where_the_data_are_and_the_weights_svd_is_not():
    layer, x = weak_there(), correlated()
    by_data = compress.factorize(lone(layer), x, energy=0.999, scheme="pca", data=[x], round_to=1)
    rank = by_data[0][0].out_features
    assert rank == 2  # of 6
    by_weights = lone(compress.factorize_layer(layer, rank))
    size = layer(x).var(0).sum()
    error = [((net(x) - layer(x)) ** 2).sum(1).mean() / size for net in (by_data, by_weights)]
    assert error[0] < 1e-6
    assert error[1] > 0.5


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_pca_loses_the_variance_it_leaves_out(make, rank):
    layer = make()
    x = rand(30, 9) + 2 if make is linear else rand(5, 6, 8, 8) + 2
    y = layer(x).detach().double()
    y = y if make is linear else y.permute(0, 2, 3, 1).reshape(-1, 7)
    statistics = Outputs(y.mean(0), torch.cov(y.t(), correction=0))
    parts = split_pca(layer, statistics).build(rank).float()
    found = parts(x).detach().double()
    found = found if make is linear else found.permute(0, 2, 3, 1).reshape(-1, 7)
    tail = torch.linalg.svdvals(y - y.mean(0))[rank:].square().sum()  # of the data, by another route
    torch.testing.assert_close((found - y).square().sum(), tail, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.mean(0), y.mean(0), rtol=1e-3, atol=1e-4)


def test_pca_sees_all_batches_and_leaves_the_network_as_it_was():
    model = nn.Sequential(conv(), nn.BatchNorm2d(7), nn.ReLU(), conv(7, 8))
    model.train()
    state = copy.deepcopy(model.state_dict())
    x = rand(12, 6, 10, 10)
    whole, parts = (
        compress.factorize(model, x[:1], 0.6, scheme="pca", data=data, round_to=1)
        for data in ([x], (x[i : i + 5] for i in (0, 5, 10)))
    )
    torch.testing.assert_close(whole.eval()(x), parts.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in (*model.modules(), *whole.modules()))


def test_pca_at_full_energy_changes_nothing():
    model, x = lone(conv(16, 32)), rand(4, 16, 8, 8)
    torch.testing.assert_close(compress.factorize(model, x, energy=1.0, scheme="pca", data=[x])(x), model(x))


# The whole network

NETWORKS = {
    "cifar_resnet20": (lambda: models.create("cifar_resnet20"), (1, 3, 32, 32), {}),
    "simple_cnn": (lambda: models.create("simple_cnn"), (2, 3, 32, 32), {}),
    "unet": (lambda: models.create("unet"), (1, 3, 32, 32), {}),
    "resnet18": (
        lambda: torchvision.models.resnet18(weights=None, num_classes=10),
        (1, 3, 32, 32),
        {"exclude": "layer4"},
    ),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), (1, 3, 32, 32), {"macs": 0.8}),
    "vgg11_bn": (
        lambda: torchvision.models.vgg11_bn(weights=None),
        (1, 3, 32, 32),
        {"exclude": ("classifier", "features.22", "features.25", "features.18", "features.15"), "macs": 0.8},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_reach_their_target(name):
    make, shape, options = NETWORKS[name]
    model, x = make().eval(), rand(*shape)
    state = copy.deepcopy(model.state_dict())
    share = options.get("macs", 0.5)
    smaller = compress.factorize(model, x, **options)
    whole, left = (metrics.count_macs(network, x) for network in (model, smaller))
    assert 0.8 * share * whole < left <= share * whole  # as near as ranks of eight allow
    found = compress.factorization(model, smaller, x)
    assert (found.macs_before, found.macs_after) == (whole, left)
    assert any(layer.ranks for layer in found.layers)
    for layer in found.layers:
        assert layer.macs_after < layer.macs_before if layer.ranks else layer.macs_after == layer.macs_before
    with torch.no_grad():
        assert smaller(x).shape == model(x).shape
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    (smaller.train()(rand(2, *shape[1:])) ** 2).mean().backward()
    assert all(p.grad is not None for p in smaller.parameters())


@pytest.mark.parametrize("scheme", ["spatial", "channel", "tucker", "pca"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_schemes_use_the_target_up(scheme, share):
    model, x = models.create("cifar_resnet14"), rand(4, 3, 32, 32)
    data = [x] if scheme == "pca" else None
    smaller = compress.factorize(model, x, share, scheme=scheme, data=data, round_to=1)
    left = metrics.count_macs(smaller, x) / metrics.count_macs(model, x)
    assert share - 0.04 < left <= share


@pytest.mark.parametrize("scheme", ["spatial", "channel", "tucker"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_the_price_list_is_right(scheme, options):
    """The MACs that the choice of ranks believes in are those that are counted."""
    layer, x = conv(16, 16, **options), rand(3, 16, 13, 15)
    model = nn.Sequential(layer, nn.ReLU())
    smaller = compress.factorize(model, x, energy=0.5, scheme=scheme, round_to=1)
    assert isinstance(smaller[0], nn.Sequential)
    (only,) = compress.factorization(model, smaller, x).layers
    # The most that fits into the counted MACs is this very network: a wrong price list would find another.
    again = compress.factorize(model, x, only.macs_after / only.macs_before, scheme=scheme, round_to=1)
    if scheme != "tucker":
        assert compress.factorization(model, again, x).layers == (only,)
    else:
        assert compress.factorization(model, again, x).macs_after <= only.macs_after


def test_every_layer_keeps_the_energy_asked_for():
    model, x = models.create("cifar_resnet14"), rand(1, 3, 32, 32)
    smaller = compress.factorize(model, x, energy=0.6, round_to=1)
    found = {row.name: row.ranks for row in compress.factorization(model, smaller, x).layers}
    assert sum(map(bool, found.values())) > 10
    for name, ranks in found.items():
        layer = model.get_submodule(name)
        if ranks and layer.kernel_size == (3, 3):
            energy = torch.linalg.svdvals(arranged(layer.weight.detach(), "spatial").double()) ** 2
            kept = energy.cumsum(0) / energy.sum()
            assert kept[ranks[0] - 1] >= 0.6
            assert ranks[0] == 1 or kept[ranks[0] - 2] < 0.6


def test_ranks_come_in_multiples():
    """Of as many as asked for, and in layers with a low full rank of a quarter of that."""
    model, x = models.create("cifar_resnet20"), rand(1, 3, 32, 32)
    full = {"conv1": 9, "layer2.0.downsample.0": 16, "layer3.0.downsample.0": 32}
    for multiple in (4, 8):
        smaller = compress.factorize(model, x, round_to=multiple)
        split = {row.name: row.ranks for row in compress.factorization(model, smaller, x).layers if row.ranks}
        assert len(split) > 10
        for name, ranks in split.items():
            assert ranks[0] % min(multiple, full.get(name, 48) // 4) == 0


def test_a_share_of_one_changes_nothing():
    model, x = models.create("cifar_resnet14").eval(), rand(1, 3, 32, 32)
    same = compress.factorize(model, x, 1)
    assert [type(module) for module in same.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(same(x), model(x))


def test_what_stays_whole():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, groups=16),  # depthwise
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Conv2d(16, 16, (1, 5)),  # one direction already
        nn.ConvTranspose2d(16, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(16 * 10 * 6, 10),
    )
    x = rand(1, 16, 16, 16)
    smaller = compress.factorize(model, x, energy=0.5, exclude=["5"])
    assert [isinstance(layer, nn.Sequential) for layer in smaller] == [False] * 4 + [True, False, False, True]


def test_minor_layers_stay_whole():
    model, x = models.create("cifar_resnet14"), rand(1, 3, 32, 32)
    head = compress.factorize(model, x, energy=0.01).fc  # 0.4 % of the weights, 0.002 % of the MACs
    assert type(head) is nn.Linear


def test_one_layer_in_two_places_stays_one():
    layer = conv(16, 16, padding=1)
    model, x = nn.Sequential(layer, nn.ReLU(), layer), rand(1, 16, 8, 8)
    smaller = compress.factorize(model, x)
    assert smaller[0] is smaller[2]
    assert isinstance(smaller[0], nn.Sequential)
    assert metrics.count_macs(smaller, x) <= metrics.count_macs(model, x) / 2


def test_a_network_of_one_layer():
    layer, x = linear(64, 64), rand(2, 64)
    smaller = compress.factorize(layer, x)
    assert [part.weight.shape for part in smaller] == [(16, 64), (64, 16)]


def test_attention_and_its_shortcut_still_run():
    """In evaluation an encoder layer hands its weights to one fused operator, so it keeps its layers."""
    encoder = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    model, x = nn.Sequential(nn.Linear(64, 64), encoder).eval(), rand(2, 5, 64)
    smaller = compress.factorize(model, x, energy=0.5)
    assert smaller(x).shape == x.shape
    assert isinstance(smaller[0], nn.Sequential)


def test_modes_dtypes_and_frozen_generators():
    model, x = lone(conv(16, 16).double()).train(), rand(1, 16, 8, 8).double()
    state = torch.get_rng_state()
    smaller = compress.factorize(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert smaller[0].training
    assert {p.dtype for p in smaller.parameters()} == {torch.float64}


# Onwards


def test_saved_loaded_exported_and_trained(tmp_path):
    model, x = models.create("cifar_resnet14"), rand(2, 3, 32, 32).abs()
    smaller = compress.factorize(model, x)
    train.fit(smaller, TensorDataset(rand(16, 3, 32, 32), torch.arange(16) % 10), epochs=1, progress=False)
    models.save(smaller, tmp_path / "m.safetensors")
    loaded = models.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), smaller(x))
    engines.export_onnx(smaller, x, tmp_path / "m.onnx")
    with engines.load(tmp_path / "m.onnx") as engine:
        (found,) = engine.run({engine.inputs[0].name: x.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(found), smaller(x).detach(), rtol=1e-3, atol=1e-3)


def test_factorized_again_works():
    model, x = models.create("cifar_resnet14"), rand(1, 3, 32, 32)
    once = compress.factorize(model, x, 0.7, scheme="channel")
    twice = compress.factorize(once, x, 0.7, scheme="channel")
    assert metrics.count_macs(twice, x) <= 0.49 * metrics.count_macs(model, x)


def test_factorized_again_in_two_directions_is_refused():
    model = nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 16))
    x = rand(1, 16, 12, 12)
    with pytest.raises(CompanionError, match="finds nothing to split"):
        compress.factorize(compress.factorize(model, x), x)


def test_pruned_then_factorized_works():
    model, x = models.create("cifar_resnet14"), rand(1, 3, 32, 32)
    pruned = compress.prune_weights(model, 0.5)
    with pytest.raises(CompanionError, match="make it permanent"):
        compress.factorize(pruned, x)
    smaller = compress.factorize(compress.make_permanent(pruned), x)
    assert metrics.count_macs(smaller, x) <= metrics.count_macs(model, x) / 2


def test_report_prints_a_row_for_each_layer():
    model, x = models.create("cifar_resnet14"), rand(1, 3, 32, 32)
    found = compress.factorization(model, compress.factorize(model, x), x)
    lines = str(found).splitlines()
    assert len(lines) == len(found.layers) + 2 == 18
    assert lines[-1].split()[-1] == f"{found.share:.0%}"
    assert "whole" in lines[-2]  # the head


def _nan():
    model = nn.Sequential(conv(16, 16))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    return model


class _Reads(nn.Module):
    """Uses its layer's weights itself as well."""

    def __init__(self):
        super().__init__()
        self.layer = linear(64, 64)

    def forward(self, x):
        return self.layer(x) + self.layer.weight.sum()


SMALL, IMAGE = nn.Sequential(conv(16, 16)), rand(1, 16, 8, 8)
# Each rank: 6 × 8 places with 16·3 weights and 6 × 6 with 16·3, of 6 × 6 · 16·16·9 in all: 4.86 %.
REFUSED = {
    "macs 0": (lambda: compress.factorize(SMALL, IMAGE, 0), "macs is 0: give a share above 0"),
    "macs 2": (lambda: compress.factorize(SMALL, IMAGE, 2), "macs is 2"),
    "macs half": (lambda: compress.factorize(SMALL, IMAGE, "half"), "macs is half"),
    "energy 0": (lambda: compress.factorize(SMALL, IMAGE, energy=0), "energy is 0"),
    "energy nan": (lambda: compress.factorize(SMALL, IMAGE, energy=float("nan")), "energy is nan"),
    "rank 0": (
        lambda: compress.factorize(SMALL, IMAGE, 0.01),
        r"with the lowest ranks 38.9% are left, .* from 0.389 or a smaller",
    ),
    "rank below 1": (
        lambda: compress.factorize(SMALL, IMAGE, 0.04, round_to=1),
        r"with the lowest ranks .* from 0.049\.",
    ),
    "scheme": (lambda: compress.factorize(SMALL, IMAGE, scheme="cp"), "no scheme 'cp'"),
    "pca without data": (lambda: compress.factorize(SMALL, IMAGE, scheme="pca"), "pca needs data"),
    "data without pca": (lambda: compress.factorize(SMALL, IMAGE, data=[IMAGE]), "the others take none"),
    "pca of one batch": (lambda: compress.factorize(SMALL, IMAGE, scheme="pca", data=IMAGE), "a list of batches"),
    "pca of no batches": (lambda: compress.factorize(SMALL, IMAGE, scheme="pca", data=3), "a list of batches"),
    "no target": (lambda: compress.factorize(SMALL, IMAGE, None), "macs is None"),
    "pca of nothing": (lambda: compress.factorize(SMALL, IMAGE, scheme="pca", data=[]), "no data to take"),
    "pca of nan": (
        lambda: compress.factorize(SMALL, IMAGE, scheme="pca", data=[IMAGE * torch.nan]),
        "not finite on the data",
    ),
    "pca of other data": (lambda: compress.factorize(SMALL, IMAGE, scheme="pca", data=[IMAGE[:, :3]]), "cannot run"),
    "round_to": (lambda: compress.factorize(SMALL, IMAGE, round_to=0), "round_to is 0"),
    "nan weights": (lambda: compress.factorize(_nan(), IMAGE), "0 has weights that are not finite"),
    "exclude": (lambda: compress.factorize(SMALL, IMAGE, exclude="head"), "no layer 'head'"),
    "all excluded": (lambda: compress.factorize(SMALL, IMAGE, exclude="0"), "nothing to split"),
    "nothing for svd": (lambda: compress.factorize(SMALL, IMAGE, scheme="svd"), "the scheme svd finds nothing"),
    "no layers": (lambda: compress.factorize(nn.ReLU(), IMAGE), "nothing to split"),
    "no network": (lambda: compress.factorize("net", IMAGE), "not str"),
    "no example": (lambda: compress.factorize(SMALL, None), "example"),
    "another example": (lambda: compress.factorize(SMALL, rand(1, 3, 8, 8)), "cannot run"),
    "weights read by the network": (lambda: compress.factorize(_Reads(), rand(2, 64)), "cannot run"),
    "layer, rank 0": (lambda: compress.factorize_layer(SMALL[0], 0), "the ranks are"),
    "layer, rank too high": (lambda: compress.factorize_layer(SMALL[0], 49), "the ranks are"),
    "layer, too few ranks": (lambda: compress.factorize_layer(SMALL[0], 3, scheme="tucker"), "the ranks are"),
    "layer by pca": (lambda: compress.factorize_layer(SMALL[0], 3, scheme="pca"), "cannot be split by 'pca'"),
    "layer of another class": (lambda: compress.factorize_layer(nn.ReLU(), 3), "such a ReLU"),
    "grouped layer": (lambda: compress.singular_values(conv(16, 16, groups=16)), "ungrouped"),
    "a layer that is not finite": (lambda: compress.singular_values(_nan()[0]), "not finite"),
    "report on others": (lambda: compress.factorization(SMALL, nn.ReLU(), IMAGE), "no 0: give the network that it was"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case):
    call, words = REFUSED[case]
    with pytest.raises(CompanionError, match=words) as caught:
        call()
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said


def test_frozen_layers_stay_frozen():
    model = copy.deepcopy(SMALL).requires_grad_(False)
    assert not any(p.requires_grad for p in compress.factorize(model, IMAGE, 0.7, round_to=1).parameters())
