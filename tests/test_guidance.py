"""Guidance: every gradient against finite differences, the shift against its formula, and no truth where none is promised."""
import inspect
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from difiisr_dwt import guidance as g
from difiisr_dwt.codecs import CODECS, make_codec
from difiisr_dwt.degradations import downsample, upsample
from difiisr_dwt.latent_space import LatentSpace
from difiisr_dwt.losses import (
    charbonnier,
    edge_loss,
    feature_loss,
    kl_weights,
    latent_mse,
    sobel,
    spectrum_loss,
    thermal_spectrum,
)
from difiisr_dwt.objective import make_terms, objective
from difiisr_dwt.sampling import sample_ancestral, sample_ddim
from difiisr_dwt.schedule import ResShiftSchedule
from difiisr_dwt.spectrum import ring_power

double = torch.float64


def normal(*shape, seed=0, dtype=double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(size=16, count=1, channels=1, seed=0, dtype=double):
    """Something with edges and texture, in [0, 1], and its LR and enlarged LR."""
    x = torch.linspace(0, 3, size, dtype=dtype)
    image = 0.5 + 0.2 * torch.sin(x[:, None] * 2 + x) * torch.ones(count, channels, 1, 1, dtype=dtype)
    image = image + 0.05 * normal(count, channels, size, size, seed=seed, dtype=dtype)
    lr = downsample(image)
    return image, lr, upsample(lr)


class Halves(nn.Module):
    """A feature network without weights."""

    def forward(self, image):
        return torch.tanh(3 * image), (image[..., ::2, ::2] * image[..., 1::2, 1::2]).expand(-1, 3, -1, -1)


def small_prior(rings=4, dtype=double):
    return g.measure_spectrum([images(32, 4, seed=n)[0] for n in range(3)], rings).to(dtype)


TERMS = {"charbonnier": charbonnier, "edges": edge_loss, "spectrum": spectrum_loss, "features": partial(feature_loss, features=Halves())}


def losses(truth, lr):
    """Every question to an image, by name: image -> [B]."""
    of_truth = {name: g.weighted([(1.0, distance)], truth) for name, distance in TERMS.items()}
    prior = small_prior()
    return of_truth | {"prior": g.reference_free(lr, prior), "consistency": g.reference_free(lr, prior, "bicubic", spectrum=0.0)}


NAMES = [*TERMS, "prior", "consistency"]


def small_vq():
    """VQ-f4 with few random weights."""
    from difiisr_dwt.vq import VQModel

    config = {"double_z": False, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    return VQModel(3, 16, config)


def latent_space(name, quantize=False):
    """The latent space of a codec, in float64, with unequal deviations; a rounding to codes has no derivative to check."""
    torch.manual_seed(0)
    options = {"network": small_vq()} if name == "vq_f4" else {}
    if options and not quantize:
        options["network"].quantize = nn.Identity()
    codec = make_codec(name, **options)
    space = LatentSpace(codec, torch.linspace(0.05, 0.3, codec.channels), torch.linspace(0.2, 1, codec.channels))
    return space.double().eval().requires_grad_(False)


class Denoiser(nn.Module):
    """A network small enough for finite differences: three layers, told the time."""

    def __init__(self, channels, dtype=double):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.to(dtype)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + 0.1 * t.to(self.first.weight).view(-1, 1, 1, 1)))


