"""Compressed networks: layers that are not as `create` makes them are written down and built again."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from companion import CompanionError, compress, models


def narrowed():
    """cifar_resnet14 whose first block has 5 channels inside instead of 16, and a 3×3 split in two in the second."""
    model = models.create("cifar_resnet14", classes=4, seed=0).eval()
    block = model.layer1[0]
    block.conv1, block.bn1 = nn.Conv2d(16, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
    block.conv2 = nn.Conv2d(5, 16, 3, padding=1, bias=False)
    model.layer2[1].conv1 = nn.Sequential(
        nn.Conv2d(32, 7, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(7, 32, (1, 3), padding=(0, 1))
    )
    model.layer3[0].bn1 = nn.Identity()
    return model.eval()


@pytest.fixture
def path(tmp_path):
    models.save(narrowed(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def header(path):
    with path.open("rb") as file:
        found = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return json.loads(found["__metadata__"]["companion-1"])


def test_a_compressed_network_comes_back(tmp_path):
    model = narrowed()
    models.save(model, tmp_path / "net.safetensors")
    copy = models.load(tmp_path / "net.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(copy(images), model(images))
    assert copy.layer1[0].conv1.out_channels == 5
    assert [type(layer) for layer in copy.layer2[1].conv1] == [nn.Conv2d, nn.Conv2d]
    models.save(copy, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_only_what_differs_is_written(path):
    paths = {"layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", "layer2.1.conv1", "layer3.0.bn1"}
    assert header(path)["layers"].keys() == paths


def test_a_network_as_made_has_no_layers_of_its_own(tmp_path):
    models.save(models.create("unet"), tmp_path / "net.safetensors")
    assert "layers" not in header(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", models.names())
def test_every_network_is_as_it_was_made(name):
    from companion.models.structure import changed_layers

    with torch.device("meta"):
        assert changed_layers(models.create(name), models.create(name)) == {}


def test_a_layer_that_a_file_cannot_hold(tmp_path):
    class Strange(nn.Module):
        def forward(self, x):
            return x

    model = narrowed()
    model.layer3[0].bn2 = Strange()
    with pytest.raises(CompanionError, match=r"the layer layer3\.0\.bn2 \(Strange\) cannot be written"):
        models.save(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


CONV = {"kind": "Conv2d", "in_channels": 16, "out_channels": 5, "kernel_size": [3, 3], "stride": [1, 1]}
CONV |= {"padding": [1, 1], "dilation": [1, 1], "groups": 1, "bias": False, "padding_mode": "zeros"}


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([], "damaged description"),
        ({"layer1.0.conv1": 3}, "damaged description"),
        ({"nowhere": CONV}, "'nowhere' cannot be built"),
        ({"": CONV}, "'' cannot be built"),
        ({"layer1.0.conv1": {"kind": "exec"}}, "cannot be built as the file says"),
        ({"layer1.0.conv1": {"kind": ["Conv2d"]}}, "cannot be built as the file says"),
        ({"layer1.0.conv1": CONV | {"device": "cuda"}}, "a Conv2d has other arguments"),
        ({"layer1.0.conv1": CONV | {"groups": 3}}, "divisible by groups"),
        ({"layer1.0.conv1": CONV | {"out_channels": 2**62}}, "cannot be built"),
        ({"layer1.0.conv1": CONV}, "layers do not go together"),
        ({"layer1.0.conv1": {"kind": "Sequential", "layers": [["a.b", CONV]]}}, "cannot be built"),
        ({"layer1.0.conv1": CONV | {"stride": [0, 0]}}, "its stride is"),
        ({"layer1.0.conv1": CONV | {"stride": [1]}}, "its stride is"),
        ({"layer1.0.conv1": CONV | {"dilation": [0, 0]}}, "its dilation is"),
        ({"layer1.0.conv1": CONV | {"padding": [-1, -1]}}, "its padding is"),
        ({"layer1.0.conv1": CONV | {"kernel_size": 3}}, "its kernel_size is"),
        ({"layer1.0.conv1": CONV | {"padding": "none"}}, "its padding is"),
        ({"layer1.0.conv2": CONV | {"in_channels": 5, "out_channels": 16, "padding": [10**6, 10**6]}}, "do not go"),
    ],
)
def test_forged_layers(path, layers, says):
    metadata = {"companion-1": json.dumps(header(path) | {"layers": layers})}
    save_file(load_file(path), path, metadata)
    with pytest.raises(CompanionError, match=says) as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


def test_a_forged_padding_cannot_ask_for_any_memory(tmp_path):
    model = models.create("cifar_resnet14")
    models.save(model, tmp_path / "net.safetensors")
    conv = CONV | {"in_channels": 3, "out_channels": 16, "padding": [1000, 1000]}
    metadata = {"companion-1": json.dumps(header(tmp_path / "net.safetensors") | {"layers": {"conv1": conv}})}
    save_file(load_file(tmp_path / "net.safetensors"), tmp_path / "net.safetensors", metadata)
    with pytest.raises(CompanionError, match="more than 262,144 numbers for one sample"):  # 16 · 16 · 32 · 32
        models.load(tmp_path / "net.safetensors")


def test_a_word_as_padding_comes_back(tmp_path):
    model = narrowed()
    model.layer1[1].conv1 = nn.Conv2d(16, 16, 3, padding="same", bias=False)
    models.save(model, tmp_path / "net.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(models.load(tmp_path / "net.safetensors")(images), model.eval()(images))


@pytest.mark.parametrize("changed", ["masks", "grids"])
def test_weights_that_are_computed_are_refused_with_what_to_do(tmp_path, changed):
    model = narrowed()
    model = compress.prune_weights(model, 0.5) if changed == "masks" else compress.prepare_qat(model)
    with pytest.raises(CompanionError, match=r"make it permanent first \(compress\.make_permanent .* compress\.freeze"):
        models.save(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_layer_of_the_same_class_with_other_settings_is_no_equal():
    from companion.models.structure import changed_layers

    with pytest.raises(CompanionError, match="the layer 1 \\(LeakyReLU\\) cannot be written"):
        changed_layers(
            nn.Sequential(nn.Flatten(), nn.LeakyReLU(0.1), nn.Hardtanh()),
            nn.Sequential(nn.Flatten(), nn.LeakyReLU(0.2), nn.Hardtanh()),
        )
