"""Every loss of a training: derivatives against finite differences, weights against independent derivations, the log against both."""
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from difiisr_dwt.codecs import make_codec
from difiisr_dwt.configuration import ConfigurationError, configure
from difiisr_dwt.discriminator import PatchDiscriminator
from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.gradients import perceptual_distance
from difiisr_dwt.latent_space import LatentSpace
from difiisr_dwt.losses import (
    STEP_WEIGHTS,
    adversarial_loss,
    charbonnier,
    decoded_loss,
    discriminator_loss,
    edge_loss,
    feature_loss,
    gradient_similarity_loss,
    kl_weights,
    latent_mse,
    r1_penalty,
    ramp,
    spectrum_loss,
    step_weights,
)
from difiisr_dwt.objective import Term, TermConfig, drowned, gradient_norms, make_terms, objective, shares, term_configs
from difiisr_dwt.schedule import ResShiftSchedule
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train, training_data
from difiisr_dwt.training_step import initial_model, start_state, training_step

double = torch.float64
T = 15


def normal(*shape, seed=0, dtype=double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(size=16, count=2, seed=0):
    """HR and up-sampled LR, or two images: smooth with some texture, in [0, 1]."""
    x = torch.linspace(0, 3, size, dtype=double)
    image = 0.5 + 0.2 * torch.sin(x[:, None] * 2 + x) + 0.05 * normal(count, 1, size, size, seed=seed)
    return image, image + 0.05 * normal(count, 1, size, size, seed=seed + 1)


class TinyFeatures(nn.Module):
    """Two layers with smooth activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, dtype=double), nn.Conv2d(3, 2, 3, stride=2, dtype=double)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=number) / 3)

    def forward(self, image):
        first = torch.tanh(self.first(image))
        return first, torch.tanh(self.second(first))


def judge():
    """A small discriminator in float64, its weights not so small that its slopes vanish."""
    network = PatchDiscriminator((2, 3)).double()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number) / 2)
    return network


features = TinyFeatures().requires_grad_(False)
DISTANCES = {
    "charbonnier": charbonnier, "edges": edge_loss, "gms": gradient_similarity_loss, "spectrum": spectrum_loss,
    "features": partial(feature_loss, features=features),
}  # fmt: skip
JUDGED = DISTANCES | {"adversarial": lambda image, _: adversarial_loss(judge()(image))}


class Through(nn.Module):
    """The way from a latent to a loss, as a module, so that the codec's filters can be handed in."""

    def __init__(self, space, distance):
        super().__init__()
        self.space, self.distance = space, distance

    def forward(self, x0, hr, up):
        return decoded_loss(x0, hr, up, self.space, self.distance)


# Derivatives


@pytest.mark.parametrize("name", JUDGED)
def test_gradient_of_a_distance(name):
    """On the image, and through the codec of the first design, where its resampling filters have a derivative too."""
    truth, image = pair(8)
    assert gradcheck(lambda x: JUDGED[name](x, truth), (image.requires_grad_(),))
    space = LatentSpace(make_codec("all_bands_learnable"), target="image").double()
    hr, up = (2 * x.detach() - 1 for x in (truth, image))
    x0 = (space.encode(hr, up) + 0.1 * normal(2, 7, 2, 2)).detach().requires_grad_()
    path = Through(space, JUDGED[name])
    names, filters = zip(*path.named_parameters(), strict=True)

    def of(x0, *values):
        return functional_call(path, dict(zip(names, values, strict=True)), (x0, hr, up))

    assert len(filters) == 2 and gradcheck(of, (x0, *filters), fast_mode=True)


def test_gradient_of_the_latent_error():
    prediction, x0 = normal(3, 4, 3, 3).requires_grad_(), normal(3, 4, 3, 3, seed=1)
    bands, weights = torch.tensor([1.0, 0, 2, 5], dtype=double), step_weights(ResShiftSchedule(), "posterior")[[0, 5, 14]]
    for options in ((), (bands,), (None, weights), (bands, weights)):
        assert gradcheck(lambda z, options=options: latent_mse(z, x0, *options), (prediction,))


def test_gradients_of_the_judge():
    """Its loss in its logits; and the penalty on its gradient, which is a second derivative, in every one of its weights."""
    real, fake = (normal(2, 1, 3, 3, seed=s).requires_grad_() for s in (0, 1))
    assert gradcheck(discriminator_loss, (real, fake)) and gradcheck(adversarial_loss, (fake,))
    network, image = judge(), pair(8)[0]
    names, weights = zip(*network.named_parameters(), strict=True)

    def penalty(*values):
        return r1_penalty(lambda x: functional_call(network, dict(zip(names, values, strict=True)), (x,)), image)

    weights = [w.detach().clone().requires_grad_() for w in weights]
    assert gradcheck(penalty, tuple(weights))
    gradients = torch.autograd.grad(penalty(*weights).sum(), weights, allow_unused=True)
    slopes = {n: g for n, g in zip(names, gradients, strict=True) if n.endswith("weight")}
    assert all(g is not None and g.abs().max() > 0 for g in slopes.values()), "a penalty that no weight feels"


@pytest.mark.parametrize("kind", STEP_WEIGHTS)
def test_gradient_of_a_whole_objective(kind):
    """All at once, each image at a step of its own, with weights per band and per step."""
    schedule, space = ResShiftSchedule(), LatentSpace(make_codec("packet")).double()
    truth, other = pair(8, 3)
    hr, up, t = 2 * truth - 1, 2 * other - 1, torch.tensor([0, 7, 14])
    x0, config = space.encode(hr, up), TermConfig(0.3)
    terms = [Term(n, config, d, step_weights(schedule, kind)) for n, d in JUDGED.items()]
    bands = torch.linspace(0.5, 2, 16, dtype=double)

    def loss(z):
        return sum(objective(z, x0, t, hr, up, space, terms, band_weights=bands, mse_weights=step_weights(schedule, kind)).values())

    z = (x0 + 0.3 * normal(*x0.shape)).requires_grad_()
    assert gradcheck(loss, (z,), fast_mode=True)
    (gradient,) = torch.autograd.grad(loss(z), z)
    heard = step_weights(schedule, kind)[t] > 0
    assert ((gradient.abs().amax((1, 2, 3)) > 0) == heard).all(), "an image whose step has no weight teaches nothing"


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_of_a_training_has_the_gradient_of_the_exact_one(net):
    """What trains is float32; `perceptual_distance` is float64, and checked against finite differences in test_gradients."""
    truth, image = pair(64, 1)
    (term,) = make_terms({f"lpips-{net}": 1.0}, ResShiftSchedule())
    gradients = []
    for distance, dtype in ((term.distance, torch.float32), (perceptual_distance(f"lpips-{net}"), double)):
        x = image.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(distance(x, truth.to(dtype)).sum(), x)[0].double())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-3 * gradients[1].abs().max().item())


