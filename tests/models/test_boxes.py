"""Candidates by hand; overlaps and suppression against torchvision's."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou, nms

from companion.models.boxes import candidates, overlaps, suppress

# Centre, width, height, how sure of an object, two classes.
ROWS = np.array(
    [
        [50, 30, 20, 10, 0.9, 0.1, 0.8],  # class 1, .72
        [50, 31, 20, 10, 0.8, 0.7, 0.1],  # class 0, .56
        [20, 20, 8, 8, 0.4, 0.5, 0.1],  # .2
        [20, 20, 8, 8, 0.1, 1.0, 0.1],  # .1
        [np.nan, 20, 8, 8, 0.9, 1.0, 0.1],  # for `suppress` to drop
        [5, 5, -3, 2, 1, 1, 0],  # has no sides
    ],
    dtype=np.float32,
)


def test_candidates_by_hand():
    boxes, scores, classes = candidates(ROWS, 0.25)
    np.testing.assert_allclose(scores, [0.72, 0.56, 0.9])
    assert classes.tolist() == [1, 0, 0]
    assert boxes[:2].tolist() == [[40, 25, 60, 35], [40, 26, 60, 36]]


def test_nothing_is_sure_enough():
    boxes, scores, classes = candidates(ROWS[:5], 0.95)
    assert (boxes.shape, len(scores), len(classes)) == ((0, 4), 0, 0)


def random_boxes(generator, n, side=64):
    """Corners at quarters, of which float32 computes areas without rounding; many overlap, some are empty."""
    corners = generator.integers(0, 4 * side, (n, 2, 2)) / 4
    return np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)


def test_overlaps_by_hand():
    box = np.array([0, 0, 4, 2], dtype=np.float32)
    others = np.array([[0, 0, 4, 2], [2, 0, 6, 2], [4, 0, 8, 2], [0, 0, 2, 1]], dtype=np.float32)
    np.testing.assert_allclose(overlaps(box, others), [1, 4 / 12, 0, 2 / 8])


def test_overlaps_as_torchvision():
    generator = np.random.default_rng(0)
    boxes, others = random_boxes(generator, 50), random_boxes(generator, 60)
    expected = box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy()
    np.testing.assert_array_equal(np.stack([overlaps(box, others) for box in boxes]), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.45, 0.999])
def test_suppression_as_torchvision(threshold):
    for seed in range(250):
        generator = np.random.default_rng(seed)
        n = (0, 1, 2, 7, 30, 100)[seed % 6]
        boxes = random_boxes(generator, n, side=(8, 64)[seed % 2])
        if seed % 10 == 9:
            boxes[:] = boxes[:1]  # all are one
        scores = (generator.integers(0, 20, n) / 20).astype(np.float32)  # many are equal
        classes = generator.integers(0, 3, n)
        tensors = [torch.from_numpy(value) for value in (boxes, scores, classes)]
        expected = batched_nms(*tensors, threshold)
        np.testing.assert_array_equal(suppress(boxes, scores, classes, overlap=threshold), expected, f"seed {seed}")
        expected = nms(*tensors[:2], threshold)
        np.testing.assert_array_equal(suppress(boxes, scores, overlap=threshold), expected, f"seed {seed}")


def test_what_is_no_number_is_dropped_first():
    boxes = np.array(
        [[0, 0, 4, 4], [0, 0, np.nan, 4], [0, 0, 4, np.inf], [0, 0, 4, 4], [9, 9, 12, 12]], dtype=np.float32
    )
    scores = np.array([0.5, 0.9, 0.9, np.nan, 0.7], dtype=np.float32)
    assert suppress(boxes, scores).tolist() == [4, 0]


def test_so_many_at_most():
    boxes = np.arange(20, dtype=np.float32)[:, None] * 10 + np.array([0, 0, 5, 5], dtype=np.float32)
    scores = np.linspace(0, 1, 20, dtype=np.float32)
    assert suppress(boxes, scores, most=3).tolist() == [19, 18, 17]


def test_nothing_is_changed():
    generator = np.random.default_rng(0)
    boxes, scores = random_boxes(generator, 30), generator.random(30)
    before = boxes.copy(), scores.copy()
    suppress(boxes, scores)
    np.testing.assert_array_equal(boxes, before[0])
    np.testing.assert_array_equal(scores, before[1])


def test_boxes_as_large_as_float32_allows_are_no_warning():
    boxes = np.array([[-1e30, -1e30, 1e30, 1e30], [0, 0, 10, 10], [1, 0, 10, 10]], dtype=np.float32)
    kept = suppress(boxes, np.array([0.9, 0.8, 0.7], dtype=np.float32))
    assert kept.tolist() == [0, 1]
