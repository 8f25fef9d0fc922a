"""export, evaluate with an engine, profile and bench, as a user types them."""

import json
import re

import pytest

from companion import bench, cli, engines, metrics, models
from companion.files import shipped
from companion.metrics import results


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights with digit labels, and the ONNX file that the command made of them."""
    folder = tmp_path_factory.mktemp("export")
    weights, exported = folder / "net.safetensors", folder / "net.onnx"
    models.save(models.create("simple_cnn", labels=tuple("0123456789"), seed=0), weights)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(weights), str(exported)])
    assert ended.value.code == 0
    return weights, exported


def test_export_writes_a_file_that_knows_what_it_is(files):
    with engines.load(files[1]) as engine:
        assert engine.metadata.model == "simple_cnn"
        assert engine.metadata.labels == tuple("0123456789")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["net.onnx", "net.safetensors"]


def test_every_engine_gets_the_score_of_torch(files, call):
    def score(*arguments):
        code, out, err = call("evaluate", *arguments, "--threads", "1", "--json")
        assert code == 0, err
        found = json.loads(out)
        return found["model"], found["samples"], found["accuracy"], pytest.approx(found["loss"], rel=1e-5)

    name, *plain = score(files[0])
    assert name == "simple_cnn"
    assert score(files[0], "--engine", "torch_fused") == ("simple_cnn by torch_fused", *plain)
    assert score(files[1]) == ("simple_cnn by onnxruntime", *plain)


def test_profile_of_a_network_its_weights_and_its_onnx_file(files, call):
    found = {}
    for target in ("simple_cnn", *files):
        code, out, err = call("profile", target, "--seconds", "0.02", "--json")
        assert code == 0, err
        found[target] = json.loads(out)
    by_name, saved, exported = found.values()
    # By hand: two 3×3 convolutions on 32×32 and 16×16, two linear layers.
    macs = 1024 * 27 * 16 + 256 * 144 * 32 + 2048 * 128 + 1280
    for one in found.values():
        assert one["macs"] == macs
        assert one["flops"] == 2 * macs
        assert one["input"] == [1, 3, 32, 32]
        assert 0 < one["latency_seconds"]["median"] <= one["latency_seconds"]["p99"]
        assert one["uncounted"] == []
    assert by_name["parameters"] == saved["parameters"] == 268_650
    assert exported["parameters"] == 268_650 + 6  # mean and deviation of the input, three channels each
    assert saved["bytes"] == metrics.model_bytes(files[0])
    assert (saved["bytes_of"], by_name["bytes_of"]) == ("file", "state")
    assert exported["engine"] == "onnxruntime"
    # The widest moment: the first convolution's output and the ReLU's, 16 maps of 32×32 float32 each. An ONNX file has
    # no allocator to ask, so its figure is exact; torch's also has what kernels borrow.
    assert exported["activation_bytes"] == {"inference": 2 * 4 * 16 * 1024, "training": None}
    assert by_name["activation_bytes"]["inference"] >= exported["activation_bytes"]["inference"]


def test_export_in_float16(files, call, tmp_path):
    code, out, _ = call("export", files[0], tmp_path / "half.onnx", "--precision", "fp16")
    assert code == 0
    assert "from torch's outputs" in out
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * files[1].stat().st_size
    with engines.load(tmp_path / "half.onnx") as engine:
        assert engine.precision == "fp16"


def test_export_for_images_of_any_size(call, tmp_path):
    models.save(
        models.create("cifar_resnet14", width=4, labels=tuple("0123456789"), seed=0), tmp_path / "net.safetensors"
    )
    code, _, _ = call("export", tmp_path / "net.safetensors", tmp_path / "net.onnx", "--dynamic-size")
    assert code == 0
    with engines.load(tmp_path / "net.onnx") as engine:
        assert engine.inputs[0].shape == (None, 3, None, None)


@pytest.mark.parametrize("engine", ["openvino", "litert"])
def test_evaluate_by_other_engines(engine, files, call):
    pytest.importorskip({"openvino": "openvino", "litert": "ai_edge_litert"}[engine], reason=f"{engine} is an extra")
    path, data = files[1], "digits"
    if engine == "litert":
        path, data = shipped("weights/cifar_resnet14_hard_digits.tflite"), "hard_digits"
    code, out, _ = call("evaluate", path, "--data", data, *(() if engine == "litert" else ("--engine", engine)))
    assert code == 0
    assert re.match(rf"\w+ by {engine} on {data} \(test\)  accuracy \d", out)
    assert engine != "litert" or float(re.search(r"accuracy ([\d.]+) %", out)[1]) > 90


def test_profile_for_a_person(files, call):
    code, out, _ = call("profile", files[0], "--seconds", "0.02", "--input", "4,3,32,32", "--modules")
    assert code == 0
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    figures = {line[0]: line[1:] for line in lines if line[0]}
    assert figures["network"][1] == "input 4×3×32×32, torch, 1 thread"
    assert figures["parameters"] == ["268,650"]
    assert figures["MACs"][0] == "7.542 M"
    assert figures["FLOPs"][0] == "15.08 M"
    assert figures["conv2"][:2] == ["4.719 M", "62.6 %"]


def test_profile_of_torchvisions_network(call):
    code, out, _ = call("profile", "torchvision:resnet18", "--input", "1,3,64,64", "--seconds", "0.02", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["parameters"] == 11_689_512
    assert found["network"] == "torchvision:resnet18"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "NET.safetensors", "net.onnx", "--dynamic-size"], "simple_cnn does not take images of any size"),
        (["evaluate", "NET.onnx", "--engine", "litert"], "litert runs .tflite files, not"),
        (["profile", "nothing"], "there is no network 'nothing'"),
        (["profile", "nothing.onnx"], "there is no file"),
        (["profile", "nothing.safetensors"], "there is no weights file"),
        (["profile", "torchvision:nothing"], "torchvision has no network 'nothing'"),
        (["profile", "simple_cnn", "--input", "1,3,x"], "give whole numbers"),
        (["profile", "simple_cnn", "--input", "0,3,32,32"], "is empty"),
        (["profile", "simple_cnn", "--input", "1,3,9,9"], "cannot run"),
        (["profile", "simple_cnn", "--threads", "0"], "greater than or equal to 1"),
        (["profile", "NET.onnx", "--input", "1,3,9,9"], "does not fit"),
        (["export", "NET.onnx", "other.onnx"], "is not a safetensors file"),
        (["export", "NET.safetensors", "net.txt"], "must end in .onnx or .tflite"),
        (
            ["export", "NET.safetensors", "net.onnx", "--precision", "int8"],
            "precision is 'int8': choose one of fp32, fp16",
        ),
        (
            ["export", "NET.safetensors", "net.tflite", "--precision", "fp16"],
            "--precision and --dynamic-size are for .onnx",
        ),
        (["export", "NET.safetensors", "nowhere/net.onnx"], "cannot write"),
        (["evaluate", "NET.onnx", "--engine", "torch"], "choose the engine onnxruntime"),
        (["evaluate", "NET.onnx", "--engine", "nothing"], "there is no engine 'nothing'"),
        (["evaluate", "NET.onnx", "--precision", "bf16"], "leave out --precision"),
        (["evaluate", "nothing.onnx"], "there is no file"),
        (["bench", "nothing"], "there is no bench 'nothing'"),
        (["bench", "complexity", "--out", "nowhere/c.json"], "cannot write"),
    ],
)
def test_bad_input_is_one_sentence(files, call, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    for path in files:
        (tmp_path / path.name.replace("net", "NET")).write_bytes(path.read_bytes())
    before = sorted(tmp_path.iterdir())
    code, _, err = call(*arguments)
    assert code in (1, 2)
    assert err.startswith("companion: ")
    assert err.count("\n") == 1, err
    assert says in err
    assert sorted(tmp_path.iterdir()) == before


def test_bench_lists_runs_and_compares(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("bench")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == bench.names()
    code, out, err = call("bench", "complexity")
    assert code == 0, err
    assert "written to complexity.json" in out
    record = results.read(tmp_path / "complexity.json")
    row = next(row for row in record.rows if row.keys["network"] == "resnet18")
    assert row.values["parameters"] == 11_689_512
    assert row.values["FLOPs"] == 2 * row.values["MACs"]
    # Counts are the same on every machine: the published ones are right, too.
    assert results.load("complexity").rows == record.rows
    assert "against the published figures" in out
