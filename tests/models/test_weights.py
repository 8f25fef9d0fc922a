import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from companion import CompanionError, datasets, models, train

LABELS = [f"类别 {i}" for i in range(4)]


@pytest.fixture
def model():
    return models.create("cifar_resnet14", width=4, classes=4, labels=LABELS, seed=0)


@pytest.fixture
def path(model, tmp_path):
    models.save(model, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def description(path):
    """What a weights file says of its network, read by hand: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return json.loads(header["__metadata__"]["companion-1"])


def edit(path, *, tensors=None, **changes):
    """Rewrite a weights file with other contents, the way somebody else's program would."""
    metadata = {"companion-1": json.dumps(description(path) | changes)}
    save_file(load_file(path) if tensors is None else tensors, path, metadata)


@pytest.mark.parametrize("name", [name for name in models.names() if models.task(name) != "text"])
def test_round_trip_gives_the_same_answers(name, tmp_path):
    settings = {"width": 8} if "resnet" in name and not name.startswith("fcn") else {}  # quicker
    if name.startswith("yolov5"):
        settings = {"width_multiple": 0.125}
    original = models.create(name, **settings)
    original.train()(torch.rand(4, 3, 32, 32))  # so that the normalisations' running averages are not the initial ones
    models.save(original, tmp_path / "net.safetensors")
    copy = models.load(tmp_path / "net.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(copy(images), original.eval()(images))
    assert not copy.training
    assert models.describe(copy) == models.describe(original)
    assert all(p.requires_grad for p in copy.parameters())


def test_a_text_is_no_vocabulary(model, tmp_path):
    with pytest.raises(CompanionError, match="the vocabulary must be a list of texts"):
        models.save(model, tmp_path / "net.safetensors", vocabulary="abc")
    assert not any(tmp_path.iterdir())


def test_everything_needed_to_use_the_network_travels(model, tmp_path):
    models.save(model, tmp_path / "net.safetensors", vocabulary=["<pad>", "模型"])
    info = models.describe(models.load(tmp_path / "net.safetensors"))
    assert info.labels == tuple(LABELS)
    assert info.vocabulary == ("<pad>", "模型")
    assert (info.name, info.task) == ("cifar_resnet14", "classify")
    assert info.configuration["width"] == 4


def test_any_safetensors_reader_can_open_it(model, path):
    assert load_file(path).keys() == model.state_dict().keys()


def test_channels_last_weights_are_saved_whole(model, tmp_path):
    models.save(model.to(memory_format=torch.channels_last), tmp_path / "net.safetensors")
    assert torch.equal(models.load(tmp_path / "net.safetensors").conv1.weight, model.conv1.weight)


def test_saving_again_replaces_and_leaves_no_other_file(model, path):
    model.fc.weight.data.zero_()
    models.save(model, path)
    assert models.load(path).fc.weight.abs().sum() == 0
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


def test_a_file_keeps_working_when_a_default_changes(model, path):
    """Defaults are written down too: every setting of the network is in the file."""
    assert description(path)["configuration"].keys() == {"width", "classes", "mean", "std"}


def test_loaded_weights_are_aligned_like_fresh_ones(path):
    """Unaligned ones make some kernels add in another order, so that the last bits of the answers differ."""
    assert {tensor.data_ptr() % 64 for tensor in models.load(path).state_dict().values()} == {0}


def test_equal_networks_make_equal_files(model, path, tmp_path):
    for i in range(5):
        models.save(models.load(path), tmp_path / f"{i}.safetensors")
        assert (tmp_path / f"{i}.safetensors").read_bytes() == path.read_bytes()


def refused(path, says):
    with pytest.raises(CompanionError, match=says) as caught:
        models.load(path)
    assert str(caught.value).count("\n") == 0


def test_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no weights file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "damaged")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"\x80\x04\x95 a pickle", b"\xff" * 64, b"text\n" * 100])
def test_file_of_another_kind(path, content):
    path.write_bytes(content)
    refused(path, "not a safetensors file or is damaged")


def test_a_folder(tmp_path):
    refused(tmp_path, "is a folder")


def test_foreign_safetensors_file(path):
    save_file({"weight": torch.rand(2)}, path)
    refused(path, "not one of companion's")


def test_weights_of_another_network(path):
    edit(path, name="simple_cnn")
    refused(path, "no setting 'width'")
    edit(path, name="cifar_resnet20")
    refused(path, "lacks the tensor layer1.2")


def test_weights_of_another_width(path):
    edit(path, configuration={"width": 8, "classes": 4})
    refused(path, r"the network needs torch.float32 \[8, 3, 3, 3\]")


def test_extra_tensor(path):
    edit(path, tensors=load_file(path) | {"backdoor": torch.rand(1)})
    refused(path, "has the tensor backdoor")


def test_numbers_of_another_kind(path):
    tensors = load_file(path)
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.int32)
    edit(path, tensors=tensors)
    refused(path, "torch.int32")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"name": "resnet999"}, "no network 'resnet999'"),
        ({"name": ["resnet18"]}, "no network"),
        ({"task": "segment"}, "task 'segment'"),
        ({"task": None}, "task"),
        ({"configuration": None}, "damaged description"),
        ({"configuration": []}, "damaged description"),
        ({"configuration": {"width": "wide"}}, "a whole number from 1 as width"),
        ({"configuration": {"width": 1e99}}, "a whole number from 1 as width"),
        ({"configuration": {"width": 2**62}}, "cannot be built"),
        ({"configuration": {"mean": [10**400, 0, 0]}}, "three numbers as mean"),
        ({"labels": ["one"]}, "4 classes, but 1 labels"),
        ({"labels": [1, 2, 3, 4]}, "not text"),
        ({"labels": 7}, "damaged description"),
        ({"vocabulary": [None]}, "not text"),
    ],
)
def test_forged_description(path, metadata, says):
    edit(path, **metadata)
    refused(path, says)


def test_a_forged_size_is_refused_without_taking_memory(path):
    """A width of a million asks for terabytes: refused by shape, on the meta device, before any is taken."""
    edit(path, configuration={"classes": 4, "width": 1000000})
    refused(path, "does not fit")


def test_labels_that_do_not_fit_are_not_saved(model, tmp_path):
    with pytest.raises(CompanionError, match="4 classes, but 2 labels"):
        models.save(model, tmp_path / "net.safetensors", labels=["a", "b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_load_would_refuse_is_not_saved(model, tmp_path, dtype):
    with pytest.raises(CompanionError, match="saved in float32"):
        models.save(model.to(dtype), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_foreign_module_is_not_saved(tmp_path):
    with pytest.raises(CompanionError, match=r"not made by models\.create"):
        models.save(torch.nn.Linear(1, 1), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_shipped_network_is_as_good_as_it_says():
    scores = train.evaluate(models.pretrained("cifar_resnet14_hard_digits"), datasets.load("hard_digits", split="test"))
    assert scores.main == pytest.approx(0.9815, abs=0.002)


def test_no_such_network_is_shipped():
    with pytest.raises(CompanionError, match=r"choose one of .*cifar_resnet14_hard_digits"):
        models.pretrained("../results/complexity")
