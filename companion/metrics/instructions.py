"""Count instructions instead of seconds: the same on a busy machine as on an idle one (2.4.3)."""

import os
import shutil
import sys
from pathlib import Path

from companion.errors import CompanionError
from companion.metrics.latency import quiet_benchmark


def count_instructions(statement: str, *, setup: str = "pass", number: int = 100) -> int:
    """Machine instructions of one run of a Python statement, interpreter included, counted by Valgrind's Callgrind.

    Through the ``collect_callgrind`` of torch.utils.benchmark, in a process of its own with one thread. That process is
    simulated, the import of torch too, so this takes a minute or more. What Python spends on looking up names is left
    out, since it depends on how names hash.

    Args:
        statement: what to count, after ``import torch``.
        setup: runs once before.
        number: runs to divide by.

    Raises:
        CompanionError: number below 1, no Valgrind, or a statement that fails.
    """
    if not isinstance(number, int) or number < 1:
        raise CompanionError(f"number is {number!r}: give a whole number from 1.")
    if shutil.which("valgrind") is None:
        raise CompanionError("counting instructions needs Valgrind: install the system's package of that name.")
    before = os.environ.get("PATH", "")
    # The process is started as `python`, which must be this one.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), before))
    try:
        timer = quiet_benchmark().Timer(statement, setup=f"import torch\n{setup}")
        found = timer.collect_callgrind(number, repeats=None, collect_baseline=False, retain_out_file=False)
    except Exception as error:  # the statement's own, or Valgrind's
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("==")]
        raise CompanionError(f"{statement!r} could not be counted: {lines[-1] if lines else error}.") from error
    finally:
        os.environ["PATH"] = before
    return round(found.counts(denoise=True) / number)
