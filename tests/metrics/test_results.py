"""Records of results: what is in them, that nothing else gets in, and how they are compared."""

import json
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import companion
from companion import CompanionError, bench, doctor
from companion.metrics import results
from companion.metrics.results import Hardware, Measured, Record, Row, compare, read, record, summarize, write

ROOT = Path(__file__).parents[2]
MACHINE = Hardware("CPU of 1 * 2 GHz", 2, 8, "Linux x86_64", ("GPU",))


def milliseconds(median, low=None, high=None, repeats=30):
    return Measured(median, median if low is None else low, median if high is None else high, repeats, "ms")


def make(rows, name="toy", **changes):
    settings = {"threads": 1, "seeds": (0, 1), "note": "quiet"}
    versions = {"Python": "3.11.7", "torch": "2.14.1"}
    whole = Record(
        name, "A toy.", "0.1.0", "0123456789" * 4, "2026-01-31T12:00:00Z", MACHINE, versions, settings, tuple(rows)
    )
    return replace(whole, **changes)


TOY = make(
    [
        Row({"network": "simple_cnn", "batch": 1}, {"parameters": 545098, "latency": milliseconds(1.234, 1.2, 1.3)}),
        Row({"network": "a|b", "batch": 8}, {"latency": milliseconds(1234.5, 1000, 2000, 5), "fits": True}),
    ]
)


def test_a_record_survives_the_disk(tmp_path):
    write(TOY, tmp_path / "toy.json")
    assert read(tmp_path / "toy.json") == TOY
    content = (tmp_path / "toy.json").read_bytes()
    write(read(tmp_path / "toy.json"), tmp_path / "toy.json")
    assert (tmp_path / "toy.json").read_bytes() == content
    assert content.endswith(b"\n}\n")
    assert len([line for line in content.splitlines() if b'"keys"' in line]) == 2  # a line each: good to compare


scalars = st.one_of(st.text(), st.integers(-(2**70), 2**70), st.floats(-1e290, 1e290), st.booleans())
names = st.text(st.characters(codec="utf-8"), max_size=5)


@settings(deadline=None)  # a busy machine is no defect
@given(st.dictionaries(names, scalars, min_size=1), st.dictionaries(names, scalars))
def test_any_keys_and_values_survive(keys, values):
    values = {name: value for name, value in values.items() if name not in keys}
    original = make([Row(keys, values)])
    again = results.loads(results.dumps(original))
    assert again == original
    assert [type(v) for v in again.rows[0].flat().values()] == [type(v) for v in (keys | values).values()]


def spoil(change):
    table = json.loads(results.dumps(TOY))
    change(table)
    return json.dumps(table)


def put(*path, value):
    def change(table):
        for step in path[:-1]:
            table = table[step]
        table[path[-1]] = value

    return change


def cut(*path):
    def change(table):
        for step in path[:-1]:
            table = table[step]
        del table[path[-1]]

    return change


