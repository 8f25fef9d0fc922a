"""float16 by conversion of the graph: what is in the file, and what it answers."""

import numpy as np
import onnx
import pytest
import torch
from engine_cases import one_sentence
from onnx import TensorProto, helper, numpy_helper

from companion import CompanionError, engines
from companion.engines.half import to_float16
from companion.engines.ort import OnnxRuntimeEngine

# float16 keeps 11 bits: each of the twenty layers of a network rounds its result by at most 2**-11, relatively.
TOLERANCE = 20 * 2**-11


def network(weight, bias=(0.5,), op="Conv", **attributes):
    """An ONNX file [N, 1, 2, 2] → [N, 1, 2, 2]: one 1×1 convolution, then a Max with 0."""
    tensors = {"w": np.full((1, 1, 1, 1), weight, np.float32), "b": np.array(bias, np.float32)}
    nodes = [
        helper.make_node(op, ["input", "w", "b"], ["y"], "conv", **attributes),
        helper.make_node("Max", ["y", "zero"], ["output"], "max"),
    ]
    shape = ["N", 1, 2, 2]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in {**tensors, "zero": np.float32(0)}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"companion": "1", "model": "somebody's"})
    return model.SerializeToString()


def run(content, x):
    with OnnxRuntimeEngine(content, threads=1) as engine:
        return engine.run({"input": x})["output"]


@pytest.mark.parametrize("name", ["simple_cnn", "cifar_resnet20", "unet", "mobilenet"])
def test_weights_are_halves_and_answers_are_close(name, exported):
    found = exported(name)
    before = found.path.read_bytes()
    content = to_float16(before)
    assert 0.49 < len(content) / len(before) < 0.6
    model = onnx.load_from_string(content)
    weights = [numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) > 1]
    assert weights
    assert all(w.dtype == np.float16 for w in weights if w.dtype.kind == "f")
    x = found.example.numpy()
    expected, answer = run(before, x), run(content, x)
    assert answer.dtype == np.float32
    assert 0 < np.abs(answer - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_openvino_gives_the_same_answers(exported):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is an extra")
    found = exported("cifar_resnet20")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(to_float16(found.path.read_bytes())), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    expected = run(found.path.read_bytes(), found.example.numpy())
    answer = compiled(found.example.numpy())[0]
    assert np.abs(answer - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_one_convolution_by_hand():
    """1 + 2**-11 has no float16: it is rounded to 1; and the arithmetic is in float16 too, where 2048 + 1 = 2048."""
    x = np.full((3, 1, 2, 2), 2048, np.float32)
    assert run(network(1 + 2**-11, [1]), x)[0, 0, 0, 0] == 2050
    assert run(to_float16(network(1 + 2**-11, [1])), x)[0, 0, 0, 0] == 2048


def test_inputs_and_outputs_may_be_halves_too():
    content = to_float16(network(2.0), float_io=False)
    with OnnxRuntimeEngine(content, threads=1) as engine:
        assert [info.dtype for info in (*engine.inputs, *engine.outputs)] == ["float16", "float16"]
        x = np.full((2, 1, 2, 2), 3, np.float16)
        assert (engine.run({"input": x})["output"] == 6.5).all()


def test_what_is_excluded_stays_as_it_was():
    x = np.full((1, 1, 2, 2), 1, np.float32)
    content = to_float16(network(1 + 2**-20, [0]), exclude=["conv"])
    weights = {t.name: t.data_type for t in onnx.load_from_string(content).graph.initializer}
    assert weights["w"] == TensorProto.FLOAT
    assert run(content, x).max() == 1  # the result is rounded, after it
    assert run(to_float16(network(70000.0, [0]), exclude=["conv"]), x / 2).max() == 35008  # 32 apart up there


def test_the_bytes_are_always_the_same_and_say_what_they_are(exported):
    found = exported("simple_cnn")
    before = found.path.read_bytes()
    assert to_float16(before) == to_float16(before)
    said = [{p.key: p.value for p in onnx.load_from_string(c).metadata_props} for c in (before, to_float16(before))]
    assert said[0] == said[1]
    with OnnxRuntimeEngine(to_float16(before), threads=1) as engine:
        assert engine.metadata.labels == tuple(f"类 {i}" for i in range(10))


def test_limits_of_a_clip_may_be_as_wide_as_float32(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Hardtanh(-1, torch.finfo(torch.float32).max))
    engines.export_onnx(model, torch.rand(1, 2), tmp_path / "net.onnx")
    x = np.array([[1, 2]], np.float32)
    answer = run(to_float16((tmp_path / "net.onnx").read_bytes()), x)
    np.testing.assert_allclose(answer, model(torch.from_numpy(x)).detach(), rtol=TOLERANCE)


def test_external_weights(tmp_path):
    model = onnx.load_from_string(network(1.0))
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="w", size_threshold=0)
    with pytest.raises(CompanionError, match="keeps its weights in another file") as error:
        to_float16((tmp_path / "net.onnx").read_bytes())
    one_sentence(error)


def with_constants(content):
    """The same network, its weights in Constant nodes, as older exporters write them."""
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], f"make {tensor.name}", value=tensor))
        model.graph.node[0].attribute[0].t.name = ""
    del model.graph.initializer[:]
    return model.SerializeToString()


def test_weights_in_constant_nodes_are_weights():
    x = np.random.default_rng(0).random((2, 1, 2, 2), dtype=np.float32)
    plain, constants = network(0.3), with_constants(network(0.3))
    np.testing.assert_array_equal(run(to_float16(constants), x), run(to_float16(plain), x))


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (with_constants(network(65536.0)), {}, r"a Constant node holds 6\.55e\+04, and float16 ends at 65504"),
        (b"", {}, "not an ONNX file"),
        (b"not a file at all", {}, "not an ONNX file"),
        (network(1.0)[:60], {}, "not an ONNX file"),
        (to_float16(network(1.0)), {}, "in float16 already"),
        (network(65536.0), {}, r"the weight w holds 6\.55e\+04, and float16 ends at 65504"),
        (network(1.0), {"exclude": ["other"]}, "no node 'other'"),
        (network(1.0), {"exclude": "conv"}, "list of node names"),
    ],
)
def test_what_cannot_be_converted(content, options, says):
    with pytest.raises(CompanionError, match=says) as error:
        to_float16(content, **options)
    one_sentence(error)
