"""Train and evaluate any of the chapter's networks on any of its data."""

from companion.train.loop import Epoch, History, Scores, evaluate, fit, predict

__all__ = ["Epoch", "History", "Scores", "evaluate", "fit", "predict"]
