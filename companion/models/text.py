"""The network for texts of section 2.4.2, corrected.

Against the printed listing: the mean is over a text's words and not over the padding behind them, so its answer is the
same alone and in any batch; and padding and unknown words are different ids.
"""

import torch
from torch import Tensor, nn

PADDING = 0  # as in companion.datasets.words
INITIAL = 0.1  # standard deviation of the words' vectors


class MaskedMean(nn.Module):
    """The mean of vectors [N, L, D] over those that ``there`` [N, L] names; zeros [N, D] for a text without any."""

    def forward(self, vectors: Tensor, there: Tensor) -> Tensor:
        weights = there.to(vectors.dtype)
        total = torch.bmm(weights.unsqueeze(1), vectors).squeeze(1)
        return total / weights.sum(1, keepdim=True).clamp(min=1)


class TextClassifier(nn.Module):
    """The mean of the words' vectors, then two linear layers (a "deep averaging network": Iyyer et al., 2015).

    Takes word ids, int64 [N, L] from 0 to ``vocabulary_size`` − 1, where 0 is padding and counts nowhere; returns
    logits [N, classes]. In training each word is left out with the probability ``word_dropout``.
    """

    def __init__(self, *, vocabulary_size: int, embedding: int, hidden: int, classes: int, word_dropout: float) -> None:
        super().__init__()
        self.word_dropout = word_dropout
        self.embedding = nn.Embedding(vocabulary_size, embedding, padding_idx=PADDING)
        # Where they begin, the vectors of rare words stay: with torch's 1, they drown the others (75 % of the held-out
        # docstrings right, instead of 85).
        with torch.no_grad():
            self.embedding.weight.mul_(INITIAL)
        self.mean = MaskedMean()
        self.fc1 = nn.Linear(embedding, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != PADDING
        if self.training and self.word_dropout > 0:
            there = there & (torch.rand(ids.shape, device=ids.device) >= self.word_dropout)
        return self.fc2(self.relu(self.fc1(self.mean(self.embedding(ids), there))))
