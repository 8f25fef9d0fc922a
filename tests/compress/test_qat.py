"""Simulated quantization of networks: what they compute, that they learn, and the way back."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from companion import CompanionError, compress, metrics, models, train
from companion.compress.qat import FakeQuantizer


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return model.eval()


def images(n=16, seed=1):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def ready(**options):
    options = {"weight_bits": 4, "activation_bits": 4} | options
    prepared = compress.prepare_qat(net(), **options)
    return compress.calibrate(prepared, [images()]) if options["activation_bits"] else prepared


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_computes_what_quantizing_by_hand_does():
    model, x = net(), images()
    prepared = compress.prepare_qat(model, weight_bits=3, activation_bits=4, first_last_bits=8, observer="minmax")
    compress.calibrate(prepared, [x], observer="minmax")

    def rounded(layer, bits):
        return compress.fake_quantize(layer.weight, compress.observe(layer.weight, bits=bits, symmetric=True, axis=0))

    # What calibration saw: weights already rounded, activations not yet.
    conv = nn.functional.conv2d
    first, second = model[0], model[3]
    seen = model[2](model[1](conv(x, rounded(first, 8), padding=1)))
    a = compress.fake_quantize(x, compress.observe(x, bits=8))
    a = model[2](model[1](conv(a, rounded(first, 8), padding=1)))
    a = compress.fake_quantize(a, compress.observe(seen, bits=4))
    after = lambda y: model[6](model[5](model[4](conv(y, rounded(second, 3), second.bias, padding=1))))  # noqa: E731
    a = compress.fake_quantize(after(a), compress.observe(after(seen), bits=8))
    expected = nn.functional.linear(a, rounded(model[7], 8), model[7].bias)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), expected)


def test_bits_of_the_ends_and_of_the_rest():
    prepared = ready(weight_bits=2, activation_bits=3)
    bits = [(prepared[i].parametrizations.weight[0].bits, prepared[i].input_quantizer.bits) for i in (0, 3, 7)]
    assert bits == [(8, 8), (2, 3), (8, 8)]
    alike = ready(weight_bits=2, activation_bits=None, first_last_bits=None)
    assert [alike[i].parametrizations.weight[0].bits for i in (0, 3, 7)] == [2, 2, 2]
    assert not hasattr(alike[0], "input_quantizer")


def test_argument_and_input_are_unchanged():
    model, x = models.create("cifar_resnet14", width=4, seed=0).eval(), torch.rand(4, 3, 32, 32)
    before, kept = copy.deepcopy(model), x.clone()
    expected = model(x)
    prepared = compress.calibrate(compress.prepare_qat(model), [x])
    prepared(x)
    compress.freeze(prepared)(x)
    assert same(model, before)
    assert torch.equal(x, kept)
    assert torch.equal(model(x), expected)
    assert type(model.conv1) is nn.Conv2d
    assert compress.sqnr(expected, prepared(x)) > 25
    assert metrics.count_macs(prepared, x) == metrics.count_macs(model, x)


def test_more_bits_are_closer():
    model, x = net(), images()
    found = []
    for bits in (2, 4, 6, 8):
        prepared = compress.prepare_qat(model, weight_bits=bits, activation_bits=bits, first_last_bits=None)
        found.append(compress.sqnr(model(x), compress.calibrate(prepared, [x])(x)))
    assert found == sorted(found)
    assert found[-1] > 30


def test_calibration_sees_all_batches_and_leaves_modes_and_statistics():
    prepared = compress.prepare_qat(net()).train()
    before = prepared[1].running_mean.clone()
    batches = [images(), 5 * images(seed=2) - 2]
    assert compress.calibrate(prepared, iter(batches), observer="minmax") is prepared
    grid = prepared[0].input_quantizer.grid
    values = torch.cat(batches)
    step = float(grid.scale.detach())
    assert float(grid.values[0]) == pytest.approx(float(values.min()), abs=step)
    assert float(grid.values[-1]) == pytest.approx(float(values.max()), abs=step)
    assert prepared.training
    assert torch.equal(prepared[1].running_mean, before)
    assert int(prepared[3].input_quantizer.zero_point) == 0  # behind a ReLU nothing is negative


def test_a_failed_calibration_changes_nothing():
    prepared = ready()
    before = copy.deepcopy(prepared)

    def batches():
        yield 100 * images()
        yield torch.rand(2, 5)

    with pytest.raises(CompanionError, match=r"cannot run for calibration on an example of shape \(2, 5\)"):
        compress.calibrate(prepared, batches())
    assert same(prepared, before)
    assert torch.equal(prepared(images()), before(images()))


@pytest.mark.parametrize("way", [copy.deepcopy, "state"])
def test_copies_and_states_carry_everything(way):
    prepared = ready()
    for module in prepared.modules():
        if isinstance(module, FakeQuantizer):
            nn.init.normal_(module.log_step, std=0.1)
    if way == "state":
        other = compress.prepare_qat(net(seed=5), weight_bits=4, activation_bits=4)
        other.load_state_dict(prepared.state_dict())
    else:
        other = way(prepared)
    assert torch.equal(other(images()), prepared(images()))
    other[3].bias.data += 1
    assert not torch.equal(other(images()), prepared(images()))


def test_freeze_gives_a_plain_network_on_the_grid():
    prepared = ready(weight_bits=2, activation_bits=None)
    nn.init.normal_(prepared[3].parametrizations.weight[0].log_step, std=0.1)
    frozen = compress.freeze(prepared)
    assert {name for name, _ in frozen.named_parameters()} == {name for name, _ in net().named_parameters()}
    assert [type(m) for m in frozen.modules()] == [type(m) for m in net().modules()]
    assert torch.equal(frozen(images()), prepared(images()))
    assert all(len(channel.unique()) <= 3 for channel in frozen[3].weight.detach())
    assert isinstance(prepared[3].parametrizations.weight[0], FakeQuantizer)  # still, and it works
    prepared.train()(images()).sum().backward()
    assert compress.freeze(ready())(images()).isfinite().all()
    compress.prepare_qat(frozen)


def test_a_frozen_network_is_saved_like_any_other(tmp_path):
    model = models.create("cifar_resnet14", width=4, seed=0)
    frozen = compress.freeze(compress.prepare_qat(model, weight_bits=3))
    models.save(frozen, tmp_path / "w.safetensors")
    assert same(models.load(tmp_path / "w.safetensors"), frozen)


def task(n=256):
    """Which of four corners of a noisy image is bright."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 8, 8, generator=generator)
    y = torch.randint(4, (n,), generator=generator)
    for image, label in zip(x, y, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.15
    return TensorDataset(x, y)


def test_training_wins_back_what_rounding_lost():
    data = task()
    model = net()
    train.fit(model, data, epochs=12, lr=1e-2, validation=0, augment=None, progress=False)
    inputs = data.tensors[0]
    loss = {"float": train.evaluate(model, data, progress=False).loss}
    prepared = compress.prepare_qat(model, weight_bits=2, activation_bits=2, first_last_bits=2)
    compress.calibrate(prepared, [inputs])
    loss["rounded"] = train.evaluate(prepared, data, progress=False).loss
    history = train.fit(prepared, data, epochs=6, lr=3e-3, validation=0, augment=None, progress=False)
    loss["trained"] = train.evaluate(prepared, data, progress=False).loss
    assert len(history.epochs) == 6
    assert loss["rounded"] > loss["float"] + 0.1
    assert loss["trained"] < loss["float"] + 0.5 * (loss["rounded"] - loss["float"])
    steps = [module.log_step for module in prepared.modules() if isinstance(module, FakeQuantizer)]
    assert len(steps) == 6
    assert all(step.abs().max() > 0 for step in steps)


def test_mixed_precision_and_gradients():
    prepared = ready().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = prepared(images()).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prepared.parameters())


