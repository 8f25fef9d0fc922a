"""Benches made up here: what a run keeps, and when it goes on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from companion import CompanionError, bench
from companion.bench import Bench, Cell, run, runner
from companion.metrics import results
from companion.metrics.results import Measured, Row


def rows(key):
    return [Row({"cell": key, "batch": i}, {"latency": Measured(i, i, i + 0.1, 3, "ms"), "é": 7}) for i in (1, 2)]


class Toy:
    """A bench that notes which cells were measured, and whose cells can be made to do something else."""

    def __init__(self):
        self.measured, self.instead = [], {}
        self.bench = Bench("toy", "A toy.", self.cells, {"seeds": (0, 1), "threads": 1}, ("numpy",))

    def cells(self):
        return [Cell(key, lambda key=key: self.measure(key)) for key in ("a", "b", "c")]

    def measure(self, key):
        if key in self.instead:
            return self.instead[key]()
        self.measured.append(key)
        return iter(rows(key))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(results, "current_commit", lambda: "1" * 40)
    monkeypatch.setattr(results, "now", lambda: "2026-01-31T12:00:00Z")
    return Toy()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "toy.json"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail(error):
    def measure():
        raise error

    return measure


def test_a_whole_run(toy, out):
    told = []
    found = run(toy.bench, out=out, on_cell=lambda *news: told.append(news))
    assert toy.measured == ["a", "b", "c"]
    assert told == [("a", 1, 3), ("b", 2, 3), ("c", 3, 3)]
    assert found == results.read(out)
    assert found.rows == tuple(row for key in "abc" for row in rows(key))
    assert (found.name, found.description, found.commit) == ("toy", "A toy.", "1" * 40)
    assert (found.settings, list(found.versions)) == ({"seeds": (0, 1), "threads": 1}, ["Python", "numpy"])
    assert names(out.parent) == ["toy.json"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_run_that_stops_goes_on_where_it_was(toy, out, error):
    out.write_text("old")
    toy.instead["b"] = fail(error)
    with pytest.raises(type(error)):
        run(toy.bench, out=out)
    assert (toy.measured, out.read_text()) == (["a"], "old")
    assert names(out.parent) == ["toy.json", "toy.json.partial"]
    toy.instead.clear()
    found = run(toy.bench, out=out)
    assert toy.measured == ["a", "b", "c"]
    assert found == results.read(out) == run(Toy().bench, out=out.with_name("other.json"))
    assert names(out.parent) == ["other.json", "toy.json"]


def test_ctrl_c_says_how_to_go_on(toy, out):
    toy.instead["c"] = fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(toy.bench, out=out)
    assert str(caught.value) == "interrupted; 2 of 3 cells are done: the same command goes on from there."


def test_a_run_that_finished_no_cell_leaves_nothing(toy, out):
    toy.instead["a"] = fail(RuntimeError)
    with pytest.raises(RuntimeError):
        run(toy.bench, out=out)
    assert names(out.parent) == []


def journal(toy, out):
    """The journal of a run that stopped before its last cell."""
    toy.instead["c"] = fail(RuntimeError)
    with pytest.raises(RuntimeError):
        run(toy.bench, out=out)
    toy.instead.clear()
    return out.with_name("toy.json.partial")


def test_a_journal_torn_at_any_byte(toy, out):
    partial = journal(toy, out)
    content = partial.read_bytes()
    whole = run(toy.bench, out=out)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3
    near = {end + shift for end in ends for shift in (-2, -1, 0, 1, 2)}  # and in the middle of an é
    for length in sorted({*range(0, len(content), 17), *near, content.index("é".encode()) + 1}):
        partial.write_bytes(content[:length])
        toy.measured.clear()
        assert run(toy.bench, out=out) == whole
        assert toy.measured == ["a", "b", "c"][max(0, sum(end <= length for end in ends) - 1) :]
        assert names(out.parent) == ["toy.json"]


def test_fresh_measures_all_again(toy, out):
    journal(toy, out)
    toy.measured.clear()
    run(toy.bench, out=out, fresh=True)
    assert toy.measured == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        *((line, text) for line in (1, 2) for text in ("{}", "[]", "nothing", '{"cell": "a", "rows": [{}]}', "\xff")),
        (0, '{"format": "companion-bench-1", "cells": ["a", "b", "c"]}'),
        (0, '{"format": "companion-bench-1", "cells": '),
    ],
)
def test_a_damaged_journal_is_refused(toy, out, line, text):
    partial = journal(toy, out)
    lines = partial.read_text(encoding="utf-8").splitlines()
    lines[line] = text
    partial.write_text("\n".join(lines) + "\n", encoding="latin-1")
    with pytest.raises(CompanionError, match=r"toy\.json\.partial is damaged: delete it to start again\.$"):
        run(toy.bench, out=out)
    assert partial.exists()
    assert len(run(toy.bench, out=out, fresh=True).rows) == 6


@pytest.mark.parametrize("text", ["7", '"rubbish"', '"1111"'])
def test_a_commit_that_is_none_is_damage(toy, out, text):
    partial = journal(toy, out)
    partial.write_bytes(partial.read_bytes().replace(f'"{"1" * 40}"'.encode(), text.encode()))
    with pytest.raises(CompanionError, match=r"toy\.json\.partial is damaged: delete it to start again\.$"):
        run(toy.bench, out=out)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("text", ["my notes", "{}\n", '{"format": "companion-bench-2", "cells": ["a"]}\n{}\n'])
def test_a_file_that_is_none_of_ours_is_left_alone(toy, out, text, fresh):
    partial = out.with_name("toy.json.partial")
    partial.write_text(text)
    with pytest.raises(CompanionError) as caught:
        run(toy.bench, out=out, fresh=fresh)
    assert str(caught.value) == f"{partial} is not a journal of the format companion-bench-1: move it away."
    assert (toy.measured, partial.read_text()) == ([], text)


def test_a_journal_that_cannot_be_opened_is_one_sentence(toy, out):
    partial = out.with_name("toy.json.partial")
    partial.symlink_to(out.parent / "missing" / "toy")
    with pytest.raises(CompanionError, match=r"^cannot write .*toy\.json\.partial: No such file or directory\.$"):
        run(toy.bench, out=out)
    partial.unlink()
    partial.mkdir()
    with pytest.raises(CompanionError, match=r"^cannot write .*toy\.json\.partial: Is a directory\.$"):
        run(toy.bench, out=out)
    assert toy.measured == []


def test_a_full_disk_costs_one_cell(toy, out):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def measure():
        size = out.with_name("toy.json.partial").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1]))  # so that the line is torn
        return rows("b")

    toy.instead["b"] = measure
    try:
        with pytest.raises(
            CompanionError, match=r"^cannot write .*toy\.json\.partial: File too large; with room for it"
        ):
            run(toy.bench, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert out.with_name("toy.json.partial").read_bytes().count(b"\n") == 2
    toy.instead.clear()
    assert len(run(toy.bench, out=out).rows) == 6
    assert toy.measured == ["a", "b", "c"]


@pytest.mark.parametrize(
    "changes", [{"description": "\ud800"}, {"settings": {"threads": np.int64(1)}}, {"settings": {"x": [object()]}}]
)
def test_what_a_record_cannot_hold_is_refused_before_any_work(toy, out, changes):
    with pytest.raises(CompanionError):
        run(replace(toy.bench, **changes), out=out)
    assert (toy.measured, names(out.parent)) == ([], [])


def other_machine(toy, monkeypatch):
    machine = replace(results.this_machine(), cpu="Another")
    monkeypatch.setattr(results, "this_machine", lambda: machine)
    return toy.bench


def other_version(toy, monkeypatch):
    monkeypatch.setattr(results, "version", lambda package: "9.9")
    return toy.bench


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda toy, _: replace(toy.bench, settings={"seeds": (0, 1), "threads": 2}), "settings"),
        (lambda toy, _: replace(toy.bench, name="other"), "name"),
        (lambda toy, _: replace(toy.bench, cells=lambda: toy.cells()[:2]), "cells"),
        (lambda toy, _: replace(toy.bench, cells=lambda: toy.cells()[::-1]), "cells"),
        (other_machine, "machine"),
        (other_version, "versions"),
    ],
)
def test_another_run_does_not_go_on(toy, out, monkeypatch, change, what):
    partial = journal(toy, out)
    content = partial.read_bytes()
    changed = change(toy, monkeypatch)
    with pytest.raises(CompanionError, match=rf"holds 2 finished cells of another run: its {what} is ") as caught:
        run(changed, out=out)
    assert "--fresh" in str(caught.value)
    assert partial.read_bytes() == content
    run(changed, out=out, fresh=True)
    assert names(out.parent) == ["toy.json"]


def test_settings_of_another_run_are_told(toy, out):
    journal(toy, out)
    with pytest.raises(CompanionError) as caught:
        run(replace(toy.bench, settings={"threads": 2}), out=out)
    assert 'its settings is {"seeds": [0, 1], "threads": 1}, this one\'s {"threads": 2};' in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "quoted"),
    [
        ("1" * 40, "2" * 40, "1" * 40 + "+modified"),
        ("1" * 40, None, "1" * 40 + "+modified"),
        ("1" * 40 + "+modified", "1" * 40, "1" * 40 + "+modified"),
        ("1" * 40, "1" * 40, "1" * 40),
        (None, "1" * 40, None),
    ],
)
def test_a_commit_in_between_is_told(toy, out, monkeypatch, before, after, quoted):
    monkeypatch.setattr(results, "current_commit", lambda: before)
    journal(toy, out)
    monkeypatch.setattr(results, "current_commit", lambda: after)
    assert run(toy.bench, out=out).commit == quoted


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([Row({"cell": "b"}, {})], r"rows\[2\] has the keys cell, rows\[0\] cell, batch\."),
        (rows("a"), r"rows\[2\] has the same keys as rows\[0\]\."),
        ([Row({"cell": "b", "batch": 1}, {"é": "\ud800"})], "plain texts and finite numbers only"),
        ([Row({"cell": "b", "batch": 1}, {"é": "x" * results.LIMIT})], r"it is larger than 4 MiB\."),
        (None, r"None is no Row\."),
        ([{"cell": "b"}], r"\{'cell': 'b'\} is no Row\."),
        ([Row({"cell": "b", "batch": 1}, {"é": Measured(1, 1, 1, 1, "s")})], r"rows\[2\].values.é has the unit s"),
    ],
)
def test_rows_that_do_not_fit_are_refused_at_once(toy, out, found, message):
    toy.instead["b"] = lambda: found
    with pytest.raises(CompanionError, match=rf"^the rows of cell 'b' cannot be used: .*{message}"):
        run(toy.bench, out=out)
    assert toy.measured == ["a"]
    toy.instead.clear()
    assert len(run(toy.bench, out=out).rows) == 6


def test_a_cell_may_have_nothing_to_measure_here(toy, out):
    toy.instead["a"] = list
    toy.instead["c"] = fail(RuntimeError)
    with pytest.raises(RuntimeError):
        run(toy.bench, out=out)
    del toy.instead["c"]
    assert run(toy.bench, out=out).rows == tuple(rows("b") + rows("c"))
    assert toy.measured == ["b", "c"]


def test_a_bench_with_nothing_to_measure_leaves_nothing(toy, out):
    toy.instead = dict.fromkeys("abc", list)
    with pytest.raises(CompanionError, match=r"^toy found nothing to measure on this machine\.$"):
        run(toy.bench, out=out)
    assert names(out.parent) == []
    toy.instead.clear()
    assert len(run(toy.bench, out=out).rows) == 6


# Holds the journal, together with a child that outlives it.
HOLDER = """
import os, sys
from pathlib import Path
from companion.bench import runner

