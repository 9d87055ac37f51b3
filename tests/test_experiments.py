"""The runner with real processes: kills, locks, other kernels; and experiment files that cannot be meant."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from difiisr_dwt.experiments import parse_overrides, run_command, run_experiment
from difiisr_dwt.runs import ExperimentError, find_stage, load_experiment, stage_parameters

ROOT = Path(__file__).resolve().parents[1]
WRITE = "import json, pathlib\npathlib.Path(run_dir, 'metrics.json').write_text(json.dumps({'summary': %s}))"


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A function that writes a stage into a repository in tmp_path, which is the working directory."""
    (tmp_path / "nbs" / "stages").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def stage(name, *cells, metrics="{}", folder="nbs/stages"):
        cells = [*cells, WRITE % metrics] if metrics else cells
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell("some words"))
        notebook.cells[0].metadata["tags"] = ["parameters"]
        (tmp_path / folder).mkdir(exist_ok=True)
        nbformat.write(notebook, tmp_path / folder / f"{name}.ipynb")

    stage.path = tmp_path
    stage(
        "train",
        "iterations = 100\nlr = 1e-3\nseed: int = 0\nnote = ''\nunet = {'channels': [8, 16], 'blocks': 2}\nrun_dir = ''",
    )
    return stage


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def experiment(repo, content, name="e.yaml"):
    return write(repo.path / name, content)


# reading


def test_defaults_are_part_of_the_name_and_run_dir_is_not(repo):
    path = experiment(repo, {"stage": "train", "params": {"lr": 0.01}})
    (run,) = load_experiment(path)
    assert run.params == {
        "iterations": 100,
        "lr": 0.01,
        "seed": 0,
        "note": "",
        "unet": {"channels": [8, 16], "blocks": 2},
    }
    (same,) = load_experiment(
        experiment(repo, {"stage": "train", "params": {"lr": 0.01, "iterations": 100.0, "seed": 0}})
    )
    assert same.run_id == run.run_id and run.resolved("r")["run_dir"] == str(repo.path / "r" / "train" / run.run_id)
    repo(
        "train",
        "iterations = 200\nlr = 1e-3\nseed = 0\nnote = ''\nunet = {'channels': [8, 16], 'blocks': 2}\nrun_dir = ''",
    )
    assert load_experiment(experiment(repo, {"stage": "train", "params": {"lr": 0.01}}))[0].run_id != run.run_id


