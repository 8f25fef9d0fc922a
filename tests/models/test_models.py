import pytest
import torch
import torchvision
from torch import nn

from companion import CompanionError, metrics, models

# Counted by hand from the layers (convolutions without bias before a normalisation, 2 numbers a normalised channel).
PARAMETERS = {
    # 3·16·9+16, 16·32·9+32, 32·8·8·128+128, 128·10+10
    "simple_cnn": 448 + 4_640 + 262_272 + 1_290,
    # 3·32·9+32, 32·64·9+64, 64·128·9+128, 128·4·4·256+256, 256·10+10
    "simple_cnn_3conv": 896 + 18_496 + 73_856 + 524_544 + 2_570,
    # Published: 0.27 and 0.85 million (He et al., 2016, table 6), plus here the two projections, 2,752 together.
    "cifar_resnet20": 269_722 + 2_752,
    "cifar_resnet56": 853_018 + 2_752,
    # Down 824 + 3,520 + 13,952 + 55,552 (9ab + 9bb + 4b each), 1×1 convolutions 2,080 + 528 + 136, up 27,776 + 6,976
    # + 1,760, and 8·11+11 for the head.
    "unet": 73_848 + 2_744 + 36_512 + 99,
}
LARGE = ("yolov5m", "yolov5l", "yolov5x")  # as yolov5s, with more of everything: on the meta device only
COMPUTED = [name for name in models.names() if name not in LARGE and models.task(name) != "text"]
# torchvision runs one ReLU module three times a block, YOLOv5 one pooling three times in a row.
ONE_RUN_A_MODULE = [name for name in COMPUTED if name != "fcn_resnet50" and models.task(name) != "detect"]
TASKS = {"unet": "segment", "lraspp_mobilenet_v3_large": "segment", "fcn_resnet50": "segment"}


def small(name):
    """A side that is quick to compute with and large enough for the network."""
    return {32: 32, 224: 56}.get(models.image_size(name), 64)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_as_counted_by_hand(name, count):
    assert metrics.count_parameters(models.create(name)) == count


