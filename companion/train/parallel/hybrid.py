"""Data and model parallelism together (2.2.1): a grid of workers, split by model and by data."""

from typing import Any

from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from companion.errors import CompanionError
from companion.train.parallel.launch import device
from companion.train.parallel.layers import Stage, split
from companion.train.parallel.tensor import shard


def grid(data: int, model: int) -> DeviceMesh:
    """All workers as a mesh [data, model] with these names: rank r stands in row r // model.

    A row holds one whole model, a column the same part of each model. ``mesh["data"].get_local_rank()`` is the row of
    this worker, which tells its share of the batch.

    Raises:
        CompanionError: there are not data · model workers.
    """
    workers = distributed.get_world_size()
    if data * model != workers:
        raise CompanionError(f"a grid of {data} × {model} needs {data * model} workers, and there are {workers}.")
    return init_device_mesh(device().type, (data, model), mesh_dim_names=("data", "model"))


def hybrid(network: Any, mesh: DeviceMesh, *, by: str = "layers") -> Any:
    """This worker's part of a network, kept equal to its twins in the other rows.

    DistributedDataParallel averages the gradients along the columns, point-to-point messages or all-reduces join the
    parts along a row.

    Args:
        network: the same on all workers; for ``layers`` an nn.Sequential, for ``tensor`` one with a `Block`.
        mesh: from `grid`.
        by: ``layers``, each a `Stage` of some of the layers, or ``tensor``, each a `shard` of all.

    Returns:
        A DistributedDataParallel; its ``module`` is the `Stage` or the sharded network.

    Raises:
        CompanionError: no such way to split, or it does not suit the network.
    """
    group = mesh["model"].get_group()
    if by == "layers":
        stages = split(network.to(device()), mesh["model"].size())
        part: nn.Module = Stage(stages[mesh["model"].get_local_rank()], group=group)
    elif by == "tensor":
        part = shard(network.to(device()), group)
    else:
        raise CompanionError(f"a network is not split by {by!r}: choose layers or tensor.")
    return DistributedDataParallel(part, process_group=mesh["data"].get_group())
