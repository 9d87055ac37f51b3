"""The bridge from nbdev (which writes for Quarto) to myst-nb: front matter, directives, callouts, show_doc, links."""
import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", re.M)
_TAGS = {("echo", "false"): "remove-input", ("output", "false"): "remove-output", ("include", "false"): "remove-cell",
         ("code-fold", "true"): "hide-input"}
_CALLOUTS = {"note": "note", "tip": "tip", "warning": "warning", "important": "important", "caution": "caution"}


def _only_imports(source: str) -> bool:
    """Is a cell nothing but import statements?"""
    try:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)
    except SyntaxError:  # a cell with magics
        return False


def for_nbdev(notebook: NotebookNode) -> NotebookNode:
    """Show exported code beside its documentation; keep nbdev from running examples again because they import."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and not _only_imports(cell.source):
            if re.search(r"^#\|\s*export", cell.source, re.M):
                cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, flags=re.M)
            else:
                cell.source = "#| eval: false\n" + cell.source
    notebook.cells.append(nbformat.v4.new_markdown_cell("<!-- end -->", id="end"))  # nbdev fails on a notebook that ends in exported code
    return notebook


@dataclass(frozen=True)
class Symbol:
    """Something public, as `show_doc` shows it."""

    module: str
    name: str
    summary: str

    @property
    def target(self) -> str:
        """Where it is described."""
        return target(self.module, self.name)


def target(module: str, name: str) -> str:
    """Label of a symbol's description; a class and a function may differ in case alone, labels may not."""
    module = f"{module}-class" if name[:1].isupper() else module
    return "api-" + re.sub(r"\W+", "-", f"{module}-{name}").lower()


def _shown(cell: NotebookNode, module: str) -> Symbol | None:
    """Turn a cell of `show_doc` into markdown with a label; None where it is another cell."""
    if not re.search(r"^show_doc\(", cell.source, re.M):
        return None
    text = next((t for o in cell.outputs if (t := o.get("data", {}).get("text/markdown"))), "")
    text = re.sub(r"\A---\s*|\{target=[^}]*\}", "", text)
    heading = re.match(r"#+\s+(\S+)[^\n]*\n", text)
    if not heading:
        return None
    body = re.sub(r"```python\s*\n(.*?)\s*\n```", r"```python\n\1\n```", text[heading.end():], flags=re.S)
    summary = re.search(r"^\*(.+?)(?:\*$|\n\n|\Z)", body, re.M | re.S)
    name = heading[1].strip("`")
    symbol = Symbol(module, name, " ".join((summary[1] if summary else "").split()))
    cell.cell_type, cell.source = "markdown", f"({symbol.target})=\n### `{name}`\n{body}"
    for key in ("outputs", "execution_count"):
        cell.pop(key, None)
    cell.metadata = {}
    return symbol


def callouts(text: str) -> str:
    """Quarto's callouts as MyST's admonitions."""
    def replace(match: re.Match) -> str:
        title = re.search(r'title="([^"]*)"', match[3])
        kind = _CALLOUTS.get(match[2], "note")
        return f"{match[1]}{{admonition}} {title[1]}\n:class: {kind}\n" if title else f"{match[1]}{{{kind}}}"

    return re.sub(r"^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}", replace, text, flags=re.M)


def for_sphinx(notebook: NotebookNode, module: str = "") -> list[Symbol]:
    """Turn what nbdev writes (front matter, directives, callouts, show_doc) into what myst-nb reads; what is public in it."""
    symbols = []
    for cell in notebook.cells:
        cell.pop("has_sd", None)  # nbdev's own mark, not part of the format
        if cell.cell_type == "raw" and cell.source.startswith("---"):
            front = yaml.safe_load(cell.source.strip().strip("-"))
            cell.cell_type = "markdown"
            cell.source = f"# {front.get('title', '')}\n\n> {front.get('description', '')}"
        elif cell.cell_type == "markdown":
            cell.source = callouts(cell.source)
        elif cell.cell_type == "code":
            if symbol := _shown(cell, module):
                symbols.append(symbol)
                continue
            found = {tag for key, tag in _TAGS.items() if key in _DIRECTIVE.findall(cell.source)}
            if found:
                cell.metadata.tags = sorted({*cell.metadata.get("tags", []), *found})
            cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    notebook.cells = [c for c in notebook.cells if not (c.cell_type == "markdown" and re.fullmatch(r"\s*(<!--.*?-->)?\s*", c.source, re.S))]
    return symbols


def relink(text: str, page: Path, origin: Path, known: dict[Path, Path], picture: "callable") -> str:
    """Links as they hold on the site: to pages and pictures; a link to what only the repository has becomes plain text."""
    def replace(match: re.Match) -> str:
        exclamation, words, address = match.groups()
        if re.match(r"[a-z]+:|#|/", address):
            return match[0]
        path, _, anchor = address.partition("#")
        there = Path(os.path.normpath(origin / path))
        if there in known:
            to = os.path.relpath(known[there], page.parent).replace(os.sep, "/")
            return f"{exclamation}[{words}]({to}{'#' + anchor if anchor else ''})"
        if exclamation and there.is_file():
            return f"![{words}]({os.path.relpath(picture(there), page.parent).replace(os.sep, '/')})"
        return words if there.exists() else match[0]  # what is nowhere is for Sphinx to complain about

    return _LINK.sub(replace, text)