# Properties


@pytest.mark.parametrize("name", DISTANCES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([8, 12, 15]))
def test_distance_is_one(name, seed, size):
    """Zero for equal images, positive for others, the same in both directions, one number per image in any order."""
    a, b = pair(size, seed=seed)
    distance = DISTANCES[name]
    assert (distance(a, a) == 0).all() and (distance(b, a) > 0).all()
    torch.testing.assert_close(distance(b, a), distance(a, b))
    torch.testing.assert_close(distance(b.flip(0), a.flip(0)), distance(b, a).flip(0))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), s=st.floats(0.1, 10), shift=st.floats(-1, 1))
def test_scale_and_shift(seed, s, shift):
    """How each loss answers to contrast and brightness."""
    a, b = pair(9, seed=seed)
    for distance in (charbonnier, edge_loss):
        torch.testing.assert_close(distance(s * a, s * b, s * 1e-3), s * distance(a, b, 1e-3))
        torch.testing.assert_close(distance(a + shift, b + shift), distance(a, b))
    torch.testing.assert_close(edge_loss(a + shift, b), edge_loss(a, b))  # slopes have no brightness
    torch.testing.assert_close(spectrum_loss(a.roll(3, -1), b), spectrum_loss(a, b))  # nor has a spectrum a place
    bands = torch.linspace(1, 2, 1, dtype=double)
    torch.testing.assert_close(latent_mse(s * a, s * b, bands), s**2 * latent_mse(a, b))
    torch.testing.assert_close(latent_mse(a, b, s * bands), latent_mse(a, b, bands))  # a mean, whatever the weights' sum


