"""Quantized ONNX files: what they compute, weigh and say, and that nothing else changes."""

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from companion import CompanionError, compress, engines, models
from companion.engines.base import Metadata

MODES = ("static", "dynamic", "weights")


def batches(n=3, size=8, shape=(3, 32, 32)):
    rng = np.random.default_rng(0)
    return [rng.random((size, *shape), dtype=np.float32) for _ in range(n)]


def lively(model, shape=(3, 32, 32)):
    """With normalisations that have seen data, as in a trained network."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, *shape))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def plain(folder):
    """A residual network's file."""
    model = lively(models.create("cifar_resnet14", labels=[f"类 {i}" for i in range(10)], seed=0))
    return engines.export_onnx(model, engines.example_for(model), folder / "plain.onnx").path


@pytest.fixture(scope="module")
def made(plain, folder):
    """By mode: what `quantize_onnx` says of the residual network's file."""
    before = plain.read_bytes()
    found = {mode: compress.quantize_onnx(plain, folder / f"{mode}.onnx", batches(), mode=mode) for mode in MODES}
    assert plain.read_bytes() == before
    return found


def answers(path, inputs):
    with engines.load(path) as engine:
        return np.concatenate([engine.run({"input": x})["output"] for x in inputs])


@pytest.mark.parametrize("mode", MODES)
def test_answers_size_and_report(mode, made, plain):
    report = made[mode]
    assert report.path.stat().st_size == report.bytes
    assert plain.stat().st_size == report.bytes_before
    assert report.times_smaller == report.bytes_before / report.bytes > 3.2
    assert (report.layers, report.layers_before) == (16, 16)
    assert (report.mode, report.backend) == (mode, "onnxruntime")
    again = compress.sqnr(answers(plain, batches()), answers(report.path, batches()))
    assert report.sqnr == pytest.approx(again)
    others = [np.random.default_rng(7).random((1, 3, 32, 32), dtype=np.float32)]  # another batch, other data
    assert compress.sqnr(answers(plain, others), answers(report.path, others)) > 15
    assert report.sqnr > 20


@pytest.mark.parametrize("mode", MODES)
def test_the_description_stays_and_nothing_of_this_machine_is_in_it(mode, made, plain):
    with engines.load(plain) as before, engines.load(made[mode].path) as after:
        assert after.metadata == before.metadata
        assert after.metadata.labels[0] == "类 0"
        assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    content = made[mode].path.read_bytes()
    for text in (str(plain.parent), "/tmp", "/root", "/home", str(Path.cwd())):
        assert text.encode() not in content
    found = onnx.load(made[mode].path)
    onnx.checker.check_model(found, full_check=True)
    assert {entry.key for entry in found.metadata_props} == {"companion", *Metadata.__annotations__} - {
        "vocabulary",
        "stride",
    }


def dtypes(path):
    """(operator, type of its zero point, per channel) of each quantizing node."""
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return {
        (node.op_type, constants[node.input[2]].data_type, len(constants[node.input[1]].dims) > 0)
        for node in graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }


def test_static_has_uint8_activations_and_int8_weights_per_channel(made):
    uint8, int8, int32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32
    assert dtypes(made["static"].path) == {
        ("QuantizeLinear", uint8, False),
        ("DequantizeLinear", uint8, False),
        ("DequantizeLinear", int8, True),
        ("DequantizeLinear", int32, True),  # biases
    }
    assert dtypes(made["weights"].path) == {("DequantizeLinear", int8, True)}


