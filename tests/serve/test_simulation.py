"""The made-up server, against arithmetic, queueing theory and another simulation."""

import numpy as np
import pytest

from companion import CompanionError
from companion.serve import simulate


def cnn(n):
    return 0.15e-3 + 0.06e-3 * n


def resnet18(n):
    return 12e-3 + 2.5e-3 * n


@pytest.mark.parametrize("policy", ["idle", "fixed", "hold"])
def test_one_client_waits_for_the_loop_and_the_model_only(policy):
    found = simulate(resnet18, clients=1, http=0.001, away=0.002, policy=policy, max_wait_ms=100)
    np.testing.assert_allclose(found.latencies, 0.001 + 0.0145)
    assert found.throughput == pytest.approx(1 / (0.001 + 0.0145 + 0.002), rel=0.01)
    assert set(found.batch_sizes) == {1}


def test_one_at_a_time_is_the_queue_of_theory():
    """Arrivals at random, a fixed time of service, one server: the mean wait of M/D/1 is ρ/(2(1−ρ)) services."""
    service, load = 0.01, 0.6
    found = simulate(lambda n: service, rate=load / service, http=0, max_batch_size=1, max_queue=10**6, seconds=1500)
    waits = found.latencies - service
    assert waits.mean() == pytest.approx(service * load / (2 * (1 - load)), rel=0.05)


def test_the_loop_is_a_bottleneck_too():
    found = simulate(lambda n: 1e-6, clients=64, http=0.001)
    assert found.throughput == pytest.approx(1000, rel=0.01)


def test_a_batch_of_all_is_the_bound_of_a_closed_loop():
    found = simulate(resnet18, clients=8, http=0, away=0, policy="hold")
    assert found.throughput == pytest.approx(8 / resnet18(8), rel=0.01)


@pytest.mark.parametrize(
    ("policy", "wait", "throughput", "p50"),
    [("idle", 2, 173, 46), ("fixed", 10, 183, 44), ("hold", 10, 227, 35)],
)
def test_as_another_simulation_of_eight_clients(policy, wait, throughput, p50):
    """Of the same costs, written before this one; clients that need a millisecond split into halves when idle."""
    found = simulate(resnet18, clients=8, away=0.001, policy=policy, max_wait_ms=wait)
    assert found.throughput == pytest.approx(throughput, rel=0.1)
    assert 1e3 * found.latency() == pytest.approx(p50, rel=0.1)


def large(n):
    return 120e-3 + 25e-3 * n


