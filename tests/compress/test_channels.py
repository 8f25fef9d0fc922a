"""Channels really removed: how many, which, and what is left of each layer."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from companion import CompanionError, engines, metrics, models
from companion.compress import (
    Attention,
    channel_graph,
    channels,
    make_permanent,
    prune_channels,
    prune_weights,
    rebuild,
    remove_channels,
    score_channels,
    widths,
)

sys.path.insert(0, str(Path(__file__).parent))
from networks import images, kept_by, lively, torchvision_network, zeroed


@pytest.mark.parametrize("name", ["cifar_resnet14", "vit_b_16"])
def test_pruned_networks_export_and_keep_their_input(name, tmp_path):
    if name == "vit_b_16":
        network, side = torchvision_network(name)
    else:
        network, side = lively(models.create(name, seed=0), 32), 32
    x = images(side)
    pruned = prune_channels(network, x, 0.5)
    written = engines.export_onnx(pruned, x, tmp_path / "pruned.onnx")
    before = x.clone()
    with engines.load(written.path) as engine:
        found = engine.run({"input": x.numpy()})["output"]
    with torch.no_grad():
        expected = pruned(x)
    assert torch.equal(x, before)
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert written.bytes < metrics.model_bytes(network)


def chain(channels=8):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 1)
    )


X = images(8)


def test_the_weights_are_really_smaller():
    network = chain()
    pruned = prune_channels(network, X, 0.5)
    conv, norm, _, last = pruned
    assert (conv.out_channels, norm.num_features, last.in_channels, last.out_channels) == (4, 4, 4, 4)
    assert conv.weight.shape == (4, 3, 3, 3)
    assert norm.running_var.shape == norm.bias.shape == (4,)
    assert last.weight.shape == (4, 4, 1, 1)
    assert metrics.count_parameters(pruned) == 4 * 27 + 2 * 4 + 4 * 4 + 4
    assert type(pruned) is type(network)
    assert widths(network) == {"0": 8, "3": 4}
    assert widths(pruned) == {"0": 4, "3": 4}


def test_the_largest_channels_stay_in_their_order():
    network = chain()
    size = torch.tensor([3.0, 1, 8, 6, 2, 7, 5, 4])
    with torch.no_grad():
        network[0].weight.copy_(size.view(8, 1, 1, 1).expand(8, 3, 3, 3))
    pruned = prune_channels(network, X, 0.5, importance="l1")
    assert pruned[0].weight[:, 0, 0, 0].tolist() == [8, 6, 7, 5]
    assert torch.equal(pruned[3].weight, network[3].weight[:, [2, 3, 5, 6]])


def test_depthwise_convolutions_keep_their_outputs_per_input():
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 2, 1))
    pruned = prune_channels(network, X, 0.5)
    assert (pruned[1].in_channels, pruned[1].out_channels, pruned[1].groups) == (3, 6, 3)
    assert pruned[1].weight.shape == (6, 1, 3, 3)
    assert "groups=3" in repr(pruned[1])


def test_transposed_convolutions_are_cut_on_both_sides():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    graph = channel_graph(network, X)
    keep = kept_by(graph, {"0": 3, "1": 2})
    pruned = remove_channels(network, graph, keep)
    assert pruned[1].weight.shape == (3, 2, 2, 2)
    with torch.no_grad():
        assert torch.allclose(pruned(X), zeroed(network, graph, keep)(X), atol=1e-6)


def test_attention_loses_whole_heads():
    network, side = torchvision_network("vit_b_16")
    graph = channel_graph(network, images(side))
    name = "encoder.layers.encoder_layer_0.self_attention"
    pruned = remove_channels(network, graph, kept_by(graph, {name: 5}))
    cut, kept = pruned.get_submodule(name), pruned.get_submodule(name.replace("layer_0", "layer_1"))
    assert type(cut) is Attention
    assert type(kept) is nn.MultiheadAttention  # had nothing to lose
    assert (cut.num_heads, cut.head_dim, cut.embed_dim) == (5, 8, 96)
    assert cut.in_proj_weight.shape == (3 * 5 * 8, 96)
    assert (cut.out_proj.in_features, cut.out_proj.weight.shape) == (40, (96, 40))
    assert widths(pruned)[name] == 5
    assert f"{name}.out_proj" not in widths(pruned)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_torchs(batch_first, bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first, dropout=0.5).eval()
    ours = Attention.of(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, y = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    each = torch.randn(6, 5, 7) > 0.5
    each[..., 0] = False
    cases = [
        {},
        {"need_weights": False},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "need_weights": False},
        {"attn_mask": torch.randn(5, 7)},
        {"attn_mask": each, "average_attn_weights": False},
        {"attn_mask": torch.ones(5, 7).triu(1).bool(), "is_causal": True, "need_weights": False},
    ]
    for case in cases:
        with torch.no_grad():
            expected, found = theirs(x, y, y, **case), ours(x, y, y, **case)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1])
    one = torch.randn(5, 12)
    torch.testing.assert_close(ours(one, one, one), theirs(one, one, one))


def test_attention_that_cannot_lose_heads_is_refused():
    with pytest.raises(CompanionError, match="cannot lose heads"):
        Attention.of(nn.MultiheadAttention(8, 2, kdim=4))


def test_the_plan_knows_the_macs_of_any_choice():
    draw = np.random.default_rng(0)
    for name in ("mobilenet_v3_small", "vit_b_16", "densenet121"):
        network, side = torchvision_network(name)
        x = images(side, 1)
        plan = channels._Plan(network, x, channel_graph(network, x), 1)
        counts = np.array([draw.integers(1, size + 1) for size in plan.sizes])
        pruned = remove_channels(
            network,
            plan.graph,
            kept_by(plan.graph, {w.name: n for w, n in zip(plan.graph.widths, counts, strict=True)}),
        )
        assert plan.macs(counts) == pytest.approx(metrics.count_macs(pruned, x), rel=1e-9)


def test_uniform_leaves_the_same_share_of_every_width_and_global_does_not():
    network = models.create("cifar_resnet20", seed=0)
    with torch.no_grad():  # half of one layer is worth next to nothing
        network.layer2[0].conv1.weight[:16] *= 1e-3
        network.layer2[0].bn1.weight[:16] *= 1e-3
        network.layer2[0].conv2.weight[:, :16] *= 1e-3
    x, before = images(32), widths(network)
    uniform = widths(prune_channels(network, x, 0.5, round_to=1))
    shares = [uniform[name] / before[name] for name in before if name != "fc"]
    assert max(shares) - min(shares) < 0.1
    ranked = widths(prune_channels(network, x, 0.5, round_to=1, scope="global"))
    assert ranked["layer2.0.conv1"] == 16 < uniform["layer2.0.conv1"]
    floor = channels.FLOOR * min(shares)
    assert all(ranked[name] >= floor * before[name] - 1 for name in before)


def test_global_ranking_does_not_depend_on_the_scale_of_a_layer():
    network, x = models.create("cifar_resnet14", seed=0), images(32)
    graph = channel_graph(network, x)
    scores = score_channels(network, graph)
    scaled = scores.clone()
    for i, width in enumerate(graph.widths):
        scaled[list(width.groups)] *= 10.0**i
    plan = channels._Plan(network, x, graph, None)
    assert (plan.counts(scores, "global", 0.5) == plan.counts(scaled, "global", 0.5)).all()


def test_widths_are_rounded_to_what_the_cpu_likes():
    network, x = models.create("cifar_resnet18", seed=0), images(32)
    for share in (0.6, 0.35, 0.2):
        found = widths(prune_channels(network, x, share)).values()
        assert all(n <= 32 or n % 16 == 0 for n in list(found)[:-1])
    assert all(
        n % 24 == 0 or n in (64, 128, 256, 512)
        for n in list(widths(prune_channels(network, x, 0.4, round_to=24)).values())[:-1]
    )
    assert channels._allowed(64, None).tolist() == [*range(1, 33), 48, 64]
    assert channels._allowed(40, None).tolist() == [*range(1, 33), 40]
    assert channels._allowed(20, None).tolist() == list(range(1, 21))
    assert channels._allowed(20, 8).tolist() == [8, 16, 20]
    assert channels._allowed(6, 8).tolist() == [6]


def test_all_may_stay():
    network = models.create("cifar_resnet14", seed=0)
    pruned = prune_channels(network, images(32), 1)
    assert widths(pruned) == widths(network)
    assert pruned is not network


def test_pruned_again():
    network, x = lively(models.create("cifar_resnet14", seed=0), 32), images(32)
    once = prune_channels(network, x, 0.7)
    twice = prune_channels(once, x, 0.5)
    assert metrics.count_macs(twice, x) <= 0.5 * metrics.count_macs(once, x)
    transformer, side = torchvision_network("vit_b_16")
    x = images(side)
    once = prune_channels(transformer, x, 0.8)
    twice = prune_channels(once, x, 0.7)
    assert metrics.count_macs(twice, x) <= 0.7 * metrics.count_macs(once, x)
    assert twice(x).shape == (2, 10)


def test_mode_gradients_and_layout_carry_over():
    network = chain().train()
    network[1].eval()
    network[3].weight.requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    pruned = prune_channels(network, X, 0.5)
    assert [module.training for module in pruned] == [True, False, True, True]
    assert not pruned[3].weight.requires_grad
    assert pruned[0].weight.requires_grad
    assert pruned[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(isinstance(parameter, nn.Parameter) for parameter in pruned.parameters())
    assert len(list(pruned.parameters())) == len(list(network.parameters()))


def test_excluded_layers_keep_their_shape():
    network = models.create("cifar_resnet14", seed=0)
    pruned = prune_channels(network, images(32), 0.8, exclude=["layer1", "layer2.0.conv1"])
    for name, layer in network.named_modules():
        if name.startswith("layer1.") or name == "layer2.0.conv1":
            assert repr(pruned.get_submodule(name)) == repr(layer)
    assert widths(pruned)["layer3.0.conv1"] < 64


def test_pruned_saved_loaded_and_pruned_again(tmp_path):
    network, x = lively(models.create("cifar_resnet14", seed=0), 32), images(32)
    models.save(prune_channels(network, x, 0.5), tmp_path / "once.safetensors")
    loaded = models.load(tmp_path / "once.safetensors")
    twice = prune_channels(loaded, x, 0.5)
    assert metrics.count_macs(twice, x) <= 0.25 * metrics.count_macs(network, x)
    models.save(twice, tmp_path / "twice.safetensors")
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "twice.safetensors")(x), twice(x))


def test_masked_networks_are_pruned_when_the_masks_are_permanent():
    network, x = models.create("cifar_resnet14", seed=0), images(32)
    masked = prune_weights(network, 0.5)
    with pytest.raises(CompanionError, match=r"no channel that can be removed: .* masked"):
        prune_channels(masked, x)
    assert widths(prune_channels(make_permanent(masked), x))["conv1"] < 16


def test_random_has_a_seed():
    network = models.create("cifar_resnet14", seed=0)

    def weights(seed):
        return prune_channels(network, images(32), 0.5, importance="random", seed=seed).layer1[0].conv1.weight

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_share_of_the_time_is_found_by_bisection(monkeypatch):
    """With a clock that counts MACs, the time left is known: 0.2 of it cannot go."""
    network, x = chain(64), X
    total, measured = metrics.count_macs(network, x), []

    def compare(functions, **options):
        pruned = functions["after"].args[0]
        measured.append(0.2 + 0.8 * metrics.count_macs(pruned, x) / total)
        assert options["threads"] == 1
        return SimpleNamespace(ratios={"after": SimpleNamespace(value=measured[-1])})

    monkeypatch.setattr(channels, "compare_latency", compare)
    pruned = prune_channels(network, x, latency=0.6)
    left = metrics.count_macs(pruned, x) / total
    assert 0.6 - channels.NEAR <= 0.2 + 0.8 * left <= 0.6
    assert 1 < len(measured) <= channels.TRIES
    with pytest.raises(CompanionError, match=r"0\.1 of the time cannot be reached: the smallest network .* needs 0\.2"):
        prune_channels(network, x, latency=0.1)


@pytest.mark.stress  # half a minute of measuring on a busy machine
def test_half_the_time_is_about_half_the_time():
    """By the real clock, with a margin that a busy machine does not use up: of two networks of very unequal work."""
    network, x = models.create("cifar_resnet18", width=32, seed=0).eval(), images(32, 4)
    pruned = prune_channels(network, x, latency=0.5)
    assert 0.15 < metrics.count_macs(pruned, x) / metrics.count_macs(network, x) < 0.8


def test_rebuilt_from_a_file_of_any_kind(tmp_path):
    network = chain()
    pruned = prune_channels(network, X, 0.5)
    torch.save(pruned.state_dict(), tmp_path / "pruned.pt")
    again = rebuild(chain(), torch.load(tmp_path / "pruned.pt"))
    with torch.no_grad():
        assert torch.equal(again.eval()(X), pruned.eval()(X))
    assert widths(again) == widths(pruned) != widths(network)
    assert rebuild(network, pruned.state_dict()).training == network.training
    trained = prune_channels(again, X, 0.6)  # and it is pruned like any other
    assert widths(rebuild(network, trained.state_dict())) == widths(trained)


def test_frozen_weights_of_a_rebuilt_network_stay_frozen():
    network = chain()
    network[0].requires_grad_(False)
    again = rebuild(network, prune_channels(network, X, 0.5).state_dict())
    assert [p.requires_grad for p in again.parameters()] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda network: None, "the weights are no state_dict"),
        (lambda network: {"0.weight": 3}, "the weights are no state_dict"),
        (lambda network: {}, r"the weights do not fit Sequential: Missing key\(s\)"),
        (lambda network: network.state_dict() | {"9.weight": X}, r"do not fit Sequential: Unexpected key\(s\)"),
        (lambda network: network.state_dict() | {"0.weight": torch.zeros(8, 3, 5, 5)}, "weights of 0 differ in more"),
        (lambda network: network.state_dict() | {"0.weight": torch.zeros(8)}, "weights of 0 differ in more"),
        (lambda network: network.state_dict() | {"1.bias": torch.zeros(5)}, "weights of 1 differ in more"),
        (lambda network: network.state_dict() | {"3.bias": torch.zeros(5)}, "weights of 3 differ in more"),
        (lambda network: prune_weights(network, 0.5).state_dict(), "do not fit Sequential: "),
    ],
)
def test_weights_that_cannot_be_rebuilt_are_refused_in_one_sentence(state, says):
    network = chain()
    with pytest.raises(CompanionError, match=says) as refusal:
        rebuild(network, state(network))
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)
    with pytest.raises(CompanionError, match=r"a network .* is needed, not str"):
        rebuild("net.pt", {})


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "half", True, None])
def test_shares_that_make_no_sense_are_refused(share):
    with pytest.raises(CompanionError, match=r"^macs is .*: give the share to leave, above 0 and up to 1\.$"):
        prune_channels(chain(), X, share)
    if share is not None:
        with pytest.raises(CompanionError, match=r"^latency is "):
            prune_channels(chain(), X, latency=share)


def test_other_bad_input_is_refused_in_one_sentence():
    network = chain()
    with pytest.raises(
        CompanionError, match=r"0\.01 of the MACs cannot be reached: with the fewest channels .* 0\.125 of"
    ):
        prune_channels(network, X, 0.01)
    with pytest.raises(CompanionError, match=r"0\.5 of the MACs cannot be reached"):
        prune_channels(network, X, 0.5, round_to=16)
    with pytest.raises(CompanionError, match="scope is 'local'"):
        prune_channels(network, X, scope="local")
    with pytest.raises(CompanionError, match="importance is 'magnitude'"):
        prune_channels(network, X, importance="magnitude")
    for round_to in (0, 2.0, True):
        with pytest.raises(CompanionError, match="round_to is"):
            prune_channels(network, X, round_to=round_to)
    with pytest.raises(CompanionError, match="no layer 'last'"):
        prune_channels(network, X, exclude="last")
    with pytest.raises(CompanionError, match="has no channel that can be removed"):
        prune_channels(nn.Sequential(nn.Conv2d(3, 4, 1)), X)
    with pytest.raises(CompanionError, match="has no channel that can be removed"):
        prune_channels(network, X, exclude=["0"])
    graph = channel_graph(network, X)
    with pytest.raises(CompanionError, match="all channels of 0 would be removed"):
        remove_channels(network, graph, np.zeros(8))
    with pytest.raises(CompanionError, match=r"keep has the shape \(3,\)"):
        remove_channels(network, graph, np.ones(3))
    network[0].weight.data[0] = torch.inf
    with pytest.raises(CompanionError, match="weights of 0 are not all finite"):
        prune_channels(network, X)


class Hidden(nn.Module):
    """Works with a number of channels that its trace shows as a plain number, or not at all."""

    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.use = use

    def forward(self, x):
        return self.c(self.use(self, self.a(x)))


def repeated(network, x):
    for _ in range(network.a.out_channels // 4):
        x = network.b(x)
    return x


@pytest.mark.parametrize("use", [repeated, lambda network, x: network.b(x) / network.a.out_channels])
def test_a_network_that_runs_otherwise_than_its_trace_is_refused(use):
    with pytest.raises(CompanionError, match=r"^Hidden runs otherwise without the channels .* exclude the layer\.$"):
        prune_channels(Hidden(use), X)


def test_the_layer_whose_channels_are_counted_can_be_excluded():
    network = Hidden(lambda network, x: network.b(x) / network.a.out_channels)
    pruned = prune_channels(network, X, 0.7, exclude="a")
    assert (pruned.a.out_channels, pruned.b.in_channels) == (8, 8)
    assert pruned.b.out_channels == pruned.c.in_channels < 8


def test_a_branch_of_training_alone_loses_the_same_channels():
    class Auxiliary(nn.Module):
        """As GoogLeNet: a second classifier that evaluation does not run."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.extra = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.a(x)
            return (self.b(x), self.extra(x)) if self.training else self.b(x)

    pruned = prune_channels(Auxiliary(), X, 0.5)
    assert pruned.extra.weight.shape == (5, 4, 1, 1)
    assert [tuple(out.shape) for out in pruned.train()(X)] == [(2, 4, 8, 8), (2, 5, 8, 8)]


def test_the_graph_of_another_network_is_refused():
    network = chain()
    graph = channel_graph(network, X)
    pruned = prune_channels(network, X, 0.5)
    for other in (pruned, nn.ReLU()):
        with pytest.raises(CompanionError, match="the graph was made of another network: 0 is not as it says"):
            remove_channels(other, graph, np.arange(8) < 2)
        with pytest.raises(CompanionError, match="the graph was made of another network"):
            score_channels(other, graph)
