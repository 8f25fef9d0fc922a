"""`companion serve` and `companion load`, as a user starts them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from companion import models

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "m.safetensors"
    models.save(models.create("simple_cnn", seed=0), path)
    return path


USUAL = ("starting", "ready", "ending", "ended")
NOBODY = "http://127.0.0.1:9/predict"


def start(weights, *options, **environment):
    """The process and its address, which it prints when it listens."""
    command = [sys.executable, "-m", "companion", "serve", "image", "--model", weights, "--port", "0", *options]
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    found = re.fullmatch(rf"{re.escape(str(weights))} at (http://127\.0\.0\.1:\d+)/predict; Ctrl-C ends it\n", line)
    assert found, (line, process.communicate())
    return process, found.group(1)


def ready(url):
    while True:
        try:
            return urllib.request.urlopen(f"{url}/ready", timeout=60)
        except OSError:  # it listens, and is not yet there
            time.sleep(0.05)


def stop(process, how=signal.SIGTERM):
    """The exit code, and what was logged, without what all runs log."""
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert out == ""
    lines = [json.loads(line) for line in err.splitlines()]
    return process.returncode, [line for line in lines if line["message"] not in USUAL]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_load_and_end(weights, call, how):
    process, url = start(weights)
    ready(url)
    try:
        code, out, err = call("load", f"{url}/predict", "--concurrency", "4", "--seconds", "0.5", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["failures"] == {}
        assert found["answers"] > 10
        code, out, _ = call("load", f"{url}/predict", "--rate", "50", "--seconds", "0.5")
        assert code == 0
        assert re.search(r"^\d+ right answers in \d+\.\d s, \d+ a second\n +p50 +\d+\.\d\d ms\n", out)
    finally:
        ended = stop(process, how)
    assert ended == (0, [])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_as_soon_as_it_listens(weights, how):
    process, _ = start(weights)
    assert stop(process, how) == (0, [])


def test_two_workers_on_one_port_count_together(weights, call):
    process, url = start(weights, "--workers", "2", "--policy", "hold", COMPANION_SERVE_TOKEN="secret")
    try:
        ready(url)
        code, out, _ = call(
            "load", f"{url}/predict", "--concurrency", "8", "--seconds", "1", "--token", "secret", "--json"
        )
        found = json.loads(out)
        assert (code, found["failures"]) == (0, {})
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        counted = float(re.search(r'(?m)^companion_requests_total\{model="m",status="200"\} (\S+)$', text).group(1))
        assert counted == found["answers"] + 64  # each image was sent alone first
        code, out, err = call("load", f"{url}/predict", "--token", "wrong")
        assert (code, err) == (1, f"companion: {url}/predict has no predictions for request 0: it answered 401.\n")
    finally:
        stop(process)


def test_wrong_calls(weights, call, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    for arguments, said in (
        (["serve", "sound", "--model", weights], "there is no server for 'sound': choose image or text"),
        (["serve", "image", "--model", tmp_path / "none.onnx"], "there is no file"),
        (["serve", "image", "--model", tmp_path / "a.onnx"], "is not an ONNX file or is damaged"),
        (["serve", "image", "--model", weights, "--policy", "eager"], "policy is 'eager': Input should be 'idle'"),
        (["serve", "image", "--model", weights, "--max-batch", "0"], "max_batch is 0: Input should be greater"),
        (["serve", "image", "--model", weights, "--grace", "inf"], "grace is inf: Input should be less"),
        (["serve", "image", "--model", weights, "--engine", "x"], "there is no engine 'x'"),
        (["load", NOBODY], "nobody answers at http://127.0.0.1:9/predict: connection refused"),
        (["load", NOBODY, "--rate", "1", "--concurrency", "1"], "give either --concurrency or --rate"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (1, ""), arguments
        assert said in err
        assert err.startswith("companion: ")
        assert err.count("\n") == 1


def test_a_port_that_is_taken(weights):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "companion", "serve", "image", "--model", weights, "--port", port]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"companion: the address 127.0.0.1:{port} is taken: choose another --port.\n"


def children(process):
    """The process ids of the workers."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
    return {pid for pid, name in names.items() if b"spawn_main" in name}


def answers(url):
    while True:
        try:
            with urllib.request.urlopen(f"{url}/stats", timeout=60) as answer:
                return json.load(answer)
        except OSError:  # it reached a worker that was just killed
            time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_worker_that_is_killed_is_replaced_and_all_reload(weights, tmp_path):
    copy = tmp_path / "m.safetensors"
    copy.write_bytes(weights.read_bytes())
    process, url = start(copy, "--workers", "2")
    try:
        first = children(process)
        assert len(first) == 2
        assert answers(url)["workers"] == 2
        os.kill(min(first), signal.SIGKILL)
        seen = set()
        while (now := children(process)) == first or len(now) < 2 or answers(url)["workers"] < 2:
            seen.add(answers(url)["workers"])  # the other one answers on
            time.sleep(0.05)
        assert len(now & first) == 1
        process.send_signal(signal.SIGHUP)
        while answers(url)["models"]["m"].get("reloads") != {"done": 2}:
            time.sleep(0.05)
        copy.write_bytes(b"x")
        process.send_signal(signal.SIGHUP)
        while answers(url)["models"]["m"]["reloads"] != {"done": 2, "failed": 2}:
            time.sleep(0.05)
    finally:
        code, lines = stop(process)
    assert code == 0
    messages = [line["message"] for line in lines]
    assert messages.count("a worker died; another takes its place") == 1
    assert messages.count("reloaded") == 2
    assert messages.count("the new file cannot be served; the old model goes on") == 2
    assert len(messages) == 5


def test_models_by_name_and_a_token_from_a_file(weights, call, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    process, url = start(weights, "--token-file", tmp_path / "token")
    try:
        code, out, _ = call("load", f"{url}/predict/m", "--concurrency", "2", "--seconds", "0.2", "--token", "secret")
        assert code == 0, out
        code, _, err = call("load", f"{url}/predict/m", "--concurrency", "2", "--seconds", "0.2")
        assert (code, err.partition(": it")[2]) == (1, " answered 401.\n")
    finally:
        assert stop(process) == (0, [])
