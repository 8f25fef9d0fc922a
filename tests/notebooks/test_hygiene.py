"""What nbval does not see in a stored notebook."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 1_000_000  # bytes; a page of the site is about as large
MACHINE_PATHS = re.compile(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users|site-packages|" + re.escape(str(ROOT)) + ")")

spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "tools" / "run_notebooks.py")
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)


def problems(notebook, size=0):
    """Everything wrong with a stored notebook, a line each."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not run from top to bottom")
    if notebook.metadata.get("companion", {}).get("fingerprint") != run_notebooks.fingerprint(notebook):
        found.append("was changed since it was run: type `make notebooks`")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("names somebody's own kernel")
    if "widgets" in notebook.metadata:
        found.append("stores widget state")
    if size > LARGEST:
        found.append(f"has {size:,} bytes, more than {LARGEST:,}")
    for number, cell in enumerate(code, start=1):
        tags = cell.metadata.get("tags", [])
        outputs = str(cell.outputs)
        if path := MACHINE_PATHS.search(outputs):
            found.append(f"cell {number} prints a path of a machine: {path.group()}")
        if any(output.output_type == "error" for output in cell.outputs) and "raises-exception" not in tags:
            found.append(f"cell {number} ends in an error")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"cell {number} has a warning or a progress bar in its output")
        if "nbval-skip" in tags or "NBVAL" in cell.source:
            found.append(f"cell {number} is hidden from nbval")
        if "widget" in outputs or "<script" in outputs:
            found.append(f"cell {number} has output that runs scripts")
    ignored = sum("nbval-ignore-output" in cell.metadata.get("tags", []) for cell in code)
    if code and ignored > 0.4 * len(code):
        found.append(f"{ignored} of {len(code)} outputs are not compared")
    return found


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook, path.stat().st_size) == []


def first_output(notebook, kind):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == kind:
                return output
    return pytest.fail(f"no {kind} in the notebook")


def spoil_text(notebook):
    output = first_output(notebook, "stream")
    output.text = output.text.replace("0", "1", 1) + " "


def spoil_picture(notebook):
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    pictures[0]["data"]["image/png"] = "aGVsbG8="


def spoil_measurement(notebook):
    cell = next(c for c in notebook.cells if "nbval-ignore-output" in c.metadata.get("tags", []) and c.outputs)
    cell.outputs[0]["text"] = "a better figure"


@pytest.mark.parametrize("spoil", [spoil_text, spoil_picture, spoil_measurement])
def test_an_output_changed_by_hand_is_noticed(notebook, spoil):
    spoil(notebook)
    assert "was changed since it was run: type `make notebooks`" in problems(notebook)


def test_other_faults_are_noticed(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].execution_count, code[1].execution_count = 2, 1
    code[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="/home/me/x.py: warning")]
    code[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    code[2].metadata.tags = ["nbval-skip"]
    notebook.metadata.widgets = {}
    notebook.metadata.kernelspec.name = "my-env"
    found = "\n".join(problems(notebook, LARGEST + 1))
    for fault in ("top to bottom", "/home/", "an error", "a warning", "hidden", "widget", "own kernel", "bytes"):
        assert fault in found
