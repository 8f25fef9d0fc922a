"""The server of texts, over real connections."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from companion import CompanionError, engines, models
from companion.datasets.words import RESERVED, encode, word_ids, words

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
import httpx

from companion.serve.app import Answer, BadItem
from companion.serve.load import Request, load
from companion.serve.settings import Settings
from companion.serve.text import TextClassifier, text_app

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import serving, until

VOCABULARY = (*RESERVED, *(f"w{n}" for n in range(200)), "猫", "狗")
SAID = st.one_of(
    st.text(st.characters(), max_size=300),  # lone surrogates included
    st.lists(st.sampled_from([*VOCABULARY[2:], "other", "🙂"]), max_size=60).map(" ".join),
)


@pytest.fixture(scope="module")
def network():
    model = models.create("text_classifier", vocabulary=VOCABULARY, labels=["甲", "乙", "丙", "丁"], seed=0).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # so that answers differ by more than rounding
    return model


@pytest.fixture(scope="module")
def classifier(network):
    return TextClassifier(engines.load(network, "torch_fused"), max_words=100)


@pytest.fixture(scope="module")
def url(network):
    app = text_app(engines.load(network, "torch_fused"), settings=Settings(max_words=100, max_bytes=2_000_000))
    with serving(app) as address:
        yield address


def post(url, texts, **options):
    body = json.dumps({"texts": texts}).encode() if isinstance(texts, list) else texts
    headers = {"content-type": "application/json", **options}
    return httpx.post(f"{url}/predict", content=body, headers=headers, timeout=60)


def right(network, text):
    """Class and share that the network itself gives."""
    with torch.no_grad():
        shares = network(torch.tensor([encode(text, word_ids(VOCABULARY)) or [0]])).softmax(1)[0]
    return int(shares.argmax()), float(shares.max())


def test_texts_are_answered_in_order(url, network):
    texts = [f"w{n} W{n + 7}, and more" for n in range(30)] + ["猫狗", "", "w1 " * 100]
    answer = post(url, texts)
    assert answer.status_code == 200
    found = answer.json()
    expected = [right(network, text) for text in texts]
    assert found["predictions"] == [number for number, _ in expected]
    assert len(set(found["predictions"])) > 1
    assert found["labels"] == ["甲乙丙丁"[number] for number, _ in expected]
    assert found["confidences"] == pytest.approx([share for _, share in expected], abs=2e-6)


@given(st.lists(SAID, min_size=1, max_size=12))
@hypothesis_settings(deadline=None)
def test_a_text_is_alone_what_it_is_in_any_batch(classifier, texts):
    together = classifier(texts)
    for text, answer in zip(texts, together, strict=True):
        (alone,) = classifier([text])
        if len(words(text)) > 100:
            assert isinstance(answer, BadItem)
            assert isinstance(alone, BadItem)
        else:
            assert alone == Answer(answer.class_id, answer.label, pytest.approx(answer.confidence, abs=1e-6))


def test_the_answer_does_not_depend_on_the_engine(network, tmp_path):
    engines.export_onnx(network, engines.example_for(network), tmp_path / "t.onnx")
    models.save(network, tmp_path / "t.safetensors")
    text = "w5 w6 猫"
    number, share = right(network, text)
    for name in ("t.onnx", "t.safetensors"):
        with serving(text_app(tmp_path / name, settings=Settings())) as address:
            found = post(address, [text]).json()
        assert (found["predictions"], found["labels"]) == ([number], ["甲乙丙丁"[number]])
        assert found["confidences"] == [pytest.approx(share, abs=2e-6)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "🙂🙃",
        "\x00\x7f",
        "\ud800",
        "\udfff猫\ud800",
        "\u0301" * 1000,
        "\u202e\ufeff",
        "w3" + "\u0316\u0301" * 500,
    ],
)
def test_any_text_is_answered(url, network, text):
    answer = post(url, [text, "w1"])
    assert answer.status_code == 200
    assert answer.json()["predictions"] == [right(network, text)[0], right(network, "w1")[0]]


def test_a_megabyte_of_combining_marks_is_answered(url):
    """Normalised in one piece it would take hours."""
    text = "\u0316\u0301" * 250_000
    assert post(url, json.dumps({"texts": [text]}, ensure_ascii=False).encode()).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b"\xff\xfe\xfd", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'["a"]', "the body is a list in place of an object"),
        (b"null", "the body is null in place of an object"),
        (b"3", "the body is a number in place of an object"),
        (b"{}", "the field texts is missing"),
        (b'{"text": "a"}', "the field texts is missing"),
        (b'{"texts": ["a"], "more": 1}', "there is no field 'more'"),
        (b'{"texts": "a"}', "the field texts is a text in place of a list"),
        (b'{"texts": {"0": "a"}}', "the field texts is an object in place of a list"),
        (b'{"texts": []}', "the field texts is an empty list"),
        (b'{"texts": ["a", 7]}', "item 1 is a number in place of a text"),
        (b'{"texts": [null]}', "item 0 is null in place of a text"),
        (b'{"texts": ["a", "b", ["c"]]}', "item 2 is a list in place of a text"),
        (b'{"texts": [true]}', "item 0 is true or false in place of a text"),
    ],
)
def test_bodies_of_another_form(url, body, said):
    answer = post(url, body)
    assert answer.status_code == 422
    assert answer.json()["detail"] == f'{said}: send {{"texts": ["…", "…"]}}.'


def test_limits(network):
    settings = Settings(max_words=5, max_items=3, max_bytes=1000)
    with serving(text_app(engines.load(network, "torch"), settings=settings)) as url:
        assert post(url, ["w1 w2 w3 w4 w5"]).status_code == 200
        alone, one_of_two = post(url, ["a b c d e f"]), post(url, ["a", "猫" * 6])
        assert (alone.status_code, one_of_two.status_code) == (400, 400)
        assert alone.json()["detail"] == "the text has more than 5 words: send less."
        assert one_of_two.json()["detail"] == "item 1: the text has more than 5 words: send less."
        assert post(url, ["a"] * 3).status_code == 200
        assert post(url, ["a"] * 4).status_code == 413
        assert post(url, ["a" * 1000]).status_code == 413


def test_texts_are_not_searched_for_words_without_end(network):
    """A text of no words at all has no more of them than it may."""
    with serving(text_app(engines.load(network, "torch"))) as url:
        found = post(url, [". " * (1 << 18), ". " * (1 << 18), "."])
        assert found.status_code == 413
        assert found.json()["detail"] == "the texts of a request may have 1,048,576 characters together: send several."
        assert post(url, [". " * (1 << 18), ". " * (1 << 18)]).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "image/png", "multipart/form-data; boundary=a", ""])
def test_other_content_types(url, kind):
    answer = post(url, b"x", **{"content-type": kind})
    assert answer.status_code == 415
    assert answer.json()["detail"] == f"send application/json, not {kind.partition(';')[0] or 'nothing'}."


def test_the_content_type_may_name_a_character_set(url):
    assert post(url, ["a"], **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


class Slow(engines.Engine):
    """A network whose calls wait at a gate; it counts words, and remembers what it was given."""

    def __init__(self):
        taken = engines.TensorInfo("input", "int64", (None, None))
        given = engines.TensorInfo("output", "float32", (None, 300))
        super().__init__("slow", [taken], [given], engines.Metadata(task="text", vocabulary=VOCABULARY))
        self.gate, self.shapes = threading.Event(), []
        self.gate.set()

    def _run(self, inputs):
        (ids,) = inputs.values()
        self.shapes.append(ids.shape)
        assert self.gate.wait(60)
        return {"output": np.eye(300, dtype=np.float32)[np.count_nonzero(ids, axis=1)]}

    def _release(self):
        pass


def test_texts_of_like_length_run_together():
    engine = Slow()
    classifier = TextClassifier(engine, max_words=300)
    lengths = [1, 200, 16, 17, 0, 3, 130, 32]
    answers = classifier([" ".join(["w1"] * length) for length in lengths])
    assert [answer.class_id for answer in answers] == lengths
    assert sorted(engine.shapes) == [(2, 32), (2, 256), (4, 16)]


def test_many_clients_get_their_own_answers():
    with serving(text_app(Slow(), settings=Settings())) as url:
        bodies = [json.dumps({"texts": [" ".join(["w7"] * n)]}).encode() for n in range(200)]
        requests = [Request(body, "application/json", [n]) for n, body in enumerate(bodies)]
        found = load(f"{url}/predict", requests, concurrency=64, seconds=1.0, timeout=60)
    assert found.failures == {}
    assert len(found.latencies) > 100


def test_one_text_that_is_too_long_hurts_nobody_else():
    engine = Slow()
    app = text_app(engine, settings=Settings(max_words=50))
    with serving(app) as url:
        engine.gate.clear()
        calls = len(engine.shapes)
        found = {}

        def ask(number):
            found[number] = post(url, [" ".join(["w1"] * (99 if number == 5 else number))])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        threads[0].start()
        until(lambda: len(engine.shapes) > calls)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(app.service.batcher.queue) == 7)
        engine.gate.set()
        for thread in threads:
            thread.join(60)
        assert [found[n].json()["predictions"] for n in range(8) if n != 5] == [[n] for n in range(8) if n != 5]
        assert found[5].status_code == 400


def test_a_request_of_two_hundred_is_split():
    engine = Slow()
    with serving(text_app(engine, settings=Settings())) as url:
        answer = post(url, ["w1 " * (n % 16) for n in range(200)])
    assert answer.json()["predictions"] == [n % 16 for n in range(200)]
    assert [batch for batch, _ in engine.shapes[2:]] == [32] * 6 + [8]  # after two texts to try it and to warm it up


def test_the_openapi_document_describes_the_body(url):
    document = httpx.get(f"{url}/openapi.json", timeout=60).json()
    operation = document["paths"]["/predict"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["texts"]["items"] == {"type": "string"}
    assert schema["required"] == ["texts"]
    assert {"200", "400", "401", "408", "413", "415", "422", "500", "503", "504"} <= operation["responses"].keys()


def other(**changes):
    engine = Slow()
    for key, value in changes.items():
        setattr(engine, key, value)
    return engine


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (other(metadata=engines.Metadata(task="text")), "the network's file has no vocabulary"),
        (other(metadata=engines.Metadata(vocabulary=("a", "b"))), "a vocabulary must begin with <padding>"),
        (other(metadata=engines.Metadata(vocabulary=(*RESERVED, "a", "a"))), "the vocabulary has 'a' twice"),
        (
            other(metadata=engines.Metadata(vocabulary=VOCABULARY, configuration={"vocabulary_size": 10})),
            "rows for 10 words, but the vocabulary has 204",
        ),
        (
            other(inputs=(engines.TensorInfo("input", "int64", (None, 50)),)),
            "export it for texts of any number and any length",
        ),
        (other(inputs=(engines.TensorInfo("input", "float32", (None, 3, 8, 8)),)), "this network classifies no texts"),
        (
            other(outputs=(engines.TensorInfo("output", "float32", (None, 2, 8, 8)),)),
            "this network classifies no texts",
        ),
    ],
)
def test_networks_that_cannot_be_served(engine, said):
    with pytest.raises(CompanionError, match=said):
        text_app(engine, settings=Settings())


def test_networks_for_images_cannot_be_served(tmp_path):
    models.save(models.create("simple_cnn", seed=0), tmp_path / "m.safetensors")
    with pytest.raises(CompanionError, match="this network classifies no texts: it takes input float32"):
        text_app(tmp_path / "m.safetensors", settings=Settings())


def test_the_front_room_loads_no_server():
    import subprocess

    code = "import companion.serve, sys; print(sorted({'fastapi', 'uvicorn', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
