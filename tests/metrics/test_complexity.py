import os
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from companion import CompanionError, metrics, models


def test_parameters_of_a_linear_layer_by_hand():
    assert metrics.count_parameters(nn.Linear(3, 5)) == 3 * 5 + 5


def test_a_tied_parameter_counts_once():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert metrics.count_parameters(nn.Sequential(a, b)) == 16
    assert metrics.model_bytes(nn.Sequential(a, b)) == 64


def test_frozen_parameters_can_be_left_out():
    layer = nn.Linear(3, 5)
    layer.bias.requires_grad_(False)
    assert metrics.count_parameters(layer, trainable_only=True) == 15
    assert metrics.count_parameters(layer) == 20


def test_buffers_are_bytes_but_not_parameters():
    norm = nn.BatchNorm2d(8)  # weight, bias, mean, variance: 8 float32 each; a step counter: one int64
    assert metrics.count_parameters(norm) == 16
    assert metrics.model_bytes(norm) == 4 * 8 * 4 + 8


def test_bytes_follow_the_number_format():
    assert metrics.model_bytes(nn.Linear(3, 5).to(torch.bfloat16)) == 20 * 2


def test_views_of_one_storage_count_once():
    module = nn.Module()
    base = torch.zeros(10)
    module.register_buffer("a", base[:5])
    module.register_buffer("b", base[5:])
    assert metrics.model_bytes(module) == 40


def test_meta_tensors_do_not_share_memory():
    with torch.device("meta"):
        model = models.create("simple_cnn")
    assert metrics.model_bytes(model) == metrics.model_bytes(models.create("simple_cnn"))


def test_bytes_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 123)
    assert metrics.model_bytes(path) == metrics.model_bytes(str(path)) == 123
    model = models.create("simple_cnn")
    models.save(model, path)
    assert 0 < metrics.model_bytes(path) - metrics.model_bytes(model) < 4096  # the header


def test_missing_file():
    with pytest.raises(CompanionError, match="no file"):
        metrics.model_bytes("nowhere.safetensors")


# Counts. Expected values are computed here from the shapes, or published.

IMAGE = torch.zeros(1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 1814.1), ("resnet50", 4089.2), ("mobilenet_v2", 300.8), ("vit_b_16", 17_564)],
)
def test_macs_of_torchvision_networks(name, millions):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert metrics.count_macs(model, IMAGE) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert metrics.count_flops(model, IMAGE) == 2 * metrics.count_macs(model, IMAGE)


def macs(model, *shape):
    return metrics.count_macs(model, torch.zeros(shape))


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(3, 5), (7, 3), 7 * 3 * 5),
        (nn.Linear(3, 5), (2, 7, 3), 2 * 7 * 3 * 5),
        # out positions × taps × channels in × channels out
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 12), 2 * 10 * 12 * 9 * 3 * 8),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), (1, 4, 10, 10), 5 * 5 * 9 * 4 * 8),
        (nn.Conv2d(4, 8, 3, dilation=2), (1, 4, 10, 10), 6 * 6 * 9 * 4 * 8),
        (nn.Conv2d(4, 8, (1, 3)), (1, 4, 10, 10), 10 * 8 * 3 * 4 * 8),
        # of g groups, each output channel sees a g-th of the inputs
        (nn.Conv2d(8, 16, 3, groups=4, padding=1), (1, 8, 6, 6), 36 * 9 * 2 * 16),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (1, 8, 6, 6), 36 * 9 * 8),
        # transposed: each input position touches every tap, so the *input's* size counts
        (nn.ConvTranspose2d(3, 5, 3, stride=2), (1, 3, 8, 8), 64 * 9 * 3 * 5),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 8, 8), 64 * 9 * 4 * 3),
        (nn.Conv1d(2, 3, 5), (1, 2, 20), 16 * 5 * 2 * 3),
        (nn.Conv3d(2, 3, 3), (1, 2, 5, 6, 7), 3 * 4 * 5 * 27 * 2 * 3),
        # four gates, each from the input and from the state, at every step
        (nn.LSTM(6, 10, batch_first=True), (3, 7, 6), 3 * 7 * 4 * (6 * 10 + 10 * 10)),
        (nn.LSTM(6, 10, num_layers=2, bidirectional=True), (7, 3, 6), 3 * 7 * 2 * 4 * (6 * 10 + 100 + 20 * 10 + 100)),
        (nn.GRU(6, 10, batch_first=True), (3, 7, 6), 3 * 7 * 3 * (6 * 10 + 10 * 10)),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 0),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Softmax(1)), (1, 4, 6, 6), 0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_macs_of_layers_by_hand(layer, shape, expected):
    assert macs(layer, *shape) == macs(layer.eval(), *shape) == expected


