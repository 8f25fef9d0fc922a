"""The difficult digits: from which scans, the same everywhere, harder with the level."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from companion import CompanionError, datasets
from companion.datasets import digits, hard_digits


@pytest.mark.parametrize(("split", "n"), [("train", 4000), ("test", 2000)])
def test_samples(split, n):
    data = datasets.load("hard_digits", split=split)
    image, label = data[1]
    assert len(data) == n
    assert image.dtype == torch.float32
    assert image.shape == (3, 32, 32)
    assert type(label) is int
    assert 0 <= image.min() < image.max() <= 1
    assert data.targets.bincount().tolist() == [n // 10] * 10
    assert (data.task, data.labels, data.augmentation) == ("classify", tuple("0123456789"), None)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_no_image_depends_on_a_scan_of_the_other_split(monkeypatch, split, other):
    before = datasets.load("hard_digits", split=split).images
    ink, labels, splits = digits.scans()
    spoilt = ink.copy()
    spoilt[splits[other]] = 1 - spoilt[splits[other]]
    monkeypatch.setattr(hard_digits, "scans", lambda: (spoilt, labels, splits))
    assert torch.equal(datasets.load("hard_digits", split=split).images, before)
    spoilt[splits[split][0]] = 0  # the check above would notice: one scan of its own does change images
    assert not torch.equal(datasets.load("hard_digits", split=split).images, before)


@pytest.mark.parametrize("split", ["train", "test"])
def test_level_0_is_the_plain_digits(split):
    plain = datasets.load("digits", split=split)
    by_scan = dict(zip(plain.scans[:, 0].tolist(), plain.images, strict=True))
    data = datasets.load("hard_digits", split=split, level=0)
    assert torch.equal(data.images, torch.stack([by_scan[scan] for scan in data.scans[:, 0].tolist()]))
    assert set(data.scans[:, 0]) == set(plain.scans[:, 0])  # every scan is used


def test_labels_are_those_of_the_scans_at_any_level():
    _, labels, _ = digits.scans()
    data = datasets.load("hard_digits", split="test", level=1.7)
    assert np.array_equal(data.targets, labels[data.scans[:, 0]])


def test_distortion_grows_with_the_level():
    plain = datasets.load("hard_digits", split="test", level=0).images.float()
    levels = (0.1, 0.5, 1, 1.5, 3)
    images = [datasets.load("hard_digits", split="test", level=level).images.float() for level in levels]
    distances = [(other - plain).abs().mean() for other in images]
    assert distances == sorted(distances)
    assert distances[0] > 1


def test_neighbours_reach_in_at_the_border():
    """Without noise, tint, turning, scaling and shifting, what is added to the plain digits lies at the sides."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HALF_TANGENT", "SMALLER", "LARGER", "SHIFT", "TINT", "NOISE"):
            patch.setattr(hard_digits, name, 0.0)
        added = datasets.load("hard_digits", split="test").images.float()
    added -= datasets.load("hard_digits", split="test", level=0).images
    where = (added > 0).float().mean(dim=(0, 1))
    assert added.min() >= 0
    assert where[0].mean() > 0.02
    assert where[12:20, 12:20].max() == 0


def test_another_process_makes_the_same_bytes():
    program = """
from companion import datasets
print(*(datasets.load("hard_digits", split=split, level=0.7).sha256() for split in ("train", "test")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ours = [datasets.load("hard_digits", split=split, level=0.7).sha256() for split in ("train", "test")]
    assert done.stdout.split() == ours


@pytest.mark.parametrize("level", [-0.1, 3.01, float("nan"), float("inf"), "1", None])
def test_refuses_a_level_that_is_none(level):
    with pytest.raises(CompanionError, match=r"levels from 0 .*\.$"):
        datasets.load("hard_digits", split="train", level=level)
