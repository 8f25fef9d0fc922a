import io
import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from companion import CompanionError, plots, train
from companion.metrics.trade_offs import pareto_front
from companion.train.parallel.pipeline import Event


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


NETWORKS = [
    {"name": "b", "ms": 4.0, "accuracy": 92},
    {"name": "a", "ms": 1.0, "accuracy": 90},
    {"name": "c", "ms": 3.0, "accuracy": 91},
    {"name": "d", "ms": 5.0, "accuracy": 91},
]


def texts(axis):
    return {text.get_text(): text for text in axis.texts}


def test_trade_offs_draw_the_front_as_steps_and_the_rest_hollow():
    axis = plots.plot_trade_off(NETWORKS, x="ms", y="accuracy", maximize="accuracy").axes[0]
    front, rest = axis.lines
    assert front.get_xydata().tolist() == [[1, 90], [3, 91], [4, 92]]
    assert rest.get_xydata().tolist() == [[5, 91]]
    # 90 % until something better is fast enough: the step is at the next point.
    assert front.get_drawstyle() == "steps-post"
    assert front.get_markerfacecolor() == front.get_color() == rest.get_color()
    assert (rest.get_markerfacecolor(), rest.get_linestyle()) == ("white", "None")


@pytest.mark.parametrize(
    ("maximize", "x_label", "y_label", "step"),
    [
        ("accuracy", "(← better)   ms", "accuracy   (better →)", "steps-post"),
        ([], "(← better)   ms", "(← better)   accuracy", "steps-post"),
        (["ms"], "ms   (better →)", "(← better)   accuracy", "steps-pre"),
        (["accuracy", "ms"], "ms   (better →)", "accuracy   (better →)", "steps-pre"),
    ],
)
def test_axes_say_which_way_is_better(maximize, x_label, y_label, step):
    axis = plots.plot_trade_off(NETWORKS, x="ms", y="accuracy", maximize=maximize).axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (x_label, y_label)
    assert axis.lines[0].get_drawstyle() == step
    minimize = {"ms", "accuracy"} - ({maximize} if isinstance(maximize, str) else set(maximize))
    front = pareto_front(NETWORKS, maximize=maximize, minimize=minimize)
    drawn = axis.lines[0].get_xydata().tolist()
    assert drawn == sorted([point["ms"], point["accuracy"]] for point in front)
    rest = axis.lines[1].get_xydata().tolist()
    assert len(drawn) + len(rest) == len(NETWORKS)


def test_labels_stand_on_the_better_side_of_the_front_and_on_the_other_of_the_rest():
    axis = plots.plot_trade_off(NETWORKS, x="ms", y="accuracy", maximize="accuracy", label="name").axes[0]
    assert {name: text.xy for name, text in texts(axis).items()} == {
        point["name"]: (point["ms"], point["accuracy"]) for point in NETWORKS
    }
    sides = {name: (text.get_ha(), text.get_va()) for name, text in texts(axis).items()}
    assert sides == dict.fromkeys("abc", ("right", "bottom")) | {"d": ("left", "top")}


def test_labels_do_not_stand_over_each_other_nor_over_points():
    """Twelve points in three heaps, on the right edge too."""
    points = [
        {"name": f"network {size} in precision {i}", "ms": size + i / 50, "accuracy": 80 + size}
        for size in (1, 2, 10)
        for i in range(4)
    ]
    picture = plots.plot_trade_off(points, x="ms", y="accuracy", maximize="accuracy", label="name")
    picture.draw_without_rendering()
    (axis,) = picture.axes
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(picture.bbox.count_contains(box.get_points()) == 2 for box in boxes)
    dots = axis.transData.transform([[point["ms"], point["accuracy"]] for point in points])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


def test_trade_offs_with_units_and_logarithms():
    picture = plots.plot_trade_off(NETWORKS, x="ms", y="accuracy", units={"accuracy": "%"}, log="ms")
    axis = picture.axes[0]
    assert (axis.get_xscale(), axis.get_yscale(), axis.get_ylabel()) == ("log", "linear", "(← better)   accuracy in %")
    assert picture._repr_png_()
    assert "1" in [text.get_text() for text in axis.get_xticklabels()]  # not 10⁰


