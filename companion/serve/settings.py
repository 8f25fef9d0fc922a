"""What a server may be told: by arguments, or by environment variables that begin with ``COMPANION_SERVE_``."""

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
    token: Annotated[SecretStr, Field(min_length=1)] | None = None
    """If given, requests for predictions must bring it as a bearer token; else 401."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of the engine."""


def settings_from(**given: object) -> Settings:
    """The settings given, and for those that are None the environment's.

    Raises:
        CompanionError: a value is out of range.
    """
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        raise CompanionError(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}.") from error
