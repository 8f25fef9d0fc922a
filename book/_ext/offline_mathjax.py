"""Ships MathJax with the site, so that formulas need no other host.

The package sphinx-mathjax-offline holds the whole of MathJax (24 MB); pages load one script of it, and that
script only fonts, its menu and the English speech rules.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

PARTS = [
    "tex-chtml-full.js",
    "output/chtml/fonts",
    "ui",
    "a11y",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
]


def copy_mathjax(app, error):
    if error or app.builder.format != "html":
        return
    source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part)
        else:
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / part, target / part)


def setup(app):
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True}
