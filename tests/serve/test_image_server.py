"""The server of images, over real connections."""

import asyncio
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from companion import CompanionError, engines, models
from companion.datasets.images import decode

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
import httpx

from companion.serve.app import Answer
from companion.serve.image import Classifier, image_app
from companion.serve.load import Request, load
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, picture, post, red, serving, until


def right(network, file):
    """Class and share that the network itself gives."""
    with torch.no_grad():
        shares = network(decode(file, "it", 32)[None]).softmax(1)[0]
    return int(shares.argmax()), float(shares.max())


@pytest.fixture(scope="module")
def app(network):
    return image_app(engines.load(network, "torch_fused"), settings=Settings())


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as address:
        yield address


@pytest.mark.parametrize(("form", "kind"), [("PNG", "image/png"), ("JPEG", "image/jpeg; q=1"), ("WEBP", "IMAGE/WEBP")])
def test_one_image_as_the_body(url, network, form, kind):
    file = picture(1, 48, form)
    answer = post(url, file, kind)
    number, share = right(network, file)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert (found["predictions"], found["labels"]) == ([number], [f"类 {number}"])
    assert found["confidences"] == [pytest.approx(share, abs=2e-6)]


def test_ten_files_ten_answers_in_order():
    numbers = [6, 5, 5, 4, 8, 9, 1, 8, 6, 3]
    with serving(image_app(Slow(), settings=Settings())) as url:
        answer = httpx.post(
            f"{url}/predict", files=[("files", ("a.png", red(number))) for number in numbers], timeout=60
        )
    assert answer.status_code == 200
    assert answer.json()["predictions"] == numbers
    assert answer.json()["labels"] == [str(number) for number in numbers]


def test_many_clients_get_their_own_answers_and_no_batch_is_too_large():
    engine = Slow()
    with serving(image_app(engine, settings=Settings(max_batch=8))) as url:
        requests = [Request(red(value), "image/png", [value]) for value in range(256)]
        found = load(f"{url}/predict", requests, concurrency=100, seconds=1.0, timeout=60)
    assert found.failures == {}
    assert len(found.latencies) > 100
    assert 1 < max(engine.sizes) <= 8


def test_a_request_of_two_hundred_is_split():
    engine = Slow()
    with serving(image_app(engine, settings=Settings())) as url:
        files = [("files", (f"{i}.png", red(i))) for i in range(200)]
        answer = httpx.post(f"{url}/predict", files=files, timeout=60)
    assert answer.json()["predictions"] == list(range(200))
    assert engine.sizes[2:] == [32] * 6 + [8]  # after two pictures to try it and to warm it up


def test_one_bad_image_among_eight_hurts_nobody_else():
    engine = Slow()
    with serving(image_app(engine, settings=Settings())) as url:
        for _ in range(10):
            engine.gate.clear()
            found = {}

            def ask(number, found=found):
                found[number] = post(url, b"no image" if number == 5 else red(number))

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            time.sleep(0.05)
            engine.gate.set()
            for thread in threads:
                thread.join(60)
            assert [found[n].json()["predictions"] for n in range(8) if n != 5] == [[n] for n in range(8) if n != 5]
            assert found[5].status_code == 400
    assert found[5].json() == {"detail": "the image is damaged or not an image: replace or remove it."}


def test_a_bad_item_of_several_is_named(url):
    files = [("files", ("a.png", picture(0))), ("files", ("b.png", b"x")), ("files", ("c.png", picture(2)))]
    answer = httpx.post(f"{url}/predict", files=files, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["detail"] == "item 1: the image is damaged or not an image: replace or remove it."


def test_a_model_that_fails_on_one_says_so_to_that_one_only(network):
    class Failing(Slow):
        def _run(self, inputs):
            (images,) = inputs.values()
            if (np.rint(images[:, 0, 0, 0] * 255) == 7).any():
                raise RuntimeError("seven")
            return super()._run(inputs)

    with serving(image_app(Failing(), settings=Settings())) as url:
        answer = httpx.post(f"{url}/predict", files=[("files", (f"{i}.png", red(i))) for i in (6, 7, 8)], timeout=60)
        assert (answer.status_code, answer.json()["detail"]) == (500, "item 1: the model failed on it.")
        assert post(url, red(8)).json()["predictions"] == [8]


def test_a_full_queue_says_when_to_come_again():
    engine = Slow()
    app = image_app(engine, settings=Settings(max_queue=3, max_batch=2))
    with serving(app) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        threads = [threading.Thread(target=post, args=(url, red(number))) for number in range(4)]
        threads[0].start()
        until(lambda: len(engine.sizes) > calls)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(app.service.batcher.queue) == 3)
        refused = post(url, red(9))
        engine.gate.set()
        for thread in threads:
            thread.join(60)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"].startswith("too many wait: try again in")
        assert post(url, red(9)).json()["predictions"] == [9]


def test_too_late_is_504():
    engine = Slow()
    with serving(image_app(engine, settings=Settings(timeout=0.05))) as url:
        engine.gate.clear()
        answer = post(url, red(1))
        engine.gate.set()
    assert (answer.status_code, answer.json()["detail"]) == (504, "there was no answer within 0.05 s.")


