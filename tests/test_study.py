"""The equal-budget study: its files ask the same of everyone, its small version runs, its words follow the numbers."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from difiisr_dwt.configuration import configure
from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.runs import load_experiment
from difiisr_dwt.train_config import TrainConfig, check_config
from difiisr_dwt.training import train

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "nbs/experiments"
METHODS = ["edsr", "rcan", "swinir", "packet_1_step", "ll", "full_band", "all_bands", "all_bands_learnable", "packet", "vq"]
MAY_DIFFER = {"model", "learning_rate", "t", "codec_share", "codec_crop", "codec_iterations"}


def trainings(name: str) -> dict[str, dict]:
    """Parameters of the trainings of an experiment file."""
    return {run.name: run.params for run in load_experiment(FILES / f"{name}.yaml") if run.stage == "train"}


@pytest.mark.parametrize("name", ["equal_budget", "equal_budget_small"])
def test_everyone_is_asked_the_same(name):
    """Every method has the budget, data and settings of the others but for what is declared, and all are judged on the same images."""
    runs, asked = load_experiment(FILES / f"{name}.yaml"), trainings(name)
    assert list(asked) == METHODS
    for params in asked.values():
        assert all(params.get(key) == asked["packet"].get(key) for key in (set(params) | set(asked["packet"])) - MAY_DIFFER)
        check_config(configure(TrainConfig, {k: v for k, v in params.items() if k != "preflight"}))
    assert name.endswith("small") or asked["packet"]["cpu_minutes"] > 0
    judged = [{k: v for k, v in run.params.items() if k not in ("model", "steps")} for run in runs if run.stage == "evaluate"]
    assert len(judged) == len(METHODS) and all(params == judged[0] for params in judged)
    assert list(runs[-1].params["runs"]) == list(runs[-1].params["trained"]) == METHODS and runs[-1].stage == "study"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(tmp_path, name):
    """Two iterations of each, of the small file."""
    params = trainings("equal_budget_small")[name]
    config = configure(TrainConfig, {k: v for k, v in params.items() if k != "preflight"})
    best = train(dataclasses.replace(config, iterations=2, validate_every=2, checkpoint_every=2), tmp_path)
    assert np.isfinite(best["psnr_1"]) and (tmp_path / "model.safetensors").is_file()


def chosen(folder: Path, names: list[str]) -> Path:
    """The small file with some methods only."""
    content = yaml.safe_load((FILES / "equal_budget_small.yaml").read_text())
    runs = [run for run in content["runs"] if run["name"].removeprefix("judge-") in names or run["name"] == "study"]
    for run in runs[:-1]:
        run["base"] = str(FILES / run["base"])
    for key in ("runs", "trained"):
        runs[-1]["params"][key] = {name: runs[-1]["params"][key][name] for name in names}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"runs": runs}, sort_keys=False))
    return file


def test_small(tmp_path):
    """From nothing to the figures: a network without a chain, a chain, and a chain in a latent that is learnt."""
    results = run_experiment(chosen(tmp_path, ["edsr", "packet", "vq"]), tmp_path / "reports")
    assert [r.status for r in results] == ["finished"] * 7, [r.message for r in results]
    folder = next((tmp_path / "reports/study").glob("*"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [figure["file"] for figure in metrics["figures"]] == [f"figures/{n}.png" for n in ("psnr_lpips", "psnr_grain_fair", "strip-0")]
    assert all((folder / figure["file"]).stat().st_size > 10_000 for figure in metrics["figures"])
    tables = {table["title"]: table for table in metrics["tables"]}
    assert [row[0] for row in tables["Cost"]["rows"]] == ["edsr", "packet", "vq"]
    assert all(row[1] > 0 and row[2] > 0 and row[4] == 6 for row in tables["Cost"]["rows"]) and tables["Cost"]["rows"][2][-1] > 0
    assert [row[:2] for row in tables["All 4 images"]["rows"]] == [
        ["bicubic", ""], ["bicubic + back-projection", ""], ["edsr", 1], ["packet", 1], ["packet", 4], ["vq", 1], ["vq", 4]]
    assert metrics["leaders"][0]["best"] == "bicubic + back-projection"  # after six iterations
    assert not metrics["leaders"][0]["enough"] and "4 images cannot tell 7 methods apart" in metrics["conclusion"]


def pretended(folder: Path, psnr: dict[str, float], images: int = 12, wobble: float = 0.0, seed: int = 0) -> Path:
    """The folder of an evaluation with a PSNR per method; LPIPS falls with it, and half as much with grain."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = [
        {"set": "some", "image": f"{i}", "method": method, "psnr": (p := value + i / 10 + wobble * random.normal()), "ssim": p / 50,
         "lpips": 1 - p / 50, "grain_fair": 1 - p / 100, "grain_fair_sigma": 1.0}
        for method, value in psnr.items() for i in range(images)
    ]
    pd.DataFrame(rows).to_csv(folder / "per_image.csv", index=False)
    fair = {m: {"lpips": 1 - p / 100, "sigma": 1.0, "psnr": p - 1, "curve": [[0.0, p, 1 - p / 50], [1.0, p - 1, 1 - p / 100]]} for m, p in psnr.items()}
    settings = {"kernel": "bicubic", "crop": 64}
    (folder / "metrics.json").write_text(json.dumps({"protocol": "pretended", "settings": settings, "grain_fair": {"some": fair}}))
    return folder


