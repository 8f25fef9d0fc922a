"""Check a built site: every link and anchor leads somewhere, nothing loads from another host, no path of the building
machine shows, and pages stay small.

    python tools/check_site.py build/site
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE_LIMIT, FILE_LIMIT = 512 * 1024, 4 * 1024 * 1024  # bytes
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users)/[\w.-]+|site-packages")
CSS_URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")
LINK_RELATIONS_NOT_LOADED = {"canonical", "alternate", "author", "license", "next", "prev", "search"}


class Page(HTMLParser):
    """What one page refers to: ``links`` a reader may follow, ``loads`` the browser fetches, ``anchors`` it offers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.in_style = tag == "style"
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        follows = tag in ("a", "area") or (
            tag == "link" and given.get("rel", "").split()[:1] <= list(LINK_RELATIONS_NOT_LOADED)
        )
        for name in ("href", "src", "poster", "data", "action", "xlink:href"):
            if name in given:
                (self.links if follows or name == "action" else self.loads).append(given[name])
        self.loads += [candidate.split()[0] for candidate in given.get("srcset", "").split(",") if candidate.strip()]
        self.loads += css_urls(given.get("style", ""))
        if tag == "meta" and given.get("http-equiv", "").lower() == "refresh" and "=" in given.get("content", ""):
            self.links.append(given["content"].partition("=")[2].strip(" '\""))

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.loads += css_urls(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False


def css_urls(text: str) -> list[str]:
    return [a or b for a, b in CSS_URL.findall(text)]


def faults(site: Path) -> list[str]:
    """One sentence per fault of the site in this folder."""
    found = []
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site}: no page here"]

    def check(source: Path, url: str, *, loaded: bool) -> None:
        where = f"{source.relative_to(site)}: {url!r}"
        parts = urlsplit(url)
        if parts.scheme in ("data", "mailto", "tel", "javascript"):
            return
        if parts.scheme or parts.netloc:
            if loaded:
                found.append(f"{where} is loaded from another host")
            return
        target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
        if target.is_dir():
            target /= "index.html"
        if parts.path.startswith("/") or not target.is_relative_to(site):
            found.append(f"{where} leads out of the site")
        elif not target.is_file():
            found.append(f"{where} leads nowhere")
        elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
            found.append(f"{where} names an anchor that is not there")

    for path, page in pages.items():
        for url in page.links:
            check(path, url, loaded=False)
        for url in page.loads:
            check(path, url, loaded=True)
    for path in sorted(site.rglob("*.css")):
        for url in css_urls(path.read_text(encoding="utf-8")):
            check(path, url, loaded=True)
    for path in sorted(path for path in site.rglob("*") if path.is_file()):
        limit = PAGE_LIMIT if path in pages else FILE_LIMIT
        if path.stat().st_size > limit:
            found.append(
                f"{path.relative_to(site)} has {path.stat().st_size // 1024} KiB, the limit is {limit // 1024}"
            )
        # Pages, what they were made from, and the search index; not the scripts of others.
        if path.suffix in (".html", ".ipynb", ".md", ".txt") or path.name == "searchindex.js":
            for text in sorted(set(MACHINE_PATH.findall(path.read_text(encoding="utf-8")))):
                found.append(f"{path.relative_to(site)} shows a path of the building machine: {text}")
    return found


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    found = faults(site)
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        sys.exit(f"{len(found)} faults in {site.name}.")
    print(f"checked {len(list(site.rglob('*.html')))} pages: links, anchors, hosts, machine paths, sizes")


if __name__ == "__main__":
    main()
