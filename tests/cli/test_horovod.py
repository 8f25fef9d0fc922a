"""`companion train --distributed horovod` under horovodrun: whole runs, and runs that lose workers."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from companion import models
from companion.train.horovod import read_timeline

pytestmark = [
    pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built here (make horovod)"),
    pytest.mark.timeout(600),
]

HOROVODRUN = Path(sys.executable).with_name("horovodrun")
TRAIN = [sys.executable, "-m", "companion", "train", "simple_cnn", "--threads", "1", "--distributed", "horovod"]
MORE = ["--epochs", "5", "--seed", "3", "--out", "w.safetensors"]
# One worker of the machine under each of its names: Horovod gives no more work to a host whose worker died.
HOSTS = ("localhost", "127.0.0.1", socket.gethostname())

# A checkpoint at every step, so that there always is one.
EAGER = """
import sys
if "companion" in sys.orig_argv:
    import functools
    from companion import train
    train.fit = functools.partial(train.fit, checkpoint_seconds=0)
"""


def environment(folder):
    """Without the guard against networks, which takes this machine's own name for another's."""
    (folder / "sitecustomize.py").write_text(EAGER)
    return os.environ | {"PYTHONPATH": str(folder)}


def start(folder, workers, *options, more=()):
    return subprocess.Popen(
        [HOROVODRUN, "-np", str(workers), "--gloo-timeout-seconds", "5", *options, *TRAIN, *MORE, *more],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder),
    )


def elastic(folder, *, more=()):
    script = folder / "hosts.sh"
    script.write_text("#!/bin/sh\n" + "".join(f"echo {host}:1\n" for host in HOSTS))
    script.chmod(0o755)
    options = ["--min-np", "2", "--max-np", "3", "--network-interfaces", "lo", "--host-discovery-script", "./hosts.sh"]
    return start(folder, 3, *options, more=more)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def workers_of(folder):
    """The processes that train in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                # Not horovodrun, which has the same words later on.
                if words[:3] == [os.fsencode(word) for word in TRAIN[:3]] and (entry / "cwd").samefile(folder):
                    found.append(int(entry.name))
            except OSError:  # it just ended
                pass
    return found


def epochs(out):
    """(epoch, loss) as printed, each line once, by the first worker."""
    return [(int(n), float(loss)) for n, loss in re.findall(r"epoch +(\d+)   loss +([\d.]+)", out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three workers that nobody disturbs: what it prints, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return finish(start(folder, 3, "--timeline-filename", folder / "timeline.json")), folder


def test_three_workers_print_once_and_write_one_file(whole):
    out, folder = whole
    assert out.count("3 workers (horovod)") == 1
    assert [number for number, _ in epochs(out)] == [1, 2, 3, 4, 5]
    assert float(re.search(r"test  accuracy ([\d.]+) %", out)[1]) > 90
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "sitecustomize.py",
        "timeline.json",
        "w.safetensors",
    }
    sent = Counter(exchange.tensor for exchange in read_timeline(folder / "timeline.json"))
    steps = 5 * math.ceil(1131 / (3 * 32))  # of 1257 images a tenth is held out
    gradients = {f"allreduce.{name}": steps for name, _ in models.create("simple_cnn").named_parameters()}
    assert {name: sent[name] for name in gradients} == gradients


def test_it_is_the_run_of_one_process(whole, tmp_path):
    command = [word for word in TRAIN if word not in ("--distributed", "horovod")]
    done = subprocess.run(
        [*command, *MORE, "--batch-size", "96", "--lr", "9e-3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for (_, loss), (_, expected) in zip(epochs(whole[0]), epochs(done.stdout), strict=True):
        assert loss == pytest.approx(expected, rel=0.02)


def kill_one(folder, whole, trial):
    """Kill one of three elastic workers in the middle of an epoch; the rest must end as the whole run did."""
    process = elastic(folder)
    lines = []
    try:
        while len(epochs("".join(lines))) < 1 + trial % 3:
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        time.sleep(0.04 * trial)
        os.kill(workers_of(folder)[trial % 3], signal.SIGKILL)
        out = "".join(lines) + finish(process)
        assert workers_of(folder) == []
    finally:
        process.kill()  # if something else was wrong; its workers end with it
    assert [number for number, _ in epochs(out)] == [1, 2, 3, 4, 5]  # none twice: each epoch's end is committed
    for (_, loss), (_, expected) in zip(epochs(out), epochs(whole[0]), strict=True):
        assert loss == pytest.approx(expected, rel=0.02)
    assert (folder / "w.safetensors").exists()
    assert not (folder / "w.safetensors.checkpoint").exists()


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_a_run_survives_the_loss_of_a_worker_ten_times(whole, tmp_path):
    for trial in range(10):
        folder = tmp_path / str(trial)
        folder.mkdir()
        kill_one(folder, whole, trial)


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_all_are_killed_and_the_run_is_resumed(tmp_path):
    """With two workers, whose sums cannot be rounded in two orders, to the last byte."""
    (tmp_path / "whole").mkdir()
    finish(start(tmp_path / "whole", 2))
    process = start(tmp_path, 2)
    while "epoch   2" not in (line := process.stdout.readline()):
        assert line
    for pid in [*workers_of(tmp_path), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(tmp_path) == []
    assert (tmp_path / "w.safetensors.checkpoint").exists()
    out = finish(start(tmp_path, 2, more=["--resume"]))
    assert epochs(out)[0][0] > 1
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "whole" / "w.safetensors").read_bytes()


def test_what_horovodrun_did_not_start_is_refused(tmp_path):
    done = subprocess.run(TRAIN, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("companion: --distributed horovod is for workers that horovodrun starts: ")
    assert done.stderr.count("\n") == 1
