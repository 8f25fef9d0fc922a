"""The network for texts by every engine: one answer, at any number and length of texts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from companion import CompanionError, compress, engines, models

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import ENGINES, FROM_FILES

VOCABULARY = ("<padding>", "<unknown>", *(f"词{n}" for n in range(98)))


@pytest.fixture(scope="module")
def network():
    return models.create("text_classifier", vocabulary=VOCABULARY, labels=["甲", "b", "c", "d"], seed=0).eval()


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts") / "t.onnx"
    written = engines.export_onnx(network, engines.example_for(network), out)
    assert written.batches == (1, 7)
    return out


def texts(batch, length, seed=0):
    """Ids of texts of 0 to ``length`` words, padded."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, 100, (batch, length))
    ids[np.arange(length) >= random.integers(0, length + 1, (batch, 1))] = 0
    return ids


def test_the_example_is_a_text_with_padding(network):
    example = engines.example_for(network)
    assert (example.shape, example.dtype) == ((1, 16), torch.int64)
    assert example[0, -1] == 0
    assert example[0, :-1].min() >= 1
    assert example.max() < 100
    assert torch.equal(example, engines.example_for(network))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_with_torch(network, path, engine):
    with engines.load(path if engine in FROM_FILES else network, engine) as runs:
        assert runs.inputs == (engines.TensorInfo("input", "int64", (None, None)),)
        assert runs.outputs == (engines.TensorInfo("output", "float32", (None, 4)),)
        assert runs.metadata.vocabulary == VOCABULARY
        assert runs.metadata.labels == ("甲", "b", "c", "d")
        assert (runs.metadata.task, runs.metadata.input_size) == ("text", None)
        for batch, length in ((1, 1), (1, 16), (5, 40), (32, 7), (3, 500)):
            ids = texts(batch, length)
            found = torch.from_numpy(runs.run({"input": ids})["output"])
            expected = network(torch.from_numpy(ids))
            torch.testing.assert_close(found.softmax(1), expected.softmax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_alone_and_in_a_batch(path, network, engine):
    with engines.load(path if engine in FROM_FILES else network, engine) as runs:
        ids = texts(20, 30)
        together = torch.from_numpy(runs.run({"input": ids})["output"]).softmax(1)
        for row, expected in zip(ids, together, strict=True):
            alone = row[None, : max(1, np.count_nonzero(row))]
            found = torch.from_numpy(runs.run({"input": alone})["output"]).softmax(1)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_id_that_is_no_word_is_refused(network):
    with (
        engines.load(network, "torch") as runs,
        pytest.raises(CompanionError, match="torch cannot run on these inputs: index out of range"),
    ):
        runs.run({"input": np.array([[100]])})


def test_int8_keeps_the_answers_and_stores_the_table_in_a_quarter(network, path, tmp_path):
    batches = [texts(32, 900, seed) for seed in range(4)] + [texts(32, 8, seed) for seed in range(4)]
    done = compress.quantize_onnx(path, tmp_path / "q.onnx", batches)
    assert (done.layers, done.layers_before) == (2, 2)
    import onnx

    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer}
    eight_bits = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    assert [list(t.dims) for t in tensors.values() if t.data_type in eight_bits and list(t.dims) == [100, 64]]
    with engines.load(tmp_path / "q.onnx") as runs:
        assert runs.metadata.vocabulary == VOCABULARY
        for length in (3, 900):
            ids = texts(50, length, seed=9)
            found = torch.from_numpy(runs.run({"input": ids})["output"]).softmax(1)
            torch.testing.assert_close(found, network(torch.from_numpy(ids)).softmax(1), rtol=0, atol=0.01)
