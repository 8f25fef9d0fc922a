import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import TensorDataset

from companion import CompanionError, compress, engines, metrics, models, train
from companion.compress.masks import RAMP

LAYERS = ("0", "2", "5")


def network(seed=0):
    """Convolutions and a head with a normalisation between: 90 + 135 + 48 weights can be pruned."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 5, 3),
            nn.BatchNorm2d(5),
            nn.Conv2d(5, 3, 3, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 4),
        )


def images(n=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    return TensorDataset(torch.randn(n, 2, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels)


def masks(model):
    """By layer, True where a weight is kept; of our masks and of torch's."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found[name] = module.parametrizations.weight[0].mask
        elif hasattr(module, "weight_mask"):
            found[name] = module.weight_mask.bool()
    return found


def torch_masks(model, amount, scope):
    model = copy.deepcopy(model)
    layers = [(model.get_submodule(name), "weight") for name in LAYERS]
    if scope == "global":
        prune.global_unstructured(layers, prune.L1Unstructured, amount=amount)
    else:
        for module, tensor in layers:
            prune.l1_unstructured(module, tensor, amount=amount)
    return masks(model)


def assert_equal_masks(ours, theirs):
    assert ours.keys() == theirs.keys() == set(LAYERS)
    for name in LAYERS:
        assert torch.equal(ours[name], theirs[name]), name


def test_by_hand():
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -4.0, 2.0], [-0.5, 3.0, 5.0]]))
    pruned = compress.prune_weights(linear, 0.5)
    assert pruned.weight.tolist() == [[0, -4, 0], [0, 3, 5]]
    assert torch.equal(pruned.bias, linear.bias)
    assert linear.weight.tolist() == [[1, -4, 2], [-0.5, 3, 5]]


def test_scopes_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    everywhere, each = (compress.prune_weights(model, 0.5, scope=scope) for scope in ("global", "layer"))
    assert [layer.weight.tolist() for layer in everywhere] == [[[0, 0], [0, 0]], [[5, 6], [7, 8]]]
    assert [layer.weight.tolist() for layer in each] == [[[0, 0], [3, 4]], [[0, 0], [7, 8]]]


@pytest.mark.parametrize("scope", ["global", "layer"])
@settings(max_examples=40, deadline=None)
@given(amount=st.floats(0.01, 0.99), seed=st.integers(0, 100), ties=st.booleans())
def test_masks_equal_torchs(scope, amount, seed, ties):
    model = network(seed)
    if ties:  # few different magnitudes, zero among them
        with torch.no_grad():
            for name in LAYERS:
                weight = model.get_submodule(name).weight
                weight.copy_((weight * 8).round())
    assert_equal_masks(masks(compress.prune_weights(model, amount, scope=scope)), torch_masks(model, amount, scope))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_twice_equals_torch_pruning_twice(scope):
    model = network()
    with torch.no_grad():
        for name in LAYERS:
            weight = model.get_submodule(name).weight
            weight.copy_((weight * 8).round())
    reference = copy.deepcopy(model)
    layers = [(reference.get_submodule(name), "weight") for name in LAYERS]
    sizes = [module.weight.numel() for module, _ in layers]
    before = [0, 0, 0]
    for share in (0.3, 0.55, 0.8):
        model = compress.prune_weights(model, share, scope=scope)
        # torch counts what to prune in addition, we what to have in all.
        if scope == "global":
            already = sum(before)
            before = [round(share * sum(sizes)), 0, 0]
            prune.global_unstructured(layers, prune.L1Unstructured, amount=sum(before) - already)
        else:
            now = [round(share * size) for size in sizes]
            for (module, tensor), a, b in zip(layers, now, before, strict=True):
                prune.l1_unstructured(module, tensor, amount=a - b)
            before = now
        assert_equal_masks(masks(model), masks(reference))


@settings(max_examples=30, deadline=None)
@given(first=st.floats(0, 0.98), second=st.floats(0, 0.98), scope=st.sampled_from(["global", "layer"]))
def test_pruning_again_never_revives_a_zero(first, second, scope):
    once = compress.prune_weights(network(), first)
    before = {name: mask.clone() for name, mask in masks(once).items()}
    twice = compress.prune_weights(once, second, scope=scope)
    for name, mask in masks(twice).items():
        assert not (mask & ~before[name]).any()
        assert torch.equal(masks(once)[name], before[name])  # the argument is untouched
    assert compress.sparsity(twice).share >= max(first, second) - 3 / 273  # rounded to whole weights, in each layer


