"""OpenVINO: the precision is chosen and said, files are read as ONNX only, nothing is left behind."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from engine_cases import one_sentence, torch_answer
from onnx import TensorProto, helper

from companion import CompanionError, doctor, engines
from companion.compress import quantize_onnx
from companion.engines.half import to_float16

pytest.importorskip("openvino", reason="OpenVINO is an extra")
X = np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32)
HAS_BF16 = {"avx512_bf16", "amx_bf16"} & set(doctor._cpu()["features"])


def answers(path, **options):
    with engines.load(path, "openvino", **options) as engine:
        return engine.run({"input": X})["output"], engine.precision


def test_float32_unless_told_otherwise(exported):
    found = exported("cifar_resnet20")
    expected = torch_answer(found.model, torch.from_numpy(X)).numpy()
    answer, precision = answers(found.path)
    assert precision == "fp32"
    np.testing.assert_allclose(answer, expected, atol=1e-4)


@pytest.mark.parametrize("asked", ["bf16", "default"])
def test_bfloat16_is_said_and_seen(asked, exported):
    """bfloat16 keeps 8 bits: twenty layers round by 2**-9 each, so the errors are a thousand times those of float32."""
    found = exported("cifar_resnet20")
    expected = torch_answer(found.model, torch.from_numpy(X)).numpy()
    answer, precision = answers(found.path, precision=asked)
    error = np.abs(answer - expected).max() / np.abs(expected).max()
    assert precision in ("fp32", "bf16", "fp16")
    if HAS_BF16:
        assert precision == "bf16"
    assert error <= {"fp32": 1e-5, "fp16": 20 * 2**-11, "bf16": 20 * 2**-9}[precision]
    assert (error > 1e-4) == (precision != "fp32")


def test_files_in_float16_and_in_int8(exported, tmp_path):
    found = exported("cifar_resnet20")
    expected = torch_answer(found.model, torch.from_numpy(X)).numpy()
    (tmp_path / "half.onnx").write_bytes(to_float16(found.path.read_bytes()))
    answer, precision = answers(tmp_path / "half.onnx")
    assert precision == "fp32"  # as asked for: the weights alone are float16
    np.testing.assert_allclose(answer, expected, atol=20 * 2**-11 * np.abs(expected).max())
    quantize_onnx(found.path, tmp_path / "int8.onnx", [X])
    answer, precision = answers(tmp_path / "int8.onnx")
    assert precision == "int8"
    with engines.load(tmp_path / "int8.onnx") as engine:  # both round to the same steps, not always to the same side
        assert engine.precision == "int8"
        assert np.abs(answer - engine.run({"input": X})["output"]).max() < 0.1 * np.ptp(expected)


def test_it_leaves_no_file_and_calls_nobody(exported, tmp_path):
    program = """
import socket, sys, numpy as np
from companion import engines
def connect(self, address):
    print("calls", address)
socket.socket.connect = connect
with engines.load(sys.argv[1], "openvino", threads=2) as engine:
    engine.run({"input": np.zeros((1, 3, 32, 32), np.float32)})
print("done")
"""
    places = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    command = [sys.executable, "-c", program, exported("simple_cnn").path.resolve()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | places, capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def write(path, node, *, opset=20, shape=("n", 3), weights=()):
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([node], "graph", infos[:1], infos[1:], list(weights))
    versions = [helper.make_opsetid("", opset), helper.make_opsetid("com.somebody", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def refused(says, path, **options):
    with pytest.raises(CompanionError, match=says) as caught:
        engines.load(path, "openvino", **options)
    one_sentence(caught)


def test_what_cannot_be_loaded(exported, tmp_path, capfd):
    refused("no precision 'int8': choose one of fp32, bf16, default", exported("simple_cnn").path, precision="int8")
    refused("no option 'provider' here: it takes precision", exported("simple_cnn").path, provider="cpu")
    refused("Nonsense", write(tmp_path / "a.onnx", helper.make_node("Nonsense", ["x"], ["y"])))
    sign = helper.make_node("Relu", ["x"], ["y"], domain="com.somebody")
    refused("OpenVINO cannot load .*operations: com.somebody.Relu", write(tmp_path / "b.onnx", sign))
    three = helper.make_tensor("w", TensorProto.FLOAT, [3], np.ones(3, np.float32).tobytes(), raw=True)
    model = onnx.load(write(tmp_path / "d.onnx", helper.make_node("Add", ["x", "w"], ["y"]), weights=[three]))
    onnx.save(model, tmp_path / "d.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    with engines.load(tmp_path / "d.onnx", "openvino") as engine:
        assert np.array_equal(engine.run({"x": np.zeros((1, 3), np.float32)})["y"], [[1, 1, 1]])
    (tmp_path / "w.data").unlink()
    refused("keeps its weights in another file, which is not there", tmp_path / "d.onnx")
    assert capfd.readouterr() == ("", "")


def test_damaged_files_are_one_sentence_each(exported, tmp_path):
    """In a process of its own: what reads them is C++. Cut anywhere, or with bytes overwritten."""
    program = """