def test_large_differences_are_absolute_small_ones_squared():
    zero = torch.zeros(1, 1, 4, 4, dtype=double)
    assert charbonnier(zero + 1, zero).item() == pytest.approx(1, abs=2e-3)
    assert charbonnier(zero + 1e-5, zero).item() == pytest.approx(1e-10 / 2e-3, rel=1e-3)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), c=st.floats(0.1, 10))
def test_judge(seed, c):
    """Real and fake change places with the sign; whoever is believed loses less; R1 grows with the square of the slopes."""
    real, fake = normal(2, 1, 3, 3, seed=seed), normal(2, 1, 3, 3, seed=seed + 1)
    torch.testing.assert_close(discriminator_loss(real, fake), discriminator_loss(-fake, -real))
    assert (adversarial_loss(fake + c) < adversarial_loss(fake)).all() and (adversarial_loss(fake) > 0).all()
    image, network = pair(8, seed=seed)[0], judge()
    torch.testing.assert_close(r1_penalty(lambda x: c * network(x), image), c**2 * r1_penalty(network, image))
    flat = lambda x: 0 * x.sum() + torch.full((len(x), 1, 2, 2), c, dtype=double)
    assert (r1_penalty(flat, image) == 0).all(), "a judge without slope has nothing to pay"


# Weights per step, and over the run


@pytest.mark.parametrize("steps", [3, 4, 15, 16, 20])
def test_thirds(steps):
    weights = step_weights(ResShiftSchedule(steps=steps), "thirds").tolist()
    assert weights == [1 if 3 * t < steps else 0.1 if 3 * t < 2 * steps else 0.001 for t in range(steps)]
    first = step_weights(ResShiftSchedule(steps=steps), "first_third").tolist()
    assert first == [float(w == 1) for w in weights]


CHAINS = {"steps": st.integers(2, 30), "kappa": st.floats(0.3, 4), "least": st.floats(0.02, 0.3), "power": st.floats(0.2, 3)}


@settings(deadline=None, max_examples=25)
@given(**CHAINS)
def test_snr_weights_fall(steps, kappa, least, power):
    """Strictly, from one; and each is the gain of the best linear estimate of a whitened x0 from x_t (y = 0)."""
    chain = ResShiftSchedule(steps, least, kappa, power)
    weights = step_weights(chain, "snr")
    assert weights[0] == 1 and (weights.diff() < 0).all() and (weights > 0).all()
    signal, noise = 1 - chain.etas, chain.kappa**2 * chain.etas  # x_t = signal·x0 + √noise·ε
    gain = signal * signal / (signal**2 + noise)  # covariance(x0, x_t)·signal / variance(x_t)
    torch.testing.assert_close(weights, gain / gain[0])


@settings(deadline=None, max_examples=25)
@given(**CHAINS)
def test_posterior_weights_are_those_of_the_kl_divergence(steps, kappa, least, power):
    """KL between q(x_{t−1} | x_t, x0) and the same with a guess, by Bayes' rule from the forward chain alone."""
    chain = ResShiftSchedule(steps, least, kappa, power)
    etas = chain.sqrt_etas.square()
    x0, guess, y, x_t = normal(4, seed=1).unbind()

    def posterior(x0, before, step):
        prior, likelihood = 1 / (kappa**2 * before), 1 / (kappa**2 * step)  # precisions
        mean = (prior * (x0 + before * (y - x0)) + likelihood * (x_t - step * (y - x0))) / (prior + likelihood)
        return torch.distributions.Normal(mean, (prior + likelihood) ** -0.5)

    coefficients = [math.nan]
    for before, step in zip(etas[:-1], etas.diff(), strict=True):
        divergence = torch.distributions.kl_divergence(posterior(x0, before, step), posterior(guess, before, step))
        coefficients.append((divergence / (x0 - guess) ** 2).item())
    # the first step's posterior is a point: it borrows the second's variance, (κ² η₀ (η₁ − η₀) / η₁)
    coefficients[0] = (0.5 / (kappa**2 * etas[0] * (etas[1] - etas[0]) / etas[1])).item()
    expected = torch.tensor(coefficients, dtype=double)
    torch.testing.assert_close(kl_weights(chain), expected / expected.mean(), rtol=1e-6, atol=0)


