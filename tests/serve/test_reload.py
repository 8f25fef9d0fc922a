"""A model is replaced while its server answers."""

import os
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch

from companion import models

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve import image, service
from companion.serve.image import image_app
from companion.serve.load import Request, load
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import picture, post, serving, until


def network(always, labels=10, side=32):
    """It says ``always`` whatever it sees."""
    made = models.create("simple_cnn", labels=[f"label {i}" for i in range(labels)], classes=labels, seed=0)
    with torch.no_grad():
        last = [module for module in made.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(torch.eye(labels)[always] * 9)
    return made


def put(made, path):
    """As one should: written elsewhere, then renamed."""
    models.save(made, path.with_name("new.safetensors"))
    path.with_name("new.safetensors").replace(path)


def reloads(url):
    return httpx.get(f"{url}/stats", timeout=60).json()["models"]["model"].get("reloads", {})


@pytest.fixture
def path(tmp_path):
    put(network(3), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_no_request_fails_and_the_new_model_answers(path):
    app = image_app(path, settings=Settings())
    with serving(app) as url:
        found = []
        requests = [Request(picture(1), "image/png")]
        thread = threading.Thread(
            target=lambda: found.append(load(f"{url}/predict", requests, concurrency=4, seconds=2, timeout=60))
        )
        thread.start()
        for turn, always in enumerate((5, 3, 5), 1):
            put(network(always), path)
            app.state.service.reload()
            until(lambda turn=turn: reloads(url) == {"done": turn}, 60)
            assert post(url, picture(1)).json()["predictions"] == [always]
        thread.join(60)
    assert found[0].failures == {}
    assert len(found[0].latencies) > 10


def test_the_old_model_is_closed_after_its_last_batch(path, monkeypatch):
    closed = []
    made = image._load

    def noting(*arguments):
        model = made(*arguments)
        number = len(opened)
        opened.append(number)
        release = model.release
        return service.Model(
            model.predict, model.example, model.takes, model.labels, lambda: (closed.append(number), release())
        )

    opened = []
    monkeypatch.setattr(image, "_load", noting)
    app = image_app(path, settings=Settings())
    with serving(app) as url:
        app.state.service.reload()
        until(lambda: reloads(url) == {"done": 1}, 60)
        assert closed == [0]
    assert closed == [0, 1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"x"), "is not a safetensors file or is damaged"),
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: put(network(3, labels=7), path), "its labels are others: start the server anew for that."),
        (lambda path: put(models.create("unet", seed=0), path), "classifies no images"),
    ],
)
def test_what_cannot_be_served_is_logged_and_the_old_one_goes_on(path, caplog, spoil, said):
    app = image_app(path, settings=Settings())
    with serving(app) as url:
        spoil(path)
        app.state.service.reload()
        until(lambda: reloads(url) == {"failed": 1}, 60)
        assert post(url, picture(1)).json()["predictions"] == [3]
        (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
        assert said in record.data["reason"]
        put(network(4), path)
        app.state.service.reload()
        until(lambda: reloads(url) == {"failed": 1, "done": 1}, 60)
        assert post(url, picture(1)).json()["predictions"] == [4]


def test_a_watched_file(path, monkeypatch):
    monkeypatch.setattr(service, "LOOK", 0.02)
    app = image_app(path, settings=Settings(reload=True))
    put(network(6), path)  # between loading and serving
    with serving(app) as url:
        until(lambda: reloads(url) == {"done": 1}, 60)
        assert post(url, picture(1)).json()["predictions"] == [6]
        was = path.stat()
        put(network(7), path)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # of the same time and size, and yet another file
        until(lambda: reloads(url) == {"done": 2}, 60)
        assert post(url, picture(1)).json()["predictions"] == [7]


def test_a_file_that_is_written_while_it_is_read_is_not_served(path):
    def load():
        path.write_bytes(b"another")
        return service.Model(list, 0, release=lambda: released.append(1))

    released = []
    with pytest.raises(service.CompanionError, match=r"was written while it was read: replace it in one step"):
        service.load_whole(path, load)
    assert released == [1]


def test_the_server_ends_while_a_model_is_loaded(path, monkeypatch):
    entered, gate = threading.Event(), threading.Event()
    app = image_app(path, settings=Settings())

    def stuck():
        entered.set()
        gate.wait(60)
        raise AssertionError

    with serving(app) as url:
        monkeypatch.setattr(app.state.service, "_load", stuck)
        app.state.service.reload()
        assert entered.wait(60)
        assert post(url, picture(1)).json()["predictions"] == [3]
    gate.set()