def test_run_id_does_not_depend_on_the_place(repo, tmp_path_factory):
    content = "runs: [{name: train}, {name: t2, stage: train, params: {note: '${train.run_dir}/model'}}]"
    here = load_experiment(experiment(repo, content))
    assert here[1].params["note"] == f"${{root}}/train/{here[0].run_id}/model"
    assert here[1].resolved("/elsewhere")["note"] == f"/elsewhere/train/{here[0].run_id}/model"
    assert here[1].needs == [("train", here[0].run_id)] and here[0].needs == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stage": "train", "params": {"iteration": 1}}, "unknown parameter 'iteration'; did you mean 'iterations'?"),
        (
            {"stage": "train", "params": {"unet.chanels": [1]}},
            "unknown parameter 'unet.chanels'; did you mean 'unet.channels'?",
        ),
        ({"stage": "train", "params": {"unet": {"block": 1}}}, "did you mean 'unet.blocks'?"),
        ({"stage": "train", "params": {"run_dir": "x"}}, "unknown parameter 'run_dir'"),
        ({"stage": "train", "grid": {"sed": [1]}}, "did you mean 'seed'?"),
        ({"stage": "train", "grid": {"seed": 1}}, "lists of values"),
        ({"stage": "train", "grid": {"seed": []}}, "lists of values"),
        ({"stage": "train", "params": {"iterations": "many"}}, "'iterations' must be like its default 100, not 'many'"),
        ({"stage": "train", "params": {"iterations": 1.5}}, "must be like its default 100"),
        ({"stage": "train", "params": {"iterations": True}}, "must be like its default 100"),
        ({"stage": "train", "params": {"unet.channels": 3}}, "must be like its default [8, 16]"),
        ({"stage": "train", "params": [1]}, "must be a mapping"),
        ("stage: train\nparams: {note: 2026-01-01}", "quote it"),
        ("stage: train\nparams: {seed: 1, seed: 2}", "key 'seed' appears twice"),
        ("stage: train\nparams: {seed: .inf}", "must be like its default 0"),
        ("stage: [", "not readable as YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ({"stage": "trian"}, "unknown stage 'trian'; did you mean 'train'?"),
        ({"stage": "../stages/train"}, "unknown stage"),
        ({"stage": "train", "parms": {}}, "unknown key 'parms'; did you mean 'params'?"),
        ({"params": {}}, "needs `stage: NAME`"),
        ({"base": "missing.yaml"}, "cannot be read"),
        ({"base": "e.yaml"}, "goes in a circle: e.yaml -> e.yaml"),
        ({"runs": [{"name": "a", "stage": "train"}, {"name": "a", "stage": "train"}]}, "its own `name`"),
        ({"runs": [{"name": "a b", "stage": "train"}]}, "its own `name`"),
        ({"runs": [{"stage": "train"}], "params": {"seed": 1}}, "belong into each of them"),
        ({"runs": [{"stage": "train", "grid": {"seed": [1]}}]}, "unknown key 'grid'"),
        ({"runs": {"train": {}}}, "must be a list of runs"),
        (
            {"runs": [{"stage": "train", "params": {"note": "${train.run_dir}"}}]},
            "${train.run_dir} in run 'train' names no earlier run",
        ),
        (
            {"runs": [{"stage": "train"}, {"name": "b", "stage": "train", "params": {"note": "${train.dir}"}}]},
            "`run_dir` and `run_id`",
        ),
        ({"stage": "train", "params": {"note": "${HOME}"}}, "names no earlier run"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(repo, capsys, content, message):
    path = experiment(repo, content)
    with pytest.raises(ExperimentError) as error:
        load_experiment(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert run_command([path]) == 2 and message in capsys.readouterr().err
    assert not (repo.path / "reports").exists(), "nothing was started"


def test_base_merges_deeply_and_a_value_replaces_an_axis(repo):
    (repo.path / "sub").mkdir()
    write(
        repo.path / "base.yaml",
        "stage: train\nparams: {iterations: 5, unet: {blocks: 3}}\ngrid: {seed: [0, 1], lr: [1e-3, 1e-4]}",
    )
    path = write(
        repo.path / "sub" / "child.yaml",
        "base: ../base.yaml\nparams: {seed: 7, unet.channels: [4]}\ngrid: {lr: [1e-2]}",
    )
    (run,) = load_experiment(path)
    assert run.params == {"iterations": 5, "lr": 0.01, "seed": 7, "note": "", "unet": {"channels": [4], "blocks": 3}}
    assert run.name == "train lr=0.01"
    assert len(load_experiment(repo.path / "base.yaml")) == 4
    assert [r.params["lr"] for r in load_experiment(repo.path / "base.yaml", {"lr": 2, "seed": 0})] == [2.0]


def test_circle_over_two_files(repo):
    experiment(repo, {"base": "b.yaml"}, "a.yaml")
    with pytest.raises(ExperimentError, match="a.yaml -> b.yaml -> a.yaml"):
        load_experiment(experiment(repo, {"base": "a.yaml"}, "b.yaml").with_name("a.yaml"))


def test_chain_on_a_base_with_overrides_and_a_grid(repo):
    repo("evaluate", "model = ''\nseed = 0\nrun_dir = ''")
    experiment(repo, "stage: train\nparams: {iterations: 7}", "small.yaml")
    experiment(
        repo,
        "runs:\n- {name: train, base: small.yaml, params: {seed: 3}}\n"
        "- {name: evaluate, params: {model: '${train.run_dir}/m', seed: 3}}\n",
        "chain.yaml",
    )
    train, evaluate = load_experiment(repo.path / "chain.yaml")
    assert train.params["iterations"] == 7 and train.params["seed"] == 3 and evaluate.stage == "evaluate"
    long = experiment(
        repo,
        "base: chain.yaml\nruns: [{name: train, params: {iterations: 900}}]\ngrid: {evaluate.seed: [0, 1]}",
        "long.yaml",
    )
    runs = load_experiment(long)
    assert [r.name for r in runs] == ["train seed=0", "evaluate seed=0", "evaluate seed=1"], (
        "the train run is one, listed once"
    )
    assert runs[0].params["iterations"] == 900 and runs[0].params["seed"] == 3
    assert [r.params["seed"] for r in load_experiment(long, {"seed": 5, "evaluate.seed": 6})] == [5, 6]
    with pytest.raises(ExperimentError, match="did you mean 'train.iterations'"):
        load_experiment(long, {"train.iteration": 5})


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("x = 1", "lacks `run_dir = ''`"),
        ("import os\nrun_dir = ''", "`import os`"),
        ("x = 2 * 3\nrun_dir = ''", "`x = 2 * 3`"),
        ("x = f()\nrun_dir = ''", "`x = f()`"),
        ("x, y = 1, 2\nrun_dir = ''", "is not `name = literal`"),
        ("x: int\nrun_dir = ''", "is not `name = literal`"),
    ],
)
def test_parameters_cell(repo, cell, message):
    repo("odd", cell)
    with pytest.raises(ExperimentError, match="odd.ipynb") as error:
        stage_parameters(find_stage("odd"))
    assert message in str(error.value)


def test_parameters_cell_accepts_every_literal(repo):
    repo("good", "a = -1\nb: float = 1e-3\nc = None\nd = ('x', 2)\ne = {'k': [True, {}]}\nrun_dir = ''")
    assert stage_parameters(find_stage("good")) == {
        "a": -1,
        "b": 1e-3,
        "c": None,
        "d": ["x", 2],
        "e": {"k": [True, {}]},
    }


def test_stage_of_data_prep_and_no_stage_at_all(repo, tmp_path_factory, monkeypatch):
    repo("prepare", "run_dir = ''", folder="data_prep")
    assert find_stage("prepare").parent.name == "data_prep"
    code = "import os; os.chdir('/'); from difiisr_dwt import runs; runs.__file__ = '/nowhere/runs.py'; runs.find_stage('train')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "the installed package has none, a clone of the repository has" in done.stderr


def test_overrides():
    assert parse_overrides(["a=1e-4", "b.c=[1, 2]", "d=", "e=x=y"]) == {"a": 1e-4, "b.c": [1, 2], "d": None, "e": "x=y"}
    with pytest.raises(ExperimentError, match="write it as key=value"):
        parse_overrides(["seed"])


# running


def test_odd_values_arrive_as_they_are(repo):
    text = 'it\'s "q" {curly} \\n ü \n line ${'
    repo(
        "echo",
        "text = ''\nitems = []\nrun_dir = ''",
        metrics="{'text': text, 'items': items, 'cwd': str(pathlib.Path.cwd())}",
    )
    items = [1, None, True, {"a": [0.5]}, -1e-9]
    path = experiment(repo, {"stage": "echo", "params": {"text": text, "items": items}})
    root = repo.path / "re{po}rts ü"
    (result,) = run_experiment(path, root)
    assert result.status == "finished", result.message
    summary = json.loads((result.run_dir / "metrics.json").read_text())["summary"]
    assert summary == {"text": text, "items": items, "cwd": str(repo.path)}
    assert yaml.safe_load((result.run_dir / "params.yaml").read_text(encoding="utf-8")) == {
        "text": text,
        "items": items,
    }
    assert sorted(p.name for p in result.run_dir.iterdir()) == [
        ".kernel.lock", ".lock", "figures", "metrics.json", "notebook.ipynb", "params.yaml", "run.json"]  # fmt: skip
    assert run_experiment(path, root)[0].status == "skipped"


def test_failure_names_cell_and_reason_and_blocks_what_needs_it(repo, capsys):
    repo("bad", "x = 1\nrun_dir = ''", "# a comment first\ny = x / 0\nprint(y)")
    repo("next", "model = ''\nrun_dir = ''")
    path = experiment(
        repo,
        {
            "runs": [
                {"stage": "bad"},
                {"stage": "next", "params": {"model": "${bad.run_dir}"}},
                {"name": "free", "stage": "next"},
            ]
        },
    )
    assert run_command([path]) == 1
    err = capsys.readouterr().err
    assert "cell 3 of 4 `y = x / 0` (In [3]): ZeroDivisionError: division by zero" in err
    assert "1 finished, 1 failed, 1 blocked" in err
    bad, blocked, free = run_experiment(path)
    assert (bad.status, blocked.status, free.status) == ("failed", "blocked", "skipped")
    assert (bad.run_dir / "notebook.failed.ipynb").exists() and not (bad.run_dir / "notebook.ipynb").exists()
    assert json.loads((bad.run_dir / "run.json").read_text())["error"] == bad.message
    repo("bad", "x = 1\nrun_dir = ''", "y = x / 1")
    assert [r.status for r in run_experiment(path)] == ["finished", "finished", "skipped"]
    assert not (bad.run_dir / "notebook.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("pass", "without writing metrics.json"),
        ("open(run_dir + '/metrics.json', 'w').write('{')", "not JSON"),
        ("open(run_dir + '/metrics.json', 'w').write('[]')", "not a JSON object"),
        ("import os; os._exit(3)", "the kernel died"),
        ("raise SystemExit", "without writing metrics.json"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_runs_that_end_badly(repo, cell, message):
    repo("bad", "run_dir = ''", cell, metrics=None)
    (result,) = run_experiment(experiment(repo, {"stage": "bad"}))
    assert result.status == "failed" and message in result.message
    assert (result.run_dir / "notebook.failed.ipynb").exists() and not result.run.finished()


def test_a_newer_needed_run_makes_a_run_again(repo):
    repo("next", "model = ''\nrun_dir = ''")
    path = experiment(repo, {"runs": [{"stage": "train"}, {"stage": "next", "params": {"model": "${train.run_dir}"}}]})
    train, _ = run_experiment(path)
    (train.run_dir / "metrics.json").unlink()
    time.sleep(1.1)
    assert [r.status for r in run_experiment(path)] == ["finished", "finished"]
    assert [r.status for r in run_experiment(path)] == ["skipped", "skipped"]


def test_other_files_of_the_folder_stay_for_a_resumed_run(repo):
    repo(
        "resume",
        "run_dir = ''",
        "p = run_dir + '/state'\nimport os\nseen = os.path.exists(p)\nopen(p, 'w').close()\nassert seen",
    )
    path = experiment(repo, {"stage": "resume"})
    assert run_experiment(path)[0].status == "failed"
    assert run_experiment(path)[0].status == "finished"


def test_kernel_is_this_interpreter_whatever_is_registered(repo, monkeypatch):
    kernels = repo.path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(repo.path / "jupyter"))
    repo("who", "run_dir = ''", "import sys", metrics="sys.executable")
    (result,) = run_experiment(experiment(repo, {"stage": "who"}))
    assert result.status == "finished", result.message
    assert json.loads((result.run_dir / "metrics.json").read_text())["summary"] == sys.executable


def test_unwritable_root(repo, capsys):
    (repo.path / "file").write_text("")
    assert run_command([experiment(repo, {"stage": "train"})], root=repo.path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


# processes

SLOW = ["run_dir = ''\nt = 60", "import os, time\nopen(run_dir + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(t)"]


def start(repo, path):
    code = f"import sys; from difiisr_dwt.experiments import run_command; sys.exit(run_command([{str(path)!r}]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=repo.path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest runs in the background
    )
    (run,) = load_experiment(path)
    file = run.run_dir() / "pid"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    return process, run, int(file.read_text())


def gone(pid, seconds=15):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR2, 75)])
def test_signals_stop_the_kernel_and_mark_the_run(repo, number, code):
    repo("slow", *SLOW)
    process, run, kernel = start(repo, experiment(repo, {"stage": "slow"}))
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "experiments.py" not in err, err
    assert gone(kernel)
    status, words = ("failed", "interrupted") if number == signal.SIGINT else ("preempted", "pre-empted by " + number.name)
    assert json.loads((run.run_dir() / "run.json").read_text())["status"] == status
    assert (run.run_dir() / f"notebook.{status}.ipynb").exists() and words in err


