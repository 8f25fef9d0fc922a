"""A run killed with SIGKILL at any moment and resumed ends with the same weights, byte for byte."""

import random
import signal
import subprocess
import sys
import time

import pytest

# The command line, but with a checkpoint after every step, so that kills hit the writing of checkpoints too.
PROGRAM = """
import functools
from companion import cli, train
train.fit = functools.partial(train.fit, checkpoint_seconds=0)
cli.main()
"""
ARGUMENTS = ["train", "simple_cnn", "--epochs", "3", "--batch-size", "64", "--threads", "1", "--out"]


def start(folder, name, *more):
    command = [sys.executable, "-c", PROGRAM, *ARGUMENTS, name, *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run never killed, when its training began and when it ended, in seconds from its start."""
    folder = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    process = start(folder, "whole.safetensors")
    assert "parameters" in process.stdout.readline()
    began = time.monotonic() - started
    while "epoch   3" not in process.stdout.readline():
        assert process.poll() is None
    ended = time.monotonic() - started
    finish(process)
    return (folder / "whole.safetensors").read_bytes(), began, ended


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments(whole, tmp_path):
    weights, began, ended = whole
    moments = random.Random(0)
    killed = resumed = 0
    for trial in range(20):
        name = f"run{trial}.safetensors"
        process = start(tmp_path, name)
        assert "parameters" in process.stdout.readline()
        time.sleep(moments.uniform(0, ended - began))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        resumed += (tmp_path / f"{name}.checkpoint").exists()
        if not (tmp_path / name).exists():
            finish(start(tmp_path, name, "--resume"))
        assert (tmp_path / name).read_bytes() == weights, f"kill number {trial}"
    print(f"{killed} of 20 were killed before they ended, {resumed} of them with a checkpoint")
    assert killed >= 15
    assert resumed >= 10


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_killed_again_and_again_until_it_is_done(whole, tmp_path):
    weights, began, ended = whole
    moments = random.Random(1)
    for _ in range(60):
        process = start(tmp_path, "run.safetensors", "--resume")
        try:
            process.communicate(timeout=began + moments.uniform(0, 0.5 * (ended - began)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if (tmp_path / "run.safetensors").exists():
            break
    assert (tmp_path / "run.safetensors").read_bytes() == weights