@pytest.mark.parametrize("policy", ["idle", "fixed"])
def test_clients_out_of_step_stay_in_groups_that_take_turns(policy):
    """While one group is in the model the other is answered and asks again; nothing brings them together. The cost is
    linear, so two groups take as long as two halves would."""
    found = simulate(large, clients=8, http=0, away=0.01, policy=policy, max_wait_ms=20, seconds=100)
    assert found.throughput == pytest.approx(4 / large(4), rel=0.05)
    late = found.batch_sizes[len(found.batch_sizes) // 2 :]
    assert set(late[1:] + late[:-1]) == {8}


def test_a_request_by_hand():
    """Sent 1, read and queued 2, to the thread 3, the model 10, back 3, answered 2, taken 1."""
    times = {"generator": 0.002, "http": 0.004, "wake": 0.003, "away": 0}
    found = simulate(lambda n: 0.010, clients=1, **times)
    np.testing.assert_allclose(found.latencies, 0.022)
    assert found.throughput == pytest.approx(1 / 0.022, rel=0.01)


@pytest.mark.parametrize(("shared", "period"), [(0, 0.1), (0.5, 0.12), (1, 0.14)])
def test_the_loop_holds_up_the_model_by_what_they_share(shared, period):
    """Two clients, one at a time: after a call of 100 the other's call begins, and while it runs the first is answered
    (20), read and queued again (10 + 10)."""
    found = simulate(lambda n: 0.1, clients=2, http=0.04, away=0, shared=shared, max_batch_size=1, seconds=100)
    assert found.throughput == pytest.approx(1 / period, rel=0.01)


@pytest.mark.parametrize("shared", [0, 1])
def test_the_loop_rests_while_a_short_call_runs(shared):
    """Two clients, one at a time: a call of 10, and only then is its client answered (2), read and queued again."""
    found = simulate(lambda n: 0.01, clients=2, http=0.004, away=0, shared=shared, max_batch_size=1)
    assert found.throughput == pytest.approx(1 / 0.014, rel=0.01)


def test_the_loop_does_not_rest_for_good():
    """A call of 10 comes to take 100 at once: the loop goes on after 20 of them, and when it knows, at once."""
    calls = iter([0.01, 0.01, *[0.1] * 10_000])
    found = simulate(lambda n: next(calls), clients=2, http=0.09, away=0, shared=0, max_batch_size=1, seconds=100)
    assert found.throughput == pytest.approx(1 / 0.1, rel=0.01)


def test_a_load_generator_is_a_bottleneck_too():
    found = simulate(lambda n: 1e-6, clients=64, http=0, away=0, generator=0.001, seconds=2)
    assert found.throughput == pytest.approx(1000, rel=0.01)


def test_clients_who_are_refused_come_again():
    """Four clients and one place to wait: the model works without a pause, and who is refused asks once a turn."""
    found = simulate(lambda n: 0.1, clients=4, http=0, away=0.001, max_batch_size=1, max_queue=1)
    assert found.throughput == pytest.approx(10, rel=0.02)
    assert found.rejected == pytest.approx(2 * 9 / 0.001, rel=0.1)


def test_the_latency_of_nobody_is_not_a_number():
    assert np.isnan(simulate(cnn, rate=1e-9, seconds=0.01).latency())


def test_waiting_100_ms_is_the_worst_of_both():
    best, worst = (simulate(cnn, clients=8, policy=policy, max_wait_ms=100) for policy in ("idle", "fixed"))
    assert best.throughput > 20 * worst.throughput
    assert best.latency() < worst.latency() / 20


def test_no_batch_is_larger_than_the_cap_and_full_queues_refuse():
    found = simulate(resnet18, rate=2000, http=0, max_batch_size=16, max_queue=40, seconds=5)
    assert found.batch_sizes.max() == 16
    assert found.throughput == pytest.approx(16 / resnet18(16), rel=0.02)
    offered = 2000 * 4.5
    assert found.rejected == pytest.approx(offered - found.throughput * 4.5, rel=0.05)
    assert found.latencies.max() <= resnet18(16) * 4  # what runs, and three batches of the queue


def test_the_seed_decides():
    first, again, other = (simulate(cnn, rate=500, seed=seed, seconds=1) for seed in (0, 0, 1))
    assert np.array_equal(first.latencies, again.latencies)
    assert not np.array_equal(first.latencies, other.latencies)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either clients"),
        ({"clients": 1, "rate": 1}, "give either clients"),
        ({"clients": 0}, "clients is 0"),
        ({"clients": 1.5}, "clients is 1.5"),
        ({"rate": 0}, "rate is 0"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"rate": 1, "seconds": 0}, "seconds is 0"),
        ({"clients": 1, "seconds": float("inf")}, "seconds is inf"),
        ({"rate": 1, "http": -1}, "http is -1"),
        ({"rate": 1, "away": float("nan")}, "away is nan"),
        ({"rate": 1, "generator": -1}, "generator is -1"),
        ({"rate": 1, "wake": float("inf")}, "wake is inf"),
        ({"rate": 1, "shared": 1.5}, "shared is 1.5"),
        ({"clients": 10, "http": 0, "away": 0, "wake": 0.001, "max_queue": 2}, "would never let time pass: give away"),
        ({"clients": 10, "http": 0, "away": 0, "max_queue": 2}, "would never let time pass: give away"),
    ],
)
def test_wrong_values_are_refused(options, said):
    with pytest.raises(CompanionError, match=said):
        simulate(cnn, **options)


def test_a_model_that_takes_no_time_for_more_is_refused():
    with pytest.raises(CompanionError, match=r"takes 0\.0 s for a batch of [234]"):
        simulate(lambda size: 1e-3 if size == 1 else 0.0, clients=4, http=0, away=0, policy="hold")


def test_a_model_that_takes_no_time_is_refused():
    with pytest.raises(CompanionError, match="takes 0 s for a batch of 1"):
        simulate(lambda n: 0, clients=1)
