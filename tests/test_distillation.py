"""One step and four: the maps of SinSR, its trainer, and the experiment files that use them."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from difiisr_dwt.checkpoints import TrainingError
from difiisr_dwt.configuration import configure
from difiisr_dwt.distillation import attempt, teach
from difiisr_dwt.losses import latent_mse
from difiisr_dwt.models import ModelConfig, ModelError, NetworkConfig, RestorationModel, load_model, save_model
from difiisr_dwt.runs import load_experiment
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train

ROOT = Path(__file__).resolve().parents[1]
TINY = NetworkConfig(channels=(16, 24), blocks=1)
SHORT = TrainConfig(
    train=("scenes:4",), validation=("scenes:1@1000000",), validation_images=1, crop=64, batch=4, iterations=12, warmup=2,
    learning_rate=2e-3, ema=0.5, validate_every=12, checkpoint_every=6, log_every=1, sigma_batches=2, device="cpu",
    model=ModelConfig(network=TINY),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained one, if hardly."""
    folder = tmp_path_factory.mktemp("teacher")
    train(dataclasses.replace(SHORT, iterations=100, validate_every=100, checkpoint_every=100), folder)
    return folder / "model.safetensors"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Known(torch.nn.Module):
    """A network whose maps are known: x0 = 2·x_T, and at t = 0 back again."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, t, condition):
        return torch.where((t == 0)[:, None, None, None], x / self.gain, x * self.gain)


def model_with(network):
    torch.manual_seed(0)
    model = RestorationModel(ModelConfig(network=TINY), sigma=torch.full((16,), 0.1), condition_sigma=torch.ones(16))
    model.network = network
    return model


def test_known_maps():
    """A student that has learnt everything has no loss but that of its target, and no gradient reaches the teacher."""
    student, teacher = model_with(Known()), model_with(Known())
    hr, up = torch.rand(2, 1, 32, 32) - 0.5, torch.rand(2, 1, 32, 32) - 0.5
    noise = torch.randn(student.noise_shape(up))
    prediction, target, t, extra = attempt(student, teacher, hr, up, noise)
    x_T = prediction / 2
    assert (t == len(student.schedule) - 1).all() and not target.requires_grad
    torch.testing.assert_close(extra["consistency"], torch.zeros(()), atol=1e-10, rtol=0)  # f(f(x0, 0), T) = x0
    torch.testing.assert_close(extra["inverse"], latent_mse(target / 2, x_T.detach()), atol=1e-6, rtol=1e-5)
    sum(extra.values(), latent_mse(prediction, target)).backward()
    assert student.network.gain.grad is not None and teacher.network.gain.grad is None


def test_the_consistency_term_teaches_the_way_back_only():
    """What the student finds for the ground truth is taken as given (the stopped gradient of SinSR)."""

    class Apart(Known):  # the parameter serves the inverse map alone
        def forward(self, x, t, condition):
            return torch.where((t == 0)[:, None, None, None], x * self.gain, x * 0.5)

    student = model_with(Apart())
    hr, up = torch.rand(1, 1, 32, 32) - 0.5, torch.rand(1, 1, 32, 32) - 0.5
    noise = torch.randn(student.noise_shape(up))
    _, _, _, extra = attempt(student, model_with(Known()), hr, up, noise)
    assert torch.autograd.grad(extra["inverse"], student.network.gain)[0] != 0
    assert torch.autograd.grad(extra["consistency"], student.network.gain, retain_graph=True)[0] == 0
    student.network.gain.data.fill_(3.0)
    _, _, _, doubled = attempt(student, model_with(Known()), hr, up, noise, consistency=2.0)
    x0 = student.latent_space.encode(hr, up)
    torch.testing.assert_close(doubled["consistency"], 2 * latent_mse(1.5 * x0, x0))


def test_teach_is_the_deterministic_chain(teacher):
    """Equal to the sampler of the pipeline: same noise, same image; through fewer steps, another one."""
    model = load_model(teacher)[0]
    up = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    noise = torch.randn(model.noise_shape(up))
    for steps in (15, 4):
        image = model.latent_space.decode(teach(model, up, noise, steps), up)
        torch.testing.assert_close(image, model.restore(up, steps, "ddim", noise_sampler=lambda: noise), atol=1e-5, rtol=0)
    assert not torch.equal(teach(model, up, noise, 15), teach(model, up, noise, 4))


def test_a_student_learns_its_teachers_map(teacher, tmp_path):
    """From the same trainer and from nothing: the parts of the loss are in the log and fall; the result is a model of one step."""
    config = dataclasses.replace(
        SHORT, model=dataclasses.replace(SHORT.model, max_steps=1), iterations=60, validate_every=60,
        distillation=configure(type(SHORT.distillation), {"teacher": str(teacher)}),
    )
    train(config, tmp_path)
    log = [row for row in rows(tmp_path) if "loss" in row]
    first, last = ({part: sum(row[f"loss/{part}"] for row in some) for part in ("mse", "inverse", "consistency")} for some in (log[:10], log[-10:]))
    assert last["mse"] < 0.9 * first["mse"] and last["inverse"] < first["inverse"], (first, last)
    assert sum(last.values()) < sum(first.values())
    student = load_model(tmp_path / "model.safetensors")[0]
    up = torch.rand(1, 1, 64, 64) - 0.5
    assert student.max_steps == 1 and student.restore(up, 1).shape == up.shape
    with pytest.raises(ModelError, match="1"):
        student.restore(up, 15)


def test_a_smaller_student_takes_over_the_deviations(teacher, tmp_path):
    """Without a model to start from, the latent is the teacher's all the same."""
    small = dataclasses.replace(SHORT.model, network=NetworkConfig(channels=(8, 8), blocks=1), max_steps=1)
    options = configure(type(SHORT.distillation), {"teacher": str(teacher), "inverse": 0.0})
    train(dataclasses.replace(SHORT, model=small, iterations=2, validate_every=2, distillation=options), tmp_path)
    sigma = load_model(tmp_path / "model.safetensors")[0].latent_space.sigma
    assert torch.equal(sigma, load_model(teacher)[0].latent_space.sigma)
    assert not any(key.startswith("loss/inverse") for row in rows(tmp_path) for key in row)


