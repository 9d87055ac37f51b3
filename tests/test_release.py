"""The files that the shipped models were made by, and the one that makes them learn another camera, go on from shipped weights."""
import dataclasses
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
    ("release", "compact"), ("release", "compact-mean"), ("release", "compact-open"),
    ("release", "robust-finder-begin"), ("release", "robust-network"), ("release", "robust"),
    ("release", "compact-1step"),
    ("fine_tune", ""),
])  # fmt: skip
def test_goes_on_from_shipped_weights(tmp_path, file, name):
    """Two iterations of each with its own options: what is told, limited and weighed as it says, and the weights move."""
    runs = load_experiment(ROOT / f"nbs/experiments/{file}.yaml")
    params = dict(next(run for run in runs if not name or run.name == name).params)
    assert params.pop("preflight") is True  # the stage's own
    params |= {"initial": "compact", "train": ["scenes:2"], "weights": [], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64,
               "batch": 2, "iterations": 2, "warmup": 1, "validate_every": 2, "log_every": 1, "device": "cpu", "processes": 1}  # fmt: skip
    config = configure(TrainConfig, params)
    found = train(config, tmp_path)
    assert found["psnr_1"] > found["psnr_bicubic"], "the shipped weights are where it began"
    model, info = load_model(tmp_path / "model.safetensors")
    assert info["training"]["initial"] == "compact" and (config.error_of in ("image", "psnr")) != config.frozen
    before = load_model(find_model("compact"))[0]
    if config.model.network.stateless and before.mean is not None:
        assert not torch.equal(model.network.first.weight, before.mean.first.weight)
        torch.testing.assert_close(model.network.first.weight, before.mean.first.weight, rtol=0, atol=0.02)
    else:
        assert torch.equal(model.network.first.weight, before.network.first.weight) == config.frozen
    if model.mean is not None:
        assert not torch.equal(model.mean.first.weight, before.mean.first.weight)
        torch.testing.assert_close(model.mean.first.weight, before.mean.first.weight, rtol=0, atol=0.02)  # it goes on, and is not made anew
    if name in available_models():  # and the shipped file is of that kind
        shipped = load_model(find_model(name))[0]
        assert dataclasses.replace(shipped.config, mean=model.config.mean) == model.config and shipped.max_steps == model.max_steps
