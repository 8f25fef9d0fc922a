"""A clip of moving digits, with where they are in each frame."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from companion.datasets.digit_scenes import LARGEST, SMALLEST, box_of, draw_digit, noise, paper, pen, to_bytes
from companion.datasets.digits import scans
from companion.datasets.registry import SPLITS
from companion.errors import CompanionError

FASTEST = 0.02  # of the side, in a frame


@dataclass(frozen=True, eq=False)
class DigitClip:
    """Frames, and what is where in them."""

    frames: NDArray[np.uint8]
    """[T, size, size, 3], red first."""
    boxes: NDArray[np.float32]
    """[T, digits, 4]: x1, y1, x2, y2 in pixels, tightly around each digit; x2 and y2 are the first outside."""
    labels: NDArray[np.int64]
    """[digits]: 0 to 9, the same in all frames."""


def digit_clip(split: str = "test", *, frames: int = 100, digits: int = 3, size: int = 160, seed: int = 0) -> DigitClip:
    """Digits as those of `digit_scenes`, moving at constant speed over one background.

    Each digit has a band of the picture to itself, as wide as the picture, and bounces at its edges: they never meet.
    Every machine makes the same bytes.

    Args:
        split: whose scans: ``train`` or ``test``.
        frames: how many, 1 to 1,000.
        digits: how many, 1 to 4.
        size: side of the frames in pixels, 48 to 640.
        seed: of the digits, their colours, places and speeds.

    Raises:
        CompanionError: no such split, or a number out of range.
    """
    if split not in SPLITS:
        raise CompanionError(f"there is no split {split!r} of digit_clip: choose {' or '.join(SPLITS)}.")
    for what, value, low, high in (
        ("frames", frames, 1, 1000),
        ("digits", digits, 1, 4),
        ("pixels a side", size, 48, 640),
        ("as its seed", seed, 0, 2**32 - 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CompanionError(f"digit_clip can have {low} to {high:,} {what}, not {value!r}.")
    _, labels, splits = scans()
    random = np.random.RandomState(seed)
    background, grain = paper(random, size), noise(random, size)
    film, boxes = np.empty((frames, size, size, 3), np.uint8), np.empty((frames, digits, 4), np.float32)
    band = size // digits
    smallest, largest = int(size * SMALLEST), min(int(size * LARGEST), int(band / 1.2))  # a margin is ⅛ and rounding
    chosen = [int(splits[split][int(share * len(splits[split]))]) for share in random.random_sample(digits)]
    moving = []
    for scan in chosen:
        drawn = draw_digit(scan, smallest + int(random.random_sample() * (largest - smallest + 1)))
        room = np.array([size - len(drawn), band - len(drawn)])  # to the right, and downwards
        start, speed = random.random_sample(2) * room, (random.random_sample(2) * 2 - 1) * FASTEST * size
        moving.append((drawn, pen(random), room, start, speed))
    for t in range(frames):
        picture = background.copy()
        for i, (drawn, colour, room, start, speed) in enumerate(moving):
            x, y = _bounced(start + speed * t, room)
            y += i * band
            place = slice(y, y + len(drawn)), slice(x, x + len(drawn))
            picture[:, *place] = picture[:, *place] * (1 - drawn) + colour * drawn
            boxes[t, i] = box_of(drawn, x, y)
        film[t] = to_bytes(picture, grain).transpose(1, 2, 0)
    return DigitClip(film, boxes, labels[chosen])


def _bounced(place: NDArray[np.float64], room: NDArray[np.int64]) -> tuple[int, int]:
    """Where something is after it was reflected at 0 and at ``room``, in whole pixels."""
    twice = np.maximum(2 * room, 1)
    folded = place % twice
    x, y = np.minimum(folded, twice - folded).clip(0, room).astype(np.int64).tolist()
    return x, y
