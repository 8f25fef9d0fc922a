"""Engines are built from our exports on a machine without a GPU, and whatever cannot be built is one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
from engine_cases import one_sentence

from companion import CompanionError, compress, engines
from companion.engines import tensorrt
from companion.engines.tensorrt import library
from companion.models.yolov5 import YOLOv5

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

HERE = Path(__file__).parent


def run(cases):
    """Build each of ``{name: (file, options)}``; by name what came of it."""
    lines = "".join(f"{json.dumps([name, str(file), options])}\n" for name, (file, options) in cases.items())
    done = subprocess.run([sys.executable, HERE / "build_cases.py"], input=lines, capture_output=True, text=True)
    found = {(row := json.loads(line)).pop("case"): row for line in done.stdout.splitlines()}
    crashed = next((name for name in cases if name not in found), None)
    assert crashed is None, f"{crashed} ended the process with {done.returncode}: {done.stderr[-2000:]}"
    return found


@pytest.fixture(scope="module")
def built(exported, tmp_path_factory):
    """What came of everything that this file builds, in one process."""
    folder = tmp_path_factory.mktemp("onnx")
    cnn, resnet = (exported(name).path for name in ("simple_cnn", "cifar_resnet20"))
    files = onnx_cases.write_all(folder, cnn)
    cnn8, resnet8 = folder / "cnn8.onnx", folder / "resnet8.onnx"
    images = [np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32)]
    for path, out in ((cnn, cnn8), (resnet, resnet8)):
        compress.quantize_onnx(path, out, images, bias=False)
    shape = (3, 32, 32)
    wide = [{"x": [[1, 3, 64, 64], [1, 3, 128, 96], [2, 3, 256, 256]]}]
    cases = {
        "cnn fp32": (cnn, {}),
        "cnn tf32": (cnn, {"precision": "tf32"}),
        "cnn fp16": (cnn, {"precision": "fp16"}),
        "cnn int8": (cnn8, {}),
        "resnet fp32": (resnet, {}),
        "resnet fp16": (resnet, {"precision": "fp16"}),
        "resnet int8": (resnet8, {}),
        "two profiles": (cnn, {"profiles": [{"input": [[n, *shape]] * 3} for n in (1, 32)]}),
        "any size": (files["any_size"], {"profiles": wide}),
        "fixed": (files["fixed"], {}),
        "apart": (files["apart"], {}),
        "for Ada": (cnn, {"target": "8.9"}),
        "for Turing": (cnn, {"target": "7.5"}),
        "for Hopper": (cnn, {"target": "9.0"}),
        "workspace": (cnn, {"workspace": 1}),
        "cancelled": (cnn, {"stop_after": 5}),
        "junk": ("text:this is no network", {}),
        "empty": ("text:", {}),
        "size unknown": (files["any_size"], {}),
        "other channels": (cnn, {"profiles": [{"input": [[n, 4, 32, 32] for n in (1, 2, 3)]}]}),
        "other rank": (cnn, {"profiles": [{"input": [[n, 32] for n in (1, 2, 3)]}]}),
        "other name": (cnn, {"profiles": [{"picture": [[n, *shape] for n in (1, 2, 3)]}]}),
        "int8 and fp16": (cnn8, {"precision": "fp16"}),
        "none": (folder / "none.onnx", {}),
        **{name: (files[name], {}) for name in ("own", "random", "mixed", "nms", "lost", "cut")},
    }
    return run(cases)


@pytest.mark.parametrize(
    "name", ["cnn fp32", "cnn tf32", "cnn fp16", "cnn int8", "resnet fp32", "resnet fp16", "resnet int8"]
)
def test_our_exports_are_built_for_batches_from_1_to_16(built, name):
    found = built[name]
    assert found["library"] == "tensorrt_rtx"
    assert found["plan"] > 100_000
    assert found["profiles"] == [{"input": [[1, 3, 32, 32], [4, 3, 32, 32], [16, 3, 32, 32]]}]
    assert json.loads(found["description"]["labels"])[0] == "类 0"
    precision = name.split()[1]
    assert found["precision"] == precision
    assert {"fp16": "HALF", "int8": "INT8"}.get(precision, "FLOAT") in found["types"]
    assert ("HALF" in found["types"]) == (precision == "fp16")
    assert ("INT8" in found["types"]) == (precision == "int8")


def test_half_the_bits_take_less_space(built):
    for name in ("cnn", "resnet"):
        assert built[f"{name} fp16"]["plan"] < 0.8 * built[f"{name} fp32"]["plan"]


def test_profiles(built):
    assert [profile["input"][1][0] for profile in built["two profiles"]["profiles"]] == [1, 32]
    assert built["any size"]["profiles"] == [{"x": [[1, 3, 64, 64], [1, 3, 128, 96], [2, 3, 256, 256]]}]
    assert built["fixed"]["profiles"] == []


def test_weights_in_another_file_come_along(built):
    assert built["apart"]["layers"] == built["cnn fp32"]["layers"]
    assert built["apart"]["plan"] > 0.9 * min(built["cnn fp32"]["plan"], built["for Ada"]["plan"])


def test_progress_grows_to_the_end(built):
    seen = built["cnn fp32"]["progress"]
    assert len(seen) > 20
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.1
    assert 0.5 < seen[-1] <= 1


@pytest.mark.skipif(library.gpu() is not None, reason="a GPU is here")
def test_an_engine_says_for_which_gpu_it_is(built):
    assert built["cnn fp32"]["device"] == "none"
    assert built["for Ada"]["device"] == "compute capability 8.9"


def test_each_setting_has_a_key_of_its_own(built):
    names = ["cnn fp32", "cnn tf32", "cnn fp16", "cnn int8", "resnet fp32", "two profiles", "for Ada"]
    assert len({built[name]["key"] for name in names}) == len(names)


REFUSALS = {
    "workspace": r"the workspace of 1 B is too small to build .*: give more",
    "cancelled": "the build was cancelled, and nothing was written",
    "junk": "the network is not an ONNX file or is damaged",
    "empty": "the network is not an ONNX file or is damaged",
    "cut": "cut.onnx is not an ONNX file or is damaged",
    "none": "none.onnx cannot be read: No such file",
    "lost": r"lost.onnx keeps its weights in another file, which is not there: .*lost.data",
    "own": r"cannot run the operator Foo \(node my_foo of .*own.onnx\): it has no such operator",
    "random": r"cannot run the operator Bernoulli \(node dice of .*random.onnx\): it has no such operator",
    "mixed": r"the operator Add \(node sum of .*mixed.onnx\): .* must have same input types; .* Float and Half",
    "nms": r"can read the layer suppress_0 \(NMS\) of .*nms.onnx, but has no kernel for it",
    "size unknown": r"the input 'x' of .* has the shape \[any, 3, any, any\]: say in a profile",
    "other channels": r"the input 'input' of .* has the shape \[any, 3, 32, 32\], not \[1, 4, 32, 32\]",
    "other rank": r"the input 'input' of .* has the shape \[any, 3, 32, 32\], not \[1, 32\]",
    "other name": r"has no input 'picture' with free dimensions, which a profile could say: it has input",
    "for Turing": r"cannot build .*simple_cnn.onnx: .*Turing",
    "for Hopper": r"builds nothing for the compute capability 9.0: choose one of 7.5, .*12.0",
    "int8 and fp16": r"quantized to 8 bits",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_built_is_one_sentence(built, name):
    text = built[name]["error"]
    assert re.search(REFUSALS[name], text), text
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?]\s+[A-Z]|Error Code|\.cpp|cudaError", text), text


def test_a_build_that_is_cancelled_stops_at_once(built):
    assert built["cancelled"]["steps"] == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": (4, 2, 8)}, r"batch must grow from 1 up, .* not \[4\], \[2\], \[8\]"),
        ({"batch": (0, 1, 2)}, "batch must grow from 1 up"),
        ({"batch": (1, 2)}, "batch must be the smallest, the usual and the largest"),
        ({"batch": 8}, "batch must be the smallest, the usual and the largest, not 8"),
        ({"profiles": [{"x": [(1, 9), (1, 3), (1, 5)]}]}, "the profile of x must grow"),
        ({"profiles": [{"x": [(1, 9), (1, 9, 9), (1, 9)]}]}, "the profile of x must be the smallest"),
        ({"profiles": {"x": 3}}, "give a list of dicts"),
        ({"workspace": 0}, "workspace is 0: give a number of bytes"),
        ({"workspace": True}, "workspace is True"),
        ({"precision": "fp8"}, "no precision 'fp8' here: choose one of fp32, tf32, fp16"),
        ({"target": "sm86"}, "target is 'sm86': give a compute capability such as 8.6"),
    ],
)
def test_options_that_make_no_sense(exported, options, says):
    with pytest.raises(CompanionError, match=says) as error:
        tensorrt.build(exported("simple_cnn").path, **options)
    assert not re.search(r"[.!?]\s+[A-Z]", str(error.value))


def test_an_error_of_the_callers_own_comes_through(exported):
    with pytest.raises(ZeroDivisionError):
        tensorrt.build(exported("simple_cnn").path, on_progress=lambda fraction, phase: 1 / 0)


def test_ctrl_c_stops_the_build_and_is_the_programs_own_again(exported):
    def interrupt(fraction, phase):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            tensorrt.build(exported("simple_cnn").path, on_progress=interrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_layers_are_told_without_a_build(exported):
    rows = tensorrt.layers(exported("simple_cnn").path, precision="fp16")
    convolutions = [row for row in rows if row.type == "CONVOLUTION"]
    assert [row.shape[1:] for row in convolutions] == [(16, 32, 32), (32, 16, 16)]
    assert {row.precision for row in convolutions} == {"HALF"}
    assert rows[-1].precision == "FLOAT"  # the output stays what callers expect


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "it does not say why"),
        (
            ["IBuilder::build: Error Code 4: API Usage Error (At dimension 1, a is 3. In validate at /_src/a.cpp:4)"],
            "At dimension 1, a is 3",
        ),
        (["[a.cpp::b::2] Error Code 1: Cuda (no driver (cudaError 35))", "the second."], "the second"),
        (["first. Second\nthird"], "first; Second"),
    ],
)
def test_what_the_library_logs_as_part_of_a_sentence(lines, said):
    assert library.complaint(lines) == said


def test_neither_library_is_one_sentence(monkeypatch):
    for name in library.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    library.library.cache_clear()
    try:
        with pytest.raises(CompanionError, match=r'works here: pip install .*"\.\[tensorrt\]"'):
            library.library()
    finally:
        library.library.cache_clear()


@pytest.mark.stress
def test_a_detector_is_built_in_every_precision(tmp_path):
    path = tmp_path / "yolov5.onnx"
    engines.export_onnx(YOLOv5(classes=10, width_multiple=0.125), torch.rand(1, 3, 160, 160), path)
    quantized = tmp_path / "yolov5_int8.onnx"
    nodes = onnx.load(path).graph.node
    last = max(number for number, node in enumerate(nodes) if node.op_type == "Conv")
    images = [np.random.default_rng(0).random((1, 3, 160, 160), dtype=np.float32)]
    # Without what makes boxes of the last convolutions: pixels and shares would have one scale.
    compress.quantize_onnx(path, quantized, images, bias=False, exclude=[node.name for node in nodes[last + 1 :]])
    cases = {"fp32": (path, {}), "fp16": (path, {"precision": "fp16"}), "int8": (quantized, {})}
    found = run(cases)
    assert {name: row.get("error") for name, row in found.items()} == dict.fromkeys(cases)
    assert all(row["profiles"][0]["input"][2] == [16, 3, 160, 160] for row in found.values())
    assert "INT8" in found["int8"]["types"]


def test_the_official_detector_is_built(test_data):
    path = test_data.parent / "models" / "yolov5n.onnx"
    if not path.exists():
        pytest.skip("the official YOLOv5n is not beside the data")
    found = run({"yolov5n": (path, {})})["yolov5n"]
    assert "error" not in found
    assert found["profiles"] == []
    assert found["layers"] > 200


def test_the_first_gpu_is_asked_of_the_driver(monkeypatch):
    answers = {75: 9, 76: 0}

    class Driver:
        failing = None

        def __getattr__(self, name):
            return lambda *arguments: 3 if name == self.failing else self.answer(name, *arguments)

        def answer(self, name, *arguments):
            if name == "cuDeviceGetName":
                arguments[0].value = b"H100"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = answers[arguments[1]]
            elif name == "cuDriverGetVersion":
                arguments[0]._obj.value = 13020
            return 0

    driver = Driver()
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: driver)
    assert library.gpu() == library.Gpu("H100", (9, 0), 13020)
    driver.failing = "cuInit"
    assert library.gpu() is None


@pytest.mark.skipif(library.gpu() is not None, reason="a GPU is here")
def test_without_a_gpu_it_is_not_available_and_says_so(exported):
    assert "tensorrt" not in engines.available()
    for source in (exported("simple_cnn").path, exported("simple_cnn").model):
        with pytest.raises(
            CompanionError, match="runs on NVIDIA GPUs, and there is none here: choose another"
        ) as error:
            engines.load(source, "tensorrt")
        one_sentence(error)


def test_with_a_gpu_it_is_available(monkeypatch):
    monkeypatch.setattr(library, "gpu", lambda: library.Gpu("Fake", (9, 0), 13000))
    assert "tensorrt" in engines.available()


def test_no_driver_is_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(library.ctypes, "CDLL", missing)
    assert library.gpu() is None
    with pytest.raises(CompanionError, match="there is none here"):
        library.usable_gpu()
