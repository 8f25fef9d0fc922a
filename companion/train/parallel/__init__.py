"""Train with several workers: data, tensor, layer and pipeline parallel (2.2.1)."""

from companion.train.parallel.launch import WorkerError, device, launch

__all__ = ["WorkerError", "device", "launch"]
