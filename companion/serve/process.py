"""The processes of a server: one that answers, and one that looks after several (2.3.2)."""

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import uvicorn

from companion.errors import CompanionError
from companion.serve import counted, logs
from companion.serve.app import Application
from companion.serve.models import leave
from companion.serve.protocol import Connection, State
from companion.serve.service import LAST
from companion.serve.settings import Settings

SETTLE = 0.1  # seconds at the end for requests that are on their way on connections that are open
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a worker is started again that did not live long
STEADY = 30.0  # seconds after which a worker that is ready has lived long

log = logging.getLogger("companion.serve")


class Server(uvicorn.Server):
    """uvicorn's, without its polling, with our connections, and with an end that answers what was accepted."""

    def __init__(self, app: Application, settings: Settings, started: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            app: of `companion.serve.app.application`.
            settings: limits.
            started: called when it answers.
        """
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(settings.grace - SETTLE)),
        )
        super().__init__(config)
        self._app, self._tell = app, started
        cut = app.counted.connections.labels
        self.server_state: State = State(settings, lambda cause: cut(cause).inc())
        self._end: asyncio.Event | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        if hasattr(signal, "SIGHUP"):
            with suppress(ValueError, RuntimeError):  # not in the main thread, where nobody gets signals
                self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        await super().startup(sockets)
        if not self.should_exit:
            log.info("ready")
            self._tell()

    def reload(self) -> None:
        """Load all models again."""
        for service in self._app.services.values():
            service.reload()

    async def main_loop(self) -> None:
        assert self._end is not None
        if not self.should_exit:
            await self._end.wait()

    def end(self) -> None:
        """Answer what was accepted, and stop; from any thread or signal handler."""
        self.should_exit = True
        if self._end is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._end.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second Ctrl-C does not wait.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("ending", extra={"data": {"connections": len(self.server_state.connections)}})
        # What clients have sent before they can know is read, and who asks now is told that the connection ends.
        self.server_state.draining = True
        await asyncio.sleep(SETTLE)
        await super().shutdown(sockets)


def run_one(app: Application, settings: Settings, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serve in this process until SIGTERM or SIGINT."""
    server = Server(app, settings, started)
    for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn listens to them itself, and afterwards
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listening])


@dataclass
class Worker:
    """A process, and how it is doing."""

    number: int
    process: BaseProcess | None = None
    pipe: Pipe | None = None
    since: float = math.inf
    """When it got ready."""
    pause: float = 0.0
    """Seconds until it is started again, if it dies soon."""
    due: float = 0.0
    """When it is to be started again."""
    late: bool = False
    """It is to reload when it is ready, and not before it listens to that."""

    @property
    def ready(self) -> bool:
        return self.since < math.inf

    def hang_up(self) -> None:
        if self.process is not None and self.process.pid is not None:
            with suppress(ProcessLookupError):  # it has just died
                os.kill(self.process.pid, signal.SIGHUP)


