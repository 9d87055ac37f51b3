"""Write README.md from nbs/index.ipynb, and the model cards from docs/cards, numbers filled in from reports/published.

Markdown as it is, code in fences, plain-text results below. nbdev's own command for this needs Quarto, which pip does not bring.
"""
import posixpath
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import quoted  # noqa: E402

_LINK = re.compile(r'(\]\(|src=")([^)"\s]+)')


def _from_root(match: re.Match) -> str:
    """A link that holds in nbs/, as seen from the root of the repository."""
    opening, target = match.groups()
    if re.match(r"[a-z]+:|#|/", target):
        return opening + target
    return opening + posixpath.normpath(posixpath.join("nbs", target))


def _code(cell: nbformat.NotebookNode) -> list[str]:
    """A code cell's blocks: its source without directives, then what it printed."""
    lines = cell.source.splitlines()
    directives = {line[2:].strip() for line in lines if line.startswith("#|")}
    if "hide" in directives:
        return []
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    blocks = [f"```python\n{source}\n```"] if source and "echo: false" not in directives else []
    for output in cell.outputs:
        if markdown := output.get("data", {}).get("text/markdown"):
            blocks.append(_LINK.sub(_from_root, markdown.strip()))
            continue
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        if text.strip() and "image/png" not in output.get("data", {}):
            blocks.append("```text\n" + text.rstrip() + "\n```")
    return blocks


def render(notebook: Path = ROOT / "nbs/index.ipynb") -> str:
    """README.md's text."""
    blocks = ["<!-- Written by `make readme` from nbs/index.ipynb: edit that one. -->"]
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown":
            blocks.append(quoted.fill(_LINK.sub(_from_root, cell.source.strip())))
        elif cell.cell_type == "code":
            blocks += _code(cell)
    return "\n\n".join(blocks) + "\n"


def render_all() -> dict[Path, str]:
    """Every file that this script writes, and its text."""
    cards = {ROOT / "difiisr_dwt/weights" / card.name: quoted.fill(card.read_text(encoding="utf-8")) for card in sorted((ROOT / "docs/cards").glob("*.md"))}
    return {ROOT / "README.md": render(), **cards}


if __name__ == "__main__":
    for path, text in render_all().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
