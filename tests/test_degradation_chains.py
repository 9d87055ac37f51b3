"What both random degradations promise a data loader: a seed per image, and nothing else that matters."

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from difiisr_dwt.configuration import ConfigurationError, configure, resolved
from difiisr_dwt.real_esrgan import FirstOrder, RealESRGANConfig, degrade_real_esrgan
from difiisr_dwt.sensor import SensorConfig, degrade_sensor

CHAINS = pytest.mark.parametrize("chain", [degrade_real_esrgan, degrade_sensor], ids=["real_esrgan", "sensor"])


def images(*shape, dtype=torch.float32):
    "Smooth random images in [0, 1]."
    x = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))
    return torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False).mul(2).sub(0.5).clamp(0, 1).to(dtype)


@CHAINS
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_an_image_depends_on_itself_and_its_seed_only(chain, scale):
    x, seeds = images(4, 1, 48, 72), [3, 2**40, 0, 3]
    kept = x.clone()
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state(), np.random.get_state()[1]
    together = chain(x, seeds, scale)
    assert torch.equal(torch.random.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    assert together.shape == (4, 1, 48 // scale, 72 // scale) and together.dtype == x.dtype
    assert 0 <= together.min() and together.max() <= 1 and torch.equal(x, kept)
    order = [2, 0, 3, 1]
    assert torch.equal(chain(x[order], [seeds[k] for k in order], scale), together[order])
    for k, seed in enumerate(seeds):
        assert torch.equal(chain(x[k : k + 1], torch.tensor([seed]), scale), together[k : k + 1])
    assert not torch.equal(chain(x[:1], [4], scale), together[:1])


@CHAINS
def test_seeds_make_different_images_of_the_same_scene(chain):
    low = chain(images(1, 1, 32, 32).expand(40, -1, -1, -1), range(40))
    assert len(torch.unique(low.flatten(1), dim=0)) == 40


@CHAINS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(chain, dtype):
    x = images(2, 1, 32, 32)
    low, expected = chain(x.to(dtype), [5, 6]), chain(x, [5, 6])
    assert low.dtype == dtype
    if dtype == torch.float64:
        assert (low - expected).abs().mean() < 0.002, "rounding may fall to the other side, no more"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chain(x, [5, 6]), expected), "autocast changes nothing"


@CHAINS
def test_cuda_sees_the_same(chain):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    x = images(3, 1, 64, 64)
    low = chain(x.cuda(), [1, 2, 3])
    assert low.is_cuda and (low.cpu() - chain(x, [1, 2, 3])).abs().mean() < 0.002


@CHAINS
@pytest.mark.parametrize("size", [(4, 4), (8, 40), (4, 100), (60, 28)])
def test_small_and_odd_sizes(chain, size):
    low = chain(images(6, 1, *size), range(6))
    assert low.shape == (6, 1, size[0] // 4, size[1] // 4) and low.isfinite().all()


@CHAINS
def test_channels_and_empty_batches(chain):
    x = images(2, 1, 32, 32)
    assert chain(x[:0], []).shape == (0, 1, 8, 8)
    assert chain(images(2, 3, 32, 32), [1, 2]).shape == (2, 3, 8, 8)
    assert chain(images(2, 2, 32, 32), [1, 2]).shape == (2, 2, 8, 8)
    if chain is degrade_sensor:
        copied = chain(x.expand(-1, 3, -1, -1), [1, 2])
        assert (copied - chain(x, [1, 2])).abs().max() <= 170 / 16383 / 30 + 1e-6, "one camera, copied, to a count"


@CHAINS
def test_errors_say_what_to_do(chain):
    with pytest.raises(ValueError, match="one per image"):
        chain(images(2, 1, 16, 16), [1])
    with pytest.raises(ValueError, match="crop_to_multiple"):
        chain(images(1, 1, 18, 16), [1])
    with pytest.raises(ValueError):
        chain(images(1, 1, 16, 16), [-1])
    masked = images(1, 1, 16, 16)
    masked[..., 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        chain(masked, [1])


# A value of each field that must make a difference to some image: no option is read and ignored.
ORDER = dict(
    blur_prob=0.3, kernel_size=(3, 5), sinc_prob=0.9, sinc_cutoff=(1.0, 1.1), bell_probs=(0, 0, 0.5, 0, 0, 0.5), sigma=(2.5, 2.9),
    beta_generalized=(0.5, 0.6), beta_plateau=(1.9, 2.0), resize_probs=(0.0, 0.0, 1.0), resize_range=(0.9, 1.1), gaussian_prob=1.0,
    gaussian_sigma=(40.0, 50.0), poisson_scale=(8.0, 9.0), gray_prob=0.0, jpeg_quality=(10, 12))
CHAIN = dict(second_order_prob=1.0, final_sinc_prob=0.0, final_sinc_cutoff=(1.1, 1.2), jpeg_last_prob=0.0, levels=15)
SENSOR = dict(
    wavelength_um=(13.0, 14.0), f_number=(2.0, 2.5), pixel_pitch_um=(25.0, 30.0), defocus_um=(50.0, 60.0), fill_factor=(0.2, 0.3),
    gain_drift=(0.1, 0.2), offset_drift_k=(1.0, 2.0), shutter_k=(250.0, 260.0), column_k=(0.5, 1.0), row_k=(0.5, 1.0), netd_k=(0.5, 0.6),
    blinking_fraction=(0.1, 0.2), blink_k=(9.0, 10.0), dead_fraction=(0.1, 0.2), adc_range_k=(290.0, 300.0), adc_bits=8, agc="plateau")
AGC = dict(agc="linear", agc_percentiles=(10.0, 90.0), agc_min_span_k=60.0, agc_plateau=1.2, agc_linear=0.9)


def _differs(chain, a, b, x):
    return not torch.equal(chain(x, range(len(x)), 4, a), chain(x, range(len(x)), 4, b))


def test_every_option_of_real_esrgan_counts():
    assert set(ORDER) == {f.name for f in fields(FirstOrder)}
    assert set(ORDER | CHAIN) == set(ORDER) | {f.name for f in fields(RealESRGANConfig)} - {"first", "second"}
    x, base = images(40, 3, 16, 16), RealESRGANConfig()
    for name, value in CHAIN.items():
        assert _differs(degrade_real_esrgan, base, replace(base, **{name: value}), x), name
    for order in ("first", "second"):
        for name, value in ORDER.items():
            changed = replace(base, **{order: replace(getattr(base, order), **{name: value})})
            assert _differs(degrade_real_esrgan, base, changed, x), f"{order}.{name}"


def test_every_option_of_the_sensor_counts():
    assert set(SENSOR) | set(AGC) == {f.name for f in fields(SensorConfig)}
    x, base = images(24, 1, 32, 32), SensorConfig(blinking_fraction=(0.02, 0.05))
    for name, value in SENSOR.items():
        assert _differs(degrade_sensor, base, replace(base, **{name: value}), x), name
    base = replace(base, agc="plateau")
    for name, value in AGC.items():
        assert _differs(degrade_sensor, base, replace(base, **{name: value}), x), name


def test_configurations_come_from_plain_values():
    config = configure(RealESRGANConfig, {"second": {"sigma": [0.2, 1.0]}, "levels": None})
    assert config.second == replace(RealESRGANConfig().second, sigma=(0.2, 1.0)), "the second pass keeps its own ranges"
    for changed in (config, SensorConfig(agc="linear")):
        assert configure(type(changed), resolved(changed)) == changed
    with pytest.raises(ConfigurationError, match="netd_k"):
        configure(SensorConfig, {"netd": [0, 1]})


@pytest.mark.parametrize("make, name", [
    (lambda: RealESRGANConfig(first=FirstOrder(blur_prob=1.5)), "first.blur_prob"),
    (lambda: RealESRGANConfig(first=FirstOrder(resize_probs=(0.5, 0.5, 0.5))), "first.resize_probs"),
    (lambda: RealESRGANConfig(first=FirstOrder(sigma=(3.0, 0.2))), "first.sigma"),
    (lambda: RealESRGANConfig(first=FirstOrder(resize_range=(1.1, 1.5))), "resize_range"),
    (lambda: RealESRGANConfig(first=FirstOrder(jpeg_quality=(0, 50))), "jpeg_quality"),
    (lambda: RealESRGANConfig(first=FirstOrder(kernel_size=(8, 8))), "kernel_size"),
    (lambda: RealESRGANConfig(levels=0), "levels"),
    (lambda: SensorConfig(netd_k=(0.2, 0.1)), "netd_k"),
    (lambda: SensorConfig(fill_factor=(0.0, 1.0)), "fill_factor"),
    (lambda: SensorConfig(dead_fraction=(0.0, 2.0)), "dead_fraction"),
    (lambda: SensorConfig(agc="auto"), "plateau"),
    (lambda: SensorConfig(adc_bits=0), "adc_bits"),
    (lambda: SensorConfig(agc_percentiles=(50.0, 50.0)), "agc_percentiles"),
])
def test_impossible_ranges_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()
