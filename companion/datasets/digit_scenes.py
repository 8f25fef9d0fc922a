"""Scenes composed of real handwritten digits, each pixel and each digit labelled: to segment and to detect."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from companion.datasets.digits import LABELS, scans, warp
from companion.errors import CompanionError

SCENES = {"train": 2000, "test": 500}
SEEDS = {"train": 0, "test": 1}
POOLS = 20  # parts of a split's scans that share none with each other

DIGITS = 6  # at most, in one scene
TRIES = 20  # at finding room for a digit before the scene goes without it
SMALLEST, LARGEST = 0.125, 0.4  # of the scene's side: 20 to 64 pixels of 160
PAPER, PEN = 0.4, 0.55  # paper is at most so bright in each channel, a pen at least
NOISE = 0.15  # of the range from black to white

# The share of a pixel that ink covers. Between the two it is the soft edge of a stroke: neither digit nor background.
BACKGROUND_BELOW, DIGIT_FROM = 0.25, 0.5
VOID = 255

SIZES = {"segment": 64, "detect": 160}
TASKS = {"segment": ("background", *LABELS), "detect": LABELS}


class DigitScenes(Dataset[tuple[Tensor, Any]]):
    """Scenes kept as bytes, with what is in them.

    A sample is ``(image, mask)`` or ``(image, {"boxes", "labels"})``: the image float32 [3, size, size] in 0..1; the
    mask int64 [size, size], 0 for background, 1 to 10 for the digits 0 to 9, 255 for void; the boxes float32 [K, 4]
    as x1, y1, x2, y2 in pixels (x2 and y2 are the first column and row outside); their labels int64 [K], 0 to 9.
    """

    name = "digit_scenes"

    def __init__(self, task: str, scenes: "list[_Scene]") -> None:
        self.task = task
        self.labels = TASKS[task]
        self.augmentation = "letterbox" if task == "detect" else None  # a digit mirrored is none
        self.images = torch.from_numpy(np.stack([scene.image for scene in scenes]))  # uint8 [N, 3, size, size]
        self.masks = torch.from_numpy(np.stack([scene.mask for scene in scenes]))  # uint8 [N, size, size]
        # The digits of all scenes in one tensor each: thousands of small ones would cost every worker a file handle.
        self.boxes = torch.tensor([box for scene in scenes for box in scene.boxes], dtype=torch.float32)  # [M, 4]
        self.scans = torch.tensor([scan for scene in scenes for scan in scene.scans])  # int64 [M], numbers of scans
        self.digits = torch.from_numpy(scans()[1])[self.scans]  # int64 [M]
        self.starts = [0, *np.cumsum([len(scene.boxes) for scene in scenes]).tolist()]
        """Scene i has the boxes from starts[i] to starts[i + 1]."""
        self.groups = np.arange(len(scenes)) % POOLS
        """Scenes [N] of one group are made from one pool of scans, so training and validation must not share them."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image = self.images[index].float().div(255)
        if self.task == "segment":
            return image, self.masks[index].long()
        index = range(len(self))[index]  # from the end, too
        own = slice(self.starts[index], self.starts[index + 1])
        return image, {"boxes": self.boxes[own], "labels": self.digits[own]}

    def sha256(self) -> str:
        """SHA-256 of all pixels, masks, boxes (two bytes a number, the low one first) and digits (one byte each)."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.masks.numpy().tobytes())
        digest.update(self.boxes.numpy().astype("<u2").tobytes())
        digest.update(self.digits.numpy().astype(np.uint8).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Scene:
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    boxes: list[tuple[int, int, int, int]]
    scans: list[int]


def digit_scenes(split: str, task: str = "segment", size: int | None = None, scenes: int | None = None) -> DigitScenes:
    """Scenes of one to six scans of `digits`, tinted, ⅛ to ⅖ as large as the scene, on a noisy gradient.

    The scans are split first, as those of `digits`: no test scene shares a scan with a training scene. Within a
    split they are divided into 20 pools; scene i takes all its digits from pool i mod 20, which is its entry in
    ``groups``: what `fit` holds out for validation therefore shares no scan with what it trains on. The digits
    lie apart. Every machine makes the same bytes, and fewer scenes are the first ones of more.

    A pixel is a digit's (1 to 10 for 0 to 9) if ink covers at least half of it, background (0) below a quarter, and
    void (255, which neither loss nor score counts) between: the soft edge of a stroke. The scans have only 8×8
    pixels, so an edge is wide: 3 % of all pixels. A digit's box is drawn tightly around its pixels in the mask.

    Args:
        split: ``train`` or ``test``.
        task: ``segment`` for samples (image, mask), ``detect`` for (image, boxes and labels): see `DigitScenes`.
        size: side of the scenes in pixels, 48 to 640; 64 to segment and 160 to detect if not given. At 160 digits are
            20 to 64 pixels large.
        scenes: how many; 2,000 to train and 500 to test with if not given.

    Raises:
        CompanionError: no such task, or a size or number of scenes out of range.
    """
    if task not in TASKS:
        raise CompanionError(f"digit_scenes is for the tasks {' and '.join(TASKS)}, not {task!r}.")
    size = SIZES[task] if size is None else size
    scenes = SCENES[split] if scenes is None else scenes
    for what, value, low, high in (("pixels a side", size, 48, 640), ("scenes", scenes, 1, 100_000)):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CompanionError(f"digit_scenes can have {low} to {high:,} {what}, not {value!r}.")
    _, labels, splits = scans()
    own = splits[split]
    members = [own[labels[own] == digit] for digit in range(len(LABELS))]
    # Only random_sample, and only arithmetic that is exact: see `hard_digits` and `warp`.
    random = np.random.RandomState(SEEDS[split])
    return DigitScenes(task, [_compose(random, size, [m[i % POOLS :: POOLS] for m in members]) for i in range(scenes)])


def _compose(random: np.random.RandomState, size: int, pool: list[NDArray[np.int64]]) -> _Scene:
    """One scene of digits from a pool of scans, given by their numbers for each digit."""
    _, labels, _ = scans()

    def draw(n: int) -> int:
        return int(random.random_sample() * n)

    picture = paper(random, size)
    mask = np.zeros((size, size), np.uint8)
    boxes, used = [], []
    taken = np.zeros((size, size), bool)
    smallest, largest = int(size * SMALLEST), int(size * LARGEST)
    for _ in range(1 + draw(DIGITS)):
        candidates = pool[draw(len(LABELS))]
        scan = int(candidates[draw(len(candidates))])
        side = smallest + draw(largest - smallest + 1)
        drawn, colour = draw_digit(scan, side), pen(random)
        window = len(drawn)
        for _ in range(TRIES):
            x, y = draw(size - window + 1), draw(size - window + 1)
            place = slice(y, y + window), slice(x, x + window)
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        picture[:, *place] = picture[:, *place] * (1 - drawn) + colour * drawn
        mask[place] = np.where(drawn >= DIGIT_FROM, labels[scan] + 1, np.where(drawn < BACKGROUND_BELOW, 0, VOID))
        boxes.append(box_of(drawn, x, y))
        used.append(scan)
    return _Scene(to_bytes(picture, noise(random, size)), mask, boxes, used)


def paper(random: np.random.RandomState, size: int) -> NDArray[np.float64]:
    """A gradient between four random colours: [3, size, size]."""
    corners = random.random_sample((2, 2, 3, 1, 1)) * PAPER
    across = ((np.arange(size) + 0.5) / size)[None, None, :]
    down = across.transpose(0, 2, 1)
    top = corners[0, 0] * (1 - across) + corners[0, 1] * across
    bottom = corners[1, 0] * (1 - across) + corners[1, 1] * across
    return top * (1 - down) + bottom * down


def pen(random: np.random.RandomState) -> NDArray[np.float64]:
    """A random colour of ink: [3, 1, 1]."""
    return PEN + random.random_sample((3, 1, 1)) * (1 - PEN)


def draw_digit(scan: int, side: int) -> NDArray[np.float64]:
    """The ink of a scan enlarged to so many pixels a side, and a margin: [side + margins, side + margins] in 0..1."""
    window = side + 2 * -(-side // 16)  # half a pixel of the scan more on each side, in which ink fades away
    zero = np.zeros(1)
    return warp(scans()[0][scan][None], zero, zero + side / window, zero, zero, size=window)[0]


def box_of(drawn: NDArray[np.float64], x: int, y: int) -> tuple[int, int, int, int]:
    """The box around the ink of a digit whose first column and row are ``x`` and ``y``."""
    inside = drawn >= DIGIT_FROM
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    return x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1


def noise(random: np.random.RandomState, size: int) -> NDArray[np.float64]:
    """The sum of two uniform numbers, less 1, [3, size, size]: triangular, which is bell-shaped enough."""
    return random.random_sample((3, size, size)) + random.random_sample((3, size, size)) - 1


def to_bytes(picture: NDArray[np.float64], grain: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A picture in 0..1 with noise on it, in 8 bits."""
    return np.rint(np.clip(picture + grain * NOISE, 0, 1) * 255).astype(np.uint8)
