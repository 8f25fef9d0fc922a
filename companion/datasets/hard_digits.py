"""The handwritten digits made difficult, so that compression costs something one can see."""

import math
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from companion.datasets.arrays import ArrayImages
from companion.datasets.digits import LABELS, SIZE, scans, warp
from companion.errors import CompanionError

IMAGES = {"train": 4000, "test": 2000}
SEEDS = {"train": 0, "test": 1}
CHUNK = 250  # images drawn at a time: their arrays stay in a processor's cache

# What level 1 does, at most. Found by measuring: see the table in `hard_digits`.
HALF_TANGENT = 0.18  # tan(a/2): turned by up to 20 degrees
SMALLER, LARGER = 0.30, 0.05  # of the digit's size
SHIFT = 0.6  # pixels of the scan; 4 times that on the canvas
FRAGMENT = 3.6  # how far a neighbour reaches in, pixels of the scan; the first of them is its blank frame
TINT = 0.44  # how far each channel of paper and ink moves from black and white
NOISE = 0.25  # of the range from black to white


def hard_digits(split: str, level: float = 1.0) -> ArrayImages:
    """The same scans, turned, scaled, shifted, tinted, with noise and a neighbour's fragment: 4,000 / 2,000 images.

    The scans are split first, as those of `digits`: no test image shares a scan, or a fragment of one,
    with a training image. Every machine makes the same bytes, and one image differs between two levels
    only in how far it was distorted. Accuracies on the test split after AdamW with a peak learning rate of
    2e-3, a cosine schedule and batches of 32, without augmentation, and with that share of the weights set
    to 0, the smallest of the whole network, without training again (the first row a mean of three seeds)::

        level  network           epochs  whole   80 %   90 %   95 %
        1.0    simple_cnn             6   93.8   92.2   89.8   75.5
        1.0    simple_cnn_3conv       6   96.5   96.3   93.9   87.8
        1.3    simple_cnn             6   82.1   81.1   79.8   72.8
        1.3    cifar_resnet14         8   95.4   10.0   10.0   10.0
        1.6    cifar_resnet14         8   70.9   18.3   10.0   10.0

    Args:
        split: ``train`` or ``test``.
        level: 0 is plain digits, 1.0 to 1.3 is made to show what compression costs, 3 is hopeless.

    Raises:
        CompanionError: the level is not a number from 0 to 3.
    """
    if not isinstance(level, Real) or not math.isfinite(level) or not 0 <= level <= 3:
        raise CompanionError(f"hard_digits has levels from 0 (plain) to 3 (hopeless), not {level!r}.")
    ink, labels, splits = scans()
    own = splits[split]
    n = IMAGES[split]
    # RandomState's streams are frozen for ever by numpy's promise (NEP 19), default_rng's are not. Only
    # random_sample is used: it is exact integer arithmetic, while normal deviates go through a logarithm.
    random = np.random.RandomState(SEEDS[split])

    targets = np.arange(n) % len(LABELS)
    members = [own[labels[own] == digit] for digit in range(len(LABELS))]
    chosen = np.array([members[t][i // len(LABELS) % len(members[t])] for i, t in enumerate(targets)])
    neighbours = own[(random.random_sample(n) * len(own)).astype(np.int64)]

    def spread() -> NDArray[np.float64]:
        return random.random_sample(n) * 2 - 1

    turn, turn_neighbour = spread() * HALF_TANGENT * level, spread() * HALF_TANGENT * level
    size = np.maximum(1 + (random.random_sample(n) * (SMALLER + LARGER) - SMALLER) * level, 0.2)
    x, y = spread() * SHIFT * level, spread() * SHIFT * level
    # A neighbour's middle is 9 pixels of the scan away (its 8 and one blank), less what reaches in.
    away = 9 - random.random_sample(n) * FRAGMENT * level
    along = spread() * level
    side = (random.random_sample(n) * 4).astype(np.int64)  # right, left, below, above
    sign = 1 - 2 * (side % 2)
    neighbour_x, neighbour_y = np.where(side < 2, (sign * away, along), (along, sign * away))
    paper = random.random_sample((n, 3, 1, 1)) * TINT * level
    pen = 1 - random.random_sample((n, 3, 1, 1)) * TINT * level

    images = np.empty((n, 3, SIZE, SIZE), np.uint8)
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        digit = warp(ink[chosen[part]], turn[part], size[part], x[part], y[part])
        fragment = warp(ink[neighbours[part]], turn_neighbour[part], size[part], neighbour_x[part], neighbour_y[part])
        drawn = np.maximum(digit, fragment)[:, None]
        shape = (len(drawn), 3, SIZE, SIZE)
        # The sum of two uniform numbers, less 1: triangular, which is bell-shaped enough.
        noise = random.random_sample(shape) + random.random_sample(shape) - 1
        picture = paper[part] + (pen[part] - paper[part]) * drawn + noise * (NOISE * level)
        images[part] = np.rint(np.clip(picture, 0, 1) * 255)
    used = np.stack([chosen, neighbours], axis=1)
    return ArrayImages(f"hard_digits (level {level:g})", images, targets, LABELS, scans=used)
