"""Names, and where data lies."""

import sys
from pathlib import Path

import pytest

from companion import CompanionError, datasets


def test_names():
    assert datasets.names() == ["digits", "hard_digits", "digit_scenes", "docstrings", "cifar10", "camvid", "ag_news"]


@pytest.mark.parametrize("name", ["mnist", "", "folder", "folder:", "digits:8", "Digits"])
def test_refuses_an_unknown_name(name):
    with pytest.raises(CompanionError, match=r"choose one of digits, hard_digits, .*, folder:PATH\.$"):
        datasets.load(name, split="train")


@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_refuses_an_unknown_split(split):
    with pytest.raises(CompanionError, match=r"of digits: choose train or test\.$"):
        datasets.load("digits", split=split)


def test_splits():
    assert datasets.splits("digits") == datasets.splits("folder:x") == ("train", "test")
    assert datasets.splits("camvid") == ("train", "val", "test")
    with pytest.raises(CompanionError, match="no data set 'mnist'"):
        datasets.splits("mnist")
    with pytest.raises(CompanionError, match=r"of camvid: choose train, val or test\.$"):
        datasets.load("camvid", split="dev")


@pytest.mark.parametrize(
    ("name", "option", "takes"),
    [
        ("digits", "level", "none"),
        ("hard_digits", "size", "level"),
        ("digit_scenes", "level", "task, size, scenes"),
        ("cifar10", "size", "none"),
        ("camvid", "size", "none"),
        ("folder:x", "level", "size"),
        ("folder:x", "path", "size"),
    ],
)
def test_refuses_an_unknown_option(name, option, takes):
    with pytest.raises(CompanionError, match=rf"has no option '{option}': it takes {takes}\.$"):
        datasets.load(name, split="train", **{option: 1})


@pytest.mark.parametrize(
    ("platform", "variable", "value", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "/caches", "/caches/companion"),
        ("linux", "XDG_CACHE_HOME", "", "/home/me/.cache/companion"),
        ("darwin", "XDG_CACHE_HOME", "/caches", "/home/me/Library/Caches/companion"),
        ("win32", "LOCALAPPDATA", "/local", "/local/companion"),
        ("win32", "COMPANION_DATA", "/mine", "/mine"),
        ("linux", "COMPANION_DATA", "~/mine", "/home/me/mine"),
    ],
)
def test_data_folder(monkeypatch, platform, variable, value, expected):
    for name in ("COMPANION_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(variable, value)
    assert datasets.data_folder() == Path(expected)


def test_shipped_files_lie_in_the_checkout_or_the_package(tmp_path, monkeypatch):
    assert datasets.shipped("manifest.json") == Path(__file__).parents[2] / "data" / "manifest.json"
    monkeypatch.setattr("companion.__file__", str(tmp_path / "companion" / "__init__.py"))
    (tmp_path / "companion" / "_data").mkdir(parents=True)
    (tmp_path / "companion" / "_data" / "x.json").write_text("{}")
    assert datasets.shipped("x.json") == tmp_path / "companion" / "_data" / "x.json"
    with pytest.raises(CompanionError, match=r"y.json that companion ships is missing.*\.$"):
        datasets.shipped("y.json")
