"""The site, built and opened in a browser; the bridge that makes its pages; the numbers that it quotes."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import bridge  # noqa: E402
import claims  # noqa: E402
import quoted  # noqa: E402
import run_all  # noqa: E402

HTML = ROOT / "docs/_build/html"


def test_every_published_run_is_todays_or_listed():
    """Notebook hash, parameter names and run_id of each published run; what differs stands in docs/stale.yaml, exactly so."""
    assert len(quoted.published()) >= 30 and quoted.problems() == []


def test_a_changed_published_run_is_noticed(tmp_path, monkeypatch):
    """Another parameter, another notebook, a run that is no longer listed, an entry too many."""
    good = next(r for r in quoted.published() if not r.differs())
    path, folder = good.path, tmp_path / good.path
    shutil.copytree(good.folder, folder)
    (tmp_path / "stale.yaml").write_text("")
    for name, value in {"PUBLISHED": tmp_path, "STALE": tmp_path / "stale.yaml"}.items():
        monkeypatch.setattr(quoted, name, value)
    monkeypatch.setattr(quoted.Published, "root", "reports")
    assert quoted.problems() == []
    record = (folder / "run.json").read_text()
    (folder / "run.json").write_text(record.replace(good.record["code"], "0" * 12))
    assert "differs from today's notebook in ['code']" in quoted.problems()[0]
    (tmp_path / "stale.yaml").write_text(f"{path}: {{differs: [code], reason: a test}}")
    assert quoted.problems() == []
    (folder / "run.json").write_text(record)
    assert "differs from today's notebook in nothing" in quoted.problems()[0]
    (tmp_path / "stale.yaml").write_text("nowhere/*: {differs: [code], reason: a test}")
    assert quoted.problems() == ["docs/stale.yaml: nowhere/* names no published run"]
    (folder / "params.yaml").write_text((folder / "params.yaml").read_text() + "seed_of_nothing: 1\n")
    assert any("not the one that its name is the hash of" in p for p in quoted.problems())


def test_a_changed_notebook_or_parameter_is_noticed(tmp_path, monkeypatch):
    """Every run of a stage, after its notebook got one more statement, and after it got one more parameter."""
    before = quoted.problems()
    by_stage = {r.stage: [q for q in quoted.published() if q.stage == r.stage] for r in quoted.published()}
    name, runs = next((stage, runs) for stage, runs in by_stage.items() if not any(r.differs() for r in runs))
    original = quoted.find_stage(name, ROOT)
    changed = nbformat.read(original, as_version=4)
    changed.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(changed, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(quoted, "find_stage", lambda stage, root: tmp_path / f"{name}.ipynb" if stage == name else original.with_stem(stage))
    found = set(quoted.problems()) - set(before)
    assert runs and {r.path for r in runs} == {p.split(":")[0] for p in found} and all("['code']" in p for p in found)
    (parameters,) = [c for c in changed.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source += "\nanother = 1"
    nbformat.write(changed, tmp_path / f"{name}.ipynb")
    found = set(quoted.problems()) - set(before)
    assert {r.path for r in runs} == {p.split(":")[0] for p in found} and all("['code', 'parameters']" in p for p in found)


TYPED = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)? ?(?:dB|MB|GB|ms|s|times|million|percent|per cent|%|倍|百万|秒)(?![\w])"
                   r"|(?<![\w./-])0\.\d{2,}\b|(?<![\w.])\d\d\.\d\d?(?![\w.])")


def typed_numbers(text: str) -> list[str]:
    """Decibels, LPIPS, times, sizes and shares that a text holds outside of what is filled in."""
    return TYPED.findall(re.sub(r"\{\{.*?\}\}|\{%.*?%\}|```.*?```|arXiv[: ]\d+\.\d+|`[^`]*`", "", text, flags=re.S))


def test_no_measured_number_is_typed():
    """The sources of README, model cards, Chinese pages and claims hold no measured number outside of what is filled in."""
    cells = [c.source for c in nbformat.read(ROOT / "nbs/index.ipynb", as_version=4).cells]
    texts = cells + [p.read_text() for p in [*(ROOT / "docs/cards").glob("*.md"), *(ROOT / "docs/zh").glob("*.md")]]
    texts += [text for e in claims.read() for text in (e.get("note", ""), *(f.get("measured", "") for f in e["facts"]))]
    for text in texts:
        assert not typed_numbers(text), typed_numbers(text)
    with pytest.raises(KeyError):
        quoted.fill('{{ psnr("m3fd", "2 steps") }}')


@pytest.mark.parametrize("text", ["38.37 dB", "LPIPS 0.105", "is 12,550 times faster", "it is 3.2 million", "快 12 倍", "36.1 / 0.2", "in 5 s", "94 % of it"])
def test_a_typed_number_is_noticed(text):
    """What a hurried author would write."""
    assert typed_numbers(f"So {text}, measured") and not typed_numbers(f"So {{{{ psnr() }}}}, `{text}`, ×4, 8-bit, arXiv 2307.12348")


def topics() -> list[str]:
    """Topics of ../shared/claims.md, as docs/claims.yaml must have them."""
    from difiisr_dwt.images import shared_data

    file = shared_data() and shared_data().parent / "claims.md"
    if not file or not file.is_file():
        pytest.skip("../shared/claims.md is not here")
    return re.findall(r"^\| (?!topic|-)([^|]+?) \|", file.read_text(encoding="utf-8"), re.M)


def test_every_claim_of_the_first_design_has_an_entry():
    """Row by row, in the same order."""
    assert topics() == [e["topic"] for e in claims.read() if e["whose"] == "first design"]


def test_every_claim_has_its_number_its_picture_and_its_notebook():
    """Each entry is looked up; what is pending says which experiment will measure it, everything else has a run."""
    entries = claims.read()
    assert len([e for e in entries if e["whose"] == "ours"]) >= 8
    for entry in entries:
        claim = claims.look_up(entry)
        assert claim.facts and claim.verdict
        for fact in claim.facts:
            assert fact.measured.strip() and "{{" not in fact.measured
            assert fact.run or fact.state in ("pending", "open"), fact
        if any(f.run for f in claim.facts):
            assert claim.notebook and (claim.figure or entry["topic"] == "learned resampling"), entry["topic"]
        for fact in entry["facts"]:
            assert re.fullmatch(r"nbs/experiments/\w+\.yaml", fact.get("pending", "nbs/experiments/any.yaml"))
    page = claims.page(lambda path: Path("pictures") / path.name)
    assert page.count("```bash") >= len(entries) - 4 and all(e["topic"].lower() in page.lower() for e in entries)


@pytest.mark.parametrize("change, message", [
    ({"run": "nowhere/*"}, "no published run fits"), ({"measured": '{{ metric("", "summary", "nothing") }}'}, "metrics.json of"),
    ({"measured": '{{ table("", "Nothing", "a", "b") }}'}, "has no table"), ({"holds": "unknown_name > 1"}, "unknown_name"), ({"holds": None}, "no condition"),
    ({"typo": 1}, "unknown keys"), ({"figure": "figures/nothing.png"}, "has no figures/nothing.png"), ({"costs": "nothing:"}, "nothing measured")])
def test_a_claim_without_its_run_or_value_is_an_error(change, message, monkeypatch, tmp_path):
    """Never a hole in the page."""
    entry = {"topic": "a", "whose": "ours", "claim": "b", "run": "costs/*", "figure": "figures/latency.png"}
    fact = {"claim": "c", "measured": '{{ metric("", "summary", "packet / original, peak memory") }}', "holds": 'metric("", "targets", 2, "met")'}
    assert claims.look_up(entry | {"facts": [fact]}).verdict == "confirmed"
    assert claims.look_up(entry | {"facts": [fact | {"holds": 'metric("", "targets", 2, "measured") > 1'}]}).verdict == "wrong"
    for key, value in change.items():
        (entry if key in ("run", "figure") else fact).__setitem__(key, value)
    fact = {k: v for k, v in fact.items() if v is not None}
    monkeypatch.setattr(claims, "FILE", tmp_path / "claims.yaml")
    claims.FILE.write_text(claims.yaml.safe_dump([entry | {"facts": [fact]}]))
    with pytest.raises(claims.ClaimError, match=message):
        claims.look_up(*claims.read())


def test_a_pending_claim_fills_itself_when_its_run_is_there(monkeypatch):
    """With its conclusion; with a verdict where the entry has a condition."""
    fact = {"claim": "one level is better", "run": "ablations/*level*/ablation/*", "pending": "nbs/experiments/x.yaml"}
    entry = {"topic": "levels", "whose": "first design", "claim": "b", "facts": [fact]}
    monkeypatch.setattr(quoted, "_finished", tuple)
    assert claims.look_up(entry).verdict == "pending" and "nbs/experiments/x.yaml" in claims.look_up(entry).facts[0].measured
    run = quoted.Published(quoted.PUBLISHED / "ablations/levels/ablation/0123456789ab", {}, {}, {"conclusion": "One level: +0.4 dB.", "summary": {"gain": 0.4}})
    monkeypatch.setattr(quoted, "_finished", lambda: (run,))
    (found,) = claims.look_up(entry | {"notebook": "nbs/17_codecs.ipynb"}).facts
    assert (found.measured, found.verdict, found.run) == ("One level: +0.4 dB.", "no verdict", run)
    fact["holds"] = 'metric("", "summary", "gain") > 0.5'
    assert claims.look_up(entry).verdict == "wrong"


def test_a_slow_notebook_fails(monkeypatch, capsys):
    """By processor time, so that a busy machine does not make it fail."""
    notebook = ROOT / "nbs/04_configuration.ipynb"
    assert run_all._run_notebook(notebook) == "passed"
    monkeypatch.setattr(run_all, "LIMIT", 0.01)
    assert run_all._run_notebook(notebook) == "failed" and "processor time" in capsys.readouterr().out


def test_bibliography_has_the_arxiv_numbers_of_the_notebooks():
    """Each number that a notebook gives has an entry, and each entry with a number is given by some notebook."""
    text = "\n".join(c.source for p in (ROOT / "nbs").rglob("*.ipynb") for c in nbformat.read(p, as_version=4).cells)
    named = set(re.findall(r"arxiv\D{1,12}?(\d{4}\.\d{4,5})", text, re.I))
    entries = set(re.findall(r"eprint = \{([\d.]+)\}", (ROOT / "docs/references.bib").read_text()))
    assert named == entries


def test_bridge():
    """Front matter, directives, callouts and show_doc become what myst-nb reads."""
    v4 = nbformat.v4
    doc = v4.new_output("execute_result", data={"text/markdown": "---\n\n### fold\n\n```python\n\ndef fold(x)\n\n\n```\n\n*Into channels.*"})
    notebook = v4.new_notebook(cells=[
        v4.new_raw_cell("---\ntitle: codecs\ndescription: 'To latents: and back'\n---\n"),
        v4.new_markdown_cell('::: {.callout-warning}\nMind.\n:::\n\n::: {.callout-tip title="So"}\nDo.\n:::'),
        v4.new_code_cell("#| echo: false\n#| output: asis\nshow_doc(fold)", outputs=[doc]),
        v4.new_code_cell("#| echo: false\nplot()"), v4.new_code_cell("#| include: false\nx"), v4.new_code_cell("#| eval: false\nassert 1"),
        v4.new_markdown_cell("<!-- WARNING -->")])
    symbols = bridge.for_sphinx(notebook, "codecs")
    title, callout, shown, quiet, hidden, plain = notebook.cells
    assert title.source == "# codecs\n\n> To latents: and back"
    assert callout.source.startswith(":::{warning}\nMind.") and ":::{admonition} So\n:class: tip\n\nDo." in callout.source
    assert shown.source == "(api-codecs-fold)=\n### `fold`\n\n```python\ndef fold(x)\n```\n\n*Into channels.*"
    assert [(s.name, s.summary, s.target) for s in symbols] == [("fold", "Into channels.", "api-codecs-fold")]
    assert (quiet.metadata.tags, hidden.metadata.tags) == (["remove-input"], ["remove-cell"])
    assert quiet.source == "plot()" and plain.source == "assert 1" and "tags" not in plain.metadata
    last = bridge.for_nbdev(v4.new_notebook(cells=[v4.new_code_cell("#| export\nx = 1"), v4.new_code_cell("import os\nx"), v4.new_code_cell("import os")]))
    assert [c.source.splitlines()[0] for c in last.cells] == ["#| exports", "#| eval: false", "import os", "<!-- end -->"]
    known = {ROOT / "nbs/a.ipynb": Path("a.ipynb")}
    text = bridge.relink("[a](../a.ipynb#x) [b](../../Makefile) [c](nowhere.md) [d](https://e.org)", Path("stages/s.ipynb"), ROOT / "nbs/stages", known, Path)
    assert text == "[a](../a.ipynb#x) b [c](nowhere.md) [d](https://e.org)"


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site; what has not changed since the last build is not built again."""
    pytest.importorskip("furo", reason="the site's requirements are not installed")
    run = subprocess.run([sys.executable, ROOT / "docs/build.py"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return HTML


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    playwright = pytest.importorskip("playwright.sync_api")
    if not path:
        pytest.skip("no Chromium installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A tab that remembers what went wrong in it."""

    def __init__(self, browser, width: int):
        self.tab = browser.new_page(viewport={"width": width, "height": 900})
        self.problems: list[str] = []
        self.tab.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda e: self.problems.append(str(e)))
        self.tab.on("requestfailed", lambda r: self.problems.append(f"{r.failure}: {r.url}") if "ABORTED" not in r.failure else None)
        self.tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else self.problems.append(f"asked for {r.url}"))


def use_report_by_keyboard(tab, site: Path, width: int) -> None:
    """Every report page of the site without a mouse: open a run, sort, move the slider, scroll a wide table."""
    reports, sliders = sorted((site / "report").rglob("index.html")), 0
    assert len(reports) >= 4
    for page in reports:
        tab.goto(page.as_uri())
        for summary in tab.locator("details.run > summary").all():
            summary.press("Enter")
        assert tab.locator("details.run:not([open])").count() == 0
        button = tab.locator("article th button").first
        button.press("Enter")
        assert button.evaluate("b => b.parentNode.getAttribute('aria-sort')") == "ascending"
        for slider in tab.locator(".slider input").all():
            sliders += 1
            slider.press("Home")
            for _ in range(3):
                slider.press("PageUp")
            at = slider.evaluate("e => getComputedStyle(e.parentNode).getPropertyValue('--at')")
            assert 5 < float(at.strip().rstrip("%")) < 60
        for scroll in tab.locator(".scroll").all()[:5]:
            if scroll.evaluate("e => e.scrollWidth > e.clientWidth + 40"):
                scroll.press("ArrowRight")
                tab.wait_for_timeout(150)
                assert scroll.evaluate("e => e.scrollLeft") > 0, "a wide table scrolls by keyboard"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{page.parent.name} scrolls sideways"
    assert sliders > 0


@pytest.mark.parametrize("width", [390, 1280])
def test_site_in_a_browser(site, browser, width):
    """Slider, formulas, search, report, no sideways scrolling; screenshots in docs/_build/screenshots."""
    watched, shots = Watched(browser, width), ROOT / "docs/_build/screenshots"
    tab = watched.tab
    shots.mkdir(exist_ok=True)
    pages = ["index", "zh/index", "tutorials/01_first_image", "13_schedule", "claims", "why_lpips_misleads", "published/index", "api", "bibliography",
             "cards/compact", "tutorials/01_first_image_zh", "cite"]
    for name in pages:
        tab.goto((site / f"{name}.html").as_uri())
        if tab.locator(".math").count():
            tab.wait_for_selector("mjx-container svg")
        if name.endswith("index") and "published" not in name:
            slider = tab.locator(".slider input")
            slider.fill("25")
            assert slider.evaluate("e => getComputedStyle(e.parentNode.querySelector('.before')).clipPath") == "inset(0px 75% 0px 0px)"
            assert tab.locator(".slider img").evaluate_all("all => all.every(i => i.naturalWidth > 100)")
        if name == "claims":
            assert tab.locator(".verdict.confirmed").count() > 5 and tab.locator(".verdict.wrong").count() > 3
            assert tab.locator("article img").count() > 15
        for image in tab.locator("article img").all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("i => i.decode().then(() => i.naturalWidth)") > 50, f"{name}: {image.get_attribute('src')}"
        tab.evaluate("scrollTo(0, 0)")
        tab.screenshot(path=shots / f"{name.replace('/', '-')}-{width}.png")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways"
    assert tab.evaluate("document.documentElement.lang") == "en"

    tab.goto((site / "search.html").as_uri() + "?q=back_project")
    tab.wait_for_selector("#search-results li")
    assert any("consistency" in t.lower() for t in tab.locator("#search-results li").all_inner_texts())
    tab.screenshot(path=shots / f"search-{width}.png")

    tab.goto((site / "report/index.html").as_uri())
    table = tab.locator("article table", has=tab.locator("button", has_text="PSNR, dB")).first
    column = table.locator("thead th").all_inner_texts().index("PSNR, dB")
    for _ in range(2):
        table.locator("button", has_text="PSNR, dB").click()
        values = [float(row.locator("td").nth(column).inner_text()) for row in table.locator("tbody tr").all()]
        direction = table.locator("th").nth(column).get_attribute("aria-sort")
        assert len(values) > 2 and values == sorted(values, reverse=direction == "descending")
    tab.screenshot(path=shots / f"report-{width}.png")
    use_report_by_keyboard(tab, site, width)
    for scheme in ("dark", "light"):
        tab.emulate_media(color_scheme=scheme)
        tab.goto((site / "index.html").as_uri())
        seen = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", seen)[:3])) < 200) == (scheme == "dark")
        tab.screenshot(path=shots / f"index-{scheme}-{width}.png")
    assert watched.problems == []
    tab.close()


def test_every_navigation_entry(site, browser):
    """Each entry of the navigation opens a page with a title, without an error and without the network."""
    watched = Watched(browser, 1280)
    tab = watched.tab
    tab.goto((site / "index.html").as_uri())
    entries = tab.locator(".sidebar-tree a.reference").evaluate_all("all => all.map(a => a.href)")
    assert len(entries) > 80
    for address in entries:
        tab.goto(address, wait_until="domcontentloaded")
        assert tab.locator("h1").count() == 1, address
    assert watched.problems == []
    tab.close()


def test_quoted_numbers_are_of_all_images_whole():
    """Runs on crops or on some of the images, such as the ablations' of the shipped model, are not what README and card quote."""
    assert any(r.stage == "evaluate" and r.params["model"] == "compact" and r.params.get("crop") for r in quoted.published())
    rows = quoted._rows("bicubic")
    assert rows and {row.get("crop", "whole frames") for row in rows.values()} == {"whole frames"}
    assert rows["m3fd", "bicubic"]["images"] == 10
