"""A server that says what is in pictures (2.3.2, 2.3.3)."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from companion.datasets.images import pixels
from companion.engines import Engine
from companion.engines.base import one_sentence
from companion.errors import CompanionError
from companion.serve.answers import most_likely
from companion.serve.app import Answer, Application, BadItem, Receive, Refused, application, read_body
from companion.serve.models import Model
from companion.serve.service import Source, services_of
from companion.serve.settings import Settings, settings_from

TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif")


class Classifier:
    """Image files in, answers out: decodes each by itself, then runs the network on all that are images."""

    def __init__(self, engine: Engine, *, max_pixels: int) -> None:
        """
        Args:
            engine: takes float32 [N, 3, H, W] in 0..1, and gives a score for each class, [N, classes].
            max_pixels: an image may have.

        Raises:
            CompanionError: it takes or gives something else, or images of any size.
        """
        taken, given = engine.inputs[0], engine.outputs[0]
        if taken.dtype != "float32" or taken.shape[:1] != (None,):
            raise CompanionError(f"this network takes {taken}: export it for float32 and a batch of any size.")
        if len(engine.inputs) != 1 or len(taken.shape) != 4 or taken.shape[1] != 3 or len(given.shape) != 2:
            raise CompanionError(f"this network classifies no images: it takes {taken} and gives {given}.")
        height, width = engine.metadata.input_size[-2:] if engine.metadata.input_size else taken.shape[2:]
        if height is None or height != width:
            raise CompanionError(f"this network takes {taken}, and its file names no square of pixels.")
        self.engine, self.size, self._max_pixels = engine, height, max_pixels

    def __call__(self, files: Sequence[bytes]) -> list[Answer | Exception]:
        decoded = [self._decode(file) for file in files]
        images = [each for each in decoded if isinstance(each, np.ndarray)]
        answers = iter(self._answers(np.stack(images)) if images else ())
        return [next(answers) if isinstance(each, np.ndarray) else each for each in decoded]

    def _decode(self, file: bytes) -> "np.ndarray | BadItem":
        """Uint8 [H, W, 3]."""
        try:
            return pixels(file, "the image", self.size, most=self._max_pixels)
        except CompanionError as error:
            return BadItem(str(error))

    def _answers(self, images: np.ndarray) -> list[Answer | Exception]:
        batch = images.transpose(0, 3, 1, 2).astype(np.float32, order=self.engine.order)
        batch /= 255
        scores = self.engine.run({self.engine.inputs[0].name: batch})[self.engine.outputs[0].name]
        return most_likely(scores, self.engine.metadata.labels)


def _replay(body: bytes) -> Receive:
    """What hands out a body that was read already."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _gray(size: int) -> bytes:
    """A picture to warm up with."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (size, size), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


def _model(engine: Engine, settings: Settings) -> Model:
    """
    Raises:
        CompanionError: the network does not classify images, or fails on one.
    """
    classifier = Classifier(engine, max_pixels=settings.max_pixels)
    example = _gray(classifier.size)
    with one_sentence("the network cannot classify an image"):
        (answer,) = classifier([example])
        if isinstance(answer, Exception):
            raise answer
    return Model(classifier, example, f"images of {classifier.size}×{classifier.size}", engine.metadata.labels)


def image_app(
    model: Source | Mapping[str, Source], *, engine: str | None = None, settings: Settings | None = None
) -> Application:
    """A server for networks that classify images: an ASGI application, whose other routes are its ``framework``'s.

    Args:
        model: a ``.safetensors`` or ``.onnx`` file, or an engine that is open already; or several by name, of which
            the first answers at ``/predict`` and each at ``/predict/NAME``.
        engine: what runs the files: one of `companion.engines.available`; if not given, ``torch_fused`` for
            ``.safetensors`` and ``onnxruntime`` for ``.onnx``.
        settings: limits and policies; if not given, from the environment.

    Raises:
        CompanionError: a file cannot be loaded, or its network does not classify images.
    """
    settings = settings or settings_from()
    services = services_of(model, partial(_model, settings=settings), engine=engine, settings=settings)

    async def files(request: Request) -> list[bytes]:
        """Those of a form; any field may hold them."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise Refused(415, f"send {', '.join(TYPES[:2])} or multipart/form-data, not {kind or 'nothing'}.")
        body = await read_body(request.scope, request.receive, settings)
        try:
            form = await Request(request.scope, _replay(body)).form(max_files=settings.max_items)
        except UnicodeError as error:  # the form may choose its codec, and some of Python's raise more than they should
            raise Refused(422, "the form cannot be read: its text is not in the charset that it names.") from error
        except HTTPException as error:
            said = f"the form cannot be read: {error.detail.rstrip('.').lower()}."
            if "Too many" in error.detail:
                raise Refused(413, said, cause="too_many_items") from error
            raise Refused(422, said) from error
        try:
            found = [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
        finally:
            await form.close()
        if not found:
            raise Refused(422, "the form holds no files: send them as files=@a.png.")
        return found

    raw = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in TYPES}
    many = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "required": ["files"], "properties": {"files": many}}}
    return application(
        services,
        files,
        title="companion: images",
        description="What is in a picture. One image as the body is the fast form; several go as a form.",
        bodies={**raw, "multipart/form-data": form},
        readers=dict.fromkeys(TYPES, lambda body: [body]),
    )
