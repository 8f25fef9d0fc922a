"""The detector that is shipped: it finds digits that it has never seen, as torch, as ONNX and in int8."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from companion import compress, datasets, engines, models, train
from companion.detect import Detector, overlaps
from companion.files import shipped

NAME = "yolov5_tiny_digit_scenes"

needs_evaluator = pytest.mark.skipif(
    any(train.tasks.find_spec(name) is None for name in ("torchmetrics", "pycocotools")),
    reason="mAP needs the extra detect: torchmetrics and pycocotools",
)


@pytest.fixture(scope="module")
def scenes():
    return datasets.load("digit_scenes", split="test", task="detect", scenes=100)


@pytest.fixture(scope="module")
def onnx_file():
    return shipped(f"weights/{NAME}.onnx")


@pytest.fixture(scope="module")
def detector(onnx_file):
    with engines.load(onnx_file, "onnxruntime", threads=1) as engine:
        yield Detector(engine)


def judged(path, scenes):
    with engines.load(path, "onnxruntime", threads=1) as engine:
        return train.evaluate(engines.as_module(engine), scenes, progress=False).metrics


@needs_evaluator
def test_it_is_as_good_as_promised(onnx_file, scenes):
    found = train.evaluate(models.pretrained(NAME), scenes, progress=False).metrics
    assert found["map50"] >= 0.95
    again = judged(onnx_file, scenes)
    assert again == {name: pytest.approx(value, abs=1e-3) for name, value in found.items()}


def test_what_is_shipped_is_small_and_says_what_it_is(onnx_file):
    assert onnx_file.stat().st_size <= 2.5e6
    with engines.load(onnx_file, "onnxruntime", threads=1) as engine:
        assert engine.inputs[0].shape == (None, 3, 160, 160)
        assert engine.metadata.task == "detect"
        assert engine.metadata.labels == tuple("0123456789")
        configuration = models.describe(models.pretrained(NAME)).configuration
        assert (engine.metadata.model, engine.metadata.configuration) == ("yolov5_tiny", configuration)


@pytest.mark.parametrize(
    ("name", "ending"),
    {"torch": "safetensors", "torch_fused": "safetensors", "openvino": "onnx", "litert": "tflite"}.items(),
)
def test_every_engine_agrees_to_half_a_pixel(name, ending, detector, scenes):
    """With ONNX Runtime."""
    if name not in engines.available():
        pytest.skip(f"{name} is not installed")
    with engines.load(shipped(f"weights/{NAME}.{ending}"), name) as engine:
        other, seen = Detector(engine), 0
        for image, _ in (scenes[i] for i in range(30)):
            found, expected = detector(image), other(image)
            assert found.class_ids.tolist() == expected.class_ids.tolist()
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.5)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
            seen += len(found)
    assert seen > 60


def missed_and_wrong(found, truth):
    """Digits that no detection of their class overlaps by a half, and detections for which there is no such digit."""
    hits = np.array(
        [
            (overlaps(box, found.boxes) > 0.5) & (found.class_ids == label)
            for box, label in zip(truth["boxes"].numpy(), truth["labels"].numpy(), strict=True)
        ]
    )
    return int((~hits.any(1)).sum()), int((~hits.any(0)).sum())


def test_it_finds_the_digits_of_scenes(onnx_file, scenes):
    """Of twenty digits it misses one at most, and of ten detections that it is half sure of, one at most is none."""
    with engines.load(onnx_file, "onnxruntime", threads=1) as engine:
        detector = Detector(engine, confidence=0.5)
        missed, wrong = np.sum([missed_and_wrong(detector(image), truth) for image, truth in scenes], axis=0)
    assert missed <= 0.05 * len(scenes.boxes)
    assert wrong <= 0.1 * len(scenes.boxes)


def picture(scenes, i):
    return Image.fromarray(scenes.images[i].permute(1, 2, 0).numpy())


def test_in_a_picture_of_twice_the_size(detector, scenes):
    """Each pixel four times: the same digits, at twice their places."""
    truth = scenes[0][1]
    large = np.asarray(picture(scenes, 0)).repeat(2, 0).repeat(2, 1)
    assert missed_and_wrong(detector(large), {"boxes": truth["boxes"] * 2, "labels": truth["labels"]}) == (0, 0)


def test_the_command_finds_them_in_a_file(onnx_file, scenes, tmp_path):
    picture(scenes, 0).save(tmp_path / "scene.png")
    command = [sys.executable, "-m", "companion", "detect", tmp_path / "scene.png", "--model", onnx_file, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ((one),) = json.loads(done.stdout)
    truth = scenes[0][1]
    assert len(one["detections"]) == len(truth["labels"])
    for found in one["detections"]:
        (at,) = np.flatnonzero(overlaps(np.array(found["box"]), truth["boxes"].numpy()) > 0.5)
        assert found["class_id"] == int(truth["labels"][at])
        assert found["label"] == str(found["class_id"])


@needs_evaluator
def test_in_int8_without_the_head_it_is_nearly_as_good(onnx_file, scenes, tmp_path):
    """With the head, pixels up to 160 and shares get one scale, of 0.6: a box is sure, or not at all.

    Of 640 pixels nothing is left.
    """
    training = datasets.load("digit_scenes", split="train", task="detect", scenes=64)
    batches = [torch.stack([training[i][0] for i in range(at, at + 16)]) for at in range(0, 64, 16)]
    before = judged(onnx_file, scenes)["map50"]
    compress.quantize_onnx(onnx_file, tmp_path / "all.onnx", batches)
    assert judged(tmp_path / "all.onnx", scenes)["map50"] < before - 0.05
    compress.quantize_onnx(onnx_file, tmp_path / "good.onnx", batches, exclude="head")
    assert judged(tmp_path / "good.onnx", scenes)["map50"] >= before - 0.02
    assert Path(tmp_path / "good.onnx").stat().st_size < onnx_file.stat().st_size / 2


@pytest.mark.stress
@pytest.mark.timeout(3600)
@needs_evaluator
def test_one_command_trains_it(tmp_path):
    """From nothing to 95 %."""
    command = [sys.executable, "-m", "companion", "train", "yolov5_tiny", "--data", "digit_scenes", "--threads", "1"]
    subprocess.run([*command, "--out", tmp_path / "x.safetensors"], check=True, cwd=tmp_path)
    scenes = datasets.load("digit_scenes", split="test", task="detect")
    assert train.evaluate(models.load(tmp_path / "x.safetensors"), scenes, progress=False).metrics["map50"] >= 0.95