LATENCY = ("rows", 0, "values", "latency")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value="companion-results-2"), "its format is not 'companion-results-1'."),
        (cut("format"), "its format is not 'companion-results-1'."),
        (cut("machine", "cores"), "machine.cores is missing."),
        (put("machine", "host", value="ada"), "machine.host is unknown."),
        (put("machine", "cores", value="two"), 'machine.cores must be a whole number, not "two".'),
        (put("machine", "cores", value=-1), "machine: -1 cores with 8 GiB are no machine."),
        (put("machine", "memory_gib", value=-1), "machine: 2 cores with -1 GiB are no machine."),
        (put("machine", "cores", value=True), "machine.cores must be a whole number, not true."),
        (put("machine", "memory_gib", value=1.5), "machine.memory_gib must be a whole number or null, not 1.5."),
        (put("machine", "accelerators", value="GPU"), 'machine.accelerators must be a list, not "GPU".'),
        (put("machine", value=None), "machine must be an object, not null."),
        (put("name", value="../toy"), "the name '../toy' is not made of small letters, digits and _."),
        (put("commit", value="latest"), "the commit 'latest' is none."),
        (put("date", value="yesterday"), "the date 'yesterday' is not of the form 2026-01-31T12:00:00Z."),
        (put("date", value="2026-02-30T12:00:00Z"), "the date '2026-02-30T12:00:00Z' is not of the form 2026-01-31T"),
        (put("date", value="2026-1-1T1:1:1Z"), "the date '2026-1-1T1:1:1Z' is not of the form 2026-01-31T12:00:00Z."),
        (put("versions", "torch", value=2), "versions.torch must be a text, not 2."),
        (put("settings", "seeds", 1, value=[]), "settings.seeds[1] must be a text or a whole number or a number or"),
        (put("settings", "x", value={}), "settings.x must be a text or a whole number or a number or true or false or"),
        (put("rows", value=[]), "it has no rows."),
        (put("rows", value={}), "rows must be a list, not {}."),
        (put("rows", 1, "notes", value=""), "rows[1].notes is unknown."),
        (put(*LATENCY, "median", value=None), "rows[0].values.latency.median must be a number, not null."),
        (put(*LATENCY, "low", value=1.3), "rows[0].values.latency: the median 1.234 lies outside its quartiles, 1.3"),
        (put(*LATENCY, "repeats", value=0), "rows[0].values.latency: a value measured 0 times was not measured."),
        (put(*LATENCY, "unit", value="s"), "rows[1].values.latency has the unit ms, and s in earlier rows."),
        (put(*LATENCY, value=3), "rows[1].values.latency has the unit ms, and None in earlier rows."),
        (cut(*LATENCY, "high"), "rows[0].values.latency.high is missing."),
        (put(*LATENCY, "mean", value=1), "rows[0].values.latency.mean is unknown."),
        (cut("rows", 1, "keys", "batch"), "rows[1] has the keys network, rows[0] network, batch."),
        (put("rows", 1, "keys", value={"network": "simple_cnn", "batch": 1}), "rows[1] has the same keys as rows[0]."),
        (put("rows", 0, "values", "batch", value=1), "rows[0]: 'batch' is both a key and a value of a row."),
    ],
)
def test_what_breaks_the_schema_is_named_in_one_sentence(tmp_path, change, message):
    (tmp_path / "toy.json").write_text(spoil(change))
    with pytest.raises(CompanionError) as caught:
        read(tmp_path / "toy.json")
    assert str(caught.value).startswith(f"{tmp_path / 'toy.json'} is not a results file: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON"),
        ("[]", "its format is not"),
        ("[" * 100_000, "it is not JSON"),
        (results.dumps(TOY).replace("545098", "NaN"), "NaN is no number in JSON"),
        (results.dumps(TOY).replace("545098", "-Infinity"), "-Infinity is no number in JSON"),
        (results.dumps(TOY).replace("545098", "1e999"), "rows[0].values.parameters is too large a number."),
        (results.dumps(TOY).replace("1.234", "1" * 400), "rows[0].values.latency.median is too large a number."),
        (results.dumps(TOY).replace('"fits"', '"latency"'), "an object names a part twice (latency, latency)."),
        (results.dumps(TOY) + " " * results.LIMIT, "it is larger than 4 MiB."),
    ],
)
def test_files_that_are_no_records(tmp_path, text, message):
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(CompanionError, match=re.escape(message)):
        read(tmp_path / "toy.json")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "toy.json").write_bytes(b"\xff")
    with pytest.raises(CompanionError, match="it is not UTF-8 text"):
        read(tmp_path / "toy.json")
    with pytest.raises(CompanionError, match=r"cannot read .*missing.json: No such file"):
        read(tmp_path / "missing.json")


@pytest.mark.parametrize("value", [np.int64(3), {1, 2}, None, [1]])
def test_what_is_not_plain_does_not_get_in(value):
    for job in (
        lambda: Row({"x": value}, {}),
        lambda: Row({}, {"x": value}),
        lambda: make([], settings={"x": [value]}),
    ):
        with pytest.raises(CompanionError, match=r"^x must be a text, a finite number, True or False, not "):
            job()
    with pytest.raises(CompanionError, match=r"^the name 1 must be a text\.$"):
        Row({1: "a"}, {})


