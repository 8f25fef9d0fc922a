"""Every engine, one contract: torch's answers, and one sentence for whatever cannot be run."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from engine_cases import ENGINES, NETWORKS, Does, lively, one_sentence, start, torch_answer
from onnx import TensorProto, helper

from companion import CompanionError, datasets, engines, metrics, models, train


def images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.fixture(params=ENGINES)
def cnn(request, opened):
    return opened("simple_cnn", request.param)


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_torchs(name, engine, batch, exported, opened):
    found = exported(name)
    x = images(batch, *found.example.shape[1:], seed=batch)
    expected = torch_answer(found.model, torch.from_numpy(x)).numpy()
    answer = opened(name, engine).run({"input": x})["output"]
    assert answer.dtype == np.float32
    assert answer.shape == expected.shape
    scale = max(1.0, np.abs(expected).max())  # the U-Net's scores reach 17
    assert np.ptp(expected) > 0.01  # or the comparison would prove little
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-4 * scale)


def test_what_goes_in_and_out_is_described(cnn):
    assert cnn.inputs == (engines.TensorInfo("input", "float32", (None, 3, 32, 32)),)
    assert cnn.outputs == (engines.TensorInfo("output", "float32", (None, 10)),)
    assert repr(cnn) == f"<{cnn.name} engine: input float32 [N, 3, 32, 32] → output float32 [N, 10]>"


@pytest.mark.parametrize("engine", ["torch", "torch_fused"])
def test_networks_that_take_any_size_say_so_and_do(engine, exported):
    model = exported("unet").model
    with engines.load(model, engine) as unet:
        assert unet.inputs[0].shape == (None, 3, None, None)
        assert unet.outputs[0].shape == (None, 11, None, None)
        x = images(2, 3, 40, 56)
        expected = torch_answer(model, torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(unet.run({"input": x})["output"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        np.asfortranarray,
        lambda x: x[::-1],
        lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    ],
    ids=["fortran", "reversed", "strided", "channels-last"],
)
def test_any_memory_layout_gives_the_same_answers(cnn, layout):
    x = layout(images(3, 3, 32, 32))
    expected = cnn.run({"input": np.ascontiguousarray(x)})["output"]
    assert np.array_equal(cnn.run({"input": x})["output"], expected)


def test_inputs_may_be_read_only_and_are_not_changed(cnn):
    x = images(2, 3, 32, 32)
    before = x.copy()
    x.flags.writeable = False
    cnn.run({"input": x})
    assert np.array_equal(x, before)


def test_answers_are_the_callers_own(cnn):
    x = images(2, 3, 32, 32)
    first = cnn.run({"input": x})["output"]
    kept = first.copy()
    cnn.run({"input": 1 - x})
    assert np.array_equal(first, kept)
    first[:] = 0
    assert np.array_equal(cnn.run({"input": x})["output"], kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_networks_that_overwrite_their_input(engine):
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2))
    example = torch.full((2, 4), -1.0)
    with engines.load(model, engine, example=example) as network:
        a = np.full((1, 4), -1, np.float32)
        answer = network.run({"input": a})["output"]
        np.testing.assert_allclose(answer, model[1].bias.detach()[None], atol=1e-6)
    assert (a == -1).all()
    assert (example == -1).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_share_no_memory(engine):
    x = images(2, 4)
    with engines.load(Does(lambda x: (x, x.view(-1, 2, 2), x[:, 1:])), engine, example=torch.rand(2, 4)) as network:
        arrays = [x, *network.run({"input": x}).values()]
    assert not any(np.shares_memory(a, b) for a in arrays for b in arrays if a is not b)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_of_different_lengths_are_not_broadcast(engine):
    with engines.load(Does(lambda a, b: a + b), engine, example=(torch.rand(2, 4), torch.rand(2, 4))) as network:
        with pytest.raises(CompanionError, match=r"same number of samples, not input_0 \[5, 4\], input_1") as caught:
            network.run({"input_0": images(5, 4), "input_1": images(1, 4)})
        one_sentence(caught)
        assert network.run({"input_0": images(5, 4), "input_1": images(5, 4)})["output"].shape == (5, 4)


@pytest.mark.parametrize("engine", ENGINES)
def test_four_threads_at_once(engine, opened):
    network = opened("cifar_resnet20", engine)
    batches = [images(1 + i % 5, 3, 32, 32, seed=i) for i in range(24)]
    expected = [network.run({"input": x})["output"] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: network.run({"input": x})["output"], batches))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_closed_by_another_thread_while_it_runs(engine, exported, monkeypatch):
    """Between the check and the run, where it is worst."""
    with start(exported("simple_cnn"), engine) as network:
        check = network._check

        def slow(inputs):
            closer = threading.Thread(target=network.close)
            closer.start()
            closer.join()
            return check(inputs)

        monkeypatch.setattr(network, "_check", slow)
        with pytest.raises(CompanionError, match=f"^this {engine} engine is closed: load it again.$"):
            network.run({"input": GOOD})


GOOD = images(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "the input 'input' is missing: this network takes input"),
        ({"image": GOOD}, "there is no input 'image': this network takes input"),
        ({"input": GOOD, "more": GOOD}, "there is no input 'more'"),
        ({"input": GOOD.astype(np.float64)}, "must be float32, not float64"),
        ({"input": (255 * GOOD).astype(np.uint8)}, "must be float32, not uint8"),
        ({"input": GOOD.astype(">f4")}, "must be float32, not >f4"),
        ({"input": GOOD[0]}, r"must have the shape \[N, 3, 32, 32\], not \[3, 32, 32\]"),
        ({"input": GOOD[:, :1]}, r"not \[2, 1, 32, 32\]"),
        ({"input": GOOD.transpose(0, 2, 3, 1)}, r"not \[2, 32, 32, 3\]"),
        ({"input": GOOD[..., :31]}, r"not \[2, 3, 32, 31\]"),
        ({"input": GOOD[:0]}, "is empty"),
        ({"input": GOOD.tolist()}, "must be a NumPy array, not list"),
        ({"input": torch.from_numpy(GOOD)}, "must be a NumPy array, not Tensor"),
        ({"input": None}, "must be a NumPy array, not NoneType"),
        (GOOD, "a dict of arrays by input name, not ndarray"),
    ],
)
def test_bad_input_is_one_sentence(cnn, inputs, says):
    with pytest.raises(CompanionError, match=says) as caught:
        cnn.run(inputs)
    one_sentence(caught)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closed_engine_says_so(engine, exported):
    with start(exported("simple_cnn"), engine) as cnn:
        cnn.run({"input": GOOD})
    cnn.close()
    with pytest.raises(CompanionError, match=f"this {engine} engine is closed: load it again") as caught:
        cnn.run({"input": GOOD})
    one_sentence(caught)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_do_not_disturb_each_other_or_the_network(engine, exported):
    found = exported("simple_cnn")
    with start(found, engine) as first, start(found, engine) as second:
        expected = first.run({"input": GOOD})["output"]
        assert np.array_equal(second.run({"input": GOOD})["output"], expected)
        first.close()
        assert np.array_equal(second.run({"input": GOOD})["output"], expected)


@pytest.mark.parametrize("engine", ["torch", "torch_fused"])
def test_the_callers_network_is_left_alone(engine):
    model = lively(models.create("cifar_resnet14", width=4, seed=0))
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    strides = {key: value.stride() for key, value in model.state_dict().items()}
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    threads = torch.get_num_threads()
    with engines.load(model, engine, threads=threads + 1) as copy:
        before = copy.run({"input": GOOD})["output"]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert {key: value.stride() for key, value in model.state_dict().items()} == strides
        assert all(torch.equal(p.grad, gradients[key]) for key, p in model.named_parameters())
        assert all(module.training for module in model.modules())
        assert torch.get_num_threads() == threads
        with torch.no_grad():  # nor is the engine disturbed by what happens to the network later
            model.fc.weight.zero_()
        assert np.array_equal(copy.run({"input": GOOD})["output"], before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weights_file_runs_on_every_engine(engine, exported, tmp_path):
    found = exported("simple_cnn")
    models.save(found.model, tmp_path / "net.safetensors")
    with engines.load(tmp_path / "net.safetensors", engine) as cnn:
        expected = torch_answer(found.model, torch.from_numpy(GOOD)).numpy()
        np.testing.assert_allclose(cnn.run({"input": GOOD})["output"], expected, rtol=0, atol=1e-4)
        assert cnn.metadata.labels == models.describe(found.model).labels


class Words(torch.nn.Module):
    """Several inputs, whole numbers among them; several outputs, one in another."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, ids, mask):
        mean = (self.embedding(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        scores = self.linear(mean)
        return {"scores": scores, "more": (mean, scores.argmax(1))}


IDS, MASK = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0)), torch.ones(2, 7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("example", "names"),
    [((IDS, MASK), ["input_0", "input_1"]), ({"mask": MASK, "ids": IDS}, ["mask", "ids"])],
    ids=["tuple", "dict"],
)
def test_several_inputs_and_outputs_by_name(engine, example, names):
    model = Words()
    with engines.load(model, engine, example=example) as words:
        assert [info.name for info in words.inputs] == names
        assert {info.dtype for info in words.inputs} == {"int64", "float32"}
        described = [(info.name, info.dtype, info.shape) for info in words.outputs]
        assert described == [
            ("scores", "float32", (None, 3)),
            ("more_0", "float32", (None, 8)),
            ("more_1", "int64", (None,)),
        ]
        ids, mask = torch.arange(35).view(5, 7), torch.linspace(0.1, 1, 35).view(5, 7)
        given = {"int64": ids, "float32": mask}
        answers = words.run({info.name: given[info.dtype].numpy() for info in words.inputs})
        expected = torch_answer(model, ids, mask)
        np.testing.assert_allclose(answers["scores"], expected["scores"].numpy(), atol=1e-5)
        np.testing.assert_allclose(answers["more_0"], expected["more"][0].numpy(), atol=1e-5)
        assert np.array_equal(answers["more_1"], expected["more"][1].numpy())
        # What only the network can know is one sentence too, but for OpenVINO, which takes any index for good.
        if engine == "openvino":
            return
        with pytest.raises(CompanionError, match=f"{engine} cannot run on these inputs") as caught:
            words.run({info.name: given[info.dtype].numpy() + 99 for info in words.inputs})
        assert "Name:" not in one_sentence(caught)