def nan_weight():
    model = net()
    model[3].weight.data[0, 0, 0, 0] = math.nan
    return model


def doubly():
    prepared = ready()
    nn.utils.parametrize.register_parametrization(prepared[3], "weight", nn.Identity())
    return prepared


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress.prepare_qat(net(), weight_bits=0), "bits is 0: give a whole number from 2 to 8"),
        (lambda: compress.prepare_qat(net(), activation_bits=1), "bits is 1"),
        (lambda: compress.prepare_qat(net(), first_last_bits=16), "bits is 16"),
        (lambda: compress.prepare_qat(net(), weight_bits=None), "bits is None"),
        (lambda: compress.prepare_qat(net(), observer="max"), "no observer"),
        (lambda: compress.prepare_qat(net(), exclude=["1"]), "no layer '1' to exclude: choose among 0, 3, 7"),
        (lambda: compress.prepare_qat(net(), exclude=["0", "3", "7"]), "no convolution or linear layer"),
        (lambda: compress.prepare_qat(nn.ReLU()), "no convolution or linear layer"),
        (lambda: compress.prepare_qat(nan_weight()), "the weight of 3 cannot be quantized"),
        (lambda: compress.prepare_qat(ready()), "compress.freeze"),
        (lambda: compress.quantize_weights(ready()), "compress.freeze"),
        (lambda: compress.prepare_qat("net"), "a network"),
        (lambda: compress.prepare_qat(net())(images()), "call compress.calibrate(network, batches)"),
        (lambda: compress.calibrate(net(), [images()]), "make it with compress.prepare_qat"),
        (lambda: compress.calibrate(compress.prepare_qat(net(), activation_bits=None), [images()]), "no activations"),
        (lambda: compress.calibrate(compress.prepare_qat(net()), []), "nothing to calibrate with"),
        (lambda: compress.calibrate(compress.prepare_qat(net()), None), "must be a list of batches"),
        (lambda: compress.calibrate(compress.prepare_qat(net()), images()), "must be a list of batches"),
        (lambda: compress.calibrate("net", [images()]), "a network (torch.nn.Module) is needed, not str"),
        (lambda: compress.freeze("net"), "a network (torch.nn.Module) is needed, not str"),
        (lambda: compress.calibrate(compress.prepare_qat(net()), [images() * math.nan]), "the input of 0 cannot be"),
        (lambda: compress.calibrate(compress.prepare_qat(net()), [images()], observer="best"), "no observer"),
        (lambda: compress.calibrate(compress.prepare_qat(net()), [images()], percentile=0), "percentile is 0"),
        (lambda: compress.freeze(net()), "not made by compress.prepare_qat"),
        (lambda: compress.freeze(doubly()), "3 has another parametrization than its grid"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(call, message):
    with pytest.raises(CompanionError) as refused:
        call()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")
