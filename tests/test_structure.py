"""Structure and grain: against independent libraries and a golden table, straightforward formulas, and what noise may win."""
import json
import math

import numpy as np
import pytest
import torch
from golden_metrics import FILE, levels, measure, pairs, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from difiisr_dwt.degradations import downsample, upsample
from difiisr_dwt.grain import GRAIN_SIGMAS, add_grain, grain_control, grain_fair
from difiisr_dwt.metrics import Lpips, MetricError, lpips_network, psnr, ssim, to_8bit
from difiisr_dwt.structure import (
    STRUCTURE_PROTOCOL,
    edge_sharpness,
    gmsd,
    infrared_score,
    measure_structure,
    one_window_similarity,
    radiometric_consistency,
    signal_spectrum_distance,
    spectrum_distance,
)
from difiisr_dwt.thermal_scenes import render_scene

GOLDEN = json.loads(FILE.read_text())["values"]
TOLERANCE = {"psnr": 1e-4, "ssim": 1e-6, "gmsd": 1e-7, "spectrum": 1e-6, "lpips_alex": 1e-5, "lpips_vgg": 1e-5}


def ours(metric: str, a: torch.Tensor, b: torch.Tensor) -> float:
    if metric == "gmsd": # piq takes the deviation of a population, the authors that of a sample
        count = math.ceil(a.shape[-2] / 2) * math.ceil(a.shape[-1] / 2)
        return gmsd(a, b).item() * math.sqrt((count - 1) / count)
    function = {"psnr": psnr, "ssim": ssim, "spectrum": spectrum_distance}.get(metric) or lpips_network(metric.removeprefix("lpips_"))
    with torch.inference_mode():
        return function(a, b).item()


def test_the_golden_table():
    "Every number that another library gave for the five pairs."
    images, count = pairs(), 0
    for metric, by_pair in GOLDEN.items():
        assert set(by_pair) == set(images)
        for name, by_library in by_pair.items():
            value = ours(metric, *map(tensor, images[name]))
            for library, expected in by_library.items():
                assert value == pytest.approx(expected, abs=TOLERANCE[metric]), f"{metric} of {name}: {library}"
                count += 1
    assert count == 5 * (3 + 3 + 1 + 1 + 1 + 1) and len(GOLDEN) == 6


def test_the_golden_table_again():
    "The libraries that are installed here still say what the table says."
    pytest.importorskip("skimage")
    for metric, by_pair in measure(nets=()).items():
        for name, by_library in by_pair.items():
            for library, value in by_library.items():
                assert value == pytest.approx(GOLDEN[metric][name][library], abs=1e-6), f"{metric} of {name}: {library}"


def frames(seed: int = 3, height: int = 128, width: int = 160) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "HR, its LR, and the LR enlarged."
    hr = torch.from_numpy(render_scene(seed, (height, width)).image / 255.0).float()[None, None]
    lr = downsample(hr, levels=255)
    return hr, lr, to_8bit(upsample(lr))


def random_pair(seed: int, height: int, width: int, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    hr = ndimage.gaussian_filter(rng.normal(size=(height, width)), 2)
    hr = np.clip(0.5 + 0.2 * hr / hr.std(), 0, 1)
    return tuple(tensor(levels(255 * image)) for image in (hr + rng.normal(0, noise, hr.shape), hr))


# ---- properties

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(64, 90), st.integers(64, 90))
def test_identity_symmetry_and_sign(seed, height, width):
    sr, hr = random_pair(seed, height, width)
    zero = [gmsd, spectrum_distance, signal_spectrum_distance]
    for metric in zero:
        assert metric(hr, hr).item() == 0 < metric(sr, hr).item(), metric
    assert edge_sharpness(hr, hr).item() == pytest.approx(1) and one_window_similarity(hr, hr).item() == pytest.approx(1)
    for metric in (gmsd, spectrum_distance, one_window_similarity, infrared_score):
        assert metric(sr, hr).item() == pytest.approx(metric(hr, sr).item(), rel=1e-9), metric
    turned = [image.mT for image in (sr, hr)]
    for metric in (gmsd, edge_sharpness, spectrum_distance, signal_spectrum_distance, infrared_score):
        assert metric(*turned).item() == pytest.approx(metric(sr, hr).item(), rel=1e-6), metric


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_more_noise_on_the_truth_is_worse(seed):
    "White noise moves every measure away from its ideal, the more the stronger it is."
    hr, _, _ = frames(seed)
    rows = [measure_structure(add_grain(hr, sigma), hr) for sigma in (1, 2, 3, 4, 6)]
    for key, up in (("gmsd", True), ("spectrum", True), ("infrared_score", False), ("one_window", False)):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=not up), key
    assert all(abs(row["edge_sharpness"] - 1) < 0.01 for row in rows), "noise is neither sharp nor blurred"


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_noise_wins_nothing_where_it_must_not(seed):
    "On a blurred image: LPIPS and the whole spectrum fall for noise, the measures of structure do not."
    hr, _, blurred = frames(seed)
    plain = measure_structure(blurred, hr)
    noisy = [measure_structure(add_grain(blurred, sigma), hr) for sigma in GRAIN_SIGMAS[1:]]
    assert min(row["spectrum"] for row in noisy) < 0.7 * plain["spectrum"], "a gain by noise"
    assert min(row["gmsd"] for row in noisy) > 0.975 * plain["gmsd"]
    assert min(row["signal_spectrum"] for row in noisy) > 0.98 * plain["signal_spectrum"]
    assert all(abs(row["edge_sharpness"] - plain["edge_sharpness"]) < 0.006 for row in noisy)


