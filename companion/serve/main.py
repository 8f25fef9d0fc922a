"""Start a server: the settings go through the environment, so that each worker process finds them."""

import errno
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr

from companion.errors import CompanionError
from companion.serve.image import image_app
from companion.serve.settings import Settings, settings_from

MODEL, ENGINE = "COMPANION_SERVE_FILE", "COMPANION_SERVE_ENGINE"  # no settings, but what is served


def create() -> FastAPI:
    """The application that the environment describes, for a server that starts its own workers."""
    return image_app(os.environ[MODEL], engine=os.environ.get(ENGINE), settings=settings_from())


def run(
    model: Path,
    *,
    engine: str | None,
    host: str,
    port: int,
    workers: int,
    settings: Settings,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was accepted, within ``settings.grace`` seconds.

    Args:
        model, engine: as of `image_app`.
        host, port: where to listen; port 0 takes a free one.
        workers: processes.
        settings: limits and policies.
        announce: called with the address when it is taken and the model is loaded.

    Raises:
        CompanionError: the model cannot be served, or the address cannot be had.
    """
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    app = image_app(model, engine=engine, settings=settings)  # so that what is wrong is said here, once
    options: dict[str, Any] = {
        "access_log": False,
        "log_level": "warning",
        "timeout_graceful_shutdown": round(settings.grace),
        "timeout_worker_healthcheck": 60,  # a worker that loads its libraries from a slow disk is no dead one
    }
    with _listening(host, port) as listening, tempfile.TemporaryDirectory(prefix="companion-metrics-") as folder:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        if workers == 1:
            server = uvicorn.Server(uvicorn.Config(app, **options))

            def end(number: int, frame: FrameType | None) -> None:
                server.should_exit = True

            for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn listens to them itself, and afterwards
                signal.signal(number, end)
            announce(address)
            server.run(sockets=[listening])
            return
        os.environ[MODEL] = str(model)
        os.environ.pop(ENGINE, None)
        if engine is not None:
            os.environ[ENGINE] = engine
        for key, value in settings.model_dump(exclude_none=True).items():
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            os.environ[f"COMPANION_SERVE_{key.upper()}"] = str(plain)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        config = uvicorn.Config("companion.serve.main:create", factory=True, workers=workers, **options)
        parent = Multiprocess(config, [listening])  # which listens to the signals from here on
        announce(address)
        parent.run()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        advice = "choose another --" + ("port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host")
        said = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror or error})"
        raise CompanionError(f"the address {host}:{port} {said}: {advice}.") from error
