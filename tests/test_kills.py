"""A training is killed again and again, kernel and parent, in the middle of its checkpoints too, and ends as if nothing had been.

The run is that of the real stage, `nbs/stages/train.ipynb`. Kills come in two ways:

* through `difiisr run`: a new command, its papermill, its kernel. Starting those costs seconds, so only some kills are of this kind;
* through a runner that has imported torch once and forks, for each attempt, a parent that forks a kernel. Both do what the
  real ones do: the kernel calls `processes.attach`, which is what `difiisr run` has its kernels do first, and executes the
  code cells of the stage with the run's parameters in `__main__`; the parent waits for it. What is left out is Jupyter's protocol.

Half of the kills hit the kernel, half its parent, at moments drawn from a seed that is printed. Those "in a write" come as
soon as the file beside a checkpoint appears, and count only if that file is still there when all are dead: a rename that was
not reached. (A kernel outlives its killed parent by what the system takes to clear the latter away, often long enough to
finish.) After each kill: the kernel is gone, nothing in the run folder changes any more, every checkpoint is read in full.

There are twelve kills, two of them through `difiisr run` and three in a write. `DIFIISR_TEST_KILLS=50/10` makes it fifty, ten of
them through `difiisr run` and at least six in a write; 50/50 all of them.
"""
import contextlib
import ctypes
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from difiisr_dwt.checkpoints import checkpoint_files, read_log
from difiisr_dwt.runs import load_experiment

