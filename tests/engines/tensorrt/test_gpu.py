"""On a real GPU: ONNX Runtime's answers, or the library's own refusal of this GPU, which the skip records."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from companion import CompanionError, engines
from companion.engines.tensorrt import library, memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("tensorrt" not in engines.available(), reason="no NVIDIA GPU here, or no TensorRT"),
]


def start(path, **options):
    try:
        return engines.load(path, "tensorrt", **options)
    except CompanionError as error:
        if "compute capability" not in str(error):
            raise
        return pytest.skip(f"recorded: {error}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def images(batch, seed=0):
    return np.random.default_rng(seed).random((batch, 3, 32, 32), dtype=np.float32)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 1e-2), ("fp16", 2e-2)])
@pytest.mark.parametrize("name", ["simple_cnn", "cifar_resnet20"])
def test_answers_are_onnx_runtimes(exported, opened, name, precision, tolerance):
    with start(exported(name).path, precision=precision) as engine:
        assert engine.metadata.labels[0] == "类 0"
        for batch in (1, 7, 16, 2):
            x = images(batch, seed=batch)
            expected = opened(name, "onnxruntime").run({"input": x})["output"]
            found = engine.run({"input": x})["output"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", memory.MEMORIES)
def test_each_memory_gives_the_same_answers_in_threads(exported, opened, name):
    pytest.importorskip({"cuda-python": "cuda.bindings"}.get(name, name), reason="not installed")
    inputs = [images(1 + seed % 16, seed) for seed in range(32)]
    expected = [opened("simple_cnn", "onnxruntime").run({"input": x})["output"] for x in inputs]
    with start(exported("simple_cnn").path, memory=name) as engine, ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda x: engine.run({"input": x})["output"], inputs), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))


def test_what_the_engine_runs_is_told(exported):
    with start(exported("simple_cnn").path) as engine:
        assert engine.kernels()


def test_the_driver_and_torch_know_the_same_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    found = library.gpu()
    assert found.name == torch.cuda.get_device_name(0)
    assert found.capability == torch.cuda.get_device_capability(0)
