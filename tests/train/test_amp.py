"""One policy for number formats, and a loss scaler that does what torch's does."""

import contextlib
import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from companion import CompanionError, datasets, models, train
from companion.train.amp import BF16_INSTRUCTIONS, Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# The policy


def test_a_device_may_be_named_or_left_to_choose():
    assert Precision.named("bf16", "cpu") == Precision("bf16", CPU)
    assert Precision.named("fp32").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(CompanionError, match="no device 'abacus'"):
        Precision.named("fp32", "abacus")


def test_unknown_names_and_formats_without_a_machine_are_refused():
    with pytest.raises(CompanionError, match="no precision 'fp8': choose one of fp32, tf32, bf16, fp16"):
        Precision.named("fp8", CPU)
    with pytest.raises(CompanionError, match="fp16 trains on a GPU only"):
        Precision.named("fp16", CPU)
    for device in (CPU, torch.device("mps")):
        with pytest.raises(
            CompanionError, match=f"NVIDIA GPUs multiply float32: on the device {device.type} choose fp32"
        ):
            Precision.named("tf32", device)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_in_the_format_and_weights_and_losses_are_not(name, dtype):
    linear, x = nn.Linear(4, 3), torch.rand(2, 4)
    policy = Precision.named(name, CPU)
    with policy.arithmetic(), policy.autocast():
        outputs = linear(x)
        loss = nn.functional.cross_entropy(outputs, torch.tensor([0, 1]))
    loss.backward()
    assert outputs.dtype == dtype
    assert loss.dtype == linear.weight.dtype == linear.weight.grad.dtype == torch.float32


def test_only_fp16_scales_its_loss():
    assert [name for name in ("fp32", "tf32", "bf16", "fp16") if Precision(name, CPU).scaler().is_enabled()] == ["fp16"]


def switches():
    return [s.fp32_precision for s in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)]


@pytest.mark.parametrize(("name", "wanted"), [("fp32", "ieee"), ("bf16", "ieee"), ("fp16", "ieee"), ("tf32", "tf32")])
def test_arithmetic_sets_how_a_gpu_multiplies_and_puts_it_back(name, wanted):
    # The switches exist without a GPU, too. torch's own setting of convolutions is TF32.
    before = switches()
    assert before == ["none", "tf32", "tf32"]
    with contextlib.suppress(KeyError), Precision(name, CUDA).arithmetic():
        assert switches() == [wanted] * 3
        raise KeyError
    assert switches() == before
    assert torch.backends.cudnn.allow_tf32  # the old switch cannot be read unless the new ones agree


def test_arithmetic_of_the_cpu_is_left_alone():
    before = switches()
    with Precision("fp32", CPU).arithmetic():
        assert switches() == before


