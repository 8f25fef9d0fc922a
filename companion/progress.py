"""One progress bar for notebooks and terminals, silent where nobody watches (pipes, tests, stored notebooks)."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*, show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on stderr, drawn on a terminal or in a notebook only; ``TQDM_DISABLE=1`` silences it there too.

    Plain ``tqdm.tqdm``, never ``tqdm.auto``: that one wants ipywidgets, whose output loads scripts from other hosts.
    """
    watched = (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules
    silenced = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return tqdm(disable=not (show and watched) or silenced, dynamic_ncols=True, leave=False, **options)
