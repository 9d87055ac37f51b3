"""The pages of the site as Sphinx reads them: front page, tutorials, book, published runs, reference, and pages in Chinese."""
import html
import os
import re
from pathlib import Path

import bridge
import claims
import nbformat
import quoted
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FLOORS = ("files and transforms", "degradation and latent", "networks", "sampling and losses", "models and training", "pipeline and data",
          "experiments", "command line")
OF_THE_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")


class Writer:
    """Writes what has changed, and forgets what is no longer written, so that Sphinx has little to do."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, set()

    def text(self, name: str, text: str) -> None:
        """Write a file, as it is."""
        self.bytes(name, text.encode())

    def bytes(self, name: str, data: bytes) -> None:
        """Write a file, unless it holds just that."""
        path = self.folder / name
        self.written.add(path)
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def notebook(self, name: str, notebook: nbformat.NotebookNode) -> None:
        """Write a notebook; ids of cells do not count as a change."""
        for i, cell in enumerate(notebook.cells):
            cell.id = f"cell-{i}"
        self.text(name, nbformat.writes(notebook))

    def picture(self, path: Path) -> Path:
        """Copy a picture of the repository; its place on the site."""
        name = "pictures/" + path.relative_to(ROOT).as_posix().replace("/", "-")
        self.bytes(name, path.read_bytes())
        return Path(name)

    def prune(self) -> None:
        """Remove what was not written."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.written:
                path.unlink()


def slider(before: str, after: str, before_label: str, after_label: str, caption: str) -> str:
    """Two pictures and what moves the border between them."""
    names = [html.escape(t) for t in (before_label, after_label, caption)]
    return f"""```{{raw}} html
<figure class="sharpen"><div class="slider">
<img class="after" src="{after}" alt="{names[1]}" width="512" height="512"><img class="before" src="{before}" alt="{names[0]}" width="512" height="512">
<span class="l">{names[0]}</span><span class="r">{names[1]}</span>
<input type="range" min="0" max="100" step="0.1" value="50" aria-label="{names[0]} or {names[1]}"></div>
<figcaption>{names[2]}</figcaption></figure>
```"""


def front_slider(writer: Writer, up: str, words: dict[str, str]) -> str:
    """The first pair of pictures of the newest published evaluation on HIT-UAV, whose licence allows to show it."""
    runs = [r for r in quoted.published() if r.stage == "evaluate" and r.params["data"] == ["hit_uav/val"] and r.metrics.get("sliders")]
    run = max(runs, key=lambda r: r.record["started"])
    shown = run.metrics["sliders"][0]
    for key in ("before", "after"):
        writer.bytes(f"extra/front-{key}.png", (run.folder / shown[key]).read_bytes())
    labels = [words.get(shown[f"{key}_label"], shown[f"{key}_label"]) for key in ("before", "after")]
    return slider(f"{up}front-before.png", f"{up}front-after.png", *labels, words["caption"].format(frame=shown["caption"]))


