"""Several runs at once, the commands `train` and `evaluate`, and mistakes, without a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from difiisr_dwt import cli, executors, slurm
from difiisr_dwt.runs import ExperimentError, load_stage

PARAMETERS = "iterations = 100\nprocesses = 1\nseconds = 0.0\nup = []\nrun_dir = ''"
WORK = """
import json, pathlib, time
here = pathlib.Path(run_dir)
(here / 'began').write_text(str(time.time()))
for folder in up:
    assert pathlib.Path(folder, 'metrics.json').exists(), 'too early'
assert iterations != 13, 'thirteen is too many'
time.sleep(seconds)
(here / 'metrics.json').write_text(json.dumps({'summary': {'processes': processes, 'iterations': iterations, 'ended': time.time()}}))
"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """Stages `train` and `evaluate` of a few lines, in the working directory."""
    folder = tmp_path / "nbs" / "stages"
    folder.mkdir(parents=True)
    for name in ("train", "evaluate"):
        cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(WORK)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words):
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "difiisr_dwt.cli", *words], env=env, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip


def test_two_at_once_in_the_order_that_they_need(repo):
    """Independent runs overlap, a failing one blocks its own dependents only, and a second call skips what is finished."""
    (repo / "e.yaml").write_text("""
runs:
  - {name: a, stage: train, params: {seconds: 4, iterations: 1}}
  - {name: b, stage: train, params: {seconds: 4, iterations: 2}}
  - {name: bad, stage: train, params: {iterations: 13}}
  - {name: both, stage: evaluate, params: {up: ['${a.run_dir}', '${b.run_dir}']}}
  - {name: lost, stage: evaluate, params: {up: ['${bad.run_dir}']}}
""")
    process = start("run", "e.yaml", "--jobs", "2")
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 1 and "3 finished, 1 failed, 1 blocked in reports" in said
    assert "thirteen is too many" in said and "blocked: not run, it needs train/" in said
    found = {json.loads(p.read_text())["name"]: p.parent for p in (repo / "reports").glob("*/*/run.json")}
    began = {name: float((folder / "began").read_text()) for name, folder in found.items()}
    ended = {name: json.loads((folder / "metrics.json").read_text())["summary"]["ended"] for name, folder in found.items() if name != "bad"}
    assert max(began["a"], began["b"]) < min(ended["a"], ended["b"]) and began["both"] > max(ended["a"], ended["b"])
    again = start("run", "e.yaml", "--jobs", "2")
    assert "3 skipped, 1 failed, 1 blocked" in again.communicate(timeout=60)[1]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_every_run(repo, number, code):
    """All notebooks end, the rest does not begin."""
    (repo / "e.yaml").write_text("stage: train\nparams: {seconds: 600}\ngrid: {iterations: [1, 2, 3]}\n")
    process = start("run", "e.yaml", "--jobs", "2")
    until = time.monotonic() + 120
    while len(list((repo / "reports").glob("*/*/began"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    records = [json.loads(p.read_text()) for p in (repo / "reports").glob("*/*/run.json")]
    assert [r["status"] for r in records] == ["failed" if code == 130 else "preempted"] * 2
    assert not list((repo / "reports").glob("*/*/metrics.json"))


def test_train_takes_an_experiment_or_its_parameters(repo, capfd):
    """A plain mapping and an experiment of one run are one run; words of the command line come last, options between them."""
    (repo / "plain.yaml").write_text("iterations: 7\nprocesses: 3\n")
    (repo / "e.yaml").write_text("stage: train\nparams: {iterations: 7}\nexecutor: {time: 2:00:00}\n")
    assert cli.main(["train", "plain.yaml", "--launch", "2", "iterations=9"]) == 0
    (metrics,) = (repo / "reports" / "train").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["summary"]["processes"] == 2 and json.loads(metrics.read_text())["summary"]["iterations"] == 9
    assert cli.main(["train", "e.yaml", "iterations=9", "--launch", "2"]) == 0, "skipped"
    assert "1 skipped" in capfd.readouterr().err
    assert load_stage("e.yaml", "train")[0].executor == {"time": "2:00:00"}, "not the number 7200"
    assert cli.main(["evaluate", "plain.yaml"]) == 0 and len(list((repo / "reports" / "evaluate").glob("*/metrics.json"))) == 1


@pytest.mark.parametrize(("words", "expected"), [
    (["train", "grid.yaml"], "describes 2 runs; use `difiisr run grid.yaml`"),
    (["evaluate", "e.yaml"], "a run of the stage 'train', not 'evaluate'"),
    (["train", "typo.yaml"], "did you mean 'iterations'?"),
    (["train", "e.yaml", "iteration=3"], "did you mean 'iterations'?"),
    (["train", "missing.yaml"], "cannot be read"),
    (["run", "e.yaml", "--slurm", "time=5"], "--slurm has no meaning with --executor local"),
    (["run", "e.yaml", "--no-wait"], "--no-wait has no meaning"),
    (["run", "e.yaml", "--executor", "slurm", "--jobs", "2"], "--jobs has no meaning"),
    (["run", "e.yaml", "--executor", "slurm", "--slurm", "memory=5"], "unknown key 'executor.memory'"),
    (["run", "e.yaml", "--executor", "slurm", "--slurm", "requeues=-1"], "must not be negative"),
    (["run", "asks.yaml"], "did you mean 'executor.partition'?"),
    (["run", "word.yaml"], "`executor` must map"),
    (["run", "e.yaml", "--executor", "slurm"], "no Slurm here"),
])  # fmt: skip
def test_mistakes(repo, monkeypatch, capsys, words, expected):
    """One sentence each, and nothing is started."""
    for name, text in {
        "e": "stage: train\n", "grid": "stage: train\ngrid: {iterations: [1, 2]}\n", "typo": "iteration: 3\n",
        "asks": "stage: train\nexecutor: {partitoin: gpu}\n", "word": "stage: train\nexecutor: slurm\n",
    }.items():  # fmt: skip
        (repo / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("PATH", str(repo))
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"difiisr {words[0]}: ") and expected in line
    assert not list((repo / "reports").glob("*/*")), "nothing was started"


def test_submitit_is_an_extra(monkeypatch):
    """Where it is missing, the sentence names what to install."""
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(slurm.SlurmError, match=r"pip install 'difiisr_dwt\[slurm\]'"):
        slurm.submit(print, (), Path("."), "x", slurm.Resources())


def test_a_training_on_two_machines_asks_for_them(repo):
    """`nodes` of the training are those of the job; another number is a contradiction."""
    notebook = nbformat.read(repo / "nbs/stages/train.ipynb", 4)
    notebook.cells[0].source = notebook.cells[0].source.replace("processes = 1", "processes = 1\nnodes = 1")
    nbformat.write(notebook, repo / "nbs/stages/train.ipynb")
    (repo / "plain.yaml").write_text("nodes: 2\nprocesses: 4\n")
    runs = {"plain.yaml": load_stage("plain.yaml", "train")}
    (step,) = executors.plan(runs, repo)
    options = slurm.sbatch_options(step.resources)
    assert (options["nodes"], options["ntasks_per_node"], options["cpus_per_task"]) == (2, 1, 4)
    with pytest.raises(ExperimentError, match="leave the former out"):
        executors.plan(runs, repo, {"nodes": 1})