@pytest.mark.parametrize("share", [0, 0.3, 0.77, 0.999])
def test_report_counts(share):
    pruned = compress.prune_weights(network(), share)
    found = compress.sparsity(pruned)
    assert [(layer.name, layer.weights) for layer in found.layers] == [("0", 90), ("2", 135), ("5", 48)]
    assert found.total.weights == 273
    assert (
        found.total.zeros == round(share * 273) == sum(int((pruned.get_submodule(n).weight == 0).sum()) for n in LAYERS)
    )
    assert found.share == found.total.zeros / 273
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert lines[-1].split() == ["total", "273", str(found.total.zeros), f"{found.share:.1%}"]


def test_zeros_of_a_plain_network_are_counted_and_go_first():
    model = network()
    with torch.no_grad():
        model[2].weight.view(-1)[10:60] = 0
    assert [layer.zeros for layer in compress.sparsity(model).layers] == [0, 50, 0]
    pruned = compress.prune_weights(model, 50 / 273)
    assert compress.sparsity(pruned).total.zeros == 50


def test_excluded_layers_keep_their_weights():
    model = nn.Sequential(network(), nn.Linear(4, 4))
    pruned = compress.prune_weights(model, 0.5, exclude=("0.0", "1"))
    assert [layer.zeros > 0 for layer in compress.sparsity(pruned).layers] == [False, True, True, False]
    whole = compress.prune_weights(model, 0.5, exclude="0")  # a module and so all its layers
    assert [layer.zeros for layer in compress.sparsity(whole).layers] == [0, 0, 0, 8]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_survive_training_copies_and_files(scope):
    model, data = network(), images()
    pruned = compress.prune_weights(model, 0.7, scope=scope)
    zeros = {name: ~mask for name, mask in masks(pruned).items()}
    before = {name: pruned.get_submodule(name).weight.detach().clone() for name in LAYERS}
    history = train.fit(pruned, data, epochs=3, batch_size=8, validation=0.25, progress=False)
    assert len(history.epochs) == 3
    again = compress.prune_weights(network(seed=1), 0.2)
    again.load_state_dict(pruned.state_dict())
    for model in (pruned, copy.deepcopy(pruned), again):
        for name in LAYERS:
            weight = model.get_submodule(name).weight
            assert (weight[zeros[name]] == 0).all()
            assert not torch.equal(weight, before[name])  # the rest has learned
            assert torch.equal(weight == 0, zeros[name])


def test_made_permanent():
    model = network()
    pruned = compress.prune_weights(model, 0.6)
    train.fit(pruned, images(), epochs=1, progress=False)
    plain = compress.make_permanent(pruned)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    x = images().tensors[0]
    assert torch.equal(plain(x), pruned(x))
    assert compress.sparsity(plain) == compress.sparsity(pruned)
    for name in LAYERS:
        weight = plain.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        assert not torch.signbit(weight[weight == 0]).any()  # all bits zero, so that a zip file shrinks
    assert masks(pruned).keys() == set(LAYERS)  # the argument keeps its masks, and works
    assert torch.equal(pruned(x), plain(x))
    train.fit(plain, images(), epochs=1, progress=False)


def test_made_permanent_is_saved_as_small_as_it_was(tmp_path):
    model = models.create("simple_cnn")
    plain = compress.make_permanent(compress.prune_weights(model, 0.9))
    models.save(plain, tmp_path / "plain.safetensors")
    loaded = models.load(tmp_path / "plain.safetensors")
    assert compress.sparsity(loaded) == compress.sparsity(plain)
    assert metrics.model_bytes(plain) == metrics.model_bytes(model)  # zeros take as much room


