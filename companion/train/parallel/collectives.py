"""All-reduce by hand: how workers add up a tensor so that each has the sum, and what it costs to send (2.2.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from companion.errors import CompanionError


@dataclass(frozen=True)
class Traffic:
    """Bytes of payload that one worker moved."""

    sent: int
    received: int


def ring_all_reduce(tensor: Tensor) -> Traffic:
    """Add up ``tensor`` over all workers, in place, around a ring: each sends to the next what the one before sent.

    The tensor is cut into as many chunks as there are workers, n. In n - 1 steps (*reduce-scatter*) every chunk goes
    round and picks up each worker's part, so that in the end each worker has the sum of one chunk. In n - 1 more steps
    (*all-gather*) the sums go round. All links are busy in every step, and each worker sends 2(n - 1)/n of the tensor,
    which is less than twice it, however many workers there are. All of them end with the same bits.

    Args:
        tensor: of the same shape and dtype on every worker of the default process group; contiguous or not.

    Returns:
        What this worker sent and received.

    Raises:
        CompanionError: a sparse tensor.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    rank, n = distributed.get_rank(), distributed.get_world_size()
    flat = _flat(tensor)
    chunks = flat.tensor_split(n)  # views; if n does not divide the length, the first are one longer
    sent = received = 0
    for step in range(n - 1):  # reduce-scatter
        mine, theirs = chunks[(rank - step) % n], chunks[(rank - step - 1) % n]
        part = torch.empty_like(theirs)
        _pass_on(mine, part)
        theirs += part
        sent, received = sent + mine.nbytes, received + theirs.nbytes
    for step in range(n - 1):  # all-gather
        mine, theirs = chunks[(rank - step + 1) % n], chunks[(rank - step) % n]
        _pass_on(mine, theirs)
        sent, received = sent + mine.nbytes, received + theirs.nbytes
    _put_back(tensor, flat)
    return Traffic(sent, received)


def naive_all_reduce(tensor: Tensor) -> Traffic:
    """The same by way of worker 0, which adds up what the others send, and sends each of them the sum.

    Worker 0 receives n - 1 tensors and then sends as many, while the others mostly wait: against a ring, its link has
    n/2 times as much to carry in each direction. Arguments, result and errors are those of `ring_all_reduce`.
    """
    rank, n = distributed.get_rank(), distributed.get_world_size()
    flat = _flat(tensor)
    if rank == 0:
        part = torch.empty_like(flat)
        for other in range(1, n):
            distributed.recv(part, other)
            flat += part
        for other in range(1, n):
            distributed.send(flat, other)
    else:
        distributed.send(flat, 0)
        distributed.recv(flat, 0)
    _put_back(tensor, flat)
    moved = flat.nbytes * (n - 1 if rank == 0 else 1)
    return Traffic(moved, moved)


def ring_bytes(numbers: int, workers: int, itemsize: int = 4) -> float:
    """What each worker sends in `ring_all_reduce`: 2(n - 1)/n of the tensor; exact if n divides its length."""
    return 2 * (workers - 1) / workers * numbers * itemsize


def _pass_on(mine: Tensor, theirs: Tensor) -> None:
    """Send ``mine`` to the next worker while ``theirs`` comes in from the one before."""
    rank, n = distributed.get_rank(), distributed.get_world_size()
    # As one batch, because under NCCL a send waits for its receive: all would send and nobody receive.
    send = distributed.P2POp(distributed.isend, mine, (rank + 1) % n)
    receive = distributed.P2POp(distributed.irecv, theirs, (rank - 1) % n)
    for work in distributed.batch_isend_irecv([send, receive]):
        work.wait()


def _flat(tensor: Tensor) -> Tensor:
    """All its numbers in a row: a view, or a copy if they do not lie so."""
    if tensor.layout is not torch.strided:
        raise CompanionError("a sparse tensor cannot be cut into chunks: give a dense one.")
    return tensor.detach().reshape(-1)


def _put_back(tensor: Tensor, flat: Tensor) -> None:
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape))
