"""Every test there is: sync of notebooks and package, each notebook, then pytest. Ends in `N passed, N failed`.

    python tests/run_all.py                     all of it (make test)
    python tests/run_all.py sync notebooks      some of it
    python tests/run_all.py notebooks 01 30     the notebooks with one of these words in their name
"""
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sync
from sync import ROOT

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
PHASES = ("sync", "notebooks", "pytest")
WORKERS = 2     # processes, of one thread each
TIMEOUT = 600   # seconds for one notebook, however busy the machine is
LIMIT = 120     # seconds of processor time for one notebook, which do not grow where other programs run beside it


def say(ok: bool, name: str, detail: str = "") -> str:
    """Print one result; return the word to count it under."""
    print(f"{'passed' if ok else 'FAILED'}  {name}" + (f"\n{detail}" if detail else ""), flush=True)
    return "passed" if ok else "failed"


def check_sync() -> Counter:
    """Run the checks of sync.py."""
    results = Counter()
    for name, check in sync.CHECKS.items():
        problems = check()
        results[say(not problems, f"sync: {name}", "\n".join(f"    {p}" for p in problems))] += 1
    return results


def _run_notebook(notebook: Path) -> str:
    """Run one notebook as nbdev does, in a process and a session of its own."""
    code = ("import sys; from pathlib import Path; from nbdev.config import get_config; from nbdev.test import test_nb\n"
            "flags = get_config().tst_flags.split()\n"
            "ok = test_nb(Path(sys.argv[1]), skip_flags=flags, basepath=get_config().config_path)[0]\n"
            "import resource; used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
            "print(f'\\nprocessor seconds: {sum(u.ru_utime + u.ru_stime for u in used):.1f}', flush=True)\n"
            "sys.exit(not ok)")
    start, name = time.monotonic(), f"notebook: {notebook.relative_to(ROOT)}"
    try:
        run = subprocess.run([sys.executable, "-c", code, str(notebook)], cwd=ROOT, text=True, timeout=TIMEOUT,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=os.environ | ONE_THREAD | {"MPLBACKEND": "agg"})
    except subprocess.TimeoutExpired:
        return say(False, name, f"    took more than {TIMEOUT} s")
    ok, used = run.returncode == 0, processor_seconds(run.stdout)
    name = f"{name} ({time.monotonic() - start:.0f} s)"
    if ok and used > LIMIT:
        return say(False, name, f"    took {used:.0f} s of processor time, more than {LIMIT}: make it smaller, or a stage with a published run")
    return say(ok, name, "" if ok else run.stdout[-6000:])


def processor_seconds(output: str) -> float:
    """What a notebook's process said last of its own use; infinite where it said nothing."""
    found = re.findall(r"^processor seconds: ([\d.]+)$", output, re.M)
    return float(found[-1]) if found else math.inf


def run_notebooks(words: list[str]) -> Counter:
    """Run the notebooks of nbs/, save those beside a .notest file (pytest runs the stages through papermill)."""
    chosen = [n for n in sync.notebooks() if n.is_relative_to(ROOT / "nbs") and not (n.parent / ".notest").exists()
              and (not words or any(word in n.name for word in words))]
    with ThreadPoolExecutor(WORKERS) as pool:
        return Counter(pool.map(_run_notebook, chosen))


def run_pytest() -> Counter:
    """Run tests/, each file in one of the processes, and count the cases."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        code = subprocess.run([sys.executable, "-m", "pytest", "-n", str(WORKERS), "--dist", "loadfile", f"--junitxml={report}"], cwd=ROOT,
                              env=os.environ | ONE_THREAD).returncode
        if not report.exists():
            return Counter([say(False, "pytest", f"    it ended with code {code} before it wrote its report")])
        cases = Counter(_outcome(case) for case in ElementTree.parse(report).iter("testcase"))
    if code not in (0, 5) and not cases["failed"]:  # 5: no test collected
        cases["failed"] += 1
    return cases


def _outcome(case: ElementTree.Element) -> str:
    """passed, failed or skipped."""
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


def main(arguments: list[str]) -> int:
    """Run the phases asked for, print the sum, return the exit code."""
    phases = [a for a in arguments if a in PHASES] or list(PHASES)
    words = [a for a in arguments if a not in PHASES]
    results = Counter()
    if "sync" in phases:
        results += check_sync()
    if "notebooks" in phases:
        results += run_notebooks(words)
    if "pytest" in phases:
        results += run_pytest()
    if results["skipped"]:
        print(f"skipped: {results['skipped']}")
    print(f"{results['passed']} passed, {results['failed']} failed", flush=True)
    return 1 if results["failed"] or not results["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
