"""The grid is checked against torch's fake quantization, ONNX's operators run by two programs, and by hand."""

import copy
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from companion import CompanionError, compress, models
from companion.compress.quantization import FLOATS, Grid, grid_between
from companion.engines.fusion import fold_batch_norms

OBSERVERS = ("minmax", "percentile", "mse")
LARGE = 2.0**100
values = st.one_of(
    st.floats(-LARGE, LARGE, width=32), st.integers(-40, 40).map(lambda n: n / 4), st.floats(-3, 3, width=32)
)
widths = st.integers(2, 8)
moderate = st.floats(-1000, 1000, width=32)


@st.composite
def tensors(draw, elements=values):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements)))


@st.composite
def cases(draw, bits=widths):
    """A tensor, and a grid chosen for a shrunken copy of it, so that some of it is clipped."""
    x = draw(tensors())
    axis = draw(st.one_of(st.none(), st.integers(-x.ndim, x.ndim - 1)))
    grid = compress.observe(
        x * draw(st.sampled_from([1.0, 0.5, 0.01])),
        bits=draw(bits),
        symmetric=draw(st.booleans()),
        axis=axis,
        observer=draw(st.sampled_from(OBSERVERS)),
    )
    return x, grid


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert np.array_equal(a.numpy().view(np.uint8), b.numpy().view(np.uint8))


def torchs(x, grid):
    """torch's own fake quantization."""
    if grid.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, grid.low, grid.high)
    axis = grid.axis % x.ndim
    return torch.fake_quantize_per_channel_affine(x, grid.scale, grid.zero_point, axis, grid.low, grid.high)


