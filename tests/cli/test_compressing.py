"""`companion compress`, as a user types it."""

import json

import pytest

from companion import compress, datasets, engines, models, train
from companion.compress import pipeline


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """simple_cnn that knows most digits."""
    digits = datasets.load("digits", split="train")
    model = models.create("simple_cnn", labels=digits.labels, seed=0)
    train.fit(model, digits, epochs=3, validation=0, progress=False)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    models.save(model, path)
    return path


OPTIONS = ("--threads", "1", "--epochs", "1")


def test_steps_end_in_two_files(weights, tmp_path, call):
    steps = f"prune=0.5,distill={weights},quantize=int8"
    code, out, err = call("compress", weights, "--steps", steps, "--out", tmp_path / "small", *OPTIONS)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["start", *steps.split(",")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.safetensors"]
    small = models.load(tmp_path / "small.safetensors")
    assert small.state_dict()["conv1.weight"].shape[0] < 16
    with engines.load(tmp_path / "small.onnx") as engine:
        assert engine.metadata.labels == models.describe(small).labels


def test_the_saved_network_is_compressed_again_and_exported(weights, tmp_path, call):
    call("compress", weights, "--steps", "prune=0.6", "--out", tmp_path / "a", *OPTIONS)
    code, out, err = call("compress", tmp_path / "a.safetensors", "--steps", "low_rank=0.8", "--json", *OPTIONS)
    assert code == 0, err
    start, after = json.loads(out)["stages"]
    assert after["macs"] <= 0.81 * start["macs"]
    assert (tmp_path / "a-compressed.safetensors").exists()
    code, _, err = call("export", tmp_path / "a-compressed.safetensors", tmp_path / "b.onnx")
    assert code == 0, err


def test_a_target_chooses_the_steps(weights, tmp_path, call, monkeypatch):
    monkeypatch.setattr(pipeline, "GRID", ("", "prune=0.5"))
    code, out, err = call("compress", weights, "--target", "macs=0.6,points=100", "--out", tmp_path / "small", *OPTIONS)
    assert code == 0, err
    assert "tried, judged on a tenth of the training data" in out
    assert out.splitlines()[-3].startswith(("prune=0.5", "quantize=int8"))
    assert out.splitlines()[-2] == "macs=0.6,points=100 is met on the test data"
    assert (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize("json_too", [False, True])
def test_a_target_that_the_test_data_do_not_confirm(weights, tmp_path, call, monkeypatch, json_too):
    start = pipeline.Stage("start", 0.9, None, 1000, 4000, None)
    chosen = pipeline.Search(pipeline.parse_steps("prune=0.5"), (("", start),), "accuracy")
    monkeypatch.setattr(compress, "search", lambda *arguments, **options: chosen)
    options = (*OPTIONS, "--json") if json_too else OPTIONS
    code, out, err = call("compress", weights, "--target", "macs=0.1,points=100", "--out", tmp_path / "a", *options)
    assert code == 0, err
    if json_too:
        found = json.loads(out)
        assert found["missed"].keys() == {"macs"}
        assert 0.4 < found["missed"]["macs"] <= 0.5
        assert [stage["step"] for stage in found["search"]["tried"]] == ["start"]
    else:
        assert out.splitlines()[-2].startswith("macs=0.1,points=100 is missed on the test data: macs=0.4")


def test_a_target_that_nothing_meets(weights, tmp_path, call, monkeypatch):
    monkeypatch.setattr(pipeline, "GRID", ("",))
    code, _, err = call("compress", weights, "--target", "macs=0.1,points=100", "--out", tmp_path / "small", *OPTIONS)
    assert code == 1
    assert "none of the steps tried meets macs=0.1" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either --steps or --target"),
        (("--steps", "prune=0.5", "--target", "macs=0.5"), "give either --steps or --target"),
        (("--steps", "prune=2"), "prune takes a share between 0 and 1"),
        (("--steps", "distill=missing.safetensors"), "there is no weights file missing.safetensors"),
        (("--target", "speed=2"), "there is no target 'speed'"),
        (("--steps", "prune=0.5", "--data", "nothing"), "nothing"),
        (("--steps", "prune=0.5", "--out", "/nowhere/small"), "cannot write"),
        (("--steps", "prune=0.0001"), "0.0001"),
    ],
)
def test_wrong_input_is_one_sentence(weights, tmp_path, call, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("compress", weights, *arguments, *OPTIONS)
    assert code in (1, 2)
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_never_written_over(weights, tmp_path, monkeypatch, call):
    before = weights.read_bytes()
    monkeypatch.chdir(weights.parent)
    for out in (weights.with_suffix(""), weights, "net", "../" + weights.parent.name + "/net.onnx"):
        code, _, err = call("compress", weights, "--steps", "prune=0.5", "--out", out, *OPTIONS)
        assert code == 1
        assert "is read, so it cannot be written" in err
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "student.safetensors"
    student.write_bytes(before)
    steps = ("--steps", f"distill={weights}", "--out", weights.with_suffix(""))
    assert call("compress", student, *steps, *OPTIONS)[0] == 1
    assert weights.read_bytes() == before
