"""What holds for every method, alone and after another: the input stays as it is, a refusal is one sentence."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion import CompanionError, compress, metrics, models


class Encoder(nn.Module):
    """Attention between linear layers; residual additions add to what came in."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(24, 6, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.out(x.mean(1))


class InPlace(nn.Module):
    """Adds to its input, where a careless copy would let the caller see it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.second(self.first(x).relu_()).add(x).relu_().mean(1))


X = torch.rand(4, 5, 8, generator=torch.Generator().manual_seed(0))
NETWORKS = {"encoder": (Encoder, X), "residual": (InPlace, X), "simple_cnn": (None, torch.rand(4, 3, 32, 32))}


def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = NETWORKS[name]
        return (models.create("simple_cnn", seed=0) if network is None else network()).eval(), x.clone()


def prepared(model, x):
    return compress.calibrate(compress.prepare_qat(model, weight_bits=4, activation_bits=4), [x])


def taught(model, x):
    classes = model(x[:1]).shape[1]
    return compress.distill(
        model,
        model,
        TensorDataset(x, torch.arange(len(x)) % classes),
        epochs=1,
        lr=1e-6,
        validation=0,
        augment=None,
        progress=False,
    )


METHODS = {
    "zeros": lambda model, x: compress.prune_weights(model, 0.5, scope="layer"),
    "permanent zeros": lambda model, x: compress.make_permanent(compress.prune_weights(model, 0.5)),
    "channels": lambda model, x: compress.prune_channels(model, x, 0.7, round_to=1),
    "low rank": lambda model, x: compress.factorize(model, x, energy=0.6, round_to=1),
    "rounded weights": lambda model, x: compress.quantize_weights(model, 4),
    "grid": prepared,
    "grid, then plain": lambda model, x: compress.freeze(prepared(model, x)),
    "distilled": taught,
}


def works(model, x):
    """It runs, and what it was given is what it was."""
    before = x.clone()
    with torch.no_grad():
        answer = model(x)
    assert torch.equal(x, before), "the input was changed"
    assert bool(answer.isfinite().all())
    return answer


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("first", METHODS)
def test_each_method_after_each_works_or_says_why_not(first, name):
    network, x = made(name)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    once = METHODS[first](network, x)
    works(once, x)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    kept = {key: value.clone() for key, value in once.state_dict().items()}
    for second in METHODS.values():
        refusal = ""
        try:
            works(second(once, x), x)
        except CompanionError as error:
            refusal = str(error)
        assert not refusal or (refusal.endswith(".") and "\n" not in refusal)
        assert all(torch.equal(value, kept[key]) for key, value in once.state_dict().items())


def test_csr_leaves_its_input_alone():
    linear = nn.Linear(8, 3)
    works(compress.to_csr(compress.make_permanent(compress.prune_weights(linear, 0.5))), X[0])


def test_channels_low_rank_channels_with_attention():
    network, x = made("encoder")
    pruned = compress.prune_channels(network, x, 0.6)
    assert isinstance(pruned.attention, compress.Attention)
    again = compress.prune_channels(compress.factorize(pruned, x, energy=0.5, round_to=1), x, 0.7)
    assert metrics.count_macs(again, x) < 0.5 * metrics.count_macs(network, x)
    works(again, x)


def test_attention_without_some_heads_loses_weights_like_any_other():
    network, x = made("encoder")
    pruned = compress.prune_channels(network, x, 0.6)
    weight = pruned.attention.in_proj_weight
    zeros = compress.prune_weights(pruned, 0.5, scope="layer")
    by_layer = {layer.name: layer for layer in compress.sparsity(zeros).layers}
    assert by_layer["attention"].weights == weight.numel() > 0
    assert by_layer["attention"].zeros == weight.numel() // 2


def test_a_grid_and_zeros_are_not_mixed():
    network, x = made("simple_cnn")
    with pytest.raises(CompanionError, match=r"^conv1 has a grid of prepare_qat: .* compress\.freeze first\.$"):
        compress.prune_weights(prepared(network, x), 0.5)
    assert compress.sparsity(compress.prune_weights(METHODS["grid, then plain"](network, x), 0.5)).share > 0.49


EXCLUDING = {
    "zeros": lambda model, x, names: compress.prune_weights(model, 0.5, exclude=names),
    "channels": lambda model, x, names: compress.prune_channels(model, x, 0.7, exclude=names),
    "low rank": lambda model, x, names: compress.factorize(model, x, energy=0.6, exclude=names),
    "rounded weights": lambda model, x, names: compress.quantize_weights(model, 4, exclude=names),
    "grid": lambda model, x, names: compress.prepare_qat(model, exclude=names),
}


@pytest.mark.parametrize("method", EXCLUDING)
def test_exclude_means_the_same_everywhere(method):
    network, x = made("simple_cnn")
    weight = network.conv1.weight
    for names in ("conv1", ["conv1"]):
        assert EXCLUDING[method](network, x, names).conv1.weight.shape == weight.shape
    for names in (None, 5):
        with pytest.raises(CompanionError, match=rf"^exclude is {names}: give the names of layers, or \(\) to leave"):
            EXCLUDING[method](network, x, names)
    for names in ("last", ["conv1", "last"], [3], "", [["conv1"]]):
        with pytest.raises(CompanionError, match=r"^there is no layer .+ to exclude: choose among \w+, "):
            EXCLUDING[method](network, x, names)
