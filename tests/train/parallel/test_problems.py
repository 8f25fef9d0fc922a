"""Common problems, each provoked, shown and cured."""

import copy
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from companion import metrics, models
from companion.errors import CompanionError
from companion.train.parallel import (
    Pace,
    Waiting,
    WorkerError,
    average_gradients,
    backward_in_parts,
    broadcast_model,
    check_in_step,
    gather_pace,
    is_out_of_memory,
    largest_batch,
    launch,
    loss_weight,
    recomputed,
    synchronized_batch_norm,
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_waiting_and_working_are_told_apart():
    clock = Clock()

    def stream():
        for seconds in (100, 3, 1):
            clock.now += seconds
            yield seconds

    steps = Waiting(stream(), clock=clock)
    for _ in steps:
        clock.now += 1
    assert (steps.waited, steps.worked) == ([100, 3, 1], [1, 1, 1])
    assert steps.share == 4 / 6
    assert str(steps) == "67% of the time is spent waiting for data: 2.000 s a step, beside 1.000 s of work"


def test_a_loop_that_is_left_early():
    steps = Waiting([1, 2, 3])
    for _ in steps:
        break
    assert len(steps.waited) == len(steps.worked) == 1
    with pytest.raises(CompanionError, match="at least two batches"):
        print(steps)


class Slow(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        time.sleep(0.03)
        return i


def test_a_loader_that_starves_the_step_and_one_that_reads_ahead():
    shares = []
    for workers in (0, 1):
        steps = Waiting(DataLoader(Slow(), batch_size=2, num_workers=workers))
        for _ in steps:
            time.sleep(0.15)
        shares.append(steps.share)
    starved, cured = shares  # 60 ms of waiting beside 150 ms of work, and none
    assert starved > 0.2
    assert cured < starved / 2


@pytest.mark.parametrize("most", [1, 2, 3, 16, 17, 99, 100])
def test_the_largest_batch(most):
    tried = []

    def attempt(samples):
        tried.append(samples)
        if samples > most:
            raise torch.OutOfMemoryError

    assert largest_batch(attempt, limit=100) == most
    assert len(tried) <= 14
    assert max(tried) <= 100


def test_what_is_no_lack_of_memory_passes_through():
    for error in (RuntimeError("shapes"), KeyError("out of memory")):

        def attempt(samples, error=error):
            raise error

        with pytest.raises(type(error)):
            largest_batch(attempt)
    with pytest.raises(CompanionError, match="not even a batch of one"):
        largest_batch(lambda samples: bytearray(2**62))
    with pytest.raises(CompanionError, match="limit is 0"):
        largest_batch(print, limit=0)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)), nn.Linear(64, 10))


SAMPLES = 60_000


def in_little_memory():
    """What fits into 60 MiB more than this worker has: whole, and in parts."""
    import resource

    model = layers()
    inputs, targets = torch.randn(SAMPLES, 64), torch.zeros(SAMPLES, dtype=torch.int64)

    def step(samples, parts=1):
        model.zero_grad()
        backward_in_parts(model, inputs[:samples], targets[:samples], loss=cross_entropy, parts=parts)

    step(8)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 60 * 2**20, -1))
    whole = largest_batch(step, limit=SAMPLES)
    try:
        step(SAMPLES)
        error = None
    except RuntimeError as caught:
        error = is_out_of_memory(caught)
    step(SAMPLES, parts=4 * SAMPLES // whole)
    return whole, error


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux limits a process's memory so")
def test_what_does_not_fit_into_memory_does_in_parts():
    whole, error = launch(in_little_memory, 1)[0]
    assert error is True
    assert 0 < whole < SAMPLES


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 12, 50])
def test_a_step_in_parts_is_the_step(parts):
    model = layers().double()
    inputs, targets = torch.randn(12, 64, dtype=torch.float64), torch.arange(12) % 10
    wanted = cross_entropy(model(inputs), targets)
    wanted.backward()
    whole = [gradient.clone() for gradient in gradients(model)]
    model.zero_grad()
    loss = backward_in_parts(model, inputs, targets, loss=cross_entropy, parts=parts)
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("samples", "parts"), [(0, 1), (3, 0)])
def test_parts_that_make_no_sense(samples, parts):
    with pytest.raises(CompanionError, match="give at least one of each"):
        backward_in_parts(nn.ReLU(), torch.ones(samples, 1), torch.ones(samples), loss=cross_entropy, parts=parts)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("synchronised", [False, True])
