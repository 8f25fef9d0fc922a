"""Where processes are spawned, not forked (Windows, macOS), workers get everything by pickling."""

import subprocess
import sys

PROGRAM = """
import multiprocessing

import torch
from torch.utils.data import Subset

from companion import datasets, models, train

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    torch.set_num_threads(1)
    data = Subset(datasets.load("digits", split="train"), range(64))
    results = []
    for workers in (0, 2):
        model = models.create("simple_cnn", seed=0)
        train.fit(model, data, epochs=2, num_workers=workers)
        results.append(torch.cat([p.flatten() for p in model.parameters()]))
    print("same weights:", torch.equal(*results))
"""


def test_spawned_workers_give_the_same_weights(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same weights: True"
