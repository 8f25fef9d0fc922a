"""LiteRT: the shipped file gives torch's answers at any batch, damaged ones a sentence; conversion if it can be had."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from engine_cases import one_sentence, torch_answer

from companion import CompanionError, datasets, engines, files, models, train

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is an extra")
from companion.engines import litert

CONVERTER = pytest.mark.skipif(find_spec("litert_torch") is None, reason="the converter litert-torch is an extra")
PATH = files.shipped("weights/cifar_resnet14_hard_digits.tflite")


def images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    return models.pretrained("cifar_resnet14_hard_digits")


@pytest.fixture
def engine():
    with engines.load(PATH, "litert") as engine:
        yield engine


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_answers_are_torchs(batch, model, engine):
    x = images(batch, 3, 32, 32, seed=batch)
    expected = torch_answer(model, torch.from_numpy(x)).numpy()
    answer = engine.run({"input": x})["output"]
    assert answer.dtype == np.float32
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-4)


def test_the_file_says_what_it_is(model, engine):
    info = models.describe(model)
    assert repr(engine) == "<litert engine: input float32 [N, 3, 32, 32] → output float32 [N, 10]>"
    assert engine.metadata == engines.Metadata(
        model=info.name,
        configuration=info.configuration,
        task="classify",
        labels=info.labels,
        input_size=(3, 32, 32),
        mean=info.configuration["mean"],
        std=info.configuration["std"],
    )
    assert engine.precision == "fp32"


def test_it_is_judged_as_networks_are(model, engine):
    data = torch.utils.data.Subset(datasets.load("hard_digits", split="test"), range(200))
    data.labels = data.dataset.labels
    found, expected = (train.evaluate(each, data, progress=False) for each in (engines.as_module(engine), model))
    assert found.metrics == expected.metrics
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_batches_in_any_order_on_few_interpreters(engine, monkeypatch):
    made = []
    interpreter = litert.Interpreter
    monkeypatch.setattr(litert, "Interpreter", lambda **options: made.append(1) or interpreter(**options))
    expected = {n: engine.run({"input": images(n, 3, 32, 32)})["output"] for n in (1, 2, 3)}
    for n in (3, 1, 2, 1, 3):
        assert np.array_equal(engine.run({"input": images(n, 3, 32, 32)})["output"], expected[n])
    assert len(made) == 3
    for n in (4, 5, 6, 7):
        engine.run({"input": images(n, 3, 32, 32)})
    assert engine._at.cache_info().currsize == litert.KEPT


def test_answers_are_the_callers_own(engine):
    x = images(2, 3, 32, 32)
    x.flags.writeable = False
    first = engine.run({"input": x})["output"]
    kept = first.copy()
    engine.run({"input": 1 - x})
    assert np.array_equal(first, kept)
    first[:] = 0
    assert np.array_equal(engine.run({"input": np.asfortranarray(x)})["output"], kept)


def test_four_threads_at_once(engine):
    batches = [images(1 + i % 3, 3, 32, 32, seed=i) for i in range(24)]
    expected = [engine.run({"input": x})["output"] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: engine.run({"input": x})["output"], batches))
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


def test_closed_by_another_thread_while_it_runs(engine, monkeypatch):
    check = engine._check

    def slow(inputs):
        closer = threading.Thread(target=engine.close)
        closer.start()
        closer.join()
        return check(inputs)

    monkeypatch.setattr(engine, "_check", slow)
    for _ in range(2):
        with pytest.raises(CompanionError, match=r"^this litert engine is closed: load it again.$"):
            engine.run({"input": images(2, 3, 32, 32)})


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (images(2, 3, 32, 31), r"must have the shape \[N, 3, 32, 32\], not \[2, 3, 32, 31\]"),
        (images(2, 32, 32, 3), r"not \[2, 32, 32, 3\]"),
        (images(0, 3, 32, 32), "is empty"),
        (images(2, 3, 32, 32).astype(np.float64), "must be float32, not float64"),
        ([1.0], "must be a NumPy array, not list"),
    ],
)
def test_bad_input(array, says, engine):
    with pytest.raises(CompanionError, match=says) as caught:
        engine.run({"input": array})
    one_sentence(caught)


def refused(says, *arguments, **options):
    with pytest.raises(CompanionError, match=says) as caught:
        engines.load(*arguments, **options)
    one_sentence(caught)


def test_what_it_does_not_run(exported):
    found = exported("simple_cnn")
    convert = "convert the network with engines.export_tflite first"
    refused(f"litert runs .tflite files, not .*simple_cnn.onnx: {convert}", found.path, "litert")
    refused(f"litert runs .tflite files, not networks: {convert}", found.model, "litert")
    refused("onnxruntime runs .onnx files and networks and .safetensors files, not .*: choose the engine litert", PATH)
    refused("the engine litert has no option 'precision'", PATH, "litert", precision="fp16")


def test_damaged_files_are_one_sentence_each(tmp_path):
    """In a process of its own: what reads them is C++. Cut anywhere, with bytes overwritten, or something else."""
    program = """
