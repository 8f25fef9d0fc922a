"""Activation memory against hand counts, and its peak against torch's profiler."""

from itertools import accumulate

import pytest
import torch
from torch import nn

from companion import CompanionError, metrics, models

F32, I64 = 4, 8


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.body(x) + x)


def saved(model, *shape, device="cpu"):
    return metrics.activation_bytes(model.to(device), torch.zeros(shape, device=device), training=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_by_an_mlp_to_the_byte(device):
    # The first layer's input, for its weights' gradient; the ReLU's output, which is the second layer's input: once.
    assert saved(mlp(), 5, 8, device=device) == F32 * (5 * 8 + 5 * 16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_by_a_cnn_to_the_byte(device):
    image, maps, pooled = 2 * 3 * 64, 2 * 8 * 64, 2 * 8 * 16
    # Convolution: its input. BatchNorm: its input, a mean and a deviation per channel. ReLU: its output, which pooling
    # keeps too. Pooling: where the maxima were. Linear: its input, pooling's output seen flat.
    expected = F32 * (image + maps + 2 * 8 + maps + pooled) + I64 * pooled
    assert saved(cnn(), 2, 3, 8, 8, device=device) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_by_a_residual_block_to_the_byte(device):
    maps = 2 * 8 * 36
    # The input; before and after the first normalisation and ReLU; before the second; the result. A sum keeps nothing.
    assert saved(Residual(), 2, 8, 6, 6, device=device) == F32 * (5 * maps + 2 * 2 * 8)


def test_what_is_not_needed_is_not_saved():
    frozen = mlp()
    frozen[0].requires_grad_(False)
    assert saved(frozen, 5, 8) == F32 * 5 * 16  # the second layer's input; no gradient goes further down
    in_place = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    assert saved(in_place, 5, 8) == F32 * (5 * 8 + 5 * 16)
    assert saved(nn.Sequential(nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False), 5, 8) == 0


def test_a_tensor_saved_twice_counts_once_and_half_the_bytes_in_bfloat16():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            y = self.linear(x)
            return y * y.t()  # two views of one memory

    assert saved(Square(), 4, 4) == F32 * (16 + 16)
    model = mlp().to(torch.bfloat16)
    assert metrics.activation_bytes(model, torch.zeros(5, 8, dtype=torch.bfloat16), training=True) == 2 * 5 * (8 + 16)


def changes(call):
    """What torch's profiler saw of the allocator during a call: bytes taken, and given back as negative ones."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def test_saved_memory_is_what_the_allocator_still_holds_after_the_forward_pass():
    model, example = models.create("simple_cnn"), torch.zeros(16, 3, 32, 32)
    held = []
    remaining = sum(changes(lambda: held.append(model(example))))
    # The outputs are held too, and are no activations that were saved.
    assert remaining == metrics.activation_bytes(model, example, training=True) + 16 * 10 * F32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inference_peak_of_an_mlp_by_hand(device):
    # While the ReLU runs, its input and its output live: 16 + 16 numbers for each of 5 samples.
    model = mlp().to(device)
    assert metrics.activation_bytes(model, torch.zeros(5, 8, device=device), training=False) == F32 * 5 * 32


def test_inference_peak_by_hand_of_a_branch_that_is_kept():
    with torch.device("meta"):
        model, example = Residual(), torch.zeros(2, 8, 6, 6)
    maps = F32 * 2 * 8 * 36
    # The input is the caller's. Each step holds what it reads and what it makes; normalisation also makes a mean and a
    # deviation per channel.
    assert metrics.activation_bytes(model, example, training=False) == 2 * maps + 2 * 8 * F32


@pytest.mark.parametrize("name", ["simple_cnn", "cifar_resnet20"])
@pytest.mark.parametrize("batch", [1, 8])
def test_inference_peak_is_the_profilers(name, batch):
    model, example = models.create(name).eval(), torch.zeros(batch, 3, 32, 32)
    with torch.no_grad():
        peak = max(accumulate(changes(lambda: model(example))))
    assert metrics.activation_bytes(model, example, training=False) == pytest.approx(peak, rel=0.05)


def test_on_meta_nothing_is_allocated_and_everything_is_counted():
    with torch.device("meta"):
        model, example = models.create("cifar_resnet20"), torch.zeros(64, 3, 32, 32)
    # The widest moment: the last normalisation of a block that is not the first of its stage; what it reads and makes,
    # the block's middle and input, and the stage's input, which a variable still holds; with its mean and deviation.
    maps = 64 * 16 * 32 * 32 * F32
    assert metrics.activation_bytes(model, example, training=False) == 5 * maps + 2 * 16 * F32
    real = metrics.activation_bytes(models.create("cifar_resnet20"), torch.zeros(64, 3, 32, 32), training=True)
    assert metrics.activation_bytes(model, example, training=True) == real


def test_bad_input_is_one_sentence():
    for model, example, message in [
        (mlp(), torch.zeros(2, 3), r"Sequential cannot run as it is on an example of shape \(2, 3\)"),
        (mlp(), torch.zeros(0, 8), "example is empty"),
        ("simple_cnn", torch.zeros(2, 3), "a network"),
    ]:
        for training in (True, False):
            with pytest.raises(CompanionError, match=message) as error:
                metrics.activation_bytes(model, example, training=training)
            assert "\n" not in str(error.value)
