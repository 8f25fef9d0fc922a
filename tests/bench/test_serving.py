"""The bench of servers on one connection count, few moments each: real processes, every answer checked."""

import math
import statistics
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")

from companion import CompanionError, models
from companion.bench import servers, serving, told
from companion.metrics import results


@pytest.mark.timeout(600)
def test_rows_of_every_server_fit_into_a_record(monkeypatch):
    for name, value in {
        "ROUNDS": 1,
        "SECONDS": 0.2,
        "PLAIN": ("blank", "synchronous"),
        "POLICIES": (("idle", 2), ("fixed", 100)),
    }.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(told, "CALLS", 10)
    found = serving._measure(2)
    rows = {row.keys["server"]: row.flat() for row in found}
    batches = ["batches, idle, 2 ms", "batches, fixed, 100 ms"]
    assert list(rows) == ["blank", "synchronous", *batches, serving.TOLD]
    assert {row["connections"] for row in rows.values()} == {2}
    for name in list(rows)[:-1]:
        assert rows[name]["wrong or missing"] == 0
        assert rows[name]["p50"] <= rows[name]["p99"]
    # Two clients and a wait of 100 ms: no more than one batch of both in that time, and most of it is waiting.
    assert rows[batches[1]]["p50"] >= 50
    assert rows[batches[1]]["requests per second"] <= 40
    assert 1 <= rows[batches[0]]["mean batch"] <= 2
    known = rows[serving.TOLD]
    assert 0 < known["call of 1 in ms"] < known["call of 32 in ms"]
    assert 0 < known["http in ms"] < rows[batches[0]]["p50"]
    results.dumps(results.record("serving", found))  # they fit together


def test_foretold_values_say_how_far_off_they_are():
    known = told.Told({1: 0.01, 3: 0.02}, http=0, away=0, generator=0, wake=0, shared=0)
    assert known.cost(2) == pytest.approx(0.015)
    row = results.Row({"server": "a", "connections": 1}, {"requests per second": 80.0, "p50": 20.0})
    values = serving._foretold(known, row, "idle", 2, 1).values
    assert values["foretold requests per second"] == pytest.approx(100, rel=0.01)
    assert values["requests per second off by %"] == pytest.approx(25, abs=1)
    assert values["foretold p50"] == pytest.approx(10)
    assert values["p50 off by %"] == pytest.approx(-50)
    assert values["foretold mean batch"] == 1


def test_a_lock_that_is_shared_is_told_from_one_that_is_not(monkeypatch):
    monkeypatch.setattr(told, "BURST", 0.01)  # half of the call: more than a busy machine makes of nothing

    def sleeps(items):
        time.sleep(0.02)
        return items

    def computes(items):
        end = time.thread_time() + 0.02  # of this thread: it waits for the interpreter's lock
        while time.thread_time() < end:
            pass
        return items

    free = statistics.median(told.shared(sleeps, [b""], calls=20) for _ in range(3))
    locked = statistics.median(told.shared(computes, [b""], calls=20) for _ in range(3))
    assert 0 <= free < locked <= 1


def test_a_form_has_every_image():
    request = told.form([b"one", b"two"])
    assert request.content_type == "multipart/form-data; boundary=image-file"
    assert request.body.split(b"--image-file")[0] == b""
    parts = request.body.split(b"--image-file")[1:]
    assert [part.partition(b"\r\n\r\n")[2] for part in parts] == [b"one\r\n", b"two\r\n", b""]


def test_the_pictures_are_what_they_say():
    from companion.datasets.images import decode

    files = serving.pictures(3, 32)
    assert len(set(files)) == 3
    assert [tuple(decode(file, "it").shape) for file in files] == [(3, 32, 32)] * 3


def test_a_server_that_cannot_start_says_why(tmp_path):
    said = r"the server did not start; it said: .*none\.safetensors"
    with pytest.raises(CompanionError, match=said), servers.batching(tmp_path / "none.safetensors"):
        pass


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(servers, "PATIENCE", 1.0)
    with (
        pytest.raises(CompanionError, match="the server did not start; it said: nothing"),
        servers.running("timeit", "-n1", "-r1", "import time; time.sleep(100)"),
    ):
        pass


def test_plain_servers_answer_as_the_network_does(tmp_path):
    from companion.serve.load import Request, load

    model = tmp_path / "cnn.safetensors"
    models.save(models.create("simple_cnn", seed=0), model)
    image = serving.pictures(1)[0]
    (answer,) = servers.classifier(model)([image])
    with servers.plain(model) as server:
        found = load(
            server.at("threads").url, [Request(image, "image/png", [answer.class_id])], concurrency=4, seconds=0.3
        )
        assert found.failures == {}
        assert len(found.latencies) >= 4
        spent = server.cpu()
    assert math.isnan(spent) or spent > 0
    assert server.process.returncode is not None
    assert np.isfinite(found.latencies).all()
