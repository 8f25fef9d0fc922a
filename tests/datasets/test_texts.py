"""Texts to learn from: docstrings of this Python, and AG News."""

import gzip
import heapq
import inspect
import statistics
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from companion import CompanionError, datasets
from companion.datasets import ag_news
from companion.datasets import docstrings as room
from companion.datasets.texts import Texts, split_texts
from companion.datasets.words import RESERVED, words

sys.path.insert(0, str(Path(__file__).parent))
from text_cases import ROWS, news

VOCABULARY = (*RESERVED, "cat", "dog")


def test_a_sample_is_ids_and_a_label():
    data = Texts("pets", ["A dog!", "cat CAT bird cat"], [1, 0], ("cats", "dogs"), VOCABULARY)
    assert [(ids.tolist(), label) for ids, label in data] == [([1, 3], 1), ([2, 2, 1, 2], 0)]
    assert (data[0][0].dtype, data.targets.tolist(), len(data)) == (torch.int64, [1, 0], 2)
    assert data[-1][0].tolist() == [2, 2, 1, 2]
    with pytest.raises(IndexError):
        data[2]


def test_documents_alike_are_one_and_each_is_in_one_split():
    documents = [(f"document number {n % 500}", n % 3) for n in range(1000)] + [("...", 0), ("DOCUMENT number, 7", 2)]
    train, test = (split_texts("x", documents, ("a", "b", "c"), split, None) for split in ("train", "test"))
    assert sorted(train.texts + test.texts) == sorted(f"document number {n}" for n in range(500))
    assert 60 < len(test) < 140  # a fifth
    assert train.vocabulary == test.vocabulary
    assert set(train.vocabulary) == {*RESERVED, *(word for text in train.texts for word in words(text))}


def test_where_a_document_goes_depends_on_its_words_alone():
    documents = [(f"document number {n}", 0) for n in range(100)]
    whole = split_texts("x", documents, ("a",), "test", VOCABULARY).texts
    half = split_texts("x", reversed(documents[50:]), ("a",), "test", VOCABULARY).texts
    assert set(half) == {text for text in whole if int(text.split()[2]) >= 50}


@pytest.fixture(scope="module")
def both():
    return {split: datasets.load("docstrings", split=split) for split in ("train", "test")}


def test_docstrings(both):
    train, test = both["train"], both["test"]
    assert train.task == "text"
    assert train.labels == ("text", "numbers", "files", "network", "concurrency", "testing", "language", "interfaces")
    assert len(train) > 3000
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    for data in (train, test):
        counts = Counter(data.targets.tolist())
        assert counts.keys() == set(range(8))
        # But for the last: tkinter and IDLE are packages of their own in some systems.
        assert min(counts[label] for label in range(7)) > 0.02 * len(data)
        assert data.ids.min() >= 1  # no padding
        assert data.ids.max() < len(data.vocabulary) <= 20_000
    known = {" ".join(words(text)) for text in train.texts}
    assert len(known) == len(train)
    assert known.isdisjoint(" ".join(words(text)) for text in test.texts)


def test_docstrings_are_where_pydoc_finds_them(both):
    found = {text: label for data in both.values() for text, label in zip(data.texts, data.targets, strict=True)}
    assert found[inspect.getdoc(statistics.median)] == 1
    assert found[inspect.getdoc(threading.Thread.join)] == 4
    assert inspect.getdoc(heapq.merge) not in found  # of no subject


def test_the_vocabulary_of_a_network_can_be_given(both):
    data = datasets.load("docstrings", split="test", vocabulary=VOCABULARY)
    assert data.vocabulary == VOCABULARY
    assert data.ids.max() <= 3
    assert data.texts == both["test"].texts