def test_clients_that_hang_up_in_the_queue_are_not_run():
    engine = Slow()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        first = threading.Thread(target=post, args=(url, red(0)))
        first.start()
        until(lambda: len(engine.sizes) > calls)
        host, _, port = url.removeprefix("http://").partition(":")
        body = red(1)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        gone = [socket.create_connection((host, int(port))) for _ in range(50)]
        for connection in gone:
            connection.sendall(head.encode() + body)
        until(lambda: len(app.service.batcher.queue) == 50)
        for connection in gone:
            connection.close()
        until(
            lambda: (
                'companion_requests_total{model="model",status="499"} 50.0'
                in httpx.get(f"{url}/metrics", timeout=60).text
            )
        )
        engine.gate.set()
        first.join(60)
        assert post(url, red(2)).json()["predictions"] == [2]
    assert engine.sizes[calls:] == [1, 1]


def test_what_was_accepted_is_answered_when_the_server_ends():
    engine = Slow()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        engine.gate.clear()
        found = []
        threads = [threading.Thread(target=lambda n=n: found.append(post(url, red(n)))) for n in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.sizes) == 3 and engine.sizes[2] + len(app.service.batcher.queue) == 20)
        threading.Timer(0.3, engine.gate.set).start()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in found] == [200] * 20


FIELD = b'--a\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n--a--\r\n'
CHUNKED = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"", "image/png", 400, "damaged or not an image"),
        (b"x" * 20_000, "image/png", 413, "may have 10000 bytes"),
        (b"x", "text/plain", 415, "not text/plain"),
        (b"x", "", 415, "not nothing"),
        (b"x", "multipart/form-data", 422, "the form cannot be read: missing boundary in multipart"),
        (b"x", "multipart/form-data; boundary=a", 422, "form"),
        (
            b'--a\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n--a--',
            "multipart/form-data; boundary=a",
            422,
            "no files",
        ),
        (picture(0, 48), "image/png", 400, "48×48 pixels, and 2,000 are taken"),
    ],
)
def test_bad_requests(network, content, kind, status, said):
    settings = Settings(max_bytes=10_000, max_pixels=2000)
    with serving(image_app(engines.load(network, "torch"), settings=settings)) as url:
        answer = post(url, content, kind)
    assert answer.status_code == status
    assert said in answer.json()["detail"]


def test_a_body_that_never_ends_is_cut(network):
    app = image_app(engines.load(network, "torch"), settings=Settings(body_seconds=0.2))

    with serving(app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            assert b" 408 " in connection.recv(1000)
    app = image_app(engines.load(network, "torch"), settings=Settings(max_bytes=10_000))
    with serving(app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            for _ in range(11):
                connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            assert b" 413 " in connection.recv(1000)


def test_too_many_files(network):
    with serving(image_app(engines.load(network, "torch"), settings=Settings(max_items=3))) as url:
        answer = httpx.post(f"{url}/predict", files=[("files", (f"{i}.png", picture(i))) for i in range(4)], timeout=60)
    assert answer.status_code == 413


def test_a_token(network):
    app = image_app(engines.load(network, "torch"), settings=Settings(token="秘密"))
    with serving(app) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "秘密".encode()}):
            refused = httpx.post(
                f"{url}/predict", content=picture(0), headers={"content-type": "image/png", **headers}, timeout=60
            )
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        let_in = {"content-type": "image/png", "authorization": "Bearer 秘密".encode()}
        assert httpx.post(f"{url}/predict", content=picture(0), headers=let_in, timeout=60).status_code == 200
        form = httpx.post(f"{url}/predict", files={"files": picture(0)}, timeout=60)
        assert form.status_code == 401
        assert httpx.get(f"{url}/live", timeout=60).status_code == 200


def test_health_while_the_model_works():
    engine = Slow()
    with serving(image_app(engine, settings=Settings())) as url:
        engine.gate.clear()
        calls = len(engine.sizes)
        thread = threading.Thread(target=post, args=(url, red(0)))
        thread.start()
        until(lambda: len(engine.sizes) > calls)
        assert httpx.get(f"{url}/live", timeout=60).json() == {"status": "live"}
        assert httpx.get(f"{url}/ready", timeout=60).json() == {"status": "ready"}
        engine.gate.set()
        thread.join(60)


def test_not_ready_until_the_model_has_run_once():
    engine = Slow()
    app = image_app(engine, settings=Settings())

    async def main():
        found = []
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:

            async def ask():
                found.append((await client.get("/ready")).status_code)

            async def live():
                async with app.framework.router.lifespan_context(app):
                    await ask()

            await ask()
            life = asyncio.create_task(live())
            while len(engine.sizes) < 2 and not life.done():
                await asyncio.sleep(0.001)
            await ask()  # while it warms up
            engine.gate.set()
            await life
            await ask()
        return found

    engine.gate.clear()
    assert asyncio.run(main()) == [503, 503, 200, 503]
    assert engine.sizes == [1, 1]


