"The scene model: physics, determinism, the sensor's numbers."

import dataclasses

import numpy as np
import pytest

from difiisr_dwt.thermal_canvas import band_radiance, brightness_temperature, power_law_texture
from difiisr_dwt.thermal_scenes import SceneConfig, automatic_gain, render_scene


def planck_8_to_14(kelvin: float) -> float:
    "The band integral by Gauss-Legendre quadrature, with CODATA constants."
    node, weight = np.polynomial.legendre.leggauss(64)
    wavelength = 11e-6 + 3e-6 * node
    h, c, k = 6.62607015e-34, 299792458.0, 1.380649e-23
    return float(3e-6 * (weight * 2 * h * c**2 / wavelength**5 / np.expm1(h * c / (wavelength * k * kelvin))).sum())


@pytest.mark.parametrize("kelvin", [180.1, 250.0, 293.15, 300.07, 420.0])
def test_radiance_is_planck(kelvin):
    assert float(band_radiance(kelvin)) == pytest.approx(planck_8_to_14(kelvin), rel=3e-5)
    assert float(brightness_temperature(band_radiance(kelvin))) == pytest.approx(kelvin, abs=1e-3)


def test_texture_follows_its_power_law():
    for alpha in (1.0, 2.5):
        field = power_law_texture(np.random.default_rng(0), (256, 256), alpha)
        assert field.std() == pytest.approx(1) and abs(field.mean()) < 1e-9
        power = np.abs(np.fft.fft2(field)) ** 2
        radius = np.rint(np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(256) * 256]))).astype(int)
        mean = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
        rings = np.arange(6, 100)
        slope = np.polyfit(np.log(rings), np.log(mean[rings]), 1)[0]
        assert slope == pytest.approx(-2 * alpha, abs=0.2)


def test_same_seed_same_scene():
    a, b, c = render_scene(7, (64, 80)), render_scene(7, (64, 80)), render_scene(8, (64, 80))
    for name in ("temperature", "counts", "image"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert not np.array_equal(a.counts, c.counts)


@pytest.mark.parametrize("size", [(64, 64), (48, 100), (101, 67), (8, 8)])
def test_shapes_types_and_ranges(size):
    for seed in range(4):
        scene = render_scene(seed, size)
        assert scene.temperature.shape == scene.counts.shape == scene.image.shape == size
        assert scene.temperature.dtype == np.float32 and scene.counts.dtype == np.uint16 and scene.image.dtype == np.uint8
        assert np.isfinite(scene.temperature).all() and 150 < scene.temperature.min() and scene.temperature.max() < 380
        assert 0 < scene.counts.min() and scene.counts.max() < 2**14, "no sensor saturation"


def test_scenes_fill_the_range_and_have_edges():
    images = [render_scene(seed, (128, 128)).image.astype(float) for seed in range(12)]
    assert min(image.std() for image in images) > 5 and np.median([image.std() for image in images]) > 25
    assert np.median([np.abs(np.diff(image, axis=1)).max() for image in images]) > 60, "crisp edges"


def test_noise_has_the_stated_netd():
    quiet = SceneConfig(netd=(0.0, 0.0), column_noise=(0.0, 0.0))
    noisy = dataclasses.replace(quiet, netd=(0.2, 0.2))
    striped = dataclasses.replace(quiet, column_noise=(0.2, 0.2))
    clean, noise, stripes = (render_scene(3, config=c).counts.astype(float) for c in (quiet, noisy, striped))
    assert (noise - clean).std() / quiet.counts_per_kelvin == pytest.approx(0.2, rel=0.03)
    columns = (stripes - clean).mean(0)
    assert columns.std() / quiet.counts_per_kelvin == pytest.approx(0.2, rel=0.2)
    assert (stripes - clean - columns).std() < 0.5, "columns move as a whole, up to rounding"


def test_lens_blur_takes_away_high_frequencies():
    quiet = SceneConfig(netd=(0.0, 0.0), column_noise=(0.0, 0.0))
    sharp, soft = (render_scene(3, config=dataclasses.replace(quiet, blur=(b, b))).counts.astype(float) for b in (0.3, 1.5))
    assert np.abs(np.diff(soft)).mean() < 0.8 * np.abs(np.diff(sharp)).mean()
    assert soft.mean() == pytest.approx(sharp.mean(), abs=5), "the lens keeps the energy"


def test_automatic_gain_is_monotone_and_survives_a_flat_frame():
    counts = np.random.default_rng(0).normal(8000, 60, (64, 64)).astype(np.uint16)
    image = automatic_gain(counts)
    order = np.argsort(counts, axis=None)
    assert (np.diff(image.ravel()[order].astype(int)) >= 0).all()
    assert image.min() == 0 and image.max() == 255
    assert automatic_gain(np.full((8, 8), 8000, np.uint16)).std() == 0


def test_gain_control_keeps_its_settings():
    counts = np.random.default_rng(0).normal(8000, 60, (64, 64)).astype(np.uint16)
    half = automatic_gain(counts, contrast=0.5, middle=0.0)
    assert half.min() == 0 and 126 <= half.max() <= 128
    weak = automatic_gain(counts, limit=0.1, tails=(0.0, 0.0)).astype(int)
    assert np.ptp(weak) <= 0.1 * np.ptp(counts.astype(int)) + 1, "levels per count"
    step = np.repeat([[7000, 9000]], 16, 1).repeat(32, 0).astype(np.uint16)
    plain, sharp = (automatic_gain(step, contrast=0.5, detail=d).astype(int) for d in (0.0, 1.0))
    assert np.ptp(sharp) > np.ptp(plain) and np.array_equal(sharp[:, 8], plain[:, 8]), "halos at the edge only"


def test_texture_streaks_follow_their_stretch():
    field = power_law_texture(np.random.default_rng(0), (256, 256), 1.2, (1.0, 5.0))
    assert np.diff(field, axis=1).std() < 0.6 * np.diff(field, axis=0).std(), "long along x"


def test_scenes_are_as_rough_as_real_frames():
    "Deviations of the finest band within the spread of HIT-UAV and RoadScene (training folders, units of [-1, 1] images)."
    wave, fine = np.array([1, -1, 1, -1]) / 2, []
    for seed in range(24):
        blocks = render_scene(seed).image.reshape(64, 4, 64, 4) / 127.5
        fine.append(np.einsum("a,b,yaxb->yx", wave, wave, blocks).std())
    assert 0.004 < np.median(fine) < 0.025 and np.ptp(np.log(fine)) > 1, "noise and detail of many cameras"
