"""`companion train --distributed ddp` under torchrun."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from companion import cli, models, train

COMMAND = ["-m", "companion", "train", "simple_cnn", "--threads", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(folder, *command, **environment):
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, env=os.environ | environment
    )


ARGUMENTS = ["--epochs", "3", "--seed", "3", "--out"]
TWO = [*TORCHRUN, "--nproc-per-node", "2", *COMMAND, "--distributed", "ddp", *ARGUMENTS]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two workers print, and the folder with what they write."""
    folder = tmp_path_factory.mktemp("two")
    done = run(folder, *TWO, "w.safetensors")
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def figures(text):
    """The words that were printed, and the numbers, but for wall times."""
    text = re.sub(r" [\d.]+ s$", "", text, flags=re.MULTILINE)
    number = r"\d[\d.,]*"
    return re.sub(number, "0", text), [float(found.replace(",", "")) for found in re.findall(number, text)]


def test_two_workers_print_and_write_what_one_process_would(two, tmp_path):
    printed, folder = two
    command = [sys.executable, *COMMAND, *ARGUMENTS, "w.safetensors", "--batch-size", "64", "--lr", "6e-3"]
    one = run(tmp_path, *command)
    assert one.returncode == 0, one.stderr
    printed = printed.replace("2 workers (ddp)\n", "", 1)
    (words, found), (expected_words, expected) = figures(printed), figures(one.stdout)
    assert words == expected_words
    # float32: the sums are rounded in another order, and networks enlarge that from step to step.
    assert found == pytest.approx(expected, rel=0.02, abs=0.005)
    assert [path.name for path in folder.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, r"^companion: --distributed ddp is for workers that torchrun starts \(RANK is not set\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"^companion: the workers did not find each other at 127\.0\.0\.1:\d+ \("),
    ],
    ids=["no torchrun", "port taken"],
)
def test_workers_that_cannot_meet_say_so(environment, sentence, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if environment:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = run(tmp_path, sys.executable, *COMMAND, "--distributed", "ddp", **environment)
    assert done.returncode == 1
    assert re.search(sentence, done.stderr, re.MULTILINE), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_a_worker_is_killed_and_the_run_goes_on(two, tmp_path):
    # A checkpoint at every step, so that there is one by then.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'companion' in sys.argv[0] or '-m' in sys.orig_argv and 'companion' in sys.orig_argv:\n"
        "    import functools\n    from companion import train\n"
        "    train.fit = functools.partial(train.fit, checkpoint_seconds=0)\n"
    )
    process = subprocess.Popen(
        [*TWO, "w.safetensors"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"},
    )
    assert process.stdout is not None
    while "epoch   1" not in (line := process.stdout.readline()):
        assert line
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in children if b"--distributed" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (tmp_path / "w.safetensors").exists()
    resumed = run(tmp_path, *TWO, "w.safetensors", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch   1" not in resumed.stdout
    assert (tmp_path / "w.safetensors").read_bytes() == (two[1] / "w.safetensors").read_bytes()


def test_a_worker_lost_at_the_last_moment_costs_the_score_only(tmp_path, monkeypatch, capsys):
    def lose(*args, **options):
        raise train.WorkersLost(train.ALONE)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "evaluate", lose)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "simple_cnn", "--epochs", "1", "--threads", "1", "--out", "w.safetensors"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "companion: w.safetensors is saved, and was not judged, for a worker was lost: "
        "`companion evaluate w.safetensors --data digits` does it.\n"
    )
    models.load("w.safetensors")


RESTARTED = """
import os
from pathlib import Path
from companion import train
with train.joined("ddp") as workers:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and workers.rank == 1:
        os._exit(9)
    Path(f"{workers.rank}.txt").write_text(str(sum(workers.gather(1))))
"""


def test_torchrun_starts_them_again(tmp_path):
    """Those of the first time left their addresses in torchrun's store."""
    (tmp_path / "script.py").write_text(RESTARTED)
    done = run(tmp_path, *TORCHRUN, "--nproc-per-node", "3", "--max-restarts", "1", "script.py")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)] == ["3"] * 3