def test_what_is_counted(network):
    with serving(image_app(engines.load(network, "torch"), settings=Settings())) as url:
        httpx.post(f"{url}/predict", files=[("files", (f"{i}.png", picture(i))) for i in range(3)], timeout=60)
        post(url, b"x")
        text = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'companion_requests_total{model="model",status="200"} 1.0' in text
    assert 'companion_requests_total{model="model",status="400"} 1.0' in text
    assert 'companion_batch_size_sum{model="model"} 5.0' in text  # one to warm up, three, and the bad one
    assert 'companion_queue_seconds_count{model="model"} 5.0' in text
    assert 'companion_failed_items_total{model="model"} 1.0' in text


def test_the_openapi_document_names_bodies_and_errors(app):
    document = app.framework.openapi()
    operation = document["paths"]["/predict"]["post"]
    assert {"image/png", "image/jpeg", "multipart/form-data"} <= operation["requestBody"]["content"].keys()
    assert {"200", "400", "401", "408", "413", "415", "422", "500", "503", "504"} <= operation["responses"].keys()
    assert json.dumps(document)


def test_items_of_a_request_that_is_refused_are_not_run(caplog):
    """One bad file of two hundred costs the batch it is in, and no more; nothing is logged about the others."""
    engine = Slow()
    app = image_app(engine, settings=Settings())
    with serving(app) as url:
        calls = len(engine.sizes)
        bad = [("files", ("a.png", b"x")), ("files", ("b.png", b"y"))]
        files = [*bad, *(("files", ("c.png", red(n))) for n in range(198))]
        answer = httpx.post(f"{url}/predict", files=files, timeout=60)
        assert (answer.status_code, answer.json()["detail"][:7]) == (400, "item 0:")
        until(lambda: not app.service.batcher.queue.busy)
        assert len(app.service.batcher.queue) == 0
        assert len(engine.sizes) - calls <= 2
    assert "never retrieved" not in caplog.text


def test_scores_that_are_no_numbers_are_no_answer():
    class Broken(Slow):
        def _run(self, inputs):
            found = super()._run(inputs)
            found["output"][np.rint(next(iter(inputs.values()))[:, 0, 0, 0] * 255) == 9] = np.nan
            return found

    classifier = Classifier(Broken(), max_pixels=100)
    good, bad = classifier([red(8), red(9)])
    assert good == Answer(8, "8", pytest.approx(np.e / (np.e + 255)))
    assert isinstance(bad, ValueError)


def test_networks_of_a_fixed_batch_or_another_type_are_refused():
    for batch, dtype in ((4, "float32"), (1, "float32"), (None, "float16")):
        engine = Slow()
        engine.inputs = (engines.TensorInfo("input", dtype, (batch, 3, 8, 8)),)
        with pytest.raises(CompanionError, match="export it for float32 and a batch of any size"):
            image_app(engine, settings=Settings())


def test_a_network_that_fails_is_found_out_at_the_start():
    class Failing(Slow):
        def _run(self, inputs):
            raise RuntimeError("no memory")

    with pytest.raises(CompanionError, match=r"no memory"):
        image_app(Failing(), settings=Settings())


def test_settings_of_the_environment_that_are_out_of_range(network, monkeypatch):
    monkeypatch.setenv("COMPANION_SERVE_MAX_BATCH", "0")
    with pytest.raises(CompanionError, match="max_batch is '0': Input should be greater than or equal to 1"):
        image_app(Slow())
    monkeypatch.setenv("COMPANION_SERVE_MAX_BATCH", "1")
    monkeypatch.setenv("COMPANION_SERVE_TOKEN", "")
    with pytest.raises(CompanionError, match="token is "):
        image_app(Slow())


@pytest.mark.parametrize(("name", "engine"), [("unet", "torch"), ("simple_cnn", "nothing")])
def test_networks_that_cannot_be_served(tmp_path, name, engine):
    models.save(models.create(name, seed=0), tmp_path / "m.safetensors")
    with pytest.raises(CompanionError, match=r"this network classifies no images|there is no engine 'nothing'"):
        image_app(tmp_path / "m.safetensors", engine=engine, settings=Settings())


def test_answers_are_the_networks_in_any_company(network):
    classifier = Classifier(engines.load(network, "torch"), max_pixels=10**6)
    files = [picture(seed) for seed in range(5)]
    together = classifier([files[0], b"x", *files[1:]])
    assert isinstance(together.pop(1), CompanionError)
    for file, answer in zip(files, together, strict=True):
        number, share = right(network, file)
        assert answer == Answer(number, f"类 {number}", pytest.approx(share, abs=1e-6))
    assert all(isinstance(each, CompanionError) for each in classifier([b"", b"y"]))


def test_the_front_answers_as_the_framework_would(url):
    """Errors of both paths have one form."""
    raw = post(url, b"x").json()
    form = httpx.post(f"{url}/predict", files={"files": b"x"}, timeout=60).json()
    assert raw == form
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"{url}/predict")
