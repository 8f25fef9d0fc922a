"""The clients, against servers of a few lines that do one thing, right or wrong."""

import asyncio
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from companion import CompanionError

pytest.importorskip("httptools", reason="the extra serve is not installed")
from companion.serve.load import Load, Request, complete, load


async def read(reader):
    """The body of the next request, and its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(length)


def answer(predictions, status=200, extra=""):
    body = json.dumps({"predictions": predictions}).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


async def echo(reader, writer):
    while True:
        _, body = await read(reader)
        writer.write(answer([int(body)]))


@contextmanager
def server(handle):
    """Its URL; it runs in a loop of its own."""
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def guarded(reader, writer):
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main():
        found = await asyncio.start_server(guarded, "127.0.0.1", 0, backlog=2048)
        port.append(found.sockets[0].getsockname()[1])
        ready.set()
        stop.append(asyncio.Event())
        await stop[0].wait()
        found.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stop = []
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}/predict"
    finally:
        loop.call_soon_threadsafe(stop[0].set)
        thread.join(10)
        loop.close()


NUMBERS = [Request(str(number).encode(), "text/plain", [number]) for number in range(7)]


@pytest.mark.parametrize("how", [{"concurrency": 1}, {"concurrency": 16}, {"rate": 200}])
def test_right_answers_are_counted(how):
    with server(echo) as url:
        found = load(url, NUMBERS, seconds=0.5, **how)
    assert found.failures == {}
    assert len(found.latencies) > 20
    assert (found.latencies > 0).all()
    assert found.throughput == len(found.latencies) / found.seconds
    assert found.latency(0) <= found.latency() <= found.latency(99) <= found.latency(100)


def test_answers_of_others_are_wrong():
    async def off_by_one(reader, writer):
        while True:
            _, body = await read(reader)
            number = int(body)
            writer.write(answer([number + 1 if number == 0 else number]))

    with server(off_by_one) as url:
        found = load(url, NUMBERS, concurrency=1, seconds=0.1)
    wrong = found.failures["wrong answer"]
    assert list(found.failures) == ["wrong answer"]
    assert wrong == -(-(wrong + len(found.latencies)) // 7)  # the first of every seven, in turn


@pytest.mark.parametrize("body", [b"null", b"[1]", b"{", b'{"predictions": 3}', b'{"labels": []}'])
def test_answers_of_another_form_are_wrong(body):
    async def odd(reader, writer):
        while True:
            await read(reader)
            writer.write(f"HTTP/1.1 200 X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    with server(odd) as url:
        found = load(url, NUMBERS, concurrency=1, seconds=0.05)
    assert list(found.failures) == ["wrong answer"]


def test_refusals_are_counted_by_status():
    async def refuse(reader, writer):
        while True:
            _, body = await read(reader)
            writer.write(answer([int(body)], status=503 if int(body) % 2 else 200))

    with server(refuse) as url:
        found = load(url, NUMBERS, concurrency=2, seconds=0.2)
    assert list(found.failures) == ["503"]
    assert len(found.latencies)


def test_a_server_that_hangs_up_each_time_is_asked_anew():
    async def once(reader, writer):
        _, body = await read(reader)
        writer.write(answer([int(body)], extra="Connection: close\r\n"))

    with server(once) as url:
        found = load(url, NUMBERS, concurrency=2, seconds=0.2)
    assert found.failures == {}
    assert len(found.latencies) > 5


def test_a_connection_lost_before_the_answer_is_a_failure():
    async def leave(reader, writer):
        await read(reader)

    with server(leave) as url:
        found = load(url, NUMBERS, concurrency=2, seconds=0.1)
    assert list(found.failures) == ["connection lost"]
    assert np.isnan(found.latency())
    assert found.to_json()["latency_ms"] is None


def test_no_http_at_all():
    async def noise(reader, writer):
        await read(reader)
        writer.write(b"\x00garbage\r\n\r\n")
        await asyncio.sleep(5)

    with server(noise) as url:
        found = load(url, NUMBERS, concurrency=1, seconds=0.05)
    assert list(found.failures) == ["connection lost"]


def test_an_endless_answer_is_cut():
    async def pour(reader, writer):
        await read(reader)
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()

    with server(pour) as url:
        found = load(url, NUMBERS, concurrency=1, seconds=0.05)
    assert list(found.failures) == ["connection lost"]


def test_a_silent_server_is_a_time_out():
    async def silent(reader, writer):
        await read(reader)
        await asyncio.sleep(5)

    with server(silent) as url:
        found = load(url, NUMBERS, concurrency=3, seconds=0.05, timeout=0.1)
    assert found.failures == {"time-out": 3}
    assert len(found.latencies) == 0


def test_a_stall_counts_for_all_who_were_due_in_it():
    """An open loop keeps sending while the server stands still; a closed one sends nothing and notices one delay."""
    stalled = threading.Event()

    async def stall(reader, writer):
        while True:
            _, body = await read(reader)
            if not stalled.is_set():
                stalled.set()
                threading.Event().wait(0.5)  # the whole loop of the server
            writer.write(answer([int(body)]))

    with server(stall) as url:
        open_ = load(url, NUMBERS, rate=100, seconds=1.0)
        stalled.clear()
        closed = load(url, NUMBERS, concurrency=1, seconds=1.0)
    slow = 0.1  # a fifth of the stall: in the open loop four fifths of those who were due in it
    assert (open_.latencies > slow).sum() > 20
    assert (open_.latencies > slow).mean() > 5 * (closed.latencies > slow).mean()


def test_the_token_and_the_path_arrive():
    heads = []

    async def note(reader, writer):
        while True:
            head, body = await read(reader)
            heads.append(head)
            writer.write(answer([int(body)]))

    with server(note) as url:
        load(url + "?a=b", NUMBERS, concurrency=1, seconds=0.02, token="secret")
    assert heads[0].startswith(b"POST /predict?a=b HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in heads[0]
    assert b"\r\nContent-Type: text/plain\r\n" in heads[0]


def test_plain_values():
    found = Load(2.0, np.array([0.001, 0.002, 0.003]), {"503": 1}).to_json()
    assert json.loads(json.dumps(found)) == found
    assert (found["answers"], found["requests_per_second"], found["failures"]) == (3, 1.5, {"503": 1})
    assert found["latency_ms"]["p50"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either concurrency"),
        ({"concurrency": 1, "rate": 1}, "give either concurrency"),
        ({"concurrency": 0}, "concurrency is 0: give a number from 1 to 1024"),
        ({"rate": 0}, "rate is 0: give requests a second"),
        ({"concurrency": 1, "seconds": 0}, "seconds is 0"),
        ({"concurrency": 1, "timeout": float("nan")}, "timeout is nan"),
        ({"concurrency": 1, "token": "a\r\nb"}, "the token has characters"),
    ],
)
def test_wrong_values_are_refused(options, said):
    with pytest.raises(CompanionError, match=said):
        load("http://127.0.0.1:9/predict", NUMBERS, **options)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:x/"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(CompanionError, match="is no address of a server"):
        load(url, NUMBERS, concurrency=1)


def test_nothing_to_send():
    with pytest.raises(CompanionError, match="nothing to send"):
        load("http://127.0.0.1:9/", [], concurrency=1)


def test_nobody_listens():
    with pytest.raises(CompanionError, match=r"nobody answers at http://127\.0\.0\.1:9/predict"):
        load("http://127.0.0.1:9/predict", NUMBERS, concurrency=2)


def test_coroutines_run_where_a_loop_runs_already():
    async def answer():
        await asyncio.sleep(0)
        return 42

    async def notebook():
        return complete(answer())

    assert complete(answer()) == asyncio.run(notebook()) == 42
