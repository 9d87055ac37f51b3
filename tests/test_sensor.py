"The stages of the infrared camera against closed forms."

from dataclasses import replace

import numpy as np
import pytest
import torch

from difiisr_dwt.degradations import downsample
from difiisr_dwt.sensor import (
    AGC_MODES,
    SensorConfig,
    add_drift,
    add_netd,
    add_stripes,
    blink,
    degrade_sensor,
    digitize,
    gain_control,
    integrate_pixels,
    kill,
    lens_blur,
    lens_transfer,
    smooth_field,
)

DOUBLE = dict(dtype=torch.float64)
NONE = (0.0, 0.0)
QUIET = SensorConfig(
    fill_factor=(1.0, 1.0), gain_drift=NONE, offset_drift_k=NONE, column_k=NONE, row_k=NONE, netd_k=NONE, dead_fraction=NONE,
    blinking_fraction=NONE)
KELVIN = (283.0, 313.0)


def flat(value=0.5, size=256, **kind):
    return torch.full((1, 1, size, size), value, **(kind or DOUBLE))


def diffraction(nu):
    nu = np.clip(nu, 0, 1)
    return 2 / np.pi * (np.arccos(nu) - nu * np.sqrt(1 - nu**2))


@pytest.mark.parametrize("number, wavelength", [(1.0, 10.0), (1.4, 9.0), (2.8, 4.0)])
def test_lens_in_focus_is_diffraction(number, wavelength):
    f = np.linspace(0, 1.5 / (number * wavelength), 300)
    assert np.abs(lens_transfer(f, wavelength, number) - diffraction(f * number * wavelength)).max() < 1e-9


