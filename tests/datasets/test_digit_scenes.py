"""Scenes of digits: what is where in them, from which scans, the same everywhere."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from companion import CompanionError, datasets
from companion.datasets import digit_scenes, digits


@pytest.fixture(scope="module")
def scenes():
    return datasets.load("digit_scenes", split="train", scenes=120, size=96)


@pytest.fixture(scope="module")
def boxed():
    return datasets.load("digit_scenes", split="train", scenes=120, size=96, task="detect")


@pytest.mark.parametrize("split", ["train", "test"])
def test_default_sizes(split):
    data = datasets.load("digit_scenes", split=split)
    assert len(data) == digit_scenes.SCENES[split]
    assert data.images.shape[1:] == (3, 64, 64)


def test_samples_to_segment(scenes):
    image, mask = scenes[3]
    assert (image.dtype, image.shape) == (torch.float32, (3, 96, 96))
    assert (mask.dtype, mask.shape) == (torch.int64, (96, 96))
    assert 0 <= image.min() < image.max() <= 1
    assert set(scenes.masks.unique().tolist()) == {*range(11), 255}
    assert (scenes.task, scenes.augmentation) == ("segment", None)
    assert scenes.labels == ("background", *"0123456789")


def test_samples_to_detect(boxed):
    counts = set()
    for image, found in boxed:
        assert (image.dtype, image.shape) == (torch.float32, (3, 96, 96))
        assert found.keys() == {"boxes", "labels"}
        assert (found["boxes"].dtype, found["labels"].dtype) == (torch.float32, torch.int64)
        assert found["boxes"].shape == (len(found["labels"]), 4)
        counts.add(len(found["labels"]))
    assert counts == {1, 2, 3, 4, 5, 6}
    assert set(boxed.digits.tolist()) == set(range(10))
    assert (boxed.task, boxed.labels) == ("detect", tuple("0123456789"))
    assert torch.equal(boxed[-1][1]["boxes"], boxed[len(boxed) - 1][1]["boxes"])


def test_both_tasks_have_the_same_scenes(scenes, boxed):
    assert torch.equal(scenes.images, boxed.images)
    assert torch.equal(scenes.masks, boxed.masks)


def test_boxes_fit_the_masks_tightly_and_never_overlap(scenes, boxed):
    for (_, mask), (_, found) in zip(scenes, boxed, strict=True):
        covered = torch.zeros_like(mask, dtype=torch.bool)
        for (x1, y1, x2, y2), label in zip(found["boxes"].int().tolist(), found["labels"].tolist(), strict=True):
            inside = mask[y1:y2, x1:x2]
            assert set(inside.unique().tolist()) <= {0, label + 1, 255}
            ink = inside == label + 1
            assert ink[0].any()
            assert ink[-1].any()
            assert ink[:, 0].any()
            assert ink[:, -1].any()
            covered[y1:y2, x1:x2] = True
        assert not ((mask > 0) & (mask < 255) & ~covered).any()
        assert box_iou(found["boxes"], found["boxes"]).fill_diagonal_(0).max() == 0
        assert found["boxes"].min() >= 0
        assert found["boxes"].max() <= 96


def test_every_scan_leaves_a_pixel_in_the_smallest_scenes():
    """Or it would have no box."""
    ink = digits.scans()[0]
    side = int(48 * digit_scenes.SMALLEST)
    zero = np.zeros(len(ink))
    drawn = digits.warp(ink, zero, zero + side / (side + 2), zero, zero, size=side + 2)
    assert (drawn >= digit_scenes.DIGIT_FROM).any(axis=(1, 2)).all()


def test_labels_are_those_of_the_scans(boxed):
    assert np.array_equal(boxed.digits, digits.scans()[1][boxed.scans])


def test_masks_follow_the_ink(monkeypatch):
    """White ink on black paper without noise: then a pixel's brightness is the share of it that ink covers."""
    for name, value in (("PAPER", 0.0), ("PEN", 1.0), ("NOISE", 0.0)):
        monkeypatch.setattr(digit_scenes, name, value)
    data = datasets.load("digit_scenes", split="test", scenes=40)
    for image, mask in data:
        ink = image[0]
        assert ink[(mask > 0) & (mask < 255)].min() > 0.5 - 1 / 255
        assert ink[mask == 0].max() < 0.25 + 1 / 255
        edge = ink[mask == 255]
        assert edge.min() > 0.25 - 1 / 255
        assert edge.max() < 0.5 + 1 / 255


