"""A bench killed with SIGKILL three times and resumed ends with the record of one never killed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from companion.metrics import results

# One process imports (which takes seconds, with torch) and forks the runs, so that the test is quick. The cells sleep
# for 1 s in all, and the three kills come after 0.3 s of it at most: no run can end before its kill.
PROGRAM = """
import json, os, random, signal, sys, time
from companion.bench import Bench, Cell, run
from companion.metrics import results
from companion.metrics.results import Row, summarize

results.current_commit = lambda: None  # somebody may commit while this test runs
CELLS, SECONDS = 100, 0.01


def cell(i):
    def measure():
        with open("measured", "a") as log:
            log.write(f"{i}\\n")
        time.sleep(SECONDS)
        chosen = random.Random(i)
        samples = [chosen.random() for _ in range(9)]
        return [Row({"cell": i}, {"latency": summarize(samples, "ms"), "parameters": 1000 * i})]

    return Cell(f"cell {i}", measure)


bench = Bench("toy", "Sleeps.", lambda: map(cell, range(CELLS)), {"seeds": tuple(range(CELLS))}, ())


def start(out):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(bench, out=out, progress=False)
        code = 0
    finally:
        os._exit(code)


def finish(out):
    assert os.waitstatus_to_exitcode(os.waitpid(start(out), 0)[1]) == 0


def lines(path):
    return open(path, "rb").read().count(b"\\n") if os.path.exists(path) else 0


finish("whole.json")
os.remove("measured")
moments, codes, done = random.Random(int(sys.argv[1])), [], []
for _ in range(3):
    before = lines("killed.json.partial")
    child = start("killed.json")
    while lines("killed.json.partial") <= before:
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    done.append(lines("killed.json.partial"))
finish("killed.json")
print(json.dumps({"codes": codes, "done": done}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_three_times(tmp_path):
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    command = [sys.executable, "-c", PROGRAM, str(seed)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    story = json.loads(run.stdout)
    assert story["codes"] == [-9, -9, -9]
    assert 0 < story["done"][0] < story["done"][1] < story["done"][2] < 100  # each went on where the last one was

    whole, killed = results.read(tmp_path / "whole.json"), results.read(tmp_path / "killed.json")
    assert len(whole.rows) == 100
    assert replace(killed, date=whole.date) == whole
    texts = [(tmp_path / f"{name}.json").read_text() for name in ("whole", "killed")]
    assert texts[0].replace(whole.date, "") == texts[1].replace(killed.date, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "measured", "whole.json"]
    # A kill costs at most the cell that was being measured.
    measured = [int(line) for line in (tmp_path / "measured").read_text().split()]
    assert sorted(set(measured)) == list(range(100))
    assert len(measured) <= 100 + 3