def toctree(caption: str, names: list[str]) -> str:
    """One part of the navigation."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def contents(source: Path) -> str:
    """The navigation, in reading order."""
    numbered = sorted(p.stem for p in source.glob("[0-9][0-9]_*.ipynb"))
    tutorials = sorted(p.stem for p in (source / "tutorials").glob("*.ipynb") if not p.stem.endswith("_zh"))
    parts = [("Tutorials", [f"tutorials/{name}" for name in tutorials])]
    featured = [name for pattern, name in quoted.FEATURED.items() if quoted.find_run(pattern, missing_ok=True)]
    parts += [("Results", ["claims", *featured, "published/index"])]
    parts += [(f"Book {floor}: {words}", [n for n in numbered if n[0] == str(floor)]) for floor, words in enumerate(FLOORS)]
    parts += [("Stages", sorted(f"stages/{p.stem}" for p in (source / "stages").glob("*.ipynb")))]
    parts += [("Reference", ["api", *sorted(f"cards/{p.stem}" for p in (DOCS / "cards").glob("*.md")), "bibliography", "cite"])]
    parts += [("Project", [Path(name).stem for name in OF_THE_ROOT]), ("中文", ["zh/index", "tutorials/01_first_image_zh"])]
    return "\n\n".join(toctree(caption, names) for caption, names in parts if names)


def published_page(run: quoted.Published) -> nbformat.NotebookNode:
    """An executed notebook with its command above, its code folded."""
    notebook = nbformat.read(run.notebook, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    first.source = re.sub(r"\A# [^\n]*\n?", "", first.source).strip()
    title = run.metrics.get("title", run.stage)
    if run.record.get("name") not in (None, run.stage) and run.stage not in TITLED:
        title = f"{run.stage.replace('_', ' ').capitalize()}: {run.record['name']}"
    lines = [f"# {title}", f"Run `{run.path}` of stage `{run.stage}`, {run.record['started'][:10]}, in {run.record['seconds']:.0f} s; made by"]
    lines += [f"```bash\n{run.command}\n```"]
    if not run.experiment:
        lines += [f"with this as `again.yaml`:\n\n```yaml\n{run.experiment_text.strip()}\n```"]
    if reason := quoted.why_stale(run):
        lines += [f"```{{admonition}} Older than today's notebook\n:class: note\n{reason[0].upper()}{reason[1:]}.\n```"]
    if conclusion := run.metrics.get("conclusion"):
        lines += [f"```{{admonition}} Conclusion\n:class: tip\n{conclusion}\n```"]
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("\n\n".join(lines)))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.tags = ["hide-input"] if cell.outputs else ["remove-cell"]
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.pop("papermill", None)
    return notebook


TITLED = ("ablation", "study")  # stages whose parameter `title` says what a run asks
HEAD = "| run | stage | data | made | as today's notebook |\n|---|---|---|---|---|"


def published_index(runs: list[quoted.Published], report: list[str]) -> str:
    """A table of every published run."""
    lines = ["# Published runs", "Every number of these pages was measured by one of these runs: an executed notebook, its parameters, and the command "
             "that makes it again. A test compares each with today's notebook; where they differ, the last column says so.",
             "As pages with sortable tables: " + ", ".join(
                 f'<a href="../report/{n}">{n.removesuffix("index.html").strip("/") or "shipped weights and costs"}</a>' for n in report) + ".",
             HEAD]
    reasons = list(dict.fromkeys(filter(None, map(quoted.why_stale, runs))))
    bare = ["## Numbers only", "Trainings and evaluations that the pages above are made of, without their notebooks.", HEAD]
    for run in runs:
        name, title = run.record.get("name") or run.path, run.metrics.get("title")
        page = os.path.relpath(quoted.page_name(run), "published")
        if title and (name == run.stage or run.stage in TITLED):
            name = title
        link = f"[{name}]({page}.ipynb)" if run.notebook else f"{run.path.split('/')[0]}: {name}"
        data = run.params.get("data") or run.params.get("train") or ""
        data = ", ".join(data) if isinstance(data, list) else str(data)
        older = f"older [{reasons.index(why) + 1}]" if (why := quoted.why_stale(run)) else "yes"
        (lines if run.notebook else bare)[-1] += f"\n| {link} | {run.stage} | {data} | {run.record.get('started', '')[:10]} | {older} |"
    lines.append("\n".join(f"{i}. {reason[0].upper()}{reason[1:]}." for i, reason in enumerate(reasons, 1)))
    lines += bare if "\n| " in bare[-1][len(HEAD):] else []
    names = [quoted.page_name(r).removeprefix("published/") for r in runs if r.notebook and quoted.page_name(r).startswith("published/")]
    return "\n\n".join(lines) + "\n\n" + toctree("", names).replace(":caption: \n", "")


def api_page(symbols: list[bridge.Symbol], pages: dict[str, str]) -> str:
    """Everything public, module by module, with a link to its description."""
    lines = ["# API reference", "What each module exports, in reading order. A name leads to its parameters, types and source."]
    for module, page in pages.items():
        own = [s for s in symbols if s.module == module]
        if own:
            rows = [f"| [`{s.name}`](#{s.target}) | {s.summary.replace('|', chr(92) + '|')} |" for s in own]
            lines += [f"## [{module}]({page})", "| name | what it is |\n|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(lines)


def cite_page() -> str:
    """How to cite, from CITATION.cff."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    authors = " and ".join("{" + a["name"] + "}" for a in cff["authors"])
    fields = ",\n".join(f"  {key:7} = {{{value}}}" for key, value in ({"author": authors} | {k: cff[k] for k in ("title", "version", "license")}).items())
    entry = f"@software{{difiisr_dwt,\n{fields}\n}}"
    works = [f"- {r['authors'][0]['name']} ({r['year']}), *{r['title']}*, {r['conference']['name']}, {r['identifiers'][0]['value']}"
             for r in cff["references"]]
    return f"# How to cite\n\n{cff['message']}\n\n```bibtex\n{entry}\n```\n\nIt builds on\n\n" + "\n".join(works) \
        + "\n\nand on the works of the [bibliography](bibliography.md)."