def test_recomputing_changes_nothing_but_memory(momentum, synchronised):
    model = models.create("cifar_resnet20", seed=0).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    blocks = [module for module in model.modules() if type(module).__name__ == "BasicBlock"]
    inputs, targets = torch.rand(8, 3, 32, 32), torch.arange(8)
    other = copy.deepcopy(model)

    def step(model):
        with synchronized_batch_norm(model, all_reduce=lambda values: values) if synchronised else recomputed():
            cross_entropy(model(inputs), targets).backward()

    for _ in range(2):
        step(other)
        with recomputed(*blocks):
            assert "forward" in vars(blocks[0])
            step(model)
    assert "forward" not in vars(blocks[0])
    assert all(torch.equal(x, y) for x, y in zip(gradients(model), gradients(other), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), other.buffers(), strict=True))
    if momentum and not synchronised:
        plain = metrics.measure_memory(lambda: step(model)).allocated
        with recomputed(*blocks):
            assert metrics.measure_memory(lambda: step(model)).allocated < 0.5 * plain


def test_dropout_draws_the_same_when_recomputed():
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64)), torch.randn(8, 64)
    found = []
    for modules in ((), (model,)):
        model.zero_grad()
        torch.manual_seed(1)
        with recomputed(*modules):
            model(inputs).square().sum().backward()
        found.append([gradient.clone() for gradient in gradients(model)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_pace_by_hand():
    pace = Pace((8, 8, 8), (1.0, 4.0, 1.0))
    assert (pace.slowest, pace.idle) == (1, 0.5)
    assert pace.shares(27) == [12, 3, 12]
    assert pace.shares(25) == [11, 3, 11]  # 11.1, 2.8 and 11.1
    assert pace.shares(1) == [1, 0, 0]
    assert (
        str(pace) == "worker 1 of 3 is the last, with 4.00 times the median: 50% of the workers' time is spent waiting"
    )


class Sluggish(nn.Linear):
    """A layer that takes its time for each sample, as on a slower machine."""

    def forward(self, inputs):
        time.sleep((0.08 if distributed.get_rank() == 1 else 0.02) * len(inputs))
        return super().forward(inputs)


BATCH = torch.arange(24.0).view(12, 2) / 24, torch.arange(12) % 3


def straggle():
    """Steps of even shares and of shares by pace: who was late, and the gradients."""
    rank, n = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model, shares, found = Sluggish(2, 3).double(), [4] * n, []
    model(BATCH[0][:1].double()).sum().backward()  # a first call takes longer
    for _ in range(2):
        end = sum(shares[: rank + 1])
        inputs, targets = (part[end - shares[rank] : end] for part in (BATCH[0].double(), BATCH[1]))
        model.zero_grad()
        start = time.perf_counter()
        loss = cross_entropy(model(inputs), targets)
        pace = gather_pace(len(inputs), time.perf_counter() - start)
        (loss * loss_weight(len(inputs))).backward()
        average_gradients(model)
        found.append((pace.slowest, pace.idle, shares, [gradient.clone() for gradient in gradients(model)]))
        shares = pace.shares(12)
    return found


def sentence(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except CompanionError as error:
        return str(error)
    return None


def diverge():
    """What `check_in_step` says to this worker of five networks."""
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    found = [sentence(check_in_step, model)]
    broadcast_model(model)
    model(torch.randn(4, 2))
    found += [sentence(check_in_step, model), sentence(check_in_step, model, buffers=True)]
    if rank == 2:
        with torch.no_grad():  # a difference that no tolerance would show
            model[2].weight[0, 1] = torch.nextafter(model[2].weight[0, 1], torch.tensor(9.0))
    found += [sentence(check_in_step, model)]
    for options in ({"out_features": 3 if rank else 5}, {"out_features": 3, "bias": rank != 1}):
        torch.manual_seed(0)
        found += [sentence(check_in_step, nn.Linear(2, **options))]
    return found


def in_parts():
    """How often gradients were exchanged for a share in three parts under DistributedDataParallel, and the mean."""
    torch.manual_seed(0)
    model, exchanged = nn.Linear(2, 3).double(), []
    wrapped = DistributedDataParallel(model)

    def count(_, bucket):
        exchanged.append(bucket)
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    inputs, targets = (part[4 * distributed.get_rank() :][:4] for part in (BATCH[0].double(), BATCH[1]))
    backward_in_parts(wrapped, inputs, targets, loss=cross_entropy, parts=3)
    return len(exchanged), gradients(model)


def late():
    """The last thing that is done: worker 1 does not come."""
    if distributed.get_rank() == 1:
        return time.sleep(2)
    try:
        return distributed.monitored_barrier(timeout=timedelta(seconds=1), wait_all_ranks=True)
    except RuntimeError as error:
        return str(error)


@pytest.fixture(scope="module")
def answers():
    return list(zip(*launch(lambda: (straggle(), diverge(), in_parts(), late()), 3), strict=True))


def in_one_process():
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    cross_entropy(model(BATCH[0].double()), BATCH[1]).backward()
    return gradients(model)


def test_a_straggler_is_named_and_shares_by_pace_cure_it(answers):
    (even, paced), *others = answers[0]
    assert (even[0], even[2]) == (1, [4, 4, 4])
    assert even[1] > 0.3  # 0.08, 0.32 and 0.08 s: half of the time
    assert paced[2][1] < 3 < min(paced[2][0], paced[2][2])
    assert paced[1] < even[1] - 0.15
    for found in (even, paced, *(each for other in others for each in other)):
        torch.testing.assert_close(found[3], in_one_process(), rtol=1e-12, atol=1e-15)


def test_workers_that_diverge_are_told_where(answers):
    start = "; start with the same network and broadcast_model, and average every gradient."
    for found in answers[1]:
        assert found == [
            f"worker 1 of 3 is out of step: its 0.weight differs from worker 0's{start}",
            None,
            f"worker 1 of 3 is out of step: its 1.running_mean differs from worker 0's{start}",
            f"worker 2 of 3 is out of step: its 2.weight differs from worker 0's{start}",
            f"worker 0 of 3 is out of step: its weight is float32 [5, 2], worker 1's is float32 [3, 2]{start}",
            f"worker 1 of 3 is out of step: its bias is missing, worker 0's is float32 [3]{start}",
        ]


def test_parts_exchange_gradients_once(answers):
    for exchanged, found in answers[2]:
        assert exchanged == 1
        torch.testing.assert_close(found, in_one_process(), rtol=1e-12, atol=1e-15)


def test_torchs_barrier_names_who_is_missing(answers):
    assert "Ranks 1 failed to pass monitoredBarrier" in answers[3][0]


def different_calls():
    if distributed.get_rank() == 0:
        distributed.all_reduce(torch.ones(3))
    else:
        distributed.broadcast(torch.ones(3), 0)


def test_calls_that_do_not_belong_together_are_named_in_torchs_debug_mode(monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    with pytest.raises(WorkerError, match=r"Detected mismatch between collectives on ranks.*BROADCAST.*ALLREDUCE"):
        launch(different_calls, 2)


def test_what_gives_no_pace():
    with pytest.raises(CompanionError, match="known only after"):
        gather_pace(3, 0.0, gather=lambda pair: [pair])
    with pytest.raises(CompanionError, match="known only after"):
        gather_pace(0, 1.0, gather=lambda pair: [pair])
