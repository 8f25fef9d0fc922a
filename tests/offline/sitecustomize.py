"""Every Python process that a test starts imports this first, for its folder is on PYTHONPATH."""

import no_network  # noqa: F401
