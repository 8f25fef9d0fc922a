import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from companion import plots, train


def test_a_picture_is_a_png_on_white_paper_of_its_size():
    picture = plots.plot_images(np.zeros((3, 3, 8, 8)), ["a", "b", "c"], columns=2)
    image = Image.open(io.BytesIO(picture._repr_png_()))
    assert image.size == (200, 250)  # 2 × 2 pictures of 1 × 1.25 inches at 100 dots per inch
    assert image.convert("RGB").getpixel((199, 249)) == (255, 255, 255)
    assert repr(picture) == "<Picture 2×2.5 inches, 4 axes>"


def test_images_come_in_their_order_with_their_titles():
    images = np.zeros((3, 3, 4, 4))
    images[1] = 1
    axes = plots.plot_images(images, ["a", "b", "c"], columns=2).axes
    assert [axis.get_title() for axis in axes] == ["a", "b", "c", ""]
    assert [axis.images[0].get_array().max() for axis in axes[:3]] == [0, 1, 0]
    assert axes[0].images[0].get_array().shape == (4, 4, 3)


def test_no_images_make_an_empty_sheet():
    assert plots.plot_images(np.zeros((0, 3, 8, 8)), [])._repr_png_()


def test_history_marks_the_epoch_that_was_kept():
    rows = [train.Epoch(i, 0.1, 1 / i, 2 / i, score, 1.0) for i, score in enumerate((0.5, 0.9, 0.8), start=1)]
    left, right = plots.plot_history(train.History(tuple(rows), "accuracy", best_epoch=2)).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3]]
    assert list(right.lines[0].get_ydata()) == pytest.approx([50, 90, 80])
    assert (right.lines[1].get_xdata()[0], right.lines[1].get_ydata()[0]) == (2, 90)
    styles = {(line.get_color(), line.get_linestyle()) for line in left.lines}
    assert len({colour for colour, _ in styles}) == len({style for _, style in styles}) == 2  # not by colour alone


def test_confusion_counts_by_hand():
    axis = plots.plot_confusion([0, 0, 0, 1, 2], [0, 0, 1, 1, 0], ["x", "y", "z"]).axes[0]
    found = {text.get_position(): text.get_text() for text in axis.texts}  # (column, row)
    assert found == {(0, 0): "2", (1, 0): "1", (1, 1): "1", (0, 2): "1"}
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["x", "y", "z"]


def test_drawing_needs_no_pyplot():
    program = (
        "import sys; from companion import plots; plots.plot_images([], [])._repr_png_(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
