"""Values that rows of several benches share."""

from companion.metrics.latency import Ratio
from companion.metrics.results import Value


def speed_up(ratio: Ratio | None) -> dict[str, Value]:
    """How many times faster than the baseline, with the ends of the 95 % interval; None is the baseline itself."""
    value, low, high = (1.0, 1.0, 1.0) if ratio is None else (ratio.value, ratio.low, ratio.high)
    return {"speed-up": round(1 / value, 3), "at least": round(1 / high, 3), "at most": round(1 / low, 3)}
