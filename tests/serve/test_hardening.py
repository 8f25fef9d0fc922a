"""What breaks other servers: bad items among good ones, models that raise, clients that leave, deadlines; a server at
rest. Most against a server in a process of its own, started as a user starts it."""

import asyncio
import math
import os
import socket
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
import httpx
from process_cases import CULPRIT, PLAIN, coloured, http, post, post_files, started, until
from server_cases import serving

from companion import engines
from companion.serve.image import image_app
from companion.serve.settings import Settings

HAS_PROC = os.path.exists("/proc/self/schedstat")  # noqa: PTH110


@pytest.fixture(scope="module")
def server(tmp_path_factory, colours):
    with started(tmp_path_factory.mktemp("server"), colours) as server:
        yield server
        assert server.stop() == 0
        told = f"idx={CULPRIT}"  # what ONNX Runtime says of the culprit
        assert [line for line in server.faults() if told not in line] == []


def burst(url, bodies):
    """The answers to bodies that are all sent at once, in their order."""

    async def main():
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(timeout=60, limits=limits, verify=PLAIN) as client:
            await asyncio.gather(*(client.get(f"{url}/live") for _ in bodies))  # so that each has its connection
            headers = {"content-type": "image/png"}
            asked = (client.post(f"{url}/predict", content=body, headers=headers) for body in bodies)
            return await asyncio.gather(*asked)

    return asyncio.run(main())


def test_ten_files_ten_answers_in_order(server):
    numbers = [6, 5, 5, 4, 8, 9, 1, 8, 6, 3]
    found = post_files(server.url, [coloured(number) for number in numbers]).json()
    assert found["predictions"] == numbers
    assert found["labels"] == [str(number) for number in numbers]
    shares = [
        1 / sum(math.exp(-((k - x) ** 2)) for k in range(255)) for x in numbers
    ]  # by hand, from the network's rule
    assert found["confidences"] == pytest.approx(shares, abs=2e-6)


def test_batches_are_never_above_the_cap(server):
    calls, items = server.metric("companion_batch_size_count"), server.metric("companion_batch_size_sum")
    numbers = [number % 255 for number in range(200)]
    assert post_files(server.url, [coloured(number) for number in numbers]).json()["predictions"] == numbers
    assert server.metric("companion_batch_size_sum") - items == 200
    assert server.metric("companion_batch_size_count") - calls == 7  # six of 32 and one of 8
    assert server.metric("companion_batch_size_bucket", le="32.0") == server.metric("companion_batch_size_count")


@pytest.mark.parametrize("bad", ["undecodable", "culprit", "both"])
def test_bad_items_of_others_hurt_no_good_request(server, bad):
    """Ten bursts of eight: an image that cannot be decoded, one on which the model raises."""
    for turn in range(10):
        bodies = [coloured(8 * turn + number) for number in range(8)]
        wrong = {}
        if bad != "culprit":
            bodies[turn % 8], wrong[turn % 8] = b"no image", 400
        if bad != "undecodable":
            bodies[(turn + 3) % 8], wrong[(turn + 3) % 8] = coloured(CULPRIT), 500
        answers = burst(server.url, bodies)
        assert [answer.status_code for answer in answers] == [wrong.get(number, 200) for number in range(8)]
        for number, answer in enumerate(answers):
            if number not in wrong:
                assert answer.json()["predictions"] == [8 * turn + number]


def test_the_culprit_of_many_is_told(server):
    answer = post_files(server.url, [coloured(1), coloured(CULPRIT), coloured(2)])
    assert (answer.status_code, answer.json()) == (500, {"detail": "item 1: the model failed on it."})
    assert post(server.url, coloured(2)).json()["predictions"] == [2]


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "hex", "utf-7", "\xff"])
def test_forms_of_odd_charsets_are_no_failure(server, charset):
    form = b'--a\r\nContent-Disposition: form-data; name="xn--x"\r\n\r\nxn--\xff\r\n--a--\r\n'
    kind = f"multipart/form-data; boundary=a; charset={charset}".encode("latin-1")
    answer = post(server.url, form, kind)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(("the form holds no files", "the form cannot be read"))


class Faulty(engines.Engine):
    """Says how red an 8×8 image is; waits at a gate; raises when ``fault(images)`` says so."""

    def __init__(self, fault=lambda images: False):
        taken = engines.TensorInfo("input", "float32", (None, 3, 8, 8))
        given = engines.TensorInfo("output", "float32", (None, 256))
        super().__init__("faulty", [taken], [given], engines.Metadata(input_size=(3, 8, 8)))
        self.fault, self.calls, self.gate = fault, [], threading.Event()
        self.gate.set()

    def _run(self, inputs):
        (images,) = inputs.values()
        reds = np.rint(images[:, 0, 0, 0] * 255).astype(int)
        self.calls.append(reds.tolist())
        assert self.gate.wait(60)
        if self.fault(self):
            raise RuntimeError("out of order")
        return {"output": np.eye(256, dtype=np.float32)[reds]}

    def _release(self):
        pass


