"""Train and evaluate any of the chapter's networks on any of its data."""

from companion.train.amp import LossScaler, Precision
from companion.train.evaluation import Scores, evaluate, predict
from companion.train.formats import (
    FORMATS,
    Magnitudes,
    NumberFormat,
    OperatorPrecision,
    gradient_magnitudes,
    layer_gradients,
    operator_precisions,
)
from companion.train.loop import Epoch, History, fit, hold_out
from companion.train.tasks import Task, task_of
from companion.train.workers import ALONE, Workers, WorkersLost, joined

__all__ = [
    "ALONE",
    "FORMATS",
    "Epoch",
    "History",
    "LossScaler",
    "Magnitudes",
    "NumberFormat",
    "OperatorPrecision",
    "Precision",
    "Scores",
    "Task",
    "Workers",
    "WorkersLost",
    "evaluate",
    "fit",
    "gradient_magnitudes",
    "hold_out",
    "joined",
    "layer_gradients",
    "operator_precisions",
    "predict",
    "task_of",
]
