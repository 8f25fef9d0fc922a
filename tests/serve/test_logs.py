"""What a server says on stderr."""

import io
import json
import logging
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve import logs
from companion.serve.image import image_app
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, picture, post, red, serving


@pytest.fixture
def said():
    """A function that configures the logs and gives the stream they go to; everything is as before afterwards."""
    names = [logs.OURS, *logs.OTHERS]
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in names}
    stream = io.StringIO()

    def configure(level):
        logs.configure(level, stream)
        return stream

    yield configure
    for name, (handlers, level) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, True
        logger.setLevel(level)


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class Failing(Slow):
    """It fails on the number 7."""

    def _run(self, inputs):
        found = super()._run(inputs)
        if found["output"].argmax(1).tolist().count(7):
            raise RuntimeError("七 is too much")
        return found


def test_a_failure_of_the_model_has_its_traceback_once_a_second(said):
    stream = said("info")
    with serving(image_app(Failing(), settings=Settings(token="secret"))) as url:
        for _ in range(5):
            assert post(url, red(7), authorization="Bearer secret").status_code == 500
    first, *more = [line for line in lines(stream) if line["message"] == "the model failed"]
    assert (first["level"], first["model"], first["not_logged_before"]) == ("error", "model", 0)
    assert 'raise RuntimeError("七 is too much")' in first["error"]
    assert stream.getvalue().isascii()
    assert len(more) < 4
    assert [line["message"] for line in lines(stream) if line["level"] == "info"] == ["ready", "ending"]


def test_refusals_are_for_the_curious(said):
    stream = said("debug")
    with serving(image_app(Slow(), settings=Settings(token="secret"))) as url:
        post(url, picture(0), authorization="Bearer wrong")
        httpx.get(f"{url}/nothing", timeout=60)
    (refused,) = [line for line in lines(stream) if line["message"] == "refused"]
    assert (refused["level"], refused["status"]) == ("debug", 401)
    assert "secret" not in stream.getvalue()
    assert "wrong" not in stream.getvalue()
