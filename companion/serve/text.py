"""A server that says what texts are about (2.4.2)."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request

from companion.datasets.words import PADDING, encode, word_ids
from companion.engines import Engine
from companion.engines.base import one_sentence
from companion.errors import CompanionError
from companion.serve.answers import most_likely
from companion.serve.app import Answer, Application, BadItem, Refused, application
from companion.serve.models import Model
from companion.serve.service import Source, services_of
from companion.serve.settings import Settings, settings_from

TYPE = "application/json"
FORM = 'send {"texts": ["…", "…"]}'
LONGEST = 1 << 20  # characters of a request: some tenths of a second in the only thread that finds words
NARROWEST = 16  # words; calls for shorter texts would cost no less
EXAMPLE = "a text to begin with"


class TextClassifier:
    """Texts in, answers out: finds each text's words, then runs the network on texts of like length together."""

    def __init__(self, engine: Engine, *, max_words: int) -> None:
        """
        Args:
            engine: takes word ids, int64 [N, L] padded with 0, and gives a score for each class, [N, classes]. Its
                file has the vocabulary.
            max_words: a text may have.

        Raises:
            CompanionError: it takes or gives something else, or has no vocabulary of its size.
        """
        taken, given = engine.inputs[0], engine.outputs[0]
        said = engine.metadata
        if len(engine.inputs) != 1 or len(taken.shape) != 2 or taken.dtype != "int64" or len(given.shape) != 2:
            raise CompanionError(f"this network classifies no texts: it takes {taken} and gives {given}.")
        if taken.shape != (None, None):
            raise CompanionError(f"this network takes {taken}: export it for texts of any number and any length.")
        if said.vocabulary is None:
            raise CompanionError("the network's file has no vocabulary: save it with the one it was trained with.")
        rows = (said.configuration or {}).get("vocabulary_size", len(said.vocabulary))
        if len(said.vocabulary) != rows:
            raise CompanionError(
                f"the network has rows for {rows:,} words, but the vocabulary has {len(said.vocabulary):,}."
            )
        self.engine, self._max_words = engine, max_words
        self._ids = word_ids(said.vocabulary)

    def __call__(self, texts: Sequence[str]) -> list[Answer | Exception]:
        answers: list[Any] = [None] * len(texts)
        buckets: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for place, text in enumerate(texts):
            ids = encode(text, self._ids, self._max_words + 1)
            if len(ids) > self._max_words:
                answers[place] = BadItem(f"the text has more than {self._max_words:,} words: send less.")
            else:
                buckets[_width(len(ids))].append((place, ids))
        for width, members in buckets.items():
            batch = np.full((len(members), width), PADDING, np.int64)
            for row, (_, ids) in zip(batch, members, strict=True):
                row[: len(ids)] = ids
            scores = self.engine.run({self.engine.inputs[0].name: batch})[self.engine.outputs[0].name]
            for (place, _), answer in zip(members, most_likely(scores, self.engine.metadata.labels), strict=True):
                answers[place] = answer
        return answers


def _width(length: int) -> int:
    """Powers of two, so that at most half of a row is padding, and there are few widths."""
    return max(NARROWEST, 1 << (length - 1).bit_length()) if length else NARROWEST


def read_texts(body: bytes) -> list[str]:
    """The texts in the JSON of a request.

    Raises:
        Refused: with 422, the body has another form; with 413, the texts are too long together.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(422, f"the body is no JSON: {FORM}.") from error
    if not isinstance(found, dict):
        raise Refused(422, f"the body is {_kind(found)} in place of an object: {FORM}.")
    if "texts" not in found:
        raise Refused(422, f"the field texts is missing: {FORM}.")
    if len(found) > 1:
        other = next(key for key in found if key != "texts")
        raise Refused(422, f"there is no field {other[:50]!r}: {FORM}.")
    texts = found["texts"]
    if not isinstance(texts, list):
        raise Refused(422, f"the field texts is {_kind(texts)} in place of a list: {FORM}.")
    if not texts:
        raise Refused(422, f"the field texts is an empty list: {FORM}.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refused(422, f"item {number} is {_kind(text)} in place of a text: {FORM}.")
    if sum(map(len, texts)) > LONGEST:
        raise Refused(413, f"the texts of a request may have {LONGEST:,} characters together: send several.")
    return texts


_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


def _model(engine: Engine, settings: Settings) -> Model:
    """
    Raises:
        CompanionError: the network does not classify texts, or fails on one.
    """
    classifier = TextClassifier(engine, max_words=settings.max_words)
    with one_sentence("the network cannot classify a text"):
        (answer,) = classifier([EXAMPLE])
        if isinstance(answer, Exception):
            raise answer
    return Model(classifier, EXAMPLE, "texts", engine.metadata.labels)


def text_app(
    model: Source | Mapping[str, Source], *, engine: str | None = None, settings: Settings | None = None
) -> Application:
    """A server for networks that classify texts: an ASGI application, whose other routes are its ``framework``'s.

    Args:
        model: a ``.safetensors`` or ``.onnx`` file with its vocabulary, or an engine that is open already; or several
            by name, of which the first answers at ``/predict`` and each at ``/predict/NAME``.
        engine: what runs the files: one of `companion.engines.available`; if not given, ``torch_fused`` for
            ``.safetensors`` and ``onnxruntime`` for ``.onnx``.
        settings: limits and policies; if not given, from the environment.

    Raises:
        CompanionError: a file cannot be loaded, or its network does not classify texts.
    """
    settings = settings or settings_from()
    services = services_of(model, partial(_model, settings=settings), engine=engine, settings=settings)

    async def others(request: Request) -> list[str]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        raise Refused(415, f"send {TYPE}, not {kind or 'nothing'}.")

    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": settings.max_items}
    form = {"type": "object", "required": ["texts"], "additionalProperties": False, "properties": {"texts": texts}}
    return application(
        services,
        others,
        title="companion: texts",
        description='What texts are about. Send them as JSON: {"texts": ["…", "…"]}.',
        bodies={TYPE: {"schema": form}},
        readers={TYPE: read_texts},
    )