def test_a_masked_network_exports(tmp_path):
    pruned = compress.prune_weights(network(), 0.5).eval()
    x = images().tensors[0]
    engines.export_onnx(pruned, x, tmp_path / "p.onnx")
    with engines.load(tmp_path / "p.onnx") as engine:
        (found,) = engine.run({next(i.name for i in engine.inputs): x.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(found), pruned(x).detach(), rtol=1e-4, atol=1e-4)


def test_zeros_save_no_work():
    model = network()
    x = images().tensors[0]
    assert metrics.count_macs(compress.prune_weights(model, 0.9), x) == metrics.count_macs(model, x)


def test_attention_is_pruned_whole():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    pruned = compress.prune_weights(layer, 0.5, scope="layer")
    assert [(row.weights, row.zeros) for row in compress.sparsity(pruned).layers] == [
        (192, 96),
        (64, 32),
        (128, 64),
        (128, 64),
    ]
    plain = compress.make_permanent(pruned)
    assert list(plain.state_dict()) == list(layer.state_dict())
    x = torch.rand(2, 5, 8)
    torch.testing.assert_close(pruned(x), plain(x))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (10, 0.1), (15, 0.9 - 0.8 * 0.125), (12.5, 0.9 - 0.8 * 27 / 64), (20, 0.9), (99, 0.9)],
)
def test_cubic_schedule_by_hand(step, expected):
    assert compress.cubic_sparsity(step, 10, 20, 0.9, 0.1) == pytest.approx(expected)


def test_cubic_schedule_without_length():
    assert compress.cubic_sparsity(0, 0, 0, 0.5) == 0.5


def test_gradual_pruning_leaves_a_masked_copy():
    model, epochs = network(), []
    pruned = compress.prune_gradually(
        model, images(64), 0.8, epochs=4, batch_size=8, progress=False, on_epoch=epochs.append
    )
    assert len(epochs) == 4
    assert compress.sparsity(pruned).total.zeros == round(0.8 * 273)
    assert compress.sparsity(model).share == 0
    assert not pruned._forward_pre_hooks
    assert not torch.equal(pruned[5].bias, model[5].bias)  # it has learned


class Spy(nn.Linear):
    """Notes its sparsity at each training step."""

    def forward(self, x):
        if self.training:
            self.seen.append((self.weight == 0).double().mean().item())
        return super().forward(x)


@pytest.mark.parametrize("start", [0, 0.3])
def test_gradual_sparsity_at_each_step(start):
    spy = Spy(10, 10)
    spy.seen = []
    spy = compress.prune_weights(spy, start) if start else spy
    data = TensorDataset(torch.randn(40, 10), torch.arange(40) % 10)
    pruned = compress.prune_gradually(spy, data, 0.9, epochs=4, batch_size=10, progress=False)
    end = int(RAMP * 15)
    wanted = [compress.cubic_sparsity(step, 0, end, 0.9, start) for step in range(16)]
    assert pruned.seen == pytest.approx(wanted, abs=0.0051)  # whole weights of 100
    assert pruned.seen == sorted(pruned.seen)
    assert compress.sparsity(pruned).share == pytest.approx(0.9)


def test_gradual_pruning_equals_fit_when_there_is_nothing_to_prune():
    model = network()
    pruned = compress.prune_gradually(model, images(), 0, epochs=2, batch_size=8, progress=False)
    train.fit(model, images(), epochs=2, batch_size=8, validation=0, progress=False)
    assert torch.equal(pruned[5].weight, model[5].weight)


def test_gradual_keeps_its_word_for_a_single_step():
    pruned = compress.prune_gradually(network(), images(4), 0.5, epochs=1, progress=False)
    assert compress.sparsity(pruned).total.zeros == round(0.5 * 273)


