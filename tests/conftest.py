import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OFFLINE = ROOT / "tests" / "offline"

# Here and in every process that a test starts: no network, one thread, no progress bars.
sys.path.insert(0, str(OFFLINE))
import no_network  # noqa: E402, F401

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what runs in the background with Ctrl-C ignored, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def test_data() -> Path:
    """The folder of full-size data sets, where there is one."""
    folder = os.environ.get("COMPANION_TEST_DATA")
    if not folder:
        pytest.skip("COMPANION_TEST_DATA names no folder of full-size data")
    return Path(folder)