def test_ramps():
    """The first design's 0.024 at 10 K and 0.080 at 50 K of 100 K; ends, middle, and what lies beyond."""
    config = TermConfig(0.01, end=0.15, ramp_iterations=100_000)
    term = Term("edges", config, edge_loss, torch.ones(T))
    assert term.weight(0, 200_000) == 0.01 and term.weight(100_000, 200_000) == term.weight(150_000, 200_000) == 0.15
    assert term.weight(10_000, 200_000) == pytest.approx(0.024, abs=1e-12)
    assert term.weight(50_000, 200_000) == pytest.approx(0.080, abs=1e-12)
    whole = Term("edges", TermConfig(0.01, end=0.15, start=10), edge_loss, torch.ones(T))
    assert [whole.weight(i, 100) for i in (9, 10, 99)] == [0.0, 0.01, 0.15]
    for shape in ("linear", "cosine"):
        assert (ramp(0, 0.01, 0.15, shape), ramp(1, 0.01, 0.15, shape)) == (0.01, pytest.approx(0.15))
        assert ramp(0.5, 0.01, 0.15, shape) == pytest.approx(0.08)
        values = [ramp(i / 50, 0.01, 0.15, shape) for i in range(51)]
        assert values == sorted(values) and ramp(-1, 0.01, 0.15, shape) == 0.01
    assert ramp(0.25, 0, 1, "cosine") == pytest.approx(math.sin(math.pi / 8) ** 2)  # slower than the line at first
    assert Term("edges", TermConfig(0.3), edge_loss, torch.ones(T)).weight(7, 9) == 0.3


@pytest.mark.parametrize(("options", "message"), [
    ({"weight": -0.1}, "terms.edges.weight"), ({"start": -1}, "terms.edges.start"), ({"ramp_iterations": -5}, "ramp_iterations"),
    ({"ramp": "cosin"}, "cosine"), ({"steps": "third"}, "thirds"), ({"wait": 3}, "wait"),
])
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ConfigurationError, match=message):
        term_configs({"edges": options})


# Composition


def composed(t, terms, iteration=0, iterations=1, **options):
    space = LatentSpace(make_codec("packet"), torch.linspace(0.05, 0.2, 16)).double()
    truth, other = pair(16, len(t))
    hr, up = 2 * truth - 1, 2 * other - 1
    x0 = space.encode(hr, up)
    guess = (0.5 * x0).requires_grad_()
    parts = objective(guess, x0, torch.tensor(t), hr, up, space, terms, iteration, iterations, **options)
    return parts, guess, x0, (space.decode(guess, up) + 1) / 2, truth