def test_teachers_of_another_latent_are_refused(teacher, tmp_path):
    """A sentence says what to take over; so it does for other deviations."""
    options = configure(type(SHORT.distillation), {"teacher": str(teacher)})
    other = dataclasses.replace(SHORT.model, codec="ll")
    with pytest.raises(TrainingError, match="latent and chain of the teacher differ from 'model'"):
        train(dataclasses.replace(SHORT, model=other, distillation=options), tmp_path / "a")
    model = load_model(teacher)[0]
    model.latent_space.sigma *= 2
    save_model(tmp_path / "changed" / "model.safetensors", model)
    config = dataclasses.replace(SHORT, initial=str(tmp_path / "changed"), distillation=options)
    with pytest.raises(TrainingError, match="other deviations than those of"):
        train(config, tmp_path / "b")


@pytest.mark.parametrize("name", ("distill", "sharpen", "four_steps"))
def test_experiment_files(name, teacher, tmp_path):
    """Their own options, on a tiny network and few iterations: what they ask for is what is trained."""
    file = "four_steps" if name == "four_steps" else "one_step"
    runs = load_experiment(ROOT / f"nbs/experiments/{file}.yaml")
    params = dict(next(run for run in runs if run.stage == "train" and (name == file or run.name == name)).params)
    params["model"] = {**params["model"], "network": {"channels": [16, 24], "blocks": 1}}
    if name != "four_steps":
        params["initial"] = str(teacher)
    if params["distillation"]:
        params["distillation"] = {**params["distillation"], "teacher": str(teacher)}
    if name == "sharpen":
        params["terms"] = {**params["terms"], "adversarial": {**params["terms"]["adversarial"], "start": 1}}
    params |= {"train": ["scenes:2"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64, "batch": 2,
               "iterations": 2, "warmup": 1, "validate_every": 2, "log_every": 1, "sigma_batches": 2, "device": "cpu"}  # fmt: skip
    assert params.pop("preflight") is True  # the stage's own
    config = configure(TrainConfig, params)
    train(config, tmp_path)
    last = [row for row in rows(tmp_path) if "loss" in row][-1]
    asked = {"distill": ("inverse", "consistency"), "sharpen": ("lpips-vgg", "gms", "adversarial"), "four_steps": ("lpips-vgg",)}[name]
    assert {key.removeprefix("loss/") for key in last if key.startswith("loss/")} == {"mse", *asked}
    model = load_model(tmp_path / "model.safetensors")[0]
    if name == "four_steps":
        assert len(model.schedule) == 4 == model.max_steps and model.schedule.min_noise_level == 0.2
    else:
        assert model.max_steps == 1 and config.best == "lpips_1"
