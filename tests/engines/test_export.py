import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_cases import ENGINES, FROM_FILES, Does, lively, one_sentence, torch_answer
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn.utils import prune

import companion
from companion import CompanionError, engines, files, models
from companion.engines import export
from companion.models.yolov5 import YOLOv5

X = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))


def properties(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_the_file_says_what_it_is(exported):
    found = exported("simple_cnn")
    said = properties(found.path)
    assert said["companion"] == "1"
    assert said["model"] == "simple_cnn"
    assert said["task"] == "classify"
    assert json.loads(said["labels"]) == [f"类 {i}" for i in range(10)]
    assert json.loads(said["input_size"]) == [3, 32, 32]
    assert json.loads(said["configuration"])["channels"] == [16, 32]


def test_the_file_is_whole_and_takes_any_batch(exported):
    found = exported("simple_cnn")
    model = onnx.load(found.path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [20]
    assert not list(found.path.parent.glob("*.data"))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in weights.values())
    assert np.array_equal(numpy_helper.to_array(weights["conv1.weight"]), found.model.conv1.weight.detach().numpy())
    for side, name, rest in ((model.graph.input, "input", [3, 32, 32]), (model.graph.output, "output", [10])):
        assert [value.name for value in side] == [name]
        batch, *others = side[0].type.tensor_type.shape.dim
        assert batch.dim_param
        assert [dim.dim_value for dim in others] == rest


def test_what_was_measured_is_reported(exported):
    written = exported("cifar_resnet20").written
    assert written.bytes == written.path.stat().st_size
    assert 0 < written.largest_difference < 1e-5
    assert written.batches == (1, 7)


@pytest.mark.parametrize("name", ["simple_cnn", "cifar_resnet20", "unet", "mobilenet"])
def test_nothing_of_this_machine_is_in_the_file(name, exported):
    content = exported(name).path.read_bytes()
    for trace in (str(Path(companion.__file__).parent), sys.prefix, str(Path.home()), "site-packages", ".py", "File "):
        assert trace.encode() not in content


def test_equal_networks_make_equal_files(exported, tmp_path):
    """Whatever the batch of the example, the mode or the memory layout; others make others."""
    found = exported("simple_cnn")
    expected = found.path.read_bytes()
    model = models.create("simple_cnn", labels=models.describe(found.model).labels, seed=0)
    model.to(memory_format=torch.channels_last)
    engines.export_onnx(model.eval(), torch.rand(5, 3, 32, 32), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == expected
    with torch.no_grad():
        model.fc2.bias[0] += 1
    engines.export_onnx(model, torch.rand(1, 3, 32, 32), tmp_path / "net.onnx")  # replaces it
    assert (tmp_path / "net.onnx").read_bytes() != expected
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_the_callers_network_and_randomness_are_left_alone(tmp_path, capfd):
    model = lively(models.create("cifar_resnet14", width=4, seed=0))
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = {key: p.grad for key, p in model.named_parameters()}
    copies = {key: None if g is None else g.clone() for key, g in gradients.items()}
    wanted = {key: p.requires_grad for key, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    random, threads = torch.random.get_rng_state(), torch.get_num_threads()
    example = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    engines.export_onnx(model, example, tmp_path / "net.onnx", labels=[str(i) for i in range(10)])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key, p in model.named_parameters():
        assert p.grad is gradients[key]
        assert copies[key] is None or torch.equal(p.grad, copies[key])
    assert {key: p.requires_grad for key, p in model.named_parameters()} == wanted
    assert [module.training for module in model.modules()] == modes
    assert models.describe(model).labels is None
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")


def test_a_description_for_somebody_elses_network(tmp_path):
    linear = nn.Linear(4, 2)
    engines.export_onnx(linear, torch.rand(1, 4), tmp_path / "net.onnx", labels=["a", "b"], task="classify", opset=18)
    with engines.load(tmp_path / "net.onnx") as engine:
        assert engine.metadata == engines.Metadata("Linear", None, "classify", ("a", "b"), None, (4,))
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 18


def test_answers_that_are_not_numbers_may_agree_too(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x > 0.5, -torch.inf), x / (x - x)

    written = engines.export_onnx(Masked(), torch.rand(2, 4), tmp_path / "net.onnx")
    assert written.largest_difference == 0


def test_the_callers_example_is_left_alone(tmp_path):
    """And the answers are compared on what was given, not on what the network made of it."""
    x = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    written = engines.export_onnx(Does(lambda x: x.sub_(0.5) * 2), x, tmp_path / "net.onnx")
    assert written.largest_difference < 1e-6
    assert torch.equal(x, before)
    with engines.load(tmp_path / "net.onnx") as engine:
        np.testing.assert_allclose(engine.run({"input": before.numpy()})["output"], 2 * (before - 0.5), atol=1e-6)


@pytest.mark.parametrize(
    "wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel], ids=["compile", "DataParallel"]
)
def test_networks_that_take_any_arguments(wrap, tmp_path):
    net, x = nn.Linear(3, 2), torch.rand(5, 3)
    engines.export_onnx(wrap(net), torch.rand(2, 3), tmp_path / "net.onnx")
    with engines.load(tmp_path / "net.onnx") as engine:
        assert [info.name for info in engine.inputs] == ["input"]
        np.testing.assert_allclose(engine.run({"input": x.numpy()})["output"], torch_answer(net, x), atol=1e-6)


def test_a_network_of_several_positional_arguments(tmp_path):
    engines.export_onnx(
        Does(lambda *args: args[0] - 2 * args[1]), (torch.rand(2, 3), X[..., 0, :]), tmp_path / "n.onnx"
    )
    with engines.load(tmp_path / "n.onnx") as engine:
        ones = np.ones((4, 3), np.float32)
        assert np.array_equal(engine.run({"input_0": 5 * ones, "input_1": ones})["output"], 3 * ones)


def test_a_parameter_among_the_outputs(tmp_path):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x):
            return x * 2, self.w

    model = Returns()
    x = np.ones((3, 2), np.float32)
    for engine in ENGINES:
        with engines.load(model, engine, example=torch.rand(2, 2)) as made:
            answers = made.run({"input": x})
            assert np.array_equal(answers["output_0"], 2 * x)
            assert np.array_equal(answers["output_1"], [1, 2])
            answers["output_1"][:] = 9  # the caller's own
            assert np.array_equal(made.run({"input": x})["output_1"], [1, 2])


# What is refused leaves no file, and an old one as it was.


def refused(says, model, example, path, **options):
    path.write_bytes(b"old")
    with pytest.raises(CompanionError, match=says) as caught:
        engines.export_onnx(model, example, path, **options)
    text = one_sentence(caught)
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return text


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda x: x + torch.rand_like(x), r"ONNX Runtime's output differs from torch's by .*, and 1.0e-04 is allowed"),
        (lambda x: x.view(2, 12), "cannot be exported to ONNX|does not run on 1 samples"),
        (lambda x: x if x.sum() > 0 else -x, "cannot be exported to ONNX: .*data-dependent"),
        (lambda x: torch.linalg.svd(x)[1], "cannot be exported to ONNX: No ONNX function found for .*svd"),
        (lambda x: x @ x, "does not run on 2 samples like the example"),
        (lambda x: (x, 3), "output_1 of the network is int: only tensors"),
        (lambda x: x.bfloat16(), "output of the network is bfloat16"),
        (lambda x: {"a": (x, x), "a_0": x}, "two tensors of the network would both be called a_0"),
        (lambda x: {}, "the network has no output"),
        (lambda x: x * len(x), "torch takes its batch for always 2"),
        (lambda x: {"one" if x.shape[0] == 1 else "more": x}, "returns one at batch 1, more for the example"),
        (lambda x: x + torch.nan, r"output of the network is not a number \(NaN\) for the example"),
    ],
    ids=[
        "random",
        "fixed batch",
        "branch",
        "unknown",
        "shapes",
        "no tensor",
        "bfloat16",
        "names",
        "none",
        "len",
        "names by batch",
        "NaN",
    ],
)
def test_networks_that_cannot_be_exported(forward, says, tmp_path, capfd):
    refused(says, Does(forward), X, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


def test_too_strict_a_tolerance(tmp_path):
    cnn = models.create("simple_cnn", seed=0)
    says = "differs from torch's by .*e-0[678] at batch 1, and 0.0e.00 is allowed"
    refused(says, cnn, engines.example_for(cnn), tmp_path / "net.onnx", tolerance=0)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("images", "the example must be a tensor"),
        (X[:0], "empty"),
        (torch.tensor(1.0), r"same number of samples as its first dimension, not input \[\]"),
        ((X, X[:1]), r"input_0 \[2, 4, 3\], input_1 \[1, 4, 3\]"),
        ((X, 2), "input_1 of the network is int"),
        (X.bfloat16(), "input of the network is bfloat16, which NumPy lacks"),
        (X.to(torch.float8_e4m3fn), "input of the network is float8_e4m3fn, which NumPy lacks"),
        (X.to("meta"), "the example is on the device meta"),
        ([X], "none a list"),
        (({"x": X},), "none a dict"),
    ],
)
def test_bad_examples(example, says, tmp_path):
    refused(says, nn.Linear(3, 2), example, tmp_path / "net.onnx")