def test_biases_may_stay_float(plain, folder, made):
    """As TensorRT wants them: it knows no DequantizeLinear of int32."""
    report = compress.quantize_onnx(plain, folder / "bias.onnx", batches(), bias=False)
    for path, kind in ((made["static"].path, "int32"), (report.path, "float32")):
        model = onnx.load(path)
        tensors = {t.name: numpy_helper.to_array(t).dtype.name for t in model.graph.initializer}
        sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        biases = [node.input[2] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
        assert {tensors[sources.get(name, name)] for name in biases} == {kind}
    assert report.layers == made["static"].layers
    assert report.sqnr > 20


def test_weights_only_is_the_quantization_by_hand(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    path = engines.export_onnx(model, torch.rand(2, 3, 8, 8), folder / "small.onnx").path
    inputs = batches(shape=(3, 8, 8))
    for per_channel in (True, False):
        out = compress.quantize_onnx(path, folder / "small8.onnx", inputs, mode="weights", per_channel=per_channel)
        by_hand = compress.quantize_weights(model, 8, per_channel=per_channel)
        with torch.no_grad():
            expected = torch.cat([by_hand(torch.from_numpy(x)) for x in inputs])
        np.testing.assert_allclose(answers(out.path, inputs), expected, rtol=1e-4, atol=1e-5)


def test_static_weights_are_those_by_hand(folder, plain):
    report = compress.quantize_onnx(plain, folder / "eight.onnx", batches(), weight_bits=8)
    before, after = onnx.load(plain), onnx.load(report.path)
    weights = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    stored = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    compared = 0
    for name, weight in weights.items():
        if weight.ndim == 4 and f"{name}_quantized" in stored:
            x = torch.from_numpy(weight.copy())
            grid = compress.observe(x, symmetric=True, axis=0)
            q = compress.quantize(x, grid).numpy().astype(int)
            assert np.abs(q - stored[f"{name}_quantized"].astype(int)).max() <= 1  # its steps are rounded otherwise
            compared += 1
    assert compared == 15


def int8_weights(path):
    """The extremes of the int8 numbers of each layer's weight."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = [array for array in constants.values() if array.dtype == np.int8 and array.ndim >= 2]
    return min(array.min() for array in found), max(array.max() for array in found), len(found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("saturating", [True, False])
def test_weights_leave_room_where_products_are_added_in_16_bits(plain, folder, monkeypatch, saturating, bias):
    """Two products of 255 by 64 fit, two by 127 do not; and a step is twice as long."""
    monkeypatch.setattr(compress.int8, "saturates", lambda: saturating)
    out = folder / "room.onnx"
    compress.quantize_onnx(plain, out, batches(1), bias=bias)
    low, high, layers = int8_weights(out)
    assert layers == 16
    most = 64 if saturating else 127
    assert low >= -most
    assert high == most
    for bits, most in ((7, 64), (8, 127)):
        compress.quantize_onnx(plain, out, batches(1), bias=bias, weight_bits=bits)
        assert int8_weights(out)[1] == most


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the processor's features from /proc")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have no such instruction")
def test_products_are_cut_off_without_vnni():
    """With it they are added in 32 bits, so whichever this processor is, the answer is known beforehand."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert compress.int8.saturates() is not bool({"avx512_vnni", "avx_vnni"} & flags)


def test_nodes_without_names_are_told_apart(plain, folder):
    """As files of others may have them."""
    model = onnx.load(plain)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, folder / "nameless.onnx")
    for exclude in ("first", "head"):
        named, nameless = (
            compress.quantize_onnx(path, folder / "out.onnx", batches(1), exclude=exclude)
            for path in (plain, folder / "nameless.onnx")
        )
        assert (nameless.layers, nameless.sqnr) == (named.layers, pytest.approx(named.sqnr))


def test_a_network_in_memory_is_no_file(folder):
    with pytest.raises(CompanionError, match="takes an ONNX file: export the network first"):
        compress.quantize_onnx(models.create("simple_cnn", seed=0), folder / "out.onnx", batches(1))


def test_first_last_and_named_nodes_stay_float(plain, folder):
    names = [node.name for node in onnx.load(plain).graph.node if node.op_type in ("Conv", "Gemm")]
    for exclude, left in ((["first", "last"], [names[0], names[-1]]), (names[3], [names[3]])):
        for mode in MODES:
            out = folder / "some.onnx"
            report = compress.quantize_onnx(plain, out, batches(1), mode=mode, exclude=exclude)
            assert report.layers == 16 - len(left)
            graph = onnx.load(out).graph
            floats = {t.name for t in graph.initializer if t.data_type == t.FLOAT and len(t.dims) > 1}
            layers = {n.name.removesuffix("_MatMul") for n in graph.node if {*n.input[1:2]} & floats}
            assert layers - {"node_sub", "node_div"} == set(left)


def test_percentiles_cut_an_outlier(plain, folder):
    """One wild image in the calibration data costs the others their precision, unless it is cut off."""
    inputs = batches(8, size=4)
    inputs[0][0] *= 30
    found = {}
    for method, percentile in (("minmax", 99.0), ("percentile", 98.0)):
        compress.quantize_onnx(plain, folder / "cut.onnx", inputs, method=method, percentile=percentile)
        found[method] = compress.sqnr(answers(plain, batches(2)), answers(folder / "cut.onnx", batches(2)))
    assert found["percentile"] > found["minmax"] + 6


def test_tensors_dicts_and_generators_are_calibration_data_and_are_not_changed(plain, folder):
    inputs = batches(2)
    kept = [x.copy() for x in inputs]
    contents = []
    for given in (
        inputs,
        (torch.from_numpy(x) for x in inputs),
        [{"input": x} for x in inputs],
    ):
        compress.quantize_onnx(plain, folder / "g.onnx", given)
        contents.append((folder / "g.onnx").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    assert all(np.array_equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_running_the_file_leaves_its_input_as_it_is(made):
    x = batches(1)[0]
    kept = x.copy()
    for report in made.values():
        answers(report.path, [x])
    assert np.array_equal(x, kept)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, left, right):
        return {"sum": self.a(left) + self.b(right), "product": self.a(left) * self.b(right)}


def test_networks_with_several_inputs_and_outputs(folder):
    torch.manual_seed(0)
    example = {"left": torch.rand(2, 4), "right": torch.rand(2, 5)}
    path = engines.export_onnx(Two().eval(), example, folder / "two.onnx").path
    rng = np.random.default_rng(0)
    inputs = [{n: rng.random((8, w), dtype=np.float32) for n, w in (("left", 4), ("right", 5))} for _ in range(3)]
    for mode in MODES:
        report = compress.quantize_onnx(path, folder / "two8.onnx", inputs, mode=mode)
        assert report.layers == report.layers_before
        assert report.sqnr > 25
    with pytest.raises(CompanionError, match="as a dict of arrays by name"):
        compress.quantize_onnx(path, folder / "two8.onnx", [inputs[0]["left"]])


def nan_file(folder):
    model = nn.Linear(4, 2)
    path = engines.export_onnx(model, torch.rand(1, 4), folder / "nan.onnx").path
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.nan, tensor.name))
    onnx.save(proto, path)
    return path


