"""Several models in one server, a batcher each."""

import sys
import threading
from pathlib import Path

import httpx
import pytest

from companion import CompanionError

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve.image import image_app
from companion.serve.models import named
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, post, red, serving, until


def test_the_loop_rests_for_nobody_if_others_wait_for_it():
    assert image_app(Slow(), settings=Settings()).service.batcher.rest
    both = image_app({"a": Slow(), "b": Slow()}, settings=Settings()).services
    assert [service.batcher.rest for service in both.values()] == [False, False]


def test_each_answers_at_its_own_path_and_the_first_at_predict_too():
    first, second = Slow(), Slow(classes=300)
    with serving(image_app({"a": first, "b": second}, settings=Settings())) as url:
        calls = len(second.sizes)
        assert post(url, red(7)).json()["predictions"] == [7]
        headers = {"content-type": "image/png"}
        for name in ("a", "b"):
            found = httpx.post(f"{url}/predict/{name}", content=red(9), headers=headers, timeout=60)
            assert found.json()["predictions"] == [9]
            form = httpx.post(f"{url}/predict/{name}", files={"files": red(8)}, timeout=60)
            assert form.json()["predictions"] == [8]
        unknown = httpx.post(f"{url}/predict/c", content=red(9), headers=headers, timeout=60)
        assert (unknown.status_code, unknown.json()["detail"]) == (
            404,
            "there is no model of this name: there are a, b.",
        )
        models = httpx.get(f"{url}/models", timeout=60).json()
        stats = httpx.get(f"{url}/stats", timeout=60).json()
    assert len(second.sizes) - calls == 2
    assert [(model["name"], model["path"], model["takes"]) for model in models] == [
        ("a", "/predict/a", "images of 8×8"),
        ("b", "/predict/b", "images of 8×8"),
    ]
    assert stats["models"]["b"]["requests"] == {"200": 2}


def test_one_that_works_does_not_hold_the_other_up():
    busy, free = Slow(), Slow()
    with serving(image_app({"busy": busy, "free": free}, settings=Settings())) as url:
        busy.gate.clear()
        calls = len(busy.sizes)
        with httpx.Client(timeout=60) as client:
            waits = threading.Thread(target=post, args=(url, red(1)))
            waits.start()
            until(lambda: len(busy.sizes) > calls)
            found = client.post(f"{url}/predict/free", content=red(2), headers={"content-type": "image/png"})
            assert found.json()["predictions"] == [2]
            assert waits.is_alive()
            busy.gate.set()
            waits.join(60)


def test_names(tmp_path):
    odd = tmp_path / "a=b.onnx"
    odd.write_bytes(b"")
    assert named(["x/one.onnx", "two=y/one.onnx", str(odd)]) == {
        "one": Path("x/one.onnx"),
        "two": Path("y/one.onnx"),
        "a-b": odd,
    }
    assert list(named(["-数字.onnx", "m n.onnx"])) == ["model", "m-n"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "there is no model"),
        (["a.onnx", "x/a.onnx"], "two models are called a: give them names, as in --model other=x/a.onnx"),
        (["a/b=c.onnx"], "'a/b' is no name for a model"),
    ],
)
def test_names_that_are_refused(texts, said):
    with pytest.raises(CompanionError, match=said):
        named(texts)