def test_no_points_make_an_empty_trade_off():
    assert plots.plot_trade_off([], x="ms", y="accuracy", log=["ms"], label="name")._repr_png_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximize": "energy"}, "'energy' is on no axis: they are 'ms' and 'accuracy'."),
        ({"log": ["bytes"]}, "'bytes' is on no axis: they are 'ms' and 'accuracy'."),
        ({"x": "bytes"}, "point 0 has no 'bytes'."),
        ({"label": "title"}, "point 0 has no 'title'."),
        ({"x": "zero", "log": "zero"}, "a logarithmic axis has no place for zero 0."),
    ],
)
def test_trade_offs_that_cannot_be_drawn(options, message):
    points = [{**point, "zero": 0} for point in NETWORKS]
    with pytest.raises(CompanionError) as caught:
        plots.plot_trade_off(points, **({"x": "ms", "y": "accuracy"} | options))
    assert str(caught.value) == message


def test_drawing_needs_no_pyplot():
    program = (
        "import sys; from companion import plots; plots.plot_images([], [])._repr_png_(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_magnitudes_are_shares_above_the_ranges_of_formats():
    gradients = [torch.tensor([0.0, 2.0**-20, 2.0**-20, 3 * 2.0**-20, 1.0])]
    found = {
        name: train.gradient_magnitudes(gradients, scale=scale) for name, scale in (("plain", 1.0), ("scaled", 4.0))
    }
    upper, lower = plots.plot_magnitudes(found, [train.FORMATS["fp16"], train.FORMATS["bf16"]]).axes
    plain, scaled = (patch.get_data() for patch in upper.patches)
    assert {int(e): v for e, v in zip(plain.edges, plain.values, strict=False) if v} == {-20: 50, -19: 25, 0: 25}
    assert {int(e): v for e, v in zip(scaled.edges, scaled.values, strict=False) if v} == {-18: 50, -17: 25, 2: 25}
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["plain", "scaled"]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_hatch()) for bar in lower.patches]
    assert bars == [(-14, 16, None), (-24, -14, "////"), (-126, 128, None), (-133, -126, "////")]
    assert [tick.get_text() for tick in lower.get_yticklabels()] == ["fp16", "bf16"]
    low, high = upper.get_xlim()
    assert low < -20
    assert high > 16
    assert {line.get_xdata()[0] for line in upper.lines} == {-133, -24, 16, 128}


EVENTS = [
    Event(0, "forward", 0, 0.0, 1.0),
    Event(1, "forward", 0, 1.0, 2.0),
    Event(1, "backward", 0, 2.0, 4.0),
    Event(0, "backward", 0, 4.0, 6.5),
]


def test_a_timeline_has_a_row_for_each_stage_and_a_block_for_each_event():
    axis = plots.plot_timeline(EVENTS, title="one").axes[0]
    blocks = [path.get_extents().bounds for bars in axis.collections for path in bars.get_paths()]
    expected = [(0, -0.4, 1, 0.8), (1, 0.6, 1, 0.8), (2, 0.6, 2, 0.8), (4, -0.4, 2.5, 0.8)]  # x, y, width, height
    np.testing.assert_allclose(sorted(blocks), expected)
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["stage 0", "stage 1"]
    assert [text.get_text() for text in axis.texts] == ["0"] * 4
    assert {(bars.get_label(), bars.get_hatch()) for bars in axis.collections if bars.get_label()[0] != "_"} == {
        ("forward", None),
        ("backward", "////"),
    }  # without colour, too
    assert axis.get_ylim() == (1.5, -0.5)  # the first stage is on top
    assert plots.plot_timeline([])._repr_png_()