def no_weights(folder):
    return engines.export_onnx(nn.ReLU(), torch.rand(1, 4), folder / "relu.onnx").path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast': choose one of static, dynamic, weights"),
        ({"backend": "tensorrt"}, "backend is 'tensorrt'"),
        ({"method": "entropy"}, "method is 'entropy'"),
        ({"method": "percentile", "percentile": 40}, "percentile is 40"),
        ({"mode": "dynamic", "bias": False}, "biases are quantized in mode static by onnxruntime only"),
        ({"weight_bits": 4}, "weight_bits is 4: choose one of 7, 8"),
        ({"mode": "dynamic", "weight_bits": 7}, "weight_bits is for mode static by onnxruntime only"),
        ({"backend": "nncf", "weight_bits": 8}, "weight_bits is for mode static by onnxruntime only"),
        ({"method": "percentile", "calibration": [batches()[0], batches()[0][:3]]}, "batches of one size"),
        ({"backend": "nncf", "mode": "dynamic"}, "nncf quantizes statically"),
        ({"calibration": []}, "nothing to calibrate with"),
        ({"calibration": batches()[0]}, "must be a list of batches"),
        ({"calibration": None}, "must be a list of batches"),
        ({"calibration": [np.full((1, 3, 32, 32), np.nan, np.float32)]}, "hold NaN or infinite values"),
        ({"calibration": [np.zeros((2, 3, 32, 31), np.float32)]}, "must have the shape"),
        ({"calibration": [np.zeros((2, 3, 32, 32))]}, "must be float32"),
        ({"calibration": [{"x": batches()[0]}]}, "no input 'x'"),
        ({"calibration": ["a file"]}, "must be a NumPy array"),
        ({"exclude": "nothing"}, "there is no node 'nothing' to exclude"),
        ({"path": "missing.onnx"}, "there is no file missing.onnx"),
        ({"out": "small.bin"}, "must end in .onnx"),
        ({"out": "no/such/folder/small.onnx"}, "cannot write"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(change, message, plain, folder):
    arguments = {"path": plain, "out": folder / "refused.onnx", "calibration": batches(1)} | change
    with pytest.raises(CompanionError) as refused:
        compress.quantize_onnx(**arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")
    assert not (folder / "refused.onnx").exists()


def test_other_files_are_refused(made, plain, folder):
    x = [np.ones((1, 4), np.float32)]
    out = folder / "refused.onnx"
    for report in made.values():
        with pytest.raises(CompanionError, match="is quantized already"):
            compress.quantize_onnx(report.path, out, batches(1))
    with pytest.raises(CompanionError, match="give the new one another name"):
        compress.quantize_onnx(plain, plain, batches(1))
    with pytest.raises(CompanionError, match="no weights to quantize"):
        compress.quantize_onnx(no_weights(folder), out, x)
    path = engines.export_onnx(nn.Linear(4, 2), torch.rand(1, 4), folder / "one.onnx").path
    with pytest.raises(CompanionError, match="every layer is excluded"):
        compress.quantize_onnx(path, out, x, exclude="first")
    path = nan_file(folder)
    for mode in MODES:
        with pytest.raises(CompanionError) as refused:
            compress.quantize_onnx(path, out, x, mode=mode)
        assert "NaN" in str(refused.value)
    models.save(models.create("simple_cnn"), folder / "w.safetensors")
    with pytest.raises(CompanionError, match="is no ONNX file"):
        compress.quantize_onnx(folder / "w.safetensors", out, batches(1))
    assert not out.exists()
    assert not list(folder.glob(".*"))


def test_an_older_file_survives_a_failure(plain, folder, made):
    out = folder / "old.onnx"
    out.write_bytes(b"old")
    with pytest.raises(CompanionError):
        compress.quantize_onnx(made["static"].path, out, batches(1))
    assert out.read_bytes() == b"old"


def test_nothing_is_printed(plain, folder, capfd):
    for mode in MODES:
        compress.quantize_onnx(plain, folder / "quiet.onnx", batches(1), mode=mode)
    assert capfd.readouterr() == ("", "")


def test_without_nncf_one_sentence_says_so(plain, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(CompanionError, match="pip install nncf"):
        compress.quantize_onnx(plain, folder / "refused.onnx", batches(1), backend="nncf")


@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="the optional backend nncf is not installed")
def test_nncf_writes_the_same_kind_of_file(plain, folder):
    """In a process of its own: NNCF changes torch and warns a lot when it is imported."""
    out = folder / "nncf.onnx"
    code = f"""
import numpy as np
from companion import compress
rng = np.random.default_rng(0)
data = [rng.random((8, 3, 32, 32), dtype=np.float32) for _ in range(3)]
report = compress.quantize_onnx({str(plain)!r}, {str(out)!r}, data, backend="nncf", exclude=["first"])
assert (report.layers, report.layers_before, report.backend) == (15, 16, "nncf"), report
assert report.sqnr > 20 and report.times_smaller > 3, report
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    with engines.load(plain) as before, engines.load(out) as after:
        assert after.metadata == before.metadata
    assert ("DequantizeLinear", onnx.TensorProto.INT8, True) in dtypes(out)


@pytest.mark.parametrize("mode", ["static", "weights"])
def test_openvino_reads_the_file(mode, made):
    openvino = pytest.importorskip("openvino", reason="OpenVINO, an optional engine, is not installed")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = core.compile_model(core.read_model(made[mode].path), "CPU", options)
    x = batches(1)[0]
    assert compress.sqnr(answers(made[mode].path, [x]), network([x])[0]) > 25
