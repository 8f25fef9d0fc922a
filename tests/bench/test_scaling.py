"""The bench of data parallel: fewer and shorter measurements, the same rows."""

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
    training, sending = found.rows[: len(scaling.EXCHANGES)], found.rows[len(scaling.EXCHANGES) :]
    assert [row.keys["workers"] for row in training] == [1, 2, 2, 2, 2]
    assert training[0].values["efficiency"].median == 1
    for row in training:
        assert row.values["steps per second"].median == pytest.approx(1000 / row.values["time"].median)
    assert [row.keys["exchanged by"] for row in sending] == list(scaling.ALL_REDUCES)
    assert {row.keys["what"] for row in sending} == {"all-reduce of 64 KiB"}
    assert sending[0].values["times Gloo's"].median == 1


def test_a_round_is_as_long_as_its_slowest_worker():
    assert scaling._slowest([{"a": [1, 5]}, {"a": [2, 3]}]) == {"a": [2, 5]}
