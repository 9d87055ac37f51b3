"""No-reference quality: shapes against scipy, order of damage, and sentences where something is missing."""
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from difiisr_dwt import no_reference
from difiisr_dwt.degradations import downsample, upsample
from difiisr_dwt.grain import add_grain
from difiisr_dwt.metrics import MetricError, to_8bit
from difiisr_dwt.no_reference import clip_iqa, fit_pristine, fit_shape, niqe, niqe_features
from difiisr_dwt.thermal_scenes import render_scene


def scene(seed: int) -> torch.Tensor:
    return torch.from_numpy(render_scene(seed, (288, 384)).image / 255.0).float()[None, None]


@pytest.fixture(scope="module")
def model():
    return fit_pristine(scene(seed) for seed in range(100, 116))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.6, 4), st.floats(0.05, 20), st.integers(0, 1000))
def test_the_shape_is_that_of_scipy(shape, scale, seed):
    drawn = stats.gennorm.rvs(shape, scale=scale, size=60_000, random_state=seed)[None]
    found, left, right = fit_shape(drawn)
    assert found[0] == pytest.approx(shape, rel=0.08)
    assert left[0] == pytest.approx(scale, rel=0.08) and right[0] == pytest.approx(scale, rel=0.08)
    mirrored = fit_shape(-drawn)
    assert (mirrored[0][0], mirrored[1][0], mirrored[2][0]) == (found[0], right[0], left[0])


def test_damage_is_seen(model):
    "Blur and noise move scenes that the model has not seen away from it, more of them further; a little of either need not."
    for seed in (1, 2, 3, 4):
        hr = scene(seed)
        blurred = [niqe(image, model) for image in (hr, *(to_8bit(upsample(downsample(hr, scale=s), scale=s)) for s in (4, 8)))]
        noisy = [niqe(add_grain(hr, sigma), model) for sigma in (4, 12)]
        assert blurred == sorted(blurred) and blurred[0] < 0.6 * blurred[1] and blurred[0] < noisy[0] < noisy[1]


def test_features_are_finite_and_per_patch(model):
    features, contrast = niqe_features(scene(5)[..., :200, :300])
    assert features.shape == (2 * 3, 36) and contrast.shape == (6,) and np.isfinite(features).all()
    assert np.isfinite(niqe(torch.full((1, 1, 96, 96), 0.5), model)), "a flat image, one patch"
    assert model.covariance.shape == (36, 36) and model.patches >= 37


def test_the_fitted_mean_is_that_of_the_products():
    "The mean of the fitted bell follows the plain mean of the products of neighbours, sign included."
    image = to_8bit(upsample(downsample(scene(5))))
    patches = no_reference._patches(no_reference._normalized(255 * image.double())[0], 96)
    for k, shift in enumerate(((0, 1), (1, 0), (1, 1), (1, -1))):
        plain = (patches * np.roll(patches, shift, (1, 2))).mean((1, 2))
        assert np.corrcoef(plain, niqe_features(image)[0][:, 3 + 4 * k])[0, 1] > 0.95


def test_faults_are_sentences(monkeypatch, model):
    with pytest.raises(MetricError, match="at least 96×96 pixels"):
        niqe(torch.zeros(1, 1, 95, 200), model)
    with pytest.raises(MetricError, match="needs at least 37 sharp patches .* these frames have 1"):
        fit_pristine([scene(1)[..., :96, :96]])
    no_reference._clip_network.cache_clear()
    monkeypatch.setitem(sys.modules, "piq", None)
    with pytest.raises(MetricError, match=r"install it with \"pip install 'difiisr_dwt\[iqa\]'\""):
        clip_iqa(torch.zeros(1, 1, 64, 64))

    def offline(**_):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "piq", types.SimpleNamespace(CLIPIQA=offline))
    with pytest.raises(MetricError, match=r"cannot fetch its weights \(OSError\)"):
        clip_iqa(torch.zeros(1, 1, 64, 64))


def test_clip_gets_three_channels_and_gives_one_number_per_image(monkeypatch):
    no_reference._clip_network.cache_clear()

    class Stub(torch.nn.Module):
        def __init__(self, data_range):
            super().__init__()
            assert data_range == 1.0

        def forward(self, x):
            assert x.shape[1] == 3 and torch.equal(x[:, 0], x[:, 2])
            return x.mean((1, 2, 3))[:, None]

    monkeypatch.setitem(sys.modules, "piq", types.SimpleNamespace(CLIPIQA=Stub))
    assert clip_iqa(torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])).tolist() == [0, 1]
    no_reference._clip_network.cache_clear()
