"""Servers as processes of their own, to be measured: ours, and the plain ones that it has to beat (2.3.2).

``python -m companion.bench.servers MODEL`` starts the plain ones, each under a path of its name: uvicorn, a few lines
of ASGI and no framework, so that what they lack is the batcher and nothing else.
"""

import asyncio
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from companion.errors import CompanionError

Answers = Callable[[list[bytes]], Sequence[Any]]
Handler = Callable[[Answers, bytes], Awaitable[Any]]

PATIENCE = 120.0  # seconds that a server may take to start on a busy machine


async def synchronous(classify: Answers, image: bytes) -> Any:
    """The network runs in the handler: one image at a time, and meanwhile nothing else is read or answered."""
    return classify([image])[0]


async def threads(classify: Answers, image: bytes) -> Any:
    """The network runs in a pool of threads: connections are served on, but every call still has one image."""
    return (await asyncio.get_running_loop().run_in_executor(None, classify, [image]))[0]


async def blank(classify: Answers, image: bytes) -> Any:
    """No network at all: what HTTP alone can do."""
    from companion.serve.app import Answer

    return Answer(0, "nothing", 1.0)


HANDLERS: dict[str, Handler] = {handler.__name__: handler for handler in (synchronous, threads, blank)}


def plain_app(classify: Answers) -> Callable[..., Awaitable[None]]:
    """ASGI: whatever is asked is an image for the handler that the path names."""
    from companion.serve.app import encode

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        content = encode([await HANDLERS[scope["path"][1:]](classify, body)])
        lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        await send({"type": "http.response.body", "body": content})

    return app


def classifier(model: str | Path) -> Answers:
    """Image files → answers, as our server has it; on one thread."""
    from companion import engines
    from companion.serve.image import Classifier

    return Classifier(engines.load(model, engines.suited(model), threads=1), max_pixels=10**6)


def main(model: str) -> None:
    """Serve on a free port of this machine until SIGTERM, and say at which address."""
    import socket

    import uvicorn

    app = plain_app(classifier(model))
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        print(f"{model} at http://127.0.0.1:{listening.getsockname()[1]}/blank", flush=True)
        uvicorn.Server(uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning")).run([listening])


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    process: "subprocess.Popen[str]"

    def at(self, handler: str) -> "Running":
        """A plain server's address for one of `HANDLERS`."""
        return replace(self, url=f"{self.url.rpartition('/')[0]}/{handler}")

    def cpu(self) -> float:
        """Seconds of processor time that all its threads have had; not a number where Linux does not say."""
        return _seconds(Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"))

    def loop(self) -> float:
        """As `cpu`, of its first thread alone, which runs the event loop."""
        return _seconds(Path(f"/proc/{self.process.pid}/task/{self.process.pid}").glob("schedstat"))

    def metric(self, name: str) -> float:
        """What it has counted so far under ``companion_NAME``, the sum of all labels."""
        with urllib.request.urlopen(self.url.removesuffix("/predict") + "/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"companion_{name}[ {{]", line))


def _seconds(files: Iterable[Path]) -> float:
    spent = [int(file.read_text().split()[0]) for file in files]
    return sum(spent) / 1e9 if spent else math.nan


@contextmanager
def running(*command: str) -> Iterator[Running]:
    """``python -m COMMAND`` until the end of the block, from when it has said its address.

    Raises:
        CompanionError: it ended before, or did not speak in time; with the last that it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE, stderr=said, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        try:
            late = threading.Timer(PATIENCE, process.kill)
            late.start()
            line = process.stdout.readline()
            late.cancel()
            if " at http://" not in line:
                process.kill()
                process.wait()
                said.seek(0)
                last = (said.read().strip().splitlines() or ["nothing"])[-1]
                raise CompanionError(f"the server did not start; it said: {last}.")
            yield Running(line.rpartition(" at ")[2].split(";")[0].strip(), process)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@contextmanager
def together(starts: Mapping[str, AbstractContextManager[Running]]) -> Iterator[dict[str, Running]]:
    """All of them at once, as each takes a while to load its libraries."""
    with ExitStack() as stack, ThreadPoolExecutor(len(starts)) as pool:
        running = pool.map(stack.enter_context, starts.values())
        yield dict(zip(starts, running, strict=True))


def plain(model: Path) -> AbstractContextManager[Running]:
    """A server with all `HANDLERS`, `running`."""
    return running("companion.bench.servers", str(model))


def batching(model: Path, *options: str) -> AbstractContextManager[Running]:
    """``companion serve image`` with these options, `running`."""
    return running("companion", "serve", "image", "--model", str(model), "--port", "0", *options)


if __name__ == "__main__":
    main(sys.argv[1])
