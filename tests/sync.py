"""Is what is committed what the notebooks say? Each check returns its problems, one sentence each.

`make sync` cures most of them.
"""
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "difiisr_dwt"
MAX_NOTEBOOK = 500_000  # bytes; pictures in a notebook are small ones


def notebooks() -> list[Path]:
    """Every notebook of the source, stages and recipes included."""
    found = [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "data_prep").rglob("*.ipynb")]
    return sorted(p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))


def _git(*arguments: str) -> list[str] | None:
    """Paths that `git ls-files` lists, or None outside a git work tree."""
    try:
        run = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return [p for p in run.stdout.split("\0") if p] if run.returncode == 0 else None


def _exported_and_cleaned(to: Path) -> None:
    """Copy the notebooks to another folder, and there export the package and clean them."""
    shutil.copy(ROOT / "settings.ini", to)
    for notebook in notebooks():
        copy = to / notebook.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, copy)
    (to / "difiisr_dwt").mkdir()
    shutil.copy(PACKAGE / "__init__.py", to / "difiisr_dwt")
    code = ("from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean\n"
            "nbdev_export.__wrapped__(); nbdev_clean.__wrapped__()\n"
            "import os; os.path.isdir('data_prep') and nbdev_clean.__wrapped__(fname='data_prep')")
    subprocess.run([sys.executable, "-c", code], cwd=to, check=True)


def exported() -> list[str]:
    """The package is exactly what the notebooks export, and the notebooks are clean."""
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder)
        _exported_and_cleaned(to)
        expected = {p.name: p.read_bytes() for p in (to / "difiisr_dwt").glob("*.py")}
        present = {p.name: p.read_bytes() for p in PACKAGE.rglob("*.py")}
        for name in sorted(expected.keys() | present.keys()):
            if name not in expected:
                problems.append(f"difiisr_dwt/{name} is exported by no notebook: remove it, or write its notebook")
            elif name not in present:
                problems.append(f"difiisr_dwt/{name} is missing: run make sync")
            elif expected[name] != present[name]:
                problems.append(f"difiisr_dwt/{name} is not what its notebook exports: edit the notebook, run make sync")
        for notebook in notebooks():
            if notebook.read_bytes() != (to / notebook.relative_to(ROOT)).read_bytes():
                problems.append(f"{notebook.relative_to(ROOT)} is not clean: run make sync")
    return problems


def small() -> list[str]:
    """Notebooks stay small, and none was saved with an error in it."""
    problems = []
    for notebook in notebooks():
        name, size = notebook.relative_to(ROOT), notebook.stat().st_size
        if size > MAX_NOTEBOOK:
            problems.append(f"{name} has {size / 1e3:.0f} kB, more than {MAX_NOTEBOOK / 1e3:.0f}: make its pictures smaller")
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if any(output.get("output_type") == "error" for output in cell.get("outputs", [])):
                problems.append(f"{name} was saved with an error in it: run it again")
    return problems


def readme() -> list[str]:
    """README.md is what nbs/index.ipynb renders to, and the model cards what docs/cards does, with the published numbers."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [f"{path.relative_to(ROOT)} is not what its source and the published numbers render to: run make readme"
            for path, text in module.render_all().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def tracked() -> list[str]:
    """Git knows every source file, and every file that git knows is there."""
    folders = ["nbs", "difiisr_dwt", "data_prep", "tests", "docs"]
    if (unknown := _git("--others", "--exclude-standard", "--", *folders)) is None:
        return []
    problems = [f"{p} is unknown to git: add it, or remove it" for p in unknown]
    for path in _git("--others", "--ignored", "--exclude-standard", "--", "difiisr_dwt", "nbs/*.ipynb"):
        if not {"__pycache__", ".ipynb_checkpoints"} & set(Path(path).parts):
            problems.append(f"{path} is ignored by git: change .gitignore, or move it")
    return problems + [f"{p} is known to git but missing" for p in _git("--deleted")]


def lint() -> list[str]:
    """Ruff finds nothing, in notebooks neither."""
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "--output-format=concise", "."],
                         cwd=ROOT, capture_output=True, text=True)
    return (run.stdout + run.stderr).strip().splitlines() if run.returncode else []


CHECKS: dict[str, Callable[[], list[str]]] = {
    "package is what the notebooks export": exported,
    "notebooks are small and whole": small,
    "README.md is what its notebook renders": readme,
    "git knows every source file": tracked,
    "ruff": lint,
}
