"""A server under load for a minute at a time: right answers, an overload and its end, connections that say nothing.

``COMPANION_SOAK`` lengthens the minutes, in seconds.
"""

import asyncio
import math
import os
import socket
import threading
import time

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
from process_cases import PLAIN, ask, coloured, colours_file, http, started, until

from companion.serve.load import Request, load

pytestmark = [
    pytest.mark.stress,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="there is no /proc to read memory from"),  # noqa: PTH110
]

SECONDS = float(os.environ.get("COMPANION_SOAK", "60"))
MIB = 1 << 20
SINGLE = [Request(coloured(number), "image/png", [number]) for number in range(255)]


def form(numbers):
    """A request with several images."""
    parts = b"".join(
        b'--end\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + coloured(number) + b"\r\n"
        for number in numbers
    )
    return Request(parts + b"--end--\r\n", "multipart/form-data; boundary=end", numbers)


class Watched:
    """Calls ``look`` again and again while the block runs."""

    def __init__(self, look, every):
        self.found, self._end = [], threading.Event()
        self._thread = threading.Thread(target=self._run, args=(look, every))

    def _run(self, look, every):
        while not self._end.wait(every):
            self.found.append(look())

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._end.set()
        self._thread.join()


def growth(sizes):
    """Bytes from the first third of a run, when all is warm, to its end."""
    return max(sizes[-3:]) - max(sizes[: len(sizes) // 3])


def test_two_hundred_clients_each_get_their_own_answers(tmp_path, colours):
    forms = [form([(7 * number + 31 * step) % 255 for step in range(5)]) for number in range(45)]
    requests = SINGLE + forms
    with started(tmp_path, colours) as server:
        with Watched(server.rss, every=0.5) as memory:
            found = load(f"{server.url}/predict", requests, concurrency=200, seconds=SECONDS, timeout=60)
        assert found.failures == {}
        assert server.metric("companion_requests_total", status="200") == len(found.latencies)
        assert server.metric("companion_batch_size_bucket", le="32.0") == server.metric("companion_batch_size_count")
        assert server.stop() == 0
    assert len(found.latencies) > 10 * len(requests)
    assert growth(memory.found) < 32 * MIB
    assert server.faults() == []


def test_an_overload_of_three_times_what_it_can_bear(tmp_path):
    """Who is let in waits no longer than the queue is long; the others are told when to come again."""
    queue, batch = 64, 16
    options = ("--max-queue", queue, "--max-batch", batch)
    with started(tmp_path, colours_file(tmp_path, work=100), *options) as server:
        url = f"{server.url}/predict"

        def full_speed():
            return load(url, SINGLE, concurrency=48, seconds=4, timeout=60).throughput

        full_speed()
        before, refusals = full_speed(), []
        with httpx.Client(verify=PLAIN, timeout=60) as client:

            def look():
                answer = client.post(url, content=SINGLE[0].body, headers={"content-type": "image/png"})
                if answer.status_code == 503:
                    refusals.append(int(answer.headers["retry-after"]))
                return time.monotonic(), server.rss(), server.metric("companion_batch_size_sum")

            with Watched(look, every=0.25) as watched:
                found = load(url, SINGLE, rate=3 * before, seconds=SECONDS, timeout=60)
        time.sleep(1)
        after, later = full_speed(), full_speed()
        assert server.stop() == 0
    times, memory, done = zip(*watched.found, strict=True)
    bound = longest(times, done, queue + batch)  # of those in the queue and those in the model
    assert found.failures.keys() == {"503"}
    assert found.latency(99) <= 2 * bound
    assert found.throughput > 0.5 * min(before, after, later)  # those let in are served as fast as ever
    assert after > 0.6 * min(before, later)
    assert len(refusals) > 10
    assert min(refusals) >= 1
    assert max(refusals) <= math.ceil(4 * bound)
    assert growth(memory) < 32 * MIB
    assert server.faults() == []


def longest(times, done, items):
    """The longest time in which so many items were worked off: on a shared machine it is no constant."""
    times, done = np.array(times), np.array(done)
    ends = np.searchsorted(done, done + items)
    return max(times[end] - time for time, end in zip(times, ends, strict=True) if end < len(times))


def test_a_thousand_connections_that_say_nothing_or_little(tmp_path, colours):
    """A third sends nothing, a third a byte of its headers each second, a third a byte of its body."""
    with started(tmp_path, colours) as server:
        url = f"{server.url}/predict"
        before = load(url, SINGLE, concurrency=8, seconds=4, timeout=60)
        idle = [socket.create_connection(server.address, timeout=60) for _ in range(1000)]
        whole = http("image/png", SINGLE[0].body)
        slow = [(connection, whole) for connection in idle[1::3]]
        for connection in idle[2::3]:
            connection.sendall(whole[: -len(SINGLE[0].body)])
            slow.append((connection, SINGLE[0].body))
        turn = 0

        def drip():
            nonlocal turn
            for connection, what in slow:
                try:
                    connection.send(what[turn : turn + 1])
                except OSError:  # the server has had enough of it
                    continue
            turn += 1

        with Watched(drip, every=1):
            during = load(url, SINGLE, concurrency=8, seconds=8, timeout=60)
            fresh = asyncio.run(new_connections(server.address, 50))
        for connection in idle:
            connection.close()
        until(lambda: open_files(server) < 100)
        assert server.stop() == 0
    assert turn >= 5
    assert during.failures == {}
    assert fresh == [200] * 50
    assert during.throughput > 0.4 * before.throughput
    assert not [line for line in server.faults() if "Traceback" in line]


async def new_connections(address, count):
    """The answers to requests that each come on a connection of their own."""
    statuses = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(*address)
        status, _, _ = await asyncio.wait_for(ask(reader, writer, http("image/png", SINGLE[1].body)), 60)
        statuses.append(status)
        writer.close()
    return statuses


def open_files(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))  # noqa: PTH208
