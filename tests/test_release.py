"""The files that the shipped models were made by, and the one that makes them learn another camera, go on from shipped weights."""
from pathlib import Path

import pytest
import torch

from difiisr_dwt.configuration import configure
from difiisr_dwt.models import available_models, find_model, load_model
from difiisr_dwt.runs import load_experiment
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file, name", [
    ("release", "compact"), ("release", "compact-open"), ("release", "robust-finder-begin"), ("release", "robust-network"), ("release", "robust"),
    ("release", "compact-1step"),
    ("fine_tune", ""),
])  # fmt: skip
def test_goes_on_from_shipped_weights(tmp_path, file, name):
    """Two iterations of each with its own options: what is told, limited and weighed as it says, and the weights move."""
    runs = load_experiment(ROOT / f"nbs/experiments/{file}.yaml")
    params = dict(next(run for run in runs if not name or run.name == name).params)
    assert params.pop("preflight") is True  # the stage's own
    params |= {"initial": "compact", "train": ["scenes:2"], "weights": [], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64,
               "batch": 2, "iterations": 2, "warmup": 1, "validate_every": 2, "log_every": 1, "device": "cpu"}  # fmt: skip
    config = configure(TrainConfig, params)
    found = train(config, tmp_path)
    assert found["psnr_1"] > found["psnr_bicubic"], "the shipped weights are where it began"
    model, info = load_model(tmp_path / "model.safetensors")
    assert info["training"]["initial"] == "compact" and (config.error_of == "image") != config.frozen
    before = load_model(find_model("compact"))[0].network.first.weight
    assert torch.equal(model.network.first.weight, before) == config.frozen
    if name in available_models():  # and the shipped file is of that kind
        shipped = load_model(find_model(name))[0]
        assert shipped.config == model.config and shipped.max_steps == model.max_steps
