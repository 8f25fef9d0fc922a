"""Build the course site into build/site/, one folder a language, with warnings as errors.

python tools/build_site.py
"""

import shutil
import sys
import time
from pathlib import Path

from jupyter_book.sphinx import build_sphinx

ROOT = Path(__file__).resolve().parents[1]
WORK, SITE = ROOT / "build" / "work", ROOT / "build" / "site"

# What differs between the editions: their folder under build/site/, and Sphinx settings over those of _config.yml.
EDITIONS: dict[str, dict[str, object]] = {
    "en": {"language": "en"},
}

# Opens the first edition, whether served or read from disk.
FRONT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>companion</title>
<meta http-equiv="refresh" content="0; url={first}/book/index.html"></head>
<body><a href="{first}/book/index.html">Open the course</a></body></html>
"""

# A server shows this for any missing address, however deep, so the way home is worked out from the address.
MISSING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Page not found</title>
<style>
:root { color-scheme: light dark; background: Canvas; font-family: system-ui, sans-serif; }
body { max-width: 30em; margin: 4em auto; padding: 0 1em; }
a { color: LinkText; }
</style></head><body>
<h1>Page not found</h1>
<p>There is no page at this address. <a id="home" href="{first}/book/index.html">Go to the start of the course.</a></p>
<script>
const inside = location.pathname.match(/^(.*?)\\/(?:{editions})\\//);
if (inside) document.getElementById("home").href = inside[1] + "/{first}/book/index.html";
</script></body></html>
"""


def build(edition: str, settings: dict[str, object]) -> int:
    """Build one edition, put it in its place in the site and return its number of pages."""
    work = WORK / edition
    shutil.rmtree(work, ignore_errors=True)
    status = build_sphinx(
        ROOT,
        # Not straight into the site: myst-nb leaves a folder beside its output.
        work / "html",
        path_config=ROOT / "_config.yml",
        noconfig=True,
        doctreedir=work / "doctrees",
        freshenv=True,
        warningiserror=True,
        keep_going=True,
        quiet=True,
        confoverrides={
            "external_toc_path": str(ROOT / "_toc.yml"),
            "latex_individualpages": False,
            "nitpicky": True,
            **settings,
        },
    )
    if isinstance(status, BaseException):
        raise status
    if status:
        sys.exit(f"the {edition} site has the faults listed above.")
    shutil.rmtree(SITE / edition, ignore_errors=True)
    # The themes' templates that lie among their static files are no pages.
    leave = shutil.ignore_patterns(".buildinfo", "objects.inv", "*macros.html")
    shutil.copytree(work / "html", SITE / edition, ignore=leave)
    return len(list((SITE / edition).rglob("*.html")))


def main() -> None:
    SITE.mkdir(parents=True, exist_ok=True)
    for edition, settings in EDITIONS.items():
        start = time.monotonic()
        pages = build(edition, settings)
        print(f"built {pages} pages in {time.monotonic() - start:.0f} s: open build/site/index.html")
    first, editions = next(iter(EDITIONS)), "|".join(EDITIONS)
    (SITE / "index.html").write_text(FRONT.replace("{first}", first), encoding="utf-8")
    page = MISSING.replace("{first}", first).replace("{editions}", editions)
    (SITE / "404.html").write_text(page, encoding="utf-8")
    (SITE / ".nojekyll").touch()  # GitHub Pages would drop _static/ otherwise


if __name__ == "__main__":
    main()