import random, sys
from pathlib import Path
from companion import CompanionError, engines
content, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
damaged = [content[: len(content) * share // 20] for share in range(20)] + [b"junk" * 100, b"PK\\3\\4 a zip"]
rng = random.Random(0)
for _ in range(20):
    other = bytearray(content)
    for _ in range(8):  # the graph stands at the beginning, before the weights
        other[rng.randrange(4000)] = rng.randrange(256)
    damaged.append(bytes(other))
refused = 0
for each in damaged:
    path.write_bytes(each)
    try:
        engines.load(path, "openvino").close()
    except CompanionError as error:
        assert "\\n" not in str(error), str(error)
        refused += 1
print(refused)
"""
    command = [sys.executable, "-c", program, exported("simple_cnn").path, tmp_path / "net.onnx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 22 <= int(done.stdout) <= 42  # a flipped bit in a name may do no harm


def test_sizes_that_the_file_leaves_open(tmp_path):
    pool = helper.make_node("GlobalMaxPool", ["x"], ["y"])
    path = write(tmp_path / "pool.onnx", pool, shape=("n", 3, "h", "w"))
    with engines.load(path, "openvino") as engine:
        assert engine.inputs[0].shape == (None, 3, None, None)
        for shape in ((1, 3, 4, 5), (2, 3, 1, 9), (1, 3, 4, 5)):
            x = np.random.default_rng(1).random(shape, dtype=np.float32)
            np.testing.assert_array_equal(engine.run({"x": x})["y"], x.max((2, 3), keepdims=True))


def test_nodes_in_any_order(exported, tmp_path):
    """Converters leave graphs unsorted, the official YOLOv5n in half precision for one."""
    found = exported("cifar_resnet20")
    shuffled = onnx.load(found.path)
    nodes = list(shuffled.graph.node)
    order = np.random.default_rng(0).permutation(len(nodes))
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes[number] for number in order)
    with pytest.raises(onnx.checker.ValidationError, match="sorted"):
        onnx.checker.check_model(shuffled)
    onnx.save(shuffled, tmp_path / "shuffled.onnx")
    assert np.array_equal(answers(tmp_path / "shuffled.onnx")[0], answers(found.path)[0])


def test_a_branch_may_take_what_is_made_later(tmp_path):
    """The body of an If names a tensor of the graph around it."""
    value = helper.make_tensor_value_info
    x, y = (value(name, TensorProto.FLOAT, [None, 3]) for name in "xy")
    bodies = [
        helper.make_graph(
            [helper.make_node(kind, ["double"], [kind])], kind, [], [value(kind, TensorProto.FLOAT, None)]
        )
        for kind in ("Neg", "Abs")
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("If", ["yes"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
        helper.make_node("Add", ["x", "x"], ["double"]),
    ]
    graph = helper.make_graph(nodes, "branches", [x], [y], [yes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "branches.onnx")
    with engines.load(tmp_path / "branches.onnx", "openvino") as engine:
        assert np.array_equal(engine.run({"x": X[0, 0, :2, :3]})["y"], -2 * X[0, 0, :2, :3])