def test_parts_are_the_formula():
    """Sum over terms of weight · mean of (step weight · distance), in the iteration's weights; the MSE first."""
    schedule, t = ResShiftSchedule(), [0, 6, 13]
    given_ = {"edges": {"weight": 0.1, "end": 0.3, "steps": "thirds"}, "charbonnier": {"weight": 0.7, "steps": "snr"},
              "spectrum": {"weight": 1.5, "steps": "first_third"}, "adversarial": 0.0}
    terms = make_terms(given_, schedule, discriminator=judge())
    mse_weights = step_weights(schedule, "posterior_5")
    parts, guess, x0, image, truth = composed(t, terms, 5, 11, mse=0.4, mse_weights=mse_weights)
    assert list(parts) == ["mse", "edges", "charbonnier", "spectrum"]  # what weighs nothing is not computed
    stairs, smooth = torch.tensor([1, 0.1, 0.001], dtype=double), step_weights(schedule, "snr")[t]
    torch.testing.assert_close(parts["edges"], 0.2 * (stairs * edge_loss(image, truth)).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts["charbonnier"], 0.7 * (smooth * charbonnier(image, truth)).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts["spectrum"], 1.5 * spectrum_loss(image, truth)[0] / 3, rtol=1e-6, atol=0)  # the mean is over all
    torch.testing.assert_close(parts["mse"], 0.4 * (mse_weights[t] * (guess - x0).square().mean((1, 2, 3))).mean())


def test_a_term_that_hears_nobody_is_still_a_part():
    """So that all processes have the same parts; its gradient is zero, and there is one."""
    parts, guess, *_ = composed([9, 14], make_terms({"edges": {"weight": 1.0, "steps": "first_third"}}, ResShiftSchedule()))
    assert set(parts) == {"mse", "edges"} and parts["edges"] == 0
    (gradient,) = torch.autograd.grad(parts["edges"], guess, retain_graph=True)
    assert (gradient == 0).all() and gradient_norms(parts, guess)["edges"] == 0


def test_gradient_norms_are_autograds():
    """The network is a rotation of its weights: the norm at the prediction is the norm at the weights."""
    space = LatentSpace(make_codec("packet"), torch.linspace(0.05, 0.2, 16)).double()
    truth, other = pair(16)
    hr, up, t = 2 * truth - 1, 2 * other - 1, torch.tensor([2, 11])
    x0 = space.encode(hr, up)
    rotation = torch.linalg.qr(normal(16, 16))[0]
    terms = make_terms({"edges": 0.3, "spectrum": {"weight": 0.2, "steps": "snr"}}, ResShiftSchedule())
    weights = normal(*x0.shape, seed=3).requires_grad_()
    prediction = torch.einsum("cd,bdhw->bchw", rotation, weights)
    parts = objective(prediction, x0, t, hr, up, space, terms)
    norms = gradient_norms(parts, prediction)
    alone = {k: torch.autograd.grad(v, weights, retain_graph=True)[0] for k, v in parts.items()}
    assert norms == pytest.approx({k: g.norm().item() for k, g in alone.items()}, rel=1e-9) and min(norms.values()) > 0
    sum(parts.values()).backward()  # measuring took nothing away
    torch.testing.assert_close(weights.grad, sum(alone.values()))
    assert gradient_norms({"mse": parts["mse"].detach()}, prediction) == {"mse": 0.0}, "a cut gradient is zero in the log, no crash"


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), max_size=5))
def test_shares(values):
    found = shares(values)
    assert found.keys() == values.keys() and all(0 <= v <= 1 for v in found.values())
    assert sum(found.values()) == pytest.approx(1 if any(values.values()) else 0)


def test_tenfold():
    assert drowned({"mse": 1.0, "edges": 10.0, "lpips-alex": 10.1, "details": 99.0}) == ["lpips-alex"]
    assert drowned({"mse": 1.0, "edges": 3.0}, factor=2) == ["edges"]


# In a training

SMALL = {
    "train": ["scenes:2"], "validation": ["scenes:1@1000000"], "crop": 64, "batch": 2, "iterations": 8, "warmup": 2, "validate_every": 8,
    "checkpoint_every": 8, "log_every": 4, "sigma_batches": 2, "model": {"network": {"channels": [8, 16], "blocks": 1}},
}


