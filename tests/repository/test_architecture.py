"""Who may import whom, and how much an import may bring along."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "companion"

# From the bottom up: a room may import from lower layers and from its own, never from a higher one.
LAYERS = [
    {"errors"},
    {"files", "progress", "units"},
    {"datasets", "models", "metrics"},
    {"plots"},
    {"train", "engines"},
    {"compress"},
    {"detect", "serve"},
    {"doctor", "check", "profile", "bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Rooms of one layer do not import each other either, but for these.
NEIGHBOURS: set[tuple[str, str]] = set()


def imports(path: Path):
    """The rooms of companion that a file imports anywhere in it, even inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "companion" and len(parts) > 1 and parts[1] in LEVEL:
                yield parts[1]


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upwards_or_sideways(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no place in the layers"
    for other in set(imports(path)) - {room}:
        assert LEVEL[other] < LEVEL[room] or (room, other) in NEIGHBOURS, f"{room} imports {other}"


def loaded_by(code: str) -> set[str]:
    program = f"import sys, json; {code}; print('|' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.rpartition("|")[2]))


HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "sklearn", "PIL", "onnx", "onnxruntime", "rich", "tqdm"}


def test_import_companion_loads_next_to_nothing():
    assert not HEAVY & loaded_by("import companion")


def test_help_does_not_load_torch():
    code = "from companion.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program = f"import sys, json\n{code}print('|' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout.rpartition("|")[2]))


def test_rooms_are_found_on_first_use():
    loaded = loaded_by("import companion; companion.models.names()")
    assert "torch" in loaded
    assert {"companion.datasets", "companion.train"}.isdisjoint(loaded)


def test_the_network_is_blocked_here_and_in_processes_that_tests_start():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"  # an address kept for documentation
    with pytest.raises(ConnectionRefusedError, match="without a network"):
        exec(code, {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "without a network" in done.stderr