@pytest.mark.parametrize("value", ["3", "a", None, 1j])
def test_a_measured_value_is_made_of_numbers(value):
    with pytest.raises(CompanionError, match=r"^median must be a number, not "):
        Measured(value, 1, 5, 3, "ms")
    with pytest.raises(CompanionError, match=r"^repeats must be a whole number, not "):
        Measured(3, 1, 5, value, "ms")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"description": "\ud800"}, "surrogates not allowed"),
        ({"description": "é" * (results.LIMIT // 2)}, r"it is larger than 4 MiB\.$"),
        ({"rows": ()}, r"it has no rows\.$"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, changes, message):
    (tmp_path / "toy.json").write_text("old")
    with pytest.raises(CompanionError, match=rf"^cannot write .*toy\.json: .*{message}"):
        write(replace(TOY, **changes), tmp_path / "toy.json")
    assert (tmp_path / "toy.json").read_text() == "old"


def test_a_setting_given_as_a_list_is_what_is_read_back():
    found = replace(TOY, settings={"seeds": [0, 1]})
    assert results.loads(results.dumps(found)) == found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_get_in(value):
    for job in (lambda: Row({}, {"x": value}), lambda: milliseconds(value), lambda: summarize([1, value], "ms")):
        with pytest.raises(CompanionError, match="finite"):
            job()


def test_true_and_one_are_different_keys():
    make([Row({"x": True}, {}), Row({"x": 1}, {}), Row({"x": 1.0}, {}), Row({"x": "1"}, {})])


def test_summaries_by_hand():
    assert summarize([5, 1, 2, 4, 3], "ms") == Measured(3, 2, 4, 5, "ms")
    assert summarize([1, 2], "") == Measured(1.5, 1.25, 1.75, 2, "")
    assert summarize(np.array([7], np.float32), "J") == Measured(7, 7, 7, 1, "J")
    with pytest.raises(CompanionError, match="no samples"):
        summarize([], "ms")


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40))
def test_summaries_against_numpy(samples):
    found = summarize(samples, "ms")
    wanted = np.percentile(samples, [25, 50, 75])
    assert [found.low, found.median, found.high] == pytest.approx(list(wanted), rel=1e-9, abs=1e-6)
    assert found.repeats == len(samples)


def test_a_processor_whose_name_says_little_is_told_by_its_numbers():
    bare = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
    assert results._named(bare) == "AMD EPYC (family 25, model 1)"
    assert results._named(bare.replace("AMD EPYC", "AMD EPYC 7763")) == "AMD EPYC 7763"
    assert results._named("model name\t: ARMv8 \n") == "ARMv8"
    assert results._named("Processor: something else\n") is None


def test_what_a_new_record_says_of_this_machine():
    found = record("toy", TOY.rows, settings={"seeds": (0, 1)}, packages=("numpy", "no-such-package"))
    assert results.loads(results.dumps(found)) == found
    assert found.versions == {"Python": platform.python_version(), "numpy": np.__version__}
    assert found.companion == companion.__version__
    assert found.machine.cpu.startswith(doctor._cpu()["model"])
    assert found.machine.cores == doctor._cpu()["cores"]
    if Path("/proc/meminfo").exists():
        kibibytes = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text()).group(1))
        assert found.machine.memory_gib == pytest.approx(kibibytes / 2**20, abs=1)


def test_a_record_names_neither_the_machine_nor_its_owner():
    text = results.dumps(record("toy", TOY.rows))
    assert {field.name for field in fields(Hardware)} == {"cpu", "cores", "memory_gib", "system", "accelerators"}
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
    for place in (Path.home(), ROOT, Path(sys.prefix), Path(sys.executable)):
        assert str(place) not in text