# What is loaded.


def refused(says, *arguments, **options):
    with pytest.raises(CompanionError, match=says) as caught:
        engines.load(*arguments, **options)
    one_sentence(caught)


def test_available_engines():
    assert set(engines.available()) >= {*ENGINES, "torch_compile"}
    for name, module in (("openvino", "openvino"), ("litert", "ai_edge_litert")):
        assert (name in engines.available()) == (find_spec(module) is not None)


def test_an_engine_that_is_not_installed(monkeypatch, exported):
    path = exported("simple_cnn").path
    for name in ("onnxruntime", "openvino", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert not {"onnxruntime", "openvino", "litert"} & set(engines.available())
    assert {"torch", "torch_fused", "torch_compile"} <= set(engines.available())
    refused("the engine onnxruntime needs onnxruntime, which does not work here: pip install onnxruntime.", path)
    refused(r'openvino needs openvino, .*: pip install -c constraints.txt -e ".\[openvino\]".', path, "openvino")


def test_importing_the_room_loads_no_engine_but_torch():
    heavy = {"onnx", "onnxscript", "onnxruntime", "openvino", "ai_edge_litert", "litert_torch"}
    code = f"import companion.engines, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_wrong_names_and_options(exported, tmp_path):
    path, model = exported("simple_cnn").path, exported("simple_cnn").model
    refused("no engine 'tensorflow': choose one of onnxruntime, openvino, litert, torch", path, "tensorflow")
    refused("the engine onnxruntime has no option 'batch' here: it takes optimization, provider", path, batch=1)
    refused("no option 'example'", path, example=GOOD)
    refused("the engine torch has no option 'provider' here: it takes device, example", model, "torch", provider="cpu")
    for threads in (0, -1, 1.5, True, "1"):
        refused("threads is .*: give a whole number from 1", path, threads=threads)
    refused("no engine .'torch'.: choose one of", path, ["torch"])
    refused("load takes the name of a file or a network .*, not None", None)
    refused("no provider 'quantum', only .*cpu", path, provider="quantum")
    refused("no provider None, only .*cpu", path, provider=None)
    refused("no optimization .*: choose one of none", path, optimization=[])
    refused("networks on the device meta have no values", model, "torch", device="meta")
    refused("no optimization 'most': choose one of none, basic, extended, all", path, optimization="most")
    refused("there is no device 'abacus' here", model, "torch", device="abacus")
    advice = "choose the engine onnxruntime or openvino"
    refused(f"torch runs networks and .safetensors files, not .*simple_cnn.onnx: {advice}", path, "torch")
    refused("is a folder", tmp_path)
    refused("there is no file", tmp_path / "none.onnx")
    (tmp_path / "net.pt").write_bytes(b"x")
    refused("its name must end in .onnx, .tflite, .engine or .safetensors", tmp_path / "net.pt")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_is_not_ours_needs_an_example(engine):
    refused("Linear does not say what it takes: give an example", torch.nn.Linear(2, 3), engine)
    refused("Linear does not run on", torch.nn.Linear(2, 3), engine, example=torch.rand(1, 5))
    refused("at least one sample", torch.nn.Linear(2, 3), engine, example=torch.rand(0, 2))
    refused("same number of samples", Words(), engine, example=(IDS, MASK[:1]))
    refused("the example is on the device meta", torch.nn.Linear(2, 3), engine, example=torch.rand(1, 2, device="meta"))


@pytest.mark.parametrize("engine", ["torch", "torch_fused"])
def test_outputs_that_depend_on_the_batch(engine):
    x = torch.rand(2, 1, 3)
    refused(r"output of the network has the shape \[3\] for one sample and", Does(torch.squeeze), engine, example=x)
    names = Does(lambda x: {"one" if len(x) == 1 else "more": x})
    refused("returns one for one sample and more for two", names, engine, example=x)
    refused("the network has no output", Does(lambda x: []), engine, example=x)


def test_too_little_memory_is_no_missing_device(monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(torch.nn.Linear, "to", full)
    refused(
        "Linear cannot be moved to cpu: CUDA out of memory", torch.nn.Linear(2, 3), "torch", example=torch.rand(1, 2)
    )


@pytest.mark.parametrize("optimization", ["none", "basic", "extended"])
def test_optimizations_do_not_change_the_answers(optimization, exported, opened):
    found = exported("unet")
    with engines.load(found.path, optimization=optimization, provider="CPUExecutionProvider") as unet:
        x = images(*found.example.shape)
        answers = (engine.run({"input": x})["output"] for engine in (unet, opened("unet", "onnxruntime")))
        np.testing.assert_allclose(*answers, rtol=0, atol=1e-4)


@pytest.mark.stress
def test_compiled_by_torch(exported):
    """A minute or so: the first call writes C++ and compiles it, and the first of another size once more."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    lively(model, 8)
    with engines.load(model, "torch_compile", example=torch.rand(2, 3, 8, 8)) as network:
        assert repr(network) == "<torch_compile engine: input float32 [N, 3, 8, 8] → output float32 [N, 4, 6, 6]>"
        for batch in (1, 3):
            x = images(batch, 3, 8, 8, seed=batch)
            expected = torch_answer(model, torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(network.run({"input": x})["output"], expected, rtol=0, atol=1e-5)
    with pytest.raises(CompanionError, match="this torch_compile engine is closed: load it again"):
        network.run({"input": x})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("engine", ["torch", "torch_fused"])
def test_torch_engines_on_a_gpu(engine, exported):
    found = exported("cifar_resnet20")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # which has ten bits of mantissa
    try:
        with engines.load(found.model, engine, device="cuda") as network:
            expected = torch_answer(found.model, torch.from_numpy(GOOD)).numpy()
            np.testing.assert_allclose(network.run({"input": GOOD})["output"], expected, rtol=0, atol=1e-4)
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ONNX files from others.


def write(path, nodes, inputs, outputs, tensors=(), *, opset=20, ir=10, **save):
    """An ONNX file built by hand; inputs and outputs as (name, element type, shape)."""
    sides = ([helper.make_tensor_value_info(*info) for info in side] for side in (inputs, outputs))
    graph = helper.make_graph(nodes, "graph", *sides, list(tensors))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.save(model, path, **save)
    return path


FLOATS = ("x", TensorProto.FLOAT, ["n", 3]), ("y", TensorProto.FLOAT, ["n", 3])
THREE = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])


def test_a_foreign_file_runs(tmp_path):
    add = helper.make_node("Add", ["x", "w"], ["y"])
    path = write(tmp_path / "add.onnx", [add], FLOATS[:1], FLOATS[1:], [THREE])
    with engines.load(path) as engine:
        assert engine.metadata == engines.Metadata()
        assert np.array_equal(engine.run({"x": np.zeros((1, 3), np.float32)})["y"], [[1, 2, 3]])


def test_a_fixed_batch_is_held_to(tmp_path):
    relu = helper.make_node("Relu", ["x"], ["y"])
    infos = [(name, TensorProto.FLOAT, [1, 3]) for name in "xy"]
    with (
        engines.load(write(tmp_path / "relu.onnx", [relu], infos[:1], infos[1:])) as engine,
        pytest.raises(CompanionError, match=r"the shape \[1, 3\], not \[2, 3\]"),
    ):
        engine.run({"x": np.zeros((2, 3), np.float32)})


def test_a_scalar_input(tmp_path):
    neg = helper.make_node("Neg", ["x"], ["y"])
    infos = [(name, TensorProto.DOUBLE, []) for name in "xy"]
    with engines.load(write(tmp_path / "neg.onnx", [neg], infos[:1], infos[1:])) as engine:
        assert engine.run({"x": np.array(2.0)})["y"] == -2.0


def test_an_input_of_unknown_rank(tmp_path):
    relu = helper.make_node("Relu", ["x"], ["y"])
    infos = [(name, TensorProto.FLOAT, None) for name in "xy"]
    with engines.load(write(tmp_path / "relu.onnx", [relu], infos[:1], infos[1:])) as engine:
        for shape in ((3,), (2, 3), (1, 2, 3, 4)):
            x = images(*shape) - 0.5
            assert np.array_equal(engine.run({"x": x})["y"], np.maximum(x, 0))


@pytest.mark.parametrize(("names", "agree"), [(("n", "n"), True), (("n", "m"), False), ((None, None), False)])
def test_names_of_dimensions_say_which_inputs_go_together(names, agree, tmp_path):
    add = helper.make_node("Add", ["a", "b"], ["y"])
    inputs = [(name, TensorProto.FLOAT, [size, 3]) for name, size in zip("ab", names, strict=True)]
    with engines.load(write(tmp_path / "add.onnx", [add], inputs, [("y", TensorProto.FLOAT, None)])) as engine:
        given = {"a": images(5, 3), "b": images(1, 3)}
        if agree:
            with pytest.raises(CompanionError, match="same number of samples"):
                engine.run(given)
        else:
            assert np.array_equal(engine.run(given)["y"], given["a"] + given["b"])


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04 a zip", "模型".encode()])
def test_files_that_are_no_onnx(content, tmp_path, capfd):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    refused("net.onnx is not an ONNX file or is damaged", path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_files(share, exported, tmp_path, capfd):
    content = exported("simple_cnn").path.read_bytes()
    (tmp_path / "net.onnx").write_bytes(content[: int(share * len(content))])
    refused("is not an ONNX file or is damaged", tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


def test_weights_in_another_file(tmp_path, capfd):
    add = helper.make_node("Add", ["x", "w"], ["y"])
    weights = helper.make_tensor("w", TensorProto.FLOAT, [3], np.ones(3, np.float32).tobytes(), raw=True)
    settings = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0}
    path = write(tmp_path / "add.onnx", [add], FLOATS[:1], FLOATS[1:], [weights], **settings)
    with engines.load(path) as engine:
        assert np.array_equal(engine.run({"x": np.zeros((1, 3), np.float32)})["y"], [[1, 1, 1]])
    (tmp_path / "w.data").unlink()
    refused("keeps its weights in another file, which is not there: .*w.data", path)
    for location in ("../w.data", str(tmp_path / "w.data")):
        model = onnx.load(path, load_external_data=False)
        (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "location")
        entry.value = location
        (tmp_path / "out.onnx").write_bytes(model.SerializeToString())
        refused("keeps its weights in a file outside its folder, which is not read", tmp_path / "out.onnx")
    assert capfd.readouterr() == ("", "")


def test_files_that_this_onnx_runtime_cannot_run(tmp_path, capfd):
    nonsense, relu = helper.make_node("Nonsense", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["y"])
    refused("cannot load .*Nonsense", write(tmp_path / "a.onnx", [nonsense], FLOATS[:1], FLOATS[1:]))
    refused("cannot load .*pset 99", write(tmp_path / "b.onnx", [relu], FLOATS[:1], FLOATS[1:], opset=99))
    refused("cannot load .*: Unsupported model IR", write(tmp_path / "c.onnx", [relu], FLOATS[:1], FLOATS[1:], ir=99))
    bfloat = ("y", TensorProto.BFLOAT16, ["n", 3])
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    refused("its y is a tensor.bfloat16.", write(tmp_path / "d.onnx", [cast], FLOATS[:1], [bfloat]))
    assert capfd.readouterr() == ("", "")


def test_a_failing_run_prints_nothing(tmp_path, capfd):
    gather = helper.make_node("Gather", ["w", "x"], ["y"])
    infos = [("x", TensorProto.INT64, ["n"])], [("y", TensorProto.FLOAT, ["n"])]
    path = write(tmp_path / "gather.onnx", [gather], *infos, [THREE])
    with engines.load(path) as engine, pytest.raises(CompanionError, match="bounds, idx=99") as caught:
        engine.run({"x": np.array([99])})
    one_sentence(caught)
    assert capfd.readouterr() == ("", "")


# Descriptions.


@pytest.mark.parametrize("engine", ENGINES)
def test_the_description_travels(engine, exported, opened):
    found = exported("cifar_resnet20")
    info = models.describe(found.model)
    said = opened("cifar_resnet20", engine).metadata
    assert said == engines.Metadata(
        model=info.name,
        configuration=info.configuration,
        task="classify",
        labels=tuple(f"类 {i}" for i in range(10)),
        input_size=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )
    assert models.create(said.model, labels=said.labels, **said.configuration)


FULL = engines.Metadata(
    "net", {"width": 8, "mean": (0.5, 0.25)}, "text", ("a", "b"), ("<pad>", "模型"), (7,), 32, (0.5, 0.25), (2.0, 1.0)
)


def test_descriptions_survive_being_text():
    assert engines.Metadata.from_text(FULL.to_text()) == FULL
    assert engines.Metadata.from_text(engines.Metadata().to_text()) == engines.Metadata()
    assert engines.Metadata.from_text(FULL.to_text() | {"author": "somebody"}) == FULL
    assert engines.Metadata.from_text({"labels": "{0: 'person'}", "task": "detect"}) == engines.Metadata()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("labels", "["),
        ("labels", "7"),
        ("labels", "[1, 2]"),
        ("labels", '"ab"'),
        ("vocabulary", "[null]"),
        ("labels", '["one"]'),
        ("input_size", '["3"]'),
        ("input_size", "[true, 5]"),
        ("input_size", "[3, -5]"),
        ("stride", "0"),
        ("stride", "[32]"),
        ("mean", "0.5"),
        ("std", '["1"]'),
        ("task", "frob\n\x1b[31m"),
        ("model", "frob\n\x1b[31m"),
        ("configuration", "[]"),
        ("configuration", "[" * 100_000),
        ("companion", "2"),
    ],
)
def test_forged_descriptions(key, text, exported, tmp_path):
    model = onnx.load(exported("simple_cnn").path)
    texts = {entry.key: entry.value for entry in model.metadata_props} | {key: text}
    helper.set_model_props(model, texts)
    onnx.save(model, tmp_path / "net.onnx")
    refused("net.onnx cannot be used: (its description|.* classes, but 1 label)", tmp_path / "net.onnx")


# An engine as a network.


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_are_judged_as_networks_are(engine):
    data = datasets.load("digits", split="test")
    model = lively(models.create("cifar_resnet14", width=4, labels=data.labels, seed=0))
    expected = train.evaluate(model, data, progress=False, device="cpu")
    with engines.load(model, engine) as made:
        module = engines.as_module(made)
        assert models.describe(module) == models.describe(model)
        assert metrics.count_parameters(module) == 0
        scores = train.evaluate(module, data, progress=False, device="cpu")
    assert scores.samples == expected.samples
    assert scores.loss == pytest.approx(expected.loss, rel=1e-4)
    assert scores.metrics["accuracy"] == pytest.approx(expected.metrics["accuracy"], abs=1.5 / len(data))


def test_judging_an_engine_on_other_data_is_refused(opened):
    module = engines.as_module(opened("simple_cnn", "onnxruntime"))
    with pytest.raises(CompanionError, match="trained for other classes"):
        train.evaluate(module, datasets.load("digits", split="test"), progress=False)
    with pytest.raises(CompanionError, match="this network takes input; 2 inputs were given"):
        module(torch.rand(1, 3, 32, 32), torch.rand(1))


def test_labels_that_are_not_as_many_as_the_classes(opened):
    engine = opened("simple_cnn", "onnxruntime")
    said = engine.metadata
    engine.metadata = replace(said, labels=("one",))
    try:
        with pytest.raises(CompanionError, match="10 classes, but 1 labels"):
            engines.as_module(engine)
    finally:
        engine.metadata = said


def test_a_module_of_several_inputs_and_outputs():
    model = Words()
    with engines.load(model, "torch", example=(IDS, MASK)) as engine:
        answers = engines.as_module(engine)(IDS, MASK)
    torch.testing.assert_close(answers["more_0"], torch_answer(model, IDS, MASK)["more"][0])
