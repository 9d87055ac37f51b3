"The stages of the Real-ESRGAN chain against closed forms."

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from difiisr_dwt.degradations import blur
from difiisr_dwt.real_esrgan import (
    BELLS,
    RESIZE_MODES,
    FirstOrder,
    RealESRGANConfig,
    SecondOrder,
    bell_kernel,
    degrade_real_esrgan,
    gaussian_noise,
    jpeg,
    poisson_noise,
    random_kernel,
    resize,
    sinc_kernel,
)

DOUBLE = dict(dtype=torch.float64)


def wave(cycles, size=256):
    column = torch.arange(size, **DOUBLE)
    return torch.cos(2 * np.pi * cycles / size * (column - size // 2)).expand(1, 1, 32, size)


def contrast(x, cycles):
    "Amplitude of the wave in the middle half of x, where borders do not reach."
    width = x.shape[-1]
    inside = x[0, 0, 16, width // 4 : -width // 4]
    reference = wave(cycles, width)[0, 0, 0, width // 4 : -width // 4]
    return float((inside * reference).sum() / (reference**2).sum())


def test_the_published_ranges():
    first, second, config = FirstOrder(), SecondOrder(), RealESRGANConfig()
    assert (first.resize_probs, first.resize_range) == ((0.2, 0.7, 0.1), (0.15, 1.5))
    assert (first.gaussian_sigma, first.poisson_scale, first.jpeg_quality) == ((1, 30), (0.05, 3), (30, 95))
    assert (second.resize_range, second.gaussian_sigma, second.blur_prob) == ((0.3, 1.2), (1, 25), 0.8)
    assert (config.second_order_prob, config.final_sinc_prob) == (0.5, 0.8)


@pytest.mark.parametrize("sigmas, angle", [((2.0, 2.0), 0.0), ((3.0, 1.2), 0.0), ((3.0, 1.2), 0.7), ((1.0, 2.5), -2.0)])
def test_a_gaussian_kernel_has_its_covariance(sigmas, angle):
    kernel = bell_kernel(41, sigmas, angle)
    t = np.arange(41) - 20
    x, y = np.broadcast_arrays(t, t[:, None])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = turn @ np.diag(np.square(sigmas)) @ turn.T
    found = [[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
@pytest.mark.parametrize("cycles", [4, 20, 50])
def test_blur_by_a_gaussian_has_its_transfer_function(sigma, cycles):
    expected = np.exp(-2 * (np.pi * sigma * cycles / 256) ** 2)
    assert abs(contrast(blur(wave(cycles), bell_kernel(21, (sigma, sigma))), cycles) - expected) < 1e-4


def test_blur_by_a_sinc_cuts_off():
    kernel = sinc_kernel(121, np.pi / 2) # 64 of 256 cycles
    assert abs(contrast(blur(wave(50), kernel), 50) - 1) < 0.03 and abs(contrast(blur(wave(80), kernel), 80)) < 0.03


def test_profiles_and_their_limits():
    generalized = bell_kernel(15, (2, 1), 0.4, "generalized", 1.0)
    assert np.allclose(generalized, bell_kernel(15, (2, 1), 0.4)), "beta 1 is the Gaussian"
    heavy, light = (bell_kernel(21, (2, 2), profile="generalized", beta=b) for b in (0.5, 4.0))
    assert heavy[10, 0] > 100 * light[10, 0], "small beta: heavy tails"
    plateau = bell_kernel(21, (3, 3), profile="plateau", beta=2.0)
    assert np.isclose(plateau[10, 13] / plateau[10, 10], 0.5), "1/(1 + q^beta) is 1/2 at one sigma"


def test_random_kernels_are_means_and_come_in_their_shares():
    config, rng = FirstOrder(), np.random.default_rng(0)
    kernels = [random_kernel(rng, config) for _ in range(2000)]
    assert all(abs(k.sum() - 1) < 1e-12 and np.allclose(k, k[::-1, ::-1]) for k in kernels)
    assert {len(k) for k in kernels} == set(range(7, 22, 2))
    negative = np.mean([k.min() < -1e-12 for k in kernels]) # only a sinc is
    assert abs(negative - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5
    image = torch.full((1, 1, 30, 30), 0.3, **DOUBLE)
    assert all(torch.allclose(blur(image, k), image) for k in kernels[:50]), "a flat image stays"
    narrow = [random_kernel(rng, replace(config, sinc_prob=0, bell_probs=(1, 0, 0, 0, 0, 0), sigma=(1.0, 1.0))) for _ in range(5)]
    assert all(np.allclose(k, bell_kernel(len(k), (1, 1))) for k in narrow)
    assert list(BELLS) == ["gaussian", "generalized", "plateau"]


def test_gaussian_noise_has_its_variance():
    x, rng = torch.full((2, 3, 128, 128), 0.5, **DOUBLE), np.random.default_rng(1)
    noise = gaussian_noise(x, 20.0, rng) - x
    count = noise.numel()
    assert abs(noise.var() / (20 / 255) ** 2 - 1) < 5 * (2 / count) ** 0.5
    assert abs(noise.mean()) < 5 * 20 / 255 / count**0.5
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.var()
    assert abs(neighbours) < 5 / count**0.5, "white"
    gray = gaussian_noise(x, 20.0, rng, gray=True) - x
    assert torch.allclose(gray[:, :1], gray, atol=1e-12) and not torch.allclose(gray[0], gray[1])


@pytest.mark.parametrize("level", [0.1, 0.8])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_poisson_noise_has_its_variance(level, scale):
    x, rng = torch.full((1, 1, 200, 200), round(level * 255) / 255, **DOUBLE), np.random.default_rng(2)
    noise = poisson_noise(x, scale, rng, peak=60.0) - x
    expected = scale**2 * x[0, 0, 0, 0] / 60
    assert abs(noise.var() / expected - 1) < 0.05 and abs(noise.mean()) < 5 * (expected / x.numel()) ** 0.5


def test_poisson_noise_counts_grey_levels():
    x = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], **DOUBLE).repeat(1, 1, 200, 40) # five levels: peak 8
    noise = poisson_noise(x, 1.0, np.random.default_rng(3)) - x
    assert abs(noise[x == 1.0].var() * 8 - 1) < 0.06
    assert (poisson_noise(torch.zeros(1, 1, 4, 4), 3.0, np.random.default_rng(0)) == 0).all(), "no light, no noise"


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_a_jpeg(quality, tmp_path):
    x = torch.rand(1, 1, 40, 56).mul(255).round() / 255
    Image.fromarray((x[0, 0] * 255).byte().numpy()).save(tmp_path / "x.jpg", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(tmp_path / "x.jpg"))) / 255
    assert (jpeg(x, quality)[0, 0] - expected).abs().max() <= 1.01 / 255
    x = x.expand(2, 3, -1, -1).clone()
    x[:, 0] /= 2
    Image.fromarray((x[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "x.jpg", quality=quality, subsampling="4:2:0")
    expected = torch.from_numpy(np.array(Image.open(tmp_path / "x.jpg"))).permute(2, 0, 1) / 255
    assert (jpeg(x, quality)[0] - expected).abs().mean() < 1 / 255, "RGB in the order of channels"


def test_resize_modes():
    x = torch.rand(1, 1, 24, 32, **DOUBLE, requires_grad=True)
    for mode in RESIZE_MODES:
        assert torch.allclose(resize(x, (24, 32), mode), x)
        assert torch.autograd.gradcheck(lambda z, mode=mode: resize(z, (7, 9), mode), x[..., :10, :12].detach().requires_grad_())
    assert torch.allclose(resize(x, (6, 8), "area"), x.reshape(1, 1, 6, 4, 8, 4).mean((3, 5)))


def test_blur_has_a_gradient():
    x = torch.rand(1, 1, 6, 7, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: blur(z, bell_kernel(7, (2, 1), 0.3)), x)
    with pytest.raises(ValueError, match="odd"):
        blur(x, np.ones((4, 4)))


def test_without_degradations_the_chain_is_a_resize():
    quiet = dict(blur_prob=0.0, resize_probs=(0.0, 0.0, 1.0), gaussian_prob=1.0, gaussian_sigma=(0.0, 0.0), jpeg_quality=(100, 100))
    config = RealESRGANConfig(FirstOrder(**quiet), SecondOrder(**quiet), second_order_prob=0.0, final_sinc_prob=0.0)
    row = torch.arange(64) / 8.0
    x = (0.5 + 0.3 * torch.sin(row) * torch.cos(row)[:, None])[None, None]
    modes = {mode: resize(x, (16, 16), mode) for mode in RESIZE_MODES}
    found = set()
    for seed in range(20):
        low = degrade_real_esrgan(x, [seed], config=config)
        error = {mode: float((low - y).abs().max() * 255) for mode, y in modes.items()}
        best = min(error, key=error.get)
        assert error[best] < 3, "but for rounding"
        assert ((low * 255) - (low * 255).round()).abs().max() < 1e-3
        found.add(best)
    assert found == set(RESIZE_MODES)
