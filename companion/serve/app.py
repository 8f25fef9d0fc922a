"""What all servers share: the HTTP contract, around a batcher (2.3.2, 2.3.3).

``POST /predict`` with a body that one call can read (an image, a JSON of texts) is answered in front of the framework,
by a few lines of ASGI; everything else (forms, the documentation, health, metrics) is FastAPI's. On a small network the
framework would cost more than the answer.
"""

import asyncio
import hmac
import json
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import multiprocess
from pydantic import BaseModel

from companion import __version__
from companion.errors import CompanionError
from companion.serve.batching import (
    Batcher,
    BatcherClosed,
    BatchReport,
    DeadlineExceeded,
    ItemFailed,
    QueueFull,
)
from companion.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Headers = Mapping[bytes, bytes]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Reader = Callable[[bytes], Sequence[Any]]
Readers = Mapping[str, Reader]

HUNG_UP = 499  # as nginx counts them; nobody sees it
LAST = 1.0  # seconds for a call of the model that is still running at the end
PATIENCE = 0.02  # seconds after which it is worth asking whether the client is still there


@dataclass(frozen=True)
class Answer:
    """What a server says about an item."""

    class_id: int
    label: str
    confidence: float
    """The class's share after softmax, in 0..1."""


class Predictions(BaseModel):
    """The answer to a request, in the order of its items."""

    predictions: list[int]
    labels: list[str]
    confidences: list[float]


class Detail(BaseModel):
    """Why there is no answer."""

    detail: str


ERRORS = {
    400: "an item is damaged or not what it should be",
    401: "the token is missing or wrong",
    408: "the body came too slowly",
    413: "too many bytes or items",
    415: "a content type that is not taken",
    422: "a body of another form",
    500: "the model failed on an item",
    503: "too many wait, or the server is shutting down: Retry-After says when to ask again",
    504: "no answer in time",
}


class Refused(CompanionError):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.headers = status, tuple(headers)

    def body(self) -> bytes:
        return json.dumps({"detail": str(self)}, ensure_ascii=False).encode()


class HungUp(Exception):
    """The client left; nobody is there to be answered."""


class BadItem(CompanionError):
    """An item that can have no answer, through nobody's fault but its sender's."""


