"""Links of a built site that lead nowhere, and what it would fetch from elsewhere."""
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag


class _Page(HTMLParser):
    """Names and links of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[tuple[str, str]] = []  # tag, address

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.names.add(value)
            elif key in ("href", "src") and value:
                self.links.append((tag, value))


def broken_links(html: Path) -> list[str]:
    """`page: address` of every link inside the site without a target, and of every script, style or picture from elsewhere."""
    pages: dict[Path, _Page] = {}
    for path in sorted(html.rglob("*.html")):
        pages[path] = _Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    found = []
    for path, page in pages.items():
        for tag, address in page.links:
            if address.startswith(("http:", "https:", "//")):
                if tag != "a":
                    found.append(f"{path.relative_to(html)}: <{tag}> from {address}")
                continue
            if address.startswith(("mailto:", "data:", "javascript:")):
                continue
            file, anchor = urldefrag(address)
            there = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            missing = not there.is_file() or not there.is_relative_to(html.resolve())
            if missing or (anchor and there in pages and unquote(anchor) not in pages[there].names):
                found.append(f"{path.relative_to(html)}: {address}")
    return sorted(set(found))
