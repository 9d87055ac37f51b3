"""The report from odd run folders, and the page in a browser."""

import base64
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image

from difiisr_dwt.page import curve_positions
from difiisr_dwt.report import ReportError, collect_runs, make_report

ODD = "a b#?%&\"'<>ü.png"


@pytest.fixture
def run(tmp_path):
    """A function that writes a run folder; its root is run.root."""

    def make(stage, run_id, metrics=None, params=None, record=None, notebook="notebook.ipynb"):
        folder = make.root / stage / run_id
        (folder / "figures").mkdir(parents=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(params or {}))
        if record:
            (folder / "run.json").write_text(json.dumps(record))
        if metrics is not None:
            (folder / "metrics.json").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
        if notebook:
            (folder / notebook).write_text("{}")
        return folder

    make.root = tmp_path / "reports"
    return make


def picture(path, size=(64, 48), value=128):
    Image.fromarray(np.full(size[::-1], value, np.uint8)).save(path)


def test_no_runs(tmp_path):
    with pytest.raises(ReportError, match="no run folders"):
        make_report(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_everything_is_escaped(run):
    evil = "<script>alert(1)</script>\"'&"
    folder = run(
        f"st<b>age{ODD}", "0123456789ab",
        {"title": evil, "summary": {evil: evil}, "protocol": evil, "verdict": {"passed": False, "text": evil},
         "tables": [{"title": evil, "columns": [evil], "rows": [[evil], [{"x": evil}]]}],
         "curves": [{"title": evil, "x": evil, "y": evil, "series": {evil: [[0, 1], [1, 2]], "b": [[0, 1]]}}],
         "figures": [{"file": evil, "caption": evil}],
         "sliders": [{"before": f"figures/{ODD}", "after": f"figures/{ODD}", "caption": evil, "before_label": evil}]},
        params={evil: evil}, record={"name": evil},
    )  # fmt: skip
    picture(folder / "figures" / ODD)
    text = make_report(run.root).read_text(encoding="utf-8")
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert "<b>age" not in text
    (points,) = re.findall(r'data-points="([^"]*)"', text)
    assert "alert" in points


def test_pictures_are_embedded_up_to_the_limit_then_linked_and_the_links_work(run):
    folder = run("evaluate", "0123456789ab", {"figures": [{"file": f"figures/{ODD}"}, {"file": "figures/b.png"}]})
    picture(folder / "figures" / ODD)
    picture(folder / "figures" / "b.png", value=3)
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', make_report(run.root).read_text())
    assert base64.b64decode(data[0]) == (folder / "figures" / ODD).read_bytes() and len(data) == 2
    out = run.root.parent / "else where" / "page.html"
    text = make_report(run.root, out, limit=0).read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert [(out.parent / unquote(s)).resolve().name for s in sources] == [ODD, "b.png"]
    assert all((out.parent / unquote(s)).is_file() for s in sources)
    (notebook,) = re.findall(r'href="([^"]*notebook.ipynb)"', text)
    assert (out.parent / unquote(notebook)).is_file()


def test_files_outside_the_run_folder_are_not_shown(run, tmp_path):
    picture(tmp_path / "secret.png")
    folder = run(
        "evaluate",
        "0123456789ab",
        {
            "figures": [
                {"file": str(tmp_path / "secret.png")},
                {"file": "../../../secret.png"},
                {"file": "figures/link.png"},
                {"file": "notebook.ipynb"},
            ]
        },
    )
    (folder / "figures" / "link.png").symlink_to(tmp_path / "secret.png")
    text = make_report(run.root).read_text()
    assert "<img" not in text and text.count("is missing") == 4


@pytest.mark.parametrize(
    "metrics",
    [
        "{", "[]", "null", "NaN", '{"summary": [1]}', '{"summary": {"a": NaN, "b": null, "c": [1, {"d": 2}]}}', '{"tables": 3}',
        '{"tables": [{"columns": 3, "rows": 4}]}', '{"tables": [{"columns": ["a"], "rows": [[1, 2, 3], [], ["x"]]}]}',
        '{"curves": [{"series": {"a": []}}]}', '{"curves": [{"series": {"a": [[1]]}}]}', '{"curves": [{"series": {"a": [["x", "y"]]}}]}',
        '{"curves": [{"series": {"a": [[0, 5]]}}]}', '{"curves": [{"series": {"a": [[0, -5], [1, 0]]}, "log": true}]}',
        '{"curves": [{"series": [1]}]}', '{"figures": [{}]}', '{"figures": ["x.png"]}', '{"figures": [{"file": null}]}',
        '{"sliders": [{"before": "x"}]}', '{"verdict": true}', '{"verdict": {}}', '{"title": null, "protocol": ["a"]}',
    ],
)  # fmt: skip
def test_odd_metrics_do_not_cost_the_page(run, metrics):
    run("evaluate", "0123456789ab", metrics)
    run("train", "ba9876543210", {"summary": {"loss": 0.25}})
    text = make_report(run.root).read_text()
    assert "0.25" in text and 'id="evaluate-0123456789ab"' in text


def test_failed_and_unfinished_runs_are_shown_as_such(run):
    run(
        "evaluate",
        "000000000001",
        {"summary": {"PSNR": 38.4}},
        {"steps": 1},
        {"name": "good", "finished": "2026-01-01"},
    )
    failed = {"name": "bad", "status": "failed", "error": "cell 3 of 4: ZeroDivisionError", "finished": "2026-01-02"}
    run("evaluate", "000000000002", {"summary": {"PSNR": 99.9}}, {"steps": 4}, failed, "notebook.failed.ipynb")
    run("evaluate", "000000000003", None, {"steps": 15}, {"name": "cut", "status": "running"}, "notebook.running.ipynb")
    text = make_report(run.root).read_text()
    assert "1 run finished, 1 run failed, 1 run unfinished" in text
    assert "failed: cell 3 of 4: ZeroDivisionError" in text and "99.9" not in text, (
        "numbers of a failed run are not results"
    )
    assert '<article id="evaluate-000000000001">' in text, "the newest with results lies open"
    assert "notebook.failed.ipynb" in text and "notebook.running.ipynb" in text
    assert {r["status"] for r in collect_runs(run.root)} == {"finished", "failed", "unfinished"}


def test_overview_shows_what_differs(run):
    for i in range(3):
        run(
            "train",
            f"00000000000{i}",
            {"summary": {"loss": 0.1 * i}},
            {"seed": i, "lr": 0.5, "data": "${root}/prepare/4c0e11111111/data"},
        )
    text = make_report(run.root).read_text()
    head = re.search(r"<thead>(.*?)</thead>", text, re.S)[1]
    assert re.findall(r"<button[^>]*>(.*?)</button>", head) == ["run", "status", "seed", "loss"]
    assert 'href="#prepare-4c0e11111111"' in text


def test_published_copies_are_left_out_but_can_be_reported(run):
    run("train", "000000000001", {})
    shutil.copytree(run.root / "train", run.root / "published" / "train")
    assert len(collect_runs(run.root)) == 1 and len(collect_runs(run.root / "published")) == 1


def test_loss_curve_from_the_log_of_a_training(run):
    folder = run("train", "000000000001", {})
    lines = [json.dumps({"iteration": i, "loss": 1 / (i + 1), "lr": 0.1}) for i in range(3000)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 30', "[]", '{"loss": 3}']))
    text = make_report(run.root).read_text()
    (line,) = re.findall(r'<polyline points="([^"]*)"', text)
    assert 200 < len(line.split()) <= 500


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(0.5, 0.5), (1e-12, 1e12), (3.0,), (1e-9, 1.0000001e-9), (-4, 1e5), (99.0, 101.0)])
def test_curves_stay_inside_their_axes(values, log):
    drawn = curve_positions({"series": {"a": list(enumerate(values))}, "log": log})
    for pair in drawn["lines"][0][1].split():
        x, y = map(float, pair.split(","))
        assert 56 <= x <= 444 and 8 <= y <= 188
    assert len(drawn["y_ticks"]) <= 9 and all(8 <= y <= 188 for y, _ in drawn["y_ticks"])


