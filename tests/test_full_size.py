"""The network of the original, full size: every experiment file fits it, and it learns on the packet latent."""
import math
from pathlib import Path

import pytest
import torch

from difiisr_dwt.configuration import configure
from difiisr_dwt.datasets import PairDataset, batches
from difiisr_dwt.models import ModelConfig, RestorationModel
from difiisr_dwt.runs import load_experiment
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training_step import start_state, training_step

ROOT = Path(__file__).resolve().parents[1]
RUNS = {run.name.partition("/")[0]: run for run in load_experiment(ROOT / "nbs/experiments/full_size.yaml")}
CHANNELS = {"vq_f4": 3, "ll": 1, "full_band": 4, "all_bands_learnable": 7, "packet": 16}


@pytest.mark.parametrize("name", CHANNELS)
def test_experiment_file(name: str):
    """The parameters make a configuration, and the configuration a network of the right size (without its memory)."""
    config = configure(TrainConfig, {k: v for k, v in RUNS[name].params.items() if k != "preflight"}, name)  # the stage's own
    assert (config.crop, config.batch, config.iterations, config.device) == (256, 16, 200_000, "cuda")
    model = RestorationModel(config.model, weights=False)
    latent, seen = torch.zeros(1, CHANNELS[name], 64, 64), 16 if config.model.condition == "packet" else CHANNELS[name]
    network = model.network.to("meta")  # shapes only
    out = network(latent.to("meta"), torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, seen, 64, 64, device="meta"))
    assert model.latent_space.codec.channels == CHANNELS[name] and out.shape == latent.shape
    assert 118e6 < sum(p.numel() for p in model.network.parameters()) < 119.5e6


def test_two_steps_on_the_packet_latent():
    """After two steps the loss is finite and every parameter has a finite gradient that is not zero."""
    torch.manual_seed(0)
    config = TrainConfig(train=("scenes:2",), batch=1, iterations=100, warmup=1, device="cpu", model=ModelConfig(architecture="swin"))
    dataset = PairDataset(config.train, crop=config.crop)
    model = RestorationModel(config.model, sigma=torch.full((16,), 0.05), condition_sigma=torch.full((16,), 0.2)).train()
    model.latent_space.requires_grad_(False)
    state = start_state(model, config)
    for batch in batches(dataset, 1, 0, 2):
        values = training_step(state, batch, config)
        assert math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])
    bad = [n for n, p in state.parameters.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not bad, f"{len(bad)} of {len(state.parameters)}, first {bad[:5]}"
