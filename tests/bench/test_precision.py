"""The reference run of 2.2.2, on a small network, few images and few rounds."""

import os
import statistics

import pytest
import torch

from companion import datasets
from companion.bench import precision
from companion.datasets.arrays import ArrayImages
from companion.train.amp import Precision


@pytest.fixture(autouse=True)
def small(monkeypatch):
    digits = datasets.load("digits", split="train")
    few = ArrayImages("few", digits.images[:64].numpy(), digits.targets[:64].numpy(), digits.labels)
    monkeypatch.setattr(precision, "_data", lambda split: few)
    for name, value in {
        "NETWORKS": {"cifar_resnet14": 2, "cifar_resnet20": 2},
        "SECONDS": 0.05,
        "ROUNDS": 6,
        "EPOCHS": 1,
        "SEEDS": (0, 1),
    }.items():
        monkeypatch.setattr(precision, name, value)


def test_steps_are_compared_with_the_best_plain_way_and_with_the_default():
    rows = {row.keys["variant"]: row for row in precision._on_cpu("cifar_resnet14")}
    assert list(rows) == ["fp32, default layout", "fp32, channels last", "bf16, channels last"]
    assert rows["fp32, channels last"].values["speed-up"] == 1
    assert rows["fp32, default layout"].values["over default layout"] == 1
    assert {(row.keys["where"], row.keys["batch"]) for row in rows.values()} == {("CPU", 2)}
    for row in rows.values():
        assert row.values["at least"] <= row.values["speed-up"] <= row.values["at most"]


def test_the_ratio_to_the_default_layout_is_taken_round_by_round(monkeypatch):
    samples = {"fp32, default layout": (4.0, 9.0, 2.0), "fp32, channels last": (2.0, 3.0, 2.0)}

    def compare(steps, **options):
        from companion.metrics import Comparison, Latency

        return Comparison("fp32, channels last", {n: Latency(s, 1, 1.0, 1, "cpu") for n, s in samples.items()}, {})

    monkeypatch.setattr(precision.metrics, "compare_latency", compare)
    rows = precision._on_cpu("cifar_resnet14")
    expected = statistics.median([4 / 2, 9 / 3, 2 / 2])
    assert [row.values["over default layout"] for row in rows] == [1, expected]


def test_without_instructions_runs_in_a_process_of_its_own_and_leaves_ours_alone(monkeypatch):
    monkeypatch.delenv(precision.ISA, raising=False)
    seen = {}

    class Pool:
        def __init__(self, workers, mp_context, initializer, initargs):
            assert (initializer, initargs) == (torch.set_num_threads, (1,))
            assert mp_context.get_start_method() == "spawn"  # a fork would have oneDNN already started

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments, **options):
            seen["isa"] = os.environ[precision.ISA]
            rows = function(*arguments, **options)
            return type("Future", (), {"result": lambda self: rows})()

    monkeypatch.setattr(precision, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    rows = precision._on_cpu("cifar_resnet20", instructions=False)
    assert seen == {"isa": "AVX512_CORE"}
    assert {row.keys["where"] for row in rows} == {"CPU, its bf16 instructions off"}
    assert precision.ISA not in os.environ
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert precision._on_cpu("cifar_resnet20", instructions=False) == []


def test_a_step_computes_in_its_format_and_changes_no_weight(monkeypatch):
    entered = []
    autocast = Precision.autocast
    monkeypatch.setattr(Precision, "autocast", lambda self: entered.append(self.name) or autocast(self))
    made = []
    create = precision.models.create
    monkeypatch.setattr(precision.models, "create", lambda *a, **k: made.append(create(*a, **k)) or made[-1])
    step = precision._step("cifar_resnet14", 2, "bf16", torch.channels_last, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in made[0].parameters()]
    step()
    assert entered == ["bf16"]
    assert all(torch.equal(a, b) for a, b in zip(before, made[0].parameters(), strict=True))
    assert made[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_accuracy_is_that_of_all_seeds(name):
    (row,) = precision._accuracy(name)
    found = row.values
    assert 0 <= found["lowest"] <= found["accuracy in %"] <= found["highest"] <= 100
    assert row.keys["variant"] == f"{name}, 1 epochs of hard_digits"


def test_the_cells_have_names_of_their_own_and_rows_of_one_kind():
    cells = list(precision.BENCH.cells())
    assert len({cell.key for cell in cells}) == len(cells) == 7
    if not torch.cuda.is_available():
        assert [cell.measure() for cell in cells if "GPU" in cell.key] == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_formats_are_compared_on_a_gpu_with_their_memory(monkeypatch):
    monkeypatch.setattr(precision, "GPU_NETWORKS", {"cifar_resnet14": 32})
    rows = {row.keys["variant"]: row.values for row in precision._on_gpu("cifar_resnet14")}
    assert list(rows) == [f"{name}, channels last" for name in ("fp32", "tf32", "bf16", "fp16")]
    assert rows["bf16, channels last"]["MiB of a step"] < rows["fp32, channels last"]["MiB of a step"]