def test_a_model_that_raises_on_every_tenth_call_costs_nobody_an_answer_in_company():
    """The call is repeated in halves. Alone, nothing is left to halve: that one is told."""
    engine = Faulty()
    with serving(image_app(engine, settings=Settings())) as url:
        engine.calls.clear()
        engine.fault = lambda self: len(self.calls) % 10 == 0
        numbers = list(range(20))
        for _ in range(30):
            assert post_files(url, [coloured(number) for number in numbers]).json()["predictions"] == numbers
        assert sum(len(call) for call in engine.calls) > 30 * 20  # it did raise
        engine.calls.clear()
        alone = [post(url, coloured(number)) for number in numbers]
    assert [answer.status_code for answer in alone] == ([200] * 9 + [500]) * 2
    assert alone[9].json() == {"detail": "the model failed on it."}


def test_a_model_that_raises_for_good_and_is_well_again():
    engine = Faulty()
    with serving(image_app(engine, settings=Settings())) as url:
        engine.fault = lambda self: True
        assert [answer.status_code for answer in burst(url, [coloured(n) for n in range(16)])] == [500] * 16
        assert post_files(url, [coloured(1), coloured(2)]).status_code == 500
        assert httpx.get(f"{url}/live", timeout=60).status_code == 200
        engine.fault = lambda self: False
        answers = burst(url, [coloured(number) for number in range(16)])
    assert [answer.json()["predictions"] for answer in answers] == [[number] for number in range(16)]


def test_a_deadline_that_passes_in_the_queue_is_504_and_never_reaches_the_model():
    engine = Faulty()
    app = image_app(engine, settings=Settings(timeout=0.3))
    with serving(app) as url:
        engine.calls.clear()
        engine.gate.clear()
        first = threading.Thread(target=post, args=(url, coloured(0)))
        first.start()
        until(lambda: engine.calls)
        late = burst(url, [coloured(number) for number in range(1, 6)])
        assert [answer.status_code for answer in late] == [504] * 5
        assert late[0].json() == {"detail": "there was no answer within 0.3 s."}
        assert len(app.service.batcher.queue) == 0
        engine.gate.set()
        first.join(60)
        until(lambda: post(url, coloured(7)).status_code == 200)
    assert {red for call in engine.calls for red in call} == {0, 7}


def form_of(body):
    head = b'--a\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return "multipart/form-data; boundary=a", head + body + b"\r\n--a--\r\n"


@pytest.mark.parametrize("form", [False, True], ids=["raw", "form"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_clients_that_hang_up_while_queued_are_not_run(form, how):
    engine = Faulty()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        engine.calls.clear()
        engine.gate.clear()
        first = threading.Thread(target=post, args=(url, coloured(0)))
        first.start()
        until(lambda: engine.calls)
        request = http(*form_of(coloured(1))) if form else http("image/png", coloured(1))
        gone = [socket.create_connection((host, int(port))) for _ in range(20)]
        for connection in gone:
            connection.sendall(request)
        queue = app.service.batcher.queue
        until(lambda: len(queue) == 20)
        for connection in gone:
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        until(lambda: len(queue) == 0)
        engine.gate.set()
        first.join(60)
        assert post(url, coloured(2)).json()["predictions"] == [2]
    assert engine.calls == [[0], [2]]


@pytest.mark.parametrize("policy", ["idle", "fixed", "hold"])
def test_a_lone_request_waits_for_nobody(policy):
    """Neither the first nor those that follow it, be the wait twice as long as the client's patience."""
    with (
        serving(image_app(Faulty(), settings=Settings(policy=policy, max_wait_ms=60_000))) as url,
        httpx.Client(verify=PLAIN) as client,
    ):
        for number in range(20):
            headers = {"content-type": "image/png"}
            answer = client.post(f"{url}/predict", content=coloured(number), headers=headers, timeout=30)
            assert answer.json()["predictions"] == [number]


@pytest.mark.stress
@pytest.mark.skipif(not HAS_PROC, reason="there is no /proc/…/schedstat to measure by")
def test_at_rest_it_uses_under_a_thousandth_of_a_core(tmp_path, colours):
    with started(tmp_path, colours) as server:
        for number in range(50):
            post(server.url, coloured(number))
        time.sleep(1)
        used, began = server.cpu(), time.monotonic()
        time.sleep(15)
        share = (server.cpu() - used) / (time.monotonic() - began)
        assert server.stop() == 0
    assert share < 0.001
