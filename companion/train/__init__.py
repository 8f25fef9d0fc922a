"""Train and evaluate any of the chapter's networks on any of its data."""

from companion.train.evaluation import Scores, evaluate, predict
from companion.train.loop import Epoch, History, fit

__all__ = ["Epoch", "History", "Scores", "evaluate", "fit", "predict"]
