"""Start a server, of one process or several."""

import errno
import importlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from companion.errors import CompanionError
from companion.serve import counted, logs
from companion.serve.app import Application
from companion.serve.models import leave
from companion.serve.settings import Settings

APPS = {"image": "companion.serve.image:image_app", "text": "companion.serve.text:text_app"}
"""What clients send → what answers them: called with the files by name, ``engine`` and ``settings``."""

log = logging.getLogger("companion.serve")


def create(kind: str, models: Mapping[str, Path], engine: str | None, settings: Settings) -> Application:
    """The application.

    Raises:
        CompanionError: a model cannot be served.
    """
    module, name = APPS[kind].split(":")
    return getattr(importlib.import_module(module), name)(models, engine=engine, settings=settings)


def run(
    kind: str,
    models: Mapping[str, Path],
    *,
    engine: str | None,
    host: str,
    port: int,
    workers: int,
    settings: Settings,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was accepted.

    That takes ``settings.grace`` seconds at most, and two more if the models are still at work by then.

    Args:
        kind: one of `APPS`.
        models: files by name; the first is the one at ``/predict``.
        engine: as of `image_app`.
        host, port: where to listen; port 0 takes a free one.
        workers: processes.
        settings: limits and policies.
        announce: called with the address when the server answers.

    Raises:
        CompanionError: a model cannot be served, or the address cannot be had.
    """
    from companion.serve.process import Workers, run_one

    logs.configure(settings.log_level)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet
    app = create(kind, models, engine, settings)  # so that what is wrong is said here, once
    with _listening(host, port, several=workers > 1) as listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        files = {name: str(path) for name, path in models.items()}
        log.info("starting", extra={"data": {"address": address, "models": files, "workers": workers}})
        if workers == 1:
            run_one(app, settings, listening, lambda: announce(address))
        else:
            for service in app.services.values():  # the workers have their own
                if service.model.release is not None:
                    service.model.release()
            del app
            with tempfile.TemporaryDirectory(prefix="companion-metrics-") as folder:
                os.environ[counted.FOLDER] = folder
                made = partial(create, kind, dict(models), engine, settings)
                try:
                    Workers(made, settings, listening, workers, folder).run(lambda: announce(address))
                finally:
                    del os.environ[counted.FOLDER]
    log.info("ended")
    leave(0)


def _listening(host: str, port: int, *, several: bool) -> socket.socket:
    """The socket, which listens; or, where each of several workers has its own, keeps the port for them."""
    from companion.serve.process import bound, spreads

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = bound(family, (host, port), together=False)
        if several and spreads():
            # Taken alone first, so that no other server has it, and then for all of ours.
            address = found.getsockname()
            found.close()
            return bound(family, address, together=True)
        found.listen(2048)
        return found
    except OSError as error:
        advice = "choose another --" + ("port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host")
        said = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror or error})"
        raise CompanionError(f"the address {host}:{port} {said}: {advice}.") from error
