"""Run the notebooks from top to bottom and store what they print, ready to be compared and published.

python tools/run_notebooks.py [NOTEBOOK ...]    all of notebooks/ if none is named

What is stored is the same on every run but for what the cells themselves print: no time stamps, no kernel name of a
machine, and a fingerprint of sources and outputs, by which a test notices any change that did not come from a run.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
CELL_TIMEOUT = 300  # seconds


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over each code cell's source, outputs and tags, with what nbval cannot compare: pictures and timings."""
    cells = [
        [cell.source, cell.outputs, cell.metadata.get("tags", [])]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return hashlib.sha256(json.dumps(cells, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def run(path: Path) -> float:
    """Execute one notebook in its own folder, store it and return the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.monotonic() - start
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "companion": {"fingerprint": fingerprint(notebook)},
    }
    part = path.with_suffix(".part")
    nbformat.write(notebook, part)
    part.replace(path)
    return seconds


def main() -> None:
    # A reader sees progress bars; stored outputs have none. One thread, so that two runs of a seed agree.
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    for path in [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(f"{path.name}  {run(path):.0f} s", flush=True)


if __name__ == "__main__":
    main()
