import sys
from pathlib import Path

import pytest

from companion import models

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def network():
    """Untrained, but with labels that tell its answers apart."""
    return models.create("simple_cnn", labels=[f"类 {i}" for i in range(10)], seed=0).eval()


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """The file of a network whose right answers need no network to know: see `process_cases.colours_file`."""
    from process_cases import colours_file

    return colours_file(tmp_path_factory.mktemp("colours"))
