"""A VQ first stage trained from nothing within the budget: saved with the model, not fitted again, and safe to interrupt."""
import dataclasses
import json
import os
import signal

import pytest
import torch

from difiisr_dwt import training as training_module
from difiisr_dwt import training_step as step_module
from difiisr_dwt.checkpoints import TrainingError, read_log
from difiisr_dwt.models import ModelConfig, NetworkConfig, load_model
from difiisr_dwt.preflight import check_before
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import Preempted, train

SMALL = {"ch": 16, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 3, "in_channels": 1, "out_ch": 1, "resolution": 64, "groups": 4}
MODEL = ModelConfig(
    codec="vq_f4", codec_options={"n_embed": 64, "ddconfig": SMALL}, target="image", scaling="std", condition="packet",
    network=NetworkConfig(channels=(16, 24), blocks=1),
)
CONFIG = TrainConfig(
    train=("scenes:3",), validation=("scenes:1@1000000",), validation_images=1, crop=64, batch=2, iterations=4, warmup=1, checkpoint_every=2,
    validate_every=4, log_every=1, sigma_batches=2, codec_iterations=12, codec_crop=32, device="cpu", model=MODEL,
)


class Stopped(Exception):
    """The end of a process, without a word."""


def test_it_is_fitted_saved_and_not_fitted_again(tmp_path, monkeypatch):
    """The model file alone is enough, a run that goes on does not fit, and ends with the bytes of one that was never interrupted."""
    train(CONFIG, tmp_path / "plain")

    def stop(state):
        if state.iteration == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(CONFIG, tmp_path / "cut", stop)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "fit_vq", lambda *_, **__: pytest.fail("fitted again"))
        train(CONFIG, tmp_path / "cut")
    for name in ("model.safetensors", "checkpoints/00000004.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()

    model, _ = load_model(tmp_path / "plain/model.safetensors")
    fresh = step_module.codec_to_fit(CONFIG)
    assert not torch.equal(model.latent_space.codec.network.encoder.conv_in.weight, fresh.network.encoder.conv_in.weight)
    first = read_log(tmp_path / "plain")[0]
    assert first["iteration"] == 0 and first["codec_psnr"] == pytest.approx(training_module.codec_psnr(model, CONFIG), abs=1e-3)
    assert first["cpu_seconds"] == first["codec_seconds"] > 0 and read_log(tmp_path / "plain")[-2]["cpu_seconds"] > first["cpu_seconds"]
    assert sum("codec_psnr" in entry for entry in read_log(tmp_path / "cut")) == 1


def test_asked_to_stop_during_the_fit(tmp_path, monkeypatch):
    """SIGTERM then ends the run with a word, and the same command makes of it what an undisturbed run makes."""
    train(CONFIG, tmp_path / "plain")
    real, asked = step_module.fit_vq, []

    def asks(network, images, *args, **options):
        for number, image in enumerate(images):
            if number == 5 and not asked:
                asked.append(os.kill(os.getpid(), signal.SIGTERM))
            yield image

    monkeypatch.setattr(step_module, "fit_vq", lambda network, images, *a, **k: real(network, asks(network, images), *a, **k))
    with pytest.raises(Preempted, match="pre-empted at iteration 0 .SIGTERM., while the codec was fitted"):
        train(CONFIG, tmp_path / "cut")
    assert asked and not list((tmp_path / "cut").glob("checkpoints/*.safetensors"))
    train(CONFIG, tmp_path / "cut")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()


def test_the_fit_is_a_part_of_the_budget(tmp_path):
    """Its time is taken from the network's; a run that goes on keeps both counts; a look before it finds nothing wrong."""
    config = dataclasses.replace(CONFIG, cpu_minutes=0.05, codec_share=0.5, iterations=10**6, checkpoint_every=1, validate_every=10**6)

    def stop(state):
        if state.iteration == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, tmp_path, stop)
    budget = json.loads((tmp_path / "budget.json").read_text())
    assert budget["codec_seconds"] == pytest.approx(1.5, rel=0.6)
    assert budget["codec_seconds"] + budget["iterations"] * budget["seconds_per_iteration"] == pytest.approx(3.0, rel=0.1)
    report = check_before(config, tmp_path)
    report.demand()
    assert "goes on at iteration" in str(report)
    train(config, tmp_path, dataset=report.dataset)
    assert json.loads((tmp_path / "budget.json").read_text()) == budget
    assert read_log(tmp_path)[-1]["iteration"] == budget["iterations"]


@pytest.mark.parametrize(("change", "sentence"), [
    ({"codec_share": 0.5}, "part of 'cpu_minutes'"),
    ({"codec_crop": 30}, "'codec_crop' must be a multiple of 4"),
    ({"cpu_minutes": 0.01, "codec_share": 0.5, "model": ModelConfig(network=MODEL.network)}, "'packet' has nothing to fit"),
    ({"model": ModelConfig(codec="vq_f4", network=MODEL.network)}, "needs a trained first stage"),
])
def test_refusals(tmp_path, change, sentence):
    """A share of nothing, of a codec without parameters, and a first stage of the published size without weights."""
    with pytest.raises(TrainingError, match=sentence):
        train(dataclasses.replace(CONFIG, **change), tmp_path)
