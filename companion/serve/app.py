"""What all servers share: the HTTP contract, around a batcher (2.3.2, 2.3.3).

``POST /predict`` with a body that one call can read (an image, a JSON of texts) is answered in front of the framework,
by a few lines of ASGI; everything else (forms, the documentation, health, metrics) is FastAPI's. On a small network the
framework would cost more than the answer.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic_core import to_json

from companion import __version__
from companion.serve import counted
from companion.serve.counted import Counted
from companion.serve.service import (
    CLIENT,
    LAST,
    Answer,
    BadItem,
    Client,
    Headers,
    HungUp,
    Refused,
    Service,
    shutting_down,
)
from companion.serve.settings import Settings

__all__ = ["Answer", "Application", "BadItem", "HungUp", "Refused", "Service", "application", "encode", "read_body"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Reader = Callable[[bytes], Sequence[Any]]
Readers = Mapping[str, Reader]

HUNG_UP = 499  # as nginx counts them; nobody sees it
UNREAD = {401, 404, 415}  # refused without the body, which is not to be sent any more
PAGE = Path(__file__).with_name("page.html")


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
    404: "there is no such model",
    408: "the body came too slowly",
    413: "too many bytes or items",
    415: "a content type that is not taken",
    422: "a body of another form",
    500: "the model failed on an item",
    503: "too many wait, or the server is shutting down: Retry-After says when to ask again",
    504: "no answer in time",
}


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """The body of a request, as large and as slow as the settings allow.

    Raises:
        Refused: too large (413) or too slow (408).
        HungUp: the client did.
    """
    length = next((value for name, value in scope["headers"] if name == b"content-length"), 0)
    if int(length) > settings.max_bytes:  # a number, or the server would not have let it in
        raise _too_large(settings)
    client = client_of(scope)
    # To set a timer would take longer than to read a body that is there, as nearly all are.
    seconds = None if client is not None and client.whole else settings.body_seconds
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                part = message.get("body", b"")
                size += len(part)
                if size > settings.max_bytes:
                    raise _too_large(settings)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        late = f"the body was not there within {settings.body_seconds:g} s."
        raise Refused(408, late, [("connection", "close")]) from None
    except asyncio.CancelledError:  # by a server whose time to end is up
        raise shutting_down() from None


def _too_large(settings: Settings) -> Refused:
    return Refused(413, f"a request may have {settings.max_bytes} bytes: send less.", [("connection", "close")])


def client_of(scope: Scope) -> Client | None:
    """Who asked, where connections are those of `companion.serve.process.Server`. Under another server nobody says
    when a client hangs up, and its items are answered all the same."""
    return scope.get("extensions", {}).get(CLIENT, {}).get("connection")


def encode(answers: Sequence[Answer]) -> bytes:
    """The JSON of the contract."""
    return to_json(
        {
            "predictions": [answer.class_id for answer in answers],
            "labels": [answer.label for answer in answers],
            "confidences": [round(answer.confidence, 6) for answer in answers],
        }
    )


class Application:
    """ASGI: answers ``POST /predict`` with a body that one call reads, and hands everything else to the framework."""

    def __init__(self, framework: FastAPI, services: Mapping[str, Service], counted: Counted, readers: Readers) -> None:
        """
        Args:
            framework: answers what is not answered here.
            services: by name; the first answers at ``/predict`` too.
            counted: what was counted.
            readers: content type → how its body is read.
        """
        self.framework, self.services, self.counted = framework, services, counted
        self.service = next(iter(services.values()))
        """The first."""
        self._paths = {"/predict": self.service, **{f"/predict/{name}": each for name, each in services.items()}}
        self._readers = {kind.encode(): read for kind, read in readers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (service := self._paths.get(scope["path"])) and scope["method"] == "POST":
            headers = dict(scope["headers"])
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if read := self._readers.get(kind):
                await self._answer(service, read, headers, scope, receive, send)
                return
        await self.framework(scope, receive, send)

    async def _answer(
        self, service: Service, read: Reader, headers: Headers, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            service.check_token(headers)
            items = read(await read_body(scope, receive, service.settings))
            answers = await service.predict(items, client_of(scope))
        except HungUp:
            service.count(HUNG_UP)
            return
        except Refused as refused:
            status, extra, content = refused.status, _headers(refused), refused.body()
            service.count(status, refused.cause)
        else:
            status, extra, content = 200, (), encode(answers)
            service.count(200)
        lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        lines += [(key.encode(), value.encode()) for key, value in extra]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": content})


def application(
    services: Service | Sequence[Service],
    items: Callable[[Request], Awaitable[list[Any]]],
    *,
    title: str,
    description: str,
    bodies: dict[str, Any],
    readers: Readers,
) -> Application:
    """The whole server, with its documentation at ``/docs``.

    Args:
        services: what answers at ``/predict/NAME``; the first at ``/predict`` too. They share one `Counted`.
        items: reads the items from a request whose content type is not among the readers'; raises `Refused`.
        title, description: of the documentation.
        bodies: content type → its entry in the OpenAPI document.
        readers: content type → the items of such a body, or `Refused`; the front answers them.
    """
    services = [services] if isinstance(services, Service) else list(services)
    first = services[0]
    by_name = {service.name: service for service in services}
    stats = first.counted

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for service in services:
                await stack.enter_async_context(service.running())
            stats.ready.set(1)
            try:
                yield
            finally:
                stats.ready.set(0)
                # The server has given those who asked their time, so that nobody waits any more.
                await asyncio.gather(*(service.batcher.close(grace=LAST) for service in services))

    app = FastAPIOffline(title=title, description=description, version=__version__, lifespan=lifespan, redoc_url=None)

    async def answer(service: Service, request: Request) -> Response:
        try:
            service.check_token(dict(request.scope["headers"]))
            found = await service.predict(await items(request), client_of(request.scope))
        except HungUp:
            service.count(HUNG_UP)
            return Response(status_code=HUNG_UP)
        except Refused as refused:
            service.count(refused.status, refused.cause)
            return _refusal(refused)
        service.count(200)
        return Response(encode(found), media_type="application/json")

    described: dict[str, Any] = {
        "response_model": Predictions,
        "responses": {status: {"description": text, "model": Detail} for status, text in ERRORS.items()},
        "openapi_extra": {"requestBody": {"required": True, "content": bodies}},
    }

    @app.post("/predict", **described)
    async def predict(request: Request) -> Response:
        """Classify one item or several; the answers stand in the order of the items."""
        return await answer(first, request)

    @app.post("/predict/{model}", **described)
    async def predict_with(model: str, request: Request) -> Response:
        """The same, with the model of that name."""
        if model not in by_name:
            return _refusal(Refused(404, f"there is no model of this name: there are {', '.join(by_name)}."))
        return await answer(by_name[model], request)

    @app.get("/models")
    async def models() -> list[dict[str, Any]]:
        """What can be asked, and where."""
        return [
            {
                "name": name,
                "path": f"/predict/{name}",
                "takes": service.model.takes,
                "accepts": list(bodies),
                "labels": service.model.labels,
            }
            for name, service in by_name.items()
        ]

    @app.get("/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/ready", responses={503: {"description": "not ready yet, or shutting down"}})
    async def ready() -> Response:
        """Whether it takes requests: the models are loaded and have run once."""
        all_are = all(service.ready for service in services)
        return JSONResponse({"status": "ready" if all_are else "not ready"}, 200 if all_are else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What was counted, by all workers, for Prometheus."""
        return Response(stats.text(), media_type=counted.CONTENT_TYPE)

    @app.get("/stats")
    async def plain_stats() -> dict[str, Any]:
        """The same as plain values: counts since the start, whose difference tells of the time between two looks."""
        return {"max_batch": first.settings.max_batch, "policy": first.settings.policy, **stats.stats()}

    page = PAGE.read_text(encoding="utf-8")
    headers = {"content-security-policy": _policy(page), "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=headers)

    return Application(app, by_name, stats, readers)


def _refusal(refused: Refused) -> Response:
    return Response(refused.body(), refused.status, dict(_headers(refused)), "application/json")


def _headers(refused: Refused) -> tuple[tuple[str, str], ...]:
    return (*refused.headers, ("connection", "close")) if refused.status in UNREAD else refused.headers


def _policy(page: str) -> str:
    """What the page may do: run its own script and style, and ask this server."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
