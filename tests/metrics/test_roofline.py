"""The roofline model by hand, its measurement with a counting clock, and (stress) its predictions on this machine."""

from itertools import count

import pytest
import torch
import torchvision
from torch import nn

from companion import CompanionError, metrics
from companion.metrics import roofline as module
from companion.metrics.roofline import Layer, Roof

ROOF = Roof("by hand", flops_per_second=100.0, bytes_per_second=10.0, source="made up")


def test_the_longer_of_arithmetic_and_memory_decides():
    assert ROOF.ridge == 10
    busy = metrics.Cost(macs=1000, bytes_moved=50)  # 2000 FLOPs: 20 s; 50 bytes: 5 s
    hungry = metrics.Cost(macs=100, bytes_moved=50)  # 200 FLOPs: 2 s; 5 s
    even = metrics.Cost(macs=250, bytes_moved=50)  # 5 s and 5 s
    assert [ROOF.seconds(cost) for cost in (busy, hungry, even)] == [20, 5, 5]
    assert [ROOF.bound(cost) for cost in (busy, hungry, even)] == ["arithmetic", "memory", "arithmetic"]


def test_a_layer_knows_what_it_reached():
    layer = Layer("a", "Linear", metrics.Cost(8, 1), predicted=0.5, bound="memory", measured=2.0)
    assert (layer.ratio, layer.flops_per_second) == (4, 8)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that moves by one second whenever it is looked at."""
    monkeypatch.setattr(module, "timer", count().__next__)


def test_measured_with_a_ticking_clock(ticking):
    shared = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(0, 2), shared, nn.ReLU(), shared
    )
    found = metrics.measure_roofline(model, torch.zeros(2, 3, 10, 10), rounds=3)
    # Probes: 2·512³ FLOPs for the matrix product, fewer for the convolution; 2 × 32 MiB for the stream; 1 s each.
    assert found.roof == Roof("this machine", 2 * 512**3, 2 * 4 * 2**23, "measured")
    first, second = (2 * 64 * 9 * 12, 4 * (600 + 108 + 4 + 512)), (2 * 36 * 9 * 4, 4 * (512 + 36 + 4 + 288))
    linear = (2 * 288 * 6, 2 * 4 * (288 + 36 + 6 + 288))  # called twice
    assert [(layer.name, layer.kind, layer.measured) for layer in found.layers] == [
        ("0", "Conv2d", 1), ("2", "depthwise Conv2d", 1), ("4", "Linear", 2),
    ]  # fmt: skip
    for layer, (macs, moved) in zip(found.layers, (first, second, linear), strict=True):
        assert layer.cost == metrics.Cost(macs, moved)
        assert layer.predicted == max(2 * macs / 2 / 512**3, moved / 2**26)
        assert layer.ratio == layer.measured / layer.predicted


def test_machine_with_a_ticking_clock_and_half_the_bytes(ticking):
    assert metrics.measure_roof(rounds=2, dtype=torch.bfloat16).bytes_per_second == 2 * 2 * 2**23


def test_network_and_threads_are_left_as_they_were(ticking):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    state = torch.get_rng_state()
    threads, mean = torch.get_num_threads(), model[1].running_mean.clone()
    metrics.measure_roofline(model, torch.ones(2, 3, 10, 10), rounds=1, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert model.training
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attention_is_one_layer_and_an_encoder_layer_runs_as_its_parts(ticking):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    found = metrics.measure_roofline(layer, torch.zeros(2, 5, 32), rounds=1)
    assert [(one.name, one.kind) for one in found.layers] == [
        ("self_attn", "MultiheadAttention"), ("linear1", "Linear"), ("linear2", "Linear"),
    ]  # fmt: skip
    assert torch.backends.mha.get_fastpath_enabled()


def test_work_without_a_layer_of_its_own_is_said(ticking):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.o(nn.functional.scaled_dot_product_attention(*[self.q(x)] * 3))

    found = metrics.measure_roofline(nn.Sequential(Attention()), torch.zeros(1, 16, 8), rounds=1)
    assert [layer.name for layer in found.layers] == ["0.q", "0.o"]
    linear, attention = 2 * 16 * 64, 2 * 16 * 16 * 8
    assert found.placed == linear / (linear + attention)


def test_a_network_of_one_layer(ticking):
    found = metrics.measure_roofline(nn.Linear(4, 6), torch.zeros(2, 4), rounds=1)
    assert [(layer.kind, layer.cost.macs) for layer in found.layers] == [("Linear", 48)]
    assert found.placed == 1


def test_accelerators_are_of_the_books_four_kinds_and_name_their_source():
    kinds = [roof.name.partition(":")[0] for roof in metrics.ACCELERATORS]
    assert kinds == ["GPU with Tensor Cores", "TPU", "FPGA", "ASIC"]
    for roof in metrics.ACCELERATORS:
        assert "20" in roof.source  # a year
        assert 1e12 < roof.flops_per_second < 1e16
        assert 1e11 < roof.bytes_per_second < 1e13


def test_bad_input_is_one_sentence():
    model, example = nn.Linear(4, 4), torch.zeros(2, 4)
    for call, message in [
        (lambda: metrics.measure_roofline(model, example, threads=0), "threads is 0"),
        (lambda: metrics.measure_roofline(model, example, rounds=0), "rounds is 0"),
        (lambda: metrics.measure_roof(threads=-1), "threads is -1"),
        (lambda: metrics.measure_roofline(model, torch.zeros(2, 3)), "cannot run"),
        (lambda: metrics.measure_roofline(nn.ReLU(), example), "no layer that multiplies"),
        (lambda: metrics.measure_roofline(model.to("meta"), example.to("meta")), "takes no time"),
        (lambda: metrics.measure_roof(device="meta"), "cannot be measured"),
        (lambda: metrics.measure_roof(dtype=torch.int8), "cannot be measured"),
        (lambda: metrics.measure_roof(device="nonsense"), "there is no device"),
        (lambda: metrics.measure_roof(rounds=1.5), "rounds is 1.5"),
    ]:
        with pytest.raises(CompanionError, match=message):
            call()


@pytest.mark.stress
def test_predicted_times_of_real_layers_are_within_a_factor_of_two():
    image = torch.randn(4, 3, 224, 224).to(memory_format=torch.channels_last)
    networks = [
        (torchvision.models.resnet18().to(memory_format=torch.channels_last), image),
        (torchvision.models.mobilenet_v2().to(memory_format=torch.channels_last), image),
        (nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), torch.randn(16, 64, 256)),
    ]

    def measured():
        layers = [
            layer
            for model, example in networks
            for layer in metrics.measure_roofline(model, example).layers
            if layer.measured > 100e-6 and layer.kind.endswith(("Conv2d", "Linear"))
        ]
        assert len(layers) > 50
        return {f"{layer.kind} {layer.name}": round(layer.ratio, 2) for layer in layers}

    def share(ratios):
        return sum(0.5 <= ratio <= 2 for ratio in ratios.values()) / len(ratios)

    # Quiet, 0.83 to 0.87 of them are. Other programs slow the roof or the layers, whichever they meet: three tries.
    tries = []
    while len(tries) < 3 and (not tries or share(tries[-1]) < 0.7):
        tries.append(measured())
    assert share(tries[-1]) >= 0.7, tries
