"""Connections that cannot be held against the server: slow, silent, greedy and deaf clients (2.3.2).

uvicorn's protocol leaves a connection that sends no head, or does not read its answer, open for ever. Here one timer
looks after all connections of a process, which costs a request two entries in a dictionary.
"""

import asyncio
import json
import sys
import time
import weakref
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from companion.serve.service import CLIENT
from companion.serve.settings import Settings

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LONGEST_HEAD = 64 * 1024  # bytes; of what ends a body in chunks, too
SPARE = 64  # open files that are no connections
SAID = {
    400: "this is no HTTP request.",
    408: "the head of the request came too slowly.",
    431: f"the head of the request, or what ends its body, is longer than {LONGEST_HEAD} bytes.",
    503: "the server is busy: try again later.",
}


def most_connections(wanted: int) -> int:
    """As many as the system lets a process have, after asking it for what is missing."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + SPARE
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - SPARE)
    return wanted


class State(ServerState):
    """What the connections of a process share."""

    def __init__(self, settings: Settings, cut: Callable[[str], None]) -> None:
        """
        Args:
            settings: limits.
            cut: called with the cause when a connection is closed before its time.
        """
        super().__init__()
        self.settings, self.cut = settings, cut
        self.most = most_connections(settings.max_connections)
        self.waiting: dict[Connection, float] = {}
        """Connections that owe a head, and until when: the oldest first, since all have the same time."""
        self.held = 0
        """Bytes of bodies."""
        self.draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._dated = 0

    def await_head(self, connection: "Connection") -> None:
        now = connection.loop.time()
        self.waiting.pop(connection, None)
        self.waiting[connection] = now + self.settings.head_seconds
        if self._timer is None:
            self._arm(connection.loop, now + self.settings.head_seconds)

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._timer = loop.call_at(when, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        while self.waiting:
            connection, until = next(iter(self.waiting.items()))
            if until > now:
                # Not sooner than in a while, so that a busy server does not sweep for each connection.
                self._arm(loop, max(until, now + 0.1))
                return
            connection.too_slow()

    def make_room(self, newest: "Connection") -> None:
        if len(self.connections) <= self.most:
            return
        oldest = next(iter(self.waiting), newest)
        oldest.refuse(503, "too_many_connections")

    def date(self) -> None:
        """The headers that all answers have."""
        now = int(time.time())
        if now != self._dated:
            self._dated = now
            self.default_headers = [(b"date", formatdate(now, usegmt=True).encode())]


class Writer:
    """Sends the head of an answer together with the first part of its body: one system call where uvicorn makes two."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self._begun = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._begun and data != CONTINUE:
            self._begun, self._head = True, data
            return
        if self._head is not None:
            data, self._head = self._head + data, None
        self._transport.write(data)

    def end(self) -> None:
        """Of an answer: send a head without a body; the next write is a head again."""
        if self._head is not None and not self.is_closing():
            self.write(b"")
        self._begun, self._head = False, None

    def close(self) -> None:
        self.end()
        self._transport.close()


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits, and a `companion.serve.service.Client` for whoever answers."""

    server_state: State

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head, self._held = False, 0
        self._loose = 0  # bytes read since a head or a part of a body was complete
        self._active: RequestResponseCycle | None = None  # answered now, or last; uvicorn's own is the newest
        self._deaf: asyncio.TimerHandle | None = None
        self._extensions: dict[str, dict[object, object]] = {CLIENT: {"connection": weakref.proxy(self)}}
        self.on_gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._writer = Writer(transport)
        self.server_state.await_head(self)
        self.server_state.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.waiting.pop(self, None)
        self._abandon()
        if self._deaf is not None:
            self._deaf.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._loose += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # nothing here speaks another protocol; the request was answered as it is
            pass
        except httptools.HttpParserError:
            self.refuse(400, "bad_http")
            return
        if self._loose > LONGEST_HEAD:
            self.refuse(431, "long_head")

    def on_message_begin(self) -> None:
        self._in_head = True
        self.server_state.await_head(self)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # and not after the last chunk of a body, where nobody looks for any
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        state = self.server_state
        self._in_head, self._loose = False, 0
        state.waiting.pop(self, None)
        state.date()
        self.scope["extensions"] = self._extensions
        super().on_headers_complete()
        self.cycle.transport = self._writer  # type: ignore[assignment]
        if state.draining:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        if self.cycle.response_complete:  # without the body, which nobody holds
            return
        super().on_body(body)
        state = self.server_state
        self._held += len(body)
        state.held += len(body)
        if state.held > state.settings.max_memory:
            self.refuse(503, "memory")

    @property
    def whole(self) -> bool:
        """Whether the body of the request that is answered is there."""
        return self._active is not None and not self._active.more_body

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._active is None or self._active.disconnected

    def on_response_complete(self) -> None:
        self._writer.end()
        self._let_go()
        state = self.server_state
        state.total_requests += 1
        if self.transport.is_closing():
            self._abort_if_deaf()
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        else:
            state.await_head(self)

    def shutdown(self) -> None:
        for cycle in (self.cycle, *(each for each, _ in self.pipeline)):
            if cycle is not None:
                cycle.keep_alive = False
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
            self._abort_if_deaf()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_if_deaf()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._deaf is not None and not self.transport.is_closing():
            self._deaf.cancel()
            self._deaf = None

    def _abort_if_deaf(self) -> None:
        if self._deaf is None:
            self._deaf = self.loop.call_later(self.server_state.settings.write_seconds, self._abort)

    def _abort(self) -> None:
        self.server_state.cut("deaf")
        self.transport.abort()

    def _let_go(self) -> None:
        self.server_state.held -= self._held
        self._held = 0

    def _abandon(self) -> None:
        """Whoever works on an answer stops, and what waits behind it is never begun."""
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
            if self.on_gone is not None:
                self.on_gone()
        self.pipeline.clear()
        self._let_go()

    def too_slow(self) -> None:
        """The time for a head is up."""
        if self._in_head:
            self.refuse(408, "slow_head")
        else:
            self.server_state.waiting.pop(self, None)
            self.server_state.cut("idle")
            self.transport.close()
            self._abort_if_deaf()

    def refuse(self, status: int, cause: str) -> None:
        """Say why, unless it would be taken for another request's answer, or for a part of one, and close."""
        state = self.server_state
        state.waiting.pop(self, None)
        if self.transport.is_closing():
            return
        state.cut(cause)
        active = self._active
        if active is None or active.response_complete or (active.more_body and not active.response_started):
            body = json.dumps({"detail": SAID[status]}).encode()
            again = b"retry-after: 1\r\n" if status == 503 else b""
            self.transport.write(
                b"%scontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n%s"
                % (STATUS_LINE[status], len(body), again, body)
            )
        self._abandon()
        self.transport.close()
        self._abort_if_deaf()
