import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from companion import engines, models

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import OURS, lively, small_mobilenet, start


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """By name: a network, an example of its input, and its ONNX file, exported once for all tests."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def export(name):
        if name not in done:
            if name in OURS:
                classes = 11 if name == "unet" else 10
                model = lively(models.create(name, labels=[f"类 {i}" for i in range(classes)], seed=0))
                example = engines.example_for(model)
            else:
                model = lively(small_mobilenet())
                example = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            written = engines.export_onnx(model, example, folder / f"{name}.onnx")
            done[name] = SimpleNamespace(model=model, example=example, path=written.path, written=written)
        return done[name]

    return export


@pytest.fixture(scope="session")
def opened(exported):
    """By names of a network and an engine: that engine, opened once; tests that close take one of their own."""
    done = {}

    def open_(name, engine):
        if (name, engine) not in done:
            found = exported(name)
            done[name, engine] = start(found, engine)
        return done[name, engine]

    yield open_
    for engine in done.values():
        engine.close()
