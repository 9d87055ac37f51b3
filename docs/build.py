"""Build the site: nbdev documents the notebooks (_proc/), this bridge makes pages of them, Sphinx makes docs/_build/html of those.

What has not changed since the last build is not made again. Ends with exit code 1 on any warning, and on any link that leads nowhere.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]
import bridge  # noqa: E402
import check  # noqa: E402
import pages  # noqa: E402

BUILD = ROOT / "docs/_build"


def documented(source: Path) -> Path:
    """What nbdev makes of the notebooks, in `_proc`; only those that changed go through it."""
    wanted = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        name = path.relative_to(ROOT / "nbs").as_posix()
        if not any(part.startswith(".") for part in path.relative_to(ROOT / "nbs").parts):
            wanted[name] = nbformat.writes(bridge.for_nbdev(nbformat.read(path, as_version=4)))
    log, made = BUILD / "proc.json", ROOT / "_proc"
    known = json.loads(log.read_text()) if log.is_file() else {}
    log.unlink(missing_ok=True)  # an interrupted build starts anew
    now = time.time()
    hashes = {}
    for name, text in wanted.items():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        if known.get(name) != hashes[name] or not (made / name).is_file() or not target.is_file():
            target.write_text(text, encoding="utf-8")
            os.utime(target, (now + 2, now + 2))  # nbdev goes by time
    for path in source.rglob("*.ipynb"):
        if path.relative_to(source).as_posix() not in wanted:
            path.unlink()
    proc_nbs(path=str(source), force=not made.is_dir(), n_workers=2)
    missing = [name for name in wanted if not (made / name).is_file()]
    if missing:
        raise SystemExit(f"make docs: nbdev made nothing of {', '.join(missing)}; run `make clean docs`")
    os.utime(made, (now + 3, now + 3))
    log.write_text(json.dumps(hashes))
    return made


def main() -> int:
    """Prepare, build, check; return the exit code."""
    began = time.monotonic()
    source, html, doctrees = BUILD / "pages", BUILD / "html", BUILD / "doctrees"
    made = documented(BUILD / "nbs")
    pages.write(made, source, BUILD / "extra")
    print(f"pages prepared in {time.monotonic() - began:.0f} s", flush=True)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", doctrees, "-c", ROOT / "docs", source, html]
    code = subprocess.run(sphinx).returncode
    if code:
        shutil.rmtree(doctrees, ignore_errors=True)  # else the next build would not repeat its warnings
        print("make docs: Sphinx failed", file=sys.stderr, flush=True)
        return code
    if broken := check.broken_links(html):
        print("make docs: links that lead nowhere:", *broken, sep="\n  ", file=sys.stderr, flush=True)
        return 1
    count = sum(1 for _ in html.rglob("*.html"))
    print(f"{html.relative_to(ROOT)}/index.html: {count} pages in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
