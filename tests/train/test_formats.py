"""Number formats against torch's and numpy's; what autocast does to operators; what a format does to gradients."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion import CompanionError, models, train
from companion.train.formats import FORMATS


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_formats_are_torchs(name, dtype):
    ours, theirs = FORMATS[name], torch.finfo(dtype)
    assert (ours.largest, ours.smallest_normal, ours.epsilon) == (theirs.max, theirs.smallest_normal, theirs.eps)
    assert 1 + ours.exponent_bits + ours.fraction_bits == theirs.bits
    if name != "fp32":  # the others' halves are float32 numbers, from which torch rounds correctly
        halves = torch.tensor([ours.to_zero, ours.to_normal, ours.to_infinity])
        below, above = (torch.nextafter(halves, torch.tensor(to)) for to in (0.0, float("inf")))
        assert halves.to(dtype).tolist() == [0, ours.smallest_normal, float("inf")]
        assert below.to(dtype).tolist() == [0, ours.smallest_normal - ours.smallest, ours.largest]
        assert above.to(dtype).tolist() == [ours.smallest, ours.smallest_normal, float("inf")]


def test_tf32_has_the_range_of_fp32_and_the_digits_of_fp16():
    tf32 = FORMATS["tf32"]
    assert (tf32.top, tf32.epsilon) == (FORMATS["fp32"].top, FORMATS["fp16"].epsilon)


# Operators


def rows(found):
    return {(row.operator, row.inputs, row.output): row.count for row in found}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.softmax(self.bn(self.conv(x)), 1).mean((2, 3)))


def test_operators_under_autocast():
    model, x, y = Small(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    state = copy.deepcopy(model.state_dict())
    found = rows(train.operator_precisions(model, x, y, precision="bf16"))
    assert found["convolution", ("bf16",), "bf16"] == found["addmm", ("bf16",), "bf16"] == 1
    assert found["native_batch_norm", ("bf16", "fp32"), "bf16"] == 1
    assert found["_log_softmax", ("fp32",), "fp32"] == found["nll_loss_forward", ("fp32",), "fp32"] == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the network was changed"
    # Cast down: picture, and weight and bias of both layers; cast up: the outputs, for the loss.
    casts = {key[1:]: count for key, count in found.items() if key[0] == "_to_copy"}
    assert casts[("fp32",), "bf16"] >= 5
    assert casts[("bf16",), "fp32"] >= 1


def test_without_autocast_everything_is_fp32():
    found = train.operator_precisions(Small(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), precision="fp32")
    assert {(row.inputs, row.output) for row in found} == {(("fp32",), "fp32")}
    assert "_to_copy" not in {row.operator for row in found}


def test_a_loss_of_ones_own_and_none():
    model, x = Small(), torch.rand(2, 3, 8, 8)
    assert train.operator_precisions(model, x)[-1].operator == "addmm"
    last = train.operator_precisions(model, x, loss=lambda outputs: outputs.float().norm())[-1]
    assert (last.operator, last.inputs, last.output) == ("linalg_vector_norm", ("fp32",), "fp32")


def test_the_count_is_that_of_the_layers():
    model = models.create("cifar_resnet14", seed=0)
    found = rows(train.operator_precisions(model, torch.rand(2, 3, 32, 32), torch.tensor([0, 1])))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert found["convolution", ("bf16",), "bf16"] == convolutions
    with pytest.raises(CompanionError, match="fp16 trains on a GPU only"):
        train.operator_precisions(model, torch.rand(2, 3, 32, 32), precision="fp16")
    with pytest.raises(CompanionError, match="without a tensor"):
        train.operator_precisions(model, "a picture")


# Gradients


def test_layer_gradients_are_those_of_autograd():
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model, x = nn.Sequential(first, nn.ReLU(), second), torch.rand(5, 3)
    with train.layer_gradients(model) as found:
        model(x).square().sum().backward()
    hidden = torch.relu(first(x)).detach().requires_grad_()
    outputs = second(hidden)
    outputs.retain_grad()
    outputs.square().sum().backward()
    assert set(found) == {"0", "1", "2"}
    assert torch.equal(found["2"], outputs.grad)
    assert torch.equal(found["1"], hidden.grad)
    assert torch.equal(found["0"], hidden.grad * (first(x) > 0))
    found.clear()
    model(x).sum().backward()
    assert not found, "the hooks outlived their context"


def test_rounded_gradients_go_down_rounded():
    """Two scalar layers: what the first one gets was rounded by the second."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in model:
        layer.weight.data.fill_(1.0)
    large, small = 1 + 2**-12, 2.0**-26
    for value, rounded in ((large, 1.0), (small, 0.0), (3 * 2.0**-26, 2.0**-24)):
        model.zero_grad()
        with train.layer_gradients(model, dtype=torch.float16) as found:
            (model(torch.ones(1, 1)) * value).sum().backward()
        assert found["1"].item() == found["0"].item() == rounded
        assert model[0].weight.grad.item() == model[1].weight.grad.item() == rounded
    model.zero_grad()
    with train.layer_gradients(model) as found:
        (model(torch.ones(1, 1)) * large).sum().backward()
    assert found["0"].item() == model[0].weight.grad.item() == torch.tensor(large).item()


