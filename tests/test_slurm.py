"""Runs as jobs of a real Slurm: pre-empted and requeued, adopted, cancelled, blocked; the results are those of the local executor."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from difiisr_dwt.checkpoints import checkpoint_files, read_checkpoint
from difiisr_dwt.processes import locked
from difiisr_dwt.runs import load_experiment

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmUser={user}
SlurmdUser={user}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,bf_interval=2,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""  # cred_expire: how long a requeued job waits, two minutes by default, five seconds at least
TRAIN = {
    "train": ["scenes:2"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64, "batch": 2, "iterations": 10, "warmup": 5,
    "validate_every": 1000, "checkpoint_every": 1000, "log_every": 5, "sigma_batches": 2,
    "model": {"network": {"channels": [16, 24], "blocks": 1}, "schedule": {"steps": 4}},
}
EVALUATE = {"data": ["scenes:1@2000000"], "steps": [1], "crop": 64, "grain": False, "pictures": False}


@pytest.fixture(scope="module")
def slurm():
    """A cluster of one machine, with daemons, key, ports and folder of its own; a function that asks it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    processes = []
    try:
        environment = _start(folder, processes)

        def ask(*words):
            run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
            assert run.returncode == 0, (words, run.stderr)
            return run.stdout

        ask.environment = environment
        yield ask
        subprocess.run(["scancel", f"--user={os.getuid()}"], env=environment, timeout=60)
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder, processes):
    """Start munge and Slurm; the environment of their clients. Skips where that is impossible, save where CI installed them."""

    def impossible(why):
        (pytest.fail if os.environ.get("DIFIISR_TEST_SLURM") else pytest.skip)(f"no Slurm: {why}")

    if lacking := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]:
        impossible(f"{', '.join(lacking)} not found (on Debian: apt-get install slurm-wlm munge)")
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    for name in ("spool", "state"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    host, user = socket.gethostname().partition(".")[0], os.popen("id -un").read().strip()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, host=host, user=user))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    environment |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]
    for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
        log = open(folder / f"{command[0]}.out", "wb")
        processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        if command is munge:
            wait_for(lambda: (folder / "munge.sock").exists(), 20, lambda: impossible("munged does not start"))
    ready = ["sinfo", "--noheader", "--format=%T"]
    wait_for(lambda: subprocess.run(ready, env=environment, capture_output=True, text=True).stdout.strip() == "idle", 40,
             lambda: impossible("its daemons do not start: " + (folder / "slurmd.log").read_text()[-500:]))  # fmt: skip
    return environment


def wait_for(condition, seconds=300.0, otherwise=None):
    """Wait until something holds, and return it."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            (otherwise or (lambda: pytest.fail("waited in vain")))()
        time.sleep(0.05)
    return value


@pytest.fixture
def difiisr(slurm, tmp_path):
    """A function that starts a command in a folder of its own; what still runs at the end is stopped."""
    started = []

    def start(*words):
        log = open(tmp_path / f"{len(started)}.log", "w+")
        process = subprocess.Popen(
            [sys.executable, "-m", "difiisr_dwt.cli", *map(str, words)], cwd=tmp_path, env=slurm.environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

        def said():
            return Path(log.name).read_text()

        process.said = said
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def logged(run_dir):
    """Whole lines of a training's log so far."""
    file = run_dir / "metrics.jsonl"
    return file.read_text().splitlines(keepends=True) if file.exists() else []


def iteration(line):
    return json.loads(line)["iteration"]


def job_of(run_dir):
    return wait_for(lambda: (run_dir / ".job" / "job").exists() and (run_dir / ".job" / "job").read_text().strip())


def record(run_dir):
    file = run_dir / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def preempt(slurm, run_dir, after):
    """Signal the job of a training some iterations after `after`; the iteration of its checkpoint, and the log up to it."""
    wait_for(lambda: any(line.endswith("\n") and iteration(line) > after for line in logged(run_dir)))
    slurm("scancel", "--batch", "--signal=USR2", job_of(run_dir))
    wait_for(lambda: record(run_dir).get("status") == "preempted")
    reached = read_checkpoint(run_dir)[1]["iteration"]
    return reached, [line for line in logged(run_dir) if iteration(line) <= reached]


