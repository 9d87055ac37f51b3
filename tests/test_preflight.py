"""The look before a training changes nothing of it, finds what is cut, and the stage shows it beside its curves."""
import dataclasses
import json
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from difiisr_dwt import preflight
from difiisr_dwt import training_step as step_module
from difiisr_dwt.datasets import degrade
from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.gradients import perturbed
from difiisr_dwt.images import ThermalImage, write_image
from difiisr_dwt.models import DetailConfig, ModelConfig, NetworkConfig
from difiisr_dwt.preflight import PreflightError, check_before
from difiisr_dwt.runs import find_stage, stage_parameters
from difiisr_dwt.thermal_scenes import render_scene
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train

ROOT = Path(__file__).resolve().parents[1]
TINY = NetworkConfig(channels=(16, 24), blocks=1)
CONFIG = TrainConfig(
    train=("scenes:3",), validation=("scenes:1@1000000",), validation_images=1, crop=64, batch=2, iterations=6, warmup=2, checkpoint_every=3,
    validate_every=6, log_every=2, sigma_batches=2, device="cpu", model=ModelConfig(network=TINY),
)


def test_the_result_is_the_same_without(tmp_path):
    """Looked at before the start and before going on, a run ends with the bytes of one that nobody looked at."""
    class Stopped(Exception):
        pass

    def stop(state):
        if state.iteration == 4:
            raise Stopped

    train(CONFIG, tmp_path / "plain")
    report = check_before(CONFIG, tmp_path / "looked at")
    report.demand()
    with pytest.raises(Stopped):
        train(CONFIG, tmp_path / "looked at", stop, report.dataset)
    report = check_before(CONFIG, tmp_path / "looked at")
    report.demand()
    assert "goes on at iteration 3" in str(report) and "3 to go" in str(report)
    train(CONFIG, tmp_path / "looked at", None, report.dataset)
    for name in ("checkpoints/00000006.safetensors", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "looked at" / name).read_bytes()
    with pytest.raises(PreflightError, match="started with another 'ema'"):
        check_before(dataclasses.replace(CONFIG, ema=0.5), tmp_path / "plain").demand()


@pytest.mark.parametrize("part", ["mse", "edges", "details"])
def test_a_part_that_is_cut_is_named(tmp_path, monkeypatch, part):
    """Whichever part of the loss loses its gradient, the others do not hide it, nor a ramp that begins at zero."""
    model = ModelConfig(codec="ll", network=TINY, details=DetailConfig("cnn"))
    config = dataclasses.replace(CONFIG, model=model, terms={"edges": {"weight": 0.0, "end": 0.1}})
    check_before(config, tmp_path).demand()
    if part == "details":
        loss = step_module.RestorationModel.detail_loss
        monkeypatch.setattr(step_module.RestorationModel, "detail_loss", lambda *a: loss(*a).detach())
    else:
        whole = step_module.objective
        monkeypatch.setattr(step_module, "objective", lambda *a, **k: {n: v.detach() if n == part else v for n, v in whole(*a, **k).items()})
    with pytest.raises(PreflightError, match=rf"gradients: the part '{part}' of the loss does not reach the first layer.*cut on its way"):
        check_before(config, tmp_path).demand()


def test_frames_that_are_no_pairs(tmp_path):
    """LR of other frames, of the right size: their correlation tells."""
    for number in range(4):
        hr, _ = degrade(ThermalImage.from_native(render_scene(number).image))
        _, lr = degrade(ThermalImage.from_native(render_scene(number + 50).image))
        for folder, image in (("HR", hr), ("LR", lr)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / "data" / folder / f"{number}.png", image)
    with pytest.raises(PreflightError, match="data: HR and LR of .* do not show the same"):
        check_before(dataclasses.replace(CONFIG, train=(str(tmp_path / "data"),)), tmp_path / "run").demand()


