"""`companion build`: an engine file from an ONNX file, or one sentence and nothing."""

import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from companion.engines.tensorrt import read_engine

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def write(path, *, layers=1, shape=("n", 3, 8, 8)):
    """An ONNX file of convolutions, one after the other."""
    weight = numpy_helper.from_array(np.ones((3, 3, 3, 3), np.float32) / 27, "w")
    nodes = [
        helper.make_node("Conv", [f"x{i}" if i else "x", "w"], [f"x{i + 1}"], f"conv{i}", pads=[1, 1, 1, 1])
        for i in range(layers)
    ]
    last = helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [last], [weight]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_build(call, tmp_path):
    out = tmp_path / "F.engine"
    code, printed, _ = call("build", write(tmp_path / "F.onnx"), out, "--batch", "1,2,8", "--workspace", "1GiB")
    assert code == 0, printed
    made = read_engine(out)
    assert made.profiles == ({"x": ((1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))},)
    first, second, third = printed.splitlines()
    assert first.startswith(f"{out}: ")
    assert f"fp32, {made.layers} layers before fusion, built in" in first
    assert second.startswith(f"by tensorrt_rtx {made.version}, for ")
    assert third == "x: [1, 3, 8, 8] to [8, 3, 8, 8], fastest at [2, 3, 8, 8]"


def test_build_in_half_precision_for_shapes_of_any_size(call, tmp_path):
    out = tmp_path / "F.engine"
    onnx_file = write(tmp_path / "F.onnx", shape=("n", 3, "h", "w"))
    shapes = "x=1x3x8x8:2x3x16x16:4x3x32x32"
    code, _, error = call("build", onnx_file, out, "--precision", "fp16", "--input", shapes, "--target", "8.6")
    assert (code, error) == (0, "")
    made = read_engine(out)
    assert made.precision == "fp16"
    assert made.device == "compute capability 8.6"
    assert made.profiles == ({"x": ((1, 3, 8, 8), (2, 3, 16, 16), (4, 3, 32, 32))},)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["F.onnx", "F.plan"], "F.plan must end in .engine"),
        (["F.safetensors", "F.engine"], "F.safetensors must end in .onnx: `companion export`"),
        (["none.onnx", "F.engine"], "none.onnx cannot be read: No such file"),
        (["F.onnx", "none/F.engine"], "cannot write none/F.engine"),
        (["F.onnx", "F.engine", "--batch", "few"], "--batch is 'few': give whole numbers with ',' between them"),
        (["F.onnx", "F.engine", "--batch", "4,2,1"], "batch must grow from 1 up"),
        (["F.onnx", "F.engine", "--batch", "1,2,3000000000"], "batch must grow from 1 up"),
        (["F.onnx", "F.engine", "--batch", "1,2,99999999999999999999"], "batch must grow from 1 up"),
        (["F.onnx", "F.engine", "--workspace", "much"], "'much' is not a size"),
        (["F.onnx", "F.engine", "--workspace", "999999999999GiB"], "'999999999999GiB' is more bytes than there are"),
        (["F.onnx", "F.engine", "--workspace", f"{'9' * 330}GiB"], "is more bytes than there are"),
        (["F.onnx", "F.engine", "--workspace", "1"], "the workspace of 1 B is too small"),
        (["F.onnx", "F.engine", "--input", "x"], "--input is 'x': give NAME=MIN:USUAL:MAX"),
        (["F.onnx", "F.engine", "--input", "x=1x3:1x3"], "the profile of x must be the smallest, the usual"),
        (["F.onnx", "F.engine", "--precision", "int4"], "there is no precision 'int4' here"),
    ],
)
def test_what_cannot_be_built_is_one_sentence_and_no_file(call, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "F.onnx")
    code, out, error = call("build", *arguments)
    assert (code, out) == (1, "")
    assert says in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["F.onnx"]  # noqa: PTH208


def test_ctrl_c_leaves_nothing(tmp_path):
    path = write(tmp_path / "F.onnx", layers=100)
    program = f"""
import time
from companion import cli
from companion.engines.tensorrt import builder
step = builder._Watch.step
def told(self, fraction, phase):
    print("building", flush=True)
    time.sleep(0.05)
    return step(self, fraction, phase)
builder._Watch.step = told
cli.main(["build", {str(path)!r}, {str(tmp_path / "F.engine")!r}])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "companion: interrupted; nothing was written.\n"
    assert [each.name for each in tmp_path.iterdir()] == ["F.onnx"]
