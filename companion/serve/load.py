"""Many clients at once, who check their answers: what a server can bear, measured from outside (2.3.2)."""

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from companion.errors import CompanionError
from companion.serve.simulation import open_loop

try:
    import httptools
except ImportError as error:
    raise CompanionError("the load generator needs httptools: pip install httptools.") from error

T = TypeVar("T")

MOST_CONNECTIONS = 1024  # of an open loop: beyond that the machine's own limits would be measured
PAUSE = 0.05  # seconds after a connection that could not be had
LONGEST_ANSWER = 1 << 20  # bytes; nothing that is asked here has a longer one
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Request:
    """What a client sends, and what must come back."""

    body: bytes
    content_type: str
    expected: Any = None
    """The ``predictions`` of the right answer; None takes any."""


@dataclass(frozen=True)
class Load:
    """What the clients saw."""

    seconds: float
    """From the first request to the last answer."""
    latencies: NDArray[np.float64]
    """Seconds of each right answer, [N]: in an open loop from the moment when it was due to be sent."""
    failures: dict[str, int] = field(default_factory=dict)
    """Why a request had no right answer, and how often: ``503``, ``wrong answer``, ``time-out``, …"""

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return len(self.latencies) / self.seconds

    def latency(self, percentile: float = 50.0) -> float:
        """A percentile of the latencies in seconds; not a number if there is none."""
        return float(np.percentile(self.latencies, percentile)) if len(self.latencies) else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values: counts, ``requests_per_second``, and milliseconds by percentile."""
        found = {f"p{percentile:g}": 1e3 * self.latency(percentile) for percentile in PERCENTILES}
        return {
            "seconds": self.seconds,
            "answers": len(self.latencies),
            "requests_per_second": self.throughput,
            "latency_ms": found if len(self.latencies) else None,
            "failures": self.failures,
        }


def load(
    url: str,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    seconds: float = 10.0,
    timeout: float = 10.0,
    token: str | None = None,
    seed: int = 0,
) -> Load:
    """Put a server under load, and check every answer.

    Give either ``concurrency``, the number of clients who ask again when they have their answer (a closed loop: a slow
    server gets fewer requests), or ``rate``, the requests a second of many clients who know nothing of each other (an
    open loop, Poisson arrivals). Latencies of the open loop count from the moment when a request was due, also if
    it could only be sent later, so that a server that stalls cannot hide it (coordinated omission: Tene, 2013).

    Args:
        url: ``http://HOST:PORT/predict``.
        requests: sent in turn, each client beginning with another.
        concurrency: clients, from 1.
        rate: requests a second.
        seconds: for so long requests are sent; the answers to the last are awaited.
        timeout: seconds after which an answer counts as missing.
        token: sent as a bearer token.
        seed: of the arrivals.

    Raises:
        CompanionError: neither or both of concurrency and rate, a value out of range, no requests, a URL that is none,
            or nobody listens there.
    """
    if (concurrency is None) == (rate is None):
        raise CompanionError("give either concurrency (a closed loop) or rate (an open one).")
    if concurrency is not None and not 1 <= concurrency <= MOST_CONNECTIONS:
        raise CompanionError(f"concurrency is {concurrency}: give a number from 1 to {MOST_CONNECTIONS}.")
    if rate is not None and not 0 < rate < math.inf:
        raise CompanionError(f"rate is {rate}: give requests a second, above 0.")
    for name, value in (("seconds", seconds), ("timeout", timeout)):
        if not 0 < value < math.inf:
            raise CompanionError(f"{name} is {value}: give a number above 0.")
    if not requests:
        raise CompanionError("there is nothing to send: give one request or more.")
    clients = _Clients(url, requests, timeout, token)
    if concurrency is not None:
        return complete(clients.closed(concurrency, seconds))
    assert rate is not None
    return complete(clients.open(open_loop(rate, seconds, seed)))


def alone(url: str, requests: Sequence[Request], *, timeout: float = 10.0, token: str | None = None) -> list[Request]:
    """The same requests with what the server answers when each is sent alone, to be expected under load.

    Raises:
        CompanionError: it does not answer one of them with predictions.
    """
    told = []
    for number, each in enumerate(requests):
        clients = _Clients(url, [each], timeout, token)
        status, body = complete(clients.once())
        try:
            predictions = json.loads(body)["predictions"] if status == 200 else None
        except (ValueError, KeyError, TypeError):
            predictions = None
        if predictions is None:
            raise CompanionError(f"{url} has no predictions for request {number}: it answered {status}.")
        told.append(replace(each, expected=predictions))
    return told


def complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, also where a loop runs already, as in a notebook: then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


class _Clients:
    """What all clients of a run share."""

    def __init__(self, url: str, requests: Sequence[Request], timeout: float, token: str | None) -> None:
        parts = urlsplit(url)
        try:
            self._address = parts.hostname or "", parts.port or 80
        except ValueError:
            self._address = "", 0
        if parts.scheme != "http" or not self._address[0]:
            raise CompanionError(f"{url} is no address of a server: give one such as http://127.0.0.1:8000/predict.")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise CompanionError("the token has characters that a header cannot hold.")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        head += f"Authorization: Bearer {token}\r\n" if token else ""
        self._sent = [
            f"{head}Content-Type: {each.content_type}\r\nContent-Length: {len(each.body)}\r\n\r\n".encode() + each.body
            for each in requests
        ]
        self._url, self._requests, self._timeout = url, requests, timeout
        self._latencies: list[float] = []
        self._failures: Counter[str] = Counter()

    async def once(self) -> tuple[int, bytes]:
        connection = await self._connect()
        try:
            async with asyncio.timeout(self._timeout):
                return await connection.ask(self._sent[0])
        except (TimeoutError, OSError, httptools.HttpParserError) as error:
            raise CompanionError(f"{self._url} gives no answer: {error or 'it takes too long'}.") from error
        finally:
            connection.close()

    async def closed(self, concurrency: int, seconds: float) -> Load:
        connections = [await self._connect() for _ in range(concurrency)]
        began = perf_counter()

        async def client(number: int) -> None:
            connection: _Connection | None = connections[number]
            while True:
                connection = await self._ask(connection, number, due=perf_counter())
                number += concurrency
                if perf_counter() >= began + seconds:
                    break
            if connection is not None:
                connection.close()

        await asyncio.gather(*map(client, range(concurrency)))
        return self._found(began)

    async def open(self, arrivals: NDArray[np.float64]) -> Load:
        idle = [await self._connect()]
        room = asyncio.Semaphore(MOST_CONNECTIONS)
        asked = set()
        began = perf_counter()

        async def client(number: int, due: float) -> None:
            async with room:
                connection = await self._ask(idle.pop() if idle else None, number, due)
            if connection is not None:
                idle.append(connection)

        for number, arrival in enumerate(arrivals.tolist()):
            if (wait := began + arrival - perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(client(number, began + arrival))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
        for connection in idle:
            connection.close()
        return self._found(began)

    async def _ask(self, connection: "_Connection | None", number: int, due: float) -> "_Connection | None":
        """Send a request, note how it went, and give the connection back if it still works."""
        index = number % len(self._sent)
        try:
            async with asyncio.timeout(self._timeout):
                if connection is None or connection.lost:
                    connection = await self._connect()
                status, body = await connection.ask(self._sent[index])
        except TimeoutError:
            self._failures["time-out"] += 1
        except CompanionError:
            self._failures["no connection"] += 1
            await asyncio.sleep(PAUSE)  # or the failing itself would be the load
        except (OSError, httptools.HttpParserError):
            self._failures["connection lost"] += 1
        else:
            failure = _judged(status, body, self._requests[index].expected)
            if failure is None:
                self._latencies.append(perf_counter() - due)
            else:
                self._failures[failure] += 1
            return connection
        if connection is not None:
            connection.close()
        return None

    async def _connect(self) -> "_Connection":
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await asyncio.get_running_loop().create_connection(_Connection, *self._address)
        except TimeoutError as error:
            raise CompanionError(f"nobody answers at {self._url} within {self._timeout:g} s.") from error
        except OSError as error:
            said = os.strerror(error.errno) if error.errno else "no such host"
            raise CompanionError(f"nobody answers at {self._url}: {said.lower()}.") from error
        return connection

    def _found(self, began: float) -> Load:
        return Load(perf_counter() - began, np.array(self._latencies), dict(self._failures.most_common()))


def _judged(status: int, body: bytes, expected: Any) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if status != 200:
        return str(status)
    if expected is None:
        return None
    try:
        right = json.loads(body)["predictions"] == expected
    except (ValueError, KeyError, TypeError):
        right = False
    return None if right else "wrong answer"


class _Connection(asyncio.Protocol):
    """One request after the other on a connection that stays open."""

    def __init__(self) -> None:
        self.lost = False
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, request: bytes) -> "asyncio.Future[tuple[int, bytes]]":
        self._parser, self._parts, self._length = httptools.HttpResponseParser(self), list[bytes](), 0
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # something that nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._length += len(body)
        if self._length > LONGEST_ANSWER:
            self._end(ConnectionError("the answer is too long"))

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._parts)))
        self._answer = None
        self.lost |= not self._parser.should_keep_alive()

    def _end(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._answer = None
        self.close()

    def close(self) -> None:
        self.lost = True
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._end(error or ConnectionError("the server closed the connection"))
