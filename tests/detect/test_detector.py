"""From pictures to detections, with engines made of NumPy and with the official network."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import CompanionError, engines
from companion.detect import Detections, Detector, coco_labels, draw, read_image
from companion.engines import Engine, Metadata, TensorInfo
from companion.models.yolov5 import load_official

MODELS = Path(os.environ.get("COMPANION_TEST_DATA") or "nowhere").parent / "models"
needs_models = pytest.mark.skipif(not (MODELS / "yolov5n.onnx").exists(), reason="the official YOLOv5n is not here")


class Fixed(Engine):
    """Gives the same output for every picture, and keeps what it was given."""

    def __init__(self, output, *, inputs=((None, 3, 64, 96), "float32"), metadata=None):
        shape = (None, *output.shape)
        taken = TensorInfo("images", inputs[1], inputs[0])
        super().__init__("fixed", [taken], [TensorInfo("boxes", "float32", shape)], metadata or Metadata())
        self.output = output

    def _run(self, inputs):
        (self.given,) = inputs.values()
        return {"boxes": np.stack([self.output] * len(self.given))}

    def _release(self):
        pass


def row(x, y, width, height, sure, *classes):
    return [x, y, width, height, sure, *classes]


ROWS = np.array(
    [
        row(50, 30, 20, 10, 0.9, 0.1, 0.8),  # class 1, .72
        row(51, 30, 20, 10, 0.8, 0.1, 0.8),  # the same again, .64
        row(50, 31, 20, 10, 0.8, 0.7, 0.1),  # there too, but of class 0: .56
        row(20, 20, 8, 8, 0.4, 0.5, 0.1),  # .2
        row(20, 20, 8, 8, 0.1, 1.0, 0.1),  # .1
        row(np.nan, 20, 8, 8, 0.9, 1.0, 0.1),
    ],
    dtype=np.float32,
)


def test_a_picture_of_twice_the_size():
    engine = Fixed(ROWS)
    found = Detector(engine, labels=("a", "b"))(torch.rand(3, 128, 192))
    assert engine.given.shape == (1, 3, 64, 96)
    np.testing.assert_allclose(found.boxes, [[80, 50, 120, 70], [80, 52, 120, 72]])
    np.testing.assert_allclose(found.scores, [0.72, 0.56])
    assert (found.class_ids.dtype, found.boxes.dtype, found.scores.dtype) == (np.int64, np.float32, np.float32)
    first = found.to_json()[0]
    assert (first["box"], first["class_id"], first["label"]) == ([80.0, 50.0, 120.0, 70.0], 1, "b")
    assert [type(value) for value in first.values()] == [list, float, int, str]
    assert len(found) == 2


def test_options_reach_the_suppression():
    picture = torch.rand(3, 64, 96)
    for options, scores in (
        ({"agnostic": True}, [0.72]),
        ({"overlap": 0.99}, [0.72, 0.64, 0.56]),
        ({"confidence": 0.1}, [0.72, 0.56, 0.2]),
        ({"most": 1}, [0.72]),
    ):
        found = Detector(Fixed(ROWS), **options)(picture)
        np.testing.assert_allclose(found.scores, scores, err_msg=str(options))


def test_names_of_classes():
    coco = coco_labels()
    assert (len(coco), coco[0], coco[5], coco[27], coco[79]) == (80, "person", "bus", "tie", "toothbrush")
    own = Detector(Fixed(ROWS, metadata=Metadata(labels=("x", "y"))))
    assert own.labels(2) == ("x", "y")
    bare = Detector(Fixed(ROWS))
    assert (bare.labels(2), bare.labels(80)) == (("0", "1"), coco)
    with pytest.raises(CompanionError, match=r"^the network has 2 classes, and 3 labels were given\.$"):
        Detector(Fixed(ROWS), labels=("a", "b", "c"))(torch.rand(3, 8, 8))


def test_a_file_an_array_and_a_tensor_are_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    engine = Fixed(ROWS)
    given = []
    for image in (tmp_path / "x.png", str(tmp_path / "x.png"), pixels, read_image(tmp_path / "x.png")):
        Detector(engine)(image)
        given.append(engine.given)
    assert all(np.array_equal(given[0], other) for other in given[1:])


def picture(side):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"no picture", r"x\.png is damaged or not an image"),
        (picture(10_000), r"x\.png has too many pixels for a photograph"),
        (None, r"cannot read .*x\.png: No such file or directory\."),
        (np.zeros((4, 4, 3)), r"an image array must be uint8 \[H, W, 3\], not float64 \[4, 4, 3\]\."),
        (np.zeros((4, 4), dtype=np.uint8), r"an image array must be uint8 \[H, W, 3\], not uint8 \[4, 4\]\."),
        (torch.zeros(3, 4, 0), r"an image has no pixels\."),
        (torch.full((3, 4, 4), 200.0), r"an image tensor holds numbers in 0\.\.1, not 200 to 200: divide bytes by 255"),
        (torch.full((3, 4, 4), float("nan")), r"an image tensor holds numbers in 0\.\.1, not nan to nan"),
        (torch.zeros(1, 3, 4, 4), r"an image is a file's name, a float32 tensor"),
        (7, r"an image is a file's name, a float32 tensor"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, image, says):
    if image is None or isinstance(image, bytes):
        if image is not None:
            (tmp_path / "x.png").write_bytes(image)
        image = tmp_path / "x.png"
    with pytest.raises(CompanionError, match=says):
        Detector(Fixed(ROWS))(image)


@pytest.mark.parametrize("name", ["folder", "/dev/zero"])  # an absolute path joined to tmp_path is itself
def test_what_is_no_file_is_not_read(tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    if not path.exists():
        pytest.skip(f"there is no {name} here")
    with pytest.raises(CompanionError, match=rf"{name} is no image file: name a single one\.$"):
        read_image(path)


@pytest.mark.parametrize(
    ("inputs", "output", "says"),
    [
        (((None, 1, 8, 8), "float32"), ROWS, r"no detector: it takes images float32 \[N, 1, 8, 8\], not images"),
        (((None, 3, 8, 8), "uint8"), ROWS, r"no detector: it takes images uint8"),
        (((None, 3), "float32"), ROWS, r"no detector: it takes images float32 \[N, 3\]"),
        (((4, 3, 8, 8), "float32"), ROWS, r"takes 4 pictures at a time: export it for one or any\."),
        (((None, 3, 8, 8), "float32"), ROWS[0], r"no detector: it gives boxes float32 \[N, 7\], not boxes"),
        (((None, 3, 8, 8), "float32"), ROWS[:, :5], r"no detector: it gives boxes float32 \[N, 6, 5\], not boxes"),
    ],
)
def test_a_network_that_is_no_detector_is_refused(inputs, output, says):
    with pytest.raises(CompanionError, match=says):
        Detector(Fixed(output, inputs=inputs))


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (np.zeros((9, 5), dtype=np.float32), r"it gave \[9, 5\], not rows \[A, 5 \+ classes\]\."),
        (
            np.full((9, 7), 20, dtype=np.float32),
            r"^this network gives no shares in 0\.\.1 from the fifth column on: exp",
        ),
    ],
)
def test_an_output_that_is_none_is_refused(output, says):
    engine = Fixed(ROWS)
    detector = Detector(engine)
    engine.output = output
    with pytest.raises(CompanionError, match=says):
        detector(torch.rand(3, 8, 8))


def test_sixteen_bits_are_enough_for_large_boxes():
    """Areas are computed in 32: of 600 × 600 there are more than float16 has."""
    rows = np.array([row(320, 320, 600, 600, 0.9, 0.9), row(321, 320, 600, 600, 0.8, 0.9)], dtype=np.float16)
    found = Detector(Fixed(rows))(torch.rand(3, 64, 96))
    assert (len(found), found.scores.dtype) == (1, np.float32)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"confidence": 1.5}, r"confidence is 1\.5: give a number from 0 to 1\."),
        ({"overlap": float("nan")}, r"overlap is nan: give a number from 0 to 1\."),
        ({"most": 0}, r"most is 0: give a whole number from 1\."),
        ({"most": 1.5}, r"most is 1\.5: give a whole number"),
        ({"confidence": "0.5"}, r"confidence is '0\.5': give a number"),
        ({"overlap": None}, r"overlap is None: give a number"),
        ({"size": 100}, r"size is 100: give a multiple of 32 up to 4096\."),
        ({"size": 64.0}, r"size is 64\.0: give a multiple"),
        ({"size": 32_000}, r"size is 32000: give a multiple"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(CompanionError, match=says):
        Detector(Fixed(ROWS), **options)


def test_a_network_for_any_size_gets_a_square():
    engine = Fixed(ROWS, inputs=((None, 3, None, None), "float32"))
    Detector(engine, size=96)(torch.rand(3, 10, 20))
    assert engine.given.shape == (1, 3, 96, 96)
    assert Detector(engine).size == (640, 640)
    engine = Fixed(ROWS, inputs=((None, 3, None, None), "float32"), metadata=Metadata(input_size=(3, 160, 192)))
    assert Detector(engine).size == (160, 192)  # what it was made for
    assert Detector(engine, size=96).size == (96, 96)


def test_drawing_frames_each_object_and_leaves_the_picture():
    image = torch.zeros(3, 60, 80)
    found = Detections(
        np.array([[10, 30, 50, 55], [0, 0, 79, 59]], dtype=np.float32),
        np.array([0.9, 0.8], dtype=np.float32),
        np.array([0, 7]),
        tuple("abcdefgh"),
    )
    drawn = np.asarray(draw(image, found))
    assert drawn.shape == (60, 80, 3)
    assert drawn[55, 30].any()
    assert drawn[45, 10].any()
    assert drawn[59, 40].any()
    assert not drawn[50, 30].any()  # inside both
    assert not image.any()
    assert (drawn == 255).all(2).any()  # what the names are written on


def test_drawing_on_bytes_is_drawing_on_a_tensor():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found = Detections(
        np.array([[10, 30, 50, 55]], dtype=np.float32), np.ones(1, dtype=np.float32), np.array([0]), ("a",)
    )
    before = pixels.copy()
    drawn = np.asarray(draw(pixels, found))
    assert np.array_equal(drawn, np.asarray(draw(torch.from_numpy(before).permute(2, 0, 1).float().div(255), found)))
    assert np.array_equal(pixels, before)
    assert not np.array_equal(drawn, before)


def test_a_name_of_any_length_is_drawn():
    pixels, boxes = np.zeros((60, 80, 3), dtype=np.uint8), np.array([[10, 30, 50, 55]], dtype=np.float32)
    drawn = [
        np.asarray(draw(pixels, Detections(boxes, np.ones(1, dtype=np.float32), np.array([0]), ("x" * length,))))
        for length in (40, 2_000_000)
    ]
    assert np.array_equal(*drawn)


# Boxes and scores of the research notes, found with another implementation.
OFFICIAL = {
    "bus.jpg": [
        ("person", 0.824, [219, 408, 349, 863]),
        ("person", 0.816, [52, 399, 207, 895]),
        ("person", 0.676, [680, 377, 810, 870]),
        ("bus", 0.525, [49, 237, 810, 772]),
    ],
    "zidane.jpg": [
        ("person", 0.791, [742, 40, 1154, 716]),
        ("person", 0.370, [136, 180, 739, 720]),
        ("tie", 0.271, [438, 434, 504, 712]),
    ],
}


@pytest.fixture(scope="module")
def official():
    with engines.load(MODELS / "yolov5n.onnx", "onnxruntime", threads=1) as engine:
        yield Detector(engine)


def check_official(detector):
    for name, expected in OFFICIAL.items():
        found = detector(MODELS / name)
        assert [each["label"] for each in found.to_json()] == [label for label, _, _ in expected]
        np.testing.assert_allclose(found.scores, [score for _, score, _ in expected], atol=0.005)
        np.testing.assert_allclose(found.boxes, [box for _, _, box in expected], atol=2)


@needs_models
def test_the_official_network(official):
    check_official(official)


@needs_models
def test_the_official_network_on_openvino():
    pytest.importorskip("openvino", reason="OpenVINO is not installed (the extra openvino)")
    with engines.load(MODELS / "yolov5n.onnx", "openvino", precision="fp32") as engine:
        check_official(Detector(engine))


@needs_models
@pytest.mark.stress  # the conversion takes minutes
def test_the_official_network_on_litert(tmp_path):
    pytest.importorskip("litert_torch", reason="LiteRT's converter is not installed (the extra litert-convert)")
    network, path = load_official(MODELS / "yolov5n.pt"), tmp_path / "yolov5n.tflite"
    engines.export_tflite(network, torch.zeros(1, 3, 640, 640), path)
    with engines.load(path, "litert") as engine:
        check_official(Detector(engine, labels=coco_labels()))


@needs_models
def test_blue_first_is_another_picture(official):
    """Four persons, and no bus."""
    found = official(read_image(MODELS / "bus.jpg").flip(0))
    assert {each["label"] for each in found.to_json()} == {"person"}
    assert len(found) == 4


@needs_models
def test_the_official_checkpoint_in_our_network():
    network = load_official(MODELS / "yolov5n.pt")
    with engines.load(network, "torch", example=torch.zeros(1, 3, 640, 640)) as engine:
        check_official(Detector(engine))
