"""Which channels belong together, against graphs that were worked out by hand and against Torch-Pruning."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from companion import CompanionError, engines, models
from companion.compress import channel_graph
from companion.compress.graph import FROZEN

sys.path.insert(0, str(Path(__file__).parent))
from networks import TORCHVISION, group_of


class Network(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def uses(graph):
    """What each width is: the layers and sides that it goes through."""
    return [{(layer, side) for layer, side, _ in width.uses} for width in graph.widths]


def graph_of(forward, x=None, **layers):
    return channel_graph(Network(forward, **layers), torch.zeros(2, 3, 8, 8) if x is None else x)


def conv(inputs, outputs, **settings):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


def test_a_chain_ends_in_channels_that_stay():
    graph = graph_of(lambda n, x: n.b(F.relu(n.norm(n.a(x)))), a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 5))
    assert uses(graph) == [{("a", "out"), ("norm", "through"), ("b", "in")}]
    assert (
        group_of(graph, "a", "out") == group_of(graph, "norm", "through") == group_of(graph, "b", "in") == [0, 1, 2, 3]
    )
    assert group_of(graph, "b", "out") == [FROZEN] * 5
    assert group_of(graph, "a", "in") == [FROZEN] * 3  # the picture's channels are nobody's to remove
    (width,) = graph.widths
    assert (width.name, width.layers, graph.groups) == ("a", ("a", "norm", "b"), 4)


def test_an_addition_makes_one_width_of_both_branches():
    def forward(n, x):
        x = n.a(x)
        return n.c(x + n.b(x))

    graph = graph_of(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2))
    assert uses(graph) == [{("a", "out"), ("b", "in"), ("b", "out"), ("c", "in")}]
    assert group_of(graph, "b", "in") == group_of(graph, "b", "out")


@pytest.mark.parametrize(
    "join", [torch.add, torch.sub, torch.mul, lambda a, b: a * b, lambda a, b: a - b, torch.maximum]
)
def test_every_way_to_combine_place_by_place_joins(join):
    graph = graph_of(lambda n, x: n.c(join(n.a(x), n.b(x))), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert uses(graph) == [{("a", "out"), ("b", "out"), ("c", "in")}]


def test_an_addition_in_place_joins_too():
    def forward(n, x):
        y = n.a(x)
        y += n.b(x)
        return n.c(y.relu_())

    assert uses(graph_of(forward, a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))) == [
        {("a", "out"), ("b", "out"), ("c", "in")}
    ]


def test_a_concatenation_lists_one_after_the_other():
    graph = graph_of(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], dim=1)), a=conv(3, 2), b=conv(3, 3), c=conv(5, 4))
    assert uses(graph) == [{("a", "out"), ("c", "in")}, {("b", "out"), ("c", "in")}]
    assert group_of(graph, "c", "in") == [0, 1, 2, 3, 4]


def test_a_concatenation_with_the_image_keeps_the_image():
    graph = graph_of(lambda n, x: n.c(torch.cat([x, n.a(x)], -3)), a=conv(3, 2), c=conv(5, 4))
    assert group_of(graph, "c", "in") == [FROZEN, FROZEN, FROZEN, 0, 1]


def test_chunks_lose_the_same_places():
    def forward(n, x):
        left, right = n.a(x).chunk(2, dim=1)
        return n.b(left * torch.sigmoid(right))  # a gated linear unit

    graph = graph_of(forward, a=conv(3, 6), b=conv(3, 4))
    assert group_of(graph, "a", "out") == [0, 1, 2, 0, 1, 2]
    assert graph.widths[0].uses == (("a", "out", 2), ("b", "in", 1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.b(n.a(x)[:, :4]),
        lambda n, x: n.b(torch.split(n.a(x), 4, dim=1)[0]),
        lambda n, x: n.b(n.a(x).view(-1, 4, 8, 16)[..., :8]),
        lambda n, x: n.b(n.a(x).view(2, 4, 2, 8, 8).sum(2)),
        lambda n, x: n.b(n.a(x).flip(1)[:, ::2]),
        lambda n, x: n.b(n.a(x).sort(dim=1)[0][:, 4:]),
    ],
    ids=["slice", "split", "view", "groups", "flip", "sort"],
)
def test_what_is_fixed_or_mixed_stays(forward):
    graph = graph_of(forward, a=conv(3, 8), b=conv(4, 2))
    assert graph.widths == ()


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.b(n.a(x) / n.a(x).shape[1]),
        lambda n, x: n.b(F.pad(n.a(x), (0, 0, 0, 0, 1, -1))),
        lambda n, x: n.b(n.a(x).flatten(2).unsqueeze(0)[0].view(2, 8, 8, 8)),
        lambda n, x: n.b(F.avg_pool2d(n.a(x).flatten(2), 3, 1, 1).view(2, -1, 8, 8)),
        lambda n, x: n.b(n.a(x) @ n.a(x)),
        lambda n, x: n.b(torch.softmax(n.a(x), 1)),
        lambda n, x: n.b(torch.clamp(n.a(x), max=x.mean())),
        lambda n, x: n.b(n.a(x).unsqueeze_(0).squeeze_(0)),
    ],
    ids=["count", "pad", "view", "pool", "product", "softmax", "clamp", "in place"],
)
def test_what_depends_on_other_channels_or_their_number_stays(forward):
    assert graph_of(forward, a=conv(3, 8), b=conv(8, 2)).widths == ()


def test_a_layer_that_also_reads_the_image_keeps_its_inputs():
    def forward(n, x):
        return n.c(n.b(x) + n.b(n.a(x)))

    graph = graph_of(forward, a=conv(3, 3), b=conv(3, 4), c=conv(4, 2))
    assert uses(graph) == [{("b", "out"), ("c", "in")}]
    shared = graph_of(lambda n, x: n.b(n.norm(n.a(n.norm(x)))), a=conv(3, 3), norm=nn.BatchNorm2d(3), b=conv(3, 2))
    assert shared.widths == ()


def test_depthwise_convolutions_pass_channels_through():
    layers = {"a": conv(3, 2), "depthwise": conv(2, 6, groups=2), "b": conv(6, 4)}
    graph = graph_of(lambda n, x: n.b(n.depthwise(n.a(x))), **layers)
    assert group_of(graph, "depthwise", "through") == [0, 0, 0, 1, 1, 1] == group_of(graph, "b", "in")
    assert graph.widths[0].uses == (("a", "out", 1), ("depthwise", "through", 3), ("b", "in", 3))


def test_convolutions_in_other_groups_keep_their_channels():
    graph = graph_of(lambda n, x: n.b(n.grouped(n.a(x))), a=conv(3, 4), grouped=conv(4, 4, groups=2), b=conv(4, 2))
    assert graph.widths == ()


def test_flattening_gives_every_channel_its_pixels():
    layers = {"a": conv(3, 2), "pool": nn.MaxPool2d(4), "b": nn.Linear(8, 5), "c": nn.Linear(5, 2)}
    for flatten in (nn.Flatten(), Flat(lambda x: x.flatten(1)), Flat(lambda x: x.view(x.shape[0], -1))):
        graph = graph_of(lambda n, x: n.c(F.relu(n.b(n.flat(n.pool(n.a(x)))))), **layers, flat=flatten)
        assert group_of(graph, "b", "in") == [0, 0, 0, 0, 1, 1, 1, 1]
        assert uses(graph) == [{("a", "out"), ("b", "in")}, {("b", "out"), ("c", "in")}]


class Flat(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def test_a_view_at_a_number_of_the_network_keeps_the_channels():
    graph = graph_of(lambda n, x: n.b(n.a(x).mean((2, 3)).view(-1, 4)), a=conv(3, 4), b=nn.Linear(4, 2))
    assert graph.widths == ()


def test_squeeze_and_excitation_scales_each_channel():
    def forward(n, x):
        x = n.a(x)
        scale = n.excite(F.relu(n.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return n.b(torch.sigmoid(scale) * x)

    layers = {"a": conv(3, 4), "squeeze": nn.Conv2d(4, 2, 1), "excite": nn.Conv2d(2, 4, 1), "b": conv(4, 3)}
    found = uses(graph_of(forward, **layers))
    assert {("a", "out"), ("squeeze", "in"), ("excite", "out"), ("b", "in")} in found
    assert {("squeeze", "out"), ("excite", "in")} in found
    assert len(found) == 2


@pytest.mark.parametrize("name", ["cat", "concat", "concatenate"])
@pytest.mark.parametrize("dim", [{"dim": 1}, {"axis": 1}])
def test_a_concatenation_has_many_names(name, dim):
    def forward(n, x):
        return n.c(getattr(torch, name)([n.a(x), n.b(x)], **dim))

    graph = graph_of(forward, a=conv(3, 4), b=conv(3, 4), c=conv(8, 2))
    assert group_of(graph, "c", "in") == [0, 1, 2, 3, 4, 5, 6, 7]


def test_layers_that_answer_with_several_values_keep_their_channels():
    graph = graph_of(
        lambda n, x: n.b(n.pool(n.a(x))[0]), a=conv(3, 4), pool=nn.MaxPool2d(2, return_indices=True), b=conv(4, 2)
    )
    assert graph.widths == ()
    layers = {"a": nn.Linear(3, 4), "lstm": nn.LSTM(4, 5), "b": nn.Linear(5, 6), "c": nn.Linear(6, 2)}
    graph = graph_of(lambda n, x: n.c(n.b(n.lstm(n.a(x))[0])), torch.zeros(7, 2, 3), **layers)
    assert uses(graph) == [{("b", "out"), ("c", "in")}]


def test_heads_that_the_network_looks_at_stay():
    x = torch.zeros(5, 2, 8)

    def heads(forward):
        return channel_graph(Network(forward, a=nn.MultiheadAttention(8, 2)), x).groups

    def unused(n, x):
        out, _ = n.a(x, x, x)
        return out

    assert heads(unused) == heads(lambda n, x: n.a(x, x, x)[0]) == 2
    assert heads(lambda n, x: n.a(x, x, x, need_weights=False)) == 2
    assert heads(lambda n, x: n.a(x, x, x)) == heads(lambda n, x: n.a(x, x, x)[1] * 2) == 0
    assert heads(lambda n, x: n.a(x, x, x, attn_mask=x.new_zeros(4, 5, 5))[0]) == 0  # one mask for each head
    assert heads(lambda n, x: n.a(x, x, x, attn_mask=x.new_zeros(5, 5))[0]) == 2


def test_one_map_for_all_channels_joins_nothing():
    graph = graph_of(lambda n, x: n.b(n.a(x) * torch.sigmoid(n.where(x))), a=conv(3, 4), where=conv(3, 1), b=conv(4, 2))
    assert uses(graph) == [{("a", "out"), ("b", "in")}]
    assert group_of(graph, "where", "out") == [FROZEN]


def test_a_constant_for_each_channel_keeps_them_and_one_for_all_does_not():
    each = Network(lambda n, x: n.b(n.a(x) * n.scale), a=conv(3, 4), b=conv(4, 2))
    each.scale = nn.Parameter(torch.ones(4, 1, 1))
    assert channel_graph(each, torch.zeros(1, 3, 8, 8)).widths == ()
    each.scale = nn.Parameter(torch.ones(1))
    assert len(channel_graph(each, torch.zeros(1, 3, 8, 8)).widths) == 1


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 8, 8]), nn.Softmax2d(), nn.LocalResponseNorm(2)])
def test_layers_that_mix_channels_keep_them(norm):
    assert graph_of(lambda n, x: n.b(n.norm(n.a(x))), a=conv(3, 4), norm=norm, b=conv(4, 2)).widths == ()


def test_transposed_convolutions_have_their_sides_the_other_way_round():
    graph = graph_of(lambda n, x: n.b(n.up(n.a(x))), a=conv(3, 4), up=nn.ConvTranspose2d(4, 5, 2, 2), b=conv(5, 2))
    assert uses(graph) == [{("a", "out"), ("up", "in")}, {("up", "out"), ("b", "in")}]


def test_the_dimension_of_the_channels_may_move():
    def forward(n, x):
        x = n.a(x).permute(0, 2, 3, 1)  # [N, H, W, C], as in ConvNeXt
        return n.c(F.gelu(n.b(x)).mean((1, 2)))

    graph = graph_of(forward, a=conv(3, 4), b=nn.Linear(4, 6), c=nn.Linear(6, 2))
    assert uses(graph) == [{("a", "out"), ("b", "in")}, {("b", "out"), ("c", "in")}]


def test_a_layer_that_runs_twice_has_one_set_of_channels():
    def forward(n, x):
        return n.c(n.b(n.b(n.a(x))))

    graph = graph_of(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2))
    assert uses(graph) == [{("a", "out"), ("b", "in"), ("b", "out"), ("c", "in")}]


def test_shared_weights_and_weights_used_directly_stay():
    tied = Network(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))
    tied.c.weight = tied.b.weight
    assert channel_graph(tied, torch.zeros(1, 3, 8, 8)).widths == ()
    direct = Network(lambda n, x: n.b(n.a(x)) + n.a.weight.sum(), a=conv(3, 4), b=conv(4, 2))
    assert channel_graph(direct, torch.zeros(1, 3, 8, 8)).widths == ()


def test_weights_computed_from_others_stay():
    network = Network(lambda n, x: n.c(n.b(n.a(x))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 2))
    parametrizations.weight_norm(network.b)
    assert channel_graph(network, torch.zeros(1, 3, 8, 8)).widths == ()


def test_attention_has_heads_and_keeps_its_width():
    block = torchvision.models.vision_transformer.EncoderBlock(4, 16, 32, 0.0, 0.0, nn.LayerNorm)
    graph = channel_graph(block, torch.zeros(2, 5, 16))
    assert uses(graph) == [{("self_attention", "heads")}, {("mlp.0", "out"), ("mlp.3", "in")}]
    assert group_of(graph, "self_attention", "heads") == [0, 1, 2, 3]
    other = Network(lambda n, x: n.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert channel_graph(other, torch.zeros(5, 2, 8)).widths == ()


def test_prelu_and_averages():
    layers = {"a": conv(3, 4), "act": nn.PReLU(4), "b": nn.Linear(4, 2)}
    graph = graph_of(lambda n, x: n.b(n.act(n.a(x)).mean(dim=[2, 3])), **layers)
    assert uses(graph) == [{("a", "out"), ("act", "through"), ("b", "in")}]
    assert graph_of(lambda n, x: n.b(n.a(x).mean(1)), a=conv(3, 4), b=nn.Linear(8, 2)).widths == ()


def test_a_dict_and_a_tuple_are_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 4), conv(2, 4), conv(4, 2)

        def forward(self, left, right, scale=1.0):
            return self.c(self.a(left) + self.b(right) * scale)

    left, right = torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8)
    expected = [{("a", "out"), ("b", "out"), ("c", "in")}]
    assert uses(channel_graph(Two(), (left, right))) == expected
    assert uses(channel_graph(Two(), {"right": right, "left": left})) == expected


def test_excluded_layers_keep_their_channels():
    network = models.create("cifar_resnet14", seed=0)
    x = torch.zeros(1, 3, 32, 32)
    names = [width.name for width in channel_graph(network, x, exclude=("layer2", "fc")).widths]
    assert names == ["layer1.0.conv1", "layer1.1.conv1", "layer3.0.conv1", "layer3.1.conv1"]


@pytest.mark.parametrize("name", [*models.names(), *TORCHVISION])
def test_every_layer_of_the_networks_is_understood(name):
    """All channels can go but those of the last layer, and what normalises over channels or is added to such."""
    own = name in models.names()
    with torch.device("meta"):
        network = models.create(name) if own else getattr(torchvision.models, name)()
    example = engines.example_for(network).to("meta") if own else torch.zeros(1, 3, 224, 224)
    graph = channel_graph(network, example)
    stay = {layer for (layer, kind), labels in graph.labels.items() if kind == "out" and (labels == FROZEN).any()}
    if name == "vit_b_16":
        expected = {f"encoder.layers.encoder_layer_{i}.mlp.3" for i in range(12)} | {"conv_proj", "heads.head"}
        assert sum("heads" in {kind for _, kind, _ in width.uses} for width in graph.widths) == 12
    else:
        last = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        expected = {last[-1]}
        if "lraspp" in name:
            expected = {"network.classifier.low_classifier", "network.classifier.high_classifier"}
        if "yolov5" in name:
            expected = {f"model.24.m.{scale}" for scale in range(3)}
    assert stay == expected


def test_it_agrees_with_torch_pruning_on_resnet18():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning

        network = torchvision.models.resnet18().eval()
        x = torch.zeros(1, 3, 64, 64)
        theirs = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=x)
        names = {module: name for name, module in network.named_modules()}
        expected = set()
        for group in theirs.get_all_groups(ignored_layers=[network.fc], root_module_types=[nn.Conv2d, nn.Linear]):
            expected.add(
                frozenset(
                    (names[dep.target.module], "in" if "in_channels" in dep.handler.__name__ else "out")
                    for dep, _ in group
                    if dep.target.module in names
                )
            )
    ours = {
        frozenset((layer, "out" if side == "through" else side) for layer, side in use)
        for use in uses(channel_graph(network, x))
    }
    assert ours == expected
    assert len(ours) == 12


class Undecided(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_what_cannot_be_followed_is_refused_in_one_sentence():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(
        CompanionError, match=r"^Undecided cannot be traced by torch\.fx, so its channels cannot be followed: .*\.$"
    ):
        channel_graph(Undecided(), x)
    network = models.create("simple_cnn", seed=0)
    with pytest.raises(CompanionError, match="cannot run"):
        channel_graph(network, torch.zeros(1, 5, 32, 32))
    with pytest.raises(CompanionError, match="cannot run"):
        channel_graph(network, (x, x))
    for wrong in (5, None):
        with pytest.raises(CompanionError, match=r"^exclude is "):
            channel_graph(network, torch.zeros(1, 3, 32, 32), exclude=wrong)
    with pytest.raises(CompanionError, match="no layer 'conv'"):
        channel_graph(network, torch.zeros(1, 3, 32, 32), exclude=["conv"])
    with pytest.raises(CompanionError, match="needed, not function"):
        channel_graph(lambda x: x, x)
    with pytest.raises(CompanionError, match="without a tensor"):
        channel_graph(network, "image")


def test_looking_changes_nothing():
    network = models.create("cifar_resnet14", seed=0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    channel_graph(network, torch.rand(2, 3, 32, 32))
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert np.all([p.device.type == "cpu" for p in network.parameters()])
