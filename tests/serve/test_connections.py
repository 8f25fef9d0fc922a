"""Clients that send nothing, too little, too much, or do not read."""

import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve.image import image_app
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, post, red, serving, until

GET = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def rest(connection):
    """What comes until the other side closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def cut(url):
    return httpx.get(f"{url}/stats", timeout=60).json()["cut_connections"]


def predict(body, length=None, kind=b"image/png"):
    length = len(body) if length is None else length
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (kind, length) + body


def test_who_sends_nothing_is_closed_and_who_sends_too_little_is_told():
    with serving(image_app(Slow(), settings=Settings()), head_seconds=0.3) as url:
        with connect(url) as silent:
            assert rest(silent) == b""
        with connect(url) as slow:
            slow.sendall(GET[:-4])
            said = rest(slow)
            assert said.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert said.endswith(b'{"detail": "the head of the request came too slowly."}')
        with connect(url) as idle:
            idle.sendall(GET)
            assert rest(idle).count(b"HTTP/1.1 200 OK") == 1  # answered, and closed a while after
        assert {key: count for key, count in cut(url).items() if key == "slow_head"} == {"slow_head": 1}


def test_a_byte_at_a_time_does_not_make_the_time_longer():
    with serving(image_app(Slow(), settings=Settings()), head_seconds=0.5) as url, connect(url) as slow:
        began = time.monotonic()
        slow.settimeout(0.05)
        sent, said = 0, b""
        while not said:
            slow.sendall(GET[sent : sent + 1] if sent < 20 else b"a")
            sent += 1
            try:
                said = slow.recv(100)
            except TimeoutError:
                assert time.monotonic() - began < 60
        assert said.startswith(b"HTTP/1.1 408 ")


def test_a_thousand_silent_ones_stop_nobody():
    settings = Settings(max_connections=100)
    engine = Slow()
    with serving(image_app(engine, settings=settings), max_connections=100) as url:
        silent = []
        try:
            for _ in range(300):
                silent.append(connect(url))
            for each in silent[::2]:
                try:
                    each.sendall(b"G")
                except ConnectionError:
                    continue
            for number in range(20):
                assert post(url, red(number)).json()["predictions"] == [number]
            assert cut(url)["too_many_connections"] >= 200
        finally:
            for each in silent:
                each.close()


def test_requests_at_work_are_never_closed_to_make_room():
    engine = Slow()
    with serving(image_app(engine, settings=Settings()), max_connections=3) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        found = []
        threads = [threading.Thread(target=lambda n=n: found.append(post(url, red(n)))) for n in range(3)]
        threads[0].start()
        until(lambda: len(engine.sizes) > calls, 60)
        for thread in threads[1:]:
            thread.start()
        time.sleep(0.2)
        with connect(url) as further:
            assert rest(further).startswith(b"HTTP/1.1 503 ")
        engine.gate.set()
        for thread in threads:
            thread.join(60)
        assert sorted(answer.json()["predictions"] for answer in found) == [[0], [1], [2]]


def test_heads_that_are_too_long():
    with serving(image_app(Slow(), settings=Settings())) as url:
        with connect(url) as long:
            long.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n")
            said = b""
            for number in range(3000):
                try:
                    long.sendall(b"x-%04d: %s\r\n" % (number, b"a" * 90))
                except ConnectionError:
                    break
            said = rest(long)
            assert said.startswith(b"HTTP/1.1 431 ") or said == b""  # the answer is lost if more was on its way
        assert cut(url)["long_head"] == 1
        assert post(url, red(1)).json()["predictions"] == [1]


def test_what_is_no_http():
    with serving(image_app(Slow(), settings=Settings())) as url:
        with connect(url) as noise:
            noise.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            assert rest(noise).startswith(b"HTTP/1.1 400 ")
        assert cut(url)["bad_http"] == 1


def test_an_upgrade_is_answered_as_if_it_had_not_been_asked_for():
    with serving(image_app(Slow(), settings=Settings())) as url, connect(url) as upgrading:
        upgrading.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert upgrading.recv(100).startswith(b"HTTP/1.1 200 ")


def test_bodies_share_a_budget_and_give_it_back():
    settings = {"max_memory": 100_000, "max_bytes": 60_000}
    with serving(image_app(Slow(), settings=Settings(**settings)), **settings) as url:
        for _ in range(3):
            with connect(url) as first, connect(url) as second:
                first.sendall(predict(b"x" * 55_000, 60_000))
                second.sendall(predict(b"x" * 55_000, 60_000))
                first.settimeout(0.1)
                said = b""
                while not said:  # whichever was read last
                    for each in (first, second):
                        each.settimeout(0.1)
                        try:
                            said = said or each.recv(1000)
                        except TimeoutError:
                            continue
                assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
                assert b"\r\nretry-after: 1\r\n" in said
        assert post(url, red(1)).json()["predictions"] == [1]
        assert cut(url)["memory"] == 3


def test_who_does_not_read_is_cut():
    with serving(image_app(Slow(), settings=Settings()), write_seconds=0.3) as url:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = url.removeprefix("http://").partition(":")
        deaf.connect((host, int(port)))
        ask = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
        with deaf:
            deaf.settimeout(0.2)
            try:
                for _ in range(200):
                    deaf.sendall(ask)
            except (TimeoutError, ConnectionError):
                pass
            until(lambda: cut(url).get("deaf") == 1, 60)


def test_pipelined_requests_are_answered_in_order():
    with serving(image_app(Slow(), settings=Settings())) as url, connect(url) as connection:
        connection.sendall(b"".join(predict(red(number)) for number in range(5)))
        said = b""
        while said.count(b"}") < 5:
            said += connection.recv(65536)
    places = [said.index(b'"predictions": [%d]' % number) for number in range(5)]
    assert places == sorted(places)


def test_the_answer_at_the_end_says_that_the_connection_ends():
    engine = Slow()
    connection = None
    with serving(image_app(engine, settings=Settings())) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        connection = connect(url)
        connection.sendall(predict(red(4)))
        until(lambda: len(engine.sizes) > calls, 60)
        threading.Timer(0.3, engine.gate.set).start()
    with connection:
        said = rest(connection)
    assert b'"predictions": [4]' in said
    assert b"\r\nconnection: close\r\n" in said