def test_a_sharper_image_is_sharper():
    hr, lr, blurred = frames()
    soft = to_8bit(upsample(downsample(hr, scale=8), scale=8))
    over = to_8bit(hr + 0.5 * (hr - blurred))
    sharpness = [edge_sharpness(image, hr).item() for image in (soft, blurred, hr, over)]
    assert sharpness == sorted(sharpness) and sharpness[2] == pytest.approx(1)
    assert gmsd(soft, hr) > gmsd(blurred, hr) and signal_spectrum_distance(soft, hr) > signal_spectrum_distance(blurred, hr)


# ---- against straightforward formulas

def test_edge_sharpness_is_that_of_scipy():
    "Gradients by scipy's Gaussian derivatives, in their valid part."
    for seed in range(3):
        sr, hr = random_pair(seed, 70, 81)

        def gradient(image):
            x = image[0, 0].double().numpy()
            return [ndimage.gaussian_filter(x, 1, order=order, truncate=4)[4:-4, 4:-4] for order in ((0, 1), (1, 0))]

        (ax, ay), (bx, by) = gradient(sr), gradient(hr)
        steep = np.hypot(bx, by)
        edge = steep >= np.sort(steep.ravel())[-round(0.05 * steep.size)]
        expected = ((ax * bx + ay * by) / steep)[edge].sum() / steep[edge].sum()
        assert edge_sharpness(sr, hr).item() == pytest.approx(expected, abs=1e-9)


def test_one_window_is_near_one_for_anything():
    "The first design's formula, and the kind of value that it gave."
    hr, _, blurred = frames(5, 192, 256)
    x, y = blurred.double().flatten() * 255, hr.double().flatten() * 255
    c1, c2, cov = 2.55**2, 7.65**2, torch.cov(torch.stack([x, y]), correction=0)
    expected = (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2) / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
    assert one_window_similarity(blurred, hr).item() == pytest.approx(expected.item(), abs=1e-9)
    assert one_window_similarity(blurred, hr) > 0.95 and one_window_similarity(blurred, hr) > ssim(blurred, hr) + 0.05


def test_infrared_score_removes_four_pixels():
    sr, hr = random_pair(1, 64, 70)
    spoilt = sr.clone()
    spoilt[..., :4, :] = spoilt[..., -4:, :] = spoilt[..., :, :4] = spoilt[..., :, -4:] = 0
    assert infrared_score(sr, hr).item() == infrared_score(spoilt, hr).item()
    inner = [image[..., 4:-4, 4:-4] for image in (sr, hr)]
    assert infrared_score(sr, hr).item() == pytest.approx((psnr(*inner) + 20 * ssim(*inner)).item())
    spoilt[..., 4, 4] = 1 - spoilt[..., 4, 4].round()
    assert infrared_score(spoilt, hr).item() != infrared_score(sr, hr).item()


