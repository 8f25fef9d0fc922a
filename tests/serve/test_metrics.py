"""What a server counts."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve.batching import BatchReport
from companion.serve.counted import Counted, ModelCounts
from companion.serve.image import image_app
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, post, red, serving, until


def test_stats_are_what_was_noted():
    counted = Counted()
    counts = ModelCounts(counted, "m")
    counts.batch(BatchReport(3, (0.0005, 0.0015, 0.3), 0.01, 1))
    counts.batch(BatchReport(32, (0.0,) * 32, 0.02, 0))
    counts.depth.set(7)
    for status, cause in ((200, None), (200, None), (503, None), (503, "shutting_down"), (413, "too_many_items")):
        counts.request(status, cause)
    counts.reload("done")
    stats = counted.stats()
    model = stats["models"]["m"]
    assert json.loads(json.dumps(stats)) == stats
    assert model["requests"] == {"200": 2, "503": 2, "413": 1}
    assert model["rejected"] == {"queue_full": 1, "shutting_down": 1, "too_many_items": 1}
    assert model["reloads"] == {"done": 1}
    assert (model["failed_items"], model["queue_items"]) == (1, 7)
    sizes = model["batch_size"]
    assert (sizes["count"], sizes["sum"]) == (2, 35)
    assert [bucket for bucket in sizes["buckets"] if bucket[1]] == [[4.0, 1], [32.0, 1]]
    assert [bucket for bucket in model["queue_seconds"]["buckets"] if bucket[1]] == [
        [0.0001, 32],
        [0.0005, 1],
        [0.002, 1],
        [0.5, 1],
    ]
    assert model["answer_seconds"]["sum"] == pytest.approx(0.302 + 3 * 0.01 + 32 * 0.02)


def test_causes_of_requests_that_had_no_answer():
    settings = Settings(max_bytes=2000, max_items=2, token="x")
    with serving(image_app(Slow(), settings=settings)) as url:
        known = {"authorization": "Bearer x"}
        post(url, red(1))
        post(url, b"no image", **known)
        post(url, b"x" * 3000, **known)
        post(url, red(1), "text/plain", **known)
        post(url, b"x", "multipart/form-data", **known)
        httpx.post(f"{url}/predict", files=[("files", red(i)) for i in range(3)], headers=known, timeout=60)
        stats = httpx.get(f"{url}/stats", timeout=60).json()
        text = httpx.get(f"{url}/metrics", timeout=60).text
    assert stats["workers"] == 1
    assert stats["models"]["model"]["rejected"] == {
        "token": 1,
        "bad_item": 1,
        "too_large": 1,
        "unsupported_type": 1,
        "bad_form": 1,
        "too_many_items": 1,
    }
    assert 'companion_rejected_total{cause="too_many_items",model="model"} 1.0' in text


def test_the_queue_is_told_while_the_model_works():
    def queued():
        return httpx.get(f"{url}/stats", timeout=60).json()["models"]["model"]["queue_items"]

    engine = Slow()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        threads = [threading.Thread(target=post, args=(url, red(number))) for number in range(4)]
        threads[0].start()
        until(lambda: len(engine.sizes) > calls)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(app.service.batcher.queue) == 3)
        busy = queued()
        engine.gate.set()
        for thread in threads:
            thread.join(60)
        assert (busy, queued()) == (3, 0)


WORKER = """
import sys
from companion.serve.batching import BatchReport
from companion.serve.counted import Counted, ModelCounts
counted = Counted()
counts = ModelCounts(counted, "m")
counted.ready.set(1)
counts.request(200)
counts.batch(BatchReport(2, (0.1, 0.2), 0.1, 0))
counts.depth.set(5)
print(counted.stats(), flush=True)
sys.stdin.read()
"""


def test_workers_are_added_up_and_the_dead_have_no_queue(tmp_path, monkeypatch):
    from companion.serve import counted

    environment = {**os.environ, counted.FOLDER: str(tmp_path)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.stdout.readline()
    monkeypatch.setenv(counted.FOLDER, str(tmp_path))
    both = Counted().stats()
    workers[0].kill()
    workers[0].communicate()
    counted.forget(workers[0].pid, str(tmp_path))
    one = Counted().stats()
    workers[1].communicate()
    assert both["workers"] == 2
    assert both["models"]["m"]["queue_items"] == 10
    assert both["models"]["m"]["batch_size"]["sum"] == 4
    assert one["workers"] == 1
    assert one["models"]["m"]["queue_items"] == 5
    assert one["models"]["m"]["requests"] == {"200": 2}
