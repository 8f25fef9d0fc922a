"""What a server says while it runs: a line of JSON on stderr for each event. Never bodies, headers or tokens."""

import json
import logging
import os
import sys
import time
from typing import TextIO

OURS = "companion.serve"
# uvicorn tells of every start and stop at the level info, which we do ourselves.
OTHERS = {"uvicorn": logging.WARNING, "uvicorn.error": logging.WARNING, "asyncio": logging.WARNING}


class Lines(logging.Formatter):
    """JSON with ``time`` (UTC), ``level``, ``logger``, ``process``, ``message``, what was given as
    ``extra={"data": {…}}``, and the traceback as ``error``. In ASCII, so that no terminal and no file refuses it."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": os.getpid(),
            "message": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Send the logs of the server, and those of uvicorn and asyncio, to ``stream``; stderr if not given."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Lines())
    for name, least in {OURS: getattr(logging, level.upper()), **OTHERS}.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
