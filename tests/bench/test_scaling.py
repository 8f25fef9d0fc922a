"""The bench of data parallel: fewer and shorter measurements, the same rows."""

from importlib.util import find_spec

import pytest

from companion import bench
from companion.bench import scaling
from companion.metrics import results


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    monkeypatch.setattr(scaling, "STEPS", 1)
    monkeypatch.setattr(scaling, "NETWORK", "simple_cnn")
    monkeypatch.setattr(scaling, "SIZES", (scaling.SIZES[1],))
    found = bench.run(bench.get("scaling"), out=tmp_path / "scaling.json")
    assert found == results.read(tmp_path / "scaling.json")
    training = [row for row in found.rows if "efficiency" in row.values]
    sending = [row for row in found.rows if row not in training]
    horovod = scaling.HOROVOD if find_spec("horovod") else ()
    names = ["–", "nothing", scaling.DDP, *horovod, *scaling.BY_HAND]
    assert [row.keys["exchanged by"] for row in training] == names
    assert [row.keys["workers"] for row in training] == [1] + [2] * (len(names) - 1)
    assert training[0].values["efficiency"].median == training[2].values["steps for each of DDP's"].median == 1
    for row in training:
        assert row.values["steps per second"].median == pytest.approx(1000 / row.values["time"].median)
    assert [row.keys["exchanged by"] for row in sending] == 2 * list(scaling.ALL_REDUCES)
    assert [row.keys["workers"] for row in sending] == [2, 2, 2, 4, 4, 4]
    assert {row.keys["what"] for row in sending} == {"all-reduce of 64 KiB"}
    assert sending[0].values["times Gloo's"].median == 1


def test_a_round_is_as_long_as_its_slowest_worker():
    assert scaling._slowest([{"a": [1, 5]}, {"a": [2, 3]}]) == {"a": [2, 5]}