class Service:
    """A model behind a batcher, with what is counted about it."""

    def __init__(
        self,
        predict: Callable[[list[Any]], Sequence[Any]],
        example: Any,
        settings: Settings,
        release: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            predict: items → an `Answer` or an exception for each.
            example: an item to warm up with.
            settings: limits and policies.
            release: called at the end, to free what the model holds.
        """
        self.settings = settings
        self._example, self._release = example, release
        self.batcher = Batcher(
            predict,
            max_batch_size=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            policy=settings.policy,
            on_batch=self._note,
        )
        self.ready = False
        self.registry = prometheus.CollectorRegistry()
        every: Any = {"registry": self.registry, "namespace": "companion"}
        self._requests = prometheus.Counter("requests", "Requests for predictions, by status.", ["status"], **every)
        self._batch = prometheus.Histogram(
            "batch_size", "Items in a call of the model.", buckets=[2**power for power in range(13)], **every
        )
        fine = [base * 10.0**power for power in range(-4, 2) for base in (1, 2, 5)]
        self._waited = prometheus.Histogram("queue_seconds", "Waiting of an item.", buckets=fine, **every)
        self._model = prometheus.Histogram("model_seconds", "A call of the model.", buckets=fine, **every)
        self._failed = prometheus.Counter("failed_items", "Items that the model could not answer.", **every)
        self._depth = prometheus.Gauge(
            "queue_items", "Items that waited when the last call ended.", multiprocess_mode="livesum", **every
        )

    def _note(self, report: BatchReport) -> None:
        self._batch.observe(report.size)
        self._model.observe(report.seconds)
        self._failed.inc(report.failed)
        self._depth.set(report.queued)
        for waited in report.waited:
            self._waited.observe(waited)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open from here on: ready when the model has run once; at the end what was accepted is answered."""
        async with self.batcher:
            await self.batcher.submit(self._example)
            self.ready = True
            try:
                yield
            finally:
                self.ready = False
                # The server has given those who asked their time, so that nobody waits any more.
                await self.batcher.close(grace=LAST)
                if self._release is not None and not self.batcher.queue.busy:
                    self._release()

    async def predict(self, items: Sequence[Any], receive: Receive | None = None) -> list[Answer]:
        """The answers to the items of one request.

        Args:
            items: what the model takes.
            receive: says when the client hangs up, so that its items leave the queue.

        Raises:
            Refused: with the status to answer with.
            HungUp: the client did.
        """
        settings = self.settings
        if len(items) > settings.max_items:
            raise Refused(413, f"a request may have {settings.max_items} items, not {len(items)}: send several.")
        try:
            futures = self.batcher.enqueue(items, timeout=settings.timeout)
        except QueueFull as full:
            seconds = max(1, math.ceil(full.retry_after))
            raise Refused(503, f"too many wait: try again in {seconds} s.", [("retry-after", str(seconds))]) from full
        except BatcherClosed as closed:
            raise Refused(503, "the server is shutting down.", [("retry-after", "1")]) from closed
        except CompanionError as error:
            raise Refused(413, str(error)) from error
        self._depth.set(len(self.batcher.queue))
        watch = None if receive is None else _Watch(futures, receive)
        try:
            return [await _answer(future, number if len(items) > 1 else None) for number, future in enumerate(futures)]
        except asyncio.CancelledError:
            if watch is not None and watch.hung_up:
                raise HungUp from None
            # Nobody else cancels a request but a server whose time to end is up.
            raise Refused(503, "the server is shutting down.", [("retry-after", "1")]) from None
        except DeadlineExceeded as late:
            raise Refused(504, f"there was no answer within {settings.timeout:g} s.") from late
        except BatcherClosed as closed:
            raise Refused(503, "the server is shutting down.", [("retry-after", "1")]) from closed
        finally:
            if watch is not None:
                watch.end()
            for future in futures:  # of a request that is refused for one of its items, the others are for nobody
                future.cancel()

    def check_token(self, headers: Headers) -> None:
        """
        Raises:
            Refused: the settings ask for a token, and ``Authorization`` is not ``Bearer`` and that one.
        """
        if self.settings.token is None:
            return
        given = headers.get(b"authorization", b"")
        wanted = b"Bearer " + self.settings.token.get_secret_value().encode()
        if not hmac.compare_digest(given, wanted):  # which takes as long whatever was given
            raise Refused(401, "this server asks for a bearer token.", [("www-authenticate", "Bearer")])

    def count(self, status: int) -> None:
        self._requests.labels(status).inc()


def _forget_the_dead(folder: Path) -> None:
    """Workers that are gone have no queue any more."""
    for file in folder.glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{process}").exists() and Path("/proc").exists():
            multiprocess.mark_process_dead(process)


async def _answer(future: asyncio.Future[Answer], number: int | None) -> Answer:
    try:
        return await future
    except ItemFailed as failure:
        which = "" if number is None else f"item {number}: "
        if isinstance(failure.__cause__, BadItem):
            raise Refused(400, f"{which}{failure.__cause__}") from failure
        raise Refused(500, f"{which}the model failed on it.") from failure


class _Watch:
    """Cancels futures when the client hangs up, after which an answer would be work for nobody."""

    def __init__(self, futures: Sequence[asyncio.Future[Any]], receive: Receive) -> None:
        self.hung_up = False
        self._futures, self._receive = futures, receive
        self._listening: asyncio.Task[None] | None = None
        # Most answers are there before it would be worth a task to watch the connection.
        self._begins = asyncio.get_running_loop().call_later(PATIENCE, self._begin)

    def _begin(self) -> None:
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        await self._receive()  # the body is read, so that nothing but the end can come
        self.hung_up = True
        for future in self._futures:
            future.cancel()

    def end(self) -> None:
        self._begins.cancel()
        if self._listening is not None:
            self._listening.cancel()


async def read_body(headers: Headers, receive: Receive, settings: Settings) -> bytes:
    """The body of a request, as large and as slow as the settings allow.

    Raises:
        Refused: too large (413) or too slow (408).
        HungUp: the client did.
    """
    too_large = Refused(413, f"a request may have {settings.max_bytes} bytes: send less.", [("connection", "close")])
    if int(headers.get(b"content-length", 0)) > settings.max_bytes:  # a number, or the server would not have let it in
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                part = message.get("body", b"")
                size += len(part)
                if size > settings.max_bytes:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        late = f"the body was not there within {settings.body_seconds:g} s."
        raise Refused(408, late, [("connection", "close")]) from None


def encode(answers: Sequence[Answer]) -> bytes:
    """The JSON of the contract."""
    return json.dumps(
        {
            "predictions": [answer.class_id for answer in answers],
            "labels": [answer.label for answer in answers],
            "confidences": [round(answer.confidence, 6) for answer in answers],
        },
        ensure_ascii=False,
    ).encode()


class Front:
    """ASGI: answers ``POST /predict`` with a body that one call reads, and hands everything else to the framework."""

    def __init__(self, app: Any, service: Service, readers: Readers) -> None:
        """
        Args:
            app: the framework's.
            service: what answers.
            readers: content type → how its body is read.
        """
        self.app, self._service = app, service
        self._readers = {kind.encode(): read for kind, read in readers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/predict" and scope["method"] == "POST":
            headers = dict(scope["headers"])
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if read := self._readers.get(kind):
                await self._answer(read, headers, receive, send)
                return
        await self.app(scope, receive, send)

    async def _answer(self, read: Reader, headers: Headers, receive: Receive, send: Send) -> None:
        service = self._service
        try:
            service.check_token(headers)
            items = read(await read_body(headers, receive, service.settings))
            answers = await service.predict(items, receive)
        except HungUp:
            service.count(HUNG_UP)
            return
        except Refused as refused:
            status, extra, content = refused.status, refused.headers, refused.body()
        else:
            status, extra, content = 200, (), encode(answers)
        service.count(status)
        lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        lines += [(key.encode(), value.encode()) for key, value in extra]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": content})


def application(
    service: Service,
    items: Callable[[Request], Awaitable[list[Any]]],
    *,
    title: str,
    description: str,
    bodies: dict[str, Any],
    readers: Readers,
) -> FastAPI:
    """The whole server, with its documentation at ``/docs``.

    Args:
        service: what answers.
        items: reads the items from a request whose content type is not among the readers'; raises `Refused`.
        title, description: of the documentation.
        bodies: content type → its entry in the OpenAPI document.
        readers: content type → the items of such a body, or `Refused`; the front answers them.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title=title, description=description, version=__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Front, service=service, readers=readers)

    @app.post(
        "/predict",
        response_model=Predictions,
        responses={status: {"description": text, "model": Detail} for status, text in ERRORS.items()},
        openapi_extra={"requestBody": {"required": True, "content": bodies}},
    )
    async def predict(request: Request) -> Response:
        """Classify one item or several; the answers stand in the order of the items."""
        try:
            service.check_token(dict(request.scope["headers"]))
            found = await service.predict(await items(request), request.receive)
        except HungUp:
            service.count(HUNG_UP)
            return Response(status_code=HUNG_UP)
        except Refused as refused:
            service.count(refused.status)
            return Response(refused.body(), refused.status, dict(refused.headers), "application/json")
        service.count(200)
        return Response(encode(found), media_type="application/json")

    @app.get("/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/ready", responses={503: {"description": "not ready yet, or shutting down"}})
    async def ready() -> Response:
        """Whether it takes requests: the model is loaded and has run once."""
        return JSONResponse({"status": "ready" if service.ready else "not ready"}, 200 if service.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What was counted, for Prometheus."""
        registry = service.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # several workers: the sum of all
            registry = prometheus.CollectorRegistry()
            _forget_the_dead(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
            multiprocess.MultiProcessCollector(registry)
        return Response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    return app
