"""What ``exclude`` means in every method: names of layers to leave alone."""

from collections.abc import Collection
from typing import Any

from companion.errors import CompanionError

SHOWN = 5  # names in a refusal


def excluded(exclude: Any, names: Collection[str]) -> tuple[str, ...]:
    """The names of the layers to leave alone; a single one may be given as it is.

    Args:
        exclude: what the caller gave.
        names: of the layers that there are.

    Raises:
        CompanionError: it is no collection of names, or one that there is not.
    """
    if not isinstance(exclude, Collection):
        raise CompanionError(f"exclude is {exclude!r}: give the names of layers, or () to leave none alone.")
    found = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for name in found:
        if not isinstance(name, str) or not name or name not in names:
            layers = [name for name in names if name]
            choice = ", ".join(layers[:SHOWN]) + (" and others" if len(layers) > SHOWN else "") or "nothing"
            raise CompanionError(f"there is no layer {name!r} to exclude: choose among {choice}.")
    return found
