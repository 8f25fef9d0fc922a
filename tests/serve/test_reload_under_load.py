"""A model's file that changes while the server answers."""

import os
import signal
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
from process_cases import coloured, colours_file, post, post_files, started, until

from companion.serve.load import Request, load

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]


@pytest.fixture
def files(tmp_path):
    """A network, the one that counts backwards, and a name under which either is served."""
    for name in ("forwards", "backwards"):
        (tmp_path / name).mkdir()
    forwards = colours_file(tmp_path / "forwards")
    backwards = colours_file(tmp_path / "backwards", backwards=True)
    return forwards.read_bytes(), backwards.read_bytes(), tmp_path / "served.onnx"


def put(content, path):
    """Replace a file in one step, as one should."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def reloads(server, outcome):
    return server.metric("companion_reloads_total", outcome=outcome)


def test_reloads_under_load_fail_no_request(tmp_path, files):
    """Ten times: each answer is all of the old network or all of the new one, and in the end the new one's."""
    forwards, backwards, served = files
    put(forwards, served)
    numbers = [1, 2, 3, 100, 200]
    with started(tmp_path, served) as server:
        ended, mixed, answers = threading.Event(), [], 0

        def ask_for_many():
            nonlocal answers
            while not ended.is_set():
                answer = post_files(server.url, [coloured(number) for number in numbers])
                found = answer.json().get("predictions")
                answers += 1
                if found not in (numbers, [254 - number for number in numbers]):
                    mixed.append((answer.status_code, found))

        def turn_over():
            for turn in range(10):
                put(backwards if turn % 2 == 0 else forwards, served)
                server.process.send_signal(signal.SIGHUP)
                until(lambda turn=turn: reloads(server, "done") == turn + 1)
                expected = 254 - 7 if turn % 2 == 0 else 7
                assert post(server.url, coloured(7)).json()["predictions"] == [expected]
                turns.append(turn)

        turns = []
        threads = [threading.Thread(target=what) for what in (ask_for_many, turn_over)]
        for thread in threads:
            thread.start()
        failures = {}
        while threads[1].is_alive():
            found = load(f"{server.url}/predict", [Request(coloured(9), "image/png")], concurrency=16, seconds=1)
            failures |= found.failures
        ended.set()
        for thread in threads:
            thread.join(120)
        assert server.stop() == 0
    assert turns == list(range(10))
    assert failures == {}
    assert mixed == []
    assert answers > 10
    assert server.faults() == []


def test_a_damaged_file_leaves_the_old_network_in_its_place(tmp_path, files):
    forwards, backwards, served = files
    put(forwards, served)
    with started(tmp_path, served) as server:
        put(backwards[:-100], served)
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda: reloads(server, "failed") == 1)
        assert post(server.url, coloured(7)).json()["predictions"] == [7]
        put(backwards, served)
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda: reloads(server, "done") == 1)
        assert post(server.url, coloured(7)).json()["predictions"] == [254 - 7]
        assert server.stop() == 0
