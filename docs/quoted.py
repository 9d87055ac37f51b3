"""Published runs: which there are, whether they are what today's notebooks would make, and the numbers quoted from them.

Text of README, site and model card names a number as `{{ psnr("m3fd", "1 step") }}`; it is looked up here, never typed.
"""
import contextlib
import fnmatch
import functools
import json
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "reports/published"
STALE = ROOT / "docs/stale.yaml"
sys.path.insert(0, str(ROOT))

from difiisr_dwt.experiments import code_hash  # noqa: E402
from difiisr_dwt.runs import Run, find_stage, load_experiment, stage_parameters  # noqa: E402


@dataclass(frozen=True)
class Published:
    """One run folder of reports/published."""

    folder: Path
    params: dict[str, Any]
    record: dict[str, Any]  # run.json
    metrics: dict[str, Any]

    @property
    def path(self) -> str:
        """As `docs/stale.yaml` names it."""
        return self.folder.relative_to(PUBLISHED).as_posix()

    @property
    def stage(self) -> str:
        """Name of its stage."""
        return self.folder.parent.name

    @property
    def notebook(self) -> Path | None:
        """The executed notebook; None where only the numbers were published."""
        file = self.folder / "notebook.ipynb"
        return file if file.is_file() else None

    @property
    def root(self) -> str:
        """What stands behind --root in its command."""
        return self.folder.parents[1].relative_to(ROOT).as_posix()

    @functools.cached_property
    def experiment(self) -> str | None:
        """The experiment file of the repository that describes exactly this run; None where none does."""
        for file in sorted((ROOT / "nbs/experiments").glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            if re.search(rf"\b{self.stage}\b", text) and self.folder.name in {r.run_id for r in load_experiment(file)}:
                return file.name
        return None

    @property
    def command(self) -> str:
        """What makes this run again."""
        if self.experiment:
            return f"difiisr run nbs/experiments/{self.experiment} --root {self.root}"
        return f"difiisr run again.yaml --root {self.root}"

    @property
    def command_today(self) -> str:
        """`command`; where today's stage has other parameters, that of the experiment file that made the run, as it is now."""
        file = self.record.get("experiment")
        if not self.experiment and file and (ROOT / "nbs/experiments" / file).is_file():
            return f"difiisr run nbs/experiments/{file} --root {self.root}"
        return self.command

    @property
    def experiment_text(self) -> str:
        """again.yaml: an experiment file of this one run, for where the repository has none."""
        return yaml.safe_dump({"stage": self.stage, "params": self.params}, sort_keys=False, allow_unicode=True)

    def differs(self) -> list[str]:
        """What is no longer as it was when the run was made: `code`, `parameters`, or `record` where none was kept."""
        found = []
        notebook = find_stage(self.stage, ROOT)
        if "code" not in self.record:
            found.append("record")
        elif self.record["code"] != code_hash(notebook):
            found.append("code")
        if set(self.params) != set(stage_parameters(notebook)):
            found.append("parameters")
        return found


def published() -> list[Published]:
    """Every published run, in the order of paths."""
    def read(file: Path) -> dict:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    return [Published(f.parent, yaml.safe_load(f.read_text(encoding="utf-8")), read(f.parent / "run.json"), read(f.parent / "metrics.json"))
            for f in sorted(PUBLISHED.rglob("params.yaml"))]


def stale_entries() -> dict[str, dict[str, Any]]:
    """docs/stale.yaml: a path or pattern of run folders, what differs in them, and why they are kept."""
    return yaml.safe_load(STALE.read_text(encoding="utf-8")) or {}


def why_stale(run: Published) -> str | None:
    """The listed reason; None for a run that is today's, or is not listed."""
    return next((e["reason"] for pattern, e in stale_entries().items() if fnmatch.fnmatch(run.path, pattern)), None)


def problems() -> list[str]:
    """Published runs that are not what their name or today's notebooks say, save those listed with exactly that."""
    found, used, listed = [], set(), stale_entries()
    for run in published():
        if Run(run.stage, run.params).run_id != run.folder.name:
            found.append(f"{run.path}: its params.yaml is not the one that its name is the hash of")
        if run.record and (run.record.get("run_id"), run.record.get("status")) != (run.folder.name, "finished"):
            found.append(f"{run.path}: its run.json is of another run, or of one that did not finish")
        patterns = [p for p in listed if fnmatch.fnmatch(run.path, p)]
        used |= set(patterns)
        differs, said = run.differs(), [listed[p]["differs"] for p in patterns]
        if said != ([differs] if differs else []):
            found.append(f"{run.path}: differs from today's notebook in {differs or 'nothing'}, docs/stale.yaml says {said or 'nothing'}: "
                         f"run it again ({run.command}), or list it there with a reason")
    return found + [f"docs/stale.yaml: {p} names no published run" for p in listed if p not in used]


@functools.cache
def _rows(kernel: str, model: str = "compact", told: str = "") -> dict[tuple[str, str], dict[str, Any]]:
    """(set, method): the row of the newest evaluation of a model at a kernel, told the true one where `told` is empty."""
    runs = [r for r in published() if r.stage == "evaluate"
            and (r.params["model"], r.params["kernel"], r.params.get("told", "")) == (model, kernel, told)
            and not any(r.params.get(key) for key in ("crop", "limit", "lr"))]  # all images, whole
    return {(row["set"], row["method"]): row for run in sorted(runs, key=lambda r: r.record["started"]) for row in run.metrics["rows"]}


def value(name: str, data: str, method: str, kernel: str = "bicubic", model: str = "compact", told: str = "") -> float:
    """One measured number of shipped weights, such as `psnr` of `1 step` on `m3fd`; KeyError where it was not published."""
    return _rows(kernel, model, told)[data, method][name]


def psnr(data: str, method: str, kernel: str = "bicubic", model: str = "compact", told: str = "") -> str:
    """PSNR in dB as text."""
    return f"{value('psnr', data, method, kernel, model, told):.2f}"


def lpips(data: str, method: str, kernel: str = "bicubic", model: str = "compact", told: str = "") -> str:
    """LPIPS (alex) as text."""
    return f"{value('lpips', data, method, kernel, model, told):.3f}"


def results_table(model: str = "compact", kernel: str = "bicubic", told: str = "") -> str:
    """The table of README and model card: PSNR / LPIPS of every method on every set."""
    rows = _rows(kernel, model, told)
    methods, sets = (list(dict.fromkeys(key[i] for key in rows)) for i in (1, 0))
    lines = ["| | " + " | ".join(f"{name}, {rows[name, methods[0]]['images']}" for name in sets) + " |", "|---" * (len(sets) + 1) + "|"]
    lines += [f"| {m} | " + " | ".join("{psnr:.2f} / {lpips:.3f}".format_map(rows[s, m]) for s in sets) + " |" for m in methods]
    return "\n".join(lines)


def structure_table(methods: list[tuple[str, str]]) -> str:
    """Grain-fair LPIPS / gradient magnitude similarity deviation of (model, method) on every set that all were judged on."""
    rows = {model: _rows("bicubic", model) for model, _ in methods}
    sets = [name for name in dict.fromkeys(key[0] for key in rows[methods[0][0]]) if all((name, m) in rows[model] for model, m in methods)]
    lines = ["| | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    lines += [f"| {model}, {m} | " + " | ".join("{grain_fair:.3f} / {gmsd:.4f}".format_map(rows[model][s, m]) for s in sets) + " |" for model, m in methods]
    return "\n".join(lines)


@functools.cache
def costs(system: str = "original") -> dict[str, Any]:
    """A system's row of the published `costs` run; `codec` keys are the sum of encoder and decoder."""
    (run,) = [r for r in published() if r.stage == "costs"]
    row = next(r for r in run.metrics["rows"] if r["system"] == system)
    return row | {f"{what} codec": row[f"{what} encoder"] + row[f"{what} decoder"] for what in ("parameters", "macs", "seconds")}


@functools.cache
def _header(model: str) -> dict[str, Any]:
    with open(ROOT / f"difiisr_dwt/weights/{model}.safetensors", "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def configured(key: str, model: str = "compact") -> Any:
    """What a shipped model's configuration says of itself."""
    return json.loads(_header(model)["__metadata__"]["difiisr_dwt"])["config"][key]


def parameters(model: str = "compact") -> int:
    """Parameters of a shipped model's networks for chain and mean, as its file's header tells."""
    shapes = [entry["shape"] for name, entry in _header(model).items() if name != "__metadata__" and name.startswith(("network.", "mean."))]
    return sum(functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes)


_CURRENT: list[Published] = []  # the run that an empty pattern means


@contextlib.contextmanager
def current(run: Published) -> Iterator[None]:
    """While this lasts, lookups with the pattern `""` read this run."""
    _CURRENT.append(run)
    try:
        yield
    finally:
        _CURRENT.pop()


@functools.cache
def _finished() -> tuple[Published, ...]:
    return tuple(sorted((r for r in published() if r.metrics), key=lambda r: r.record.get("started", "")))


def find_run(pattern: str, missing_ok: bool = False) -> Published | None:
    """The newest published run that fits a pattern such as `costs/*`, or `evaluate/*@NAME` with its name or title; LookupError if none."""
    if not pattern and _CURRENT:
        return _CURRENT[-1]
    path, _, name = pattern.partition("@")
    fitting = [r for r in _finished() if fnmatch.fnmatch(r.path, path) and name in ("", r.record.get("name"), r.metrics.get("title"))]
    if not fitting and not missing_ok:
        raise LookupError(f"no published run fits {pattern!r}")
    return fitting[-1] if fitting else None


def metric(pattern: str, *path: str | int | dict[str, Any]) -> Any:
    """A value of a run's metrics.json: keys, indices, and `{"system": "packet"}` for the first entry of a list that has these values."""
    run = find_run(pattern)
    at: Any = run.metrics
    for step in path:
        try:
            at = next(e for e in at if all(e.get(k) == v for k, v in step.items())) if isinstance(step, dict) else at[step]
        except (KeyError, IndexError, TypeError, StopIteration):
            raise LookupError(f"metrics.json of {run.path} has no {' / '.join(map(str, path))}") from None
    return at


def table(pattern: str, title: str, row: str | list, column: str) -> Any:
    """A cell of a run's table whose title begins so; `row` is its first cell, or the list of its first cells."""
    run, first = find_run(pattern), [row] if isinstance(row, str) else list(row)
    for t in run.metrics.get("tables", []):
        if t["title"].startswith(title) and column in t["columns"]:
            for cells in t["rows"]:
                if cells[: len(first)] == first and cells[t["columns"].index(column)] is not None:
                    return cells[t["columns"].index(column)]
    raise LookupError(f"{run.path} has no table {title!r} with a row {' / '.join(map(str, first))} and a column {column!r}")


FEATURED = {"grain/*": "why_lpips_misleads"}  # runs whose newest page has a name of its own


def page_name(run: Published) -> str:
    """File of a run's page, without its ending."""
    name = next((name for pattern, name in FEATURED.items() if find_run(pattern, missing_ok=True) == run), None)
    return name or "published/" + run.path.replace("/", "-")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals.update(metric=metric, table=table, value=value, psnr=psnr, lpips=lpips, results_table=results_table,
                               structure_table=structure_table, costs=costs, parameters=parameters, configured=configured)
    return environment


def fill(text: str) -> str:
    """Text with its numbers filled in; jinja2.UndefinedError or KeyError where one was not published."""
    return _environment().from_string(text).render() if "{{" in text else text


def evaluate(expression: str) -> Any:
    """Value of an expression such as `metric("costs/*", "rows", 0, "macs 1") < 1e12`; jinja2.UndefinedError for an unknown name."""
    return _environment().compile_expression(expression, undefined_to_none=False)()
