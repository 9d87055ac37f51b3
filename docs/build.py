"""Build the site: nbdev documents the notebooks (_proc/), Sphinx makes docs/_build/html of them."""
import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import yaml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "docs/_build"
PAGES_OF_THE_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")


def _only_imports(source: str) -> bool:
    """Is a cell nothing but import statements?"""
    try:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)
    except SyntaxError:  # a cell with magics
        return False


def for_nbdev(cell: nbformat.NotebookNode) -> None:
    """Show exported code beside its documentation; keep nbdev from running examples again because they import."""
    if cell.cell_type == "code":
        if _only_imports(cell.source):
            return
        if re.search(r"^#\|\s*export", cell.source, re.M):
            cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, flags=re.M)
        else:
            cell.source = "#| eval: false\n" + cell.source


def for_sphinx(cell: nbformat.NotebookNode) -> None:
    """Turn what nbdev writes for Quarto (front matter, directives) into what myst-nb reads."""
    if cell.cell_type == "raw" and cell.source.startswith("---"):
        front = yaml.safe_load(cell.source.strip().strip("-"))
        cell.cell_type = "markdown"
        cell.source = f"# {front.get('title', '')}\n\n> {front.get('description', '')}"
    elif cell.cell_type == "code":
        if re.search(r"^#\|\s*echo:\s*false", cell.source, re.M):
            cell.metadata.tags = ["remove-input"]
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        for output in cell.outputs:  # show_doc begins with a rule, and has Quarto's attributes
            if text := output.get("data", {}).get("text/markdown"):
                output.data["text/markdown"] = re.sub(r"\A---\s*|\{target=[^}]*\}", "", text)


def rewrite(folder: Path, change: Callable[[nbformat.NotebookNode], None]) -> None:
    """Change every cell of every notebook in a folder."""
    for path in folder.rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            change(cell)
            cell.pop("has_sd", None)  # nbdev's own mark, not part of the format
        nbformat.write(notebook, path)


def contents(pages: Path) -> str:
    """The table of contents: numbered notebooks in their order, tutorials, stages, pages about the project."""
    parts = [("Modules", sorted(p.stem for p in pages.glob("[0-9][0-9]_*.ipynb")))]
    parts += [(folder.capitalize(), sorted(f"{folder}/{p.stem}" for p in (pages / folder).glob("*.ipynb")))
              for folder in ("tutorials", "stages")]
    parts += [("Project", [Path(name).stem for name in PAGES_OF_THE_ROOT])]
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])
                       for caption, names in parts if names)


def main() -> int:
    """Prepare, build, return Sphinx's exit code."""
    source, html = BUILD / "nbs", BUILD / "html"
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", source, ignore=shutil.ignore_patterns(".*"))
    rewrite(source, for_nbdev)
    pages = Path(proc_nbs(path=str(source), force=True, n_workers=2))
    rewrite(pages, for_sphinx)
    for name in PAGES_OF_THE_ROOT:
        shutil.copy(ROOT / name, pages)
    index = nbformat.read(pages / "index.ipynb", as_version=4)
    for cell in index.cells:  # links to what the site does not have become plain text
        cell.source = re.sub(r"\]\(\.\./(CONTRIBUTING|CHANGELOG)\.md\)", r"](\1.md)", cell.source)
        cell.source = re.sub(r"\[([^]]*)\]\((\.\./[^)]*|stages|experiments)\)", r"\1", cell.source)
    index.cells.append(nbformat.v4.new_markdown_cell(contents(pages)))
    nbformat.write(index, pages / "index.ipynb")

    sphinx = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", ROOT / "docs", pages, html]
    code = subprocess.run(sphinx).returncode
    print("make docs: Sphinx failed" if code else html.relative_to(ROOT) / "index.html", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
