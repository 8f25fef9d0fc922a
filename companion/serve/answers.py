"""From a network's scores to what a server says."""

import math
from collections.abc import Sequence

import numpy as np

from companion.serve.service import Answer


def most_likely(scores: np.ndarray, labels: Sequence[str] | None) -> list[Answer | Exception]:
    """For each row of scores [N, classes] the class with the highest, and its share after softmax.

    Args:
        scores: a row with one that is no number gets an exception in place of an answer.
        labels: names of the classes; None calls them by their numbers.
    """
    labels = labels or tuple(map(str, range(scores.shape[1])))
    numbers = scores.argmax(1)
    with np.errstate(invalid="ignore"):
        # The softmax of the highest score alone: the others are needed for the sum only.
        best = 1 / np.exp(scores - scores[np.arange(len(scores)), numbers, None]).sum(1)
    return [
        # A score that is no number is the highest to argmax, and makes the sum none either.
        Answer(number, labels[number], share) if not math.isnan(share) else ValueError("the scores are no numbers")
        for number, share in zip(numbers.tolist(), best.tolist(), strict=True)
    ]