def test_no_room_for_checkpoints(tmp_path, monkeypatch):
    """The disk is measured against what will lie on it."""
    real = shutil.disk_usage
    monkeypatch.setattr("difiisr_dwt.preflight.shutil.disk_usage", lambda p: real(p)._replace(free=1_000_000))
    with pytest.raises(PreflightError, match=r"disk: .*1 MB are free, 6 MB are needed for 2 checkpoints; make room"):
        check_before(CONFIG, tmp_path).demand()


def test_the_stage_has_the_parameters_of_a_training():
    """Names and defaults of the stage are those of TrainConfig, but for data and length; and whether to look first."""
    given = stage_parameters(find_stage("train", ROOT))
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    assert list(given) == [*fields, "preflight"] and given["preflight"] is True
    default = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))
    shorter = {"train", "validation"}
    for name in fields:
        if name not in shorter and not isinstance(default[name], dict):
            assert given[name] == default[name], name


def test_the_stage_shows_the_run(tmp_path):
    """Through papermill: the table before, one figure that was drawn anew, the bar with the time left, strips and curves at the end."""
    (tmp_path / "nbs").mkdir()
    values = {
        "train": ["scenes:3"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64, "batch": 2, "iterations": 40,
        "warmup": 2, "validate_every": 20, "log_every": 5, "sigma_batches": 2, "device": "cpu",
        "model": {"network": {"channels": [16, 24], "blocks": 1}, "schedule": {"steps": 4}},
    }
    file = tmp_path / "nbs" / "train.yaml"
    file.write_text(yaml.safe_dump({"stage": "train", "params": values}))
    (result,) = run_experiment(file, tmp_path / "reports")
    assert result.status == "finished", result.message
    notebook = nbformat.read(result.run_dir / "notebook.ipynb", 4)
    outputs = [(cell.source, out) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    printed = "".join(out.text for source, out in outputs if out.output_type == "stream" and "check_before" in source)
    assert all(f"✓ {what}" in printed for what in ("configuration", "data", "codec", "gradients", "time", "disk"))
    trained = [out for source, out in outputs if "LiveCurves(run_dir" in source]
    assert sum("image/png" in out.get("data", {}) for out in trained) == 1, "one figure, the last"
    bar = "".join(out.text for out in trained if out.output_type == "stream")
    assert "40/40" in bar and "it/s" in bar and "<00:00" in bar, bar
    assert (result.run_dir / "notebook.ipynb").stat().st_size < 500_000
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    loss, psnr, lpips = (curve["series"] for curve in metrics["curves"])
    assert [p[0] for p in loss["loss"]] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [p[0] for p in psnr["1 step"]] == [20, 40] == [p[0] for p in lpips["4 steps"]]
    assert metrics["summary"]["iterations"] == 40 and metrics["best"]["psnr_1"] in [p[1] for p in psnr["1 step"]]
    assert all((result.run_dir / figure["file"]).stat().st_size > 5000 for figure in metrics["figures"])


def test_a_relu_that_is_off_is_no_cut_path(tmp_path, monkeypatch):
    """The few channels of RCAN's attention may all be off for a batch: no gradient reaches what is before them, and nothing is wrong."""
    pytest.importorskip("spandrel")
    model = ModelConfig(architecture="rcan", codec="pixel", baseline={"groups": 1, "blocks": 1, "features": 16})
    config = dataclasses.replace(CONFIG, model=model)

    def off(network, **seed):
        network = perturbed(network, **seed)
        if seed:
            return network
        for name, parameter in network.named_parameters():
            if name.endswith("conv_du.0.bias"):
                parameter.data.fill_(-0.1)
        return network

    monkeypatch.setattr(preflight, "perturbed", off)
    check_before(config, tmp_path).demand()
    monkeypatch.setattr(preflight, "_begin_anew", lambda network, seed: None)
    with pytest.raises(PreflightError, match=r"no gradient reaches .*conv_du\.0"):
        check_before(config, tmp_path).demand()
