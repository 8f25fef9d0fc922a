"""All-reduce by hand against torch's own, on one to four workers; one launch for each number of them."""

from fractions import Fraction

import pytest
import torch
from torch import distributed

from companion.errors import CompanionError
from companion.train.parallel import launch, naive_all_reduce, ring_all_reduce, ring_bytes

LENGTHS = (0, 1, 2, 3, 4, 5, 7, 12, 24, 97, 1000, 4096)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def reduce_all():
    """(case, worst difference to the library's sum, traffic), for many tensors; and the bits that each worker got."""
    rank = distributed.get_rank()
    seeded = torch.Generator().manual_seed(rank)
    cases = {
        f"{length} {dtype}": torch.randint(-99, 99, (length,), generator=seeded).to(dtype)
        for length in LENGTHS
        for dtype in DTYPES
    }
    cases |= {f"{length} random": torch.randn(length, dtype=torch.float64, generator=seeded) for length in LENGTHS}
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=seeded)
    cases["channels last"] = image.to(memory_format=torch.channels_last)
    cases["transposed"] = image.transpose(0, 3)
    cases["every other"] = torch.randn(24, dtype=torch.float64, generator=seeded)[::2]
    cases["number"] = torch.tensor(1.0 + rank)
    cases["parameter"] = torch.nn.Parameter(torch.full((5,), 1.0 + rank))
    found = {}
    for name, tensor in cases.items():
        wanted = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(wanted)
        kept = {}
        for function in (ring_all_reduce, naive_all_reduce):
            values = tensor.detach().clone() if name != "parameter" else torch.nn.Parameter(tensor.detach().clone())
            before = values.stride(), values.data_ptr()
            traffic = function(values)
            assert (values.stride(), values.data_ptr()) == before
            worst = (values.detach() - wanted).abs().max().item() if wanted.numel() else 0.0
            kept[function.__name__] = (worst, traffic.sent, traffic.received, values.detach().tolist())
        found[name] = kept
    return found


def alone(function):
    """In this process, which is the only worker."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return function()
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def answers(request):
    return launch(reduce_all, request.param) if request.param > 1 else [alone(reduce_all)]


def tolerance(case: str) -> float:
    if "random" in case or case in ("channels last", "transposed", "every other"):
        return 1e-12
    return 4.0 if "bfloat16" in case else 0.0  # each of two sums rounds twice at most, from 256 on to even numbers


def test_the_sum_is_the_librarys_and_alike_on_all_workers(answers):
    for case, found in answers[0].items():
        for function in found:
            values = [answer[case][function] for answer in answers]
            assert max(worst for worst, *_ in values) <= tolerance(case), (case, function)
            assert all(value[3] == values[0][3] for value in values), (case, function)


def test_the_ring_sends_the_bytes_of_the_formula(answers):
    n = len(answers)
    for length in LENGTHS:
        for dtype in DTYPES:
            sent = [answer[f"{length} {dtype}"]["ring_all_reduce"][1] for answer in answers]
            received = [answer[f"{length} {dtype}"]["ring_all_reduce"][2] for answer in answers]
            exact = Fraction(2 * (n - 1), n) * length * dtype.itemsize
            assert sum(sent) == sum(received) == exact * n
            if length % n == 0:
                assert set(sent) == set(received) == {exact}
                assert ring_bytes(length, n, dtype.itemsize) == pytest.approx(float(exact), rel=1e-15)
            assert max(sent) - min(sent) <= 2 * dtype.itemsize


def test_without_a_ring_one_worker_carries_it_all(answers):
    n = len(answers)
    traffic = [answer["4096 torch.float32"]["naive_all_reduce"][1:3] for answer in answers]
    assert traffic[0] == ((n - 1) * 4 * 4096,) * 2
    assert traffic[1:] == [(4 * 4096,) * 2] * (n - 1)


def test_what_is_sparse_is_refused():
    with pytest.raises(CompanionError, match="a sparse tensor cannot be cut into chunks"):
        alone(lambda: ring_all_reduce(torch.eye(3).to_sparse()))
