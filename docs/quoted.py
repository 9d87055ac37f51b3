"""Published runs: which there are, whether they are what today's notebooks would make, and the numbers quoted from them.

Text of README, site and model card names a number as `{{ psnr("m3fd", "1 step") }}`; it is looked up here, never typed.
"""
import fnmatch
import functools
import json
import re
import struct
import sys
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
def _rows(kernel: str, model: str = "compact") -> dict[tuple[str, str], dict[str, Any]]:
    """(set, method): the row of the newest evaluation of a model at a kernel."""
    runs = [r for r in published() if r.stage == "evaluate" and (r.params["model"], r.params["kernel"]) == (model, kernel)]
    return {(row["set"], row["method"]): row for run in sorted(runs, key=lambda r: r.record["started"]) for row in run.metrics["rows"]}


def value(name: str, data: str, method: str, kernel: str = "bicubic") -> float:
    """One measured number of the shipped weights, such as `psnr` of `1 step` on `m3fd`; KeyError where it was not published."""
    return _rows(kernel)[data, method][name]


def psnr(data: str, method: str, kernel: str = "bicubic") -> str:
    """PSNR in dB as text."""
    return f"{value('psnr', data, method, kernel):.2f}"


def lpips(data: str, method: str) -> str:
    """LPIPS (alex) as text."""
    return f"{value('lpips', data, method):.3f}"


def results_table() -> str:
    """The table of README and model card: PSNR / LPIPS of every method on every set."""
    rows = _rows("bicubic")
    methods, sets = (list(dict.fromkeys(key[i] for key in rows)) for i in (1, 0))
    lines = ["| | " + " | ".join(f"{name}, {rows[name, methods[0]]['images']}" for name in sets) + " |", "|---" * (len(sets) + 1) + "|"]
    lines += [f"| {m} | " + " | ".join(f"{psnr(s, m)} / {lpips(s, m)}" for s in sets) + " |" for m in methods]
    return "\n".join(lines)


@functools.cache
def costs(system: str = "original") -> dict[str, Any]:
    """A system's row of the published `costs` run; `codec` keys are the sum of encoder and decoder."""
    (run,) = [r for r in published() if r.stage == "costs"]
    row = next(r for r in run.metrics["rows"] if r["system"] == system)
    return row | {f"{what} codec": row[f"{what} encoder"] + row[f"{what} decoder"] for what in ("parameters", "macs", "seconds")}


@functools.cache
def parameters(model: str = "compact") -> int:
    """Parameters of a shipped model's network, as its file's header tells."""
    with open(ROOT / f"difiisr_dwt/weights/{model}.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__" and name.startswith("network.")]
    return sum(functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes)


def page_name(run: Published) -> str:
    """File of a run's page, without its ending: one folder deep, so that links of stage notebooks hold."""
    return "published/" + run.path.replace("/", "-")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals.update(value=value, psnr=psnr, lpips=lpips, results_table=results_table, costs=costs, parameters=parameters)
    return environment


def fill(text: str) -> str:
    """Text with its numbers filled in; jinja2.UndefinedError or KeyError where one was not published."""
    return _environment().from_string(text).render() if "{{" in text else text