# The terms


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_a_term(name):
    image, lr, up = images(16)
    assert torch.autograd.gradcheck(losses(image, lr)[name], (up.clone().requires_grad_(),))


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("name", NAMES)
def test_gradient_through_a_codec(name, codec):
    space = latent_space(codec)
    image, lr, up = images(16, channels=space.codec.image_channels)
    up = 2 * up - 1
    loss = g.decoded(losses(image, lr)[name], space, up)
    x0 = normal(*space.prior(up).shape).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x0).sum(), x0)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert torch.autograd.gradcheck(loss, (x0,))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_passes_the_rounding_to_codes(name):
    """Straight through: what the decoder has at the code is handed to the latent."""
    space = latent_space("vq_f4", quantize=True)
    image, lr, up = images(16)
    up, x0 = 2 * up - 1, normal(1, 3, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(g.decoded(losses(image, lr)[name], space, up)(x0).sum(), x0)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_training_term(codec):
    """Zero for the truth where the codec is lossless, and a gradient in every weight of the network."""
    space = latent_space(codec)
    image, _, up = images(16, 2, channels=space.codec.image_channels)
    hr, up = 2 * image - 1, 2 * up - 1
    terms = make_terms({"spectrum": 0.5, "edges": 2.0}, ResShiftSchedule())
    t = torch.tensor([3, 7])
    exact = space.encode(hr, up)

    def of_terms(prediction):
        parts = objective(prediction, exact, t, hr, up, space, terms)
        return parts["spectrum"] + parts["edges"]

    if torch.allclose(space.decode(exact, up), hr):
        assert of_terms(exact) < 1e-9
    network = Denoiser(space.codec.channels)
    prediction = network(exact, t)
    loss = of_terms(prediction)
    decoded = (space.decode(prediction, up) + 1) / 2
    torch.testing.assert_close(loss, (0.5 * spectrum_loss(decoded, image) + 2 * edge_loss(decoded, image)).mean())
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", TERMS)
def test_distance(name):
    """Per image, zero for equal images only, float32 inside whatever comes in."""
    a, _, b = images(24, 3)
    together = TERMS[name](b, a)
    assert together.shape == (3,) and (TERMS[name](a, a) == 0).all() and (together > 0).all()
    torch.testing.assert_close(together, torch.stack([TERMS[name](b[i:i + 1], a[i:i + 1])[0] for i in range(3)]))
    a, b = a.float(), b.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert TERMS[name](b, a).dtype == torch.float32
        torch.testing.assert_close(TERMS[name](b, a), together.float(), rtol=1e-3, atol=1e-6)


def test_thermal_spectrum_is_the_formula():
    image = images(16, 2)[0]
    magnitude = torch.fft.fftshift(torch.fft.fft2(image).abs(), (-2, -1)).add(1).log()
    expected = torch.stack([(m - m.mean()) / m.std(unbiased=False) for m in magnitude[:, 0]])[:, None]
    torch.testing.assert_close(thermal_spectrum(image), expected, rtol=1e-5, atol=1e-6)
    assert thermal_spectrum(image)[0, 0].argmax() == 8 * 16 + 8, "the zero frequency lies in the middle"
    assert torch.isfinite(thermal_spectrum(torch.zeros(1, 1, 8, 8))).all()
    flat = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
    spectrum_loss(flat, image[:1, :, :8, :8].float()).sum().backward()
    assert torch.isfinite(flat.grad).all(), "a constant image has no spectrum to divide by"


def test_sobel_is_the_convolution():
    image = images(12)[0]
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=double) / 8
    both = torch.stack([kernel, kernel.T])[:, None]
    torch.testing.assert_close(sobel(image), torch.conv2d(image, both))


def test_weights_of_the_latent_error():
    a, b, schedule = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1), ResShiftSchedule()
    square, bands = (a - b).square(), torch.tensor([1.0, 2, 5])
    expected = sum(w * square[:, i].mean() for i, w in enumerate(bands)) / bands.sum()
    torch.testing.assert_close(latent_mse(a, b, bands), expected)
    t = torch.tensor([0, 1, 7, 14])
    weights = kl_weights(schedule)
    torch.testing.assert_close(latent_mse(a, b, step_weights=weights[t]), (square.mean((1, 2, 3)) * weights[t]).mean())
    torch.testing.assert_close(weights / weights[2], schedule.weight_loss_mse / schedule.weight_loss_mse[2])
    assert kl_weights(schedule, 5.0)[:3].unique().numel() == 1 and kl_weights(ResShiftSchedule(steps=1)) == 1