def write_report(extra: Writer, runs: list[quoted.Published]) -> list[str]:
    """`difiisr report` over the published runs that have a notebook, on pages of its own; their names."""
    from difiisr_dwt.report import make_report

    names = []
    for root in dict.fromkeys(r.root for r in runs):
        group = Path(root).relative_to("reports/published").as_posix().strip(".")
        folder = Path("extra/report") / group
        for run in (r for r in runs if r.root == root):
            for file in run.folder.rglob("*"):
                if file.is_file():
                    extra.bytes((folder / run.stage / run.folder.name / file.relative_to(run.folder)).as_posix(), file.read_bytes())
        page = make_report(extra.folder / folder)
        text = page.read_text(encoding="utf-8")  # trainings of which only the numbers were published are not on it
        ids = set(re.findall(r' id="([^"]+)"', text))
        page.write_text(re.sub(r'<a href="#([\w-]+)">([^<]*)</a>', lambda m, ids=ids: m[0] if m[1] in ids else m[2], text), encoding="utf-8")
        extra.written.add(page)
        names.append((Path(group) / "index.html").as_posix())
    return names


def write(made: Path, source: Path, extra_folder: Path) -> None:
    """Every page into `source`, files that Sphinx only copies into `extra_folder`."""
    writer, extra = Writer(source), Writer(extra_folder.parent)
    notebooks = {p.relative_to(made): p for p in sorted(made.rglob("*.ipynb")) if (ROOT / "nbs" / p.relative_to(made)).is_file()}
    known = {ROOT / "nbs" / name: name for name in notebooks}
    known |= {ROOT / name: Path(name) for name in OF_THE_ROOT}
    known |= {ROOT / "difiisr_dwt/weights": Path("cards/compact.md"), ROOT / "CITATION.cff": Path("cite.md")}
    known |= {ROOT / "reports/published": Path("published/index.md")}
    known |= {ROOT / "difiisr_dwt/weights" / p.name: Path("cards") / p.name for p in (DOCS / "cards").glob("*.md")}

    def linked(text: str, page: Path, origin: Path) -> str:
        return bridge.relink(text, page, origin, known, writer.picture)

    symbols, modules = [], {}
    for name, path in notebooks.items():
        notebook = nbformat.read(path, as_version=4)
        module = name.stem.partition("_")[2] if re.match(r"\d\d_", name.stem) and len(name.parts) == 1 else ""
        symbols += bridge.for_sphinx(notebook, module)
        if module:
            modules[module] = name.as_posix()
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, name, (ROOT / "nbs" / name).parent)
        if name.as_posix() == "index.ipynb":
            for cell in notebook.cells:
                cell.source = quoted.fill(cell.source)
            words = {"caption": "Drag the border. {frame}: a validation frame of HIT-UAV (Suo et al. 2023, CC BY 4.0) at a quarter of its size, then made "
                                "large again by bicubic interpolation and by the shipped weights on a CPU."}
            ways = "[Every claim and its number](claims.md) · [Why plain LPIPS misleads](why_lpips_misleads.ipynb) · [中文](zh/index.md)"
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(f"{ways}\n\n{front_slider(extra, '', words)}"))
            notebook.cells.append(nbformat.v4.new_markdown_cell(contents(made)))
        writer.notebook(name.as_posix(), notebook)

    runs = quoted.published()
    with_notebook = [r for r in runs if r.notebook]
    for run in with_notebook:
        notebook = published_page(run)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, Path(f"{quoted.page_name(run)}.ipynb"), ROOT / "nbs/stages")
        writer.notebook(f"{quoted.page_name(run)}.ipynb", notebook)
    writer.text("published/index.md", published_index(runs, write_report(extra, with_notebook)))

    writer.text("claims.md", claims.page(writer.picture))

    for name in OF_THE_ROOT:
        writer.text(name, linked((ROOT / name).read_text(encoding="utf-8"), Path(name), ROOT))
    for card in (DOCS / "cards").glob("*.md"):
        text = quoted.fill(card.read_text(encoding="utf-8"))
        writer.text(f"cards/{card.name}", re.sub(r"\A# ", "# Model card: ", text))
    words = {"bicubic": "双三次插值", "15 steps": "15 步",
             "caption": "拖动分界线。{frame}：HIT-UAV 验证集的一帧（Suo 等，2023，CC BY 4.0），缩小到四分之一后分别用双三次插值和随包权重在 CPU 上放大。"}
    zh = (DOCS / "zh/index.md").read_text(encoding="utf-8").replace("<!-- slider -->", front_slider(extra, "../", words))
    writer.text("zh/index.md", quoted.fill(zh))
    writer.text("api.md", api_page(symbols, modules))
    writer.text("cite.md", cite_page())
    writer.bytes("references.bib", (DOCS / "references.bib").read_bytes())
    writer.text("bibliography.md", "# Bibliography\n\nWhat the notebooks name, with the arXiv numbers that they give.\n\n"
                                   "```{bibliography}\n:all:\n:style: unsrt\n```\n")
    writer.prune()
    for path in extra_folder.rglob("*"):
        if path.is_file() and path not in extra.written:
            path.unlink()