def test_grid_survives_two_preemptions_and_equals_the_local_one(slurm, difiisr, tmp_path):
    """Four trainings, their evaluations and a comparison; the first job is pre-empted twice, the command once interrupted."""
    runs, names = [], [f"{size}{seed}" for size in ("small", "wide") for seed in (0, 1)]
    for name in names:
        params = TRAIN | {"seed": int(name[-1]), "iterations": 100 if name == "small0" else 10}
        params = params | {"model": TRAIN["model"] | {"network": {"channels": [16, 24 if name.startswith("small") else 32], "blocks": 1}}}
        runs.append({"name": name, "stage": "train", "params": params})
    runs += [{"name": f"judge_{name}", "stage": "evaluate", "params": EVALUATE | {"model": f"${{{name}.run_dir}}"}} for name in names]
    runs.append({"name": "compare", "params": {"runs": {name: f"${{judge_{name}.run_dir}}" for name in names}, "reference": "small0"}})
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"executor": {"time": "1:00:00", "cpus_per_task": 1}, "runs": runs}))
    planned = load_experiment(tmp_path / "grid.yaml")
    first = planned[0].run_dir(tmp_path / "cluster")
    command = ("run", "grid.yaml", "--root", "cluster", "--executor", "slurm")

    watching = difiisr(*command)
    local = difiisr("run", "grid.yaml", "--root", "local")
    once, before = preempt(slurm, first, 0)
    assert 0 < once < 100

    jobs = set(slurm("squeue", "--noheader", "--states=all", "--format=%i").split())
    assert len(jobs) == 9, "one job per run folder"
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130 and "the jobs go on" in watching.said() and f"scancel {job_of(first)}" in watching.said()
    again = difiisr(*command)
    wait_for(lambda: again.said().count("adopted, job") >= 5)

    twice, between = preempt(slurm, first, once)
    assert once < twice < 100, "it went on, and did not begin again"
    assert between[: len(before)] == before and iteration(between[len(before)]) > iteration(before[-1]), "nor was anything computed twice"

    assert again.wait(600) == 0, again.said()
    done = record(first)
    assert done["status"] == "finished" and done["restarts"] == 2 and done["job"] == job_of(first)
    log = next((first / ".job").glob("*.out")).read_text()
    assert log.count("requeued job") == 2 and f"pre-empted at iteration {twice}" in log
    assert set(slurm("squeue", "--noheader", "--states=all", "--format=%i").split()) == jobs, "nothing was submitted twice"

    assert local.wait(600) == 0, local.said()
    for run in planned:
        here, there = (run.run_dir(tmp_path / root) for root in ("local", "cluster"))
        summaries = [json.loads((folder / "metrics.json").read_text())["summary"] for folder in (here, there)]
        for summary in summaries:
            summary.pop("processor time (s)", None)
        assert summaries[0] == summaries[1], run.name
        for file in ("model.safetensors", "per_image.csv"):
            assert (here / file).exists() == (there / file).exists()
            assert not (here / file).exists() or (here / file).read_bytes() == (there / file).read_bytes(), (run.name, file)
        assert (here / "model.safetensors").exists() == (run.stage == "train")

    once_more = difiisr(*command)
    assert once_more.wait(60) == 0 and once_more.said().endswith("9 skipped in cluster\n")
    assert set(slurm("squeue", "--noheader", "--states=all", "--format=%i").split()) == jobs, "what is finished gets no job"


def toy(path, name, *cells):
    """A stage of a few lines."""
    cells = [nbformat.v4.new_code_cell(c) for c in cells]
    cells[0].metadata["tags"] = ["parameters"]
    path.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path / f"{name}.ipynb")


def test_failed_cancelled_and_preempted_too_often(slurm, difiisr, tmp_path):
    """A failing run blocks what needs it, `scancel` leaves a checkpoint and no kernel, and a job asks again only so often."""
    toy(tmp_path / "nbs" / "stages", "fail", "up = ''\nrun_dir = ''", "raise ValueError('no such luck')")
    runs = [
        {"name": "bad", "stage": "fail"},
        {"name": "next", "stage": "fail", "params": {"up": "${bad.run_dir}"}},
        {"name": "last", "stage": "fail", "params": {"up": "${next.run_dir}"}},
        {"name": "cancelled", "stage": "train", "params": TRAIN | {"iterations": 5000}},
        {"name": "stubborn", "stage": "train", "params": TRAIN | {"iterations": 5001}, "executor": {"requeues": 0}},
    ]
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"runs": runs}))
    bad, following, last, cancelled, stubborn = load_experiment(tmp_path / "e.yaml")
    process = difiisr("run", "e.yaml", "--executor", "slurm")
    reports = tmp_path / "reports"
    for run, words in ((cancelled, []), (stubborn, ["--batch", "--signal=USR2"])):
        wait_for(lambda run=run: logged(run.run_dir(reports)))
        slurm("scancel", *words, job_of(run.run_dir(reports)))
    assert process.wait(120) == 75, process.said()
    said = process.said()
    assert "ValueError: no such luck" in said and "the last lines of reports/fail" in said
    assert f"next (fail/{following.run_id}): blocked, job {job_of(following.run_dir(reports))}: not run, it needs fail/{bad.run_id}" in said
    assert f"last (fail/{last.run_id}): blocked" in said and f"it needs fail/{following.run_id}" in said
    assert "1 failed, 2 blocked, 1 cancelled, 1 preempted in reports" in said
    assert f"cancelled (train/{cancelled.run_id}): cancelled" in said and "the limit of `requeues`" in said
    for run in (cancelled, stubborn):
        run_dir = run.run_dir(reports)
        (file,) = checkpoint_files(run_dir)
        assert read_checkpoint(run_dir)[1]["iteration"] > 0 and record(run_dir)["status"] == "preempted"
        with locked(run_dir / ".kernel.lock") as holder:
            assert holder is None, "no kernel is left"
        written = file.stat().st_mtime_ns, len(logged(run_dir))
        time.sleep(0.5)
        assert written == (file.stat().st_mtime_ns, len(logged(run_dir))), "and nothing is written any more"


def test_what_slurm_refuses_is_one_sentence(slurm, difiisr, tmp_path):
    """A partition that is not there, an unknown key."""
    toy(tmp_path / "nbs" / "stages", "one", "run_dir = ''")
    (tmp_path / "e.yaml").write_text("stage: one\n")
    for words, expected in (("partition=moon", "invalid partition specified: moon"), ("partion=moon", "did you mean 'executor.partition'?")):
        process = difiisr("run", "e.yaml", "--executor", "slurm", "--slurm", words)
        assert process.wait(60) == 2
        (line,) = process.said().splitlines()
        assert line.startswith("difiisr run: ") and expected in line
