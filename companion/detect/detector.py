"""From a picture to detections: letterbox, engine, candidates, suppression, and back to the picture's pixels."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.datasets.images import LARGEST_FILE, decode
from companion.detect.placement import letterbox
from companion.engines import Engine
from companion.errors import CompanionError
from companion.models.boxes import candidates, suppress

LARGEST = 4096  # side of a canvas
TOLERATED = 1e-3  # outside of 0..1, after somebody's arithmetic
SIZE, STRIDE = 640, 32  # YOLOv5's own canvas, and what its sides are multiples of


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, by falling score."""

    boxes: np.ndarray
    """Float32 [K, 4]: x1, y1, x2, y2 in pixels of the picture."""
    scores: np.ndarray
    """Float32 [K] in 0..1."""
    class_ids: np.ndarray
    """Int64 [K]."""
    labels: tuple[str, ...]
    """The classes' names."""

    def __len__(self) -> int:
        return len(self.scores)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values: a dict with ``box``, ``score``, ``class_id`` and ``label`` for each detection."""
        return [
            {"box": box, "score": score, "class_id": number, "label": self.labels[number]}
            for box, score, number in zip(
                self.boxes.tolist(), self.scores.tolist(), self.class_ids.tolist(), strict=True
            )
        ]


def coco_labels() -> tuple[str, ...]:
    """The 80 classes of COCO, in the order in which detectors number them."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    named = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # 91, of which 80 are used
    return tuple(name for name in named if name not in ("__background__", "N/A"))


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """A picture from a JPEG, PNG, WebP, BMP or GIF file: float32 [3, H, W] in 0..1, red first, upright.

    Raises:
        CompanionError: no such file, too large, damaged, or no picture.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise CompanionError(f"{path} is no image file: name a single one.")
        if path.stat().st_size > LARGEST_FILE:
            raise CompanionError(f"{path} has {path.stat().st_size >> 20} MiB, too much for an image.")
        content = path.read_bytes()
    except OSError as error:
        raise CompanionError(f"cannot read {path}: {error.strerror or error}.") from error
    return decode(content, str(path))


class Detector:
    """Finds objects with a YOLOv5 that an engine runs.

    Args:
        engine: its first input takes images [N, 3, H, W] in 0..1; its first output is [N, A, 5 + classes], decoded, in
            pixels of the input: what YOLOv5's own export and ours give.
        labels: names of the classes; None takes the file's own, or COCO's if there are 80 classes, or their numbers.
        confidence: the lowest score of a detection.
        overlap: intersection over union above which two boxes of a class are one object.
        agnostic: boxes of different classes are one object, too.
        most: detections in a picture, at most.
        size: side of the canvas, if the network takes any; a multiple of 32. If not given, what the network was made
            for, as far as it says so, else 640.

    Raises:
        CompanionError: the engine runs no such network, or an argument is out of range.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        labels: Sequence[str] | None = None,
        confidence: float = 0.25,
        overlap: float = 0.45,
        agnostic: bool = False,
        most: int = 300,
        size: int | None = None,
    ) -> None:
        for name, share in (("confidence", confidence), ("overlap", overlap)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise CompanionError(f"{name} is {share!r}: give a number from 0 to 1.")
        if not _whole(most) or most < 1:
            raise CompanionError(f"most is {most!r}: give a whole number from 1.")
        if size is not None and (not _whole(size) or not STRIDE <= size <= LARGEST or size % STRIDE):
            raise CompanionError(f"size is {size!r}: give a multiple of {STRIDE} up to {LARGEST}.")
        self.engine, self.confidence, self.overlap = engine, confidence, overlap
        self.agnostic, self.most = agnostic, most
        if len(engine.inputs) != 1 or not engine.outputs:
            raise CompanionError(
                f"this network is no detector: it takes {len(engine.inputs)} inputs, not images alone."
            )
        taken, given = engine.inputs[0], engine.outputs[0]
        sides = taken.shape[2:]
        if len(taken.shape) != 4 or taken.dtype != "float32" or taken.shape[1] != 3:
            raise CompanionError(f"this network is no detector: it takes {taken}, not images [N, 3, H, W].")
        if taken.shape[0] not in (None, 1):
            raise CompanionError(f"this network takes {taken.shape[0]} pictures at a time: export it for one or any.")
        if len(given.shape) != 3 or (given.shape[2] is not None and given.shape[2] < 6):
            raise CompanionError(f"this network is no detector: it gives {given}, not boxes [N, A, 5 + classes].")
        made_for = (engine.metadata.input_size or ())[1:]  # which a stranger may have written
        fits = len(made_for) == 2 and all(side <= LARGEST and side % STRIDE == 0 for side in made_for)
        height, width = (size, size) if size else made_for if fits else (SIZE, SIZE)
        self.size = (sides[0] or height, sides[1] or width)
        if max(self.size) > LARGEST:
            raise CompanionError(f"this network takes {taken}: more than {LARGEST} pixels a side are too many.")
        self._labels = None if labels is None else tuple(labels)

    def __call__(self, image: Tensor | np.ndarray | str | os.PathLike[str]) -> Detections:
        """What is in ``image``.

        Args:
            image: the name of a file; float32 [3, H, W] in 0..1; or uint8 [H, W, 3]. Red comes first.

        Raises:
            CompanionError: no picture, or the engine cannot run.
        """
        canvas, placement = letterbox(_picture(image), self.size)
        outputs = self.engine.run({self.engine.inputs[0].name: canvas[None].numpy()})
        output = _checked(outputs[self.engine.outputs[0].name][0])
        boxes, scores, class_ids = candidates(output, self.confidence)
        kept = suppress(boxes, scores, None if self.agnostic else class_ids, overlap=self.overlap, most=self.most)
        labels = self.labels(output.shape[1] - 5)
        return Detections(placement.to_image(boxes[kept]), scores[kept], class_ids[kept].astype(np.int64), labels)

    def labels(self, classes: int) -> tuple[str, ...]:
        """Names of so many classes.

        Raises:
            CompanionError: the network has another number of them.
        """
        named = self._labels or self.engine.metadata.labels or (coco_labels() if classes == 80 else None)
        named = named or tuple(str(number) for number in range(classes))
        if len(named) != classes:
            raise CompanionError(f"the network has {classes} classes, and {len(named)} labels were given.")
        return named


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(output: np.ndarray) -> np.ndarray:
    """The rows of a picture, if that is what they are."""
    if output.ndim != 2 or output.shape[1] < 6:
        raise CompanionError(f"this network is no detector: it gave {list(output.shape)}, not rows [A, 5 + classes].")
    output = output.astype(np.float32)  # of float16, areas would overflow
    shares = output[:, 4:]
    if (shares < -TOLERATED).any() or (shares > 1 + TOLERATED).any():
        raise CompanionError(
            "this network gives no shares in 0..1 from the fifth column on: export YOLOv5 with its boxes decoded."
        )
    return output


def _picture(image: Any) -> Tensor:
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise CompanionError(f"an image array must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}.")
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(255)
    if isinstance(image, Tensor) and image.dtype == torch.float32 and image.dim() == 3 and len(image) == 3:
        if not image.numel():
            raise CompanionError("an image has no pixels.")
        low, high = (bound.item() for bound in image.aminmax())
        if low < -TOLERATED or high > 1 + TOLERATED or low != low:  # NaN is not itself
            raise CompanionError(
                f"an image tensor holds numbers in 0..1, not {low:g} to {high:g}: divide bytes by 255."
            )
        return image.detach().cpu()
    raise CompanionError("an image is a file's name, a float32 tensor [3, H, W] or a uint8 array [H, W, 3].")
