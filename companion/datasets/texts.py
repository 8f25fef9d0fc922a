"""Labelled texts that fit into memory."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from companion.datasets.words import build_vocabulary, encode, word_ids, words

VOCABULARY = 20_000
"""Entries of a vocabulary at most."""
TEST_SHARE = 5
"""One document of so many is for testing."""


class Texts(Dataset[tuple[Tensor, int]]):
    """Texts as word ids: a sample is ``(ids, label)``, int64 [L] with L ≥ 1, and an int."""

    task = "text"
    augmentation = None

    def __init__(
        self,
        name: str,
        texts: Sequence[str],
        targets: Sequence[int],
        labels: tuple[str, ...],
        vocabulary: Sequence[str],
    ) -> None:
        """
        Args:
            name: of the data set.
            texts: each with a word at least.
            targets: the class of each.
            labels: names of the classes.
            vocabulary: the words in the order of their ids.

        Raises:
            CompanionError: the vocabulary is none.
        """
        self.name, self.labels, self.vocabulary = name, labels, tuple(vocabulary)
        self.texts = tuple(texts)
        """As they were written."""
        self.targets = torch.tensor(targets, dtype=torch.int64)
        ids = word_ids(self.vocabulary)
        each = [encode(text, ids) for text in texts]
        # All in one tensor: thousands of small ones would cost every worker a file handle.
        self.ids = torch.tensor([number for one in each for number in one], dtype=torch.int64)
        self.starts = torch.tensor([0, *map(len, each)]).cumsum(0).tolist()
        """Text i has the ids from starts[i] to starts[i + 1]."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]  # from the end, too
        return self.ids[self.starts[index] : self.starts[index + 1]], int(self.targets[index])


def split_texts(
    name: str,
    documents: Iterable[tuple[str, int]],
    labels: tuple[str, ...],
    split: str,
    vocabulary: Sequence[str] | None,
) -> Texts:
    """One split of documents that come without any.

    Of those that have the same words the first one stays, and none without words does. A fifth is for testing, chosen
    by the SHA-256 of the words, so that a document is in the same split wherever it stands and whatever else there is.

    Args:
        name, labels: as of `Texts`.
        documents: texts with their classes.
        split: ``train`` or ``test``.
        vocabulary: of a network that was trained before; None builds it from the training split.
    """
    found: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    seen = set()
    for text, label in documents:
        key = " ".join(words(text))
        if key and key not in seen:
            seen.add(key)
            digest = hashlib.sha256(key.encode()).digest()
            found["train" if int.from_bytes(digest[:8], "big") % TEST_SHARE else "test"].append((text, label))
    if vocabulary is None:
        vocabulary = build_vocabulary((text for text, _ in found["train"]), VOCABULARY)
    texts, targets = zip(*found[split], strict=True) if found[split] else ((), ())
    return Texts(name, texts, targets, labels, vocabulary)