ROOT = Path(__file__).resolve().parents[1]
KILLS, THROUGH_COMMAND = map(int, os.environ.get("DIFIISR_TEST_KILLS", "12/2").split("/"))
IN_WRITES = max(3, KILLS // 8)
ITERATIONS = 12 * KILLS

EXPERIMENT = {
    "stage": "train",
    "params": {  # the widest layers sit where images are smallest: fast iterations, and checkpoints that take a while to write
        "train": ["scenes:3"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64, "batch": 2, "iterations": ITERATIONS,
        "warmup": 5, "checkpoint_every": 5, "validate_every": 25, "log_every": 4, "sigma_batches": 2, "device": "cpu", "preflight": False,
        "model": {"network": {"channels": [16, 24, 128], "blocks": 1}, "schedule": {"steps": 4}},
        "terms": {"edges": {"weight": 0.0, "end": 0.1, "start": ITERATIONS // 2}},
    },
}

RUNNER = """
import json, os, runpy, signal, sys
import nbformat, torch
import matplotlib.figure, torch.utils.tensorboard
from difiisr_dwt import live_curves, preflight, training
from difiisr_dwt.metrics import lpips_network
from difiisr_dwt.processes import attach, die_with_parent

die_with_parent()
cells = [c for c in nbformat.read(sys.argv[1], 4).cells if c.cell_type == "code"]
parameters = json.loads(sys.argv[2])
lpips_network("alex")


def kernel(run_dir, parent):
    attach(os.path.join(run_dir, ".kernel.lock"), parent)
    names = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell.source, "stage", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters, run_dir=run_dir)
    os._exit(0)


def parent(run_dir):
    die_with_parent()
    own = os.getpid()
    child = os.fork()
    if not child:
        try:
            kernel(run_dir, own)
        finally:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(own, child, flush=True)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)


for line in sys.stdin:
    first = os.fork()
    if not first:
        parent(line.strip())
    print("ended", os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), flush=True)
"""


class Forked:
    """Attempts in processes that share their imports."""

    def __init__(self, parameters: dict, errors: Path):
        self.errors = errors.open("w")
        self.runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(ROOT / "nbs" / "stages" / "train.ipynb"), json.dumps(parameters)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=ROOT, env=environment(),
        )

    def start(self, run_dir: Path) -> tuple[int, int]:
        """Process ids of parent and kernel."""
        self.runner.stdin.write(f"{run_dir}\n")
        self.runner.stdin.flush()
        words = self.line().split()
        return int(words[0]), int(words[1])

    def line(self) -> str:
        """What the runner says; what a stage prints goes by."""
        while line := self.runner.stdout.readline():
            if re.fullmatch(r"\d+ \d+|ended -?\d+", line.strip()):
                return line
        raise AssertionError("the runner died: " + Path(self.errors.name).read_text()[-2000:])

    def wait(self) -> int:
        """Exit code of the parent."""
        return int(self.line().split()[1])

    def close(self) -> None:
        """End the runner."""
        self.runner.stdin.close()
        self.runner.wait()
        self.runner.stdout.close()
        self.errors.close()


class Command:
    """Attempts through `difiisr run`."""

    def __init__(self, experiment: Path, root: Path, run_dir: Path):
        self.words = [sys.executable, "-m", "difiisr_dwt.cli", "run", str(experiment), "--root", str(root)]
        self.run_dir, self.errors = run_dir, root.parent / "difiisr.txt"

    def start(self, run_dir: Path) -> tuple[int, int]:
        """Process ids of the command and of its kernel, as soon as there is one."""
        assert run_dir == self.run_dir
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(self.words, stderr=errors, stdout=errors, cwd=ROOT, env=environment())
        lock, until = run_dir / ".kernel.lock", time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            word = lock.read_text() if lock.exists() else ""
            if word.isdigit() and int(word) in [p.pid for p in children(self.process.pid)]:
                return self.process.pid, int(word)
            time.sleep(0.005)
        raise AssertionError("no kernel: " + self.errors.read_text()[-2000:])

    def wait(self) -> int:
        """Exit code of the command."""
        return self.process.wait()

    def close(self) -> None:
        """Nothing is left to end."""


def environment() -> dict[str, str]:
    """One thread each, and this package."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


def children(pid: int) -> list[psutil.Process]:
    """Processes below one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def begun(run_dir: Path) -> set[str]:
    """Checkpoints that somebody has begun to write and not finished."""
    return {f.name for f in (run_dir / "checkpoints").glob(".*.safetensors")}


@contextlib.contextmanager
def watching(folder: Path):
    """A function that waits until a hidden file is made in a folder, with Linux's word for it rather than by looking again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.inotify_init()
    assert number >= 0 and libc.inotify_add_watch(number, str(folder).encode(), 0x100) >= 0, os.strerror(ctypes.get_errno())  # IN_CREATE

    def wait(while_: Callable[[], bool]) -> None:
        while while_():
            if select.select([number], [], [], 0.2)[0] and b"\0." in os.read(number, 4096):  # a name begins after the header's zeros
                return

    try:
        yield wait
    finally:
        os.close(number)


def contents(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files of a run."""
    return {str(f.relative_to(run_dir)): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(run_dir.rglob("*")) if f.is_file()}


def kill(attempt: Forked | Command, run_dir: Path, whom: str, in_write: bool, moment: random.Random) -> tuple[bool, bool]:
    """Start, kill kernel or parent at some moment; whether it was in a write, and in which state all is afterwards."""
    earlier = begun(run_dir)
    with watching(run_dir / "checkpoints") as wait_for_a_write:
        parent, kernel = attempt.start(run_dir)
        log = run_dir / "metrics.jsonl"
        if in_write:
            for _ in range(1 + moment.randrange(2)):  # not always the first checkpoint
                wait_for_a_write(lambda: alive(kernel))
        elif moment.random() < 0.8:  # at work; else while it starts
            size = log.stat().st_size if log.exists() else 0
            while alive(kernel) and (not log.exists() or log.stat().st_size <= size):
                time.sleep(0.002)
            time.sleep(moment.uniform(0, 0.1))
        else:
            time.sleep(moment.uniform(0, 1.0))
        with contextlib.suppress(ProcessLookupError):  # before the watch ends: the system takes longer for that than for a write
            os.kill(kernel if whom == "kernel" else parent, signal.SIGKILL)
    code = attempt.wait()
    until = time.monotonic() + 10
    while alive(kernel) and time.monotonic() < until:
        time.sleep(0.002)
    assert not alive(kernel), f"a kernel outlived its {whom}, which was killed"
    before = contents(run_dir)
    for file in checkpoint_files(run_dir):
        load_file(file)
    time.sleep(0.05)
    assert contents(run_dir) == before, "somebody still writes"
    return code != 0, bool(begun(run_dir) - earlier)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a kernel with its parent")
def test_killed_again_and_again(tmp_path):
    """Kills of kernels and of their parents, some in the middle of a checkpoint: no checkpoint is ever unreadable, the end is the same, bit by bit."""
    (tmp_path / "nbs").mkdir()
    experiment, root = tmp_path / "nbs" / "train.yaml", tmp_path / "reports"
    experiment.write_text(yaml.safe_dump(EXPERIMENT))
    (run,) = load_experiment(experiment)
    run_dir, whole = run.run_dir(root), tmp_path / "whole"
    (run_dir / "checkpoints").mkdir(parents=True)
    (whole / "figures").mkdir(parents=True)
    seed = int(os.environ.get("DIFIISR_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print("moments from seed", seed)
    moment, began = random.Random(seed), time.monotonic()
    forked, command = Forked(run.params, tmp_path / "forked.txt"), Command(experiment, root, run_dir)
    counts: Counter = Counter()
    reached = []
    try:
        forked.start(whole)
        assert forked.wait() == 0, (tmp_path / "forked.txt").read_text()[-2000:]
        ways = ["command"] * THROUGH_COMMAND + ["forked"] * (KILLS - THROUGH_COMMAND + 10)
        for number in range(KILLS + 10):
            if number >= KILLS and counts["in a write"] >= IN_WRITES:
                break
            late = number >= KILLS
            way, whom = ways[number], "kernel" if late or number % 2 == 0 else "parent"
            aimed = late or number % 4 == 2 or number % 8 == 1
            hit, in_write = kill(command if way == "command" else forked, run_dir, whom, aimed, moment)
            assert hit, f"kill {number} came after the end; the run is too short"
            counts.update([f"{way}, {whom}", *["in a write"] * in_write, "all"])
            files = checkpoint_files(run_dir)
            reached.append(int(files[-1].stem) if files else 0)
            print(number, way, whom, "aimed at a write," * aimed, "in a write," * in_write, "at", reached[-1], flush=True)
        command.start(run_dir)
        assert command.wait() == 0, command.errors.read_text()[-2000:]
    finally:
        forked.close()
    print(dict(counts), f"{time.monotonic() - began:.0f} s, iterations reached: {reached}")
    assert counts["all"] >= KILLS and counts["in a write"] >= IN_WRITES, f"seed {seed}: {counts}"
    for name in (f"checkpoints/{ITERATIONS:08d}.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (run_dir / name).read_bytes(), f"{name} differs, seed {seed}, kills after {reached}"
    logs = [[e["iteration"] for e in read_log(d)] for d in (whole, run_dir)]  # an entry's loss is a mean since the last entry, or the resume
    assert logs[0] == logs[1]
    assert not [f for f in run_dir.rglob(".*-*-*.safetensors")], "what was half-written is gone"
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
