"""Words, and the ids that stand for them."""

import multiprocessing
import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from companion import CompanionError
from companion.datasets.words import PADDING, RESERVED, UNKNOWN, build_vocabulary, encode, word_ids, words

ANY_TEXT = st.text(st.characters(), max_size=200)  # lone surrogates included


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \t\n  ", []),
        ("The cat, the DOG.", ["the", "cat", "the", "dog"]),
        ("don't-stop", ["don", "t", "stop"]),
        ("os.path.join(a_b)", ["os", "path", "join", "a", "b"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("ｆｕｌｌ ｗｉｄｔｈ ２", ["full", "width", "2"]),
        ("cafe\u0301 caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("q\u0303x y", ["q\u0303x", "y"]),  # Unicode has no single character for the first
        ("模型压缩ab加速", ["模", "型", "压", "缩", "ab", "加", "速"]),
        ("ｶﾞ か\u3099 \u3099・", ["ガ", "が"]),
        ("Übung ﬁn", ["übung", "fin"]),
        ("привет, МИР", ["привет", "мир"]),
        ("🙂🙃👍🏽", []),
        ("a\ud800b", ["a", "b"]),
        ("word" * 10, ["word" * 10]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(ANY_TEXT)
@hypothesis_settings(deadline=None)
def test_words_are_their_own_words(text):
    found = words(text)
    assert words(" ".join(found)) == found
    assert not set(found) & set(RESERVED)


@given(ANY_TEXT, st.integers(0, 20))
@hypothesis_settings(deadline=None)
def test_the_first_words_are_those_of_all(text, most):
    assert words(text, most) == words(text)[:most]


@given(st.lists(ANY_TEXT, max_size=5), ANY_TEXT, st.integers(3, 20))
@hypothesis_settings(deadline=None)
def test_ids_are_in_range_and_no_word_is_padding(texts, text, size):
    vocabulary = build_vocabulary(texts, size)
    assert len(vocabulary) <= size
    ids = word_ids(vocabulary)
    found = encode(text, ids)
    assert len(found) == len(words(text))
    for word, number in zip(words(text), found, strict=True):
        assert UNKNOWN <= number < len(vocabulary)
        assert number == UNKNOWN if word not in ids else vocabulary[number] == word


def test_a_vocabulary_holds_the_most_frequent_words():
    vocabulary = build_vocabulary(["b a c", "c B", "c d"], 5)
    assert vocabulary == ("<padding>", "<unknown>", "c", "b", "a")
    assert (PADDING, UNKNOWN) == (0, 1)
    assert encode("a b C x", word_ids(vocabulary)) == [4, 3, 2, 1]
    assert build_vocabulary([], 10) == RESERVED


def _read_hostile() -> None:
    mixed = random.Random(0)
    hostile = [
        "\u0301\u0316" * 500_000,  # marks of two classes, which normalising sorts
        "\u0301\uff9e" * 500_000,  # the second is a letter that becomes a mark
        "a" + "\u0316\u0301" * 500_000,
        "x" * 1_000_000,
        "\ufdfa" * 300_000,  # one character that becomes eighteen
        "🙂" * 1_000_000,
        "".join(mixed.choice("\u0301\u0316\u0327\u3099\uff9e") for _ in range(1_000_000)),
    ]
    for text in hostile:
        words(text)


def test_texts_that_are_made_to_be_slow_are_not():
    """Uncut, the first takes hours; a process of its own, because a call into C cannot be stopped otherwise."""
    process = multiprocessing.get_context("spawn").Process(target=_read_hostile)
    process.start()
    process.join(120)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive
    assert process.exitcode == 0


@pytest.mark.parametrize("size", [2, 0, -1, 2.5, True, None])
def test_a_vocabulary_without_room_is_refused(size):
    with pytest.raises(CompanionError, match=r"the vocabulary's size is .*: give a whole number above 2"):
        build_vocabulary(["a"], size)


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        (["a", "b"], "must begin with <padding> and <unknown>"),
        ([], "must begin with"),
        ([*RESERVED, 3], "must be a list of texts"),
        ("<padding>", "must be a list of texts"),
        ([*RESERVED, "a", "b", "a"], "the vocabulary has 'a' twice"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(vocabulary, said):
    with pytest.raises(CompanionError, match=said):
        word_ids(vocabulary)