def test_a_digit_is_its_scan_enlarged(monkeypatch):
    """Against torch's bilinear interpolation of a scan with blank pixels around it."""
    for name, value in (("PAPER", 0.0), ("PEN", 1.0), ("NOISE", 0.0), ("SMALLEST", 0.375), ("LARGEST", 0.375)):
        monkeypatch.setattr(digit_scenes, name, value)
    data = datasets.load("digit_scenes", split="test", scenes=20, size=64, task="detect")  # digits of 24, 3 a pixel
    ink = torch.from_numpy(digits.scans()[0])
    found = 0
    for i, (image, target) in enumerate(data):
        for scan, box in zip(data.scans[data.starts[i] : data.starts[i + 1]], target["boxes"], strict=True):
            padded = torch.nn.functional.pad(ink[scan][None, None], (2, 2, 2, 2))
            expected = torch.nn.functional.interpolate(padded, scale_factor=3, mode="bilinear")[0, 0, 4:-4, 4:-4]
            rows, columns = ((expected >= 0.5).any(axis).nonzero()[0, 0] for axis in (1, 0))
            x, y = int(box[0] - columns), int(box[1] - rows)
            drawn = image[0, y : y + 28, x : x + 28]
            assert (drawn - expected).abs().max() < 0.5 / 255 + 1e-6
            found += 1
    assert found > 20


def test_digits_at_160_pixels_are_20_to_64_large():
    """The ink of most scans fills their eight rows, so the tallest boxes are as large as a digit can be."""
    boxes = datasets.load("digit_scenes", split="train", scenes=300, size=160).boxes
    heights = boxes[:, 3] - boxes[:, 1]
    assert 60 <= heights.max() <= 65
    assert 14 <= heights.min() <= 20
    assert (boxes[:, 2] - boxes[:, 0]).max() <= 65


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_no_scene_depends_on_a_scan_of_the_other_split(monkeypatch, split, other):
    before = datasets.load("digit_scenes", split=split, scenes=100)
    ink, labels, splits = digits.scans()
    assert set(before.scans.tolist()) <= set(splits[split])
    spoilt = ink.copy()
    spoilt[splits[other]] = 1 - spoilt[splits[other]]
    monkeypatch.setattr(digit_scenes, "scans", lambda: (spoilt, labels, splits))
    assert datasets.load("digit_scenes", split=split, scenes=100).sha256() == before.sha256()


def test_groups_share_no_scan():
    data = datasets.load("digit_scenes", split="train")
    users: dict[int, set[int]] = {}
    for i, group in enumerate(data.groups):
        for scan in data.scans[data.starts[i] : data.starts[i + 1]].tolist():
            users.setdefault(scan, set()).add(int(group))
    assert all(len(groups) == 1 for groups in users.values())
    assert len(users) > 0.95 * len(digits.scans()[2]["train"])  # nearly every scan is used
    assert np.bincount(data.groups).tolist() == [len(data) // 20] * 20


def test_what_fit_holds_out_shares_no_scan_with_what_it_trains_on():
    from companion.train.loop import hold_out

    data = datasets.load("digit_scenes", split="train", scenes=200)
    training, held_out = (
        {scan for i in part.indices for scan in data.scans[data.starts[i] : data.starts[i + 1]].tolist()}
        for part in hold_out(data, 0.1, seed=0)
    )
    assert training
    assert held_out
    assert not training & held_out


def test_fewer_scenes_are_the_first_of_more(scenes):
    few = datasets.load("digit_scenes", split="train", scenes=7, size=96)
    assert torch.equal(few.images, scenes.images[:7])
    assert torch.equal(few.masks, scenes.masks[:7])
    assert torch.equal(few.boxes, scenes.boxes[: len(few.boxes)])


def test_another_process_makes_the_same_bytes(scenes):
    program = """
from companion import datasets
print(datasets.load("digit_scenes", split="train", scenes=120, size=96).sha256())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == scenes.sha256()


def test_the_checksum_covers_pixels_masks_and_boxes(scenes):
    before = scenes.sha256()
    for part in ("images", "masks", "boxes", "digits"):
        copy = pickle.loads(pickle.dumps(scenes))
        getattr(copy, part)[-1] += 1
        assert copy.sha256() != before, part


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "classify"}, "tasks segment and detect, not 'classify'"),
        ({"size": 47}, "48 to 640 pixels a side, not 47"),
        ({"size": 641}, "not 641"),
        ({"size": 96.0}, "not 96.0"),
        ({"size": True}, "not True"),
        ({"scenes": 0}, "1 to 100,000 scenes, not 0"),
        ({"scenes": "many"}, "not 'many'"),
    ],
)
def test_refuses_unusable_options(options, says):
    with pytest.raises(CompanionError, match=rf"{says}\.$"):
        datasets.load("digit_scenes", split="train", **options)
