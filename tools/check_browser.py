"""Open every page of the built site in Chromium: 1280 pixels wide from disk, 390 from a server, light and dark.

    python tools/check_browser.py build/site build/screenshots

A page fails when it asks another host for anything, writes an error to the console, leaves a formula or a picture
unrendered, scrolls sideways or is light in the dark theme; the site fails when its search finds nothing. A site that
passed is not opened again until it changes. Where there is no Chromium, says so and checks nothing.
"""

import faulthandler
import hashlib
import json
import shutil
import sys
import threading
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Route, sync_playwright
from playwright.sync_api import Error as BrowserError

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WORDS = ["pruning", "剪枝"]  # of the glossary
STEP_MS, ALL_S = 15_000, 900  # longest wait for one thing, and for everything

# What a page shows once its scripts have run; MathJax puts its own element inside each formula.
LOOK = """() => ({
  sideways: document.documentElement.scrollWidth - innerWidth,
  formulas: document.querySelectorAll(".math").length,
  rendered: document.querySelectorAll(".math mjx-container").length,
  wrong: document.querySelectorAll("mjx-merror, mjx-mtext[style*='red']").length,
  outputs: document.querySelectorAll(".cell_output img").length,
  broken: [...document.images].filter(i => i.naturalWidth === 0).map(i => i.getAttribute("src")),
})"""

# Of the first background, from the text outwards, that is not transparent; the canvas beneath them is white.
LUMINANCE = """() => {
  const colours = [document.body, document.documentElement].map(e => getComputedStyle(e).backgroundColor);
  const colour = colours.find(c => c !== "rgba(0, 0, 0, 0)") || "rgb(255, 255, 255)";
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
}"""


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(site: Path) -> str:
    """The address of a server of this folder on this machine only, which ends with the process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def open_window(browser: Browser, width: int, faults: list[str]) -> Page:
    """A new window that reports to ``faults`` what the page asks of other hosts and writes to the console."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(STEP_MS)
    page = context.new_page()

    def guard(route: Route) -> None:
        url = urlsplit(route.request.url)
        if url.scheme in ("file", "data", "blob") or url.hostname == "127.0.0.1":
            route.continue_()
        else:
            faults.append(f"asks for {route.request.url}")
            route.abort()

    context.route("**/*", guard)
    page.on("console", lambda message: faults.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on(
        "response", lambda answer: faults.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None
    )
    return page


def check_page(page: Page, url: str, stored_pictures: int, faults: list[str]) -> None:
    """Load the page and look at what came of it."""
    page.goto(url, wait_until="load")
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    with suppress(BrowserError):  # what is still missing then is a fault below
        page.wait_for_function("[...document.images].every(image => image.complete)")
        page.wait_for_function("!document.querySelector('.math:not(:has(mjx-container))')")
    seen = page.evaluate(LOOK)
    if seen["sideways"] > 0:
        faults.append(f"scrolls sideways by {seen['sideways']} px")
    if seen["rendered"] < seen["formulas"] or seen["wrong"]:
        faults.append(
            f"renders {seen['rendered']} of {seen['formulas']} formulas, {seen['wrong']} of them with a mistake"
        )
    if seen["outputs"] < stored_pictures:
        faults.append(f"shows {seen['outputs']} of the {stored_pictures} pictures stored in the notebook")
    faults += [f"does not show the picture {source}" for source in seen["broken"]]


def check_theme(page: Page, theme: Literal["light", "dark"], faults: list[str]) -> None:
    page.emulate_media(color_scheme=theme)
    try:
        # The page learns of the change a moment later.
        page.wait_for_function(f"({LUMINANCE})() {'<' if theme == 'dark' else '>'} 0.3", timeout=3_000)
    except BrowserError:
        faults.append(f"has a background of luminance {page.evaluate(LUMINANCE):.2f} in the {theme} theme")


def check_search(page: Page, url: str, faults: list[str]) -> None:
    for word in WORDS:
        page.goto(f"{url}?q={word}")
        try:
            page.wait_for_selector("#search-results li a")
        except BrowserError:
            faults.append(f"finds nothing for {word!r}")


def count_stored_pictures(page: Path) -> int:
    """Pictures among the outputs of the notebook behind a page, which lies under _sources/ of its edition."""
    source = page.parents[1] / "_sources" / page.parent.name / f"{page.stem}.ipynb"
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"] if source.is_file() else []
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def fingerprint(site: Path) -> str:
    """SHA-256 of this program and of every file of the site."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in site.rglob("*") if path.is_file()):
        digest.update(path.relative_to(site).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    site, shots = (Path(argument).resolve() for argument in sys.argv[1:3])
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        print(f"browser: none of {', '.join(NAMES)} is installed, so no page was opened")
        return
    passed, state = shots / "passed", fingerprint(site)
    if passed.is_file() and passed.read_text(encoding="utf-8") == state:
        print(f"browser: nothing changed since every page passed: see {sys.argv[2]}/")
        return
    faulthandler.dump_traceback_later(ALL_S, exit=True)  # whatever else may hang
    pages = [path for path in sorted(site.rglob("*.html")) if not is_redirect(path)]
    shutil.rmtree(shots, ignore_errors=True)
    address = serve(site)
    found: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, timeout=60_000)
        try:
            for width, root in ((1280, site.as_uri()), (390, address)):
                faults: list[str] = []
                page = open_window(browser, width, faults)
                for path in pages:
                    name = path.relative_to(site).as_posix()
                    try:
                        check_page(page, f"{root}/{name}", count_stored_pictures(path), faults)
                        for theme in THEMES:
                            check_theme(page, theme, faults)
                            shot = f"{name.removesuffix('.html').replace('/', '-')}-{width}-{theme}.png"
                            page.screenshot(path=shots / shot, full_page=True)
                    except BrowserError as error:
                        faults.append(f"cannot be looked at: {error.message.splitlines()[0]}")
                    found += [f"{name} at {width} px: {fault}" for fault in faults]
                    faults.clear()
            for path in site.glob("*/search.html"):
                check_search(page, f"{address}/{path.relative_to(site)}", faults)
                found += [f"{path.relative_to(site)}: {fault}" for fault in faults]
        finally:
            browser.close()
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        sys.exit(f"the browser found {len(found)} faults.")
    passed.write_text(state, encoding="utf-8")
    print(f"opened {len(pages)} pages in Chromium, on a desktop and a phone, light and dark: see {sys.argv[2]}/")


def is_redirect(path: Path) -> bool:
    return 'http-equiv="refresh"' in path.read_text(encoding="utf-8").lower()


if __name__ == "__main__":
    main()
