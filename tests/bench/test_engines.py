"""The reference run of 2.3.1, on a small network and few rounds."""

from importlib.util import find_spec

import pytest

from companion import engines, metrics, models
from companion.bench import engines as bench
from companion.errors import CompanionError
from companion.metrics import results


@pytest.fixture
def rows(monkeypatch):
    for name, value in {
        "NETWORK": "cifar_resnet14",
        "SECONDS": 0.05,
        "ROUNDS": 6,
        "CALIBRATION": 2,
        "FROM_MEMORY": ("torch", "torch_fused"),
    }.items():
        monkeypatch.setattr(bench, name, value)

    def no_converter(*_):
        raise CompanionError('pip install -e ".[litert-convert]".')

    monkeypatch.setattr(bench.engines, "export_tflite", no_converter)
    return bench._compare()


def test_every_engine_has_a_row_that_says_what_it_computes_in(rows):
    found = {(row.keys["engine"], row.keys["from"]): row for row in rows}
    expected = {("torch", "weights"), ("torch_fused", "weights")}
    expected |= {("onnxruntime", f"{name} .onnx") for name in ("fp32", "fp16", "int8")}
    if find_spec("openvino"):
        expected |= {("openvino", f"{name} .onnx") for name in ("fp32", "int8")}
        expected |= {("openvino, bf16", "fp32 .onnx")}
    assert set(found) == expected
    assert found["torch", "weights"].values["largest error"] == 0
    assert found["torch_fused", "weights"].values["speed-up"] == 1
    assert found["onnxruntime", "int8 .onnx"].keys["computes in"] == "int8"
    for row in rows:
        values = row.values
        assert values["at least"] <= values["speed-up"] <= values["at most"]
        limit = {"fp32": 1e-2 if "fp16" in row.keys["from"] else 1e-4, "fp16": 1e-2, "bf16": 0.1, "int8": 0.5}
        assert values["largest error"] <= limit[row.keys["computes in"]]
        assert values["load in ms"] > 0
        assert values["first call in ms"] > 0
    weights = metrics.model_bytes(models.create("cifar_resnet14", seed=0))
    assert found["torch", "weights"].values["bytes"] == weights
    assert found["onnxruntime", "fp16 .onnx"].values["bytes"] < 0.6 * weights
    results.dumps(results.record("engines", rows))  # they fit together


def test_an_export_that_fails_for_another_reason_is_not_taken_for_a_missing_converter(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise CompanionError("resnet cannot be converted.")

    monkeypatch.setattr(bench.engines, "export_tflite", broken)
    monkeypatch.setattr(bench, "quantize_onnx", lambda *_: None)
    model = models.create("cifar_resnet14", width=4, seed=0)
    with pytest.raises(CompanionError, match="cannot be converted"):
        bench._write(model, tmp_path)
    assert engines.export_tflite is broken