def test_bad_arguments(tmp_path):
    path, cnn = tmp_path / "net.onnx", models.create("simple_cnn")
    images = engines.example_for(cnn)
    refused("must end in .onnx", cnn, images, tmp_path / "net.pt")
    (tmp_path / "net.pt").unlink()
    refused("10 classes, but 2 labels", cnn, images, path, labels=["a", "b"])
    for task in (None, "classify"):
        refused("2 classes, but 3 labels", nn.Linear(3, 2), X[0], path, labels=["a", "b", "c"], task=task)
    refused("4 classes, but 1 label", nn.Conv2d(3, 4, 1), torch.rand(1, 3, 5, 5), path, labels=["a"], task="segment")
    for labels in ("ab", [0, 1], 5, [None]):
        refused("labels must be a list of texts, not", nn.Linear(3, 2), X[0], path, labels=labels)
    for tolerance in ("x", float("nan"), -1):
        refused("tolerance is .*: give a number from 0", nn.Linear(3, 2), X[0], path, tolerance=tolerance)
    for opset in (17, 0, "20", True):
        refused("opset is .*: give a whole number from 18", nn.Linear(3, 2), X[0], path, opset=opset)
    refused("Linear cannot be copied: .*meta", nn.Linear(3, 2, device="meta"), X[0], path)
    refused("simple_cnn is for the task 'classify', not 'detect'", cnn, images, path, task="detect")
    refused("no task 'guess': choose one of classify", nn.Linear(3, 2), X, path, task="guess")
    refused("with opset 99, only with", nn.Linear(3, 2), X, path, opset=99)
    refused(r"a network \(torch.nn.Module\) is needed, not str", "simple_cnn", images, path)
    prune.l1_unstructured(cnn.conv1, "weight", 0.5)
    cnn(images)
    refused("SimpleCNN cannot be copied: Only Tensors created explicitly", cnn, images, path)


