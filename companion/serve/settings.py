"""What a server may be told: by arguments, or by environment variables that begin with ``COMPANION_SERVE_``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from companion.errors import CompanionError

MIB = 1 << 20


class Settings(BaseSettings):
    """Limits and policies of a server. Anything out of range is refused when it starts."""

    model_config = SettingsConfigDict(env_prefix="COMPANION_SERVE_", frozen=True, extra="forbid")

    policy: Literal["idle", "fixed", "hold"] = "idle"
    """When a batch that is not full begins: see `companion.serve.BatchQueue`."""
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 32
    """Items in a call of the model, at most."""
    max_wait_ms: Annotated[float, Field(ge=0, le=60_000)] = 2.0
    """Milliseconds that the policies ``fixed`` and ``hold`` wait, at most."""
    max_queue: Annotated[int, Field(ge=1)] = 1024
    """Items that may wait for the model; further ones get 503."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds from the end of a request to its answer; then 504."""
    max_bytes: Annotated[int, Field(ge=1)] = 16 * MIB
    """Of a request's body; above it 413."""
    max_items: Annotated[int, Field(ge=1)] = 256
    """Images or texts in one request; above it 413."""
    max_pixels: Annotated[int, Field(ge=1)] = 32_000_000
    """Of an image; above it 400, before anything is decoded."""
    max_words: Annotated[int, Field(ge=1)] = 4096
    """Of a text; above it 400."""
    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """To send a request's body in; then 408."""
    grace: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """Seconds at the end to answer what was accepted."""
    head_seconds: Annotated[float, Field(gt=0)] = 15.0
    """From the first byte of a request to the end of its head; then 408. A connection that sends nothing is closed
    after as long."""
    write_seconds: Annotated[float, Field(gt=0)] = 30.0
    """For a client that does not read its answer; then its connection is cut."""
    max_connections: Annotated[int, Field(ge=1)] = 4096
    """Of a worker; above it those that have waited longest for a request are closed to make room. Fewer if the
    system allows fewer open files."""
    max_memory: Annotated[int, Field(ge=1)] = 512 * MIB
    """Bytes of bodies that a worker holds, over all connections; above it 503."""
    reload: bool = False
    """Whether the models' files are watched, and loaded again when they change. SIGHUP does so at any time."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is said on stderr, in lines of JSON."""
    token: Annotated[SecretStr, Field(min_length=1)] | None = None
    """If given, requests for predictions must bring it as a bearer token; else 401."""
    token_file: Path | None = None
    """A file whose first line is the token."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of the engine."""


def settings_from(**given: object) -> Settings:
    """The settings given, and for those that are None the environment's; the token of a file is read.

    Raises:
        CompanionError: a value is out of range, or there is no token in the file.
    """
    try:
        settings = Settings(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        raise CompanionError(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}.") from error
    if settings.max_memory < settings.max_bytes:
        raise CompanionError(
            f"max_memory is {settings.max_memory}: give at least the {settings.max_bytes} of max_bytes."
        )
    if settings.token_file is None:
        return settings
    if settings.token is not None:
        raise CompanionError("there is a token and a token_file: give one of them.")
    try:
        token = settings.token_file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CompanionError(f"the token cannot be read from {settings.token_file}: {error}.") from error
    if not token:
        raise CompanionError(f"the first line of {settings.token_file} is empty: write the token there.")
    return settings.model_copy(update={"token": SecretStr(token)})
