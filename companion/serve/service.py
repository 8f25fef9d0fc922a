"""A model behind a batcher: how it is asked, counted, and replaced while it is (2.3.2, 2.3.3)."""

import asyncio
import hmac
import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from companion import engines
from companion.engines import Engine
from companion.errors import CompanionError
from companion.serve.batching import Batcher, BatcherClosed, DeadlineExceeded, ItemFailed, QueueFull
from companion.serve.counted import Counted, ModelCounts
from companion.serve.models import Model, in_thread, load_whole, signature
from companion.serve.settings import Settings

Headers = Mapping[bytes, bytes]

CLIENT = "companion.client"
"""The extension of an ASGI scope that holds the `Client` as its ``connection``."""

LAST = 1.0  # seconds for a call of the model that is still running at the end
LOOK = 0.5  # seconds between two looks at a model's file
QUIET = 1.0  # seconds between two tracebacks in the logs of one model

log = logging.getLogger("companion.serve")


@dataclass(frozen=True)
class Answer:
    """What a server says about an item."""

    class_id: int
    label: str
    confidence: float
    """The class's share after softmax, in 0..1."""


class Refused(CompanionError):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, headers: Sequence[tuple[str, str]] = (), *, cause: str | None = None
    ) -> None:
        """``cause`` is what it is counted as; if not given, what `counted.CAUSES` says of the status."""
        super().__init__(message)
        self.status, self.headers, self.cause = status, tuple(headers), cause

    def body(self) -> bytes:
        return json.dumps({"detail": str(self)}, ensure_ascii=False).encode()


class HungUp(Exception):
    """The client left; nobody is there to be answered."""


class Client(Protocol):
    """Who asked, as the server's connections know it."""

    on_gone: Callable[[], None] | None
    """Called when the client hangs up; set and taken back by whoever works on its request."""

    @property
    def whole(self) -> bool:
        """Whether all of the request is there."""

    @property
    def gone(self) -> bool:
        """Whether the client has hung up."""


class BadItem(CompanionError):
    """An item that can have no answer, through nobody's fault but its sender's."""


