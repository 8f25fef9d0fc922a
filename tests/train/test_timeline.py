"""Horovod's timeline file, read back."""

import json

import pytest

from companion import CompanionError
from companion.train.horovod import Exchange, read_timeline


def named(row, name):
    return {"name": "process_name", "ph": "M", "pid": row, "args": {"name": name}}


def begin(row, name, time):
    return {"ph": "B", "name": name, "ts": time, "pid": row}


def end(row, time):
    return {"ph": "E", "ts": time, "pid": row}


# Two tensors, whose events are mixed; the second starts later and has begun again when the run ends.
EVENTS = [
    {"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": 1}},
    named(1, "allreduce.a"),
    {"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}},
    begin(1, "NEGOTIATE_ALLREDUCE", 1_000_000),
    {"ph": "X", "name": "0", "ts": 1_000_000, "pid": 1, "dur": 0},
    {"ph": "i", "name": "CYCLE_START", "ts": 1_000_000, "s": "g"},
    named(2, "broadcast.b"),
    begin(2, "NEGOTIATE_BROADCAST", 1_100_000),
    end(1, 1_200_000),
    end(2, 1_250_000),
    begin(1, "ALLREDUCE", 1_300_000),
    begin(1, "GLOO_ALLREDUCE", 1_310_000),
    begin(2, "BROADCAST", 1_310_000),
    end(2, 1_320_000),
    end(1, 1_390_000),
    end(1, 1_400_000),
    begin(2, "NEGOTIATE_BROADCAST", 1_500_000),
]
EXCHANGES = [Exchange("allreduce.a", 1.0, 1.3, 1.4), Exchange("broadcast.b", 1.1, 1.31, 1.32)]


@pytest.mark.parametrize("close", [",\n", "\n]\n"], ids=["left open", "closed"])
def test_exchanges_are_read(close, tmp_path):
    (tmp_path / "t.json").write_text("[\n" + ",\n".join(map(json.dumps, EVENTS)) + close)
    assert read_timeline(tmp_path / "t.json") == EXCHANGES


BAD_NAME = '[{"ph": "B", "name": 1, "ts": 1, "pid": 1}, {"ph": "E", "ts": 2, "pid": 1}]'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]x",
        "{}",
        "[1]",
        '[{"ph": "E", "pid": 1, "ts": 1}]',
        '[{"ph": "B", "pid": 1}]',
        '[{"ph": "M", "pid": 1}]',
        BAD_NAME,
    ],
)
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CompanionError, match=r"t\.json is no timeline of Horovod\.$"):
        read_timeline(tmp_path / "t.json")


def test_no_file(tmp_path):
    with pytest.raises(CompanionError, match=r"cannot read .*t\.json: No such file or directory\.$"):
        read_timeline(tmp_path / "t.json")