def test_lock_keeps_a_second_process_away_and_ends_with_a_killed_one(repo, capsys):
    repo("slow", *SLOW)
    path = experiment(repo, {"stage": "slow"})
    process, run, kernel = start(repo, path)
    (busy,) = run_experiment(path)
    assert busy.status == "busy" and str(process.pid) in busy.message
    assert run_command([path]) == 1
    process.kill()
    process.wait()
    assert gone(kernel), "the kernel ends with the process that started it"
    process.stderr.close()
    repo("slow", "run_dir = ''\nt = 60", "pass")
    assert run_experiment(path)[0].status == "finished", "the lock of a killed process does not count"


def test_progress_bars_to_a_file_leave_their_last_state(repo):
    repo(
        "bar",
        "run_dir = ''",
        "import sys\nfor i in range(5): sys.stderr.write(f'\\rstep {i}'); sys.stderr.flush()\nsys.stderr.write('\\n')\nprint('done')",
    )
    path = experiment(repo, {"stage": "bar"})
    code = f"import sys; from difiisr_dwt.experiments import run_command; sys.exit(run_command([{str(path)!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repo.path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0 and "step 4\n" in done.stderr and "step 3" not in done.stderr and "\ndone\n" in done.stderr
    )
    (run,) = load_experiment(path)
    outputs = nbformat.read(run.run_dir() / "notebook.ipynb", 4).cells[3].outputs
    assert "step 3" not in json.dumps(outputs) and "step 4" in json.dumps(outputs)
