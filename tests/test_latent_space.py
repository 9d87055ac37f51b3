"The space of the chain, and the designs built on it: units, weights, and a gradient that reaches every layer."
import dataclasses

import pytest
import torch

from difiisr_dwt.checkpoints import TrainingError
from difiisr_dwt.codecs import make_codec
from difiisr_dwt.datasets import MARGIN, upsample_crop
from difiisr_dwt.latent_space import SCALINGS, LatentSpace, choose_sigma, measure_sigma
from difiisr_dwt.light_cnn import LightCNN
from difiisr_dwt.losses import latent_mse
from difiisr_dwt.models import DetailConfig, ModelConfig, NetworkConfig, RestorationModel
from difiisr_dwt.schedule import ResShiftSchedule
from difiisr_dwt.train_config import TrainConfig, check_config
from difiisr_dwt.training_step import TrainingLoss, draw_chain, loss_weights

TINY = NetworkConfig(channels=(8, 16), blocks=1, groups=4, embedding_channels=16)


def random_image(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def spaces(name, target="residual", **options):
    codec = make_codec(name, 1)
    hr, up = random_image(4, 1, 32, 32), random_image(4, 1, 32, 32, seed=1) / 2
    sigma, hr_sigma = measure_sigma(codec, [(hr, up)])
    return LatentSpace(codec, sigma, hr_sigma, target, **options), hr, up


@pytest.mark.parametrize("target", ("residual", "image"))
@pytest.mark.parametrize("name", ("packet", "pyramid", "dct", "pixel", "ll", "ll_hh", "full_band"))
def test_decode_undoes_encode(name, target):
    "With kept bands of the image itself; odd sizes too, and the end of the chain is the up-sampled LR."
    for scaling in SCALINGS:
        space, hr, up = spaces(name, target)
        space = LatentSpace(space.codec, *choose_sigma(scaling, space.sigma, space.condition_sigma), target).double()
        for size in ((32, 32), (13, 30), (1, 7)):
            image, other = hr[..., : size[0], : size[1]].double(), up[..., : size[0], : size[1]].double()
            assert (space.decode(space.prior(other), other) - other).abs().max() <= 1e-12
            x0 = space.encode(image, other)
            latent, (_, kept) = space.codec.encode(image)
            torch.testing.assert_close(space.latent(x0, other), latent, rtol=0, atol=1e-12)
            if not space.codec.detail_channels: assert (space.decode(x0, other) - image).abs().max() <= 1e-12
            copied = space.codec.decode(latent, space.codec.encode(other)[1])  # the kept bands are those of `up`
            torch.testing.assert_close(space.decode(x0, other), copied, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ("ll", "full_band", "packet", "all_bands", "dct"))
def test_units(name):
    space, hr, up = spaces(name)
    one = torch.ones(space.codec.channels)
    torch.testing.assert_close(space.encode(hr, up).square().mean((0, 2, 3)), one, rtol=1e-4, atol=0)
    torch.testing.assert_close(space.condition(hr).std((0, 2, 3), correction=0), one, rtol=1e-4, atol=0)
    k = torch.linspace(0.5, 2, space.codec.channels)
    uneven = spaces(name, band_kappa=k.tolist())[0]
    torch.testing.assert_close(uneven.encode(hr, up) * k[:, None, None], space.encode(hr, up))
    torch.testing.assert_close(uneven.decode(uneven.encode(hr, up), up), space.decode(space.encode(hr, up), up), rtol=0, atol=1e-5)
    # noise k times as strong in that band, the loss as before
    t, noise = torch.full((4,), 7), torch.randn(4, len(k), 8, 8, generator=torch.Generator().manual_seed(0))

    def added(s):
        noisy, clean = (ResShiftSchedule().q_sample(s.encode(hr, up), s.prior(up), t, n) for n in (noise, 0 * noise))
        return s.latent(noisy - clean, torch.zeros_like(up))

    torch.testing.assert_close(added(uneven), added(space) * k[:, None, None], rtol=1e-3, atol=1e-4)
    guess = space.encode(hr, up) + noise
    same = latent_mse(guess / k[:, None, None], uneven.encode(hr, up), uneven.loss_weights()) * k.square().mean()
    torch.testing.assert_close(same, latent_mse(guess, space.encode(hr, up)))


def test_loss_weights():
    space = LatentSpace(make_codec("packet"), torch.linspace(0.1, 1, 16), band_kappa=torch.linspace(1, 2, 16).tolist())
    weights = torch.linspace(3, 1, 16)
    torch.testing.assert_close(space.loss_weights(weights.tolist()), space.band_kappa**2 * weights)
    torch.testing.assert_close(loss_weights(space, TrainConfig(band_weights=tuple(weights.tolist()))), space.band_kappa**2 * weights)
    assert torch.equal(loss_weights(LatentSpace(make_codec("packet")), TrainConfig()), torch.ones(16))
    # the error of an orthonormal codec's latent in its own units is that of the image
    hr, up, guess = random_image(2, 1, 16, 16), random_image(2, 1, 16, 16, seed=1), torch.randn(2, 16, 4, 4)
    w = loss_weights(space, TrainConfig(error_of="image"))
    error = latent_mse(guess, space.encode(hr, up), w) * w.mean() * space.sigma.square().mean()
    torch.testing.assert_close(error, (space.decode(guess, up) - hr).square().mean())
    # and the loss of error_of "psnr" is the mean logarithm of each image's error and what rounding adds to it
    model = RestorationModel(ModelConfig(network=TINY))
    model.measure([(hr, up)])
    steps, noise = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(model.noise_shape(up))
    parts, guess = TrainingLoss(model, TrainConfig(model=model.config, error_of="psnr"))(hr, up, steps, noise, 0)
    errors = (model.latent_space.decode(guess, up) - hr).square().mean((1, 2, 3)) + (2 / 255) ** 2 / 12
    unit = loss_weights(model.latent_space, TrainConfig(error_of="psnr")).mean() * model.latent_space.sigma.square().mean()
    torch.testing.assert_close(parts["mse"], (errors / unit).log().mean())
    for wrong, words in (({"error_of": "pixels"}, "error_of"), ({"band_weights": (1.0, 2.0)}, "must be 16 numbers")):
        with pytest.raises(TrainingError, match=words):
            check_config(TrainConfig(**wrong))
            loss_weights(space, TrainConfig(**wrong))


@pytest.mark.parametrize("target", ("residual", "image"))
@pytest.mark.parametrize("name", ("ll", "ll_hh", "full_band", "all_bands", "all_bands_learnable", "packet", "pyramid", "dct", "pixel"))
def test_gradients(name, target):
    codec = make_codec(name)
    n = codec.channels
    space = LatentSpace(codec, torch.linspace(0.2, 2, n), torch.linspace(1, 2, n), target, torch.linspace(1, 3, n).tolist()).double()
    hr, up = random_image(1, 1, 7, 5).double(), random_image(1, 1, 7, 5, seed=1).double()
    x0 = space.encode(hr, up).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, u: space.decode(z, u), (x0, up.clone().requires_grad_()))
    assert torch.autograd.gradcheck(lambda x, u: space.encode(x, u), (hr.clone().requires_grad_(), up.clone().requires_grad_()))
    (gradient,) = torch.autograd.grad((space.decode(x0, up) * hr).sum(), x0)
    assert (gradient.flatten(2).norm(dim=2) > 1e-4).all()