floats = st.one_of(
    st.floats(width=32),
    st.sampled_from([2.0**-25, 2.0**-24, 2.0**-14, 65504.0, 65520.0, 65519.996, 2.0**-14 - 2.0**-25, 2.0**-126, 0.0]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(floats, min_size=1, max_size=40), st.sampled_from([1.0, 2.0**16, 2.0**-3, 3.0]))
def test_magnitudes_are_what_numpy_rounds_to(values, scale):
    array = np.array(values, dtype=np.float32)
    found = train.gradient_magnitudes([torch.from_numpy(array)], scale=scale)
    exact = np.abs(array.astype(np.float64)) * scale
    with np.errstate(over="ignore", invalid="ignore"):
        half = exact.astype(np.float16)  # directly, without float32 in between
    tiny = np.finfo(np.float16).smallest_normal
    assert found.zeros == int((exact == 0).sum())
    assert found.to_zero == int(((half == 0) & (exact != 0)).sum())
    assert found.to_subnormal == int(((half > 0) & (half < tiny)).sum())
    assert found.to_infinity == int((~np.isfinite(half)).sum())
    finite = exact[np.isfinite(exact) & (exact > 0)]
    for exponent, count in found.counts.items():
        assert count == int(((finite >= 2.0**exponent) & (finite < 2.0 ** (exponent + 1))).sum())
    assert sum(found.counts.values()) == len(finite)
    assert found.nonzero + found.zeros == len(array)


def test_scaling_moves_exponents_and_saves_what_was_lost():
    gradients = torch.tensor([0.0, 2.0**-30, 2.0**-20, 1.0])
    before, after = (train.gradient_magnitudes([gradients], scale=scale) for scale in (1.0, 2.0**10))
    assert before.counts == {-30: 1, -20: 1, 0: 1}
    assert after.counts == {-20: 1, -10: 1, 10: 1}
    assert (before.lost, before.subnormal, before.overflow) == pytest.approx((1 / 3, 1 / 3, 0))
    assert (after.lost, after.subnormal, after.overflow) == pytest.approx((0, 1 / 3, 0))
    assert train.gradient_magnitudes([gradients], format="bf16").lost == 0


def test_magnitudes_of_a_network_and_of_nothing():
    model = nn.Linear(3, 2)
    with pytest.raises(CompanionError, match=r"call backward\(\) first"):
        train.gradient_magnitudes(model)
    model(torch.ones(1, 3)).sum().backward()
    assert train.gradient_magnitudes(model).counts == {0: 8}
    with pytest.raises(CompanionError, match="scale is -1"):
        train.gradient_magnitudes(model, scale=-1)
    with pytest.raises(CompanionError, match="no number format 'fp8'"):
        train.gradient_magnitudes(model, format="fp8")
    none = train.gradient_magnitudes([torch.zeros(4)])
    assert (none.nonzero, none.lost, none.overflow) == (0, 0, 0)
