import pytest
import torch
from torch.nn.functional import pad

from companion import CompanionError
from companion.train.augment import PADDING, augmentation, shift, shift_flip


def placements(image):
    """All 81 shifts of one picture, cut out of its padded copy."""
    _, height, width = image.shape
    big = pad(image, [PADDING] * 4)
    return [big[:, y : y + height, x : x + width] for y in range(2 * PADDING + 1) for x in range(2 * PADDING + 1)]


def test_each_result_is_one_of_the_shifts_and_all_of_them_occur():
    torch.manual_seed(0)
    image = torch.rand(3, 12, 10)
    candidates = placements(image)
    hits = [next(k for k, c in enumerate(candidates) if torch.equal(c, r)) for r in shift(image.expand(900, 3, 12, 10))]
    assert set(hits) == set(range(81))


def test_images_of_a_batch_stay_apart():
    images = torch.stack([torch.full((1, 8, 8), float(i)) for i in range(1, 6)])
    for i, result in enumerate(shift(images), start=1):
        assert set(result.unique().tolist()) <= {0.0, float(i)}


def test_about_half_are_mirrored():
    torch.manual_seed(0)
    image = torch.rand(1, 9, 9)
    plain, mirrored = placements(image), placements(image.flip(2))
    results = shift_flip(image.expand(400, 1, 9, 9))
    flipped = sum(any(torch.equal(m, r) for m in mirrored) for r in results)
    assert all(any(torch.equal(c, r) for c in plain + mirrored) for r in results)
    assert 150 < flipped < 250  # five standard deviations


def test_the_batch_itself_is_not_changed():
    images = torch.rand(4, 3, 8, 8)
    before = images.clone()
    shift_flip(images)
    assert torch.equal(images, before)


def test_none_changes_nothing_and_unknown_names_are_refused():
    images = torch.rand(2, 3, 4, 4)
    assert augmentation(None)(images) is images
    with pytest.raises(CompanionError, match="no augmentation 'rotate'"):
        augmentation("rotate")