def encoder_macs(batch, length, width, hidden):
    """Query, key, value and output projections; scores and their weighted sum; two layers of the feed-forward part."""
    return batch * (4 * length * width**2 + 2 * length**2 * width + 2 * length * width * hidden)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_macs_of_an_encoder_layer_by_hand(training, heads):
    layer = nn.TransformerEncoderLayer(256, heads, dim_feedforward=512, batch_first=True).train(training)
    assert macs(layer, 2, 64, 256) == encoder_macs(2, 64, 256, 512)
    attention = nn.MultiheadAttention(32, heads)
    example = (torch.zeros(9, 2, 32),) * 3
    assert metrics.count_macs(attention.train(training), example) == 2 * (4 * 9 * 32**2 + 2 * 81 * 32)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


A, B = torch.zeros(4, 5), torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("function", "example", "expected"),
    [
        (lambda a, b: torch.einsum("ij,jk->ik", a, b), (A, B), 4 * 5 * 6),
        (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (torch.zeros(3, 4, 5), torch.zeros(3, 7, 5)), 3 * 4 * 5 * 7),
        (lambda a, b: a @ b, (A, B), 4 * 5 * 6),
        (lambda a, b: a @ b[:, 0], (A, B), 4 * 5),
        (lambda a, b: a[0] @ b[:, 0], (A, B), 5),
        (lambda a, b: torch.addmv(a[:, 0], a, b[:, 0]), (A, B), 4 * 5),
        (nn.functional.scaled_dot_product_attention, (torch.zeros(2, 3, 8, 4),) * 3, 2 * 3 * 2 * 8 * 8 * 4),
        (lambda x: x + 1, A, 0),
    ],
)
def test_macs_of_functions_without_a_layer(function, example, expected):
    assert metrics.count_macs(Function(function), example) == expected


def test_a_module_called_twice_counts_twice_and_tied_weights_are_stored_once():
    layer = nn.Linear(8, 8, bias=False)
    found = metrics.count_complexity(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 8))
    assert (found.macs, found.parameters) == (2 * 3 * 64, 64)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.scores = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.scores.weight = self.words.weight

        def forward(self, ids):
            return self.scores(self.words(ids))

    found = metrics.count_complexity(Tied(), torch.zeros(3, dtype=torch.int64))
    assert (found.macs, found.parameters) == (3 * 8 * 20, 160)


def test_by_module_and_by_operator():
    model = nn.Sequential(
        OrderedDict(body=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()), head=nn.Linear(100, 2))
    )
    found = metrics.count_complexity(model, torch.zeros(1, 3, 5, 5))
    conv, linear = 25 * 3 * 4, 200
    assert {name: cost.macs for name, cost in found.by_module.items()} == {
        "body": conv, "body.0": conv, "body.1": 0, "body.2": 0, "head": linear,
    }  # fmt: skip
    assert {name: cost.macs for name, cost in found.by_operator.items() if cost.macs} == {
        "aten::convolution": conv, "aten::addmm": linear,
    }  # fmt: skip
    assert found.macs == conv + linear
    assert found.uncounted == ()


