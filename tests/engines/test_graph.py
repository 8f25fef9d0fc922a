"""What engines make of a graph: counted by hand on a network small enough."""

import numpy as np
import pytest
import torch
from engine_cases import one_sentence
from torch import nn

from companion import CompanionError, engines
from companion.compress import quantize_onnx
from companion.engines import graph

SHAPE = (1, 16, 8, 8)
BLOCK = 4 * 16 * 8 * 8  # bytes of an activation


class Net(nn.Module):
    """Two convolutions of 16 channels, each with a ReLU, the second with a shortcut around it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.a(x).relu()
        return (self.b(x) + x).relu().sigmoid()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("graph") / "net.onnx"
    return engines.export_onnx(Net(), torch.rand(SHAPE), out).path


def test_the_file_has_what_was_written(path):
    found = graph.file_graph(path)
    assert found.operators == {"Conv": 2, "Relu": 2, "Add": 1, "Sigmoid": 1}
    assert list(found.operators) == ["Conv", "Relu", "Add", "Sigmoid"]
    assert found.nodes == 6


def test_onnxruntime_changes_nothing_unless_it_may(path):
    before, found = graph.file_graph(path), graph.onnxruntime_graph(path, "none")
    assert found.operators == before.operators
    assert before.new_in(found) == {}
    assert found.precisions == {"fp32": 2}


def test_onnxruntime_fuses_what_follows_a_convolution(path):
    """ReLUs, and where channels are stored in blocks the addition too; of six nodes less than all are left."""
    before, found = graph.file_graph(path), graph.onnxruntime_graph(path)
    assert "Relu" not in found.operators
    assert found.operators["Sigmoid"] == 1
    assert sum(count for kind, count in found.operators.items() if "Conv" in kind) == 2
    assert found.source == "onnxruntime, all"
    extended = graph.onnxruntime_graph(path, "extended")
    assert before.new_in(extended)["FusedConv"] >= 1
    assert extended.nodes < before.nodes


def test_int8_is_seen_in_the_graph(path, tmp_path):
    batches = [np.random.default_rng(0).random((2, *SHAPE[1:]), dtype=np.float32)]
    quantize_onnx(path, tmp_path / "int8.onnx", batches)
    assert graph.onnxruntime_graph(tmp_path / "int8.onnx").precisions == {"int8": 2}
    assert graph.file_graph(tmp_path / "int8.onnx").operators["QuantizeLinear"] > 0


def test_openvino_tells_the_precision_of_every_layer(path):
    pytest.importorskip("openvino", reason="OpenVINO is an extra")
    found = graph.openvino_graph(path)
    assert found.operators["Convolution"] == 2
    assert sum(found.precisions.values()) == found.nodes
    assert set(found.precisions) == {"fp32"}
    assert found.nodes < graph.file_graph(path).nodes + 3  # layouts are changed before and after, no more


def test_memory_by_hand(path):
    """At most three activations live: the shortcut, the input of the second convolution, its output; at least two."""
    x = np.zeros(SHAPE, np.float32)
    one = graph.onnxruntime_memory(path, {"input": x})
    assert one.needed % BLOCK == 0
    assert 2 <= one.needed // BLOCK <= 3
    assert one.needed <= one.planned <= 2 * one.needed
    four = graph.onnxruntime_memory(path, {"input": np.concatenate([x] * 4)})
    assert four.needed == 4 * one.needed


def test_nothing_is_left_behind(path):
    graph.onnxruntime_graph(path)
    graph.onnxruntime_memory(path, {"input": np.zeros(SHAPE, np.float32)})
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("look", [graph.file_graph, graph.onnxruntime_graph, lambda p: graph.onnxruntime_memory(p, {})])
def test_what_cannot_be_looked_at(look, path, tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 100)
    for each in (tmp_path / "none.onnx", tmp_path / "junk.onnx", tmp_path):
        with pytest.raises(CompanionError) as caught:
            look(each)
        one_sentence(caught)
    with pytest.raises(CompanionError, match="no optimization 'most'"):
        graph.onnxruntime_graph(path, "most")
    with pytest.raises(CompanionError, match="cannot run") as caught:
        graph.onnxruntime_memory(path, {"input": np.zeros((1, 3, 8, 8), np.float32)})
    one_sentence(caught)
