"""A clip of moving digits: where they are in each frame, and that they move as they should."""

import numpy as np
import pytest

from companion import CompanionError, datasets
from companion.datasets import digit_scenes, digits


@pytest.fixture(scope="module")
def clip():
    return datasets.digit_clip(frames=200)


def test_shapes(clip):
    assert (clip.frames.shape, clip.frames.dtype) == ((200, 160, 160, 3), np.uint8)
    assert (clip.boxes.shape, clip.boxes.dtype) == ((200, 3, 4), np.float32)
    assert (clip.labels.shape, clip.labels.dtype) == ((3,), np.int64)


def test_boxes_hold_the_ink_tightly(monkeypatch):
    """White ink on black paper without noise: bright is what is at least half ink, as in `digit_scenes`."""
    for name, value in (("PAPER", 0.0), ("PEN", 1.0), ("NOISE", 0.0)):
        monkeypatch.setattr(digit_scenes, name, value)
    clip = datasets.digit_clip(frames=30, seed=1)
    for frame, boxes in zip(clip.frames, clip.boxes.astype(int), strict=True):
        ink = frame[:, :, 0] >= 127.5
        for x1, y1, x2, y2 in boxes:
            inside = ink[y1:y2, x1:x2]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            ink[y1:y2, x1:x2] = False
        assert not ink.any()


def test_labels_are_those_of_test_scans(monkeypatch):
    """Drawn from a split whose scans are all of one digit, all are that digit."""
    ink, labels, splits = digits.scans()
    only = {"train": splits["train"][labels[splits["train"]] == 7], "test": splits["test"]}
    monkeypatch.setattr("companion.datasets.moving_digits.scans", lambda: (ink, labels, only))
    assert datasets.digit_clip("train", frames=1, digits=4).labels.tolist() == [7] * 4
    assert set(datasets.digit_clip(frames=1, digits=4).labels.tolist()) != {7}


def test_speed_is_constant_but_for_bounces(clip):
    """Steps of whole pixels differ from the speed by less than one; a bounce turns a step's sign."""
    steps = np.diff(clip.boxes, axis=0)
    assert np.array_equal(steps[:, :, :2], steps[:, :, 2:])  # nothing changes its size
    for step in steps[:, :, :2].reshape(199, -1).T:
        speeds = np.abs(step)
        usual = np.median(speeds)
        assert (speeds <= usual + 1).all()
        assert (speeds >= usual - 1).mean() > 0.9  # the step in which it turns is shorter
    assert (clip.boxes.max(0) - clip.boxes.min(0) > 0).all()


def test_digits_bounce_and_stay_inside_apart(clip):
    assert clip.boxes.min() >= 0
    assert clip.boxes.max() <= 160
    left, right = clip.boxes[:, :, 0].min(0), clip.boxes[:, :, 2].max(0)
    assert (right - left > 100).any()  # 200 frames are enough to cross the picture
    for upper, lower in ((0, 1), (1, 2)):
        assert clip.boxes[:, upper, 3].max() <= clip.boxes[:, lower, 1].min()


def test_the_same_seed_makes_the_same_clip(clip):
    again, other = datasets.digit_clip(frames=200), datasets.digit_clip(frames=2, seed=1)
    assert np.array_equal(clip.frames, again.frames)
    assert np.array_equal(clip.boxes, again.boxes)
    assert not np.array_equal(clip.boxes[:2], other.boxes)
    few = datasets.digit_clip(frames=2)
    assert np.array_equal(few.frames, clip.frames[:2])


@pytest.mark.parametrize("size", [48, 49, 63, 100, 161])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_any_number_fits_any_size(size, number):
    for seed in range(3):
        clip = datasets.digit_clip(frames=3, digits=number, size=size, seed=seed)
        assert clip.boxes.max() <= size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "val"}, r"there is no split 'val' of digit_clip: choose train or test\."),
        ({"frames": 0}, r"digit_clip can have 1 to 1,000 frames, not 0\."),
        ({"digits": 5}, r"1 to 4 digits, not 5\."),
        ({"size": 47}, r"48 to 640 pixels a side, not 47\."),
        ({"seed": -1}, r"as its seed, not -1\."),
        ({"frames": True}, r"not True\."),
    ],
)
def test_refuses_unusable_options(options, says):
    with pytest.raises(CompanionError, match=says):
        datasets.digit_clip(**options)
