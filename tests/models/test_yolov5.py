"""Our YOLOv5: its shape, its boxes, and the official weights in it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from companion import CompanionError, metrics, models
from companion.models.yolov5 import VARIANTS, load_official

MODELS = Path(os.environ.get("COMPANION_TEST_DATA") or "nowhere").parent / "models"
needs_checkpoint = pytest.mark.skipif(not (MODELS / "yolov5n.pt").exists(), reason="the official YOLOv5n is not here")

# As the authors' own program prints them, with normalisation folded into the convolutions.
PUBLISHED = {"n": 1_867_405, "s": 7_225_885, "m": 21_172_173, "l": 46_533_693, "x": 86_705_005}


def variant(name, **settings):
    return models.create(f"yolov5{name}", **settings)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_as_published(name):
    with torch.device("meta"):
        model = variant(name)
    channels = sum(len(module.weight) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert metrics.count_parameters(model) - channels == PUBLISHED[name]  # of scale and shift one is left, a bias


# "FLOPs @640 (B)" of the table in the authors' README: 2 × MACs in units of 10⁹.
@pytest.mark.parametrize(("name", "gflops"), [("n", 4.5), ("s", 16.5), ("m", 49.0), ("l", 109.1), ("x", 205.7)])
def test_cost_as_published(name, gflops):
    with torch.device("meta"):
        model, image = variant(name), torch.zeros(1, 3, 640, 640)
    assert metrics.count_flops(model, image) / 1e9 == pytest.approx(gflops, rel=0.01)


def test_shapes():
    model = variant("n", classes=3)
    image = torch.rand(2, 3, 64, 96)
    raw = model(image)
    assert [tuple(each.shape) for each in raw] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8)]
    rows = model.eval()(image)
    assert rows.shape == (2, 3 * (96 + 24 + 6), 8)
    assert rows[..., 4:].min() >= 0
    assert rows[..., 4:].max() <= 1


def test_a_box_by_hand():
    """Row 1, column 2 of the middle scale, second anchor (62 by 45 pixels); all else is far from sure."""
    model = variant("n", classes=2).eval()
    detect = model.model[24]
    raw = [torch.full((1, 3, side, side, 7), -20.0) for side in (8, 4, 2)]
    raw[1][0, 1, 1, 2] = torch.tensor([0.0, np.log(3), 0.0, -np.log(3), 5.0, -20.0, 20.0])
    rows = detect.decode(raw)[0]
    (found,) = rows[rows[:, 4] > 0.5]
    # Shares .5, .75, .5, .25: (2 · .5 - .5 + 2) · 16, (2 · .75 - .5 + 1) · 16, (2 · .5)² · 62, (2 · .25)² · 45.
    assert found.tolist() == pytest.approx([40, 32, 62, 11.25, 1 / (1 + np.exp(-5)), 0, 1], abs=1e-5)
    assert int((rows[:, 4] > 0.5).nonzero()) == 3 * 64 + 16 + 4 + 2  # small ones first, then anchor by anchor


@needs_checkpoint
def test_the_official_weights_fit():
    model = load_official(MODELS / "yolov5n.pt")  # strictly: none is missing, none is left
    assert metrics.count_parameters(model) == 1_872_157
    for module in model.modules():
        if hasattr(module, "bn"):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    assert metrics.count_parameters(model) == 1_867_405
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_another_network_is_refused(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(CompanionError, match=r"x\.pt does not fit any YOLOv5 of version 6: n, s, m, l or x\.$"):
        load_official(tmp_path / "x.pt")
