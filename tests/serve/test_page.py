"""The live page and the documentation, without any other host."""

import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import sync_playwright

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from companion.serve.image import image_app
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, red, serving, until

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
DROP = """async ([bytes, name]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


def test_what_the_page_may_do():
    with serving(image_app(Slow(), settings=Settings())) as url:
        answer = httpx.get(url, timeout=60)
    policy = dict(part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert [policy[key] for key in ("base-uri", "form-action", "frame-ancestors")] == ["'none'"] * 3
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert set(re.findall(r"https?://[^\"'\s]+", answer.text)) == {"http://www.w3.org/2000/svg"}


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium")
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A window that notes what goes wrong and what is asked of whom."""
    context = browser.new_context()
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.faults, page.hosts = [], set()
    page.on("console", lambda said: page.faults.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.hosts.add(urlsplit(request.url).netloc))
    yield page
    context.close()


def test_an_image_is_dropped_and_answered_and_the_charts_move(page):
    with serving(image_app({"reds": Slow()}, settings=Settings())) as url:
        page.goto(url)
        until(lambda: page.evaluate("document.getElementById('about').textContent.includes('images of 8×8')"), 60)
        page.evaluate(DROP, [list(red(42)), "a.png"])
        answer = page.locator("#answers li")
        answer.wait_for()
        assert answer.locator("strong").text_content() == "42"
        until(lambda: page.evaluate("document.querySelector('#answers img').naturalWidth === 8"), 60)
        page.locator("#burst").click()
        until(lambda: page.evaluate("document.getElementById('sent').textContent.startsWith('200 answers in')"), 60)
        until(lambda: page.evaluate("document.getElementById('totals').textContent.includes('202 items in')"), 60)
        until(lambda: page.evaluate("document.getElementById('line-batch').getAttribute('points').includes(' ')"), 60)
        for scheme, light in (("dark", False), ("light", True)):
            page.emulate_media(color_scheme=scheme)
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(re.search(r"\d+", colour).group()) > 128) == light
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.hosts - {""} == {url.removeprefix("http://")}  # pictures that were dropped have none
    assert page.faults == []


def test_the_documentation_asks_no_other_host(page):
    with serving(image_app(Slow(), settings=Settings())) as url:
        page.goto(f"{url}/docs")
        page.get_by_text("/predict/{model}").first.wait_for()
        page.wait_for_load_state("networkidle")
        assert page.hosts == {url.removeprefix("http://")}
    assert page.faults == []
