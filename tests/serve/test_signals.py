"""Servers that are ended, and workers that are killed, while clients ask."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
from process_cases import ask, coloured, http, post, started, until
from prometheus_client import CollectorRegistry, multiprocess

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]

CLIENTS = 48
BODIES = [coloured(number) for number in range(CLIENTS)]


async def client(address, number, seen, ended):
    """Ask until the end. ``seen`` counts how requests ended: ``unread`` without a byte of an answer."""
    request = http("image/png", BODIES[number])
    while not ended.is_set():
        try:
            reader, writer = await asyncio.open_connection(*address)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        try:
            while True:
                status, headers, body = await ask(reader, writer, request)
                right = status != 200 or json.loads(body)["predictions"] == [number]
                seen[status if right else "wrong"] += 1
                if headers.get("connection") == "close":
                    break
        except asyncio.IncompleteReadError as error:
            seen["half" if error.partial else "unread"] += 1
        except ConnectionError:
            seen["unread"] += 1
        finally:
            writer.close()


def under_load(address, then, clients=CLIENTS):
    """How requests ended of clients that ask while ``then(seen)`` happens, which ends the server."""
    seen, ended = Counter(), threading.Event()

    async def main():
        asking = [asyncio.create_task(client(address, number, seen, ended)) for number in range(clients)]
        try:
            await asyncio.to_thread(then, seen)
        finally:
            ended.set()
        await asyncio.wait_for(asyncio.gather(*asking), 120)

    asyncio.run(main())
    return seen


def counted(folder):
    """What the server itself counted in a folder of Prometheus' files, which outlive it: name and status → value."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))
    return {
        (sample.name, sample.labels.get("status")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }


@pytest.mark.parametrize("turn", range(20))
def test_sigterm_under_load_answers_all_that_was_accepted(tmp_path, colours, monkeypatch, turn):
    """What the server counted as answered, its clients have; what went through the model was answered."""
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    enough = np.random.default_rng(turn).integers(CLIENTS, 2000)
    with started(tmp_path, colours, "--grace", "30") as server:

        def end(seen):
            until(lambda: seen[200] >= enough)
            assert server.stop(seconds=30) == 0

        seen = under_load(server.address, end)
    assert seen.keys() <= {200, "unread"}, seen
    told = counted(tmp_path / "metrics")
    statuses = {status: value for (name, status), value in told.items() if name == "companion_requests_total"}
    assert {int(status): value for status, value in statuses.items()} == {200: seen[200]}
    assert told["companion_batch_size_sum", None] == seen[200] + 1  # that which warms up
    assert server.faults() == []


def test_sigterm_does_not_wait_for_clients_that_stall(tmp_path, colours):
    """One has sent nothing, one half of its headers, one half of its body."""
    with started(tmp_path, colours, "--grace", "2") as server:
        whole = http("image/png", BODIES[0])
        stalled = [socket.create_connection(server.address) for _ in range(3)]
        stalled[1].sendall(whole[:30])
        stalled[2].sendall(whole[:-10])
        assert post(server.url, BODIES[1]).status_code == 200
        assert server.stop(seconds=30) == 0
        assert b" 503 " in stalled[2].recv(1000)
        for connection in stalled:
            connection.close()
    assert not [line for line in server.faults() if "Traceback" in line]


@pytest.mark.skipif(not os.path.exists("/proc"), reason="there is no /proc to find the workers in")  # noqa: PTH110
def test_sigkill_of_one_of_two_workers(tmp_path, colours):
    with started(tmp_path, colours, "--workers", "2") as server:
        first, second = server.workers()

        def kill(seen):
            def goes_on():
                before = seen[200]
                until(lambda: seen[200] >= before + 500)

            def new_one():
                until(lambda: len(set(server.workers()) - {first, second}) > news)
                return news + 1

            news = 0
            goes_on()
            os.kill(first, signal.SIGKILL)
            goes_on()  # the other answers
            news = new_one()
            os.kill(second, signal.SIGKILL)
            goes_on()  # nobody but a new one can
            new_one()
            lost.update(seen)
            assert server.stop() == 0

        lost = Counter()
        under_load(server.address, kill, clients=8)
    assert lost.keys() <= {200, "unread", "half"}, lost
    assert lost["unread"] + lost["half"] <= 2 * 8  # what each client had asked when one was killed
    assert not [line for line in server.faults() if "Traceback" in line]