def test_page_in_a_browser(run):
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    playwright = pytest.importorskip("playwright.sync_api")
    if not browser_path:
        pytest.skip("no Chromium installed")
    folder = run(
        "evaluate", "0123456789ab",
        {"sliders": [{"before": "figures/a.png", "after": "figures/b.png"}],
         "tables": [{"columns": ["data", "PSNR"], "rows": [["b", 9.5], ["a", 10.25], ["c", None]]}],
         "curves": [{"x": "iteration", "series": {"loss": [[0, 1], [10, 0.5]], "empty": []}}]},
    )  # fmt: skip
    run("evaluate", "0123456789ac", {}, {"steps": 2})
    picture(folder / "figures" / "a.png", value=0)
    picture(folder / "figures" / "b.png", value=255)
    page = make_report(run.root)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for width in (360, 1200):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            problems, requests = [], []
            tab.on("console", lambda message, to=problems: to.append(message.text))
            tab.on("pageerror", lambda error, to=problems: to.append(str(error)))
            tab.on("request", lambda request, to=requests: to.append(request.url))
            tab.goto(f"{Path(page).as_uri()}#evaluate-0123456789ab")
            table = tab.locator("table", has_text="PSNR").last
            slider = tab.locator(".slider input")
            slider.wait_for(state="visible")  # the run may have lain closed: its address opens it
            slider.fill("25")
            assert slider.evaluate("e => getComputedStyle(e.parentNode).getPropertyValue('--at')") == "25%"
            for first in ("9.50", "10.25"):
                table.locator("th button", has_text="PSNR").click()
                assert table.locator("tbody tr").first.locator("td").last.inner_text() == first
                assert table.locator("tbody tr").last.locator("td").last.inner_text() == "–", "missing values stay last"
            tab.locator(".curve svg").scroll_into_view_if_needed()
            tab.locator(".curve svg").hover()
            assert re.fullmatch(r"iteration \d+: loss [\d.]+", tab.locator(".readout").inner_text())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling of the page"
            assert not problems and all(u.startswith(("file:", "data:")) for u in requests)
        browser.close()