def test_advice_of_a_cpu_depends_on_its_instructions(monkeypatch):
    assert Precision("fp32", CPU).advice == ""
    for found, pays in (({}, False), *(({name: True}, True) for name in BF16_INSTRUCTIONS)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        advice = Precision("bf16", CPU).advice
        assert advice == (
            "" if pays else "bf16 costs time on this CPU, which has no instructions for it: fp32 is faster."
        )


def test_the_system_knows_of_the_same_instructions():
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\nflags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    if not flags:
        pytest.skip("this system does not list the instructions of its CPU as Linux does on x86")
    assert (Precision("bf16", CPU).advice == "") == ("avx512_bf16" in flags or "amx_bf16" in flags)


@pytest.mark.parametrize(
    ("capability", "good"),
    [((6, 1), {"fp32"}), ((7, 5), {"fp32", "fp16"}), ((8, 0), {"fp32", "tf32", "bf16", "fp16"})],
)
def test_advice_of_a_gpu_depends_on_its_age(monkeypatch, capability, good):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    advice = {name: Precision(name, CUDA).advice for name in ("fp32", "tf32", "bf16", "fp16")}
    assert {name for name in advice if not advice[name]} == good
    assert all(text.startswith(name) and text.endswith(".") for name, text in advice.items() if text)


@pytest.mark.gpu
@needs_gpu
def test_fp32_on_a_gpu_is_ieee_and_tf32_is_not():
    torch.manual_seed(0)
    convolution = nn.Conv2d(64, 64, 3, bias=False)
    x = torch.randn(8, 64, 16, 16)
    exact = convolution.double()(x.double())
    errors = {}
    for name in ("fp32", "tf32"):
        with Precision.named(name, CUDA).arithmetic():
            found = copy.deepcopy(convolution).float().to(CUDA)(x.to(CUDA))
        errors[name] = ((found.double().cpu() - exact).norm() / exact.norm()).item()
    assert errors["fp32"] < 2e-6
    assert 1e-5 < errors["tf32"] < 2e-3  # half of tf32's epsilon is 5e-4


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_learns_on_a_gpu(precision):
    data = torch.utils.data.Subset(datasets.load("digits", split="train"), range(512))
    model = models.create("simple_cnn", labels=data.dataset.labels, seed=0)
    train.fit(model, data, epochs=5, precision=precision, device="cuda", validation=0, progress=False)
    assert train.evaluate(model, data, precision=precision, device="cuda", progress=False).main > 0.8


# The loss scaler

gradients = st.sampled_from(["finite", "finite", "finite", "inf", "-inf", "nan"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(gradients, gradients), min_size=1, max_size=30),
    st.sampled_from([1.0, 2.0**16, 3.7, 1e-3, 2.0**127]),
    st.sampled_from([2.0, 1.3, 1e3]),
    st.sampled_from([0.5, 0.3]),
    st.integers(1, 4),
    st.booleans(),
)
@example([("finite", "finite")] * 8, 2.0**127, 2.0, 0.5, 1, False)  # grows as far as float32 reaches
def test_equals_torchs_scaler_step_for_step(sequence, init_scale, growth, backoff, interval, clips):
    options = {"growth_factor": growth, "backoff_factor": backoff, "growth_interval": interval}
    ours = train.LossScaler(init_scale, **options)
    theirs = torch.amp.GradScaler("cpu", init_scale=init_scale, **options)
    torch.manual_seed(0)
    networks = [nn.Linear(3, 2)]
    networks.append(copy.deepcopy(networks[0]))
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.1) for network in networks]
    for number, kinds in enumerate(sequence):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        before = networks[0].weight.detach().clone()
        for scaler, network, optimizer in zip((ours, theirs), networks, optimizers, strict=True):
            optimizer.zero_grad()
            scaler.scale(network(x).square().mean()).backward()
            for parameter, kind in zip(network.parameters(), kinds, strict=True):
                if kind != "finite":
                    parameter.grad.view(-1)[-1] = float(kind)
            overflowed = any(not p.grad.isfinite().all() for p in network.parameters())
            if clips:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert ours.factor == theirs.get_scale()
        assert ours.good_steps == theirs._get_growth_tracker()
        for mine, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            assert torch.equal(mine, other)
            assert torch.equal(mine.grad, other.grad) or mine.grad.isnan().any()
        if overflowed:
            assert torch.equal(networks[0].weight, before)


def test_factor_over_time_by_hand():
    scaler = train.LossScaler(8.0, growth_interval=2)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    factors = []
    for gradient in (1.0, 1.0, math.inf, 1.0, math.nan, 1.0, 1.0):
        weight.grad = torch.full((1,), gradient)
        scaler.step(optimizer)
        scaler.update()
        factors.append(scaler.factor)
    assert factors == [8, 16, 8, 8, 4, 4, 8]
    assert weight.item() == -(1 / 8 + 1 / 8 + 1 / 8 + 1 / 4 + 1 / 4)


def test_scaling_saves_a_gradient_that_float16_would_lose():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for factor, moved in ((1.0, 0.0), (2.0**16, 2.0**-26)):
        weight.data.fill_(0)
        optimizer.zero_grad()
        scaler = train.LossScaler(factor)
        half = weight.to(torch.float16)  # its gradient comes back in float16
        scaler.scale(half.float() * 2.0**-26).sum().backward()
        scaler.step(optimizer)
        assert -weight.item() == moved


def test_calls_out_of_order_are_refused():
    scaler, optimizer = train.LossScaler(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(CompanionError, match="call step"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(CompanionError, match="unscaled already"):
        scaler.unscale_(optimizer)


def test_a_network_that_always_overflows_ends_in_a_sentence():
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), math.nan)
    scaler, optimizer = train.LossScaler(2.0**-148), torch.optim.SGD([weight], lr=1.0)
    scaler.step(optimizer)
    scaler.update()
    scaler.step(optimizer)
    with pytest.raises(CompanionError, match="has diverged"):
        scaler.update()
    assert weight.item() == 0
