"""Which of several ways is worth a look when one is more accurate, another faster, a third smaller (2.4.2)."""

import math
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, TypeVar

from companion.errors import CompanionError
from companion.metrics.results import Measured

Point = TypeVar("Point")


def pareto_front(
    points: Iterable[Point], *, maximize: str | Collection[str] = (), minimize: str | Collection[str] = ()
) -> list[Point]:
    """The points that no other one dominates: better in one objective and worse in none.

    Who wants other than these pays for nothing; which of these to take is a matter of taste. The front knows nothing of
    measurement error: a point that loses by less than its spread is as good.

    Args:
        points: mappings with the objectives as keys, such as a record's ``row.flat()``, or objects with attributes.
        maximize: objectives of which more is better: accuracy, throughput.
        minimize: objectives of which less is better: latency, bytes, joules.

    Returns:
        The points themselves, in the order given; of equal ones, all.

    Raises:
        CompanionError: no objective, one that is to be both, or a point in which one is missing or no number.

    Source: V. Pareto, Manuale di economia politica, 1906; the definition is that of multi-objective optimisation.
    """
    points, up, down = list(points), _names(maximize), _names(minimize)
    if not up and not down:
        raise CompanionError("name what is to be made large (maximize=) or small (minimize=).")
    if both := set(up) & set(down):
        raise CompanionError(f"{sorted(both)[0]!r} cannot be maximized and minimized at once.")
    # Turned so that more is better in all.
    scores = [
        tuple([objective(point, name, i) for name in up] + [-objective(point, name, i) for name in down])
        for i, point in enumerate(points)
    ]
    return [
        point for point, own in zip(points, scores, strict=True) if not any(_dominates(other, own) for other in scores)
    ]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def objective(point: Any, name: str, i: int) -> float:
    """The number called ``name`` of the ``i``-th point; the median of what was measured.

    Raises:
        CompanionError: it is missing or no number.
    """
    value = look_up(point, name, i)
    number = value.median if isinstance(value, Measured) else value
    if isinstance(number, Integral):
        return int(number)  # not float: 2**53 + 1 has no other
    if not isinstance(number, Real | Decimal) or math.isnan(number):
        raise CompanionError(f"{name!r} of point {i} is {value!r}, which is no number.")
    return float(number)


def look_up(point: Any, name: str, i: int) -> Any:
    """What is called ``name`` in the ``i``-th point.

    Raises:
        CompanionError: nothing is.
    """
    try:
        return point[name] if isinstance(point, Mapping) else getattr(point, name)
    except (KeyError, AttributeError):
        raise CompanionError(f"point {i} has no {name!r}.") from None


def _names(names: str | Collection[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