def test_consistency_is_pillows():
    "A is Pillow's resize of the 8-bit file."
    hr, lr, blurred = frames()
    small = Image.fromarray((blurred[0, 0] * 255).round().byte().numpy()).resize((40, 32), Image.Resampling.BICUBIC)
    off = np.abs(np.asarray(small).astype(int) - (lr[0, 0] * 255).round().numpy())
    largest, mean = radiometric_consistency(blurred, lr)
    assert 255 * largest.item() == pytest.approx(off.max(), abs=1e-3) and 255 * mean.item() == pytest.approx(off.mean(), abs=1e-4)
    assert radiometric_consistency(hr, lr)[0].item() == 0
    linear = radiometric_consistency(hr + 0.01, downsample(hr), levels=None)
    assert linear[0].item() == pytest.approx(0.01, abs=1e-6) == linear[1].item()
    with pytest.raises(ValueError, match="4 times as small as the result, not 40×31 for 160×128"):
        radiometric_consistency(hr, lr[..., 1:, :])


# ---- faults

def test_faults_are_sentences_and_small_images_have_no_spectrum():
    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    for metric in (spectrum_distance, signal_spectrum_distance):
        with pytest.raises(MetricError, match="spectrum distance needs images of at least 64×64 pixels, this one has 40×40"):
            metric(x, x)
    for metric in (gmsd, edge_sharpness, infrared_score, one_window_similarity, measure_structure):
        with pytest.raises(MetricError, match="one shape"):
            metric(x, x[..., 1:])
    found = measure_structure(x, x)
    assert set(found) == set(STRUCTURE_PROTOCOL) and {k for k, v in found.items() if math.isnan(v)} == {"spectrum", "signal_spectrum"}
    flat = torch.full((1, 1, 80, 80), 0.5)
    assert math.isnan(edge_sharpness(flat, flat).item()), "no edge, no sharpness"


def test_a_batch_is_measured_image_by_image():
    images = [random_pair(seed, 66, 72) for seed in range(3)]
    sr, hr = (torch.cat(part) for part in zip(*images, strict=True))
    for metric in (gmsd, edge_sharpness, spectrum_distance, signal_spectrum_distance, infrared_score, one_window_similarity):
        torch.testing.assert_close(metric(sr, hr), torch.cat([metric(*pair) for pair in images]))


# ---- grain-fair LPIPS

@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_against_one_truth_is_lpips(net):
    sr, hr = random_pair(0, 64, 72)
    lpips = lpips_network(net)
    with torch.inference_mode():
        torch.testing.assert_close(lpips.against(hr)(sr), lpips(sr, hr), atol=1e-6, rtol=1e-5)
        with pytest.raises(MetricError, match="at least"):
            lpips.against(hr[..., :8])(sr[..., :8])


def test_grain_control_is_the_same_with_any_lpips():
    "The features of the truth are computed once for our network; a plain function is called for each."
    sr, hr = random_pair(2, 64, 64, 0.01)
    fast, plain = (grain_control(sr, hr, f, (0, 1, 3)) for f in (lpips_network(), lambda a, b: lpips_network()(a, b)))
    assert isinstance(lpips_network(), Lpips)
    for a, b in zip(fast, plain, strict=True):
        assert a["psnr"] == b["psnr"] and a["lpips"] == pytest.approx(b["lpips"], abs=1e-6)


def test_grain_fair_has_one_sigma_for_the_set():
    lpips = {0: (0.5, 0.2), 1: (0.3, 0.25), 2: (0.1, 0.6)} # sigma -> two images, each with a best sigma of its own
    tables = [[{"sigma": float(s), "psnr": 30.0 - s, "lpips": values[i]} for s, values in lpips.items()] for i in (0, 1)]
    fair = grain_fair(tables)
    assert (fair.sigma, fair.lpips, fair.psnr, fair.per_image, fair.at_limit) == (1, pytest.approx(0.275), 29, (0.3, 0.25), False)
    assert [row["lpips"] for row in fair.curve] == pytest.approx([0.35, 0.275, 0.35])
    assert grain_fair(tables[:1]).at_limit and grain_fair(tables[1:]).sigma == 0
    with pytest.raises(ValueError, match="at least one image"):
        grain_fair([])


def test_grain_gives_no_advantage_in_the_fair_measure():
    "A smooth image and the same with its best grain score alike, since both may have it."
    hr, _, blurred = frames(4)
    lpips = lpips_network()
    plain = grain_fair([grain_control(blurred, hr, lpips)])
    assert plain.sigma > 0 and plain.lpips < 0.95 * plain.curve[0]["lpips"], "LPIPS falls for grain"
    grained = grain_fair([grain_control(add_grain(blurred, plain.sigma, seed=9), hr, lpips)])
    assert grained.lpips == pytest.approx(plain.lpips, rel=0.03) and grained.sigma < plain.sigma
