import pytest
import torch
from torch.nn.functional import pad

from companion import CompanionError
from companion.train.augment import PADDING, augmentation
from companion.train.tasks import TASKS


def change(name, images, targets=None, task="classify"):
    """Images and targets after the augmentation called ``name``, as `fit` applies it."""
    return augmentation(name, TASKS[task].follow)(images, targets, range(len(images)), len(images))


def placements(image, outside=0):
    """All 81 shifts of one picture, cut out of its padded copy."""
    _, height, width = image.shape
    big = pad(image, [PADDING] * 4, value=outside)
    return [big[:, y : y + height, x : x + width] for y in range(2 * PADDING + 1) for x in range(2 * PADDING + 1)]


def test_each_result_is_one_of_the_shifts_and_all_of_them_occur():
    torch.manual_seed(0)
    image = torch.rand(3, 12, 10)
    candidates = placements(image)
    results, _ = change("shift", image.expand(900, 3, 12, 10))
    hits = [next(k for k, c in enumerate(candidates) if torch.equal(c, r)) for r in results]
    assert set(hits) == set(range(81))


def test_images_of_a_batch_stay_apart():
    images = torch.stack([torch.full((1, 8, 8), float(i)) for i in range(1, 6)])
    for i, result in enumerate(change("shift", images)[0], start=1):
        assert set(result.unique().tolist()) <= {0.0, float(i)}


def test_about_half_are_mirrored():
    torch.manual_seed(0)
    image = torch.rand(1, 9, 11)
    plain, mirrored = placements(image), placements(image.flip(2))
    results, _ = change("shift_flip", image.expand(400, 1, 9, 11))
    flipped = sum(any(torch.equal(m, r) for m in mirrored) for r in results)
    assert all(any(torch.equal(c, r) for c in plain + mirrored) for r in results)
    assert 150 < flipped < 250  # five standard deviations


@pytest.mark.parametrize("name", ["shift", "shift_flip"])
def test_masks_go_along_with_their_images_and_what_comes_in_is_void(name):
    torch.manual_seed(0)
    images = torch.randint(1, 200, (300, 1, 8, 10)).float()
    masks = images[:, 0].long()
    moved, followed = change(name, images, masks, "segment")
    assert followed.dtype == torch.int64
    assert torch.equal(torch.where(followed == 255, 0, followed), moved[:, 0].long())
    assert torch.equal(followed == 255, moved[:, 0] == 0)
    assert not torch.equal(followed, masks)


def test_labels_stay():
    labels = torch.arange(4)
    assert change("shift_flip", torch.rand(4, 3, 8, 8), labels)[1] is labels


def test_the_batch_itself_is_not_changed():
    images, masks = torch.rand(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long)
    before = images.clone()
    change("shift_flip", images, masks, "segment")
    assert torch.equal(images, before)
    assert not masks.any()


def test_none_changes_nothing_and_unknown_names_are_refused():
    images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2)
    assert change(None, images, labels) == (images, labels)
    assert augmentation(None, None)(images, labels, range(3), 3) == (images, labels)
    with pytest.raises(CompanionError, match="no augmentation 'rotate'"):
        augmentation("rotate", None)


def test_targets_that_cannot_follow_are_refused():
    with pytest.raises(CompanionError, match=r"'shift' is for images with labels or masks: choose None\.$"):
        augmentation("shift", None)


def test_half_of_the_letterboxed_are_whole_and_half_are_shrunk_on_gray():
    torch.manual_seed(0)
    image = torch.rand(3, 40, 60)
    moved, _ = change("letterbox", image.expand(400, 3, 40, 60))
    gray = torch.tensor(114 / 255)
    whole = [torch.equal(each, image) for each in moved]
    assert 150 < sum(whole) < 250
    for each in (each for each, same in zip(moved, whole, strict=True) if not same):
        rows, columns = ((each != gray).any(0).any(axis) for axis in (1, 0))
        height, width = int(rows.sum()), int(columns.sum())
        assert 0.6 * 40 - 1 <= height <= 40
        assert height / 40 == pytest.approx(width / 60, abs=0.05)  # proportions are kept, but for whole pixels
        assert set(each.unique().tolist()) <= {*image.unique().tolist(), float(gray)}


@pytest.mark.parametrize("name", ["shift", "shift_flip", "letterbox"])
def test_boxes_go_along_with_what_is_in_them(name):
    """Each object is a block of its own brightness: its box after the change is that of the pixels left of it."""
    torch.manual_seed(0)
    corners = torch.tensor([[2, 3, 9, 12], [20, 1, 29, 7], [12, 14, 30, 20], [0, 18, 4, 20]])
    images, targets = torch.zeros(300, 1, 20, 30), torch.full((300, 5, 5), -1.0)
    for number, (x1, y1, x2, y2) in enumerate(corners.tolist(), start=1):
        images[:, :, y1:y2, x1:x2] = number
        targets[:, number - 1] = torch.tensor([number, x1, y1, x2, y2])
    moved, followed = change(name, images, targets, "detect")
    lost = 0
    for image, rows in zip(moved, followed, strict=True):
        assert (rows[4] == -1).all()
        for number, row in enumerate(rows[:4].tolist(), start=1):
            ys, xs = (image[0] == number).nonzero(as_tuple=True)
            if len(ys):
                assert row == [number, xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            else:
                lost += 1
                assert row == [-1] * 5
    assert not torch.equal(followed, targets)
    assert (lost > 0) == (name != "letterbox")  # the last lies at an edge, over which the shifts push it
