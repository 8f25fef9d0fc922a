"""An export killed at any moment leaves its file whole, as it was, or absent; the next one cleans up."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from companion import engines

# Exports the same network again and again.
PROGRAM = """
import sys, torch
from companion import engines
torch.manual_seed(0)
network = torch.nn.Linear(8, 4)
example = torch.rand(1, 8)
{patch}
print("started", flush=True)
while True:
    engines.export_onnx(network, example, sys.argv[1])
    print("exported", flush=True)
"""
DIES_WRITING = """
import os
os.fsync = lambda descriptor: os._exit(9)
"""
# Writes as a slow disk does, so that kills hit the writing too.
SLOW = """
import time
from contextlib import contextmanager
from companion.engines import export
replacing = export.replacing

class Slow:
    def __init__(self, file):
        self.file = file

    def write(self, content):
        for i in range(0, len(content), 32):
            self.file.write(content[i : i + 32])
            self.file.flush()
            time.sleep(0.1)

@contextmanager
def slow(path):
    with replacing(path) as file:
        yield Slow(file)

export.replacing = slow
"""


def start(path, patch=""):
    command = [sys.executable, "-c", PROGRAM.format(patch=patch), path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n", process.communicate()[1]
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def export(path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Linear(8, 4)
        engines.export_onnx(network, torch.rand(1, 8), path)
    return path.read_bytes()


def test_a_process_that_dies_while_it_writes_leaves_no_file(tmp_path):
    path = tmp_path / "net.onnx"
    process = start(path, DIES_WRITING)
    assert process.communicate()[0] == ""
    assert process.returncode == 9
    (leftover,) = tmp_path.iterdir()
    assert leftover.suffix == ".part"
    export(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_killed_at_random_moments(tmp_path):
    whole = export(tmp_path / "whole.onnx")
    path = tmp_path / "net.onnx"
    moments, absent, partial = random.Random(0), 0, 0
    for trial in range(20):
        process = start(path, SLOW)
        if trial % 4:  # else anywhere in the first export, imports and all
            assert process.stdout.readline() == "exported\n"
            if trial % 4 == 1:
                path.unlink()  # or the old file must survive
        time.sleep(moments.uniform(0, 2.5))
        kill(process)
        partial += any(file.suffix == ".part" for file in tmp_path.iterdir())
        if path.exists():
            assert path.read_bytes() == whole, f"kill number {trial}"  # which another process wrote
        else:
            absent += 1
    print(f"20 kills: {absent} times no file, {partial} times during the writing")
    assert partial > 0  # or it was never put to the test
    export(path)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.onnx", "net.onnx"}
