"""Scores of channels, worked out by hand on a network of six weights and two channels."""

import pytest
import torch
from torch import nn

from companion import CompanionError, models
from companion.compress import channel_graph, score_channels


def small():
    """Two channels: x → a (1 input) → γ, β (of a normalisation that does nothing) → b."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.0), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    conv, norm, _, _, linear = network
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([3.0, -1.0]).view(2, 1, 1, 1))
        conv.bias.fill_(7.0)  # counts in no sum of weights
        norm.weight.copy_(torch.tensor([0.5, 2.0]))
        norm.bias.fill_(9.0)
        linear.weight.copy_(torch.tensor([[1.0, -1.0, 2.0, 4.0]]))  # two pixels of each channel
        linear.bias.zero_()
    return network.eval()


X = torch.tensor([[[[1.0, 2.0]]]])  # one image of one channel and two pixels


def scores(importance, network=None, **options):
    network = small() if network is None else network
    return score_channels(network, channel_graph(network, X), importance, **options).tolist()


def test_l1_and_l2_are_over_everything_that_goes():
    assert scores("l1") == pytest.approx([3 + 0.5 + 1 + 1, 1 + 2 + 2 + 4])
    assert scores("l2") == pytest.approx([(9 + 0.25 + 1 + 1) ** 0.5, (1 + 4 + 4 + 16) ** 0.5])


def test_bn_scale_is_the_mean_gamma():
    assert scores("bn_scale") == pytest.approx([0.5, 2.0])


def test_bn_scale_takes_l2_where_there_is_no_normalisation():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    graph = channel_graph(network, X)
    found = score_channels(network, graph, "bn_scale")
    assert torch.equal(found[:2], score_channels(network, graph, "l2")[:2])
    assert found[2:].tolist() == [1.0, 1.0]
    with pytest.raises(CompanionError, match="bn_scale needs batch normalisations"):
        scores("bn_scale", nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)))


def test_random_depends_on_the_seed_alone():
    assert scores("random", seed=1) == scores("random", seed=1) != scores("random", seed=2)
    assert all(0 <= score < 1 for score in scores("random"))


def test_taylor_by_hand():
    # One batch, loss = the output itself. In evaluation mode, running mean 0 and variance 1:
    # channel 0: a = 3x + 7 = 10, 13; y = 0.5a + 9 = 14, 15.5; output part y·(1, −1).
    # conv: w·g = 3·(0.5·1 − 0.5·2) = −1.5, bias 7·(0.5 − 0.5) = 0; norm: γ·g = 0.5·(10 − 13) = −1.5, β 0;
    # linear: 14 − 15.5 = −1.5. So the score is √(3·1.5²).
    # channel 1: a = −x + 7 = 6, 5; y = 2a + 9 = 21, 19; output part y·(2, 4).
    # conv: −1·(2·2·1 + 2·4·2) = −20, bias 7·(4 + 8) = 84: 64; norm: 2·(6·2 + 5·4) = 64, β 9·6 = 54: 118;
    # linear: 42 + 76 = 118.
    expected = [(3 * 1.5**2) ** 0.5, (64**2 + 118**2 + 118**2) ** 0.5]
    data = [(X, torch.zeros(1))]
    assert scores("taylor", data=data, loss=lambda outputs, _: outputs.sum()) == pytest.approx(expected)
    # Squares are averaged over the batches: a second one of zero loss halves them.
    data.append((X, torch.ones(1)))
    halved = scores("taylor", data=data, loss=lambda outputs, targets: outputs.sum() * (1 - targets.sum()))
    assert halved == pytest.approx([value / 2**0.5 for value in expected])


def test_taylor_predicts_the_loss_without_the_channel():
    """In one batch, a small step of a channel towards zero changes the loss by score × step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x, target = torch.randn(8, 3), torch.randint(2, (8,))
    graph = channel_graph(network, x)

    def loss():
        return nn.functional.cross_entropy(network(x), target).item()

    # Both layers see the same first-order change, for ReLU is homogeneous and there is no bias to shift it.
    nn.init.zeros_(network[0].bias)
    found = score_channels(network, graph, "taylor", data=[(x, target)]) / 2**0.5
    for channel in range(4):
        before, column = loss(), network[2].weight[:, channel].clone()
        with torch.no_grad():
            network[2].weight[:, channel] *= 1 - 1e-2
        assert abs(loss() - before) == pytest.approx(float(found[channel]) * 1e-2, rel=0.1, abs=2e-6)
        with torch.no_grad():
            network[2].weight[:, channel] = column


def test_taylor_uses_the_loss_of_the_task_and_changes_nothing():
    network = models.create("unet", width=2, depth=1, seed=0)
    x, masks = torch.rand(2, 3, 8, 8), torch.randint(11, (2, 8, 8))
    graph = channel_graph(network, x)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = score_channels(network, graph, "taylor", data=[(x, masks)])
    masks[0] = 255  # void: counts in no loss
    other = score_channels(network, graph, "taylor", data=[(x, masks)])
    assert found.isfinite().all()
    assert not torch.equal(found, other)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_attention_counts_its_heads():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    network = Block()
    attention = network.attention
    with torch.no_grad():
        attention.in_proj_weight.fill_(1.0)
        attention.out_proj.weight.fill_(1.0)
        attention.in_proj_weight[10:12] = 3.0  # the values of the second head
    graph = channel_graph(network, torch.zeros(1, 3, 4))
    # A head is 3 × 2 rows of 4 and 2 columns of 4.
    assert score_channels(network, graph, "l1").tolist() == [24 + 8, 24 + 8 + 2 * 8]


def test_bad_input_is_refused_in_one_sentence():
    network = small()
    with pytest.raises(CompanionError, match="importance is 'magnitude': choose one of l1, l2, taylor"):
        scores("magnitude")
    with pytest.raises(CompanionError, match="taylor needs data: batches"):
        scores("taylor")
    with pytest.raises(CompanionError, match="not one batch"):
        scores("taylor", data=[])
    with pytest.raises(CompanionError, match="must be a pair"):
        scores("taylor", data=[X])
    with pytest.raises(CompanionError, match="taylor needs data: batches"):
        scores("taylor", data=5)
    with pytest.raises(
        CompanionError, match=r"^Sequential cannot run with its loss on the data .* must be Tensor, not int\.$"
    ):
        scores("taylor", data=[(X, 1)])
    for loss in (lambda outputs, _: outputs.flatten().repeat(2), lambda outputs, _: 1.0):
        with pytest.raises(CompanionError, match="the loss must be one number"):
            scores("taylor", data=[(X, X)], loss=loss)
    with pytest.raises(CompanionError, match="seed is 'x': give a whole number"):
        scores("random", seed="x")
    with pytest.raises(CompanionError, match="loss on the data is not finite"):
        scores("taylor", data=[(X, X)], loss=lambda outputs, _: outputs.sum() * torch.nan)
    network[4].weight.data[0, 0] = torch.nan
    for importance in ("l2", "random"):
        with pytest.raises(CompanionError, match="weights of 4 are not all finite"):
            scores(importance, network)