def test_bytes_moved_and_intensity_by_hand():
    # Reads input, weights and bias, writes the output: float32.
    found = metrics.count_complexity(nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 5, 5))
    assert found.bytes_moved == 4 * (2 * 3 * 25 + 12 + 4 + 2 * 4 * 25)
    assert found.intensity == 2 * (2 * 25 * 12) / found.bytes_moved
    # ReLU reads and writes; flatten is a view and free; half the bytes in bfloat16.
    relu = nn.Sequential(nn.ReLU(), nn.Flatten())
    assert metrics.count_complexity(relu, torch.zeros(1, 10, 10)).bytes_moved == 2 * 400
    assert metrics.count_complexity(relu, torch.zeros(1, 10, 10, dtype=torch.bfloat16)).bytes_moved == 2 * 200
    # An expanded tensor is read once, however many elements it shows.
    assert metrics.count_complexity(Function(lambda x: x.expand(100, 10) + 1), torch.zeros(10)).bytes_moved == 40 + 4000


def test_bytes_moved_of_look_ups_and_copies():
    # 3 rows of 64 numbers read and written, and their 3 indices: not the table of 100,000.
    found = metrics.count_complexity(nn.Embedding(100_000, 64), torch.zeros(3, dtype=torch.int64))
    assert found.bytes_moved == 2 * 3 * 64 * 4 + 3 * 8
    assert metrics.count_complexity(Function(lambda x: torch.empty(10).copy_(x)), torch.ones(10)).bytes_moved == 80


@pytest.mark.parametrize("groups", [1, 4])
def test_a_training_step_costs_three_passes_and_the_first_layer_two(groups):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    )
    first, second = 36 * 9 * 4 * 8, 36 * 9 * 8 * (8 // groups)
    found = metrics.count_complexity(model, torch.zeros(1, 4, 6, 6), training=True)
    assert found.macs == 2 * first + 3 * second
    assert metrics.count_macs(model, torch.zeros(1, 4, 6, 6, requires_grad=True), training=True) == 3 * (first + second)
    mlp = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    assert metrics.count_macs(mlp, torch.zeros(3, 5), training=True) == 3 * (2 * 35 + 3 * 14)
    transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    example = torch.zeros(1, 4, 8, 8, requires_grad=True)
    assert metrics.count_macs(transposed, example, training=True) == 3 * 64 * 9 * 4 * 3


def test_modules_of_a_training_step_are_those_of_its_forward_pass():
    model = torchvision.models.resnet18()
    example = torch.zeros(2, 3, 64, 64)
    forward, step = (metrics.count_complexity(model, example, training=training) for training in (False, True))
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    for found in (forward, step):
        assert sum(found.by_module[name].macs for name in leaves if name in found.by_module) == forward.macs
    assert sum(cost.macs for cost in step.by_operator.values()) == step.macs > 2.9 * forward.macs


def test_frozen_layers_cost_no_weight_gradients():
    mlp = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    mlp[0].requires_grad_(False)  # nothing below the second layer needs a gradient: only its weights' is left
    assert metrics.count_macs(mlp, torch.zeros(3, 5), training=True) == 3 * (35 + 2 * 14)


# fvcore, which traces the network on the CPU, is right about convolutions and linear layers...


def fvcore_counts(model, example):
    with warnings.catch_warnings():  # it is built on TorchScript, which is deprecated
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model.eval(), example)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return dict(analysis.by_operator()), set(analysis.unsupported_ops())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"])
def test_equal_to_fvcore_where_it_counts_products(name):
    model = getattr(torchvision.models, name)(weights=None)
    theirs, _ = fvcore_counts(model, IMAGE)
    # ...what it adds for normalisation and pooling is no multiply–add of a product.
    assert set(theirs) <= {"conv", "linear", "batch_norm", "adaptive_avg_pool2d"}
    assert metrics.count_macs(model, IMAGE) == theirs["conv"] + theirs["linear"]


def test_fvcore_misses_attention_and_lstms():
    vit = torchvision.models.vit_b_16(weights=None)
    theirs, missed = fvcore_counts(vit, IMAGE)
    assert "aten::scaled_dot_product_attention" in missed
    attention = 12 * 2 * 197**2 * 768  # 12 layers of scores and weighted sums over 197 tokens
    assert metrics.count_macs(vit, IMAGE) == theirs["conv"] + theirs["linear"] + attention
    lstm, x = nn.LSTM(6, 10), torch.zeros(7, 3, 6)
    assert fvcore_counts(lstm, x) == ({}, {"aten::lstm"})
    assert metrics.count_macs(lstm, x) == 7 * 3 * 4 * (6 * 10 + 10 * 10)


