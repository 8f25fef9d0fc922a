"""Real handwritten digits that need no download: scikit-learn's copy of a UCI test set."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from companion.datasets.arrays import ArrayImages

LABELS = tuple("0123456789")
SIZE = 32  # what the chapter's networks take
TEST_SCANS = 540  # 30 % of 1,797


@cache
def scans() -> tuple[NDArray[np.float64], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """The scans: ink [1797, 8, 8] in 0..1 (1 is ink), labels [1797], and which scans belong to each split."""
    from sklearn.datasets import load_digits  # a second of imports
    from sklearn.model_selection import train_test_split

    source = load_digits()
    labels = source.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_SCANS, stratify=labels, random_state=0)
    return source.images / 16, labels, {"train": train, "test": test}  # a scan's values are 0 to 16


def warp(
    ink: NDArray[np.float64],
    half_tangent: NDArray[np.float64],
    scale: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    size: int = SIZE,
) -> NDArray[np.float64]:
    """Draw scans on a square canvas, turned, scaled and shifted, with bilinear interpolation; around a scan is no ink.

    The same bytes come out on every machine: IEEE arithmetic gives + − × ÷ one exact answer everywhere,
    whereas sine and cosine differ in the last bit from one processor or library to the next. A rotation by
    the angle a is therefore given by t = tan(a/2): cos a = (1 − t²) / (1 + t²), sin a = 2t / (1 + t²).

    Args:
        ink: scans [N, 8, 8].
        half_tangent: tan(a/2) per scan [N]; positive turns it clockwise.
        scale: size per scan [N]; at 1 a scan fills the canvas.
        x: shift to the right per scan [N], in pixels of a scan that fills the canvas.
        y: shift downwards [N], likewise.
        size: side of the canvas in pixels.

    Returns:
        Ink [N, size, size] in 0..1.
    """
    n, side = ink.shape[:2]
    t, scale, x, y = (value[:, None, None] for value in (half_tangent, scale, x, y))
    cos, sin = (1 - t * t) / (1 + t * t) / scale, 2 * t / (1 + t * t) / scale
    centres = ((np.arange(size) + 0.5) / size - 0.5) * side  # of the canvas' pixels, from its middle
    right, down = centres[None, None, :] - x, centres[None, :, None] - y
    # Where each pixel comes from. One blank row and column before the scan and two after take in all that is outside.
    column = np.clip(right * cos + down * sin + (side - 1) / 2 + 1, 0, side + 1)
    row = np.clip(down * cos - right * sin + (side - 1) / 2 + 1, 0, side + 1)
    padded = np.pad(ink, ((0, 0), (1, 2), (1, 2))).ravel()
    width = side + 3
    left, top = column.astype(np.int64), row.astype(np.int64)
    column, row = column - left, row - top
    at = np.arange(n)[:, None, None] * (width * width) + top * width + left
    above = padded[at] * (1 - column) + padded[at + 1] * column
    below = padded[at + width] * (1 - column) + padded[at + width + 1] * column
    return above * (1 - row) + below * row


def digits(split: str) -> ArrayImages:
    """1,797 digits written by 13 people, enlarged from 8×8 to 3×32×32: 1,257 to train, 540 to test (stratified).

    The 8×8 pixels count the ink in blocks of 4×4 of the original scans. The split is at random, so both parts are in
    the same 13 hands.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    ink, labels, splits = scans()
    chosen = splits[split]
    still = np.zeros(len(chosen))
    gray = np.rint(warp(ink[chosen], still, still + 1, still, still) * 255).astype(np.uint8)
    # Shifted but not mirrored in training: a flipped 2 is no 2.
    pixels = gray[:, None].repeat(3, axis=1)
    return ArrayImages("digits", pixels, labels[chosen], LABELS, augmentation="shift", scans=chosen[:, None])