# The shift


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_shift_is_that_of_the_noise(steps):
    """Solve for ε, shift it by ρκ√η times the gradient with respect to x_t, solve for x0 again."""
    chain, rho = ResShiftSchedule().respace(steps), 0.3
    network, y, x_t = Denoiser(4), normal(2, 4, 6, 6, seed=1), normal(2, 4, 6, 6, seed=2)
    loss = lambda x0: (x0.square() * torch.linspace(1, 2, 4, dtype=double).view(1, 4, 1, 1)).sum((1, 2, 3))
    for position in range(steps):
        here, eta, kappa = torch.full((2,), position), chain.etas[position], chain.kappa
        told = chain.timesteps[here]
        state = x_t.clone().requires_grad_()
        x0 = network(chain.scale_input(state, here), told)
        (gradient,) = torch.autograd.grad(loss(x0).sum(), state)
        noise = (x_t - (1 - eta) * x0 - eta * y) / (kappa * eta.sqrt()) + rho * kappa * eta.sqrt() * gradient
        expected = (x_t - eta * y - kappa * eta.sqrt() * noise) / (1 - eta)
        with torch.no_grad():
            found = g.guided(network, loss, chain, rho)(chain.scale_input(x_t, here), told)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the gain is kept in float32


def test_a_batch_at_several_steps():
    """Each image gets the factor of its own step and the gradient of its own loss."""
    chain, network, x = ResShiftSchedule(), Denoiser(4), normal(3, 4, 6, 6)
    t = torch.tensor([14, 0, 6])
    shifted = g.guided(network, lambda x0: x0.square().sum((1, 2, 3)), chain, 0.2)
    alone = torch.cat([shifted(x[i:i + 1], t[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(shifted(x, t), alone)


@pytest.mark.parametrize("sampler", [sample_ancestral, sample_ddim])
def test_no_strength_is_the_identity(sampler):
    space, (_, lr, up) = latent_space("packet"), images(16)
    up, chain, network = 2 * up - 1, ResShiftSchedule().respace(4), Denoiser(16)
    steered = g.Guidance(g.reference_free(lr, small_prior(), "bicubic"), 0.0)(network, chain, space, up)
    results = []
    for denoise in (network, steered):
        noises = iter(normal(4, *space.prior(up).shape))
        with torch.no_grad():
            results.append(sampler(denoise, space.prior(up), chain, lambda noises=noises: next(noises)))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_guidance_lowers_its_own_loss(name, codec):
    """At every step of a chain, at its end, and more so with more strength (while small)."""
    space = latent_space(codec)
    image, lr, up = images(16, channels=space.codec.image_channels)
    up, question = 2 * up - 1, losses(image, lr)[name]
    # the exact posterior mean for a standard normal x0 and y = 0
    schedule = ResShiftSchedule()

    def denoise(scaled, t, chain):
        eta = chain.etas[torch.searchsorted(chain.timesteps, t)].view(-1, 1, 1, 1)
        variance = chain.kappa**2 * eta
        return (1 - eta) / ((1 - eta) ** 2 + variance) * scaled * (variance + 1).sqrt()

    for steps in (1, 4):
        chain, values = schedule.respace(steps), []
        plain = partial(denoise, chain=chain)
        # strengths in units of the loss's own gradient, for the terms differ by orders of magnitude
        at = space.prior(up) + 1e-3 * normal(*space.prior(up).shape)
        at.requires_grad_()
        (gradient,) = torch.autograd.grad(g.decoded(question, space, up)(at).sum(), at)
        unit = 1e-2 / gradient.norm().item() / up[0].numel()

        def ask(x0):
            return question((space.decode(x0, up) + 1) / 2).item()

        for rho in (0.0, unit, 2 * unit):
            steered, noises = g.Guidance(question, rho)(plain, chain, space, up), iter(normal(steps, *at.shape, seed=3))

            def watched(scaled, t, steered=steered, plain=plain, rho=rho, ask=ask):
                x0 = steered(scaled, t)
                assert ask(x0) < ask(plain(scaled, t)) or rho == 0, t
                return x0

            with torch.no_grad():
                values.append(ask(sample_ddim(watched, space.prior(up), chain, lambda noises=noises: next(noises))))
        # what an early step adds to the power, later steps may find too much: no promise for the end
        assert values[0] > values[1] > values[2] or (name == "prior" and steps > 1), (steps, values)


def test_callers():
    """no_grad and autocast are fine and leave no graph; inference mode says what to do; a training may differentiate."""
    space, (image, _, up) = latent_space("packet").float(), images(16, dtype=torch.float32)
    up, chain, network = 2 * up - 1, ResShiftSchedule().respace(2), Denoiser(16, torch.float32)
    steered = g.Guidance(g.weighted([(1.0, spectrum_loss)], image), 0.01)(network, chain, space, up)
    x, t = normal(1, 16, 4, 4, dtype=torch.float32), torch.tensor([14])
    expected = steered(x, t)
    assert not expected.requires_grad and (expected - network(x, t)).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(steered(x, t), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = steered(x, t)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        steered(x, t)
    with pytest.raises(RuntimeError):
        g.guided(lambda x, t: x.detach(), lambda x0: x0.sum(), chain, 1.0)(x, t)  # a cut gradient is an error, not a zero

    double_network = Denoiser(2)
    through = g.guided(double_network, lambda x0: (x0**4).sum((1, 2, 3)), chain, 0.01, create_graph=True)
    assert torch.autograd.gradcheck(lambda x: through(x, t), (normal(1, 2, 3, 3).requires_grad_(),), atol=1e-5, rtol=1e-3)
    through(normal(1, 2, 3, 3), t).sum().backward()
    assert double_network.first.weight.grad.abs().max() > 0


def test_strength_does_not_depend_on_the_size():
    """Four copies of an image are guided as each alone, where the question is about pixels."""
    space, chain = latent_space("packet"), ResShiftSchedule().respace(4)
    image, _, up = images(16)
    scale = torch.linspace(0.5, 0.9, 16, dtype=double).view(1, 16, 1, 1)
    results = []
    for times in (1, 2):
        big, enlarged = (x.repeat(1, 1, times, times) for x in (image, 2 * up - 1))
        steered = g.Guidance(g.weighted([(1.0, charbonnier)], big), 0.01)(lambda x, t: scale * x, chain, space, enlarged)
        results.append(steered(normal(1, 16, 4, 4).repeat(1, 1, times, times), torch.tensor([6])))
    torch.testing.assert_close(results[1][..., :4, :4], results[0])


# Without the truth


def test_reference_free_needs_no_truth():
    assert not {"hr", "truth", "image"} & set(inspect.signature(g.reference_free).parameters)
    space, (_, lr, up) = latent_space("packet"), images(32)
    up, chain = 2 * up - 1, ResShiftSchedule().respace(4)
    prior, network = small_prior(), Denoiser(16)
    for kernel in ("bicubic", None):
        steered = g.Guidance(g.reference_free(lr, prior, kernel), 1e-3)(network, chain, space, up)
        with torch.no_grad():
            assert torch.isfinite(sample_ancestral(steered, space.prior(up), chain)).all()
    off = lr + 0.1
    assert torch.equal(g.reference_free(lr, prior)(upsample(lr)), g.reference_free(off, prior)(upsample(lr))), "no kernel, no consistency"
    assert g.reference_free(off, prior, "bicubic")(upsample(lr)) > g.reference_free(lr, prior, "bicubic")(upsample(lr))


def test_ring_power_is_the_full_transform():
    """Against the straightforward sum over the two-sided spectrum, odd sizes too."""
    for height, width in ((24, 30), (25, 31)):
        image = normal(2, 1, height, width)
        window = torch.hann_window(height, dtype=double)[:, None] * torch.hann_window(width, dtype=double)
        centred = (image - (image * window).sum((-2, -1), keepdim=True) / window.sum()) * window
        power = torch.fft.fft2(centred).abs().square() / window.square().sum()
        radius = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width) ** 2).sqrt()
        for ring, found in enumerate(ring_power(image, 5).unbind(-1)):
            inside = (radius >= ring / 10) & (radius < (ring + 1) / 10)
            torch.testing.assert_close(found, power[:, 0][:, inside].mean(-1).log())


def test_prior_is_plain_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    prior, image = small_prior(dtype=torch.float32), images(32, 2, dtype=torch.float32)[0]
    save_file(prior.state_dict(), tmp_path / "prior.safetensors")
    again = g.SpectrumPrior(**load_file(tmp_path / "prior.safetensors"))
    assert torch.equal(again(image), prior(image)) and prior(image).shape == (2,)
    torch.testing.assert_close(prior(image), prior(0.3 * image + 0.4), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="8 pixels"):
        prior(image[..., :6])
    with pytest.raises(ValueError, match="two images"):
        g.measure_spectrum([image[:1]])


# Networks


def test_vgg_features():
    pytest.importorskip("lpips")
    try:
        distance = make_terms({"vgg": 1.0}, ResShiftSchedule())[0].distance
    except ValueError as error:  # MetricError
        pytest.skip(str(error))
    image, _, up = images(32, dtype=torch.float32)
    assert distance(image, image) == 0 < distance(up, image)
    network = distance.keywords["features"]
    layers = network(image)
    assert [layer.shape[1] for layer in layers] == [64, 128, 256, 512, 512]
    import torchvision
    plain = torchvision.models.vgg16(weights=None).features[:4].eval()
    state = network.layers.state_dict()
    plain.load_state_dict({f"{n}.{k}": state[f"slice1.{n}.{k}"] for n in (0, 2) for k in ("weight", "bias")})
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        torch.testing.assert_close(layers[0], plain(normalize(image.expand(-1, 3, -1, -1))), rtol=1e-3, atol=1e-3)

    network = network.double()
    image, _, up = images(16)
    assert torch.autograd.gradcheck(partial(feature_loss, truth=image, features=network), (up.requires_grad_(),), fast_mode=True, atol=1e-4)


class StubSam(nn.Module):
    """The interface of `segment_anything.modeling.Sam` that is used, around a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image_encoder = nn.Conv2d(3, 4, 4, stride=4)
        self.image_encoder.img_size = 32
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 120.0))

    def preprocess(self, x):
        x = (x - self.pixel_mean) / 60
        return nn.functional.pad(x, (0, 32 - x.shape[-1], 0, 32 - x.shape[-2]))


def test_sam_features_of_a_stub(monkeypatch, tmp_path):
    weights = tmp_path / "sam.pth"
    weights.touch()
    monkeypatch.setitem(sys.modules, "segment_anything", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install segment-anything"):
        g.SamFeatures(weights)
    asked = []
    stub = types.SimpleNamespace(sam_model_registry={"vit_b": lambda checkpoint: asked.append(checkpoint) or StubSam()})
    monkeypatch.setitem(sys.modules, "segment_anything", stub)
    with pytest.raises(ValueError, match="no such SAM checkpoint"):
        g.SamFeatures(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="vit_b"):
        g.SamFeatures(weights, "vit_x")
    with pytest.raises(ValueError, match="sam_checkpoint"):
        make_terms({"sam": 1.0}, ResShiftSchedule())
    (term,) = make_terms({"sam": 2.0}, ResShiftSchedule(), sam_checkpoint=weights)
    assert asked == [str(weights)] and term.weight(0, 1) == 2
    distance = term.distance
    image, _, up = images(16, dtype=torch.float32)
    assert distance(image, image) == 0 < distance(up, image)
    network = g.SamFeatures(weights).double()
    assert network(images(16, 2)[0][..., :12])[0].shape == (2, 4, 8, 8), "the longer side fills the square"
    assert not any(p.requires_grad for p in network.parameters())
    image, _, up = images(16)
    assert torch.autograd.gradcheck(partial(feature_loss, truth=image, features=network), (up.requires_grad_(),))
    stub.sam_model_registry["vit_b"] = lambda checkpoint: torch.load(checkpoint, weights_only=True)
    with pytest.raises(ValueError, match="cannot be read"):
        g.SamFeatures(weights)


def test_sam_features_of_the_package(monkeypatch, tmp_path):
    """The package's own classes around a small encoder of random weights."""
    package = pytest.importorskip("segment_anything", reason="the optional package segment-anything is not installed")
    from segment_anything.build_sam import _build_sam

    torch.manual_seed(0)
    small = _build_sam(encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2, encoder_global_attn_indexes=[])
    weights = tmp_path / "small.pth"
    torch.save(small.state_dict(), weights)
    monkeypatch.setitem(package.sam_model_registry, "vit_b", partial(_build_sam, 16, 1, 2, []))
    distance = make_terms({"sam": 1.0}, ResShiftSchedule(), sam_checkpoint=weights)[0].distance
    image, _, up = images(64, dtype=torch.float32)
    assert distance(image, image) == 0
    up = up.requires_grad_()
    value = distance(up, image).sum()
    value.backward()
    assert value > 0 and up.grad.abs().max() > 0