def test_defocus_against_the_pupil_itself():
    # autocorrelation of a sampled pupil of radius 1 with the phase 2 pi W r²/lambda
    n, waves = 1024, 0.7
    t = np.linspace(-2, 2, n, endpoint=False)
    r2 = t**2 + t[:, None] ** 2
    pupil = (r2 <= 1) * np.exp(2j * np.pi * waves * r2)
    otf = np.fft.ifft2(np.abs(np.fft.fft2(pupil)) ** 2)[0].real
    otf = otf[: n // 2] / otf[0] # shift in steps of 4/n; cut-off at shift 2
    nu = np.arange(n // 2) * (4 / n) / 2
    number, wavelength = 1.0, 10.0
    found = lens_transfer(nu / (number * wavelength), wavelength, number, waves * wavelength * 8 * number**2)
    assert np.abs(found - otf).max() < 5e-3


@pytest.mark.parametrize("cycles", [10, 40, 90])
@pytest.mark.parametrize("defocus", [0.0, 25.0])
def test_lens_blur_has_its_transfer_function(cycles, defocus):
    size, pitch = 512, 3.0
    wave = torch.cos(2 * np.pi * cycles / size * (torch.arange(size, **DOUBLE) - size // 2)).expand(1, 1, 8, size)
    seen, inside = lens_blur(wave, pitch, 10.0, 1.2, defocus), slice(size // 4, -size // 4)
    ratio = (seen * wave)[0, 0, 4, inside].sum() / (wave**2)[0, 0, 4, inside].sum()
    expected = lens_transfer(np.array([cycles / size / pitch]), 10.0, 1.2, defocus)[0]
    assert abs(ratio - expected) < 2e-3


def test_a_point_becomes_an_airy_disc():
    size, pitch, reach = 257, 2.0, 10.0 * 1.2 # reach: wavelength x f-number, µm
    point = torch.zeros(1, 1, size, size, **DOUBLE)
    point[..., size // 2, size // 2] = 1
    seen = lens_blur(point, pitch, 10.0, 1.2)[0, 0].numpy()
    t = (np.arange(size) - size // 2) * pitch
    z = np.pi * np.hypot(t, t[:, None]) / reach
    z[size // 2, size // 2] = 1e-9
    airy = np.pi / 4 * (pitch / reach) ** 2 * (2 * torch.special.bessel_j1(torch.from_numpy(z)).numpy() / z) ** 2
    assert np.abs(seen - airy).max() < 0.01 * airy.max()


def test_optics_keep_the_mean_and_have_gradients():
    assert torch.allclose(lens_blur(flat(0.3), 3.0, 10.0, 1.0, 20.0), flat(0.3))
    assert torch.allclose(integrate_pixels(flat(0.3), 4, 0.6), flat(0.3, 64))
    x = torch.rand(1, 1, 8, 12, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: integrate_pixels(lens_blur(z, 4.0, 10.0, 1.0, 10.0), 4, 0.7), x)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_full_pixel_is_the_box(scale):
    x = torch.rand(2, 1, 12 * scale, 10 * scale, **DOUBLE)
    assert torch.allclose(integrate_pixels(x, scale), downsample(x, "box", scale))


@pytest.mark.parametrize("fill, width", [(1.0, 4), (0.25, 2)])
@pytest.mark.parametrize("cycles", [5, 33, 64, 110])
def test_pixel_integration_is_a_sinc(fill, width, cycles):
    f = cycles / 512 # per small pixel
    wave = torch.cos(2 * np.pi * f * (torch.arange(512, **DOUBLE) + 0.5)).expand(1, 1, 8, 512)
    sampled = torch.cos(2 * np.pi * f * (4 * torch.arange(128, **DOUBLE) + 2))
    expected = np.sinc(width * f) / np.sinc(f) * sampled
    assert torch.allclose(integrate_pixels(wave, 4, fill), expected.expand(1, 1, 2, 128), atol=1e-12)


@pytest.mark.parametrize("netd", [0.03, 0.1])
def test_netd_is_the_deviation_in_kelvin(netd):
    noise = add_netd(flat(300.0), netd, np.random.default_rng(0)) - 300
    assert abs(noise.var() / netd**2 - 1) < 5 * (2 / noise.numel()) ** 0.5 and abs(noise.mean()) < 5 * netd / 256
    # and through the whole camera, on the scale of the image
    low = degrade_sensor(flat(0.5, 1024), [1], 4, replace(QUIET, netd_k=(netd, netd)), KELVIN)
    step = (170 / 16383) ** 2 / 12 # variance that the converter adds, K²
    assert abs(float((low * 30).var()) / (netd**2 + step) - 1) < 5 * (2 / low.numel()) ** 0.5


def test_stripes_have_their_variances_and_nothing_else():
    rows, columns = [], []
    for seed in range(40):
        x = (add_stripes(flat(300.0, 64), 0.06, 0.02, np.random.default_rng(seed)) - 300)[0, 0]
        assert x.diff(dim=0).diff(dim=1).abs().max() < 1e-9
        columns.append(x.mean(0).var()), rows.append(x.mean(1).var())
    assert abs(np.mean(columns) / 0.06**2 - 1) < 0.1 and abs(np.mean(rows) / 0.02**2 - 1) < 0.1


def test_drift_is_smooth_and_has_its_variance():
    fields = np.stack([smooth_field((20, 30), np.random.default_rng(s)) for s in range(2000)])
    assert np.abs(fields.mean((1, 2))).max() < 1e-12
    assert abs((fields**2).mean() - 1) < 0.04
    power = np.abs(np.fft.fft2(np.concatenate([np.concatenate([fields, fields[:, ::-1]], 1)] * 2, 2)[:, :, :60])) ** 2
    assert power[:, 5:-5].max() < 1e-12 * power.max() + 1e-9, "nothing above the third cosine along y"
    x = flat(300.0, 32)
    gain = add_drift(x, 0.01, 0.0, 290.0, np.random.default_rng(3)) - x
    assert torch.allclose(gain, add_drift(x - 5, 0.02, 0.0, 290.0, np.random.default_rng(3)) - x + 5), "g (T - shutter)"


@pytest.mark.parametrize("fraction", [0.001, 0.05])
def test_bad_pixels_have_their_share(fraction):
    x, rng = flat(300.0), np.random.default_rng(4)
    spread = 5 * (fraction / x.numel()) ** 0.5
    dead = kill(x, fraction, (253.0, 423.0), rng)
    assert abs((dead != x).double().mean() - fraction) < spread and set(dead.unique().tolist()) == {253.0, 300.0, 423.0}
    blinking = blink(x, fraction, 2.0, rng)
    assert abs((blinking != x).double().mean() - fraction) < spread and set(blinking.unique().tolist()) == {298.0, 300.0, 302.0}
    low = degrade_sensor(flat(), [0], 4, replace(QUIET, dead_fraction=(0.1, 0.1)))
    assert abs(((low == 0) | (low == 1)).double().mean() - 0.1) < 0.03, "black or white on the image's scale"


@pytest.mark.parametrize("bits", [8, 14])
def test_the_converter_has_its_step(bits):
    x = torch.linspace(254, 422, 200001, **DOUBLE)
    counts = digitize(x, (253.0, 423.0), bits)
    step = 170 / (2**bits - 1)
    assert (counts.unique().diff() - step).abs().max() < 1e-9
    assert (counts - x).abs().max() <= step / 2 + 1e-9 and abs((counts - x).var() / (step**2 / 12) - 1) < 0.02
    assert torch.equal(digitize(counts, (253.0, 423.0), bits), counts)
    assert digitize(torch.tensor([0.0, 1000.0])).tolist() == pytest.approx([253.15, 423.15])


def test_a_quiet_camera_is_lens_and_box():
    x = torch.rand(1, 1, 64, 64, **DOUBLE)
    fixed = replace(QUIET, wavelength_um=(10.0, 10.0), f_number=(1.2, 1.2), pixel_pitch_um=(12.0, 12.0), defocus_um=(5.0, 5.0))
    expected = integrate_pixels(lens_blur(x, 3.0, 10.0, 1.2, 5.0), 4)
    assert (degrade_sensor(x, [0], 4, fixed, KELVIN) - expected).abs().max() <= 0.51 * 170 / 16383 / 30


@pytest.mark.parametrize("mode", AGC_MODES[1:])
def test_gain_control_is_monotone_and_inverts(mode):
    x = 290 + 5 * torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0), **DOUBLE)
    picture, curve = gain_control(x, mode)
    order = x.flatten().argsort()
    assert (picture.flatten()[order].diff() >= 0).all() and picture.min() == 0 and picture.max() == 1
    assert (picture * 255 - (picture * 255).round()).abs().max() < 1e-9
    inside = (x > curve.kelvin[0]) & (x < curve.kelvin[-1])
    assert abs(inside.double().mean() - 0.99) < 0.002, "percentiles 0.5 and 99.5"
    assert (curve.invert(curve.apply(x)) - x)[inside].abs().max() < 1e-9
    if mode == "linear":
        lo, hi = curve.kelvin
        assert len(curve.kelvin) == 2 and torch.allclose(curve.apply(x), ((x - lo) / (hi - lo)).clamp(0, 1))


@pytest.mark.parametrize("mode", AGC_MODES[1:])
def test_a_flat_frame_is_not_stretched(mode):
    picture, curve = gain_control(flat(300.0, 16) + 1e-3 * torch.rand(16, 16, **DOUBLE), mode, min_span_k=2.0)
    assert torch.isclose(curve.kelvin[-1] - curve.kelvin[0], torch.tensor(2.0, **DOUBLE)) and picture.unique().numel() <= 3


@pytest.mark.parametrize("mode", AGC_MODES[1:])
def test_pairs_stay_on_one_scale_behind_a_gain_control(mode):
    x = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(1), **DOUBLE) * 0.3 + 0.4
    with_agc, without = (degrade_sensor(x, [3], 4, replace(QUIET, agc=agc)) for agc in (mode, "none"))
    lo, hi = without.quantile(0.01), without.quantile(0.99)
    inside = (without > lo) & (without < hi)
    assert (with_agc - without)[inside].abs().max() < 0.01 and not torch.equal(with_agc, without)


def test_kelvin_range_sets_the_noise():
    config = replace(QUIET, netd_k=(0.1, 0.1))
    wide, narrow = (degrade_sensor(flat(), [5], 4, config, k) - 0.5 for k in ((278.0, 318.0), (288.0, 308.0)))
    assert abs(narrow.std() / wide.std() - 2) < 0.02
    with pytest.raises(ValueError, match="adc_range_k"):
        degrade_sensor(flat(), [5], 4, config, (500.0, 600.0))
    with pytest.raises(ValueError, match="kelvin_range"):
        degrade_sensor(flat(), [5], 4, config, (300.0, 290.0))
    with pytest.raises(ValueError, match="plateau"):
        gain_control(flat(300.0, 8), "gamma")
