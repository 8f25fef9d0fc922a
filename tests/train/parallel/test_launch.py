"""The launcher: answers by rank, one sentence for each way to fail, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from companion.errors import CompanionError
from companion.train.parallel import WorkerError, launch


def total(x):
    t = torch.tensor(float(x) * (distributed.get_rank() + 1))
    distributed.all_reduce(t)
    print("saw", distributed.get_world_size())
    return os.getpid(), t.item(), torch.get_num_threads()


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(processes, seconds=10.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, processes))


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc which processes live")


@needs_proc
def test_answers_by_rank_and_nobody_left(capsys):
    answers = launch(total, 3, 2)
    processes, sums, threads = zip(*answers, strict=True)
    assert sums == (12.0, 12.0, 12.0)
    assert threads == (1, 1, 1)
    assert len(set(processes)) == 3
    assert not any(map(alive, processes))
    assert capsys.readouterr().out.splitlines() == ["[0] saw 3", "[1] saw 3", "[2] saw 3"]


def test_a_function_of_a_notebook_can_be_sent():
    factor = 5
    # As in a notebook: of a module that no other process can import.
    scope = {"__name__": "__main__", "distributed": distributed, "factor": factor}
    exec("class Answer:\n    value = 3\ndef work():\n    return distributed.get_rank() * factor, Answer()", scope)
    answers = launch(scope["work"], 2)
    assert [answer[0] for answer in answers] == [0, 5]
    assert answers[1][1].value == 3


def test_a_script_without_a_guard_can_launch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from companion.train.parallel import launch\nprint(launch(lambda: 'here', 2))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "['here', 'here']\n", done.stderr


def fail(rank):
    if distributed.get_rank() == rank:
        raise KeyError("boom")
    distributed.barrier()  # waits for the one that failed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_raises(rank):
    with pytest.raises(WorkerError, match=rf"^worker {rank} of 2 failed: KeyError: 'boom'\.\n") as caught:
        launch(fail, 2, rank)
    assert 'raise KeyError("boom")' in caught.value.detail
    assert caught.value.__notes__ == [caught.value.detail]
    assert "_work" not in caught.value.detail


def explains(how):
    if how == "lines":
        raise RuntimeError("the device gave up\nCompile with another option to see more.")
    error = ValueError("boom")
    error.add_note("a note")
    raise error


@pytest.mark.parametrize(
    ("how", "sentence"), [("lines", "RuntimeError: the device gave up"), ("note", "ValueError: boom")]
)
def test_the_sentence_is_the_first_of_an_error(how, sentence):
    with pytest.raises(WorkerError, match=rf"^worker 0 of 1 failed: {sentence}\.\n"):
        launch(explains, 1, how)


def dies(how):
    print("last words", flush=True)
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(7)
    distributed.barrier()


@pytest.mark.parametrize(("how", "sentence"), [("killed", "was killed by SIGKILL"), ("exit", "ended with exit code 7")])
def test_a_worker_that_dies(how, sentence):
    with pytest.raises(WorkerError, match=f"worker 1 of 2 {sentence}") as caught:
        launch(dies, 2, how)
    assert "last words" in caught.value.detail


def waits_for_nobody(folder):
    (Path(folder) / str(os.getpid())).touch()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(folder) / str(child.pid)).touch()
    if distributed.get_rank() == 0:
        distributed.barrier()


@needs_proc
def test_a_hang_ends_and_says_where(tmp_path):
    with pytest.raises(WorkerError, match=r"^worker 0 of 2 did not end within 25 s\.\n") as caught:
        launch(waits_for_nobody, 2, tmp_path, timeout=25)
    assert "waits_for_nobody" in caught.value.detail
    assert "barrier" in caught.value.detail
    started = [int(path.name) for path in tmp_path.iterdir()]
    assert len(started) == 4  # two workers and a child of each
    assert gone(started)


@needs_proc
def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    program = (
        "import os, subprocess, sys, time\nfrom pathlib import Path\nfrom companion.train.parallel import launch\n"
        f"folder = {str(tmp_path)!r}\n"
        "def work():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    for pid in (os.getpid(), child.pid):\n"
        "        (Path(folder) / str(pid)).touch()\n"
        "    time.sleep(600)\n"
        "launch(work, 2)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 4:
        assert launcher.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    assert gone([int(path.name) for path in tmp_path.iterdir()])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"workers": 1.5}, "workers is 1.5"),
        ({"workers": 2, "timeout": 0}, "timeout is 0"),
        ({"workers": 2, "backend": "mpi"}, "no backend 'mpi'"),
        ({"workers": 99, "backend": "nccl"}, "99 workers over nccl need as many GPUs"),
    ],
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(CompanionError, match=sentence):
        launch(total, **options)


def test_what_cannot_be_pickled_is_refused():
    with pytest.raises(CompanionError, match="cannot be sent to a process"):
        launch(total, 2, (i for i in range(3)))