class Service:
    """A model behind a batcher, with what is counted about it."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        *,
        name: str = "model",
        counted: Counted | None = None,
        alone: bool = True,
        load: Callable[[], Model] | None = None,
        path: Path | None = None,
        loaded: tuple[int, ...] | None = None,
    ) -> None:
        """
        Args:
            model: what answers.
            settings: limits and policies.
            name: of the model, in paths and metrics.
            counted: the metrics of the process, if it has several models.
            alone: whether it is the only model of its event loop.
            load: makes the model anew, when it is to be reloaded. It has run the new model once when it returns.
            path: the file that ``load`` reads.
            loaded: the `signature` that the file had when ``model`` was loaded from it.
        """
        self.model, self.settings, self.name = model, settings, name
        self.counted = counted or Counted()
        self.counts = ModelCounts(self.counted, name)
        self.batcher = Batcher(
            model.predict,
            max_batch_size=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            policy=settings.policy,
            on_batch=self.counts.batch,
            on_queue=self.counts.depth.set,
            rest=alone,
        )
        self.ready = False
        self._load, self._path, self._loaded = load, path, loaded
        self._asked = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = -math.inf
        self._unheard = 0
        self._bearer = None if settings.token is None else b"Bearer " + settings.token.get_secret_value().encode()

    @classmethod
    def of_file(cls, path: Path, load: Callable[[], Model], settings: Settings, **options: Any) -> "Service":
        """A service for a model in a file, which can be reloaded; ``options`` are those of the class.

        Raises:
            CompanionError: as ``load``.
        """
        loaded = signature(path)
        return cls(load_whole(path, load), settings, load=load, path=path, loaded=loaded, **options)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open from here on: ready when the model has run once; at the end what was accepted is answered."""
        self._loop = asyncio.get_running_loop()
        async with self.batcher:
            await self.batcher.submit(self.model.example)
            if self._path is not None and signature(self._path) not in (None, self._loaded):
                self.reload()  # whoever replaced the file may have said so when nobody listened yet
            tasks = [asyncio.create_task(self._reloads())] if self._load else []
            if self._load and self._path and self.settings.reload:
                tasks.append(asyncio.create_task(self._watches(self._path)))
            self.ready = True
            try:
                yield
            finally:
                self.ready = False
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self.batcher.close(grace=LAST)
                if self.model.release is not None and not self.batcher.queue.busy:
                    self.model.release()

    def reload(self) -> None:
        """Load the file again, soon; the model serves until the new one has run once, and goes on if that fails.

        From any thread, while it is `running`; before that, as soon as it is.
        """
        if self._loop is None:
            self._asked.set()
        else:
            self._loop.call_soon_threadsafe(self._asked.set)

    async def _watches(self, path: Path) -> None:
        before = self._loaded
        while True:
            await asyncio.sleep(LOOK)
            now = signature(path)
            # A file that is still being written is another at each look.
            if now is not None and now == before and now != self._loaded:
                self.reload()
            before = now

    async def _reloads(self) -> None:
        """One after the other; whoever asks while one is loaded gets another one after it."""
        while await self._asked.wait():
            self._asked.clear()
            try:
                await self._reload()
            except Exception as error:  # whatever is wrong with the file, the old model is not
                said = str(error) if isinstance(error, CompanionError) else f"{type(error).__name__}: {error}"
                self.counts.reload("failed")
                log.error("the new file cannot be served; the old model goes on", extra=self._data(reason=said))

    async def _reload(self) -> None:
        assert self._load is not None
        load, old = self._load, self.model
        self._loaded = None if self._path is None else signature(self._path)
        began = time.monotonic()
        new = await in_thread(lambda: load_whole(self._path, load))
        try:
            new.check_replaces(old)
        except CompanionError:
            if new.release is not None:
                new.release()
            raise
        self.model = new
        await self.batcher.replace(new.predict)
        if old.release is not None:
            old.release()
        self.counts.reload("done")
        log.info("reloaded", extra=self._data(seconds=round(time.monotonic() - began, 3)))

    def _data(self, **more: Any) -> dict[str, Any]:
        return {"data": {"model": self.name, **({"file": str(self._path)} if self._path else {}), **more}}

    async def predict(self, items: Sequence[Any], client: Client | None = None) -> list[Answer]:
        """The answers to the items of one request.

        Args:
            items: what the model takes.
            client: whose items leave the queue when it hangs up; None is not watched.

        Raises:
            Refused: with the status to answer with.
            HungUp: the client did.
        """
        settings = self.settings
        if client is not None and client.gone:
            raise HungUp
        if len(items) > settings.max_items:
            said = f"a request may have {settings.max_items} items, not {len(items)}: send several."
            raise Refused(413, said, cause="too_many_items")
        try:
            futures = self.batcher.enqueue(items, timeout=settings.timeout)
        except QueueFull as full:
            seconds = max(1, math.ceil(full.retry_after))
            raise Refused(503, f"too many wait: try again in {seconds} s.", [("retry-after", str(seconds))]) from full
        except BatcherClosed as closed:
            raise shutting_down() from closed
        except CompanionError as error:
            raise Refused(413, str(error), cause="too_many_items") from error
        if client is not None:
            client.on_gone = partial(_cancel, futures)
        try:
            return [
                await self._answer(future, number if len(items) > 1 else None) for number, future in enumerate(futures)
            ]
        except asyncio.CancelledError:
            if client is not None and client.gone:
                raise HungUp from None
            # Nobody else cancels a request but a server whose time to end is up.
            raise shutting_down() from None
        except DeadlineExceeded as late:
            raise Refused(504, f"there was no answer within {settings.timeout:g} s.") from late
        except BatcherClosed as closed:
            raise shutting_down() from closed
        finally:
            if client is not None:
                client.on_gone = None
            _cancel(futures)  # of a request that is refused for one of its items, the others are for nobody

    async def _answer(self, future: asyncio.Future[Answer], number: int | None) -> Answer:
        try:
            return await future
        except ItemFailed as failure:
            which = "" if number is None else f"item {number}: "
            if isinstance(failure.__cause__, BadItem):
                raise Refused(400, f"{which}{failure.__cause__}") from failure
            self._tell(failure.__cause__)
            raise Refused(500, f"{which}the model failed on it.") from failure

    def _tell(self, error: BaseException | None) -> None:
        """Log why the model failed, but not a thousand times a second."""
        now = time.monotonic()
        if now - self._told < QUIET:
            self._unheard += 1
            return
        log.error("the model failed", exc_info=error, extra=self._data(not_logged_before=self._unheard))
        self._told, self._unheard = now, 0

    def check_token(self, headers: Headers) -> None:
        """
        Raises:
            Refused: the settings ask for a token, and ``Authorization`` is not ``Bearer`` and that one.
        """
        if self._bearer is None:
            return
        # Which takes as long whatever was given.
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._bearer):
            raise Refused(401, "this server asks for a bearer token.", [("www-authenticate", "Bearer")])

    def count(self, status: int, cause: str | None = None) -> None:
        self.counts.request(status, cause)
        if status != 200 and log.isEnabledFor(logging.DEBUG):
            log.debug("refused", extra=self._data(status=status, cause=cause))


def shutting_down() -> Refused:
    return Refused(503, "the server is shutting down.", [("retry-after", "1")], cause="shutting_down")


def _cancel(futures: Sequence[asyncio.Future[Any]]) -> None:
    for future in futures:
        future.cancel()


Source = str | os.PathLike[str] | Engine
"""A model's file, or an engine that is open already."""


def services_of(
    sources: Source | Mapping[str, Source],
    model_of: Callable[[Engine], Model],
    *,
    engine: str | None,
    settings: Settings,
) -> list[Service]:
    """A service for each network, which share what is counted.

    Args:
        sources: one, or several by name.
        model_of: makes an answering model of an open engine, and has run it once.
        engine: what runs files, or None for what suits each.
        settings: limits and policies.

    Raises:
        CompanionError: a file cannot be loaded, or as ``model_of``.
    """
    named = sources if isinstance(sources, Mapping) else {"model": sources}
    shared: dict[str, Any] = {"counted": Counted(), "alone": len(named) == 1}

    def load(path: Path) -> Model:
        opened = engines.load(path, engine or engines.suited(path), threads=settings.threads)
        try:
            return replace(model_of(opened), release=opened.close)
        except BaseException:
            opened.close()
            raise

    def service(name: str, source: Source) -> Service:
        if isinstance(source, Engine):
            return Service(model_of(source), settings, name=name, **shared)
        path = Path(source)
        return Service.of_file(path, partial(load, path), settings, name=name, **shared)

    return [service(name, source) for name, source in named.items()]