def logged(tmp_path, terms, **more):
    config = configure(TrainConfig, SMALL | {"terms": terms} | more)
    train(config, tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return config, [e for e in entries if "loss" in e], [e for e in entries if "warning" in e]


def test_log_and_warning(tmp_path):
    """Weights, shares of loss and gradient in every entry; one warning for the term that drowns the MSE, none for the other.

    One term starts within an interval of the log, and its mean is over the whole interval all the same.
    """
    terms = {"edges": 1e5, "charbonnier": {"weight": 1e-3, "end": 2e-3, "start": 6}}
    config, rows, warnings = logged(tmp_path, terms)
    assert [row["iteration"] for row in rows] == [4, 8]
    for row in rows:
        for kind in ("loss_share", "gradient_share"):
            here = {k: v for k, v in row.items() if k.startswith(kind)}
            assert sum(here.values()) == pytest.approx(1) and here[f"{kind}/edges"] > 0.9
        assert row["loss/mse"] + row["loss/edges"] + row["loss/charbonnier"] == pytest.approx(row["loss"])
        assert row["gradient/edges"] > 10 * row["gradient/mse"] > 0
        assert (row["weight/mse"], row["weight/edges"]) == (1.0, 1e5)
    assert rows[0]["loss/charbonnier"] == 0 == rows[0]["weight/charbonnier"]
    assert rows[1]["loss/charbonnier"] > 0 and rows[1]["weight/charbonnier"] == pytest.approx(2e-3)
    assert [(w["iteration"], "'edges'" in w["warning"], "ten times" in w["warning"]) for w in warnings] == [(4, True, True)]


def test_judge_learns_in_a_training(tmp_path):
    """No warning where there is no reason; the discriminator changes, and R1 is in the log and in its gradient."""
    config, rows, warnings = logged(tmp_path, {"adversarial": {"weight": 1e-3, "start": 3}})
    assert not warnings and rows[1]["discriminator/r1"] > 0 and rows[1]["weight/adversarial"] == 1e-3
    ends = {}
    for r1 in (0.0, 1.0):
        config = configure(TrainConfig, SMALL | {"terms": {"adversarial": 1e-3}, "discriminator": {"channels": [4, 8], "r1": r1}})
        dataset = training_data(config)
        state = start_state(initial_model(config, dataset), config)
        before = [p.detach().clone() for p in state.discriminator.parameters()]
        sample = {k: torch.stack([dataset[i][k] for i in (0, 1)]) for k in ("hr", "lr", "kernel")}
        training_step(state, sample, config)
        ends[r1] = [p.detach().clone() for p in state.discriminator.parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(before, ends[r1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*ends.values(), strict=True)), "a penalty that changes nothing"


@pytest.mark.skipif(sys.platform == "win32", reason="stages run on POSIX")
def test_mistakes_stage(tmp_path):
    """Six trainings of two iterations; data that are not here are replaced, and the notebook says so."""
    params = {"train": ["missing/train"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crops": 1, "iterations": 2,
              "validate_every": 2, "log_every": 1, "batch": 2, "crop": 64, "channels": [8, 8], "codec_iterations": 2}
    (tmp_path / "mistakes.yaml").write_text(yaml.safe_dump({"stage": "mistakes", "params": params}))
    (result,) = run_experiment(tmp_path / "mistakes.yaml", tmp_path / "reports")
    assert result.status == "finished", result.message
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    claims, final = (t["rows"] for t in metrics["tables"][:2])
    assert claims[0][1:] == ["a cut LPIPS teaches nothing", "bit for bit the weights of the MSE alone after 2 iterations", "yes"]
    assert [row[0] for row in final] == ["cut", "repaired", "drowned", "ramp", "thirds", "snr", "bicubic"]
    assert {row[3] for row in claims} <= {"yes", "no", "no, at this length"} and len(metrics["figures"]) == 5
    notebook = (result.run_dir / "notebook.ipynb").read_text()
    assert "missing/train - procedural scenes take their place" in notebook and str(Path.home()) not in notebook
    logs = {f.parent.name: f.read_text() for f in (result.run_dir / "trainings").glob("*/metrics.jsonl")}
    first = {name: json.loads(text.splitlines()[0]) for name, text in logs.items()}
    assert first["cut"]["loss"] == first["repaired"]["loss"] and first["cut"]["gradient/lpips-alex"] == 0 < first["repaired"]["gradient/lpips-alex"]
