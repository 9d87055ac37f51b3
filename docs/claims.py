"""The page of claims: what the first design and this package say of themselves, and what the published runs measured; verdicts are computed.

`docs/claims.yaml` holds one entry for each claim; no measured number is typed there. Text in `{{ }}` and the conditions `holds` are looked
up in published runs (see quoted.py). A fact whose run is still to be made names the experiment file under `pending`.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quoted
import yaml

from difiisr_dwt.page import number_text

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs/claims.yaml"
WHOSE = {"first design": "Claims of the first design", "ours": "Claims of this package"}
KEYS = {"topic", "whose", "claim", "run", "figure", "notebook", "facts", "note"}
FACT_KEYS = {"claim", "measured", "holds", "run", "pending", "not_here", "costs", "reproduces"}


class ClaimError(ValueError):
    """An entry of claims.yaml that says what no run carries."""


@dataclass(frozen=True)
class Fact:
    """One checkable sentence of a claim."""

    claimed: str
    measured: str
    verdict: str  # "holds", "wrong…", "pending", "no verdict", "not testable here"
    run: quoted.Published | None

    @property
    def state(self) -> str:
        """`holds`, `wrong`, `pending`, `told` (measured, without a condition) or `open` (not testable here)."""
        return {"holds": "holds", "pending": "pending", "no verdict": "told", "not testable here": "open"}.get(self.verdict, "wrong")


@dataclass(frozen=True)
class Claim:
    """An entry, looked up."""

    topic: str
    whose: str
    text: str
    facts: tuple[Fact, ...]
    run: quoted.Published | None  # that the picture is of
    figure: Path | None
    notebook: str
    note: str

    @property
    def verdict(self) -> str:
        """Confirmed, wrong or partly, by its facts; what is still open is added."""
        states = [f.state for f in self.facts]
        tested = {s for s in states if s in ("holds", "wrong")}
        word = {frozenset({"holds"}): "confirmed", frozenset({"wrong"}): "wrong", frozenset({"holds", "wrong"}): "partly"}.get(frozenset(tested))
        rest = [text for state, text in (("pending", "pending"), ("told", "without verdict"), ("open", "not testable here")) if state in states]
        return ", ".join([word, *(f"in part {text}" for text in rest)] if word else [" and ".join(rest)])

    @property
    def badge(self) -> str:
        """The verdict as MyST: its word as a badge, the rest as text."""
        word, _, rest = self.verdict.partition(", ")
        return f"[{word}]{{.verdict .{word.split(' ')[0]}}}" + (f" {rest}" if rest else "")

    @property
    def anchor(self) -> str:
        """Where it stands on the page."""
        return "claim-" + re.sub(r"\W+", "-", f"{self.whose} {self.topic}".lower()).strip("-")


def read() -> list[dict[str, Any]]:
    """The entries as they are written; ClaimError for a key that is unknown or missing."""
    entries = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    for entry in entries:
        name = entry.get("topic", "an entry without topic")
        if unknown := set(entry) - KEYS | {k for fact in entry.get("facts", []) for k in set(fact) - FACT_KEYS}:
            raise ClaimError(f"docs/claims.yaml: {name}: unknown keys {', '.join(sorted(unknown))}")
        if entry.get("whose") not in WHOSE or not entry.get("claim") or not entry.get("facts"):
            raise ClaimError(f"docs/claims.yaml: {name}: needs whose ({' or '.join(WHOSE)}), claim and facts")
    return entries


def _of_costs(prefix: str, run: quoted.Published) -> list[Fact]:
    rows = [row for row in run.metrics["claims"] if row["topic"].startswith(prefix)]
    if not rows or any(row["measured"] is None for row in rows):
        raise ClaimError(f"the claims of {run.path} have nothing measured for {prefix!r}")
    return [Fact(f"{row['topic'].removeprefix(prefix).strip(' ,:') or row['topic']}: {row['claimed']:,g} {row['unit']}".strip(),
                 f"{number_text(row['measured'])} {row['unit']}".strip(), row["verdict"], run) for row in rows]


def _of_mistakes(start: str, run: quoted.Published) -> list[Fact]:
    (table,) = [t for t in run.metrics["tables"] if t["title"] == "What reproduces"]
    rows = [row for row in table["rows"] if row[1].startswith(start)]
    if not rows:
        raise ClaimError(f"{run.path}: no row of 'What reproduces' begins with {start!r}")
    return [Fact(row[1], row[2], "holds" if row[3] == "yes" else f"wrong{row[3].removeprefix('no')}", run) for row in rows]


def _facts(fact: dict[str, Any], entry: dict[str, Any]) -> list[Fact]:
    if "not_here" in fact:
        return [Fact(fact["claim"], fact["not_here"], "not testable here", None)]
    pattern = fact.get("run", entry.get("run"))
    run = quoted.find_run(pattern, missing_ok="pending" in fact) if pattern else None
    if run is None and "pending" in fact:
        return [Fact(fact["claim"], f"`difiisr run {fact['pending']}` will measure it", "pending", None)]
    if run is None:
        raise ClaimError("a fact needs a run, not_here or pending")
    if "costs" in fact:
        return _of_costs(fact["costs"], run)
    if "reproduces" in fact:
        return _of_mistakes(fact["reproduces"], run)
    with quoted.current(run):
        measured = quoted.fill(fact.get("measured", "{{ metric('', 'conclusion') }}"))
        holds = quoted.evaluate(fact["holds"]) if "holds" in fact else None
    if holds is None and "pending" not in fact:
        raise ClaimError(f"{fact['claim']!r} has no condition 'holds'")
    return [Fact(fact["claim"], measured, "no verdict" if holds is None else "holds" if holds else "wrong", run)]


def look_up(entry: dict[str, Any]) -> Claim:
    """An entry with its numbers and verdicts; ClaimError where a run, a value or a picture is missing."""
    try:
        facts = tuple(found for fact in entry["facts"] for found in _facts(fact, entry))
        run = quoted.find_run(entry["run"], missing_ok=all(f.run is None for f in facts)) if "run" in entry else None
    except (KeyError, LookupError, quoted.jinja2.UndefinedError, ClaimError) as error:
        raise ClaimError(f"docs/claims.yaml: {entry['topic']}: {error.args[0] if error.args else error}") from error
    figure = next(iter(sorted(run.folder.glob(entry["figure"]))), None) if run and "figure" in entry else None
    if run and "figure" in entry and not figure:
        raise ClaimError(f"docs/claims.yaml: {entry['topic']}: run {run.path} has no {entry['figure']}")
    notebook = entry.get("notebook") or (f"nbs/stages/{run.stage}.ipynb" if run else "")
    if notebook and not (ROOT / notebook).is_file():
        raise ClaimError(f"docs/claims.yaml: {entry['topic']}: there is no {notebook}")
    return Claim(entry["topic"], entry["whose"], entry["claim"].strip(), facts, run, figure, notebook, quoted.fill(entry.get("note", "")).strip())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _section(claim: Claim, picture: "callable") -> list[str]:
    lines = [f"({claim.anchor})=\n### {claim.topic[0].upper()}{claim.topic[1:]}", f"{claim.text} {claim.badge}"]
    rows = [f"| {_cell(f.claimed)} | {_cell(f.measured)} | {_cell(f.verdict)} |" for f in claim.facts]
    lines += ["| claimed | measured | |\n|---|---|---|\n" + "\n".join(rows)]
    if claim.note:
        lines.append(claim.note)
    if claim.figure:
        lines.append(f"![{claim.topic}]({picture(claim.figure).as_posix()})")
    runs = list({r.path: r for r in [claim.run, *(f.run for f in claim.facts)] if r}.values())
    links = [f"[run `{r.path}`]({quoted.page_name(r)}.ipynb)" if r.notebook else f"run `{r.path}`" for r in runs]
    if claim.notebook:
        page = claim.notebook.removeprefix("nbs/")
        links.insert(0, f"[notebook {Path(page).stem}]({page})")
    if links:
        commands = "\n".join(dict.fromkeys(r.command_today for r in runs))
        lines.append("From " + ", ".join(links) + (". Again by" + (" (the page of the run has the file)" if "again.yaml" in commands else "") if runs else "."))
        lines += [f"```bash\n{commands}\n```"] if runs else []
    return lines


def page(picture: "callable") -> str:
    """claims.md; `picture` copies a file of the repository and returns its place on the site."""
    claims = [look_up(entry) for entry in read()]
    lines = ["# Claims", "What the first design said of itself in January 2026, and what this package says now, beside what was measured here. The "
             "verdicts are computed from the published runs when this page is built: *confirmed* where everything that could be tested holds, *partly* "
             "where some of it does. Counts must agree to 5 %, shares to a point; times and memory, claimed for a machine that is not named, to a "
             "factor of two."]
    for whose, title in WHOSE.items():
        own = [c for c in claims if c.whose == whose]
        rows = [f"| [{_cell(c.topic)}](#{c.anchor}): {_cell(c.text)} | {c.badge} |" for c in own]
        counts = {word: sum(f.state == word for c in own for f in c.facts) for word in ("holds", "wrong", "open", "pending", "told")}
        lines += [f"## {title}", f"Of {sum(counts.values())} figures {counts['holds']} hold and {counts['wrong']} are wrong; {counts['open']} cannot be "
                  f"tested here" + (f", {counts['pending']} are still to be measured" if counts["pending"] else "")
                  + (f", of {counts['told']} only the measurement is given" if counts["told"] else "") + ".",
                  "| claim | verdict |\n|---|---|\n" + "\n".join(rows)]
        for claim in own:
            lines += _section(claim, picture)
    return "\n\n".join(lines) + "\n"
