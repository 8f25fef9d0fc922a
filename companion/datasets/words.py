"""Text as word ids: what a network for texts takes (2.4.2).

One vocabulary is built from the training texts, once, and travels with the network. A word's id is its place in it.
Two places are taken: one for padding, which no text contains, and one for every word that the vocabulary lacks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from unicodedata import normalize

from companion.errors import CompanionError

PADDING, UNKNOWN = 0, 1
RESERVED = ("<padding>", "<unknown>")
"""What a vocabulary begins with; no word is written so."""

# Kana and ideographs, which stand without spaces between words: each is one word.
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
_CJK = _KANA + "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Combining diacritics stay with their letter where Unicode has no single character for both.
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}](?:[^\W_{_CJK}]|[\u0300-\u036f])*")
# Normalising takes time that is quadratic in the length of a run of combining marks, so no piece may be long.
_PIECE = re.compile(r"\S{1,64}")


def words(text: str, most: int | None = None) -> list[str]:
    """The words of any text, in order and alike however they were typed.

    A word is a run of letters and digits; each kana or ideograph is a word of its own. Everything else separates. Case,
    width and composition make no difference (Unicode's NFKC and case folding). A run of more than 64 characters
    without a space may be cut inside a word, and vowels written as marks (Devanagari, Thai) separate as well.

    Args:
        text: of any length and of any characters, lone surrogates included.
        most: stop after so many words, without looking at the rest.
    """
    return list(islice(_words(text), most))


def _words(text: str) -> Iterator[str]:
    for piece in _PIECE.finditer(text):
        # Folding case may decompose what was composed: ΐ becomes three characters.
        yield from _WORD.findall(normalize("NFKC", normalize("NFKC", piece[0]).casefold()))


def build_vocabulary(texts: Iterable[str], size: int = 10_000) -> tuple[str, ...]:
    """The most frequent words of ``texts`` in the order of their ids, after `RESERVED`; of equal counts by alphabet.

    Args:
        texts: to train on; words that only others have are unknown.
        size: entries at most, the two reserved ones included.

    Raises:
        CompanionError: a size that leaves no room for a word.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size <= len(RESERVED):
        raise CompanionError(f"the vocabulary's size is {size!r}: give a whole number above {len(RESERVED)}.")
    counts = Counter(word for text in texts for word in _words(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return (*RESERVED, *ranked[: size - len(RESERVED)])


def word_ids(vocabulary: Sequence[str]) -> dict[str, int]:
    """Each word's id, for `encode`.

    Raises:
        CompanionError: no list of different texts, or one that does not begin with `RESERVED`.
    """
    if (
        isinstance(vocabulary, str)
        or not isinstance(vocabulary, Sequence)
        or not all(isinstance(word, str) for word in vocabulary)
    ):
        raise CompanionError("a vocabulary must be a list of texts, as datasets.build_vocabulary makes it.")
    if tuple(vocabulary[: len(RESERVED)]) != RESERVED:
        raise CompanionError(
            f"a vocabulary must begin with {' and '.join(RESERVED)}: build it with datasets.build_vocabulary."
        )
    ids = {word: number for number, word in enumerate(vocabulary)}
    if len(ids) != len(vocabulary):
        twice = next(word for number, word in enumerate(vocabulary) if ids[word] != number)
        raise CompanionError(f"the vocabulary has {twice!r} twice: each word must have one id.")
    return ids


def encode(text: str, ids: dict[str, int], most: int | None = None) -> list[int]:
    """The ids of a text's words, `UNKNOWN` for those that the vocabulary lacks; none for a text without words.

    Args:
        text, most: as of `words`.
        ids: of `word_ids`.
    """
    return [ids.get(word, UNKNOWN) for word in words(text, most)]