# Any network


def test_caller_is_left_alone():
    class Restless(nn.Module):
        """Draws, counts its calls in a buffer, replaces a buffer, and changes its input."""

        def __init__(self):
            super().__init__()
            self.linear, self.dropout, self.norm = nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.last = self.calls * 2
            torch.rand(3, device="cpu")
            return self.norm(self.dropout(self.linear(x.clamp_(min=0)))) + torch.rand(4)

    model = Restless().eval()
    model.norm.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [id(buffer) for buffer in model.buffers()]
    modes = [m.training for m in model.modules()]
    example = -torch.ones(3, 4)
    state, gradients = torch.get_rng_state(), torch.is_grad_enabled()
    for training in (True, False):
        metrics.count_complexity(model, example, training=training)
        metrics.activation_bytes(model, example, training=training)
    metrics.measure_roofline(model, example, rounds=1)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == gradients
    assert torch.equal(example, -torch.ones(3, 4))


def test_inside_inference_mode_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.inference_mode():
        example = torch.zeros(3, 4)
        assert metrics.count_macs(model, example, training=True) == 3 * (2 * 16 + 3 * 16)
        assert metrics.activation_bytes(model, example, training=True) == 4 * (12 + 12)


def test_tensors_that_are_neither_parameters_nor_buffers_come_along():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.more = torch.ones(4, 4), [torch.ones(4, 2)]

        def forward(self, x):
            return x @ self.table @ self.more[0] @ torch.ones(2, 3)

    assert macs(Table(), 5, 4) == 5 * (16 + 8 + 6)


def test_any_form_of_example_and_of_output():
    model = Function(lambda a, b=None: {"scores": [a @ b], "of": a})
    example = {"a": A.clone().requires_grad_(), "b": B}
    assert metrics.count_macs(model, (A, B)) == metrics.count_macs(model, example) == 120
    assert metrics.count_macs(model, example, training=True) == 240
    assert metrics.activation_bytes(model, example, training=True) == 4 * (30 + 0) + 0


class Block(nn.Module):
    """A decoder layer of Llama 3's family: grouped queries, gated feed-forward part."""

    def __init__(self, width, heads, groups, hidden):
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x):
        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(y).unflatten(-1, (self.groups, -1)).transpose(1, 2) for f in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


SEVENTY_BILLION = """
import re, time
from pathlib import Path
import torch
from torch import nn
from companion import metrics
from test_complexity import Block
with torch.device("meta"):
    model = nn.Sequential(
        nn.Embedding(128256, 8192),
        *(Block(8192, 64, 8, 28672) for _ in range(80)),
        nn.RMSNorm(8192),
        nn.Linear(8192, 128256, bias=False),
    )
ids = torch.zeros(1, 512, dtype=torch.int64)
start = time.process_time()
found = metrics.count_complexity(model, ids)
seconds = time.process_time() - start
activations = metrics.activation_bytes(model, ids.to("meta"), training=True)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # getrusage counts the parent's, too
print(found.parameters, found.macs, seconds, activations, int(peak[1]) * 1024)
"""


def test_seventy_billion_parameters_in_little_time_and_memory():
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read where Linux tells it")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ["PYTHONPATH"]))}
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY_BILLION], capture_output=True, text=True, check=True, env=environment
    )
    parameters, counted, seconds, activations, memory = map(float, done.stdout.split())
    width, hidden, words, length = 8192, 28672, 128256, 512
    weights = 80 * (2 * width**2 + 2 * width * 1024 + 3 * width * hidden) + width * words
    assert parameters == weights + width * words + 161 * width > 70e9
    assert counted == length * weights + 80 * 2 * length**2 * width
    assert seconds < 10  # the bound; about 1 s of CPU time when this was written
    assert memory < 2 * 2**30
    assert activations > length * width * 4 * 80


# What cannot be counted is said


