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
    """The weights of a run never killed, and when its first step began and its last ended.

    In seconds from the line that it prints before the training: importing torch takes longer than this training.
    """
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, "whole.safetensors")
    assert "parameters" in process.stdout.readline()
    printed = time.monotonic()
    ends = []
    for epoch in (1, 2, 3):
        while f"epoch   {epoch}" not in process.stdout.readline():
            assert process.poll() is None
        ends.append(time.monotonic() - printed)
    finish(process)
    began = max(0.0, ends[0] - (ends[2] - ends[0]) / 2)
    return (folder / "whole.safetensors").read_bytes(), began, ends[2]


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
        # A third from the preparations to the end of epoch 1, a third in epoch 2, a third in epoch 3. They are told by
        # the epochs that this process printed: on a shared machine no run takes as long as the one before.
        longest = began + (ended - began) / 3
        for _ in range(trial % 3):
            started = time.monotonic()
            assert "epoch" in process.stdout.readline()
            longest = min((ended - began) / 3, time.monotonic() - started)
        time.sleep(moments.uniform(0, longest))
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
    for trial in range(60):
        process = start(tmp_path, "run.safetensors", "--resume")
        while (line := process.stdout.readline()) and "parameters" not in line:
            pass
        try:
            # Ever longer, should the machine have become slower than it was for the whole run.
            process.communicate(timeout=1.05**trial * (began + moments.uniform(0, 0.5 * (ended - began))))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if (tmp_path / "run.safetensors").exists():
            break
    assert (tmp_path / "run.safetensors").read_bytes() == weights
