"""What YOLOv5 learns from: which of its boxes answer for which object, and how wrong they are.

Redmon and Farhadi (YOLOv3, 2018) let boxes begin from anchors and learn how sure they are of an object; Zheng et al.
(Distance-IoU Loss, 2020) measure how far off a box is; Jocher et al. (YOLOv5, 2020) let neighbouring cells answer, too.
Written from these descriptions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from companion.errors import CompanionError
from companion.models.yolov5 import STRIDES, Detect, YOLOv5

RATIO = 4.0
"""An anchor answers for an object if no side of one is so many times the other's, for (2·sigmoid)² reaches so far."""
BALANCE = (4.0, 1.0, 0.4)
"""Weight of the objectness on each scale; a finer one has more cells, and fewer of them with an object."""
BOX, OBJECT, CLASS = 0.05, 1 / 25_200, 0.05
"""Weights of the three parts, for a mean over boxes, a sum over 25,200 (of 640×640 pixels), a sum over classes.

The first two as published. The third is published as 0.5 / 80, for 80 classes; with that little the digits of
digit_scenes are told apart much later (after twelve epochs on 1,000 scenes a mAP@0.5 of 0.22, and 0.80 with ours)."""


@dataclass(frozen=True)
class Matches:
    """Which boxes of the network answer for which objects: P pairs."""

    objects: Tensor
    """int64 [P], the object's number."""
    scales: Tensor
    """int64 [P], from 0 for the finest."""
    rows: Tensor
    """int64 [P], where the box is among those that the network returns in evaluation mode."""


def assign(boxes: Tensor, grids: Sequence[tuple[int, int]], anchors: Tensor) -> Matches:
    """The boxes that learn to find each object.

    On every scale, and for every anchor of about the object's size (`RATIO`), three: that of the cell in which the
    object's centre lies, of the nearer one beside it, and of the nearer one above or below. From all of these, the
    network can reach the centre. Cells outside the picture are left out.

    Args:
        boxes: float [M, 4], the objects' centre, width and height in pixels.
        grids: height and width of each scale in cells.
        anchors: float [scales, anchors, 2], width and height in pixels.
    """
    objects, scales, rows = [], [], []
    start = 0
    for scale, ((height, width), stride) in enumerate(zip(grids, STRIDES, strict=True)):
        ratio = boxes[:, None, 2:] / anchors[scale]  # [M, anchors, 2]
        number, anchor = (torch.maximum(ratio, 1 / ratio).amax(2) < RATIO).nonzero(as_tuple=True)
        centre = boxes[number, :2] / stride
        cell = centre.floor()
        nearer = (centre - cell - 0.5).sign()  # -1 or 1; from the very middle none is
        steps = nearer * nearer.new_tensor(((0, 0), (1, 0), (0, 1)))[:, None]  # [3, P, 2]
        cells = cell + steps
        good = ((cells >= 0) & (cells < cells.new_tensor((width, height)))).all(2)
        good[1:] &= (steps[1:] != 0).any(2)
        pair = good.nonzero()[:, 1]
        x, y = cells[good].long().unbind(1)
        objects.append(number[pair])
        scales.append(torch.full_like(pair, scale))
        rows.append(start + (anchor[pair] * height + y) * width + x)
        start += anchors.shape[1] * height * width
    return Matches(torch.cat(objects), torch.cat(scales), torch.cat(rows))


def complete_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Complete intersection over union of pairs of boxes [P, 4] (centre, width, height): [P], 1 for equal ones.

    The usual one, less the distance of the centres, squared, as a share of the squared diagonal around both, and less a
    penalty for another ratio of the sides, which counts for more the better the boxes overlap (Zheng et al., 2020,
    equations 7 to 11). Unlike the usual one it tells boxes that do not touch which way to go.
    """
    tiny = torch.finfo(boxes.dtype).eps
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    other_low, other_high = others[:, :2] - others[:, 2:] / 2, others[:, :2] + others[:, 2:] / 2
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(1)
    usual = shared / (boxes[:, 2:].prod(1) + others[:, 2:].prod(1) - shared + tiny)
    diagonal = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).square().sum(1)
    distance = (boxes[:, :2] - others[:, :2]).square().sum(1) / (diagonal + tiny)
    angles = [torch.atan(each[:, 2] / (each[:, 3] + tiny)) for each in (boxes, others)]
    shape = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    with torch.no_grad():
        counts = shape / (1 - usual + shape + tiny)
    return usual - distance - counts * shape


def loss(network: nn.Module, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
    """How wrong a YOLOv5 is: mean over the pictures.

    A picture's is the sum, over the scales, of 1 − `complete_iou` and of the classes' cross-entropies, each a mean over
    the boxes that `assign` finds, and of the objectness' cross-entropy, a mean over all boxes: a box should be as sure
    as it is good, and one that answers for nothing should say so. (As published the first two are means over the batch.
    Here a batch may be computed in parts.)

    Args:
        network: a `YOLOv5`, whose anchors count.
        outputs: what it returned.
        targets: float [N, K, 5]: class and corners x1, y1, x2, y2 in pixels; class −1 where a picture has fewer than K.

    Returns:
        A float32 number; in evaluation mode not a number (NaN), for the boxes of that do not tell it.

    Raises:
        CompanionError: another network in training mode, whose loss is not known.
    """
    if not network.training:
        return torch.tensor(math.nan)
    if not isinstance(network, YOLOv5):
        raise CompanionError(f"a {type(network).__name__} has no known loss for detection: give fit a task with one.")
    detect = network.model[-1]
    assert isinstance(detect, Detect)
    raw = [each.float() for each in outputs]
    logits = torch.cat([each.flatten(1, 3) for each in raw], 1)  # [N, A, 5 + classes]
    pictures, boxes, scales = len(logits), logits.shape[1], len(raw)

    image, slot = (targets[..., 0] >= 0).nonzero(as_tuple=True)  # [M]
    label, corners = targets[image, slot, 0].long(), targets[image, slot, 1:]
    objects = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)
    grids = [(each.shape[2], each.shape[3]) for each in raw]
    strides = detect.anchors.new_tensor(STRIDES)[:, None, None]
    found = assign(objects, grids, detect.anchors * strides)

    image, label = image[found.objects], label[found.objects]  # [P]
    group = image * scales + found.scales
    share = 1 / group.bincount(minlength=pictures * scales)[group]  # of a mean
    good = complete_iou(detect.decode(raw)[image, found.rows, :4], objects[found.objects])
    away = ((1 - good) * share).sum()

    said = logits[image, found.rows, 5:]
    wrong = binary_cross_entropy_with_logits(said, one_hot(label, said.shape[1]).to(said), reduction="none").sum(1)
    confused = (wrong * share).sum()

    # Where a box answers for several objects, the one that it fits best.
    sure = torch.zeros(pictures * boxes, device=logits.device)
    sure = sure.scatter_reduce(0, image * boxes + found.rows, good.detach().clamp(min=0), "amax")
    unsure = binary_cross_entropy_with_logits(logits[..., 4], sure.view(pictures, boxes), reduction="none")
    sizes = [each[0, ..., 0].numel() for each in raw]
    mean = torch.cat([unsure.new_full((size,), balance / size) for size, balance in zip(sizes, BALANCE, strict=True)])
    return (BOX * away + CLASS * confused + OBJECT * boxes * (unsure * mean).sum()) / pictures
