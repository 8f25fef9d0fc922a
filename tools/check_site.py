"""Check a built site: every link and anchor leads somewhere, nothing loads from another host, no path of the building
machine shows, and files stay small.

    python tools/check_site.py build/site
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE_LIMIT, FILE_LIMIT = 512 * 1024, 4 * 1024 * 1024  # bytes
ROOT = Path(__file__).resolve().parents[1]
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:root|home|Users)/[\w.-]+|site-packages|" + re.escape(str(ROOT)))
CSS_URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
SCRIPT_URL = re.compile(r"""(?:\bimport|\bfrom|\bfetch|\bsrc\s*=)[\s(]*["']((?:https?:)?//[^"']+)""")
ONLY_NAMED = {"canonical", "alternate", "author", "license", "next", "prev", "search"}  # <link>s that load nothing


class Page(HTMLParser):
    """What a page refers to: ``links`` that a reader may follow, ``loads`` that the browser fetches, ``anchors``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {"", "top"}
        self.mute: list[str] = []  # pictures without words for those who cannot see them
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.inside = tag
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        follow = tag in ("a", "area") or (tag == "link" and given.get("rel") in ONLY_NAMED)
        urls = [given[name] for name in ("href", "xlink:href", "src", "data", "poster", "action") if name in given]
        (self.links if follow else self.loads).extend(urls)
        self.loads += [choice.split()[0] for choice in given.get("srcset", "").split(",") if choice.strip()]
        self.loads += css_urls(given.get("style", ""))
        if tag == "img" and re.fullmatch(r"\S*\.(png|jpe?g|svg|gif|webp)", given.get("alt", ".png")):
            self.mute.append(given.get("src", ""))
        if given.get("http-equiv", "").lower() == "refresh":
            self.links.append(given.get("content", "").partition("=")[2].strip(" '\""))

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.loads += css_urls(data)
        elif self.inside == "script":
            self.loads += SCRIPT_URL.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def css_urls(text: str) -> list[str]:
    return [a or b for a, b in CSS_URL.findall(text)]


def faults(site: Path) -> list[str]:
    """One line per fault of the site in this folder."""
    site = site.resolve()
    files = sorted(path for path in site.rglob("*") if path.is_file())
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in files if path.suffix == ".html"}
    if not pages:
        return [f"{site.name} has no page"]
    found = []

    def check(source: Path, url: str, *, loaded: bool) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("data", "mailto", "tel", "javascript"):
            return
        fault = ""
        target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
        if target.is_dir():
            target /= "index.html"
        if parts.scheme in ("http", "https") or parts.netloc:
            fault = "is loaded from another host" if loaded else ""
        elif parts.scheme or parts.path.startswith("/") or not target.is_relative_to(site):
            fault = "leads out of the site"
        elif not target.is_file():
            fault = "leads nowhere"
        elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
            fault = "names an anchor that is not there"
        if fault:
            found.append(f"{source.relative_to(site)}: {url!r} {fault}")

    for path in files:
        name = path.relative_to(site)
        if path in pages:
            for url in pages[path].links:
                check(path, url, loaded=False)
            for url in pages[path].loads:
                check(path, url, loaded=True)
            found += [f"{name}: the picture {url!r} has no words (alt)" for url in pages[path].mute]
        elif path.suffix == ".css":
            for url in css_urls(path.read_text(encoding="utf-8")):
                check(path, url, loaded=True)
        limit = PAGE_LIMIT if path in pages else FILE_LIMIT
        if path.stat().st_size > limit:
            found.append(f"{name} has {path.stat().st_size // 1024} KiB, the limit is {limit // 1024} KiB")
        # Pages, what they were made from, and the search index; not other people's scripts.
        if path.suffix in (".html", ".ipynb", ".md", ".txt") or path.name == "searchindex.js":
            for text in sorted(set(MACHINE_PATH.findall(path.read_text(encoding="utf-8")))):
                found.append(f"{name} shows a path of the building machine: {text}")
    return found


def main() -> None:
    site = Path(sys.argv[1])
    found = faults(site)
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        sys.exit(f"{site} has {len(found)} faults.")
    print(f"checked {len(list(site.rglob('*.html')))} pages: links, anchors, hosts, machine paths, sizes, alt texts")


if __name__ == "__main__":
    main()