@settings(deadline=None, max_examples=300)
@given(cases(), st.integers(0, 99))
def test_value_and_gradient_are_those_of_torch(case, seed):
    x, grid = case
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = compress.fake_quantize(ours, grid), torchs(theirs, grid)
    same_bits(a.detach(), b.detach())
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    a.backward(gradient)
    b.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def onnx_model(shape, grid):
    """QuantizeLinear, then DequantizeLinear, on a grid of 8 bits."""
    kind = TensorProto.INT8 if grid.signed else TensorProto.UINT8
    axis = {} if grid.axis is None else {"axis": grid.axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **axis),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **axis),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("q", kind, shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
        ],
        [
            numpy_helper.from_array(grid.scale.numpy(), "scale"),
            numpy_helper.from_array(grid.zero_point.numpy().astype(np.int8 if grid.signed else np.uint8), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def by_onnxruntime(model, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def by_reference(model, x):
    return ReferenceEvaluator(model).run(None, {"x": x})


@pytest.mark.parametrize("run", [by_onnxruntime, by_reference])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_integers_are_those_of_onnx(run, data):
    x, grid = data.draw(cases(st.just(8)))
    if grid.signed:  # ONNX's int8 begins at −128, our symmetric grid at −127
        grid = Grid(grid.scale, grid.zero_point, -128, 127, grid.axis)
    if run is by_reference:
        reach = 2.0**30 * float(grid.scale.min())  # it goes by way of int32
        x = x.clamp(-reach, reach)
    q, y = run(onnx_model(x.shape, grid), x.numpy())
    ours = compress.quantize(x, grid)
    same_bits(ours, torch.from_numpy(q))
    same_bits(compress.dequantize(ours, grid), torch.from_numpy(y))


def test_dividing_and_multiplying_by_the_reciprocal_part_at_ties():
    scale, x = torch.tensor(0.7782217860221863), torch.tensor([43.96953201293945])
    grid = Grid(scale, torch.tensor(0, dtype=torch.int32), 0, 255)
    assert [int(compress.quantize(x, grid, like=name)) for name in ("onnx", "torch")] == [56, 57]
    assert by_onnxruntime(onnx_model([1], grid), x.numpy())[0].tolist() == [56]
    assert torchs(x, grid) == 57 * scale


def test_an_affine_grid_by_hand():
    grid = compress.observe(torch.tensor([-1.0, 0.0, 2.0]), bits=2)
    assert (grid.scale, grid.zero_point, grid.low, grid.high, grid.bits, grid.signed) == (1, 1, 0, 3, 2, False)
    assert grid.values.tolist() == [-1, 0, 1, 2]
    x = torch.tensor([-9.0, -0.6, 0.5, 0.6, 1.5, 9.0])  # halves go to the even integer: 0 + 1 → 1, 2 + 1 → 3
    assert compress.quantize(x, grid).tolist() == [0, 0, 1, 2, 3, 3]
    assert compress.fake_quantize(x, grid).tolist() == [-1, -1, 0, 1, 2, 2]


def test_a_symmetric_grid_by_hand():
    grid = compress.observe(torch.tensor([[-6.0, 3.0], [0.0, 0.0], [0.1, 0.7]]), bits=4, symmetric=True, axis=0)
    torch.testing.assert_close(grid.scale, torch.tensor([6 / 7, 1, 0.1]))
    assert (grid.low, grid.high, grid.bits, grid.signed, grid.axis) == (-7, 7, 4, True, 0)
    q = compress.quantize(torch.tensor([[-6.0, 3.0], [0.2, -0.8], [0.1, 0.7]]), grid)
    assert q.dtype == torch.int8
    assert q.tolist() == [[-7, 4], [0, -1], [1, 7]]  # 3 / (6/7) = 3.5 → 4


def test_two_bits_are_three_symmetric_numbers():
    assert compress.observe(torch.tensor([-3.0, 1.0]), bits=2, symmetric=True).values.tolist() == [-3, 0, 3]


@settings(deadline=None)
@given(cases())
def test_zero_is_on_every_grid_and_numbers_on_it_stay(case):
    x, grid = case
    assert (compress.fake_quantize(torch.zeros_like(x), grid) == 0).all()
    once = compress.dequantize(compress.quantize(x, grid), grid)
    assert torch.equal(compress.dequantize(compress.quantize(once, grid), grid), once)
    assert 2 ** (grid.bits - 1) <= grid.high - grid.low + 1 <= 2**grid.bits


@settings(deadline=None)
@given(tensors(moderate), st.integers(2, 8), st.booleans())
def test_within_the_extremes_the_error_is_at_most_a_step(x, bits, symmetric):
    grid = compress.observe(x, bits=bits, symmetric=symmetric)
    error = (compress.fake_quantize(x, grid) - x).abs().max()
    # Half a step for rounding; the zero point was rounded too, by at most another half.
    assert error <= grid.scale * (0.5 if symmetric else 1.0) * (1 + 1e-4)


@settings(deadline=None, max_examples=50)
@given(tensors(moderate), st.integers(2, 8), st.booleans(), st.booleans())
def test_least_squares_is_never_worse_than_the_extremes(x, bits, symmetric, channels):
    def error(observer):
        grid = compress.observe(x, bits=bits, symmetric=symmetric, axis=0 if channels else None, observer=observer)
        return (compress.fake_quantize(x, grid) - x).double().square().sum()

    assert error("mse") <= error("minmax") * (1 + 1e-6)


def test_observers_and_an_outlier():
    x = torch.cat([torch.linspace(-1, 1, 1999), torch.tensor([100.0])])
    top = {name: float(compress.observe(x, bits=4, observer=name).values.max()) for name in OBSERVERS}
    assert top["minmax"] == pytest.approx(100, rel=0.1)
    assert top["percentile"] == pytest.approx(1, rel=0.2)
    # To lose the outlier costs 99², more than the 1,999 others can: their squares sum to 667.
    assert top["percentile"] < top["mse"] <= top["minmax"]


def test_percentile_keeps_the_ranks_between():
    x = torch.arange(-100.0, 101.0)
    grid = compress.observe(x, bits=8, observer="percentile", percentile=90)
    assert float(grid.values[-1] - grid.values[0]) == pytest.approx(160)  # from −80 to 80


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-42, 1e37])
def test_constants_and_single_elements(value, observer, symmetric):
    for x in (torch.tensor(value), torch.full((1,), value), torch.full((3, 2), value)):
        grid = compress.observe(x, symmetric=symmetric, observer=observer)
        found = compress.fake_quantize(x, grid)
        torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-38)