class Workers:
    """Processes that answer on one port; one that dies is replaced. Nothing is polled."""

    def __init__(
        self, create: Callable[[], Application], settings: Settings, listening: socket.socket, count: int, folder: str
    ) -> None:
        """
        Args:
            create: makes the application, in each worker; to be pickled.
            settings: limits.
            listening: the socket of the port; on Linux each worker has its own on the same port, so that the kernel
                spreads connections evenly.
            count: how many.
            folder: for the counts of all.
        """
        self._create, self._settings, self._listening, self._folder = create, settings, listening, folder
        self._workers = [Worker(number) for number in range(count)]
        self._context = multiprocessing.get_context("spawn")
        self._ending = False

    def run(self, started: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT. ``started`` is called once, when all workers answer."""
        announced = False
        with _signals() as woken:
            try:
                while not self._ending:
                    for worker in self._workers:
                        if worker.process is None and time.monotonic() >= worker.due:
                            self._start(worker)
                    self._attend(woken)
                    if not announced and all(worker.ready for worker in self._workers):
                        announced = True
                        started()
            finally:
                self._stop()

    def _start(self, worker: Worker) -> None:
        worker.late = False
        try:
            ours, theirs = self._context.Pipe()
            with theirs:
                arguments = (self._create, self._settings, self._listening, theirs, self._folder)
                process = self._context.Process(target=_work, args=arguments, daemon=True)
                process.start()
        except OSError as error:  # too many processes or open files, which may pass
            self._again(worker, {"reason": str(error)})
        else:
            worker.process, worker.pipe = process, ours

    def _attend(self, woken: socket.socket) -> None:
        """Wait until something happens, and see to it."""
        alive = [worker for worker in self._workers if worker.process is not None]
        pauses = [worker.due - time.monotonic() for worker in self._workers if worker.process is None]
        waits: list[Any] = [woken]
        for worker in alive:
            assert worker.process is not None
            waits += [worker.process.sentinel] if worker.ready else [worker.process.sentinel, worker.pipe]
        happened = wait(waits, max(0.0, min(pauses)) if pauses else None)
        if woken in happened:
            for number in woken.recv(4096):
                self._signal(number)
        for worker in alive:
            assert worker.process is not None
            assert worker.pipe is not None
            if worker.pipe in happened:
                with suppress(EOFError, OSError):
                    worker.pipe.recv()
                    worker.since = time.monotonic()
                    if worker.late:
                        worker.late = False
                        worker.hang_up()
            if worker.process.sentinel in happened:
                self._bury(worker)

    def _signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._ending = True
        elif number == getattr(signal, "SIGHUP", None):
            for worker in self._workers:
                worker.late = not worker.ready
                if worker.ready:
                    worker.hang_up()

    def _bury(self, worker: Worker) -> None:
        assert worker.process is not None
        assert worker.pipe is not None
        assert worker.process.pid is not None
        worker.process.join()
        counted.forget(worker.process.pid, self._folder)
        worker.pipe.close()
        said = {"pid": worker.process.pid, "exit": worker.process.exitcode}
        worker.process = None
        self._again(worker, said)

    def _again(self, worker: Worker, said: dict[str, Any]) -> None:
        """Have a worker started that has died or could not be: soon, if it had lived long."""
        now = time.monotonic()
        if now - worker.since >= STEADY:
            worker.pause = 0.0
        data = {"data": {"worker": worker.number, **said, "seconds": worker.pause}}
        if worker.ready:
            log.warning("a worker died; another takes its place", extra=data)
        else:
            log.error("a worker did not start; it is tried again", extra=data)
        worker.due, worker.since = now + worker.pause, math.inf
        worker.pause = min(max(2 * worker.pause, FIRST_PAUSE), LONGEST_PAUSE)

    def _stop(self) -> None:
        """Have all answer what they accepted; whoever takes longer than the grace time is killed."""
        until = time.monotonic() + self._settings.grace + 2 * LAST
        processes = [worker.process for worker in self._workers if worker.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket from which the numbers of signals can be read, as they come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        names = ("SIGTERM", "SIGINT", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        old = {number: signal.signal(number, lambda *_: None) for number in numbers}
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield ours
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in old.items():
                signal.signal(number, handler)


def _work(
    create: Callable[[], Application], settings: Settings, listening: socket.socket, pipe: Pipe, folder: str
) -> None:
    """A worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the parent passes on the end
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the file is read anyway
    logs.configure(settings.log_level)
    try:
        app = create()
    except CompanionError as error:
        log.error("the model cannot be loaded", extra={"data": {"reason": str(error)}})
        sys.exit(1)
    server = Server(app, settings, lambda: pipe.send(True))

    def watch() -> None:
        """Without the parent there is no port."""
        with suppress(EOFError, OSError):
            pipe.recv()
        server.end()

    threading.Thread(target=watch, name="parent", daemon=True).start()
    signal.signal(signal.SIGTERM, server.handle_exit)
    server.run(sockets=[_own(listening)])
    leave(0)


def _own(listening: socket.socket) -> socket.socket:
    if not spreads():
        return listening
    own = bound(listening.family, listening.getsockname(), together=True)
    own.listen(2048)
    listening.close()
    return own


def spreads() -> bool:
    """Whether the kernel spreads connections over the sockets that share a port."""
    return sys.platform == "linux"


def bound(family: int, address: Any, *, together: bool) -> socket.socket:
    """A socket at an address; with ``together``, others of ours may have it too."""
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if together:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind(address)
    except BaseException:
        found.close()
        raise
    return found
