"""book/_ext/results.py: tables of the site, rendered from result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("sphinx", "myst_nb"):
    pytest.importorskip(package, reason="the site's packages are not installed: make site")

ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / "book" / "_ext"

CONF = """
import sys
import companion

sys.path.insert(0, {extensions!r})
extensions = ["myst_nb", "results"]
myst_enable_extensions = ["dollarmath"]
companion.__file__ = {package!r}  # where shipped files are looked for
"""

WRITE = """
from companion.metrics.results import Measured, Row, record, write

rows = [
    Row({"network": name, "batch": 1}, {"latency": Measured(i + 0.5, i, i + 1, 30, "ms"), "parameters": 10**6 * i})
    for i, name in enumerate(["simple_cnn", "a|b *c*"], start=1)
]
write(record("toy", rows, settings={"seeds": (0, 1)}, packages=()), "data/results/toy.json")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A book and one results file."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "data" / "results").mkdir(parents=True)
    (folder / "data" / "manifest.json").write_text("{}")
    subprocess.run([sys.executable, "-c", WRITE], cwd=folder, check=True)
    text = CONF.format(extensions=str(EXTENSIONS), package=str(folder / "companion" / "__init__.py"))
    (folder / "conf.py").write_text(text)
    return folder


def build(folder, page):
    """Warnings are errors, as in tools/build_site.py."""
    (folder / "index.md").write_text(f"# Title\n\n{page}", encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-nWqE", "--keep-going", ".", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    html = folder / "out" / "index.html"
    return done.returncode, done.stderr, html.read_text(encoding="utf-8") if html.exists() else ""


def cells(html, tag):
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.S)]


TABLES = """Before.

```{results} toy
```

Between.

```{results} toy
:columns: latency, network
:caption: How *fast*
```
"""


def test_tables_with_what_they_were_measured_on(folder):
    code, errors, html = build(folder, TABLES)
    assert (code, errors) == (0, "")
    html, _, second = html.partition("Between.")
    assert cells(html, "th") == ["network", "batch", "latency in ms", "parameters"]
    assert cells(html, "td") == [
        *("simple_cnn", "1", "1.50 (1.00–2.00)", "1,000,000"),
        *("a|b *c*", "1", "2.50 (2.00–3.00)", "2,000,000"),
    ]
    assert "<caption" not in html
    (provenance,) = re.findall(r'<p class="results-provenance">(.*?)</p>', html, re.S)
    assert provenance.startswith("Median (quartiles) of 30 repeats. ")
    assert "seeds 0 1" in provenance
    assert html.index("Before.") < html.index("<table") < html.index(provenance)

    assert cells(second, "th") == ["latency in ms", "network"]
    assert cells(second, "td") == ["1.50 (1.00–2.00)", "simple_cnn", "2.50 (2.00–3.00)", "a|b *c*"]
    assert '<span class="caption-text">How <em>fast</em></span>' in second
    assert provenance in second


MISTAKES = {
    "```{results} tyo\n```": "there are no results called 'tyo': there are torn, toy.",
    "```{results} torn\n```": "torn.json is not a results file: it is not JSON",
    "```{results} toy\n:columns: speed\n```": "toy has no column 'speed': it has network, batch, latency, parameters.",
    "```{results}\n```": "1 argument(s) required",
    "```{results} toy\n:colums: network\n```": "colums",
}


def test_mistakes_fail_the_build_and_say_where(folder):
    torn = folder / "data" / "results" / "torn.json"
    torn.write_text("{")
    code, errors, _ = build(folder, "\n\n".join(MISTAKES))
    torn.unlink()
    assert code != 0
    assert "Traceback" not in errors
    line = 3
    for page, message in MISTAKES.items():
        assert re.search(rf"index\.md:{line}: .*{re.escape(message)}", errors)
        line += page.count("\n") + 2


def test_results_are_read_without_torch_and_numpy(folder):
    """The site is built without them."""
    program = (
        f"import sys; sys.path.insert(0, {str(EXTENSIONS)!r}); import results; results.results.names();"
        "assert not {'torch', 'numpy', 'companion.metrics'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
