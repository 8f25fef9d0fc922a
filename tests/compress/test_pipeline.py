"""Steps one after another, and the search for those that meet a target."""

import pytest
import torch
from torch.utils.data import Subset

from companion import CompanionError, compress, datasets, engines, metrics, models, train
from companion.compress import pipeline
from companion.compress.pipeline import Stage, Step, Target, parse_steps, parse_target
from companion.metrics.latency import Ratio

QUICK = {"seconds": 0.2, "progress": False}


@pytest.fixture(scope="module")
def digits():
    return {split: datasets.load("digits", split=split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def network(digits):
    """Small, and trained so that it knows most digits."""
    model = models.create("simple_cnn", labels=digits["train"].labels, seed=0)
    train.fit(model, digits["train"], epochs=3, validation=0, progress=False)
    return model


@pytest.fixture(scope="module")
def teacher(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    models.save(network, path)
    return path


@pytest.fixture(scope="module")
def whole(network, digits, teacher, tmp_path_factory):
    """All steps, once."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    before = {key: value.clone() for key, value in network.state_dict().items()}
    steps = f"prune=0.6,low_rank=0.7,sparsify=0.5,distill={teacher},quantize=int8"
    found = compress.apply_steps(network, steps, digits["train"], digits["test"], onnx=path, **QUICK)
    return before, found, path


def test_every_step_is_a_stage_in_the_order_given(whole, teacher):
    steps = ["start", "prune=0.6", "low_rank=0.7", "sparsify=0.5", f"distill={teacher}", "quantize=int8"]
    assert [stage.step for stage in whole[1].stages] == steps


def test_the_argument_is_as_it_was(whole, network):
    before = whole[0]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_multiply_adds_fall_as_asked(whole):
    start, prune, low_rank, *rest = (stage.macs for stage in whole[1].stages)
    assert 0.5 * start < prune <= 0.62 * start
    assert 0.6 * prune < low_rank <= 0.72 * prune
    assert set(rest) == {low_rank}


def test_the_network_is_that_before_quantization_and_can_be_saved(whole, tmp_path):
    _, found, _ = whole
    model = found.model
    assert metrics.count_macs(model, engines.example_for(model)) == found.stages[-1].macs
    assert compress.sparsity(model).share == pytest.approx(0.5, abs=0.01)
    models.save(model, tmp_path / "small.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(models.load(tmp_path / "small.safetensors")(images), model.eval()(images))


def test_the_file_is_the_last_stage(whole, digits):
    _, found, path = whole
    last = found.stages[-1]
    assert path.stat().st_size == last.bytes < found.stages[-2].bytes
    with engines.load(path, "onnxruntime", threads=1) as engine:
        scores = train.evaluate(engines.as_module(engine), digits["test"], progress=False)
    assert scores.main == last.score


def test_what_was_trained_again_is_judged_before_that_too(whole):
    start, prune, low_rank, sparsify, distill, quantize = whole[1].stages
    assert [stage.untrained for stage in (start, distill, quantize)] == [None] * 3
    assert prune.untrained < prune.score  # training mends what removing 40 % broke
    assert min(stage.score for stage in whole[1].stages) > 0.8
    assert sparsify.untrained is not None
    assert low_rank.untrained is not None


def test_all_latencies_are_against_the_start(whole):
    start, *others = whole[1].stages
    assert start.latency is None
    assert all(isinstance(stage.latency, Ratio) for stage in others)


def test_text(whole):
    lines = str(whole[1]).splitlines()
    assert lines[0].split() == ["step", "accuracy", "before", "training", "MACs", "bytes", "time", "of", "a", "batch"]
    assert [line.split()[0] for line in lines[1:]] == [stage.step for stage in whole[1].stages]
    assert f"{whole[1].stages[1].untrained:.2%}" in lines[2]


def test_json(whole):
    stages = whole[1].to_json()["stages"]
    assert stages[0]["latency"] is None
    assert stages[1]["latency"]["low"] == whole[1].stages[1].latency.low


def test_steps_are_read():
    steps = parse_steps("prune=0.5, low_rank=0.7,quantize=int8")
    assert steps == (Step("prune", 0.5), Step("low_rank", 0.7), Step("quantize", "int8"))
    assert ",".join(map(str, steps)) == "prune=0.5,low_rank=0.7,quantize=int8"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no step ''"),
        ("shrink=2", "no step 'shrink'"),
        ("prune", "prune takes a share between 0 and 1"),
        ("prune=0", "prune takes a share between 0 and 1"),
        ("prune=1", "prune takes a share between 0 and 1"),
        ("prune=nan", "prune takes a share between 0 and 1"),
        ("quantize=int3", "quantize takes int8"),
        ("distill=0.5", "distill takes the weights file of a teacher"),
        ("quantize=int8,prune=0.5", "quantize must be the last step"),
        ("sparsify=0.5,low_rank=0.5", "must come before sparsify"),
    ],
)
def test_steps_that_cannot_be(text, says):
    with pytest.raises(CompanionError, match=says) as caught:
        parse_steps(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed=2", "no target 'speed'"),
        ("latency=2", "latency takes a share between 0 and 1"),
        ("bytes=0", "bytes takes a share between 0 and 1"),
        ("points=-1", "points takes points from 0 to 100"),
        ("points=nan", "points takes points from 0 to 100"),
        ("points", "points takes points from 0 to 100"),
        ("latency=0.5,latency=0.7", "latency is there twice"),
    ],
)
def test_targets_that_cannot_be(text, says):
    with pytest.raises(CompanionError, match=says):
        parse_target(text)


def test_targets_are_read():
    assert parse_target("latency=0.5,points=2") == Target(latency=0.5, points=2)
    assert parse_target("bytes=0.25") == Target(bytes=0.25, points=1)


START = Stage("start", 0.95, None, 1000, 4000, None)


@pytest.mark.parametrize(
    ("target", "missed"),
    [
        (Target(), {}),
        (Target(points=0.9), {"points": 1.0}),
        (Target(latency=0.6), {}),
        (Target(latency=0.59), {"latency": 0.6}),
        (Target(bytes=0.25), {}),
        (Target(bytes=0.249), {"bytes": 0.25}),
        (Target(macs=0.4), {}),
        (Target(macs=0.3, latency=0.2), {"latency": 0.6, "macs": 0.4}),
    ],
)
def test_what_a_target_misses(target, missed):
    assert target.missed(Stage("x", 0.94, None, 400, 1000, Ratio(0.6, 0.5, 0.7)), START) == missed


def test_a_score_that_is_no_number_meets_nothing():
    assert Target().missed(Stage("x", float("nan"), None, 400, 1000, None), START).keys() == {"points"}


def test_a_search_keeps_the_most_accurate_that_meets_the_target(network, digits, monkeypatch):
    monkeypatch.setattr(pipeline, "GRID", ("", "prune=0.5"))
    few = Subset(digits["train"], range(400))
    found = compress.search(network, Target(macs=0.6, points=100), few, **QUICK)
    assert [steps for steps, _ in found.tried] == ["", "quantize=int8", "prune=0.5", "prune=0.5,quantize=int8"]
    assert found.best[0] == Step("prune", 0.5)  # the others have all their multiply-adds
    small = compress.search(network, Target(bytes=0.3, macs=0.6, points=100), few, **QUICK)
    assert small.best == parse_steps("prune=0.5,quantize=int8")
    none = compress.search(network, Target(macs=0.01, points=100), few, **QUICK)
    assert none.best is None
    assert str(none).splitlines()[1].startswith("start")


def test_nothing_to_calibrate_with():
    with pytest.raises(CompanionError, match="nothing to calibrate with"):
        next(pipeline.calibration_batches([]))


def test_calibration_batches_are_drawn_without_repetition(digits):
    batches = list(pipeline.calibration_batches(digits["test"], batches=3, batch_size=5, seed=1))
    assert [batch.shape for batch in batches] == [(5, 3, 32, 32)] * 3
    assert len({image.tobytes() for batch in batches for image in batch}) == 15


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (["prune=0.5"], "'prune=0.5' is no step"),
        ([Step("shrink", 0.5)], "no step 'shrink'"),
        ([Step("prune", 2.0)], "prune takes a share between 0 and 1"),
        ([Step("quantize", "int4")], "quantize takes int8, not 'int4'"),
        ([], "there is no step"),
        (None, "None is no step"),
        (5, "5 is no step"),
    ],
)
def test_steps_that_were_not_read_are_checked_too(network, digits, steps, says):
    with pytest.raises(CompanionError, match=says):
        compress.apply_steps(network, steps, digits["train"], digits["test"], **QUICK)


def test_a_teacher_is_looked_at_before_anything_is_trained(network, digits, tmp_path):
    models.save(models.create("simple_cnn", classes=3), tmp_path / "other.safetensors")
    stages = []
    for name, says in (("missing", "there is no weights file"), ("other", "3 classes")):
        with pytest.raises(CompanionError, match=says):
            compress.apply_steps(
                network,
                f"prune=0.5,distill={tmp_path / name}.safetensors",
                digits["train"],
                digits["test"],
                on_stage=stages.append,
                **QUICK,
            )
    assert not stages


def test_a_task_that_cannot_be_taught_is_refused_before_anything_is_trained(tmp_path):
    scenes = datasets.load("digit_scenes", split="test", task="segment")
    unet = models.create("unet", labels=scenes.labels, seed=0)
    models.save(unet, tmp_path / "teacher.safetensors")
    stages = []
    with pytest.raises(CompanionError, match="distillation is for classification"):
        compress.apply_steps(
            unet,
            f"sparsify=0.5,distill={tmp_path}/teacher.safetensors",
            scenes,
            scenes,
            on_stage=stages.append,
            **QUICK,
        )
    assert not stages


def test_a_file_is_no_network(digits):
    with pytest.raises(CompanionError, match=r"a network .* is needed, not str"):
        compress.apply_steps("net.safetensors", "prune=0.5", digits["train"], digits["test"], **QUICK)


def test_a_search_goes_on_without_the_steps_that_cannot_be_done(network, digits, monkeypatch):
    monkeypatch.setattr(pipeline, "GRID", ("", "prune=0.0001", "low_rank=0.9"))
    few = Subset(digits["train"], range(200))
    found = compress.search(network, Target(points=100), few, **QUICK)
    assert {steps for steps, _ in found.tried} == {"", "quantize=int8", "low_rank=0.9", "low_rank=0.9,quantize=int8"}
    assert [steps for steps, _ in found.refused] == ["prune=0.0001"]
    assert str(found).splitlines()[-1].startswith("prune=0.0001 was left out: ")
    with pytest.raises(CompanionError, match="lr"):
        compress.search(network, Target(points=100), few, lr=-1.0, **QUICK)
