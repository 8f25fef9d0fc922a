"""What a task adds to the training loop: how samples become a batch, its loss, and its score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Subset, default_collate

from companion.errors import CompanionError
from companion.models import yolov5_loss
from companion.models.boxes import candidates, suppress
from companion.models.text import PADDING
from companion.models.yolov5 import STRIDES
from companion.train.augment import VOID, Placement

# How detectors are judged: by nearly all boxes, of which suppression leaves more than in use, as YOLOv5's authors do;
# but by the likeliest class of each, and the best 100 of a picture, which is all that COCO's evaluator looks at.
CONFIDENCE, OVERLAP, MOST = 0.001, 0.6, 100
LARGEST_STRIDE = STRIDES[-1]


class Meter(Protocol):
    """Gathers a score batch by batch, so that it is exact over the whole data set (not a mean of batch means)."""

    def update(self, outputs: Any, targets: Any) -> None: ...

    def merge(self, other: Any) -> None:
        """Add what another meter of this kind has gathered: that of another worker."""
        ...

    def compute(self) -> dict[str, float]:
        """Scores by name, higher is better; the first one chooses the best weights."""
        ...


class Accuracy:
    """Share of the samples [N, classes] whose highest output is at the label [N]."""

    def __init__(self) -> None:
        self.right = self.total = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.right += int((outputs.argmax(1) == targets).sum())
        self.total += len(targets)

    def merge(self, other: "Accuracy") -> None:
        self.right += other.right
        self.total += other.total

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.right / self.total}


class Overlap:
    """Mean intersection over union, and pixel accuracy, of scores [N, classes, H, W] against masks [N, H, W].

    Both are exact over all pixels of the data set; those marked void (255) count in neither. A class's intersection
    over union is, of the pixels that it has in the mask or in the prediction, the share that it has in both. The
    mean is over the classes that have any such pixel (Everingham et al., The Pascal Visual Object Classes Challenge:
    A Retrospective, 2015, section 2.3; scikit-learn's ``jaccard_score`` with ``average="macro"``).
    """

    def __init__(self) -> None:
        self.confusion = torch.zeros(0, 0, dtype=torch.int64)
        """Pixels by class in the mask (row) and in the prediction (column), int64 [classes, classes]."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes = outputs.shape[1]
        counted = targets != VOID
        pairs = targets[counted] * classes + outputs.argmax(1)[counted]
        counts = pairs.bincount(minlength=classes**2).reshape(classes, classes).cpu()
        self.confusion = self.confusion + counts if len(self.confusion) else counts

    def merge(self, other: "Overlap") -> None:
        if len(other.confusion):
            self.confusion = self.confusion + other.confusion if len(self.confusion) else other.confusion

    def compute(self) -> dict[str, float]:
        """``mean_iou`` and ``pixel_accuracy``.

        Raises:
            CompanionError: all pixels are void.
        """
        both = self.confusion.diagonal().double()
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        occurs = either > 0
        if not occurs.any():
            raise CompanionError("the masks have nothing to judge by: all their pixels are void (255).")
        mean_iou = (both[occurs] / either[occurs]).mean().item()
        return {"mean_iou": mean_iou, "pixel_accuracy": (both.sum() / self.confusion.sum()).item()}


class AveragePrecision:
    """Mean average precision of boxes [N, A, 5 + classes] as YOLOv5 returns them, by COCO's own evaluator.

    Candidates go through suppression first, and the best 100 of a picture count. A box is right if it overlaps an
    object of its class that no surer one has found; a class' precision is averaged over 101 levels of recall (Lin et
    al., Microsoft COCO, 2014).

    Raises:
        CompanionError: the evaluator is not installed.
    """

    def __init__(self) -> None:
        if any(find_spec(name) is None for name in ("torchmetrics", "pycocotools")):
            raise CompanionError(
                "detectors are judged by torchmetrics and pycocotools, which are not installed: "
                'pip install -c constraints.txt -e ".[detect]".'
            )
        self.found: list[dict[str, Tensor]] = []
        self.wanted: list[dict[str, Tensor]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        for output, target in zip(outputs.float().cpu().numpy(), targets.cpu(), strict=True):
            boxes, scores, classes = candidates(output, CONFIDENCE)
            kept = suppress(boxes, scores, classes, overlap=OVERLAP, most=MOST)
            named = zip(("boxes", "scores", "labels"), (boxes, scores, classes), strict=True)
            self.found.append({name: torch.from_numpy(values[kept]) for name, values in named})
            target = target[target[:, 0] >= 0]
            self.wanted.append({"boxes": target[:, 1:], "labels": target[:, 0].long()})

    def merge(self, other: "AveragePrecision") -> None:
        self.found += other.found
        self.wanted += other.wanted

    def compute(self) -> dict[str, float]:
        """``map50_95``, the mean over overlaps of 0.5, 0.55, … 0.95, which COCO ranks by, and ``map50``, for 0.5.

        Raises:
            CompanionError: there is no object in any picture.
        """
        from torchmetrics.detection import MeanAveragePrecision  # seconds of imports

        if not any(len(target["labels"]) for target in self.wanted):
            raise CompanionError("the pictures have nothing to judge by: there is no object in any of them.")
        evaluator = MeanAveragePrecision(box_format="xyxy", backend="pycocotools")
        evaluator.update(self.found, self.wanted)
        found = evaluator.compute()
        return {"map50_95": found["map"].item(), "map50": found["map_50"].item()}


def _classification_loss(model: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets)


def _text_batch(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Word ids [N, L], padded to the longest text, and labels [N]."""
    ids, labels = zip(*samples, strict=True)
    return pad_sequence(list(ids), batch_first=True, padding_value=PADDING), torch.tensor(labels)


def _segmentation_loss(model: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    # Not reduction="mean", which is 0/0 for a batch of nothing but void.
    return cross_entropy(outputs, targets, ignore_index=VOID, reduction="sum") / (targets != VOID).sum().clamp(min=1)


def _segmentation_batch(samples: list[Any]) -> tuple[Tensor, Tensor]:
    _check_sizes("images and masks", [value for sample in samples for value in sample])
    images, masks = default_collate(samples)
    return images, masks


def _check_sizes(what: str, pictures: list[Tensor]) -> None:
    shapes = {tuple(picture.shape[-2:]) for picture in pictures}
    if len(shapes) > 1:
        sizes = " and ".join(f"{width}×{height}" for height, width in sorted(shapes))
        raise CompanionError(f"{what} of a batch must have one size, not {sizes} pixels.")


def _detection_batch(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and objects [N, K, 5], class and corners; class −1 where a picture has fewer than K."""
    images = [image for image, _ in samples]
    _check_sizes("images", images)
    height, width = images[0].shape[-2:]
    if height % LARGEST_STRIDE or width % LARGEST_STRIDE:
        raise CompanionError(f"a detector needs images of sides that {LARGEST_STRIDE} divides, not {width}×{height}.")
    for number, (_, found) in enumerate(samples):
        if not (found["boxes"][:, 2:] >= found["boxes"][:, :2]).all():  # NaN is not
            raise CompanionError(
                f"image {number} of a batch has a box that is none: give corners, x1 ≤ x2 and y1 ≤ y2, in pixels."
            )
    tables = [torch.cat((found["labels"][:, None].float(), found["boxes"]), 1) for _, found in samples]
    return torch.stack(images), pad_sequence(tables, batch_first=True, padding_value=-1)


def _detection_follow(targets: Tensor, placement: Placement) -> Tensor:
    boxes = placement.boxes(targets[..., 1:])
    there = (targets[..., :1] >= 0) & (boxes[..., 2:3] > boxes[..., :1])
    return torch.where(there, torch.cat((targets[..., :1], boxes), 2), -1.0)


@dataclass(frozen=True)
class Task:
    """One row of the table below, or one of your own for `fit`."""

    collate: Callable[[list[Any]], tuple[Any, Any]]
    """Samples of the data set → (inputs, targets) of a batch."""
    loss: Callable[[nn.Module, Any, Any], Tensor]
    """(network, outputs, targets) → mean loss of the batch; the network, because a detector brings its own."""
    meter: Callable[[], Meter]
    weight: Callable[[Any], int | Tensor] = len
    """Targets → what the batch's mean loss weighs in the mean over all batches: its samples, or pixels that count."""
    follow: Callable[[Any, Placement], Any] | None = None
    """Targets, after augmentation has placed the pictures otherwise; None: this task has no augmentation."""
    evaluation_batch: int = 256
    """Samples at a time when no gradients are kept."""
    epochs: int = 10
    """Passes over the training data of ``companion train`` that is not told how many."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that a resumed run must share with the one it goes on with, such as the weights of a loss."""


TASKS = {
    "classify": Task(default_collate, _classification_loss, Accuracy, follow=lambda labels, _: labels),
    "text": Task(_text_batch, _classification_loss, Accuracy),
    "segment": Task(
        _segmentation_batch,
        _segmentation_loss,
        Overlap,
        weight=lambda masks: (masks != VOID).sum(),
        follow=lambda masks, placement: placement(masks[:, None], VOID)[:, 0],
        evaluation_batch=32,  # every level of the network keeps a picture of many channels
    ),
    "detect": Task(
        _detection_batch,
        yolov5_loss.loss,
        AveragePrecision,
        follow=_detection_follow,
        evaluation_batch=32,
        epochs=25,
    ),
}


def attribute(data: Any, name: str, default: Any = None) -> Any:
    """What a data set says of itself, such as its ``labels``; torch's Subset and ConcatDataset say what is in them."""
    while not hasattr(data, name) and isinstance(data, Subset | ConcatDataset):
        data = data.dataset if isinstance(data, Subset) else data.datasets[0]
    return getattr(data, name, default)


def task_of(data: Any) -> Task:
    """The task that a data set names in its ``task`` attribute; one without is taken for classification.

    Raises:
        CompanionError: no such task.
    """
    name = attribute(data, "task", "classify")
    if name not in TASKS:
        raise CompanionError(f"there is no task {name!r}: the data set must be for one of {', '.join(TASKS)}.")
    return TASKS[name]
