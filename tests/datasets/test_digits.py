"""The plain digits, against scikit-learn's own arrays and torch's own interpolation."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from companion import datasets
from companion.datasets.digits import warp


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return datasets.load("digits", split=request.param)


def test_samples_are_images_in_0_to_1_with_a_label(split):
    image, label = split[0]
    assert image.dtype == torch.float32
    assert image.shape == (3, 32, 32)
    assert type(label) is int
    assert split.images.min() == 0
    assert split.images.max() == 255
    assert split[7][0].max() <= 1
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert (split.task, split.labels, split.augmentation) == ("classify", tuple("0123456789"), "shift")


def test_pixels_are_the_scans_enlarged(split):
    """torch's bilinear interpolation of the scan with a blank pixel around it, without that pixel's four."""
    scans = torch.from_numpy(load_digits().images[split.scans[:, 0]] / 16)[:, None]
    padded = torch.nn.functional.pad(scans, (1, 1, 1, 1))
    expected = torch.nn.functional.interpolate(padded, scale_factor=4, mode="bilinear")[:, :, 4:-4, 4:-4]
    assert (split.images[:, :1].double() / 255 - expected).abs().max() <= 0.5 / 255 + 1e-12


def test_labels_belong_to_their_scans(split):
    assert np.array_equal(split.targets, load_digits().target[split.scans[:, 0]])
    assert [split[i][1] for i in range(20)] == split.targets[:20].tolist()


def test_every_scan_is_in_one_split_and_every_class_in_proportion():
    train, test = (datasets.load("digits", split=name) for name in ("train", "test"))
    assert (len(train), len(test)) == (1257, 540)
    assert sorted([*train.scans[:, 0], *test.scans[:, 0]]) == list(range(1797))
    everywhere = np.bincount(load_digits().target)
    assert np.abs(np.bincount(test.targets) - everywhere * 540 / 1797).max() <= 1


@pytest.fixture
def ink():
    return load_digits().images[:5] / 16


def drawn(ink, *, half_tangent=0.0, scale=1.0, x=0.0, y=0.0):
    return warp(ink, *(np.full(len(ink), value) for value in (half_tangent, scale, x, y)))


def test_warp_by_a_right_angle_is_a_quarter_turn_clockwise(ink):
    turned = drawn(ink, half_tangent=1.0)  # tan(90°/2)
    assert np.allclose(turned, np.rot90(drawn(ink), k=-1, axes=(1, 2)), atol=1e-12)


def test_warp_shifts_by_pixels_of_the_scan(ink):
    right, down = drawn(ink, x=1.0), drawn(ink, y=0.5)
    assert np.allclose(right[:, :, 4:], drawn(ink)[:, :, :-4])
    assert np.allclose(down[:, 2:], drawn(ink)[:, :-2])


@pytest.mark.parametrize(("degrees", "scale", "x", "y"), [(20, 1, 0, 0), (-33, 0.7, 0.5, -1), (5, 1.3, 20, 0)])
def test_warp_agrees_with_torch(ink, degrees, scale, x, y):
    """grid_sample maps output to input in coordinates from −1 to 1; half of a scan is 4 pixels."""
    angle = np.deg2rad(degrees)
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    shift = -inverse @ np.array([x, y]) / 4
    theta = torch.from_numpy(np.column_stack([inverse, shift])).expand(len(ink), 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [len(ink), 1, 32, 32], align_corners=False)
    scans = torch.from_numpy(ink)[:, None]
    expected = torch.nn.functional.grid_sample(scans, grid, align_corners=False)[:, 0]
    ours = drawn(ink, half_tangent=np.tan(angle / 2), scale=scale, x=x, y=y)
    assert np.allclose(ours, expected, atol=1e-9)
