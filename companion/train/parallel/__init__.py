"""Train with several workers: data, tensor, layer and pipeline parallel (2.2.1)."""

from companion.train.parallel.collectives import Traffic, naive_all_reduce, ring_all_reduce, ring_bytes
from companion.train.parallel.data import average_gradients, broadcast_model, loss_weight, synchronized_batch_norm
from companion.train.parallel.hybrid import grid, hybrid
from companion.train.parallel.launch import WorkerError, device, launch
from companion.train.parallel.layers import Footprint, Stage, balance, measure_footprint, split
from companion.train.parallel.pipeline import (
    Event,
    Pipeline,
    Wait,
    ideal_bubble,
    in_flight,
    measured_bubble,
    timeline,
)
from companion.train.parallel.problems import (
    Pace,
    Waiting,
    backward_in_parts,
    check_in_step,
    gather_pace,
    is_out_of_memory,
    largest_batch,
    recomputed,
)
from companion.train.parallel.tensor import Block, ColumnLinear, RowLinear, gather, shard, shard_dtensor

__all__ = [
    "Block",
    "ColumnLinear",
    "Event",
    "Footprint",
    "Pace",
    "Pipeline",
    "RowLinear",
    "Stage",
    "Traffic",
    "Wait",
    "Waiting",
    "WorkerError",
    "average_gradients",
    "backward_in_parts",
    "balance",
    "broadcast_model",
    "check_in_step",
    "device",
    "gather",
    "gather_pace",
    "grid",
    "hybrid",
    "ideal_bubble",
    "in_flight",
    "is_out_of_memory",
    "largest_batch",
    "launch",
    "loss_weight",
    "measure_footprint",
    "measured_bubble",
    "naive_all_reduce",
    "recomputed",
    "ring_all_reduce",
    "ring_bytes",
    "shard",
    "shard_dtensor",
    "split",
    "synchronized_batch_norm",
    "timeline",
]
