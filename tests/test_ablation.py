"""Stages ablation and swap_wavelet: the sentence follows the numbers, the rule holds, every kind of figure is drawn, a swap changes the codec alone."""
import dataclasses
import json
import re
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from difiisr_dwt.configuration import configure
from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.models import USE, ModelConfig, RestorationModel, find_model, load_model
from difiisr_dwt.objective import term_configs
from difiisr_dwt.runs import ExperimentError, find_stage, load_experiment, stage_parameters
from difiisr_dwt.schedule import ResShiftSchedule
from difiisr_dwt.train_config import TrainConfig, check_config

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(f for f in (ROOT / "nbs/experiments").glob("ablation_*.yaml") if not f.stem.endswith(("_budget", "_judge")))
REFERENCE = {"kappa": 2.0, "min_noise_level": 0.04}


def evaluation(folder: Path, shift: float, steps: tuple[int, ...] = (1, 15), images: int = 8, seed: int = 0) -> str:
    """A folder as evaluate leaves it, its PSNR moved by so many dB and its LPIPS by a tenth of that."""
    noise, rows = np.random.default_rng(seed), []
    for image in range(images):
        rows.append({"set": "s", "image": f"{image}", "method": "bicubic", "psnr": 30.0 + image, "lpips": 0.4})
        for n in steps:
            psnr, lpips = 33 + image - 0.1 * n + shift + noise.normal(0, 0.01), 0.3 - 0.01 * n - shift / 10 + noise.normal(0, 0.001)
            rows.append({"set": "s", "image": f"{image}", "method": f"{n} step" + "s" * (n > 1), "psnr": psnr, "lpips": lpips})
            rows[-1] |= {"grain_fair": lpips, "gmsd": lpips / 5}
        rows.append({"set": "s", "image": f"{image}", "method": "1 step + best white grain", "psnr": 32.0, "lpips": 0.2})
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "per_image.csv", index=False)
    (folder / "metrics.json").write_text('{"protocol": "made up"}')
    return str(folder)


