"""Which boxes of YOLOv5 answer for which objects, and its loss: by hand, against torchvision's, and by a plain loop."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torchvision.ops import box_convert, complete_box_iou_loss

from companion import CompanionError, models
from companion.models.yolov5 import ANCHORS, STRIDES
from companion.models.yolov5_loss import assign, complete_iou, loss

GRIDS = [(8, 8), (4, 4), (2, 2)]  # of 64×64 pixels
COCO = torch.tensor(ANCHORS, dtype=torch.float32)


def pairs(*boxes, grids=GRIDS, anchors=COCO):
    """(object, scale, row) of each match."""
    found = assign(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), grids, anchors)
    return set(zip(found.objects.tolist(), found.scales.tolist(), found.rows.tolist(), strict=True))


def test_an_object_by_hand():
    """24×30 pixels around (18, 38).

    In cells of 8 pixels (2.25, 4.75): cell (2, 4), the one on its left and the one below, for each of three anchors.
    Of 16 pixels (1.125, 2.375): (1, 2), left, above; the largest anchor is 119 high, 3.97 times as much. Of 32 pixels
    the smallest is 116 wide, 4.8 times as much.
    """
    fine = {(0, 0, 64 * anchor + 8 * y + x) for anchor in range(3) for x, y in ((2, 4), (1, 4), (2, 5))}
    middle = {(0, 1, 192 + 16 * anchor + 4 * y + x) for anchor in range(3) for x, y in ((1, 2), (0, 2), (1, 1))}
    assert pairs((18, 38, 24, 30)) == fine | middle


@pytest.mark.parametrize(
    ("centre", "cells"),
    [
        ((2, 2), {(0, 0)}),  # its neighbours are outside
        ((62, 62), {(7, 7)}),
        ((2, 6), {(0, 0), (0, 1)}),
        ((20, 36), {(2, 4)}),  # the very middle of its cell
        ((16, 36), {(2, 4), (1, 4)}),  # on the line
        ((64, 30), {(7, 3)}),  # on the picture's edge
        ((70, 30), set()),
    ],
)
def test_cells_at_the_borders(centre, cells):
    one = torch.tensor([[[10.0, 10.0]], [[999.0, 999.0]], [[999.0, 999.0]]])
    assert pairs((*centre, 10, 10), anchors=one) == {(0, 0, 8 * y + x) for x, y in cells}


@pytest.mark.parametrize(
    ("size", "fits"), [((39, 10), True), ((40, 10), False), ((10, 2.6), True), ((10, 2.5), False), ((0, 10), False)]
)
def test_an_anchor_fits_up_to_four_times(size, fits):
    one = torch.tensor([[[10.0, 10.0]], [[999.0, 999.0]], [[999.0, 999.0]]])
    assert bool(pairs((20, 36, *size), anchors=one)) == fits


def test_a_picture_that_is_no_square():
    """Rows run along its width: 12 cells in each of 8."""
    one = torch.tensor([[[10.0, 10.0]], [[10.0, 10.0]], [[999.0, 999.0]]])
    found = pairs((92, 4, 10, 10), grids=[(8, 12), (4, 6), (2, 3)], anchors=one)
    assert found == {(0, 0, 11), (0, 1, 96 + 5)}  # (11.5, 0.5) in cells of 8, (5.75, 0.25) of 16


def test_no_objects_no_matches():
    assert pairs() == set()


def test_what_is_matched_can_be_reached():
    """The network's centre lies within half a cell beyond its cell, its sides are up to four times the anchor's."""
    random = np.random.default_rng(0)
    boxes = torch.from_numpy(random.uniform((0, 0, 2, 2), (64, 64, 60, 60), (500, 4))).float()
    found = assign(boxes, GRIDS, COCO)
    starts = [0, 192, 240]
    seen = set()
    for number, scale, row in zip(found.objects.tolist(), found.scales.tolist(), found.rows.tolist(), strict=True):
        seen.add((number, scale, row))
        anchor, cell = divmod(row - starts[scale], math.prod(GRIDS[scale]))
        y, x = divmod(cell, GRIDS[scale][1])
        away = boxes[number, :2] / STRIDES[scale] - torch.tensor([x, y])
        assert ((away >= -0.5) & (away <= 1.5)).all()
        assert (boxes[number, 2:] < 4 * COCO[scale, anchor]).all()
    assert len(seen) == len(found.rows)  # none twice


def test_complete_overlap_by_hand():
    a = torch.tensor([[1.0, 1, 2, 2], [0, 0, 4, 2], [0, 0, 2, 2], [5, 5, 3, 7]])
    b = torch.tensor([[2.0, 1, 2, 2], [0, 0, 2, 2], [10, 0, 2, 2], [5, 5, 3, 7]])
    shape = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    expected = [
        2 / 6 - 1 / (3**2 + 2**2),  # a third, less the distance as a share of the diagonal around both
        4 / 8 - shape**2 / (1 - 4 / 8 + shape),  # a half, and sides of another ratio
        0 - 10**2 / (12**2 + 2**2),
        1,
    ]
    torch.testing.assert_close(complete_iou(a, b), torch.tensor(expected))


def test_complete_overlap_as_torchvision():
    random = np.random.default_rng(1)
    a, b = (torch.from_numpy(random.uniform(1, 50, (500, 4))) for _ in range(2))
    a.requires_grad_()
    expected = 1 - complete_box_iou_loss(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
    found = complete_iou(a, b)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), a)[0] for each in (found, expected)))


def network(classes=3, **settings):
    return models.create("yolov5_tiny", classes=classes, seed=0, **settings)


def objects(*pictures):
    """Targets [N, K, 5] of pictures, each a list of (class, x1, y1, x2, y2)."""
    targets = torch.full((len(pictures), max(map(len, pictures)), 5), -1.0)
    for i, rows in enumerate(pictures):
        for j, row in enumerate(rows):
            targets[i, j] = torch.tensor(row)
    return targets


SCENE = [(0, 5, 10, 25, 40), (2, 30, 20, 60, 62), (1, 40, 0, 50, 12)]
CROWD = [(i % 3, 10 + i, 10, 30 + i, 40) for i in range(5)]  # all in one cell
EDGES = [(0, 0, 0, 12, 20), (1, 52, 44, 64, 64), (2, 0, 30, 2, 50), (1, 0, 0, 64, 64)]


def plain_loss(model, outputs, targets):
    """The same, box by box."""
    detect = model.model[24]
    rows, total = detect.decode(outputs), 0.0
    for picture, wanted in enumerate(targets):
        wanted = wanted[wanted[:, 0] >= 0]
        centred = box_convert(wanted[:, 1:], "xyxy", "cxcywh")
        anchors = detect.anchors * torch.tensor(STRIDES)[:, None, None]
        found, start = assign(centred, [tuple(raw.shape[2:4]) for raw in outputs], anchors), 0
        for scale, raw in enumerate(outputs):
            flat = raw[picture].reshape(-1, raw.shape[-1])
            sure, away, wrong = torch.zeros(len(flat)), [], []
            for number, at, row in zip(found.objects, found.scales, found.rows, strict=True):
                if at != scale:
                    continue
                box = box_convert(rows[picture, row, :4], "cxcywh", "xyxy")
                away.append(complete_box_iou_loss(box, wanted[number, 1:]))
                sure[row - start] = torch.maximum(sure[row - start], 1 - away[-1].detach())
                named = torch.zeros(raw.shape[-1] - 5)
                named[int(wanted[number, 0])] = 1
                wrong.append(cross_entropy(flat[row - start, 5:], named, reduction="sum"))
            if away:
                total = total + 0.05 * torch.stack(away).mean() + 0.05 * torch.stack(wrong).mean()
            balance = (4, 1, 0.4)[scale]
            total = total + balance * rows.shape[1] / 25_200 * cross_entropy(flat[:, 4], sure)
            start += len(flat)
    return total / len(targets)


@pytest.mark.parametrize("pictures", [[SCENE, []], [CROWD], [EDGES, SCENE, CROWD], [[], []]])
def test_as_a_plain_loop(pictures):
    model, targets = network(), objects(*pictures)
    outputs = model(torch.rand(len(pictures), 3, 64, 64))
    outputs = [each.detach() * 3 for each in outputs]  # farther from where it begins
    torch.testing.assert_close(loss(model, outputs, targets), plain_loss(model, outputs, targets))


@pytest.mark.parametrize("pictures", [[[], []], [CROWD, []], [EDGES, EDGES]])
def test_gradients_are_numbers(pictures):
    model = network()
    found = loss(model, model(torch.rand(2, 3, 64, 64)), objects(*pictures))
    found.backward()
    assert found > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_may_be_computed_in_parts():
    model, targets = network(), objects(SCENE, [], EDGES)
    outputs = [torch.randn(3, 3, side, side, 8, generator=torch.Generator().manual_seed(side)) for side in (8, 4, 2)]
    alone = [loss(model, [each[i : i + 1] for each in outputs], targets[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(model, outputs, targets), torch.stack(alone).mean())


def test_what_fits_costs_next_to_nothing():
    """Outputs that say of each box what is there: the object's corners, its class, and that the rest is empty."""
    model = network()
    detect, targets = model.model[24], objects([(2, 5, 10, 25, 40)])
    outputs = [torch.full((1, 3, side, side, 8), -12.0) for side in (8, 4, 2)]
    anchors = detect.anchors * torch.tensor(STRIDES)[:, None, None]
    centre, size = torch.tensor([15.0, 25.0]), torch.tensor([20.0, 30.0])
    found = assign(torch.cat([centre, size])[None], GRIDS, anchors)
    starts = [0, 192, 240]
    for scale, row in zip(found.scales.tolist(), found.rows.tolist(), strict=True):
        anchor, y, x = (int(i) for i in np.unravel_index(row - starts[scale], (3, *GRIDS[scale])))
        share = (centre / STRIDES[scale] - torch.tensor([x, y]) + 0.5) / 2
        outputs[scale][0, anchor, y, x, :4] = torch.cat([share, (size / anchors[scale, anchor]).sqrt() / 2]).logit()
        outputs[scale][0, anchor, y, x, 4:] = torch.tensor([12.0, -12, -12, 12])
    assert loss(model, outputs, targets) < 1e-4
    outputs[0][..., 4] = 0  # unsure of everything
    assert loss(model, outputs, targets) > 1e-3


def test_a_fresh_network_expects_few_objects():
    """Eight in 640×640 pixels on each scale, but for the layers' random weights."""
    detect = network().model[24]
    for conv, stride in zip(detect.m, STRIDES, strict=True):
        sure = conv.bias.view(3, 8)[:, 4].sigmoid()
        torch.testing.assert_close(sure, torch.full((3,), 8 * stride**2 / 640**2), rtol=0.5, atol=0)


def test_boxes_do_not_tell_it_and_other_networks_have_none():
    model = network().eval()
    rows = model(torch.rand(1, 3, 64, 64))
    assert loss(model, rows, objects(SCENE)).isnan()
    with pytest.raises(CompanionError, match=r"^a Linear has no known loss for detection: give fit a task with one\.$"):
        loss(nn.Linear(1, 1), rows, objects(SCENE))