def test_mistakes():
    codec = make_codec("ll_hh")
    for call, words in (
        (lambda: LatentSpace(codec, target="picture"), "target"),
        (lambda: LatentSpace(codec, torch.ones(3)), "sigma must be 2"),
        (lambda: LatentSpace(codec, band_kappa=(1.0, 0.0)), "band_kappa must be 2"),
        (lambda: choose_sigma("variance", torch.ones(2), torch.ones(2)), "scaling"),
        (lambda: measure_sigma(codec, []), "no image"),
        (lambda: measure_sigma(codec, [(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))]), "constant"),
        (lambda: LightCNN(1, 1, layers=1), "2 or more"),
        (lambda: RestorationModel(ModelConfig(codec="packet", network=TINY, details=DetailConfig("cnn"))), "keeps no bands aside"),
        (lambda: RestorationModel(ModelConfig(codec="ll", network=TINY, details=DetailConfig("cnns"))), "kind of details"),
    ):
        with pytest.raises(ValueError, match=words): call()


# Designs

DESIGNS = [(codec, kind) for codec in ("ll", "ll_hh", "full_band") for kind in ("cnn", "decoder", "cascade")]
DESIGNS += [("packet", "decoder"), ("dct", "decoder")]


def design(codec, kind, **options):
    details = DetailConfig(kind, layers=3, width=8, network=TINY)
    model = RestorationModel(ModelConfig(codec=codec, network=TINY, details=details, **options))
    hr, lr = random_image(2, 1, 32, 32), random_image(2, 1, 8 + 2 * MARGIN, 8 + 2 * MARGIN, seed=1)
    model.measure([(random_image(4, 1, 32, 32), random_image(4, 1, 32, 32, seed=1))])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the last layers begin at zero and would let no gradient through
        for parameter in model.parameters(): parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, {"hr": hr, "lr": lr}