def test_gradient_of_the_step_is_torchs():
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 5, 6)
    for axis, shape in ((None, ()), (1, (5,))):
        scale = (0.1 + torch.rand(shape)).requires_grad_()
        zero = torch.full(shape, 3, dtype=torch.int32)
        gradient = torch.randn(x.shape)
        compress.fake_quantize(x, Grid(scale, zero, 0, 15, axis)).backward(gradient)
        theirs = scale.detach().clone().reshape(-1).requires_grad_()
        zeros = zero.float().reshape(-1)
        if axis is None:
            out = torch._fake_quantize_learnable_per_tensor_affine(x, theirs, zeros, 0, 15)
        else:
            out = torch._fake_quantize_learnable_per_channel_affine(x, theirs, zeros, axis, 0, 15)
        out.backward(gradient)
        torch.testing.assert_close(scale.grad.reshape(-1), theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_keep_their_type(dtype):
    x = torch.linspace(-1, 1, 21, dtype=dtype)
    grid = compress.observe(x)
    found = compress.fake_quantize(x, grid)
    assert found.dtype == dtype
    assert torch.equal(found, compress.fake_quantize(x.to(torch.promote_types(dtype, torch.float32)), grid).to(dtype))


def test_sqnr_by_hand():
    reference = torch.tensor([3.0, 4.0])
    assert compress.sqnr(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20)  # 25 / 0.25
    assert compress.sqnr(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(0)
    assert compress.sqnr(reference, reference.clone()) == math.inf
    assert compress.sqnr(torch.zeros(2), reference) == -math.inf


def test_each_bit_is_worth_six_decibels():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    found = [compress.sqnr(x, compress.fake_quantize(x, compress.observe(x, bits=bits))) for bits in range(2, 9)]
    steps = np.diff(found)
    # Bennett: error variance step²/12, and the steps are 2^bits − 1 to the range.
    expected = [20 * math.log10((2 ** (b + 1) - 1) / (2**b - 1)) for b in range(2, 8)]
    np.testing.assert_allclose(steps, expected, atol=0.1)


def net():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(2, 5),
    )
    return nn.Sequential(*layers).eval()


def levels(weight, axis):
    """How many different numbers the channels have at most."""
    return max(len(row.unique()) for row in weight.detach().movedim(axis, 0).flatten(1))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_lie_on_the_grid_and_the_argument_is_unchanged(bits, per_channel):
    model = models.create("cifar_resnet14", width=4, seed=0)
    before = copy.deepcopy(model.state_dict())
    found = compress.quantize_weights(model, bits=bits, per_channel=per_channel)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert models.describe(found) == models.describe(model)
    changed = 0
    for (name, a), (_, b) in zip(model.named_modules(), found.named_modules(), strict=True):
        if isinstance(a, nn.Conv2d | nn.Linear):
            axis = 0 if per_channel else None
            expected = compress.fake_quantize(
                a.weight, compress.observe(a.weight, bits=bits, symmetric=True, axis=axis)
            )
            assert torch.equal(b.weight, expected), name
            assert (levels(b.weight, 0) if per_channel else len(b.weight.unique())) <= 2**bits - 1
            changed += 1
        elif not list(a.children()):
            assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert changed == 16


def test_transposed_convolutions_have_their_channels_second():
    model = nn.ConvTranspose2d(3, 4, 2)
    model.weight.data[:, 1] *= 1000
    found = compress.quantize_weights(model)
    for channel in range(4):
        assert compress.sqnr(model.weight[:, channel], found.weight[:, channel]) > 35


def test_excluded_layers_stay_as_they_are():
    model = net()
    found = compress.quantize_weights(model, 2, exclude=("0", "5"))
    assert [torch.equal(model[i].weight, found[i].weight) for i in (0, 3, 5)] == [True, False, True]


def test_quantized_again_nothing_changes():
    once = compress.quantize_weights(net(), 4)
    twice = compress.quantize_weights(once, 4)
    for i in (0, 3, 5):
        torch.testing.assert_close(twice[i].weight, once[i].weight)


def test_a_scale_per_channel_does_not_mind_when_normalisations_are_folded():
    torch.manual_seed(0)
    folded = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    for tensor in (folded[1].weight, folded[1].bias, folded[1].running_mean, folded[1].running_var):
        nn.init.uniform_(tensor, 0.2, 2)
    x = torch.randn(2, 3, 6, 6)
    before = compress.quantize_weights(folded, 4)
    assert fold_batch_norms(folded, x) == 1
    with torch.no_grad():
        torch.testing.assert_close(compress.quantize_weights(folded, 4)(x), before(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "digits"), [("fp16", 11), ("bf16", 8), ("fp8_e4m3", 4), ("fp8_e5m2", 3)])
def test_low_bit_floats_round_to_as_many_binary_digits(name, digits):
    model = nn.Linear(64, 8)
    found = compress.quantize_weights(model, name)
    error = ((found.weight - model.weight) / model.weight).abs()
    large = model.weight.abs() > 0.02  # not among the denormal numbers
    assert 2.0**-digits / 8 < error[large].max() <= 2.0**-digits * 1.001
    if name in ("fp16", "bf16"):
        assert torch.equal(found.weight, model.weight.to(FLOATS[name]).float())


def test_8_bit_floats_reach_the_largest_weight():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[1e4, -1.0, 3.0], [0.0, 0.0, 0.0]])
    for name in ("fp8_e4m3", "fp8_e5m2"):
        found = compress.quantize_weights(model, name).weight.detach()
        assert found[0, 0] == pytest.approx(1e4)
        assert (found[1] == 0).all()


