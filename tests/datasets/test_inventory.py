"""What there is, and whether it is what it should be."""

import hashlib
import json

import numpy as np
import pytest

from companion import datasets
from companion.datasets import inventory, store


def test_the_catalogue_has_every_name():
    entries = datasets.catalogue()
    assert [entry.name for entry in entries] == datasets.names()
    assert {entry.name: entry.state for entry in entries} == {
        **dict.fromkeys(("digits", "hard_digits", "digit_scenes", "docstrings"), "built in"),
        **dict.fromkeys(("cifar10", "camvid", "ag_news"), "missing"),
    }
    assert {entry.name for entry in entries if entry.task == "segment"} == {"digit_scenes", "camvid"}
    assert {entry.name for entry in entries if entry.task == "text"} == {"docstrings", "ag_news"}
    assert all(entry.source and entry.size and entry.terms for entry in entries)


@pytest.mark.parametrize("name", ["digits", "hard_digits"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_this_machine_makes_the_images_of_the_course(name, split):
    """The manifest's hashes pin the images that the course's results were measured on: they must never change."""
    data = datasets.load(name, split=split)
    pixels = np.stack([data[i][0].numpy() for i in range(len(data))])
    digest = hashlib.sha256(np.rint(pixels * 255).astype(np.uint8).tobytes() + bytes(data.targets.tolist()))
    assert digest.hexdigest() == store.manifest()["generated"][name][split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_this_machine_makes_the_scenes_of_the_course(split):
    data, boxed = (datasets.load("digit_scenes", split=split, task=task, size=64) for task in ("segment", "detect"))
    images = np.stack([np.rint(image.numpy() * 255).astype(np.uint8) for image, _ in data])
    masks = np.stack([mask.numpy().astype(np.uint8) for _, mask in data])
    boxes = b"".join(found["boxes"].numpy().astype("<u2").tobytes() for _, found in boxed)
    digits = b"".join(bytes(found["labels"].tolist()) for _, found in boxed)
    digest = hashlib.sha256(images.tobytes() + masks.tobytes() + boxes + digits)
    assert digest.hexdigest() == store.manifest()["generated"]["digit_scenes"][split]


def test_the_manifest_lists_every_shipped_file_but_results():
    """Results change with every run of a bench, and reading one checks it: see companion.metrics.results."""
    folder = datasets.shipped("manifest.json").parent
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    results = {name for name in files if name.startswith("results/")}
    assert set(store.manifest()["shipped"]) == files - results - {"manifest.json"}


def test_everything_here_is_as_it_should_be():
    checks = datasets.verify()
    generated = [f"{name} {split}" for name in store.manifest()["generated"] for split in ("train", "test")]
    assert [check.what for check in checks][-len(generated) :] == generated
    assert {"digits", "hard_digits", "digit_scenes"} <= store.manifest()["generated"].keys()
    assert all(check.ok for check in checks), checks


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that ships one file and a manifest."""
    folder = tmp_path / "companion" / "_data"
    folder.mkdir(parents=True)
    content = b"weights"
    (folder / "w.safetensors").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    table = {"downloads": {}, "shipped": {"w.safetensors": entry}, "generated": {"digits": {"train": "0", "test": "0"}}}
    (folder / "manifest.json").write_text(json.dumps(table))
    monkeypatch.setattr("companion.__file__", str(tmp_path / "companion" / "__init__.py"))
    return folder


def test_shipped_files_are_checked(package):
    path = package / "w.safetensors"
    assert datasets.verify()[0] == inventory.Check("w.safetensors", True, "as it should be")
    path.write_bytes(b"weightz")
    assert datasets.verify()[0].message == "was changed since it was shipped: install companion again"
    path.write_bytes(b"weights!")
    assert not datasets.verify()[0].ok
    path.unlink()
    assert not datasets.verify()[0].ok
    assert "missing" in datasets.verify()[0].message


def test_images_that_differ_are_reported(package):
    assert [(check.what, check.ok) for check in datasets.verify()[1:]] == [
        ("digits train", False),
        ("digits test", False),
    ]