@torch.library.custom_op("companion_tests::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@torch.library.custom_op("companion_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


def test_custom_operators_are_named_with_and_without_a_rule_for_shapes():
    for name, operator in (("halve", halve), ("double", double)):
        model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=Function(lambda x, f=operator: f(x)), c=nn.Identity()))
        model.c.forward = lambda x: nn.functional.scaled_dot_product_attention(x, x, x)
        found = metrics.count_complexity(model, torch.zeros(3, 4))
        assert found.uncounted == (f"b: companion_tests::{name}",)
        assert found.macs == 3 * 16 + 2 * 9 * 4
        with pytest.warns(metrics.UncountedWarning, match="companion_tests"):
            assert metrics.count_macs(model, torch.zeros(3, 4)) == found.macs
        with pytest.warns(metrics.UncountedWarning, match="companion_tests"):
            metrics.count_flops(model, torch.zeros(3, 4))


def test_a_real_device_takes_lstms_and_attention_apart_as_well():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.layer = nn.LSTM(6, 10), nn.TransformerEncoderLayer(10, 2, 20)

        def forward(self, x):
            return self.layer(self.lstm(halve(x))[0])

    found = metrics.count_complexity(Mixed().eval(), torch.zeros(7, 3, 6))
    assert found.uncounted == ("companion_tests::halve",)
    assert found.macs == 7 * 3 * 4 * (60 + 100) + encoder_macs(3, 7, 10, 20)


def test_profiling_marks_are_no_work():
    def marked(x):
        with torch.profiler.record_function("mark"):
            return x @ x

    found = metrics.count_complexity(Function(marked), torch.zeros(3, 3))
    assert (found.macs, found.uncounted) == (27, ())


def test_a_padding_mask_changes_nothing():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    example = {"src": torch.zeros(2, 5, 16), "src_key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}
    assert metrics.count_macs(encoder, example) == 2 * encoder_macs(2, 5, 16, 32)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compiled_networks_count_where_they_are():
    model = torch.jit.trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), torch.zeros(3, 4))
    assert metrics.count_macs(model, torch.zeros(3, 4)) == 60


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
def test_quantised_layers_are_named():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    found = metrics.count_complexity(model, torch.zeros(3, 4))
    assert found.uncounted == ("0: quantized::linear_dynamic", "2: quantized::linear_dynamic")


def test_operators_of_torch_without_a_formula_are_named():
    many = torch.zeros(30, 5)
    assert metrics.count_complexity(Function(torch.cdist), (many, many)).uncounted == ("aten::_euclidean_dist",)
    found = metrics.count_complexity(nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)))
    assert found.uncounted == ("aten::_trilinear",)
    assert metrics.count_complexity(Function(torch.fft.rfft), torch.zeros(8)).uncounted == ("aten::_fft_r2c",)


def test_bad_input_is_one_sentence():
    model = nn.Sequential(nn.Linear(4, 4))
    cases = [
        (model, torch.zeros(2, 3), r"cannot run on the meta device .* shape \(2, 3\): a and b must have same"),
        (model, torch.zeros(0, 4), "example is empty"),
        (model, (1, 4), "without a tensor"),
        (model, None, "without a tensor"),
        ("resnet18", torch.zeros(1), r"a network \(torch.nn.Module\) is needed, not str"),
        (Function(threading.Lock()), torch.zeros(1), "cannot be copied"),
        (nn.LazyLinear(3), torch.zeros(2, 3), "run it once first"),
        (Function(lambda x: x * x.sum().item()), torch.zeros(2, 3), "cannot run on the meta device"),
        (Function(lambda x: x.nonzero()), torch.zeros(2, 3), "cannot run on the meta device"),
        (Function(lambda x: torch.from_numpy(x.numpy() * 2)), torch.zeros(2, 3), "cannot run on the meta device"),
        (nn.Sequential(Function(lambda x: halve(x))).to("meta"), torch.zeros(2, device="meta"), "halve"),
    ]
    for network, example, message in cases:
        with pytest.raises(CompanionError, match=message) as error:
            metrics.count_macs(network, example)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(".")
    with pytest.raises(CompanionError, match="no backward pass"):
        metrics.count_macs(nn.ReLU(), torch.zeros(3), training=True)
    with pytest.raises(CompanionError, match="cannot run as it is"):
        metrics.activation_bytes(model, torch.zeros(2, 3), training=True)