def test_sensitivity_by_hand():
    """A head that reads class k from input k, after a layer that it does not need."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0]))
        model[1].weight.copy_(torch.eye(4))
    data = TensorDataset(torch.eye(4), torch.arange(4))
    first, second = compress.sensitivity(model, data, (0, 0.75, 13 / 16, 15 / 16), progress=False)
    # 12 of 16 weights are zero anyway; each one more loses a class, but one: of equal outputs the first class is taken.
    assert (first.layer, first.weights, first.sparsities) == ("0", 16, (0, 0.75, 13 / 16, 15 / 16))
    assert first.scores == (1, 1, 1, 0.5)
    assert second.scores[:2] == (1, 1)
    assert second.scores[-1] <= 0.5


def test_sensitivity_equals_pruning_each_layer_alone():
    model, data = network(), images()
    train.fit(model, data, epochs=3, validation=0, progress=False)
    state = copy.deepcopy(model.state_dict())
    for row in compress.sensitivity(model, data, (0.5, 0.9), progress=False):
        for share, score in zip(row.sparsities, row.scores, strict=True):
            alone = compress.prune_weights(model, share, exclude=set(LAYERS) - {row.layer})
            assert train.evaluate(alone, data, progress=False).main == score
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (12,)])
@pytest.mark.parametrize("bias", [True, False])
def test_csr_equals_dense(shape, bias):
    linear = compress.prune_weights(nn.Linear(12, 5, bias=bias), 0.7)
    sparse = copy.deepcopy(compress.to_csr(linear))
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), linear(x).detach())
    torch.testing.assert_close(metrics.inference(sparse, x)(), linear(x).detach())
    assert len(sparse.values) == 60 - round(0.7 * 60)


def test_csr_bytes_by_hand():
    linear = compress.prune_weights(nn.Linear(100, 50, bias=False), 0.9)
    # 500 values and columns, 51 starts of rows, 4 bytes each
    assert metrics.model_bytes(compress.to_csr(linear)) == 4 * (500 + 500 + 51)


def _nan():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    return model


def _tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def _masked_by_torch():
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


REFUSED = {
    "one": (lambda: compress.prune_weights(network(), 1.0), "from 0 to below 1"),
    "percent": (lambda: compress.prune_weights(network(), 80), "from 0 to below 1"),
    "negative": (lambda: compress.prune_weights(network(), -0.1), "from 0 to below 1"),
    "nan": (lambda: compress.prune_weights(network(), float("nan")), "from 0 to below 1"),
    "text": (lambda: compress.prune_weights(network(), "half"), "from 0 to below 1"),
    "nan weights": (lambda: compress.prune_weights(_nan(), 0.5), "2 has weights that are not finite"),
    "scope": (lambda: compress.prune_weights(network(), 0.5, scope="channel"), "no scope 'channel'"),
    "unknown layer": (lambda: compress.prune_weights(network(), 0.5, exclude=["head"]), "no layer 'head'"),
    "all excluded": (lambda: compress.prune_weights(network(), 0.5, exclude=LAYERS), "nothing to prune"),
    "no weights": (lambda: compress.prune_weights(nn.Sequential(nn.ReLU()), 0.5), "nothing to prune"),
    "nothing to report": (lambda: compress.sparsity(nn.ReLU()), "nothing to prune"),
    "no network": (lambda: compress.prune_weights("net.safetensors", 0.5), "a network .* is needed, not str"),
    "lazy": (lambda: compress.prune_weights(nn.Sequential(nn.LazyLinear(3)), 0.5), "lazy"),
    "tied": (lambda: compress.prune_weights(_tied(), 0.5), "shares its weight"),
    "torch's own masks": (lambda: compress.prune_weights(_masked_by_torch(), 0.5), "cannot be copied"),
    "gradual with validation": (
        lambda: compress.prune_gradually(network(), images(), 0.5, epochs=1, validation=0.1),
        "takes no validation",
    ),
    "gradual to all": (lambda: compress.prune_gradually(network(), images(), 1, epochs=1), "from 0 to below 1"),
    "gradual, no epochs": (lambda: compress.prune_gradually(network(), images(), 0.5, epochs=0), "epochs is 0"),
    "gradual, no batch": (
        lambda: compress.prune_gradually(network(), images(), 0.5, epochs=1, batch_size=0),
        "batch_size is 0",
    ),
    "scan of nothing": (lambda: compress.sensitivity(network(), images(), ()), "no sparsities"),
    "scan of more than all": (lambda: compress.sensitivity(network(), images(), 1.5), "from 0 to below 1"),
    "scan of all": (lambda: compress.sensitivity(network(), images(), (0.5, 1.0)), "from 0 to below 1"),
    "csr of a convolution": (lambda: compress.to_csr(nn.Conv2d(1, 1, 1)), "linear layer is needed, not Conv2d"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case):
    call, words = REFUSED[case]
    with pytest.raises(CompanionError, match=words) as caught:
        call()
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said


def test_another_parametrization_is_not_lost():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    pruned = compress.prune_weights(model, 0.5)
    assert compress.sparsity(pruned).total.zeros == 4
    with pytest.raises(CompanionError, match="another parametrization"):
        compress.make_permanent(pruned)


def test_frozen_weights_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    plain = compress.make_permanent(compress.prune_weights(model, 0.5))
    assert [p.requires_grad for p in plain.parameters()] == [False, False, True, True]
