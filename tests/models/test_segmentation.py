"""The networks that give every pixel a class."""

import pytest
import torch
import torchvision
from torch import nn
from torch.fx import symbolic_trace

from companion import CompanionError, metrics, models

TORCHVISION = ["lraspp_mobilenet_v3_large", "fcn_resnet50"]
SEGMENTERS = ["unet", *TORCHVISION]


@pytest.mark.parametrize("name", TORCHVISION)
def test_equals_torchvision(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=5).eval()
    ours = models.create(name, classes=5).eval()
    ours.network.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    images = torch.rand(2, 3, 70, 90)
    normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours(images), theirs(normalize(images))["out"])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lraspp_mobilenet_v3_large", 3_221_538),
        # With an auxiliary head, which ours has not: 1024·256·9, 2·256, 256·21+21.
        ("fcn_resnet50", 35_322_218 - (2_359_296 + 512 + 5_397)),
    ],
)
def test_parameters_as_torchvision_publishes_them(name, published):
    assert metrics.count_parameters(models.create(name, classes=21)) == published


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", [(64, 64), (45, 60), (33, 50)])
def test_the_answer_is_as_large_as_the_image(name, size):
    model = models.create(name, classes=4).eval()
    assert model(torch.rand(1, 3, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_can_be_traced_and_then_takes_any_size(name):
    model = models.create(name, seed=0).eval()
    traced = symbolic_trace(model)
    for shape in ((1, 3, 64, 64), (2, 3, 45, 52)):
        images = torch.rand(shape)
        torch.testing.assert_close(traced(images), model(images))


def test_unet_equals_one_written_with_functions():
    """Of depth 1, in evaluation mode, on a picture with odd sides."""
    f = nn.functional
    model = models.create("unet", width=2, depth=1, classes=3, seed=0)
    for _ in range(3):
        model(torch.rand(4, 3, 16, 16))  # the normalisations' averages are no longer the initial ones
    w = model.eval().state_dict()

    def double(x, name):
        for conv, norm in ((0, 1), (3, 4)):
            x = f.conv2d(x, w[f"{name}.{conv}.weight"], padding=1)
            mean, var = w[f"{name}.{norm}.running_mean"], w[f"{name}.{norm}.running_var"]
            x = f.relu(f.batch_norm(x, mean, var, w[f"{name}.{norm}.weight"], w[f"{name}.{norm}.bias"]))
        return x

    images = torch.rand(2, 3, 11, 8)
    top = double((images - w["normalize.mean"]) / w["normalize.std"], "down.0")
    low = double(f.max_pool2d(top, 2), "down.1")
    low = f.conv2d(low, w["halve.0.weight"], w["halve.0.bias"])
    # The five rows repeated to eleven: row i from i · 5 // 11; the columns doubled.
    low = low[:, :, [i * 5 // 11 for i in range(11)]].repeat_interleave(2, dim=3)
    expected = f.conv2d(double(torch.cat([top, low], 1), "up.0"), w["head.weight"], w["head.bias"])
    torch.testing.assert_close(model(images), expected)


def test_unet_sees_far_and_the_skips_near():
    """A pixel in the corner reaches the answer as far as the depth lets it, and no farther."""
    for depth, reach in ((1, 13), (3, 59)):
        model = models.create("unet", depth=depth, seed=0).eval()
        image = torch.rand(1, 3, 128, 128)
        changed = image.clone()
        changed[..., 0, 0] += 1
        with torch.no_grad():
            moved = (model(changed) - model(image)).abs().amax(dim=(0, 1)) > 0
        rows = moved.any(1).nonzero()[:, 0]
        assert rows[0] == 0
        assert rows[-1] <= reach
        assert rows[-1] > reach / 2


@pytest.mark.parametrize(("width", "depth"), [(4, 1), (6, 4), (16, 2)])
def test_unet_of_any_width_and_depth(width, depth):
    model = models.create("unet", width=width, depth=depth)
    assert len(model.pool) == depth
    assert model.head.in_channels == width
    assert model.down[-1][0].out_channels == width * 2**depth


@pytest.mark.parametrize("depth", [0, 7, 1.5, True, 2**62])
def test_unusable_depths_are_refused(depth):
    with pytest.raises(CompanionError, match="unet takes a whole number from 1 to 6 as depth"):
        models.create("unet", depth=depth)