def reached(model, loss):
    "Names of the parameters with a gradient that is not zero."
    model.zero_grad()
    loss.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0}


def loss_of(model, batch, **changes):
    """The loss of a batch at steps and noise that are always the same."""
    up = upsample_crop(batch["lr"])
    steps, noise = draw_chain(model, up, torch.Generator().manual_seed(3))
    parts, _ = TrainingLoss(model, TrainConfig(model=model.config, **changes))(batch["hr"], up, steps, noise, 0)
    return sum(parts.values())


@pytest.mark.parametrize("options", ({}, {"target": "image", "condition": "packet"}))
@pytest.mark.parametrize("codec, kind", DESIGNS)
def test_training_reaches_every_layer(codec, kind, options):
    model, batch = design(codec, kind, **options)
    everything = {n for n, _ in model.named_parameters()}
    detail = {n for n in everything if n.startswith("details.")}
    assert {"network.first.weight", "network.last.weight", "details.last.weight"} <= everything
    assert ("details.first.weight" if kind == "cascade" else "details.hidden.0.weight") in everything

    def loss(frozen=False):
        return loss_of(model, batch, frozen=frozen)

    assert reached(model, loss()) == everything
    # what the details' loss alone reaches: a CNN behind the first network trains that too; a cascade stops there
    assert reached(model, loss(frozen=True)) == (detail if kind == "cascade" else everything)
    assert loss(frozen=True) < loss()
    # and through the whole chain to the image, as a loss on the image or guidance needs it
    up = random_image(2, 1, 24, 19, seed=2).requires_grad_()
    noise = torch.randn(model.noise_shape(up), generator=torch.Generator().manual_seed(0))
    image = model.restore(up, 2, noise_sampler=lambda: noise)
    assert image.shape == up.shape and reached(model, image.square().mean()) == everything
    assert up.grad.isfinite().all() and (up.grad != 0).float().mean() > 0.99


def test_autocast_of_training_keeps_the_latent_exact():
    model, batch = design("full_band", "cnn")
    losses = [loss_of(model, batch, precision=p) for p in ("float32", "bfloat16")]
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)


def test_band_kappa_reaches_the_model():
    config = ModelConfig(codec="ll_hh", network=TINY, band_kappa=(1.0, 2.0))
    assert RestorationModel(config).latent_space.band_kappa.tolist() == [1.0, 2.0]
    plain = RestorationModel(dataclasses.replace(config, band_kappa=()))
    assert not any("band_kappa" in key for key in plain.state_dict())
    with pytest.raises(ValueError, match="band_kappa must be 2"): RestorationModel(dataclasses.replace(config, band_kappa=(1.0,)))