def studied(tmp_path: Path, name: str, **params) -> tuple[str, dict, bytes]:
    """Message, metrics and first figure of a study of folders."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"stage": "study", "params": params}, sort_keys=False))
    result = run_experiment(file, tmp_path / name)[0]
    if result.status != "finished":
        return result.message, {}, b""
    folder = next((tmp_path / name / "study").glob("*"))
    return "", json.loads((folder / "metrics.json").read_text()), (folder / "figures/psnr_lpips.png").read_bytes()


def test_words_follow_the_numbers(tmp_path):
    """A clear lead is named with its p value, an unclear one is a tie, and other numbers make another figure and another sentence."""
    common = {"bicubic": 30.0, "bicubic + back-projection": 31.0}
    one = pretended(tmp_path / "one", common | {"1 step": 33.0, "4 steps": 32.0})
    two = pretended(tmp_path / "two", common | {"1 step": 34.0})
    _, metrics, figure = studied(tmp_path, "clear", runs={"one": str(one), "two": str(two)})
    first = metrics["leaders"][0]
    assert first["best"] == "two" and first["ties"] == [] and first["p"] == pytest.approx(4 * 2 / 2**12)  # Holm: four others
    assert first["means"] == {"bicubic": 30.55, "bicubic + back-projection": 31.55, "one, 1 step": 33.55, "one, 4 steps": 32.55, "two": 34.55}
    assert metrics["conclusion"].startswith("Over all 12 images, PSNR: two is best (34.55 dB), ahead of every other (p ≤ 0.002); LPIPS (alex): two is best")
    assert metrics["summary"]["best grain-fair LPIPS"] == "two"

    table = pd.read_csv(two / "per_image.csv")
    unclear = table["method"] == "1 step"
    table.loc[unclear, "psnr"] += np.where(np.arange(unclear.sum()) % 2, -2.5, 0.5)  # 33 dB now, and all over the place
    table.loc[unclear, "lpips"] += 0.5
    table.to_csv(two / "per_image.csv", index=False)
    _, metrics, other = studied(tmp_path, "tied", runs={"one": str(one), "two": str(two)})
    assert metrics["leaders"][0]["best"] == "one, 1 step" or metrics["leaders"][0]["ties"]
    assert {metrics["leaders"][0]["best"], *metrics["leaders"][0]["ties"]} >= {"one, 1 step", "two"}
    assert " ties with " in metrics["conclusion"].split(";")[0] and "LPIPS (alex): one, 1 step is best" in metrics["conclusion"]
    assert other != figure


def test_refusals(tmp_path):
    """Evaluations of different images, and pictures of frames that may not be shown."""
    common = {"bicubic": 30.0, "bicubic + back-projection": 31.0, "1 step": 32.0}
    one, two = pretended(tmp_path / "one", common), pretended(tmp_path / "two", common | {"bicubic": 30.1})
    message, *_ = studied(tmp_path, "different", runs={"one": str(one), "two": str(two)})
    assert "bicubic in two differs from that in one" in message
    message, *_ = studied(tmp_path, "shown", runs={"one": str(one)}, pictures=["m3fd"])
    assert "neither HIT-UAV nor procedural" in message
