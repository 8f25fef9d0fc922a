"""The batches of a run, each a pure function of (seed, step): what makes a run repeatable, resumable and worker-safe.

Step k of a run draws its samples, their random transforms, its augmentation and its dropout from seeds
derived from (seed, k) alone. So a resumed run needs no generator states, and one run gives the same
weights with any number of loader workers, forked or spawned.
"""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from companion.errors import CompanionError

# What a derived seed is for: the order of an epoch, reading the samples of a step, the step itself, the hold-out.
ORDER, SAMPLES, STEP, HOLDOUT = range(4)


def derive_seed(seed: int, purpose: int, index: int = 0, *more: int) -> int:
    """A 32-bit seed that is independent for each (seed, purpose, index, …)."""
    return int(np.random.SeedSequence((seed, purpose, index, *more)).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; a sample's transforms may use any of them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Give the caller's global generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        # Named, because torch warns of the time that it takes when it finds several GPUs by itself.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; each worker would complain at length


class Batches(Dataset):
    """Item k is batch k of a run: of epoch k // steps, in that epoch's order or, not shuffled, in the data's own.

    It is a list of parts, which are (inputs, targets): one, unless it is to be computed in several. Of several workers
    that share each batch, each has its own samples, and all together have every sample once.

    Args:
        data: map-style data set.
        batch_size: samples of a batch, over all workers.
        collate: samples → (inputs, targets).
        seed: of the order and of the samples' random transforms.
        shuffle: a new order for each epoch, and transforms for each batch; else both stay the same.
        parts: how many a worker's share of a batch is computed in, as far as all workers have samples.
        rank, size: which worker this is, of how many.
        lend: a worker for whom a batch has no sample gets its first one, so that all have something to do.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        shuffle: bool,
        *,
        parts: int = 1,
        rank: int = 0,
        size: int = 1,
        lend: bool = False,
    ) -> None:
        self.data, self.batch_size, self.collate = data, batch_size, collate
        self.seed, self.shuffle = seed, shuffle
        self.parts, self.rank, self.size, self.lend = parts, rank, size, lend
        self.steps = -(-len(data) // batch_size)  # per epoch; the last batch may be smaller
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def samples(self, step: int) -> int:
        """How many samples batch ``step`` has, over all workers."""
        return min(self.batch_size, len(self.data) - step % self.steps * self.batch_size)

    def idle(self, step: int) -> bool:
        """Whether batch ``step`` has no sample for this worker."""
        return self.rank >= self.samples(step)

    def share(self, step: int) -> list[Sequence[int]]:
        """Where in batch ``step`` the samples of each of this worker's parts are."""
        own = range(self.rank, self.samples(step), self.size)
        if not own and self.lend:
            own = range(1)
        parts = min(self.parts, max(1, self.samples(step) // self.size))  # as many as the others
        if not own:
            return []
        return [own[len(own) * i // parts : len(own) * (i + 1) // parts] for i in range(parts)]

    def __getitem__(self, step: int) -> Any:
        epoch, k = divmod(step, self.steps)
        n = len(self.data)
        if self._order[0] != epoch:
            seed = derive_seed(self.seed, ORDER, epoch)
            self._order = (epoch, permutation(n, seed) if self.shuffle else range(n))
        # Judged data keep the same random transforms in every epoch, so that the scores compare.
        others = (self.rank,) if self.rank else ()  # draw other numbers, for other samples
        seed_everything(derive_seed(self.seed, SAMPLES, step if self.shuffle else k, *others))
        indices = self._order[1][k * self.batch_size : (k + 1) * self.batch_size]
        try:
            return [self.collate([self.data[indices[i]] for i in part]) for part in self.share(step)]
        except CompanionError as error:
            return error  # a worker would wrap it into a page of traceback

    def iterate(self, steps: range, *, num_workers: int = 0, pin_memory: bool = False) -> Iterator[Any]:
        """The batches of these steps, read ahead by ``num_workers`` processes.

        Raises:
            CompanionError: a sample cannot be read.
        """
        loader: DataLoader = DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        for batch in loader:
            if isinstance(batch, CompanionError):
                raise batch
            yield batch
