import sys
from pathlib import Path

import pytest

from companion.engines.tensorrt import library
from companion.engines.tensorrt import memory as memories
from companion.engines.tensorrt.enginefile import EngineFile

sys.path.insert(0, str(Path(__file__).parent))
import fake_gpu


@pytest.fixture
def gpu():
    """A GPU without one; at the end nothing may be left on it, and nothing may have gone wrong on it."""
    made = fake_gpu.Gpu()
    yield made
    assert made.faults == []
    assert made.blocks == {}
    assert made.streams == {}


@pytest.fixture
def fake(monkeypatch, gpu):
    """Puts a fake TensorRT in the place of the real one, on that GPU."""

    def install(**options):
        _forget()
        monkeypatch.setitem(sys.modules, "tensorrt", fake_gpu.library(gpu, **options))
        monkeypatch.setattr(library, "gpu", lambda: library.Gpu("Fake 9000", (9, 0), 13000))
        monkeypatch.setattr(memories, "MEMORIES", {"numpy": lambda: fake_gpu.NumpyMemory(gpu)})

    yield install
    _forget()


def _forget():
    library.library.cache_clear()
    library.logger.cache_clear()


@pytest.fixture
def engine_file(tmp_path):
    """Writes an engine file for the fake."""

    def write(plan=None, **changes):
        fields = {
            "plan": plan or fake_gpu.plan(),
            "library": "tensorrt",
            "version": fake_gpu.VERSION,
            "device": "another GPU",
            "precision": "fp32",
            "profiles": (),
            "layers": 1,
            "key": "0" * 64,
            "description": {},
        }
        path = tmp_path / "F.engine"
        EngineFile(**fields | changes).write(path)
        return path

    return write
