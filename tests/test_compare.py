"""Stage compare: evaluations of the same images side by side, and a refusal of different ones."""
import json
from pathlib import Path

import yaml

from difiisr_dwt.experiments import run_experiment

ROOT = Path(__file__).resolve().parents[1]
JUDGED = {"data": ["scenes:2@2000000"], "crop": 64, "steps": [1, 2], "grain": True, "pictures": False}


def experiment(tmp_path: Path, other: dict) -> Path:
    """Two evaluations of the shipped model, the second with changes, and what compares them."""
    runs = [{"name": n, "stage": "evaluate", "params": JUDGED | more} for n, more in (("packet", {}), ("other", other))]
    params = {"runs": {n: f"${{{n}.run_dir}}" for n in ("packet", "other")}, "resamples": 50}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({"runs": [*runs, {"name": "compare", "stage": "compare", "params": params}]}, sort_keys=False))
    return file


def test_side_by_side_and_refusal(tmp_path):
    """The table holds every run, baselines once, and the difference of a run to one with another seed; other images are refused."""
    results = run_experiment(experiment(tmp_path, {"seed": 1}), tmp_path / "reports")
    assert [r.status for r in results] == ["finished"] * 3
    folder = next((tmp_path / "reports/compare").glob("*"))
    metrics = json.loads((folder / "metrics.json").read_text())
    means, against, per_set = metrics["tables"]
    assert [row[0] for row in means["rows"]] == ["bicubic", "bicubic + back-projection", "packet", "other"]
    column = means["columns"].index("PSNR, 2 steps")
    assert means["rows"][2][column] > 20 and means["rows"][2][column] != means["rows"][3][column]  # seeds differ
    assert [row[:2] for row in against["rows"]] == [["other", "1 step"], ["other", "2 steps"]]
    assert len(per_set["rows"]) == 2 and (folder / "figures/comparison.png").stat().st_size > 10_000
    evaluated = next(p for p in (tmp_path / "reports/evaluate").glob("*/per_image.csv"))
    assert len(evaluated.read_text().splitlines()) == 1 + 2 * 5  # two images, five methods

    results = run_experiment(experiment(tmp_path, {"data": ["scenes:2@3000000"]}), tmp_path / "reports")
    assert results[-1].status == "failed" and "same images" in results[-1].message
