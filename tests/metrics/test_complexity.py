import pytest
import torch
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