def test_nothing_is_imported_to_read_them():
    code = (
        "from companion.datasets.docstrings import docstrings; docstrings('test', ['<padding>', '<unknown>', 'a']); "
        "import sys; print(sorted({'turtle', 'tkinter', 'curses', 'idlelib', 'antigravity'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of one's own in place of Python's."""
    monkeypatch.setattr(room.sysconfig, "get_path", lambda name: str(tmp_path))
    room._documents.cache_clear()
    yield tmp_path
    room._documents.cache_clear()


def test_modules_that_are_missing_or_unreadable_are_left_out(library):
    (library / "json").mkdir()
    (library / "json" / "tests").mkdir()
    (library / "json" / "__init__.py").write_text('"""How to read and write JSON."""\ndef f():\n  "Too short."\n')
    (library / "json" / "tests" / "a.py").write_text('"""This one is only for its tests."""')
    (library / "csv.py").write_text("def broken(:\n")
    (library / "re.py").write_bytes(b'"""\xff\xfe not in any encoding"""')
    (library / "socket.py").write_text('class S:\n  async def f(self):\n    "\\d An asynchronous one of five words."\n')
    found = [datasets.load("docstrings", split=split) for split in ("train", "test")]
    labelled = sorted(
        (text, int(label)) for data in found for text, label in zip(data.texts, data.targets, strict=True)
    )
    assert labelled == [("How to read and write JSON.", 0), ("\\d An asynchronous one of five words.", 3)]


def test_a_python_without_sources_says_so(library):
    with pytest.raises(CompanionError, match=r"has no sources of its library in .*: use a Python that was installed"):
        datasets.load("docstrings", split="train")


@pytest.mark.parametrize("name", ["ag_news.csv", "ag_news.csv.gz"])
def test_ag_news(tmp_path, data_folder, name):
    data_folder.mkdir(parents=True)
    path = news(data_folder / name)
    train, test = (datasets.load("ag_news", split=split) for split in ("train", "test"))
    assert train.labels == ("World", "Sports", "Business", "Sci/Tech")
    assert len(train) + len(test) == len(ROWS)
    for data in (train, test):
        for text, label in zip(data.texts, data.targets.tolist(), strict=True):
            assert label == (0 if "World" in text else 3)
    assert train.vocabulary[2:5] == ("of", "sentence", "title")
    assert len(datasets.load("ag_news", split="train", root=path)) == len(train)
    assert datasets.get("ag_news") == path
    state = {entry.name: entry.state for entry in datasets.catalogue()}["ag_news"]
    assert state == "present"
    assert datasets.verify()[-1] == datasets.Check(str(path), True, "as it should be")


def test_quoted_cells_may_hold_commas_and_lines(tmp_path):
    rows = [f'Sports,"A, {n}","He said ""no""\nand went"' for n in range(20)]
    data = datasets.load("ag_news", split="train", root=news(tmp_path / "ag_news.csv", rows))
    assert data.texts[0].endswith('\nHe said "no"\nand went')


@pytest.mark.parametrize(
    ("rows", "first", "said"),
    [
        (ROWS, "class,title,description", "its first line must be label,title,description"),
        ([], "", "its first line must be"),
        (
            [*ROWS, "Weather,a,b"],
            None,
            r"line 22 has the label 'Weather': use one of World, Sports, Business, Sci/Tech",
        ),
        ([*ROWS[:3], "", *ROWS[3:]], None, "line 5 is blank: remove it"),
        ([" ,, ", *ROWS], None, "line 2 is blank: remove it"),
        (["World,a", *ROWS], None, "line 2 has 2 columns: give label, title and description"),
        (["World,a,b,c", *ROWS], None, "line 2 has 4 columns"),
        (['World,"a,b', *ROWS], None, "is damaged or no table in UTF-8: unexpected end of data"),
        ([], None, "has no item for train: it needs more of them"),
    ],
)
def test_ag_news_of_another_form_is_refused(tmp_path, rows, first, said):
    path = news(tmp_path / "ag_news.csv", rows, *([] if first is None else [first]))
    with pytest.raises(CompanionError, match=said) as caught:
        datasets.load("ag_news", split="train", root=path)
    assert "\n" not in str(caught.value)


def test_ag_news_is_not_unpacked_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ag_news, "LARGEST", 1000)
    path = tmp_path / "ag_news.csv.gz"
    path.write_bytes(gzip.compress(b"x" * 1001))
    with pytest.raises(CompanionError, match="it has more than 1,000 bytes"):
        datasets.load("ag_news", split="test", root=path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", gzip.compress(b"label,title,description\n")[:20], b"no gzip"])
def test_ag_news_that_is_damaged_is_refused(tmp_path, content):
    path = tmp_path / ("ag_news.csv" if content[0] == 255 else "ag_news.csv.gz")
    path.write_bytes(content)
    with pytest.raises(CompanionError, match=r"is damaged or no table in UTF-8"):
        datasets.load("ag_news", split="test", root=path)


def test_ag_news_that_is_not_there(tmp_path, data_folder):
    for ask in (lambda: datasets.load("ag_news", split="train"), lambda: datasets.get("ag_news")):
        with pytest.raises(CompanionError, match=rf"put ag_news\.csv or ag_news\.csv\.gz .* into {data_folder}\."):
            ask()


def test_the_real_ag_news(test_data):
    train, test = (datasets.load("ag_news", split=split, root=test_data) for split in ("train", "test"))
    assert len(train) + len(test) > 6300  # of 6,400, some of which are there twice
    assert min(Counter(train.targets.tolist()).values()) > 1200
