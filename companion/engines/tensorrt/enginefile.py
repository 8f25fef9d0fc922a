"""Engine files: a plan as the library wrote it, and behind it what it is and a checksum of everything."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from companion.engines.base import Metadata
from companion.errors import CompanionError
from companion.files import replacing

# plan | JSON | length of the JSON, 8 bytes | MAGIC | SHA-256 of all before it, 32 bytes
MAGIC = b"companion engine 1"
_TAIL = 8 + len(MAGIC) + 32

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class EngineFile:
    """A network that was built: what `build` returns and an ``.engine`` file holds."""

    plan: bytes = field(repr=False)
    """The engine as the library wrote it and reads it."""
    library: str
    """The module that built it, and alone can run it: ``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    """Of the library; another one need not run it."""
    device: str
    """The GPU for which it was built; ``none`` if there was none."""
    precision: str
    """In what it computes: ``fp32``, ``tf32``, ``fp16``, ``int8``, ``mixed``."""
    profiles: tuple[Profile, ...]
    """By input: the smallest, the usual and the largest shape. Empty if all shapes are fixed."""
    layers: int
    """Of the network, before fusion."""
    key: str
    """Stands for everything it was built from: equal keys, equal engines."""
    description: dict[str, str] = field(repr=False)
    """Labels, task and so on, as `companion.engines.Metadata` writes them."""

    def write(self, path: str | os.PathLike[str]) -> int:
        """Write the file, whole or not at all; returns its size in bytes.

        Raises:
            CompanionError: it cannot be written.
        """
        said = {name: value for name, value in asdict(self).items() if name != "plan"}
        text = json.dumps(said, ensure_ascii=False, sort_keys=True).encode()
        body = b"".join((self.plan, text, len(text).to_bytes(8, "little"), MAGIC))
        with replacing(path) as file:
            file.write(body)
            file.write(hashlib.sha256(body).digest())
        return len(body) + 32


def read_engine(path: str | os.PathLike[str]) -> EngineFile:
    """Read an engine file of ours and verify its checksum.

    A plan is machine code that the GPU runs, so one of others is refused: build it here from its ONNX file.

    Raises:
        CompanionError: it cannot be read, is damaged, or is not ours.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CompanionError(f"cannot read {path}: {error.strerror or error}.") from error
    damaged = CompanionError(f"{path} is damaged or was not written by `companion build`: build it again.")
    if content[-_TAIL + 8 : -32] != MAGIC or hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise damaged
    end = len(content) - _TAIL
    start = end - int.from_bytes(content[end : end + 8], "little")
    try:
        said = json.loads(content[start:end])
        said["profiles"] = tuple(
            {name: tuple(map(tuple, shapes)) for name, shapes in each.items()} for each in said["profiles"]
        )
        Metadata.from_text(said["description"])
        return EngineFile(plan=content[:start], **said)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:  # somebody else's checksum
        raise damaged from error