import random, sys
from pathlib import Path
import numpy as np
from companion import CompanionError, engines
content, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
damaged = [content[: len(content) * share // 20] for share in range(20)] + [b"junk" * 100, b"PK\\3\\4 a zip"]
rng = random.Random(0)
for _ in range(60):
    other = bytearray(content)
    for _ in range(8):  # the graph stands at either end, the weights between
        place = rng.randrange(8000)
        other[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
    damaged.append(bytes(other))
refused = 0
for each in damaged:
    path.write_bytes(each)
    try:
        with engines.load(path, "litert") as engine:
            engine.run({info.name: np.ones([n or 1 for n in info.shape], info.dtype) for info in engine.inputs})
    except CompanionError as error:
        assert "\\n" not in str(error), str(error)
        refused += 1
print(refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, PATH, tmp_path / "net.tflite"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 30 <= int(done.stdout) <= 82


def rewritten(change):
    """The shipped file, changed as an object."""
    from ai_edge_litert.tools import flatbuffer_utils

    network = flatbuffer_utils.read_model_from_bytearray(bytearray(PATH.read_bytes()))
    change(network)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(network))


def test_a_description_that_lies_outside_the_file(tmp_path):
    def astray(network):
        for entry in network.metadata:
            entry.buffer = 10**6

    (tmp_path / "net.tflite").write_bytes(rewritten(astray))
    with pytest.raises(CompanionError, match=r"its description is damaged|is not a \.tflite file") as error:
        engines.load(tmp_path / "net.tflite", "litert")
    assert "\n" not in str(error.value)


def test_a_file_of_others(tmp_path, engine):
    """Without our description, and with a batch that is fixed."""

    def anonymous(network):
        network.metadata = [entry for entry in network.metadata if entry.name != b"companion"]
        for tensor in network.subgraphs[0].tensors:
            tensor.shapeSignature = None

    (tmp_path / "net.tflite").write_bytes(rewritten(anonymous))
    x = images(1, 3, 32, 32)
    with engines.load(tmp_path / "net.tflite", "litert") as other:
        assert other.metadata == engines.Metadata()
        assert other.inputs[0].shape == (1, 3, 32, 32)
        assert np.array_equal(other.run({"input": x})["output"], engine.run({"input": x})["output"])
        with pytest.raises(CompanionError, match=r"the shape \[1, 3, 32, 32\], not \[2, 3, 32, 32\]"):
            other.run({"input": images(2, 3, 32, 32)})


@pytest.mark.parametrize("text", [b"[", b"[" * 100_000, b'{"companion": 1}', b'["a"]', b'{"companion": "2"}', b"\xff"])
def test_forged_descriptions(text, tmp_path):
    def forge(network):
        (entry,) = (entry for entry in network.metadata if entry.name == b"companion")
        network.buffers[entry.buffer].data = np.frombuffer(text, np.uint8)

    (tmp_path / "net.tflite").write_bytes(rewritten(forge))
    refused("net.tflite cannot be used: its description", tmp_path / "net.tflite", "litert")


# Conversion.


def test_without_the_converter(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(CompanionError, match="needs the converter litert-torch") as caught:
        engines.export_tflite(model, engines.example_for(model), tmp_path / "net.tflite")
    assert 'pip install -e ".[litert-convert]"' in one_sentence(caught)
    with pytest.raises(CompanionError, match=r"must end in \.tflite"):
        engines.export_tflite(model, engines.example_for(model), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@CONVERTER
@pytest.mark.filterwarnings("ignore")  # of JAX and the converter, about each other
def test_the_shipped_file_is_made_again(model, tmp_path):
    written = engines.export_tflite(model, engines.example_for(model), tmp_path / "net.tflite")
    assert written.path.read_bytes() == PATH.read_bytes()
    assert written.batches == (1, 7)
    assert written.largest_difference < 1e-5


@CONVERTER
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_fixes_its_batch_takes_one_sample(tmp_path):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(12, 4)

        def forward(self, x, y):
            return (self.fc(x.flatten(1)) + y).view(-1, 2, 2), y - 1

    torch.manual_seed(0)
    net = Flat()
    example = torch.rand(2, 3, 2, 2), torch.rand(2, 4)
    written = engines.export_tflite(net, example, tmp_path / "net.tflite", task="classify")
    assert written.batches == (1,)
    with engines.load(tmp_path / "net.tflite", "litert") as engine:
        assert [info.shape for info in engine.inputs] == [(1, 3, 2, 2), (1, 4)]
        x, y = images(1, 3, 2, 2), images(1, 4)
        found = engine.run({"input_0": x, "input_1": y})
        expected = torch_answer(net, torch.from_numpy(x), torch.from_numpy(y))
        for name, tensor in zip(("output_0", "output_1"), expected, strict=True):
            np.testing.assert_allclose(found[name], tensor.numpy(), atol=1e-5)


@CONVERTER
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_cannot_be_converted(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(CompanionError, match="Odd cannot be converted to LiteRT"):
        engines.export_tflite(Odd(), torch.rand(1, 3, 3), tmp_path / "net.tflite")
    assert not list(tmp_path.iterdir())
