"""Texts from the command line: train, evaluate, export, compress, serve, load."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from companion import engines, models

ROWS = [
    f"{label},Title {n} of {word},{word} and {word}"
    for n in range(40)
    for label, word in (("World", "treaty"), ("Sports", "goal"), ("Business", "shares"), ("Sci/Tech", "rocket"))
]


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    """A folder for data with an AG News of 160 items, and a network that knows them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "ag_news.csv").write_text("\n".join(["label,title,description", *ROWS, ""]), encoding="utf-8")
    return folder


@pytest.fixture
def data(news, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(news))
    return news


@pytest.fixture
def weights(call, data):
    path = data / "news.safetensors"
    if not path.exists():
        code, out, err = call(
            "train", "text_classifier", "--data", "ag_news", "--epochs", 12, "--lr", 0.01, "--out", path
        )
        assert (code, err) == (0, "")
        assert re.search(r"text_classifier \([\d,]+ parameters\) on ag_news \(\d+ texts\)\n", out)
        assert re.search(r"test +accuracy 100\.00 %, loss .*, \d+ texts\n$", out)
    return path


def test_train_evaluate_export_and_quantize(call, weights, tmp_path):
    assert models.describe(models.load(weights)).labels == ("World", "Sports", "Business", "Sci/Tech")
    onnx = tmp_path / "n.onnx"
    assert call("export", weights, onnx)[0] == 0
    found = []
    for file in (weights, onnx):
        code, out, _ = call("evaluate", file, "--data", "ag_news", "--json")
        assert code == 0
        found.append(json.loads(out))
    assert found[0]["accuracy"] == found[1]["accuracy"] == 1
    assert found[0]["samples"] == found[1]["samples"] > 15
    code, out, _ = call(
        "compress", weights, "--steps", "quantize=int8", "--data", "ag_news", "--out", tmp_path / "c", "--json"
    )
    stages = json.loads(out)["stages"]
    assert (code, [stage["score"] for stage in stages]) == (0, [1, 1])
    assert stages[1]["bytes"] < stages[0]["bytes"]
    with engines.load(tmp_path / "c.onnx") as runs:
        assert runs.precision == "int8"
    for file in (weights, onnx):
        code, out, _ = call("profile", file, "--seconds", "0.05")
        assert code == 0
        assert "input 1×16" in out
    assert call("profile", weights, "--input", "2,40", "--seconds", "0.05")[0] == 0


def test_a_network_is_judged_with_its_own_vocabulary(call, weights, data):
    """Of data that have other words in another order."""
    (data / "ag_news.csv").rename(data / "kept.csv")
    try:
        rows = [row.replace("and", f"zebra{n}") for n, row in enumerate(reversed(ROWS))]
        (data / "ag_news.csv").write_text("\n".join(["label,title,description", *rows, ""]), encoding="utf-8")
        code, out, _ = call("evaluate", weights, "--data", "ag_news", "--json")
    finally:
        (data / "kept.csv").replace(data / "ag_news.csv")
    assert (code, json.loads(out)["accuracy"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "text_classifier", "--epochs", "1"], "is for the task 'text', digits is for 'classify'"),
        (["train", "simple_cnn", "--data", "ag_news"], "is for the task 'classify', ag_news is for 'text'"),
        (["train", "text_classifier", "--data", "folder:x"], "there is no folder or zip x|x"),
    ],
)
def test_networks_and_data_of_different_kinds(call, data, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*arguments)
    assert code == 1
    assert re.search(said, err)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_serve_and_load(call, weights, data):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("httptools", reason="the extra serve is not installed")
    command = [sys.executable, "-m", "companion", "serve", "text", "--model", weights, "--port", 0, "--max-batch", 8]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline()).group()
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=60).close()
                break
            except OSError:  # it listens, and is not yet there
                assert process.poll() is None
                time.sleep(0.05)
        body = json.dumps({"texts": ["a rocket", "the goal", "treaty", "shares of shares"]}).encode()
        asked = urllib.request.Request(f"{url}/predict", body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["labels"] == ["Sci/Tech", "Sports", "World", "Business"]
        code, out, _ = call(
            "load", f"{url}/predict", "--data", "ag_news", "--concurrency", 4, "--seconds", "0.5", "--json"
        )
        found = json.loads(out)
        assert (code, found["failures"]) == (0, {})
        assert found["answers"] > 10
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_images_and_texts_are_not_mixed_up(call, weights):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    code, _, err = call("serve", "image", "--model", weights)
    assert code == 1
    assert "this network takes input int64" in err
