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
import quoted  # noqa: E402

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


def test_no_measured_number_is_typed():
    """README's and the model cards' sources hold no decibels, LPIPS, seconds or megabytes outside of what is filled in."""
    cells = [c.source for c in nbformat.read(ROOT / "nbs/index.ipynb", as_version=4).cells]
    texts = cells + [p.read_text() for p in [*(ROOT / "docs/cards").glob("*.md"), *(ROOT / "docs/zh").glob("*.md")]]
    typed = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)? ?(?:dB|MB|GB|ms|s|times|million|倍|百万)\b|(?<![\w./-])0\.\d{3}\b|\b\d\d\.\d\d\b")
    for text in texts:
        plain = re.sub(r"\{\{.*?\}\}|```.*?```|arXiv[: ]\d+\.\d+|`[^`]*`", "", text, flags=re.S)
        assert not typed.findall(plain), typed.findall(plain)
    with pytest.raises(KeyError):
        quoted.fill('{{ psnr("m3fd", "2 steps") }}')


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


@pytest.mark.parametrize("width", [390, 1280])
def test_site_in_a_browser(site, browser, width):
    """Slider, formulas, search, report, no sideways scrolling; screenshots in docs/_build/screenshots."""
    watched, shots = Watched(browser, width), ROOT / "docs/_build/screenshots"
    tab = watched.tab
    shots.mkdir(exist_ok=True)
    pages = ["index", "zh/index", "tutorials/01_first_image", "13_schedule", "published/index", "api", "bibliography", "cards/compact"]
    for name in pages:
        tab.goto((site / f"{name}.html").as_uri())
        if tab.locator(".math").count():
            tab.wait_for_selector("mjx-container svg")
        if name.endswith("index") and "published" not in name:
            slider = tab.locator(".slider input")
            slider.fill("25")
            assert slider.evaluate("e => getComputedStyle(e.parentNode.querySelector('.before')).clipPath") == "inset(0px 75% 0px 0px)"
            assert tab.locator(".slider img").evaluate_all("all => all.every(i => i.naturalWidth > 100)")
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
