"""Every network without channels says what it says itself with those channels at zero (a property, drawn at random)."""

import copy
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from companion import engines, metrics, models
from companion.compress import channels, prune_channels, rebuild
from companion.compress.importance import IMPORTANCES

sys.path.insert(0, str(Path(__file__).parent))
from networks import TORCHVISION, images, lively, torchvision_network, zeroed

# Made of the same blocks as others.
LONG = ("cifar_resnet50", "cifar_resnet56", "fcn_resnet50", *(f"yolov5{variant}" for variant in "nsmlx"))
# Those of the same name as torchvision's are built alike.
OURS = [
    pytest.param(name, marks=pytest.mark.stress if name in LONG else ())
    for name in models.names()
    if name not in TORCHVISION and models.task(name) != "text"
]


def state_of(model):
    """All that a call or a pruning must leave as it was."""
    tensors = {
        key: (id(value), value._version, value.clone()) for key, value in model.state_dict(keep_vars=True).items()
    }
    return tensors, {
        name: (type(module), module.training, module.extra_repr()) for name, module in model.named_modules()
    }


def assert_untouched(model, before):
    now = state_of(model)
    assert now[1] == before[1]
    assert now[0].keys() == before[0].keys()
    for key, (identity, version, value) in now[0].items():
        assert (identity, version) == before[0][key][:2]
        assert torch.equal(value, before[0][key][2])


def batches(x, network):
    """Data for taylor: the targets are classes, or masks where the network answers with pictures."""
    with torch.no_grad():
        answer = network(x)
    shape = (len(x), *answer.shape[2:])
    return [(x, torch.randint(answer.shape[1], shape, generator=torch.Generator().manual_seed(3)))]


@pytest.fixture
def check(monkeypatch):
    """A function that prunes a network, compares it with the original at zero, and returns it."""
    removed = []

    def remove(model, graph, keep):
        removed.append((graph, keep))
        return channels_removed(model, graph, keep)

    channels_removed = channels.remove_channels
    monkeypatch.setattr(channels, "remove_channels", remove)

    def check(network, x, share, options):
        before, input_before = state_of(network), x.clone()
        pruned = prune_channels(network, x, share, **options)
        assert_untouched(network, before)
        graph, keep = removed[-1]
        compare(network, pruned, graph, keep, x)
        assert torch.equal(x, input_before)
        left = metrics.count_macs(pruned, x) / metrics.count_macs(network, x)
        assert share - 0.05 <= left <= share
        assert_rebuilt(network, pruned, x)
        return pruned

    return check


def compare(network, pruned, graph, keep, x):
    assert not keep.all()
    # In float64: what is left of rounding there is far below any channel's share, whatever a network's outputs are
    # (boxes of an untrained detector are thousands of pixels).
    with torch.no_grad():
        expected = zeroed(network, graph, keep).double()(x.double())
        found = copy.deepcopy(pruned).double()(x.double())
    tolerance = 1e-9 * min(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance
    # It says something: two images differ by much more, though a random network thinks nearly the same of all noise.
    assert float((expected[0] - expected[1]).abs().max()) > 5e5 * tolerance


def assert_rebuilt(network, pruned, x):
    """From its weights and the whole network, all of its layers as they are."""
    before = state_of(network)
    again = rebuild(network, {key: value.clone() for key, value in pruned.state_dict().items()})
    assert_untouched(network, before)
    for (name, module), other in zip(pruned.named_modules(), again.modules(), strict=True):
        assert (type(module), module.extra_repr()) == (type(other), other.extra_repr()), name
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))


def check_training_step(pruned, x):
    pruned = copy.deepcopy(pruned).train()
    before = {name: parameter.clone() for name, parameter in pruned.named_parameters()}
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    outputs = pruned(x)
    # A mean over 1,000 outputs would not move every weight of float32.
    sum(each.square().sum() for each in (outputs if isinstance(outputs, list) else [outputs])).backward()
    optimizer.step()
    changed = [not torch.equal(parameter, before[name]) for name, parameter in pruned.named_parameters()]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.isfinite().all() for parameter in pruned.parameters())


def drawn(name, share, network, x, seed=0):
    """Options drawn at random, the same in every run."""
    draw = np.random.default_rng([zlib.crc32(name.encode()), int(100 * share), seed])
    # Vision transformers have no batch normalisation.
    importance = draw.choice([i for i in IMPORTANCES if i != "bn_scale" or name != "vit_b_16"])
    return {
        "importance": str(importance),
        "scope": str(draw.choice(channels.SCOPES)),
        "round_to": [None, 1, 4][draw.integers(3)],
        "seed": int(draw.integers(1000)),
        "data": batches(x, network) if importance == "taylor" else None,
    }


@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_without_channels_equals_itself_with_zeros(check, name, share):
    network, side = torchvision_network(name)
    x = images(side)
    pruned = check(network, x, share, drawn(name, share, network, x))
    if share == 0.4:  # of the other, in full size below
        check_training_step(pruned, x)


@pytest.mark.parametrize("name", OURS)
def test_our_networks_without_channels_equal_themselves_with_zeros(check, name, tmp_path):
    side = 64 if name.startswith(("lraspp", "fcn")) else 32
    network, x = lively(models.create(name, seed=0), side), images(side)
    share = 0.4 if len(name) % 2 else 0.7
    pruned = check(network, x, share, drawn(name, share, network, x))
    check_training_step(pruned, x)
    assert models.describe(pruned) == models.describe(network)
    models.save(pruned, tmp_path / "pruned.safetensors")
    loaded = models.load(tmp_path / "pruned.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), pruned(x))


@pytest.mark.stress  # gigabytes and minutes: as many channels as torchvision gives them, and images of 224 pixels
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_in_full_size_also_exports(check, name, tmp_path):
    network, side = torchvision_network(name, full=True)
    x = images(side)
    for share in (0.7, 0.4):
        pruned = check(network, x, share, drawn(name, share, network, x, seed=1))
        check_training_step(pruned, x)
        assert engines.export_onnx(pruned, x, tmp_path / f"{share}.onnx").largest_difference < 1e-4