def broken(value):
    model = net()
    model[0].weight.data[0, 0, 0, 0] = value
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress.quantize_weights(net(), 0), "bits is 0: give a whole number from 2 to 8"),
        (lambda: compress.quantize_weights(net(), 1), "bits is 1"),
        (lambda: compress.quantize_weights(net(), 9), "bits is 9"),
        (lambda: compress.quantize_weights(net(), 4.0), "bits is 4.0"),
        (lambda: compress.quantize_weights(net(), True), "bits is True"),
        (lambda: compress.quantize_weights(net(), "int3"), "fp8_e5m2"),
        (lambda: compress.quantize_weights(net(), [4]), "bits is"),
        (lambda: compress.quantize_weights(net(), observer="max"), "no observer 'max'"),
        (lambda: compress.quantize_weights(net(), percentile=50), "percentile is 50"),
        (lambda: compress.quantize_weights(net(), exclude=["7"]), "no layer '7' to exclude: choose among 0, 3, 5"),
        (lambda: compress.quantize_weights(net(), exclude=["0", "3", "5"]), "no convolution or linear layer"),
        (lambda: compress.quantize_weights(nn.ReLU()), "no convolution or linear layer"),
        (lambda: compress.quantize_weights("net"), "a network"),
        (lambda: compress.quantize_weights(nn.LazyLinear(3)), "lazy"),
        (
            lambda: compress.quantize_weights(broken(math.nan)),
            "the weight of 0 cannot be quantized: the tensor holds NaN",
        ),
        (lambda: compress.quantize_weights(broken(math.inf), "bf16"), "the weight of 0 cannot be quantized"),
        (lambda: compress.quantize_weights(broken(1e5), "fp16"), "larger than 65504"),
        (lambda: compress.quantize_weights(net(), backend="other"), "no backend 'other'"),
        (lambda: compress.observe(torch.tensor([math.nan])), "NaN or infinite"),
        (lambda: compress.observe(torch.empty(0)), "no values"),
        (lambda: compress.observe(torch.ones(2, 3), axis=2), "no dimension 2"),
        (lambda: compress.observe(torch.ones(2), bits=0), "bits is 0"),
        (lambda: compress.quantize(torch.ones(3, 2), compress.observe(torch.ones(2, 2), axis=0)), "2 channels"),
        (lambda: compress.quantize(torch.ones(1), compress.observe(torch.ones(1)), like="numpy"), "onnx or torch"),
        (lambda: compress.quantize(torch.tensor(math.inf), compress.observe(torch.ones(1))), "NaN or infinite"),
        (lambda: compress.sqnr(torch.ones(2), torch.ones(3)), "one shape"),
        (lambda: compress.sqnr(torch.ones(1), torch.tensor([math.nan])), "NaN"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(call, message):
    with pytest.raises(CompanionError) as refused:
        call()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def test_grids_wider_than_float32_can_subtract():
    grid = grid_between(torch.tensor(-3e38), torch.tensor(3e38), bits=8)
    assert float(grid.scale) == pytest.approx(6e38 / 255)


def test_torchao_stores_what_we_compute():
    pytest.importorskip("torchao", reason="the optional backend torchao is not installed")
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    for bits in (8, 4):
        ours, theirs = (compress.quantize_weights(model, bits, backend=name)(x) for name in ("companion", "torchao"))
        # Its symmetric grid has one number more below zero, so the steps differ a little.
        assert compress.sqnr(ours, theirs) > 6 * bits - 20
    assert torch.equal(x, kept)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(CompanionError, match="linear layers only"):
        compress.quantize_weights(nn.Conv2d(3, 3, 3), backend="torchao")


def test_without_torchao_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(CompanionError, match="pip install torchao"):
        compress.quantize_weights(net(), backend="torchao")


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.tensor([1e300], dtype=torch.float64), "NaN or infinite"),  # no scale in float32 reaches it
        (torch.tensor([1 + 1j]), "complex"),
    ],
)
def test_numbers_without_a_grid(x, says):
    with pytest.raises(CompanionError, match=says):
        compress.observe(x)
