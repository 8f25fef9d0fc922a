import pytest

from companion import models


@pytest.fixture(scope="session")
def network():
    """Untrained, but with labels that tell its answers apart."""
    return models.create("simple_cnn", labels=[f"类 {i}" for i in range(10)], seed=0).eval()
