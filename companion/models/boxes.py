"""Boxes and how they overlap; corners are (x1, y1, x2, y2)."""

import numpy as np


def candidates(output: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a detector's output that are sure enough of something.

    Args:
        output: float [A, 5 + classes] for one picture: centre, width and height of a box, how sure the network is that
            it holds an object, and of which class.
        confidence: the lowest score, object times class.

    Returns:
        Boxes [K, 4] as corners, scores [K] and class numbers [K].
    """
    rows = output[output[:, 4] > confidence]  # a product of numbers below 1 is below each of them
    rows = rows[(rows[:, 2:4] >= 0).all(1)]  # a box of other networks may have no sides
    classes = rows[:, 5:].argmax(1)
    scores = rows[:, 4] * rows[np.arange(len(rows)), 5 + classes]
    sure = scores > confidence
    rows, classes, scores = rows[sure], classes[sure], scores[sure]
    half = rows[:, 2:4] / 2
    return np.concatenate([rows[:, :2] - half, rows[:, :2] + half], 1), scores, classes


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of ``box`` [4] with each of ``others`` [K, 4]: [K]; not a number for two empty boxes."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    with np.errstate(invalid="ignore", over="ignore"):  # boxes as large as float32 allows share nothing that is known
        shared = (high - low).clip(min=0).prod(1)
        return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def suppress(
    boxes: np.ndarray,
    scores: np.ndarray,
    class_ids: np.ndarray | None = None,
    *,
    overlap: float = 0.45,
    most: int | None = None,
) -> np.ndarray:
    """Non-maximum suppression: of boxes that overlap, keep the one with the highest score.

    Args:
        boxes: float [K, 4]. A box or a score that is not finite is dropped first.
        scores: float [K].
        class_ids: int [K]: boxes of different classes leave each other alone; None if they should not.
        overlap: intersection over union above which the lower score goes.
        most: how many boxes to keep at most.

    Returns:
        Indices of the boxes kept, int64, by falling score; of equal scores the first comes first.

    As `torchvision.ops.batched_nms` does it, without moving the classes apart, which costs precision.
    """
    limit = np.float64(overlap)  # not rounded to the boxes' float32, as torchvision's is not
    good = np.isfinite(boxes).all(1) & np.isfinite(scores)
    order = np.flatnonzero(good)
    order = order[np.argsort(-scores[order], kind="stable")]
    kept: list[int] = []
    while len(order) and (most is None or len(kept) < most):
        first, order = order[0], order[1:]
        kept.append(first)
        goes = overlaps(boxes[first], boxes[order]) > limit
        if class_ids is not None:
            goes &= class_ids[order] == class_ids[first]
        order = order[~goes]
    return np.array(kept, dtype=np.int64)