def shape_of(task, side):
    """What networks of 7 classes return for two images."""
    boxes = 3 * sum((side // stride) ** 2 for stride in (8, 16, 32))
    return {"classify": (2, 7), "segment": (2, 7, side, side), "detect": (2, boxes, 5 + 7)}[task]


@pytest.mark.parametrize("name", COMPUTED)
def test_every_network_is_what_the_course_needs(name):
    model = models.create(name, classes=7).eval()
    images = torch.rand(2, 3, small(name), small(name))
    before = images.clone()
    outputs = model(images)
    task = TASKS.get(name, "detect" if "yolo" in name else "classify")
    assert models.describe(model).task == models.task(name) == task
    assert outputs.shape == shape_of(task, small(name))
    assert torch.equal(images, before)
    assert any(isinstance(m, nn.SiLU if task == "detect" else nn.ReLU) for m in model.modules())
    assert not any(getattr(m, "inplace", False) for m in model.modules())


@pytest.mark.parametrize("name", LARGE)
def test_the_large_ones_give_as_much(name):
    with torch.device("meta"):
        model = models.create(name, classes=7).eval()
        assert model(torch.zeros(2, 3, 64, 64)).shape == shape_of("detect", 64)


@pytest.mark.parametrize("name", ONE_RUN_A_MODULE)
def test_each_activation_module_runs_once(name):
    model = models.create(name).eval()
    runs = dict.fromkeys([m for m in model.modules() if not list(m.children())], 0)
    for module in runs:
        module.register_forward_hook(lambda m, *_: runs.__setitem__(m, runs[m] + 1))
    model(torch.rand(1, 3, small(name), small(name)))
    assert set(runs.values()) == {1}


@pytest.mark.parametrize("name", COMPUTED)
def test_gradients_reach_every_parameter(name):
    model = models.create(name)
    outputs = model(torch.rand(2, 3, small(name), small(name)))
    sum(each.square().sum() for each in (outputs if isinstance(outputs, list) else [outputs])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    ours = models.create(name).eval()
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert missing == ["normalize.mean", "normalize.std"]
    images = torch.rand(2, 3, 96, 96)
    normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours(images), theirs(normalize(images)))


def test_simple_cnn_equals_the_printed_one_layer_by_layer():
    """The listing of 2.3.2, written with torch's functions; its images are not normalised."""
    model = models.create("simple_cnn", mean=(0, 0, 0), std=(1, 1, 1)).eval()
    w = model.state_dict()
    assert {tensor.dtype for tensor in w.values()} == {torch.float32}  # of whole numbers, too
    x = torch.rand(3, 3, 32, 32)
    f = nn.functional
    y = f.max_pool2d(f.relu(f.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=1)), 2)
    y = f.max_pool2d(f.relu(f.conv2d(y, w["conv2.weight"], w["conv2.bias"], padding=1)), 2)
    y = f.relu(f.linear(y.view(-1, 32 * 8 * 8), w["fc1.weight"], w["fc1.bias"]))
    torch.testing.assert_close(model(x), f.linear(y, w["fc2.weight"], w["fc2.bias"]))


def test_normalisation_is_inside():
    model = models.create("cifar_resnet14", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    image = torch.tensor([0.6, 0.45, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(model.normalize(image).flatten(), torch.tensor([1.0, 1.0, 0.0]))
    assert "normalize.mean" in model.state_dict()
    assert metrics.count_parameters(model.normalize) == 0


def test_any_width():
    narrow, wide = (models.create("cifar_resnet20", width=width) for width in (8, 32))
    assert narrow.fc.in_features == 32
    assert wide.fc.in_features == 128
    assert models.describe(narrow).configuration["width"] == 8


def test_a_picture_of_another_size_is_not_mixed_up():
    """The printed `view(-1, 2048)` turns one 64×64 picture into four answers; ours refuses."""
    with pytest.raises(RuntimeError):
        models.create("simple_cnn")(torch.rand(1, 3, 64, 64))


def test_seed_draws_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (models.create("simple_cnn", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.fc1.weight, b.fc1.weight)
    assert not torch.equal(a.fc1.weight, c.fc1.weight)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("resnet999", {}, "no network 'resnet999'"),
        ("simple_cnn", {"widht": 8}, "no setting 'widht'"),
        ("simple_cnn", {"classes": "ten"}, "a whole number from 1 as classes, not 'ten'"),
        ("simple_cnn", {"classes": True}, "a whole number from 1 as classes, not True"),
        ("simple_cnn", {"image_size": 2}, "too small"),
        ("simple_cnn", {"channels": 4}, "whole numbers from 1 as channels, not 4"),
        ("simple_cnn", {"channels": ()}, "whole numbers from 1 as channels"),
        ("simple_cnn", {"channels": (4, 0)}, "whole numbers from 1 as channels"),
        ("simple_cnn", {"mean": (0.5, 0.5)}, "three numbers as mean"),
        ("simple_cnn", {"std": (1, 1, 0)}, "three numbers above 0 as std"),
        ("cifar_resnet20", {"width": 0}, "a whole number from 1 as width, not 0"),
        ("cifar_resnet20", {"width": 1.5}, "a whole number from 1 as width, not 1.5"),
        ("cifar_resnet20", {"width": 2**62}, "cannot be built"),
        ("yolov5n", {"width": 8}, "no setting 'width': it takes classes, depth_multiple, width_multiple, anchors"),
        ("yolov5n", {"depth_multiple": 0}, "a number above 0, at most 4 as depth_multiple, not 0"),
        ("yolov5n", {"width_multiple": float("nan")}, "a number above 0, at most 4 as width_multiple, not nan"),
        ("yolov5n", {"anchors": ((1, 2), (3, 4))}, "for each of three scales as many pairs of sides from 1 pixel"),
        ("yolov5n", {"anchors": [[(8, 8)], [(8, 8)], [(8, 8), (9, 9)]]}, "for each of three scales as many pairs"),
        ("yolov5n", {"anchors": [[(8, 8)], [(8, 8)], [(8, 0)]]}, "pairs of sides from 1 pixel as anchors"),
        ("simple_cnn", {"labels": ["a", "b"]}, "10 classes, but 2 labels"),
    ],
)
def test_unusable_settings_are_refused(name, settings, says):
    with pytest.raises(CompanionError, match=says) as caught:
        models.create(name, **settings)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_torch_will_do():
    import numpy as np

    model = models.create("simple_cnn", classes=np.int64(4), mean=torch.zeros(3), channels=np.array([2, 3]))
    assert models.describe(model).configuration["classes"] == 4
    assert models.describe(model).configuration["mean"] == (0.0, 0.0, 0.0)


def test_foreign_modules_have_no_description():
    with pytest.raises(CompanionError, match=r"not made by models\.create"):
        models.describe(nn.Linear(1, 1))
