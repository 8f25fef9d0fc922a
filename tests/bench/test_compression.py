"""The reference run of 2.1.2: every method, on a few images and a narrow network."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from companion import CompanionError, compress, datasets, metrics, models
from companion.bench import compression
from companion.datasets.arrays import ArrayImages


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """96 digits in place of CIFAR-10, an untrained network of 8 channels in place of the trained ones, one epoch."""
    digits = datasets.load("digits", split="train")
    few = ArrayImages("few", digits.images[:96].numpy(), digits.targets[:96].numpy(), digits.labels)
    monkeypatch.setattr(compression, "_data", lambda split: few)
    monkeypatch.setattr(compression, "EPOCHS", 1)
    monkeypatch.setattr(compression, "FIT", compression.FIT | {"precision": "fp32", "batch_size": 32})
    monkeypatch.setattr(compression, "SECONDS", 0.05)
    network = models.create("cifar_resnet14", width=8, labels=digits.labels, seed=0).eval()
    monkeypatch.setattr(models, "pretrained", lambda name: network)
    return network


@pytest.mark.parametrize("method", compression.METHODS)
def test_every_method_ends_in_an_accuracy_and_a_file(method, small, tmp_path):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    assert 0 <= compression._result(method, 0, str(tmp_path)) <= 1
    files = {path.name for path in tmp_path.iterdir()}
    chosen = compression.METHODS[method]
    assert files == ({"0.safetensors"} if chosen.plain else set()) | (
        {"0.onnx", "0.int8.onnx"} if chosen.int8 else set()
    )
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items()), "the base was changed"
    if "channels" in method or "low rank" in method:
        shapes = {key: value.shape for key, value in load_file(tmp_path / "0.safetensors").items()}
        assert shapes != {key: value.shape for key, value in before.items()}
    if method == "80 % zeros":
        weights = [value for key, value in load_file(tmp_path / "0.safetensors").items() if value.dim() > 1]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        assert zeros == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("method", [name for name, method in compression.METHODS.items() if method.plain])
def test_seeds_share_a_folder_and_no_file(method, monkeypatch, tmp_path):
    """Their processes write at the same time."""
    monkeypatch.setattr(compression, "_tuned", lambda model, seed, epochs=0: model)  # it is about the files
    found = []
    for seed in (0, 1):
        before = set(tmp_path.iterdir())
        compression._result(method, seed, str(tmp_path))
        found.append({path: path.stat().st_mtime_ns for path in set(tmp_path.iterdir()) - before})
    first, second = found
    assert len(first) == len(second) > 0
    assert all(path.stat().st_mtime_ns == when for path, when in first.items()), "the second wrote over the first"


@pytest.mark.parametrize("how", ["Taylor", "Torch-Pruning, Taylor", "Torch-Pruning, L2"])
def test_criteria_see_images_of_all_classes(how, small, monkeypatch):
    """The files of CIFAR-10 are sorted by class."""
    digits = datasets.load("digits", split="train")
    order = digits.targets.argsort()
    by_class = ArrayImages("sorted", digits.images[order].numpy(), digits.targets[order].numpy(), digits.labels)
    monkeypatch.setattr(compression, "_data", lambda split: by_class)
    monkeypatch.setattr(compression, "_tuned", lambda model, seed, epochs=0: model)
    seen = []
    monkeypatch.setattr(
        compression, "cross_entropy", lambda scores, labels: (seen.append(labels), cross_entropy(scores, labels))[1]
    )
    sample = compression._sample(0)
    assert [each.shape for each in sample] == [(512, 3, 32, 32), (512,)]
    assert len(sample[1].unique()) == len(digits.labels)
    prune_channels = compress.prune_channels

    def ours(*arguments, data, **options):
        seen.append(torch.cat([labels for _, labels in data]))
        return prune_channels(*arguments, data=data, **options)

    monkeypatch.setattr(compress, "prune_channels", ours)
    pruned = compression.METHODS[f"channels, {how}"].make(small, 0)
    assert seen
    assert all(torch.equal(labels, sample[1]) for labels in seen)
    example = torch.rand(1, 3, 32, 32)
    assert metrics.count_macs(pruned, example) == pytest.approx(0.5 * metrics.count_macs(small, example), rel=0.1)


def test_cost_is_against_the_network_before(small):
    narrow = models.create("cifar_resnet14", width=4, seed=0).eval()
    values = compression._cost(narrow, small)
    # All channels but the picture's are halved: a quarter of the multiply-adds of nearly all layers.
    assert values["MACs in %"] == pytest.approx(25, abs=2)
    assert values["times smaller"] > 1.5
    assert {f"{runtime} speed-up" for runtime in compression.RUNTIMES} < values.keys()


@pytest.mark.parametrize("how", ["alone", "with a teacher"])
def test_students(how, monkeypatch):
    monkeypatch.setattr(compression, "LABELLED", 0.5)
    assert 0 <= compression._taught(how, 0) <= 1


def test_sparse_products():
    rows = compression._sparse_product(0.9)
    assert [row.keys["method"] for row in rows] == ["90% zeros, dense", "90% zeros, CSR"]


def test_percent_is_the_mean_of_the_seeds():
    assert compression._percent([0.90, 0.91, 0.95]) == {"accuracy in %": 92.0, "lowest": 90.0, "highest": 95.0}


def test_the_cells_have_names_of_their_own():
    keys = [cell.key for cell in compression.BENCH.cells()]
    assert len(keys) == len(set(keys)) == len(compression.METHODS) + len(compression.FAST) + 8


def test_missing_weights_are_noticed_before_anything_is_measured(monkeypatch):
    def missing(name):
        raise CompanionError(f"no network {name!r} is shipped.")

    monkeypatch.setattr(models, "pretrained", missing)
    with pytest.raises(CompanionError, match=r"tools/train_weights\.py cifar_resnet20_cifar10_seed0"):
        list(compression.BENCH.cells())
