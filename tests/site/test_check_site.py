"""tools/check_site.py on small sites, each with one fault."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_site.py"
spec = importlib.util.spec_from_file_location("check_site", TOOL)
check_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_site)

GOOD = """<!doctype html><html><head><title>t</title>
<link rel="stylesheet" href="../_static/site.css?digest=1"><link rel="canonical" href="https://example.org/en/">
<style>p { background: url("../_static/dot.png") }</style></head>
<body><h1 id="start">Start</h1><a name="old"></a><p id="最初">Text</p>
<a href="#start">here</a> <a href="#">top</a> <a href="other.html#%E6%9C%80%E5%88%9D">there</a>
<a href="https://example.org/paper">paper</a> <a href="mailto:a@example.org">us</a> <a href="../sub/">folder</a>
<img src="../_static/dot.png" srcset="../_static/dot.png 2x" alt=""><img src="data:image/png;base64,AA==" alt="">
</body></html>"""


@pytest.fixture
def site(tmp_path):
    for name, text in {
        "index.html": '<meta http-equiv="refresh" content="0; url=en/index.html">',
        "en/index.html": GOOD,
        "en/other.html": GOOD,
        "sub/index.html": "<p>Read /proc/cpuinfo, ../home/plan and https://example.org/home/page.</p>",
        "_static/site.css": "p { background: url(dot.png) } i { background: url(data:image/gif;base64,AA) }",
        "_static/dot.png": "",
        "_static/script.js": "// /root/of/someone/else",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_a_good_site_has_no_faults(site):
    assert check_site.faults(site) == []


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="missing.html">x</a>', "leads nowhere"),
        ('<a href="other.html#missing">x</a>', "names an anchor that is not there"),
        ('<a href="#missing">x</a>', "names an anchor that is not there"),
        ('<a href="/en/index.html">x</a>', "leads out of the site"),
        ('<a href="../../index.html">x</a>', "leads out of the site"),
        ('<a href="file:///etc/motd">x</a>', "leads out of the site"),
        ('<img alt="x" src="missing.png">', "leads nowhere"),
        ('<img alt="x" srcset="missing.png 2x">', "leads nowhere"),
        ('<script src="https://cdn.example.org/a.js"></script>', "is loaded from another host"),
        ('<script src="//cdn.example.org/a.js"></script>', "is loaded from another host"),
        ('<script type="module">import("https://cdn.example.org/a.js")</script>', "is loaded from another host"),
        ('<link rel="stylesheet" href="https://cdn.example.org/a.css">', "is loaded from another host"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "is loaded from another host"),
        ('<img alt="x" src="https://example.org/a.png">', "is loaded from another host"),
        ('<img alt="x" src="a.png" srcset="https://example.org/a.png 2x">', "is loaded from another host"),
        ('<img src="../_static/dot.png">', "'../_static/dot.png' has no words (alt)"),
        ('<img src="../_static/dot.png" alt="../_images/0a1b.png">', "'../_static/dot.png' has no words (alt)"),
        ('<iframe src="https://example.org/"></iframe>', "is loaded from another host"),
        ('<object data="https://example.org/a.svg"></object>', "is loaded from another host"),
        ('<svg><use xlink:href="https://example.org/a.svg#b"/></svg>', "is loaded from another host"),
        ('<p style="background: url(https://example.org/a.png)">x</p>', "is loaded from another host"),
        ("<style>@import 'https://example.org/a.css';</style>", "is loaded from another host"),
        ("<style>@font-face { src: url('https://example.org/a.woff2') }</style>", "is loaded from another host"),
        ('<form action="https://example.org/search"></form>', "is loaded from another host"),
        ('<meta http-equiv="refresh" content="0; url=missing.html">', "leads nowhere"),
        ("<pre>File /home/ada/model.py</pre>", "shows a path of the building machine: /home/ada"),
        ("<pre>'/root/.cache/x'</pre>", "shows a path of the building machine: /root/.cache"),
        (f"<pre>{check_site.ROOT}</pre>", f"shows a path of the building machine: {check_site.ROOT}"),
        ("<pre>lib/python3.11/site-packages/tqdm</pre>", "shows a path of the building machine: site-packages"),
        (f"<p>{'x' * check_site.PAGE_LIMIT}</p>", "the limit is"),
    ],
)
def test_a_planted_fault_is_found(site, html, fault):
    (site / "en" / "a.png").touch()
    (site / "en" / "bad.html").write_text(html, encoding="utf-8")
    found = check_site.faults(site)
    assert len(found) == 1
    assert fault in found[0]
    assert found[0].startswith("en/bad.html")


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("_static/bad.css", "p { background: url(missing.png) }", "leads nowhere"),
        ("_static/bad.css", "@import url(https://example.org/a.css);", "is loaded from another host"),
        ("_sources/a.ipynb", '{"text": "/home/ada/x"}', "shows a path of the building machine"),
        ("searchindex.js", 'Search.setIndex({"a": "/root/x"})', "shows a path of the building machine"),
        ("_images/large.png", "x" * (check_site.FILE_LIMIT + 1), "the limit is"),
    ],
)
def test_a_fault_beside_the_pages_is_found(site, name, text, fault):
    path = site / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    found = check_site.faults(site)
    assert len(found) == 1
    assert fault in found[0]


def test_an_empty_folder_is_a_fault(tmp_path):
    assert len(check_site.faults(tmp_path)) == 1


def test_the_program_says_how_many_faults_and_fails(site):
    run = [sys.executable, str(TOOL), str(site)]
    good = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("checked 4 pages")
    (site / "en" / "bad.html").write_text('<a href="missing.html">x</a>', encoding="utf-8")
    bad = subprocess.run(run, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "'missing.html' leads nowhere" in bad.stderr
