"""Servers that batch: what gathers requests, and what foretells how that pays (2.3.2, 2.3.3)."""

from companion.serve.batching import (
    Batcher,
    BatcherClosed,
    BatchQueue,
    BatchReport,
    CallCost,
    DeadlineExceeded,
    ItemFailed,
    QueueFull,
)
from companion.serve.simulation import Simulated, simulate

__all__ = [
    "BatchQueue",
    "BatchReport",
    "Batcher",
    "BatcherClosed",
    "CallCost",
    "DeadlineExceeded",
    "ItemFailed",
    "QueueFull",
    "Simulated",
    "simulate",
]