def test_a_network_that_does_not_want_to_be_copied(tmp_path):
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise ValueError("there is only one. Really")

    refused("Single cannot be copied: there is only one", Single(3, 2), X[0], tmp_path / "net.onnx")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_cannot_be_exported_again(engine, opened, tmp_path):
    module = engines.as_module(opened("simple_cnn", engine))
    refused(
        "an engine in place of a network cannot be copied or exported",
        module,
        torch.rand(1, 3, 32, 32),
        tmp_path / "net.onnx",
    )


def test_more_weights_than_a_file_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    refused("the weights take .* GiB, and one ONNX file holds less than 2", nn.Linear(3, 100), X, tmp_path / "net.onnx")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CompanionError, match="cannot write"):
        engines.export_onnx(nn.Linear(3, 2), X, tmp_path / "none" / "net.onnx")


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(CompanionError, match="No space left"):
        engines.export_onnx(nn.Linear(3, 2), X, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_a_network_on_a_gpu_stays_there_and_makes_the_same_file(exported, tmp_path):
    found = exported("simple_cnn")
    model = models.create("simple_cnn", labels=models.describe(found.model).labels, seed=0).cuda()
    engines.export_onnx(model, found.example.cuda(), tmp_path / "net.onnx")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert (tmp_path / "net.onnx").read_bytes() == found.path.read_bytes()


# Other precisions, other sizes.


def test_half_the_size_in_float16(exported, tmp_path):
    found = exported("cifar_resnet20")
    written = engines.export_onnx(found.model, found.example, tmp_path / "half.onnx", precision="fp16")
    assert 0.5 < written.bytes / found.written.bytes < 0.6
    assert 1e-5 < written.largest_difference < 1e-2
    weights = [t for t in onnx.load(written.path).graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in weights} == {TensorProto.FLOAT16}
    with engines.load(written.path) as half, engines.load(found.path) as full:
        assert (half.precision, full.precision) == ("fp16", "fp32")
        assert (half.inputs, half.outputs, half.metadata) == (full.inputs, full.outputs, full.metadata)


def test_images_of_any_size(tmp_path):
    model = lively(models.create("unet", width=4, depth=2, seed=0))
    engines.export_onnx(model, engines.example_for(model), tmp_path / "net.onnx", dynamic_size=True)
    for engine in FROM_FILES:
        pytest.importorskip(engine)
        with engines.load(tmp_path / "net.onnx", engine) as network:
            assert network.inputs[0].shape == (None, 3, None, None)
            assert network.metadata.stride == 1
            for shape in ((1, 3, 32, 32), (2, 3, 33, 47), (1, 3, 48, 32)):
                x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
                answer = network.run({"input": x.numpy()})["output"]
                np.testing.assert_allclose(answer, torch_answer(model, x).numpy(), rtol=0, atol=1e-4)


def test_yolov5_at_sizes_that_its_stride_divides(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = YOLOv5(10, 0.1, 0.125)  # as the published ones, with one bottleneck everywhere
        model(torch.rand(4, 3, 64, 64))  # some averages
        engines.export_onnx(model, torch.rand(1, 3, 64, 64), tmp_path / "net.onnx", task="detect", dynamic_size=True)
    for engine in FROM_FILES:
        pytest.importorskip(engine)
        with engines.load(tmp_path / "net.onnx", engine) as network:
            assert network.metadata.stride == 32
            assert network.metadata.mean is None
            for shape in ((1, 3, 96, 160), (2, 3, 64, 64)):
                x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
                answer = network.run({"input": x.numpy()})["output"]
                expected = torch_answer(model, x).numpy()
                assert expected.shape == (shape[0], 63 * shape[2] * shape[3] // 32**2, 15)
                np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-4 * expected.max())
            with pytest.raises(CompanionError, match="'input' must be multiples of 32, not 64 and 63") as caught:
                network.run({"input": np.zeros((1, 3, 64, 63), np.float32)})
            one_sentence(caught)


def test_precisions_and_sizes_that_there_are_not(exported, tmp_path):
    found, out = exported("simple_cnn"), tmp_path / "net.onnx"
    refused("precision is 'int8': choose one of fp32, fp16", found.model, found.example, out, precision="int8")
    refused("simple_cnn does not take images of any size", found.model, found.example, out, dynamic_size=True)
    refused("does not take images of any size", nn.Linear(3, 2), X[0], out, dynamic_size=True)
    big = nn.Linear(3, 2)
    with torch.no_grad():
        big.weight[0, 0] = 1e6
    refused("weight holds 1e.06, and float16 ends at 65504", big, X[0], out, precision="fp16")
    refused(
        "differs from torch's by .*, and 1.0e-06 is", found.model, found.example, out, precision="fp16", tolerance=1e-6
    )
