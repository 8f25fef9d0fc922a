"""Pictures on a canvas, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.detect import Placement, letterbox


def test_a_wide_picture_gets_bars_above_and_below():
    canvas, placement = letterbox(torch.ones(3, 20, 40), (64, 64))
    assert placement == Placement(40, 20, left=0, top=16, across=1.6, down=1.6)
    assert canvas.shape == (3, 64, 64)
    assert canvas[:, 16:48].unique().tolist() == [1]
    np.testing.assert_allclose(canvas[:, [0, 15, 48, 63]].unique(), [114 / 255])


def test_a_picture_that_fits_is_not_touched():
    image = torch.rand(3, 32, 64)
    canvas, placement = letterbox(image, (32, 64))
    assert torch.equal(canvas, image)
    assert placement == Placement(64, 32, left=0, top=0, across=1, down=1)


def test_between_the_nearest_pixels():
    """Of 4 columns to 2, each is the mean of two; halves of a gray go up."""
    image = torch.tensor([0.0, 2, 100, 103]).div(255).expand(3, 2, 4)
    canvas, _ = letterbox(image, (1, 2))
    np.testing.assert_allclose(canvas[0] * 255, [[1, 102]])


# What OpenCV 5.0's resize (INTER_LINEAR) makes of the uint8 grays 0, 15, 30, … 225 in 4 rows.
OPENCV = {2: [[38, 68], [158, 188]], 3: [[12, 32, 52], [92, 113, 133], [172, 192, 212]]}


@pytest.mark.parametrize("side", OPENCV)
def test_shrunk_as_opencv_does_it(side):
    """To a gray: its weights have 11 bits."""
    image = torch.arange(16.0).reshape(4, 4).mul(15).div(255).expand(3, 4, 4)
    canvas, _ = letterbox(image, (side, side))
    np.testing.assert_allclose(canvas[0] * 255, OPENCV[side], rtol=0, atol=1.001 if side == 3 else 0.001)


def test_the_way_back_is_cut_at_the_edges():
    placement = Placement(100, 50, left=0, top=25, across=0.5, down=0.5)
    boxes = np.array([[10, 30, 20, 45], [-3, 0, 60, 60]], dtype=np.float32)
    assert placement.to_image(boxes).tolist() == [[20, 10, 40, 40], [0, 0, 100, 50]]
    assert placement.to_image(boxes).dtype == np.float32
    assert placement.to_image(np.zeros((0, 4))).shape == (0, 4)


sides = st.integers(1, 300)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([(64, 64), (96, 160)]))
def test_there_and_back(width, height, size):
    """A box that holds the picture's bright part on the canvas holds it in the picture, to a pixel of the canvas."""
    canvas, placement = letterbox(torch.ones(3, height, width), size)
    assert canvas.shape == (3, *size)
    rows, columns = (canvas[0] == 1).nonzero(as_tuple=True)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=np.float32)
    assert placement.to_image(box)[0] == pytest.approx([0, 0, width, height], abs=1e-3)
    # Proportions are kept, as far as whole pixels allow: of less than half a pixel, one is made.
    assert abs(placement.across - placement.down) <= 1 / min(width, height)
