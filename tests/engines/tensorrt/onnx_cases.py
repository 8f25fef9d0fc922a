"""Small ONNX files, right and wrong, for building."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def graph(path, nodes, inputs, outputs, weights=()):
    """Write an ONNX file of these nodes; inputs and outputs are (name, type, shape)."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("me", 1)]
    path.write_bytes(helper.make_model(made, opset_imports=opsets, ir_version=9).SerializeToString())
    return path


def write_all(folder, simple_cnn):
    """Each wrong file, by name."""
    x, y = ("x", TensorProto.FLOAT, [2, 3]), ("y", TensorProto.FLOAT, [2, 3])
    cast = helper.make_node("Cast", ["x"], ["half"], name="to_half", to=TensorProto.FLOAT16)
    suppress = helper.make_node("NonMaxSuppression", ["b", "s", "most", "iou", "score"], ["y"], name="suppress")
    limits = [("most", np.array([9])), ("iou", np.array([0.5], "f4")), ("score", np.array([0.2], "f4"))]
    boxes = [("b", TensorProto.FLOAT, [1, 50, 4]), ("s", TensorProto.FLOAT, [1, 2, 50])]
    images = ("x", TensorProto.FLOAT, ["n", 3, "h", "w"])
    wrong = {
        "own": ([helper.make_node("Foo", ["x"], ["y"], "my_foo", domain="me")], [x], [y]),
        "random": ([helper.make_node("Bernoulli", ["x"], ["y"], "dice")], [x], [y]),
        "mixed": ([cast, helper.make_node("Add", ["x", "half"], ["y"], "sum")], [x], [y]),
        "nms": ([suppress], boxes, [("y", TensorProto.INT64, ["n", 3])], limits),
        "any_size": ([helper.make_node("Relu", ["x"], ["y"])], [images], [("y", *images[1:])]),
        "fixed": ([helper.make_node("Relu", ["x"], ["y"])], [x], [y]),
    }
    files = {name: graph(folder / f"{name}.onnx", *parts) for name, parts in wrong.items()}
    for name in ("apart", "lost"):
        (folder / name).mkdir()
        files[name] = folder / name / f"{name}.onnx"
        whole = onnx.load(simple_cnn)  # anew, as saving it changes it
        onnx.save_model(whole, files[name], save_as_external_data=True, location=f"{name}.data", size_threshold=0)
    (folder / "lost" / "lost.data").unlink()
    files["cut"] = folder / "cut.onnx"
    files["cut"].write_bytes(simple_cnn.read_bytes()[:-1000])
    return files