def test_gpus_are_named(monkeypatch):
    class Nvml:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 2)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda i: i)
        nvmlDeviceGetName = staticmethod(lambda i: f"Model {i}")

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    assert results.this_machine().accelerators == ("Model 0", "Model 1")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit in which companion lies, as far as `current_commit` can see."""
    for name in ("companion/__init__.py", "data/results/old.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr("companion.__file__", str(tmp_path / "companion" / "__init__.py"))
    return tmp_path


def test_the_commit(checkout):
    run = ["git", "-C", checkout, "rev-parse", "HEAD"]
    head = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    assert results.current_commit() == head
    (checkout / "data/results/old.json").write_text("new")
    (checkout / "data/results/new.json").touch()
    assert results.current_commit() == head
    (checkout / "companion/new.py").touch()
    assert results.current_commit() == f"{head}+modified"
    make([Row({"x": 1}, {})], commit=results.current_commit())


def test_no_commit_outside_a_checkout_even_inside_another_projects(checkout, monkeypatch):
    package = checkout / "venv" / "site-packages" / "companion"
    package.mkdir(parents=True)
    monkeypatch.setattr("companion.__file__", str(package / "__init__.py"))
    assert results.current_commit() is None
    make([Row({"x": 1}, {})], commit=None)


def test_no_commit_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert results.current_commit() is None


PROVENANCE = (
    "CPU of 1 \\* 2 GHz, 2 cores, 8 GiB, Linux x86\\_64, GPU; Python 3.11.7, torch 2.14.1, companion 0.1.0 (0123456); "
    "threads 1; seeds 0 1; note quiet; 2026-01-31."
)


def test_the_table():
    assert TOY.to_markdown() == (
        "| network | batch | parameters | latency in ms | fits |\n"
        "| :--- | ---: | ---: | ---: | ---: |\n"
        "| simple\\_cnn | 1 | 545,098 | 1.23 (1.20–1.30) | – |\n"
        "| a\\|b | 8 | – | 1,234 (1,000–2,000) | yes |\n"
        "\n"
        f"Median (quartiles) of 5–30 repeats. {PROVENANCE}\n"
    )
    assert TOY._repr_markdown_() == TOY.to_markdown()


def test_some_columns():
    lines = TOY.to_markdown(["latency", "network"]).splitlines()
    assert lines[2] == "| 1.23 (1.20–1.30) | simple\\_cnn |"
    with pytest.raises(CompanionError) as caught:
        TOY.to_markdown(["speed"])
    assert str(caught.value) == "toy has no column 'speed': it has network, batch, parameters, latency, fits."


def test_rows_without_a_value_in_the_chosen_columns_are_left_out():
    lines = TOY.to_markdown(["network", "parameters"]).splitlines()
    assert lines[2:4] == ["| simple\\_cnn | 545,098 |", ""]
    assert len(TOY.to_markdown(["network", "batch"]).splitlines()) == 4 + 2  # keys alone: every row


def test_a_record_of_facts_speaks_of_no_repeats_and_modified_code_is_named():
    facts = make([Row({"network": "a"}, {"MACs": 10})], commit="0123456789" * 4 + "+modified")
    assert facts.provenance() == PROVENANCE.replace("(0123456)", "(0123456, modified)")
    once = make([Row({"network": "a"}, {"latency": milliseconds(1, repeats=1)})])
    assert once.provenance() == f"Median (quartiles) of 1 repeat. {PROVENANCE}"
    assert make(facts.rows, commit=None).provenance() == PROVENANCE.replace(" (0123456)", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (1234567.8, "1,234,568"),
        (123.456, "123"),
        (12.3456, "12.3"),
        (0.00123456, "0.00123"),
        (-0.5, "-0.500"),
        (0.0, "0"),
        (0, "0"),
        (1e-200, "0.000000000000"),
        (milliseconds(2.0), "2.00"),
        (milliseconds(0.0, -1, 1), "0 (-1–1)"),
        (milliseconds(0, -0.5, 0.3), "0.0 (-0.5–0.3)"),
        (milliseconds(100, 99.6, 100.4), "100.0 (99.6–100.4)"),
        (milliseconds(0.0, -1e-9, 5), "0 (0–5)"),
        (-0.0, "0"),
        ("&lt;b&gt;", "\\&lt;b\\&gt;"),
        (False, "no"),
        ("a  `b`\n<c>", "a \\`b\\` \\<c\\>"),
    ],
)
def test_how_values_are_written(value, text):
    line = make([Row({"k": 1}, {"v": value})]).to_markdown(["v"]).splitlines()[2]
    assert line == f"| {text} |"


def test_yours_against_ours():
    ours = make(
        [
            Row({"network": "a", "batch": 1}, {"latency": milliseconds(2.0), "parameters": 10, "kind": "cnn"}),
            Row({"network": "a", "batch": 8}, {"latency": milliseconds(5.0), "parameters": 10}),
            Row({"network": "b", "batch": 1}, {"latency": milliseconds(9.0), "parameters": 0}),
        ]
    )
    yours = make(
        [
            Row({"batch": 8, "network": "a"}, {"latency": milliseconds(2.5), "energy": 3, "kind": "cnn"}),
            Row({"batch": 1, "network": "b"}, {"latency": milliseconds(27.0), "parameters": 5}),
            Row({"batch": 1, "network": "c"}, {"latency": milliseconds(1.0)}),
        ]
    )
    found = compare(ours, yours)
    assert [(*pair.keys.values(), pair.name, pair.ours, pair.yours, pair.ratio) for pair in found.pairs] == [
        (8, "a", "latency", 5, 2.5, 0.5),
        (1, "b", "latency", 9, 27, 3),
        (1, "b", "parameters", 0, 5, None),
    ]
    assert found.to_markdown().splitlines()[:5] == [
        "| batch | network | what | ours | yours | yours / ours |",
        "| ---: | :--- | :--- | ---: | ---: | ---: |",
        "| 8 | a | latency in ms | 5.00 | 2.50 | 0.500 × |",
        "| 1 | b | latency in ms | 9.00 | 27.0 | 3.00 × |",
        "| 1 | b | parameters | 0 | 5 | – |",
    ]
    assert found._repr_markdown_().count(PROVENANCE) == 2
    for columns in (["latency"], "latency"):
        assert [pair.name for pair in compare(ours, yours, columns).pairs] == ["latency"] * 2


def test_what_cannot_be_compared():
    ours = make([Row({"network": "a"}, {"latency": milliseconds(2.0)})])
    seconds = make([Row({"network": "a"}, {"latency": Measured(1, 1, 1, 1, "s")})])
    other = make([Row({"network": "b"}, {"latency": milliseconds(2.0)})], name="other")
    with pytest.raises(CompanionError, match=r"^latency is in ms in ours and in s in yours\.$"):
        compare(ours, seconds)
    for columns in (["speed"], "latency p95"):
        with pytest.raises(
            CompanionError, match=r"^toy has no column '(speed|latency p95)': it has network, latency\.$"
        ):
            compare(ours, ours, columns)
    with pytest.raises(CompanionError, match=r"^other has no row and value in common with our toy\.$"):
        compare(ours, other)


def test_what_is_shipped_is_found_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "companion" / "_data"
    (folder / "results").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr("companion.__file__", str(tmp_path / "companion" / "__init__.py"))
    with pytest.raises(CompanionError, match=r"^there are no results called 'toy': there are none yet\.$"):
        results.load("toy")
    for name in ("toy", "other"):
        write(make(TOY.rows, name=name), folder / "results" / f"{name}.json")
    assert results.names() == ["other", "toy"]
    assert results.load("toy") == TOY
    for name in ("../manifest", "missing"):
        with pytest.raises(CompanionError, match=r"there are other, toy\.$"):
            results.load(name)


# Its reference run takes long, and its record comes with the end of it.
RUNNING = {"compression"}


def test_every_result_that_the_course_ships_is_good():
    assert set(results.names()) == set(bench.names()) - RUNNING
    for name in results.names():
        found = results.load(name)
        assert found.name == name
        assert found.commit, f"{name} was not measured in a checkout"
        assert not re.search(r'"/[a-z]+/', results.shipped_file(name).read_text(encoding="utf-8")), "holds a path"