with runner._opened(Path(sys.argv[1])) as file:
    file.write(runner._START)
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_second_run_of_the_same_file_is_refused_until_the_first_is_dead(toy, out):
    command = [sys.executable, "-c", HOLDER, f"{out}.partial"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(CompanionError) as caught:
            run(toy.bench, out=out)
        assert str(caught.value) == f"another process is working on {out}.partial: wait until it is done."
        holder.kill()
        holder.wait()
        assert len(run(toy.bench, out=out).rows) == 6  # although the child is alive


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot remove an open file")
def test_a_journal_is_removed_before_its_lock_is(out, monkeypatch):
    unlink, closed = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (closed.append(file.closed), unlink(path, **options)))
    with runner._opened(out) as file:
        pass
    assert (closed, out.exists()) == ([False], False)


@pytest.mark.parametrize("again", [False, True])
def test_a_journal_removed_before_we_locked_it_is_opened_again(out, monkeypatch, again):
    fcntl = pytest.importorskip("fcntl")
    lockf, calls = fcntl.lockf, []

    def late(file, flags):
        lockf(file, flags)
        calls.append(1)
        if len(calls) == 1:
            out.unlink()
            if again:
                out.with_name("new").touch()
                out.with_name("new").rename(out)

    monkeypatch.setattr(fcntl, "lockf", late)
    with runner._opened(out) as file:
        assert os.path.samestat(os.fstat(file.fileno()), out.stat())
    assert len(calls) == 2


