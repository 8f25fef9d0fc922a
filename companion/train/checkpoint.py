"""The state of an unfinished run in one file, whole or absent at every moment."""

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from companion.errors import CompanionError
from companion.files import replacing

FORMAT = "companion-checkpoint-1"


def save(path: str | os.PathLike[str], state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write tensors and plain values; ``settings`` say which run they belong to.

    Raises:
        CompanionError: the file cannot be written.
    """
    buffer = io.BytesIO()  # torch's own writer hides the reason of a failed write, such as a full disk
    torch.save({"format": FORMAT, "settings": settings, "state": state}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def damaged(path: str | os.PathLike[str]) -> CompanionError:
    """The refusal of a file that is no checkpoint, or whose contents do not fit together."""
    return CompanionError(f"{path} is not a checkpoint or is damaged: delete it to start again.")


def load(path: str | os.PathLike[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Read back the state of the run that has these settings. Only tensors and plain values are unpickled.

    Raises:
        CompanionError: the file is damaged, is no checkpoint, or belongs to a run with other settings.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch guesses aloud about files that are not its own
            content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise KeyError("format")
        found, state = dict(content["settings"]), dict(content["state"])
    except (
        OSError,
        IndexError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise damaged(path) from error
    for key in settings:
        if repr(found.get(key)) != repr(settings[key]):
            raise CompanionError(
                f"{path} is of another run: its {key} is {found.get(key)!r}, this run's {settings[key]!r}; "
                "give the same settings, or delete it to start again."
            )
    return state
