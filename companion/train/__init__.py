"""Train and evaluate any of the chapter's networks on any of its data."""

from companion.train.evaluation import Scores, evaluate, predict
from companion.train.loop import Epoch, History, fit, hold_out
from companion.train.tasks import Task, task_of

__all__ = ["Epoch", "History", "Scores", "Task", "evaluate", "fit", "hold_out", "predict", "task_of"]
