"""The super-resolver: any size and dtype, tiles without seams, masks, sequences, and requests that cannot be met."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from difiisr_dwt import models, pipeline
from difiisr_dwt.degradations import downsample_pixels
from difiisr_dwt.guidance import Guidance, measure_spectrum, reference_free
from difiisr_dwt.images import ImageError, ThermalImage, robust_range
from difiisr_dwt.models import (
    ModelConfig,
    ModelError,
    NetworkConfig,
    RestorationModel,
    available_models,
    find_model,
    save_model,
)
from difiisr_dwt.pipeline import TILE, SuperResolver
from difiisr_dwt.tiling import noise_crop, spans


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A run folder's model that changes the picture, as zero-initialized ends would not."""
    torch.manual_seed(0)
    model = RestorationModel(ModelConfig(network=NetworkConfig(channels=(16, 24, 32), blocks=1)), sigma=torch.full((16,), 0.03))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def resolver(model_file):
    return SuperResolver.from_pretrained(model_file, device="cpu")


@pytest.fixture(scope="module", params=["tiny", *available_models()])
def any_resolver(request, resolver):
    """The model made here, and those that ship."""
    return resolver if request.param == "tiny" else SuperResolver.from_pretrained(request.param, device="cpu")


def scene(height, width, seed=0):
    """Grey levels 60 … 200 with edges, gradients, dots and noise, uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 4
    picture = 110 + 30 * np.sin(x / 19 + 1) * np.cos(y / 13) + 40 * (np.hypot(y - 20, x - 35) < 12) - 30 * ((x // 9 + y // 7) % 5 == 0)
    return np.clip(picture + rng.normal(0, 1.5, picture.shape), 0, 255).round().astype(np.uint8)


def low(hr):
    """As an 8-bit file of a quarter of the size."""
    return np.rint(255 * downsample_pixels(hr.astype(np.float32) / 255, levels=255)).astype(np.uint8)


def psnr(a, b):
    """In dB, of grey levels."""
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1), (3, 5), (33, 17), (31, 64)])
def test_size_and_dtype(resolver, size, dtype):
    array = scene(*size).astype(dtype)
    before = array.copy()
    sr = resolver.upscale(array)
    assert sr.shape == (4 * size[0], 4 * size[1]) and sr.dtype == array.dtype
    assert np.isfinite(sr).all() and np.array_equal(array, before)


def test_longer_than_a_tile(resolver):
    for size in [(1, 300), (291, 3), (130, 67)]:
        assert resolver.upscale(scene(*size), tile=64).shape == (4 * size[0], 4 * size[1])


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_tiles_agree_with_the_whole(any_resolver, steps, sampler):
    steps = min(steps, any_resolver.max_steps)
    lr = low(scene(4 * 90, 4 * 150))
    options = {"steps": steps, "sampler": sampler, "seed": 5}
    whole, tiled = (any_resolver.upscale(lr.astype(np.float32), tile=tile, **options) for tile in (0, 64))
    other = any_resolver.upscale(lr.astype(np.float32), tile=0, **options | {"seed": 6})
    difference, change = np.abs(whole - tiled), np.abs(whole - lr.repeat(4, 0).repeat(4, 1))
    # A sample's statistics in place of the frame's are all that differs: far less than another noise or no network.
    assert difference.mean() < 0.1 * change.mean() and difference.max() < 0.6 * change.max()
    assert steps == 1 or difference.mean() < np.abs(whole - other).mean()


def test_no_seams(any_resolver):
    """Steps from pixel to pixel are no larger where tiles begin and end than elsewhere."""
    lr, steps = low(scene(4 * 64, 4 * 208)), min(2, any_resolver.max_steps)
    bare, tiled = (np.abs(np.diff(any_resolver.upscale(lr.astype(np.float32), steps, tile=tile), axis=1)).mean(0) for tile in (0, 64))
    assert np.abs(tiled - bare).max() < 0.25 * bare.mean()


def halves(height, width):
    """A calm half beside a busy, noisy one: tiles of it that were normalized by themselves would not fit together."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    busy = 140 + 42 * (2 * ((x // 5 + y // 7) % 2) - 1) + rng.normal(0, 6, x.shape)
    return np.clip(np.where(x < width // 2, 40 + 10 * np.sin(x / 40), busy), 0, 255).round().astype(np.float32)


@pytest.mark.parametrize("steps", [1, 4])
def test_jump_across_borders(steps):
    """Where a tile begins or ends, neighbours differ by at most one grey level more than in the untiled result."""
    resolver = SuperResolver.from_pretrained("compact", device="cpu")
    lr = halves(100, 150)
    whole, tiled = (resolver.upscale(lr, steps=steps, tile=tile) for tile in (0, 64))
    for axis, length in enumerate(lr.shape):
        more = np.abs(np.diff(tiled, axis=axis)) - np.abs(np.diff(whole, axis=axis))
        borders = {4 * n - 1 for span in spans(length, 64) for n in span if 0 < n < length}
        assert len(borders) > 1 and more.take(sorted(borders), axis).max() <= 1
    assert np.abs(whole - tiled).mean() < 0.25, "one statistic for all: tiles are the whole but for a sample's error"


def test_auto_is_the_whole_where_memory_allows(resolver, monkeypatch):
    lr = scene(70, 300)
    whole, tiled = (resolver.upscale(lr, tile=tile) for tile in (0, TILE))
    assert not np.array_equal(whole, tiled)
    for free, expected in ((10**10, whole), (10**6, tiled)):
        monkeypatch.setattr(pipeline, "memory", lambda _, free=free: (10**11, free))
        assert np.array_equal(resolver.upscale(lr), expected)


COSTS = """
import resource, sys
import numpy as np, torch
from difiisr_dwt.pipeline import SuperResolver
torch.set_num_threads(1)
resolver = SuperResolver.from_pretrained("compact", device="cpu")
seen = []
resolver.model.mean.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[2].shape[0] * inputs[2].shape[2] * inputs[2].shape[3]))
for side in (64, 256, 512):
    seen.clear()
    resolver.upscale(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8), tile=int(sys.argv[1]))
    print(side**2, sum(seen), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(("tile", "most"), [(0, 2500), (128, 1300)])
def test_costs_are_linear(tile, most):
    """Bytes for each further pixel stay below a bound, which a network that keeps whole layers breaks; what the network sees per pixel does not grow."""
    env = os.environ | {"PYTHONPATH": str(Path(pipeline.__file__).parents[1]), "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run([sys.executable, "-c", COSTS, str(tile)], capture_output=True, text=True, env=env, check=True)
    pixels, seen, peak = np.array([line.split() for line in run.stdout.splitlines()], float).T
    slope = (peak[2] - peak[1]) / (pixels[2] - pixels[1])
    assert slope < most and 1 <= seen[2] / pixels[2] < 1.1 * seen[1] / pixels[1], (slope, seen / pixels)


def test_same_noise_at_the_same_place(resolver):
    torch.testing.assert_close(noise_crop(3, 1, 16, 60, 10, 9, 70), noise_crop(3, 1, 16, 0, 0, 100, 100)[..., 60:69, 10:80])


def test_deterministic_by_seed(resolver):
    lr = scene(40, 50)
    first = resolver.upscale(lr, steps=3, seed=1)
    torch.manual_seed(123)
    assert np.array_equal(first, resolver.upscale(lr, steps=3, seed=1)), "nothing but the seed matters"
    assert not np.array_equal(first, resolver.upscale(lr, steps=3, seed=2))
    assert not np.array_equal(first, resolver.upscale(lr, steps=3, seed=1, sampler="ddim"))


def test_counts_score_as_grey_levels(any_resolver):
    hr = scene(4 * 60, 4 * 80)
    lr = low(hr)
    for steps in {1, min(3, any_resolver.max_steps)}:
        sr8 = any_resolver.upscale(lr, steps=steps)
        sr16 = any_resolver.upscale(lr.astype(np.uint16) + 7000, steps=steps)
        values = [psnr(hr, sr8), psnr(hr, sr16.astype(int) - 7000)]
        assert abs(values[0] - values[1]) < 0.1, values


def test_kelvin_keeps_small_differences(resolver):
    """A float image far from zero: offset and scale change nothing but rounding."""
    lr = scene(30, 40).astype(np.float64)
    plain, kelvin = resolver.upscale(lr), resolver.upscale(290 + lr / 1000)
    assert np.abs((kelvin - 290) * 1000 - plain).max() < 0.01


def test_mask_is_kept_and_not_spread(resolver):
    lr = scene(40, 50).astype(np.float32)
    masked = lr.copy()
    masked[10:14, 20:23], masked[0, 0], masked[39] = np.nan, np.inf, np.nan
    sr = resolver.upscale(masked)
    expected = masked.repeat(4, 0).repeat(4, 1)
    assert np.array_equal(np.isnan(sr), np.isnan(expected)) and np.array_equal(np.isinf(sr), np.isinf(expected))
    change = np.abs(sr - resolver.upscale(lr))[np.isfinite(sr)]
    assert np.median(change) < 1, "far from the mask little changes"
    assert np.isnan(resolver.upscale(np.full((5, 6), np.nan, np.float32))).all()


def test_a_constant_frame_stays_one(any_resolver):
    for value in (0, 128, 255):
        sr = any_resolver.upscale(np.full((20, 24), value, np.uint8)).astype(int)
        assert np.abs(sr - value).max() <= 8, "little contrast is not stretched to much"


def test_one_range_for_a_sequence(resolver):
    frames = np.stack([scene(40, 50)] * 2)
    frames[1, :8, :8] = 255
    seen = robust_range(frames, min_width=32)
    alone = [resolver.upscale(f).astype(int)[60:, 60:] for f in frames]
    together = [resolver.upscale(f, value_range=seen).astype(int)[60:, 60:] for f in frames]
    assert np.abs(together[0] - together[1]).mean() < np.abs(alone[0] - alone[1]).mean()
    own = robust_range(frames[0], min_width=32)
    assert np.abs(resolver.upscale(frames[0], value_range=own).astype(int) - resolver.upscale(frames[0])).max() <= 1


def test_image_in_image_out(resolver):
    image = ThermalImage.from_native(scene(12, 10).astype(np.uint16) + 7000, {"format": "TIFF", "description": "kept"})
    sr = resolver.upscale_image(image)
    assert sr.dtype == np.uint16 and sr.value_range == image.value_range and sr.metadata == image.metadata
    assert sr.pixels.dtype == np.float32 and np.array_equal(sr.native(), resolver.upscale(image.native()))


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": 0}, "steps must be 1 to 15"), ({"steps": 16}, "steps must be 1 to 15"), ({"seed": -1}, "seed"),
    ({"sampler": "ancestal"}, "did you mean 'ancestral'"), ({"tile": 63}, "at least 64"), ({"tile": -64}, "at least 64"),
    ({"value_range": (5, 5)}, "rising"), ({"value_range": (0, float("nan"))}, "rising"),
])  # fmt: skip
def test_impossible_requests(resolver, options, words):
    with pytest.raises(ModelError, match=words):
        resolver.upscale(scene(8, 8), **options)


def test_samples_that_are_all_alike(tmp_path):
    """A network for the mean hears no noise, so several samples of its single step tell nothing; those of the chain beside it do."""
    tiny = NetworkConfig(channels=(8, 8), blocks=1)
    model = RestorationModel(ModelConfig(network=tiny, mean=replace(tiny, stateless=True)))
    for parameter in model.parameters():  # beginning at zero, neither changes anything
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(tmp_path / "both.safetensors", model)
    resolver, image = SuperResolver.from_pretrained(tmp_path / "both.safetensors", device="cpu"), ThermalImage.from_native(scene(12, 9))
    with pytest.raises(ModelError, match="samples of 1 step are all alike"):
        resolver.upscale_samples(image, 2, 1)
    assert resolver.upscale_samples(image, 2, 2)[1].max() > 0


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8), np.zeros((4, 4), np.int32), np.zeros((4, 4), bool)])
def test_no_single_frame(resolver, array):
    with pytest.raises(ImageError):
        resolver.upscale(array)


def test_names_of_models(model_file, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "available_models", lambda: {"compact": model_file, "large": model_file})
    monkeypatch.chdir(tmp_path)
    assert find_model("compact") == find_model(model_file) == find_model(model_file.parent) == model_file
    for name, words in {"compakt": "'compact'", "zzz": "'compact', 'large'", "no/such": "no such model file",
                        "x.safetensors": "no such model file", ".": "no model.safetensors"}.items():
        with pytest.raises(ModelError, match=words):
            find_model(name)
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(ModelError, match="x.safetensors"):
        SuperResolver.from_pretrained("x.safetensors")
    with pytest.raises(ModelError, match="not available"):
        SuperResolver.from_pretrained("compact", device="cuda:99")


def test_progress_is_told(resolver):
    told = []
    resolver.upscale(scene(70, 100), steps=2, tile=64, callback=lambda done, total: told.append((done, total)))
    assert told == [(i, 8) for i in range(9)]


def test_guide_steers_each_tile(resolver):
    """A reference-free guide is built for every LR tile and changes the result; without strength it changes nothing."""
    prior = measure_spectrum(torch.rand(4, 1, 1, 128, 128))
    frame = np.random.default_rng(0).integers(60, 200, (80, 40), dtype=np.uint8)
    seen = []

    def guide(rho: float) -> Callable[[torch.Tensor], Guidance]:
        def build(lr: torch.Tensor) -> Guidance:
            seen.append(tuple(lr.shape))
            return Guidance(reference_free(lr, prior, "bicubic"), rho)

        return build

    plain = resolver.upscale(frame, steps=2, tile=64)
    assert np.array_equal(resolver.upscale(frame, steps=2, tile=64, guide=guide(0.0)), plain)
    assert len(seen) > 1 and all(shape[:2] == (1, 1) and max(shape[2:]) <= 64 for shape in seen)
    assert not np.array_equal(resolver.upscale(frame, steps=2, tile=64, guide=guide(1.0)), plain)