def ablation(folder: Path, **params) -> dict:
    """metrics.json that the stage's cells write, run here one after the other, since a kernel takes longer to start than they do."""
    notebook = nbformat.read(find_stage("ablation", ROOT), as_version=4)
    assert set(params) <= set(stage_parameters(find_stage("ablation", ROOT)))
    names, folder = {"__name__": "__main__"}, folder / f"run-{len(list(folder.iterdir()))}"
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        exec(compile(cell.source, "ablation.ipynb", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= {**params, "run_dir": str(folder)}
    assert (folder / "figures/ablation.png").stat().st_size > 10_000
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(autouse=True)
def _no_windows(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))


def test_the_sentence_follows_the_numbers(tmp_path):
    """Points by name: what is shown, in which direction, against what a second seed does; and the rule, with its limit between two settings."""
    runs = {name: evaluation(tmp_path / name, shift, seed=k)
            for k, (name, shift) in enumerate({"haar": 0, "again": 0.05, "good": 0.3, "bad": -0.45, "worse": -0.6, "same": 0}.items())}
    metrics = ablation(tmp_path, runs=runs, reference="haar", repeat="again", rule=0.5)
    assert metrics["figure"] == "points" and metrics["accepted"] == {"good": True, "bad": True, "worse": False, "same": True}
    rule, _, psnr, likeness = re.split(r"; (?=not accepted|against|grain-fair)", metrics["conclusion"])
    assert "worse" not in rule and "PSNR at 1 step is better with good (+0." in psnr and psnr.index("worse with worse (-0.6") < psnr.index("bad (-0.4")
    assert "grain-fair LPIPS at 15 steps is better with good (-0.03" in likeness and "same" not in psnr + likeness
    assert metrics["summary"]["conclusion"] == metrics["figures"][0]["caption"] == metrics["conclusion"]

    turned = {"haar": runs["good"], "again": runs["good"], "good": runs["haar"]}
    with pytest.raises(ExperimentError, match="shares its run with another"):
        ablation(tmp_path, runs=turned, reference="haar")
    del turned["again"]
    assert "PSNR at 1 step is worse with good (-0.3" in ablation(tmp_path, runs=turned, reference="haar")["conclusion"]
    nothing = ablation(tmp_path, runs={k: runs[k] for k in ("haar", "same")}, reference="haar")
    assert nothing["conclusion"].count("shows no difference that these images can show") == 2


def test_heat_map_lines_and_refusals(tmp_path):
    """Two axes with a capped corner, one axis, the steps of one model; chains that differ cannot share a run; other images are refused."""
    label = "κ {kappa:g}, {min_noise_level:g}".format
    values, runs = {}, {}
    for k, kappa in enumerate((1.0, 2.0)):
        for m, level in enumerate((0.02, 0.04, 0.0632, 0.2)):
            value = {"kappa": kappa, "min_noise_level": level}
            twin = next((n for n, v in values.items() if same_chain(v, value)), None)
            values[label(**value)] = value
            runs[label(**value)] = runs[twin] if twin else evaluation(tmp_path / f"{k}{m}", 0.1 * k - 0.05 * m, seed=4 * k + m)
    # at κ = 2 the cap is 2·√0.001 = 0.06325: 0.0632 is just below it, so the two are alike to 0.1 % but not identical
    assert len(set(runs.values())) == 2 + 4
    metrics = ablation(tmp_path, runs=runs, values=values, axis="min_noise_level", second="kappa", reference="κ 2, 0.04")
    assert metrics["figure"] == "heat map" and metrics["same"] == {"κ 1, 0.0632": "κ 1, 0.04", "κ 1, 0.2": "κ 1, 0.04"}
    assert {r["method"] for r in metrics["paired"]} == set(runs) - set(metrics["same"]) - {"κ 2, 0.04"}

    three = [label(**v) for v in values.values() if v["kappa"] == 2][:3]
    line = ablation(tmp_path, runs={k: runs[k] for k in three}, values={k: values[k] for k in three}, axis="min_noise_level", log=True, reference="κ 2, 0.04")
    assert line["figure"] == "lines" and len(line["means"]) == 6
    several = {"shipped": evaluation(tmp_path / "steps", 0, (1, 2, 4, 15))}
    steps = ablation(tmp_path, runs=several, axis="steps", reference="15 steps", difference=False)
    assert [m["setting"] for m in steps["means"]] == ["1 step", "2 steps", "4 steps", "15 steps"]
    assert "PSNR of shipped is better with 1 step (+1.4" in steps["conclusion"]
    longer = {"15": runs["κ 2, 0.04"], "20": evaluation(tmp_path / "20", 0.2, (1, 20), seed=9)}
    chains = ablation(tmp_path, runs=longer, values={"15": {"steps": 15}, "20": {"steps": 20}}, reference="15")
    assert {m["at"] for m in chains["means"]} == {"1 step", "all steps"} and "at all steps is better with 20" in chains["conclusion"]

    with pytest.raises(ExperimentError, match="has no number 'kappa'"):
        ablation(tmp_path, runs=several, values={"shipped": {}}, axis="kappa", reference="shipped")
    with pytest.raises(ExperimentError, match="none of the settings, which are shipped"):
        ablation(tmp_path, runs=several, reference="haar")
    fewer = {"a": several["shipped"], "b": evaluation(tmp_path / "fewer", 0, images=5)}
    with pytest.raises(ExperimentError, match="not measured on the same images"):
        ablation(tmp_path, runs=fewer, reference="a")


def same_chain(a: dict, b: dict) -> bool:
    """Whether two sets of parameters make one chain."""
    first, second = ResShiftSchedule(**a), ResShiftSchedule(**b)
    return first.kappa == second.kappa and np.array_equal(first.sqrt_etas, second.sqrt_etas)


def test_swap(tmp_path):
    """Haar for Haar is the same model; db2 is another codec around the same network, and it can be fine-tuned."""
    file = ROOT / "nbs/experiments/ablation_small.yaml"
    results = {r.run.name: r for r in run_experiment(file, tmp_path)}
    assert {r.status for r in results.values()} == {"finished"}, [r.message for r in results.values()]
    shipped, haar, db2, tuned = (load_model(find_model(m))[0] for m in
                                 ("compact", *(results[n].run_dir for n in ("swap-haar", "swap-db2", "tuned-db2"))))
    up = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(shipped.noise_shape(up), generator=torch.Generator().manual_seed(1))
    outputs = [m.restore(up, 2, noise_sampler=lambda: noise) for m in (shipped, haar, db2)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    for name, value in shipped.network.state_dict().items():
        assert torch.equal(value, db2.network.state_dict()[name]), name
    assert not torch.equal(shipped.latent_space.sigma, db2.latent_space.sigma)  # measured again
    assert tuned.config == used_as(db2.config, tuned.config)
    assert not torch.equal(tuned.network.last.weight, db2.network.last.weight)
    bands = json.loads((results["swap-haar"].run_dir / "metrics.json").read_text())["tables"][0]["rows"]
    assert all(row[1:] == [1.0, 1.0, 1.0] for row in bands)
    verdict = json.loads((results["ablation"].run_dir / "metrics.json").read_text())
    assert set(verdict["accepted"]) == {"db2"} and verdict["conclusion"].startswith("By the rule of a drop below 0.5 dB")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_files(file):
    """Every file can be expanded, ends in the stage, asks something, and compares to a setting that it has."""
    runs = load_experiment(file)
    last = [r for r in runs if r.stage == "ablation"]
    assert last and runs[-1] is last[-1]
    for run in last:
        params = run.params
        assert params["title"] != "Ablation" and len(set(params["runs"].values())) + (params["axis"] == "steps") >= 2
        assert params["axis"] == "steps" or params["reference"] in params["runs"]
        assert params["repeat"] in ("", *params["runs"])
        by_folder = {}
        for label, folder in params["runs"].items():
            twin = by_folder.setdefault(folder, label)
            assert twin == label or same_chain(params["values"][twin], params["values"][label]), (twin, label)
    made = {(r.stage, r.run_id): r for r in runs}
    for run in (r for r in runs if r.stage == "train"):  # it can be trained, and fits what it starts from
        config = configured(run.params)
        check_config(config)
        term_configs(config.terms)
        RestorationModel(config.model)
        assert config.warmup < config.iterations < config.checkpoint_every * 10
        if config.initial:
            (origin,) = (made[need] for need in run.needs)
            if origin.stage == "train":
                expected = configured(origin.params).model
            else:
                swapped = {"wavelet": origin.params["wavelet"]}
                expected = dataclasses.replace(load_model(find_model(origin.params["model"]))[0].config, codec_options=swapped)
            assert config.model == used_as(expected, config.model)


def used_as(config: ModelConfig, other: ModelConfig) -> ModelConfig:
    """The configuration, sampled as the other is: how a model is best used is no part of what a training takes over, and the network
    of a single step only where it is asked for."""
    return dataclasses.replace(config, mean=other.mean, **{key: getattr(other, key) for key in USE if key != "max_steps"})


def configured(params: dict) -> TrainConfig:
    """The configuration of a run of the stage train."""
    return configure(TrainConfig, {k: v for k, v in params.items() if k != "preflight"})