def test_a_place_that_cannot_be_written_is_refused_before_any_work(toy, out):
    with pytest.raises(CompanionError, match="cannot write"):
        run(toy.bench, out=out / "toy.json")
    assert toy.measured == []


def test_two_cells_with_one_key(toy, out):
    with pytest.raises(CompanionError, match="two cells of toy have the same key"):
        run(replace(toy.bench, cells=lambda: toy.cells() * 2), out=out)


def test_the_journal_is_plain_json_lines(toy, out):
    head, *lines = map(json.loads, journal(toy, out).read_text(encoding="utf-8").splitlines())
    assert (head["name"], head["cells"], head["commit"]) == ("toy", ["a", "b", "c"], "1" * 40)
    assert [line["cell"] for line in lines] == ["a", "b"]


def test_every_bench_in_the_table_is_there():
    for name in bench.names():
        found = bench.get(name)
        assert found.name == name
        assert found.description.endswith(".")


def test_an_unknown_bench_is_one_sentence():
    with pytest.raises(CompanionError, match=r"^there is no bench 'x': there are .*\.$"):
        bench.get("x")


def test_a_bench_is_imported_when_it_is_asked_for(monkeypatch, tmp_path, toy):
    (tmp_path / "my_bench.py").write_text(
        "from companion.bench import Bench\nBENCH = Bench('mine', 'Mine.', cells=list)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(bench.BENCHES, "mine", "my_bench")
    assert "mine" in bench.names()
    assert bench.get("mine").description == "Mine."


@pytest.mark.parametrize(("ratios", "share"), [([], None), ([0.4, 1.0, 2.0, 9.0], 0.5)])
def test_the_roofline_bench_ends_on_a_machine_without_a_slow_layer(monkeypatch, ratios, share):
    from companion.bench import roofline

    layers = [SimpleNamespace(measured=1.0, kind="Conv2d", ratio=ratio) for ratio in ratios]
    fast = SimpleNamespace(measured=1e-6, kind="Conv2d", ratio=1.0)
    roof = SimpleNamespace(flops_per_second=1e9, bytes_per_second=2e9)
    found = SimpleNamespace(layers=[fast, *layers], roof=roof)
    monkeypatch.setattr(roofline.metrics, "measure_roofline", lambda *args, **options: found)
    (row,) = roofline._place("encoder layer, width 256", 1, "contiguous")
    assert (row.values["layers over 100 µs"], row.values["GB/s"]) == (len(ratios), 2)
    assert row.values.get("within a factor of 2") == share
