"""Clients that send nothing, too little, too much, or do not read."""

import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve.image import image_app
from companion.serve.protocol import LONGEST_HEAD, Writer
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, post, red, serving, until

GET = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


class Wire:
    """A transport that notes its writes."""

    def __init__(self):
        self.writes = []
        self.write = self.writes.append

    def is_closing(self):
        return None in self.writes

    def close(self):
        self.writes.append(None)


def test_head_and_body_leave_together():
    wire = Wire()
    writer = Writer(wire)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"
    for _ in range(2):
        writer.write(head)
        writer.write(b"four")
        writer.end()
    assert wire.writes == [head + b"four"] * 2
    writer.write(head)
    writer.write(b"HTTP/1.1 ")
    writer.write(b"HTTP/1.1 is what this body is about")
    assert wire.writes[2:] == [head + b"HTTP/1.1 ", b"HTTP/1.1 is what this body is about"]


def test_a_head_without_a_body_and_one_that_asks_for_more_do_not_wait():
    wire = Wire()
    writer = Writer(wire)
    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert wire.writes == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    writer.end()
    writer.write(b"HTTP/1.1 304 Not Modified\r\n\r\n")
    writer.close()
    assert wire.writes[1:] == [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n", None]
    assert writer.is_closing()
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    writer.close()
    assert wire.writes[3:] == [None, None]  # nobody is there to be sent a head


def connect(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def refuses(url):
    """Whether nobody listens any more."""
    try:
        connect(url).close()
    except ConnectionError:
        return True
    return False


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
    return httpx.get(f"{url}/stats", timeout=60, verify=False).json()["cut_connections"]


def answer(connection):
    """The bytes of one answer, which has a length."""
    said = b""
    while not (whole := re.fullmatch(rb".*\r\ncontent-length: (\d+)\r\n(?:.*?\r\n)?\r\n(.*)", said, re.DOTALL)) or (
        len(whole[2]) < int(whole[1])
    ):
        part = connection.recv(65536)
        assert part, said
        said += part
    return said


def predict(body, length=None, kind=b"image/png"):
    length = len(body) if length is None else length
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (kind, length) + body


def test_who_sends_nothing_is_closed_and_who_sends_too_little_is_told():
    with (
        serving(image_app(Slow(), settings=Settings()), head_seconds=3) as url,
        connect(url) as silent,
        connect(url) as slow,
        connect(url) as idle,
        connect(url) as second,
    ):
        slow.sendall(GET[:-4])
        idle.sendall(GET)
        second.sendall(GET + GET[:-4])
        assert rest(silent) == b""
        said = rest(slow)
        assert said.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert said.endswith(b'{"detail": "the head of the request came too slowly."}')
        assert rest(idle).count(b"HTTP/1.1 ") == 1  # answered, and closed a while after
        assert re.findall(rb"HTTP/1.1 (\d+)", rest(second)) == [b"200", b"408"]
        assert cut(url) == {"idle": 2, "slow_head": 2}


def test_a_byte_at_a_time_does_not_make_the_time_longer():
    with serving(image_app(Slow(), settings=Settings()), head_seconds=3) as url:
        with connect(url) as slow:
            began = time.monotonic()
            slow.settimeout(0.05)
            sent, said = 0, None
            while said is None:
                assert time.monotonic() - began < 60
                try:
                    slow.sendall(GET[sent : sent + 1] if sent < 20 else b"a")
                    sent += 1
                    said = slow.recv(100)
                except TimeoutError:
                    continue
                except ConnectionError:  # a byte crossed the answer, which is lost by that
                    break
            assert said is None or said.startswith(b"HTTP/1.1 408 ")
        assert cut(url) == {"slow_head": 1}


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
    app = image_app(engine, settings=Settings())
    with serving(app, max_connections=3) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        found = []
        threads = [threading.Thread(target=lambda n=n: found.append(post(url, red(n)))) for n in range(3)]
        threads[0].start()
        until(lambda: len(engine.sizes) > calls, 60)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(app.service.batcher.queue) == 2, 60)
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


@pytest.mark.parametrize("loose", [b"0\r\nx: " + b"a" * 1000, b"1;" + b"a" * 1000], ids=["trailer", "extension"])
def test_what_ends_a_body_and_does_not_end_itself(loose):
    with serving(image_app(Slow(), settings=Settings())) as url:
        with connect(url) as long:
            long.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n")
            long.sendall(b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n" + loose)
            sent = 0
            with suppress(ConnectionError):
                while sent < 32 << 20:
                    sent += long.send(b"a" * 4096)
            assert sent < 32 << 20  # far above what lies in buffers on the way
        assert cut(url) == {"long_head": 1}
        assert post(url, red(1)).json()["predictions"] == [1]


def test_trailers_and_many_small_chunks_are_no_reason_to_refuse():
    body = red(7)
    parts = [b"1;" + b"x" * 2000 + b"\r\n%c\r\n" % byte for byte in body]
    assert sum(map(len, parts)) > 2 * LONGEST_HEAD
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(image_app(Slow(), settings=Settings())) as url, connect(url) as connection:
        for part in (head, *parts, b"0\r\nx-sum: 1\r\n\r\n"):
            connection.sendall(part)
        assert b'"predictions":[7]' in answer(connection)


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


def test_bodies_that_nobody_holds_count_for_nothing():
    """They come after their answers."""
    settings = {"max_memory": 100_000, "max_bytes": 60_000}
    with serving(image_app(Slow(), settings=Settings(**settings)), **settings) as url:
        with connect(url) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
            assert answer(connection).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"x" * 200_000 + GET)
            assert answer(connection).startswith(b"HTTP/1.1 200 ")
        assert cut(url) == {}


@pytest.mark.parametrize(
    ("path", "kind", "token", "status"),
    [
        (b"/predict", b"image/png", b"wrong", b"401"),
        (b"/predict", b"multipart/form-data; boundary=a", b"wrong", b"401"),
        (b"/predict/nobody", b"image/png", b"right", b"404"),
        (b"/predict", b"text/plain", b"right", b"415"),
    ],
)
def test_who_is_refused_before_the_body_is_read_need_not_send_it(path, kind, token, status):
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nAuthorization: Bearer %s\r\nContent-Length: 9\r\n\r\n"
    with serving(image_app(Slow(), settings=Settings(token="right"))) as url, connect(url) as connection:
        connection.sendall(head % (path, kind, token))
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 %s " % status)
    assert said.count(b"\r\nconnection: close\r\n") == 1


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
    places = [said.index(b'"predictions":[%d]' % number) for number in range(5)]
    assert places == sorted(places)


def test_who_hangs_up_leaves_no_work_behind_whatever_was_pipelined(caplog):
    engine = Slow()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        engine.gate.clear()
        engine.sizes.clear()
        running, queued = connect(url), connect(url)
        with running, queued:
            running.sendall(predict(red(1)) + predict(red(2)))
            until(lambda: engine.sizes, 60)
            queued.sendall(predict(red(3)) + predict(red(4)))
            until(lambda: len(app.service.batcher.queue) == 1, 60)
        until(lambda: len(app.service.batcher.queue) == 0, 60)
        engine.gate.set()
        assert post(url, red(5)).json()["predictions"] == [5]
        counts = httpx.get(f"{url}/stats", timeout=60, verify=False).json()["models"]["model"]
    assert engine.sizes == [1, 1]
    assert counts["requests"] == {"200": 1, "499": 2}
    assert [record for record in caplog.records if record.name == "uvicorn.error"] == []


def test_a_refusal_is_not_taken_for_the_answer_of_another_request():
    engine = Slow()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        engine.gate.clear()
        engine.sizes.clear()
        with connect(url) as connection:
            connection.sendall(predict(red(1)) + predict(red(2)) + b"\x16\x03\x01 hello\r\n\r\n")
            assert rest(connection) == b""
        assert cut(url) == {"bad_http": 1}
        engine.gate.set()
        assert post(url, red(5)).json()["predictions"] == [5]


def test_what_is_wrong_with_the_next_request_is_not_said_as_the_answer_to_this():
    engine = Slow()
    with serving(image_app(engine, settings=Settings())) as url:
        engine.gate.clear()
        with connect(url) as connection:
            connection.sendall(predict(red(4)))
            until(lambda: len(engine.sizes) == 3, 60)  # two calls were to warm up
            connection.sendall(b"no request at all\r\n\r\n")
            assert rest(connection) == b""
        engine.gate.set()


def test_the_answer_at_the_end_says_that_the_connection_ends():
    engine = Slow()
    connection = None
    with serving(image_app(engine, settings=Settings())) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        connection = connect(url)
        connection.sendall(predict(red(4)))
        until(lambda: len(engine.sizes) > calls, 60)
        threading.Thread(target=lambda: (until(lambda: refuses(url), 60), engine.gate.set())).start()
    with connection:
        said = rest(connection)
    assert b'"predictions":[4]' in said
    assert b"\r\nconnection: close\r\n" in said
