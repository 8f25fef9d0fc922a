"""ONNX files made here by hand, counted by hand; tests/cli/test_measuring.py counts the exporter's."""

import onnx
import pytest
from onnx import TensorProto, helper

from companion import CompanionError, metrics

FLOAT = TensorProto.FLOAT


def value(name, *shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, list(shape))


def weights(name, *shape, kind=FLOAT):
    size = 1
    for dimension in shape:
        size *= dimension
    return helper.make_tensor(name, kind, list(shape), [1] * size)


def write(path, nodes, inputs, outputs, stored, domains=("",)):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    opset = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in domains]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.fixture
def network(tmp_path):
    """Convolution of 4 groups, ReLU, transposed convolution, flatten, Gemm."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", group=4, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("ConvTranspose", ["b", "t"], ["c"], "up", strides=[2, 2]),
        helper.make_node("Flatten", ["c"], ["d"], "flat"),
        helper.make_node("Gemm", ["d", "m", "bias"], ["y"], "head", transB=1),
    ]
    stored = [weights("w", 8, 1, 3, 3), weights("t", 8, 2, 2, 2), weights("m", 10, 2 * 64), weights("bias", 10)]
    return write(tmp_path / "net.onnx", nodes, [value("x", "n", 4, 4, 4)], [value("y", "n", 10)], stored)


def test_macs_bytes_and_peak_by_hand(network):
    found = metrics.count_onnx(network, {"x": (3, 4, 4, 4)})
    counted = found.complexity
    macs = {"conv": 3 * 8 * 16 * 9, "relu": 0, "up": 3 * 8 * 16 * 2 * 4, "flat": 0, "head": 3 * 10 * 128}
    assert {name: cost.macs for name, cost in counted.by_module.items()} == macs
    assert counted.macs == sum(macs.values())
    assert counted.parameters == 72 + 64 + 1280 + 10
    image, maps, large, scores = 3 * 64, 3 * 128, 3 * 128, 30
    moved = 4 * (image + 72 + maps + 2 * maps + maps + 64 + large + large + 1290 + scores)
    assert counted.bytes_moved == moved
    assert next(iter(counted.by_operator)) == "Gemm"
    # The widest moment: a ReLU's input and output; or the flat copy beside its source, as the file says.
    assert found.activation_bytes == 4 * 2 * maps
    assert counted.uncounted == ()


def test_products_and_their_integer_forms(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    path = write(tmp_path / "m", nodes, [value("x", 2, 5, 6)], [value("y", 2, 5, 7)], [weights("w", 6, 7)])
    assert metrics.count_onnx(path, {"x": (2, 5, 6)}).complexity.macs == 2 * 5 * 6 * 7
    nodes = [helper.make_node("ConvInteger", ["x", "w"], ["y"])]
    stored = [weights("w", 4, 3, 3, 3, kind=TensorProto.INT8)]
    path = write(
        tmp_path / "c", nodes, [value("x", 1, 3, 5, 5, kind=TensorProto.UINT8)],
        [value("y", 1, 4, 3, 3, kind=TensorProto.INT32)], stored,
    )  # fmt: skip
    found = metrics.count_onnx(path, {"x": (1, 3, 5, 5)}).complexity
    assert (found.macs, found.parameters, found.bytes_moved) == (36 * 27, 108, 75 + 108 + 4 * 36)


def test_a_tensor_that_is_read_late_stays_alive(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    path = write(tmp_path / "f", nodes, [value("x", 10)], [value("y", 10)], [])
    assert metrics.count_onnx(path, {"x": (10,)}).activation_bytes == 3 * 40


def test_what_cannot_be_counted_is_named(tmp_path):
    nodes = [
        helper.make_node("Einsum", ["x", "x"], ["a"], "sum", equation="ij,jk->ik"),
        helper.make_node("Magic", ["a"], ["y"], "own", domain="com.example"),
    ]
    path = write(tmp_path / "f", nodes, [value("x", 3, 3)], [value("y", 3, 3)], [], domains=("", "com.example"))
    found = metrics.count_onnx(path, {"x": (3, 3)}).complexity
    assert found.uncounted == ("sum: Einsum", "own: com.example::Magic")
    assert found.macs == 0


def test_bad_input_is_one_sentence(network, tmp_path):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model")
    for path, shapes, message in [
        (network, {"x": (3, 5, 4, 4)}, r"input x has shape \(n, 4, 4, 4\), which \(3, 5, 4, 4\) does not fit"),
        (network, {"x": (3, 4)}, "does not fit"),
        (network, {"x": (0, 4, 4, 4)}, "does not fit"),
        (network, {"z": (3, 4, 4, 4)}, "the inputs are x; shapes were given for z"),
        (junk, {"x": (1,)}, "cannot be counted as an ONNX file"),
        (tmp_path / "none.onnx", {"x": (1,)}, "there is no file"),
    ]:
        with pytest.raises(CompanionError, match=message) as error:
            metrics.count_onnx(path, shapes)
        assert "\n" not in str(error.value)


def test_a_shape_that_depends_on_values_is_named(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], "where"),
        helper.make_node("Cast", ["a"], ["b"], "cast", to=FLOAT),
        helper.make_node("MatMul", ["w", "b"], ["y"], "product"),
    ]
    path = write(tmp_path / "f", nodes, [value("x", 3)], [value("y", 2, "k")], [weights("w", 2, 1)])
    found = metrics.count_onnx(path, {"x": (3,)}).complexity
    assert found.uncounted == ("where: NonZero", "cast: Cast", "product: MatMul")


def test_nodes_of_one_name_are_added_up(tmp_path):
    nodes = [helper.make_node("MatMul", [a, "w"], [b], "same") for a, b in (("x", "h"), ("h", "y"))]
    path = write(tmp_path / "f", nodes, [value("x", 3, 4)], [value("y", 3, 4)], [weights("w", 4, 4)])
    found = metrics.count_onnx(path, {"x": (3, 4)}).complexity
    assert found.macs == found.by_module["same"].macs == 2 * 3 * 16


def test_weights_that_are_unpacked_are_weights(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], "unpack"),
        helper.make_node("Constant", [], ["c"], "bias", value=weights("", 5)),
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Add", ["p", "c"], ["y"], "sum"),
    ]
    stored = [weights("q", 4, 5, kind=TensorProto.INT8), weights("scale")]
    path = write(tmp_path / "f", nodes, [value("x", 3, 4)], [value("y", 3, 5)], stored)
    found = metrics.count_onnx(path, {"x": (3, 4)})
    assert found.complexity.parameters == 20 + 1 + 5
    assert found.complexity.macs == 3 * 4 * 5
    assert found.activation_bytes == 4 * 2 * 15  # the product and the sum; neither weights nor the constant
    assert found.complexity.uncounted == ()


def test_a_look_up_reads_what_it_gives(tmp_path):
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"], "embedding")]
    ids = value("x", 2, 3, kind=TensorProto.INT64)
    path = write(tmp_path / "f", nodes, [ids], [value("y", 2, 3, 8)], [weights("table", 1000, 8)])
    assert metrics.count_onnx(path, {"x": (2, 3)}).complexity.bytes_moved == 2 * 4 * 48 + 6 * 8