def test_exchanges_wait_and_then_travel():
    events = [
        SimpleNamespace(tensor="b", ready=2.5, start=2.5, end=4.0),
        SimpleNamespace(tensor="a", ready=2.0, start=3.0, end=3.5),
    ]
    axis = plots.plot_exchanges(events, title="one step").axes[0]
    blocks = [path.get_extents().bounds for bars in axis.collections for path in bars.get_paths()]
    expected = [(0, -0.4, 1000, 0.8), (500, 0.6, 0, 0.8), (500, 0.6, 1500, 0.8), (1000, -0.4, 500, 0.8)]
    np.testing.assert_allclose(sorted(blocks), expected)
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b"]
    assert {(bars.get_label(), bars.get_hatch()) for bars in axis.collections if bars.get_label()[0] != "_"} == {
        ("waits for the other workers", "////"),
        ("on its way", None),
    }
    assert plots.plot_exchanges([])._repr_png_()


def test_scaling_beside_what_would_be_proportional():
    measured, ideal = plots.plot_scaling({4: 250.0, 2: 180.0}).axes[0].lines
    assert measured.get_xydata().tolist() == [[2, 180], [4, 250]]
    assert ideal.get_xydata().tolist() == [[2, 180], [4, 360]]
    assert measured.get_linestyle() != ideal.get_linestyle()


def test_speed_ups_are_inverse_ratios_with_their_intervals():
    def ratio(low, value, high):
        return SimpleNamespace(low=low, value=value, high=high)

    one = SimpleNamespace(baseline="torch", ratios={"a": ratio(0.4, 0.5, 0.8), "b": ratio(1.0, 2.0, 4.0)})
    many = SimpleNamespace(baseline="torch", ratios={"a": ratio(0.2, 0.25, 0.5)})
    picture = plots.plot_speed_ups({"one": one, "many": many})
    (axis,) = picture.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert axis.get_xlabel() == "times as fast as torch"
    points = [container.lines[0].get_xdata().tolist() for container in axis.containers]
    assert points == [[2.0, 0.5], [4.0]]
    ends = [segment[:, 0] for container in axis.containers for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[1.25, 2.5], [0.25, 1.0], [2.0, 5.0]])
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["one", "many"]


def seen(throughput, *latencies):
    return SimpleNamespace(throughput=throughput, latency=lambda percentile: np.percentile(latencies, percentile))


def test_load_is_a_line_for_each_server_from_few_connections_to_many():
    found = {"one": {8: seen(200, 0.04), 1: seen(100, 0.01)}, "many": {1: seen(90, 0.02, 0.04)}}
    picture = plots.plot_load(found)
    (axis,) = picture.axes
    one, many = axis.lines
    assert one.get_xydata().tolist() == [[100, 10], [200, 40]]
    assert many.get_xydata().tolist() == [[90, 30]]
    for ours, theirs in zip(looks(one), looks(many), strict=True):
        assert ours != theirs  # in colour, line and mark
    assert [(text.get_text(), text.xy) for text in axis.texts] == [("1", (100, 10)), ("8", (200, 40)), ("1", (90, 30))]
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["one", "many"]
    assert axis.get_ylabel() == "(← better)   latency in ms, median"
    slow = plots.plot_load(found, percentile=100).axes[0]
    assert slow.lines[1].get_xydata().tolist() == [[90, 40]]
    assert slow.get_ylabel() == "(← better)   latency in ms, p100"
    assert picture._repr_png_()
    assert plots.plot_load({})._repr_png_()


def looks(line):
    return line.get_color(), line.get_linestyle(), line.get_marker()


def test_batches_are_shares_of_the_items():
    picture = plots.plot_batches({"idle": [1, 1, 2, 4], "fixed": [8]})
    upper, lower = picture.axes
    assert [bar.get_height() for bar in upper.patches] == pytest.approx([0, 25, 25, 0, 50])
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([0] * 8 + [100])
    assert [axis.get_title(loc="left") for axis in picture.axes] == ["idle", "fixed"]
    assert picture._repr_png_()
    assert plots.plot_batches({})._repr_png_()
    assert plots.plot_batches({"none": []})._repr_png_()
