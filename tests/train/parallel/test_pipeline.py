"""The pipeline: equal training under both schedules, what is kept, and the bubble on the clock."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from companion import CompanionError
from companion.train.parallel import (
    Event,
    Pipeline,
    Wait,
    ideal_bubble,
    in_flight,
    launch,
    measured_bubble,
    split,
    timeline,
)

STEPS, STAGES, MICROBATCHES = 10, 3, 6


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.LayerNorm(16), nn.Linear(16, 5))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 12, generator=generator), torch.arange(12) % 5) for _ in range(STEPS)]


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def works():
    rank, found = distributed.get_rank(), {}
    for schedule in ("gpipe", "1f1b"):
        layers = split(network(), STAGES)[rank]
        pipeline, optimizer, losses = (
            Pipeline(layers, MICROBATCHES, cross_entropy, schedule=schedule),
            momentum(layers),
            [],
        )
        for x, y in batches():
            optimizer.zero_grad()
            losses.append(pipeline.step(x if rank == 0 else None, y if rank == STAGES - 1 else None))
            optimizer.step()
        found[schedule] = layers.state_dict(), losses, list(pipeline.events)

    # On the clock: layers that wait, so that the schedule shows on a busy machine, too.
    bubbles = {}
    for microbatches in (3, 9):
        played = Pipeline(nn.Sequential(nn.Linear(4, 4), Wait(0.03, 0.06)), microbatches, lambda out, y: out.mean())
        bubbles[microbatches] = []
        for _ in range(3):  # the first one also sets up the stages
            distributed.barrier()
            played.step(torch.zeros(9, 4), torch.zeros(9))
            bubbles[microbatches].append(list(played.events))

    wrongs = [
        lambda: Pipeline(layers, 4, cross_entropy, schedule="zero"),
        lambda: Pipeline(layers, 2, cross_entropy),
        lambda: Pipeline(layers, 0, cross_entropy, schedule="gpipe"),
    ]
    if rank != 1:  # a stage in the middle takes no batch
        wrongs += [lambda: pipeline.step(torch.zeros(7, 12), torch.zeros(7)), lambda: pipeline.step()]
    sentences = []
    for wrong in wrongs:
        try:
            wrong()
        except CompanionError as error:
            sentences.append(str(error))
    return found, bubbles, sentences


@pytest.fixture(scope="module")
def workers():
    return launch(works, STAGES)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equals_one_process_with_momentum(workers, schedule):
    model, start, losses = network(), network().state_dict(), []
    optimizer = momentum(model)
    for x, y in batches():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = {name: value for found, *_ in workers for name, value in found[schedule][0].items()}
    assert weights.keys() == start.keys()
    for name, value in model.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-2, name
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    *others, last = [found[schedule][1] for found, *_ in workers]
    assert [loss.item() for loss in last] == pytest.approx(losses, abs=1e-5)
    assert others == [[None] * STEPS] * 2


def test_both_schedules_in_order_and_1f1b_keeps_fewer_activations(workers):
    events = {name: timeline(found[name][2] for found, *_ in workers) for name in ("gpipe", "1f1b")}
    assert in_flight(events["gpipe"]) == {0: 6, 1: 6, 2: 6}
    assert in_flight(events["1f1b"]) == {0: 3, 1: 2, 2: 1}  # p - s
    order = {
        name: " ".join(f"{e.kind[0]}{e.microbatch}" for e in found if e.stage == 1) for name, found in events.items()
    }
    assert order["gpipe"] == "f0 f1 f2 f3 f4 f5 b0 b1 b2 b3 b4 b5"
    assert order["1f1b"] == "f0 f1 b0 f2 b1 f3 b2 f4 b3 f5 b4 b5"
    for found in events.values():
        assert found[0].start == 0
        when = {(e.stage, e.kind, e.microbatch): (e.start, e.end) for e in found}
        for m in range(MICROBATCHES):  # nobody computes on what has not arrived
            for s in range(STAGES - 1):
                assert when[s, "forward", m][1] < when[s + 1, "forward", m][0]
                assert when[s + 1, "backward", m][1] < when[s, "backward", m][0]


def test_measured_bubble_is_near_the_formula(workers):
    measured = {
        m: min(measured_bubble(timeline(bubbles[m][step] for _, bubbles, _ in workers)) for step in (1, 2))
        for m in (3, 9)
    }  # the step that other programs disturbed less
    for m, share in measured.items():
        assert share == pytest.approx(ideal_bubble(STAGES, m), abs=0.12)  # 0.40 and 0.18
    assert measured[9] < measured[3] - 0.1


def test_formulas_by_hand():
    assert ideal_bubble(4, 1) == 0.75
    assert ideal_bubble(1, 8) == 0
    assert ideal_bubble(2, 3) == 0.25
    # Two stages, one microbatch: each works for two of four seconds.
    kinds = [(0, "forward", 5, 6), (1, "forward", 6, 7), (1, "backward", 7, 8), (0, "backward", 8, 9)]
    workers = [[Event(s, kind, 0, a, b) for s, kind, a, b in kinds if s == stage] for stage in (1, 0)]
    events = timeline(workers)
    assert [(e.stage, e.start, e.end) for e in events] == [(0, 0, 1), (1, 1, 2), (1, 2, 3), (0, 3, 4)]
    assert measured_bubble(events) == 0.5
    assert in_flight(events) == {0: 1, 1: 1}


def test_wrong_input(workers):
    too_few = "2 microbatches are too few for 3 stages of 1f1b.", "0 microbatches are too few for 3 stages of gpipe."
    always = ["there is no schedule 'zero': choose gpipe or 1f1b.", *too_few]
    cut = "a batch of 7 cannot be cut into 6 microbatches: choose a divisor."
    assert workers[0][2] == [*always, cut, "the first stage needs x."]
    assert workers[1][2] == always
    assert workers[2][2] == [*always, cut, "the last stage needs target."]


def test_wait_hands_on_input_and_gradient():
    x = torch.randn(3, requires_grad=True)
    Wait(0.0, 0.0)(2 * x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))
