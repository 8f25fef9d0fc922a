"""`companion detect`."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from companion import datasets, models

# Centre, size, object, two classes: on a canvas of 64 × 64.
ROWS = np.array([[[32, 32, 16, 8, 0.9, 0.2, 0.8], [8, 8, 8, 8, 0.1, 0.9, 0.9]]], dtype=np.float32)


@pytest.fixture
def model(tmp_path):
    """A network that finds the same in every picture."""
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])
    boxes = helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 2, 7])
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["rows", "nothing"], ["boxes"]),
    ]
    constants = [numpy_helper.from_array(ROWS, "rows"), numpy_helper.from_array(np.float32(0), "zero")]
    graph = helper.make_graph(nodes, "fixed", [image], [boxes], constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "fixed.onnx"
    )
    return tmp_path / "fixed.onnx"


@pytest.fixture
def photo(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (128, 64), "navy").save(folder / "a.png")
    return folder / "a.png"


def test_one_image(call, model, photo):
    code, out, err = call("detect", photo, "--model", model)
    assert (code, err) == (0, "")
    assert out == f"{photo}: 1 object\n  0.72      48     24     80     40  1\n"


def test_json_and_pictures_of_a_folder(call, model, photo, tmp_path):
    (photo.parent / "more").mkdir()
    Image.new("RGB", (64, 128)).save(photo.parent / "more" / "b.jpg")
    code, out, _ = call("detect", photo.parent, "--model", model, "--json", "--out", tmp_path / "drawn")
    assert code == 0
    first, second = json.loads(out)
    assert (first["image"], second["image"]) == (str(photo), str(photo.parent / "more" / "b.jpg"))
    (found,) = first["detections"]
    assert found["box"] == pytest.approx([48, 24, 80, 40])
    assert (found["score"], found["class_id"], found["label"]) == (pytest.approx(0.72), 1, "1")
    assert second["detections"][0]["box"] == pytest.approx([16, 56, 48, 72])
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "a.png.png"))
    assert drawn.shape == (64, 128, 3)
    assert (drawn != np.asarray(Image.open(photo))).any()
    assert (tmp_path / "drawn" / "more" / "b.jpg.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.png"], "there is no image or folder nothing.png."),
        (["photos", "--out", "photos"], "photos holds the images themselves: give another --out."),
        (["photos/a.png", "--out", "photos"], "photos holds the images themselves: give another --out."),
        (["empty"], "empty holds no images: put JPEG, PNG, WebP, BMP or GIF files there."),
        (["text.png"], "text.png is damaged or not an image: replace or remove it."),
        (
            ["photos", "--model", "text.png"],
            "text.png is no model file: its name must end in .onnx, .tflite, .engine or .safetensors.",
        ),
        (
            ["photos", "--confidence", "2"],
            "Invalid value for '--confidence': Input should be less than or equal to 1",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, model, photo, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    options = [] if "--model" in arguments else ["--model", model]
    code, out, err = call("detect", *arguments, *options)
    assert code in (1, 2)
    assert out == ""
    assert err.startswith(f"companion: {says}"), err
    assert err.count("\n") == 1


def test_what_was_drawn_the_last_time_is_no_image_of_the_next(call, model, photo):
    for _ in range(2):
        code, out, _ = call("detect", photo.parent, "--model", model, "--json", "--out", photo.parent / "drawn")
        assert (code, [row["image"] for row in json.loads(out)]) == (0, [str(photo)])


def test_a_damaged_image_of_a_folder_does_not_cost_the_others(call, model, photo):
    (photo.parent / "bad.png").write_bytes(b"x")
    code, out, err = call("detect", photo.parent, "--model", model, "--json")
    (photo.parent / "worse.png").write_bytes(b"y")
    assert (code, [row["image"] for row in json.loads(out)]) == (1, [str(photo)])
    assert err == f"companion: {photo.parent / 'bad.png'} is damaged or not an image: replace or remove it.\n"
    _, out, err = call("detect", photo.parent, "--model", model)
    assert out.startswith(f"{photo}: 1 object")
    assert err.endswith("replace or remove it (1 more could not be read).\n")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(side):
    """A PNG of 57 bytes that claims side × side pixels."""
    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def network(path, takes, gives, kind=TensorProto.FLOAT):
    """A file with a network that gives nothing but zeros."""
    image = helper.make_tensor_value_info("images", kind, takes)
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, gives)
    shape = numpy_helper.from_array(np.array(gives, dtype=np.int64), "shape")
    node = helper.make_node("ConstantOfShape", ["shape"], ["result"])
    graph = helper.make_graph([node], "zeros", [image], [result], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def hostile(tmp_path, monkeypatch, photo):
    """Files that are not what their names say, beside photos/a.png."""
    monkeypatch.chdir(tmp_path)
    Path("bomb.png").write_bytes(png_header(60_000))
    Image.new("1", (10_000, 10_000)).save("large.png")
    content = photo.read_bytes()
    Path("half.png").write_bytes(content[: len(content) // 2])
    Path("none.png").touch()
    Path("text.onnx").write_text("no network")
    Path("none.onnx").touch()
    network("classifier.onnx", [1, 3, 64, 64], [1, 10])
    network("gray.onnx", [1, 1, 64, 64], [1, 2, 7])
    network("narrow.onnx", [1, 3, 64, 64], [1, 2, 5])
    network("bytes.onnx", [1, 3, 64, 64], [1, 2, 7], TensorProto.UINT8)
    Path("text.mp4").write_text("no video")
    Path("none.mp4").touch()
    Path("folder.mp4").mkdir()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bomb.png"], "bomb.png has too many pixels for a photograph: make it smaller or remove it."),
        (["large.png"], "large.png has too many pixels for a photograph"),
        (["half.png"], "half.png is damaged or not an image: replace or remove it."),
        (["none.png"], "none.png is damaged or not an image"),
        (["photos", "--model", "missing.onnx"], "there is no file missing.onnx."),
        (["photos", "--model", "text.onnx"], "text.onnx is not an ONNX file or is damaged."),
        (["photos", "--model", "none.onnx"], "none.onnx is not an ONNX file or is damaged."),
        (["photos", "--model", "photos"], "photos is a folder: name a file in it."),
        (["photos", "--model", "classifier.onnx"], "this network is no detector: it gives result float32 [1, 10]"),
        (["photos", "--model", "gray.onnx"], "this network is no detector: it takes images float32 [1, 1, 64, 64]"),
        (["photos", "--model", "narrow.onnx"], "this network is no detector: it gives result float32 [1, 2, 5]"),
        (["photos", "--model", "bytes.onnx"], "this network is no detector: it takes images uint8"),
        (["photos", "--engine", "magic"], "there is no engine 'magic': choose one of "),
        (["photos", "--realtime"], "--realtime is for videos: leave it out for images."),
        (["missing.mp4"], "there is no video missing.mp4."),
        (["text.mp4"], "text.mp4 is damaged or no video: give an MP4, MOV, AVI, MKV or WebM file."),
        (["none.mp4"], "none.mp4 is damaged or no video"),
        (["folder.mp4"], "folder.mp4 holds no images: put JPEG, PNG, WebP, BMP or GIF files there."),
        (["camera:x"], "camera:x is no camera: number it from 0 to 99, as in camera:0."),
        (["camera:99"], "camera:99 cannot be opened: is it plugged in, and used by no other program?"),
        (["camera:0", "--out", "drawn"], "drawn must end in .mp4 or .avi."),
        (["text.mp4", "--out", "text.mp4"], "text.mp4 is the video itself: give another --out."),
        (["text.mp4", "--model", "classifier.onnx"], "this network is no detector"),
    ],
)
def test_hostile_input_is_one_sentence(call, model, hostile, arguments, says):
    if arguments[0].endswith(".mp4") or arguments[0].startswith("camera"):
        pytest.importorskip("cv2", reason="OpenCV is not installed")
    options = [] if "--model" in arguments else ["--model", model]
    code, out, err = call("detect", *arguments, *options)
    assert code in (1, 2)
    assert out == ""
    assert err.startswith(f"companion: {says}"), err
    assert err.count("\n") == 1
    assert err.endswith((".\n", "?\n"))


def test_an_engine_that_is_not_installed(call, model, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = call("detect", photo, "--model", model)
    assert code == 1
    assert err == (
        "companion: the engine onnxruntime needs onnxruntime, which does not work here: pip install onnxruntime.\n"
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    from companion import detect

    path = tmp_path_factory.mktemp("clip") / "a.avi"
    detect.write_video(path, [np.full((64, 128, 3), n % 250, np.uint8) for n in range(300)])
    return path


def test_a_video(call, model, clip, tmp_path):
    code, out, err = call("detect", clip, "--model", model, "--out", tmp_path / "drawn.mp4")
    assert (code, err) == (0, "")
    *frames, summary, heads, read, wait, detect, draw, write = out.splitlines()
    assert len(frames) == 300
    assert frames[25] == "frame    25     1.000 s  1 object  1 0.72"
    assert summary.startswith("300 frames read, 300 looked at, 0 dropped; ")
    assert heads.split() == ["stage", "median", "p95"]
    assert [line.split()[0] for line in (read, wait, detect, draw, write)] == [
        "read",
        "wait",
        "detect",
        "draw",
        "write",
    ]
    assert (tmp_path / "drawn.mp4").stat().st_size > 1000


def test_a_video_is_one_object_a_line(call, model, clip):
    code, out, err = call("detect", clip, "--model", model, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["frame"] for row in rows] == list(range(300))
    assert rows[25].keys() == {"image", "frame", "time", "detections"}
    assert (rows[25]["image"], rows[25]["time"]) == (str(clip), 1.0)
    assert rows[25]["detections"][0]["box"] == pytest.approx([48, 24, 80, 40])
    assert err.startswith("300 frames read")


def test_a_damaged_video_says_how_much_was_read(call, model, clip, tmp_path):
    content = clip.read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    code, out, _ = call("detect", tmp_path / "cut.avi", "--model", model)
    seen = sum(line.startswith("frame ") for line in out.splitlines())
    assert (code, 0 < seen < 300) == (0, True)
    assert f"{tmp_path / 'cut.avi'} promises 300 frames, and {seen} could be read.\n" in out


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")
def test_ctrl_c_keeps_what_was_finished(model, clip, tmp_path):
    """At its frame rate the clip takes 12 seconds."""
    from companion import detect

    arguments = ["detect", clip, "--model", model, "--realtime", "--json", "--out", tmp_path / "drawn.mp4"]
    program = [sys.executable, "-m", "companion", *map(str, arguments)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    rows = [json.loads(line) for line in "".join([*lines, rest]).splitlines()]
    assert 3 <= len(rows) < 300
    assert err.endswith(f"companion: interrupted; {tmp_path / 'drawn.mp4'} holds the frames until then.\n")
    assert "Traceback" not in err
    kept = list(detect.frames(tmp_path / "drawn.mp4"))
    assert rows[-1]["frame"] < len(kept) < 300  # a frame may have been written, and not yet said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_from_training_to_judging(call, tmp_path, monkeypatch):
    """Two epochs on a few scenes: the data are for boxes because the network is, and as large as it takes them."""
    pytest.importorskip("torchmetrics", reason="mAP needs the extra detect")
    pytest.importorskip("pycocotools", reason="mAP needs the extra detect")
    monkeypatch.chdir(tmp_path)
    load = datasets.digit_scenes.digit_scenes
    monkeypatch.setitem(
        datasets.registry._DATASETS, "digit_scenes", lambda split, task: load(split, task=task, scenes=24)
    )
    code, out, err = call("train", "yolov5_tiny", "--data", "digit_scenes", "--epochs", "2", "--threads", "1")
    assert (code, err) == (0, "")
    assert "on digit_scenes (24 images)" in out
    said = out.splitlines()[-1]
    assert re.fullmatch(r"test  map50_95 \d+\.\d\d %, map50 \d+\.\d\d %, 24 images", said)
    weights = "yolov5_tiny-digit_scenes.safetensors"
    assert models.describe(models.load(weights)).labels == tuple("0123456789")
    code, out, _ = call("evaluate", weights, "--data", "digit_scenes", "--threads", "1", "--json")
    found = json.loads(out)
    assert found == {
        "model": "yolov5_tiny", "data": "digit_scenes", "split": "test", "samples": 24, "loss": None,
        "map50_95": found["map50_95"], "map50": found["map50"],
    }  # fmt: skip
    assert f"map50 {100 * found['map50']:.2f} %" in said
    code, _, err = call("evaluate", weights, "--data", "digits")
    assert code == 1
    assert "yolov5_tiny is for the task 'detect', digits is for 'classify'" in err
