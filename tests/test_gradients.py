"""The gradient check: a sound path passes, each break is caught for its reason, an untouched network is no break."""
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from difiisr_dwt.codecs import make_codec
from difiisr_dwt.degradations import downsample, upsample
from difiisr_dwt.gradients import (
    BREAKS,
    PERCEPTUAL,
    GradientReport,
    check_all,
    check_codec,
    check_gradients,
    layers_in_order,
    perceptual_distance,
    perceptual_path,
    perturbed,
)
from difiisr_dwt.latent_space import LatentSpace, measure_sigma
from difiisr_dwt.losses import decoded_loss, latent_mse
from difiisr_dwt.metrics import lpips_network
from difiisr_dwt.schedule import ResShiftSchedule
from difiisr_dwt.thermal_scenes import render_scene
from difiisr_dwt.unet import CompactUNet


def edges(image, truth):
    """A cheap smooth distance: mean squared difference of slopes."""
    return sum((image - truth).diff(dim=d).square().mean((1, 2, 3)) for d in (-1, -2))


@pytest.fixture(scope="module")
def fresh():
    """A small denoiser as initialized."""
    torch.manual_seed(0)
    return CompactUNet(channels=(8, 16), blocks=1)


@pytest.fixture(scope="module")
def path():
    """From denoiser to distance on two scenes of 32×32 pixels."""
    hr = torch.stack([torch.as_tensor(render_scene(s, (32, 32)).image / 127.5 - 1, dtype=torch.float32) for s in (1, 2)])[:, None]
    up = upsample(downsample(hr / 2 + 0.5)) * 2 - 1
    codec = make_codec("packet")
    return perceptual_path(LatentSpace(codec, *measure_sigma(codec, [(hr, up)])), ResShiftSchedule(), hr, up, edges)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_sound(fresh, path, steps):
    """One prediction and reverse chains: every layer is reached, and the gradient is right far below the tolerance."""
    network = perturbed(fresh)
    before = copy.deepcopy(network.state_dict())
    check = check_gradients("sound", network, replace(path, steps=steps))
    assert check.verdict == "sound", check.reason
    assert all(check.norms.values()) and max(check.errors.values()) < 1e-6
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert next(network.parameters()).dtype == torch.float32 and next(network.parameters()).requires_grad


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decode in numpy", "no grad_fn"), ("prediction detached", "no grad_fn"), ("no_grad around decode", "no grad_fn"),
        ("image rounded to 8 bits", "zero"), ("LL band detached", "wrong"), ("state detached between steps", "wrong"),
    ],
)
def test_breaks(fresh, path, name, reason):
    """Each break is caught for its own reason, and the loss's value does not give it away."""
    network = perturbed(fresh)
    check = check_gradients(name, network, BREAKS[name](path))
    assert check.verdict == "broken" and reason in check.reason
    if reason == "no grad_fn":
        assert set(check.norms.values()) == {None} and check.loss == path(copy.deepcopy(network).double()).item()
    if reason == "wrong":
        assert all(check.norms.values()) and max(check.errors.values()) > 1e-3


def test_every_break_is_tested_above():
    """A break added to the module gets its line here."""
    tested = {case[0] for case in test_breaks.pytestmark[0].args[1]}
    assert tested == set(BREAKS)


def test_none_where_another_term_hides_the_break(fresh, path):
    """With a part of the network outside the graph, autograd gives None there, and that is what is said."""
    class TwoParts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = perturbed(fresh), nn.Conv2d(16, 16, 1)

        def forward(self, x, t, condition):
            return self.head(self.body(x, t, condition).detach())

    check = check_gradients("body detached", TwoParts(), path)
    assert check.verdict == "broken" and "None" in check.reason


@pytest.mark.parametrize("name", [None, *BREAKS])
def test_untouched_network(fresh, path, name):
    """A zero last layer is no break, and does not excuse one that shows in the last layer."""
    check = check_gradients("untouched", fresh, BREAKS[name](path) if name else path)
    if name in (None, "LL band detached", "state detached between steps"):  # these leave a gradient in the last layer
        assert check.verdict == "undecided" and "no break" in check.reason
        assert list(check.norms.values())[-1] > 0
    else:
        assert check.verdict == "broken"


def test_small_errors_are_seen(fresh, path):
    """A derivative that is off by one part in a thousand fails."""
    class AlmostIdentity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.001

    check = check_gradients("off", perturbed(fresh), lambda denoise: path(lambda *x: AlmostIdentity.apply(denoise(*x))))
    assert check.verdict == "broken" and "wrong" in check.reason


def test_seeds(fresh, path):
    """Other directions, other weights, the same verdicts."""
    for seed in range(1, 5):
        network = perturbed(fresh, seed=seed)
        assert check_gradients("sound", network, path, seed=seed).verdict == "sound"
        assert check_gradients("LL", network, BREAKS["LL band detached"](path), seed=seed).verdict == "broken"


def test_codec(path):
    """gradcheck passes for the sound maps and names the ones that a detached band spoils."""
    assert not any(check_codec(path.latent_space, path.schedule).values())
    cut = copy.copy(path.latent_space)
    cut.decode = lambda x0, up: path.latent_space.decode(torch.cat([x0[:, :1].detach(), x0[:, 1:]], 1), up)
    found = check_codec(cut, path.schedule)
    assert found["x0 → image"] and found["x0 → x_t → x_{t−1} → image"] and not found["HR → x0"]


def test_report(fresh, path):
    """All of it passes with perturbed weights and not with untouched ones; a missed break fails the report."""
    report = check_all(perturbed(fresh), path, directions=2)
    assert report.passed, report.failures
    assert {c.case for c in report.checks} >= set(BREAKS)
    untouched = check_all(fresh, path, directions=1)
    assert not untouched.passed and "perturb the network first" in untouched.text
    missed = GradientReport((replace(report.checks[-1], verdict="sound"),), report.codec)
    assert not missed.passed and "instead of broken" in missed.text
    wrong = GradientReport(report.checks, report.codec | {"x0 → image": "Jacobian mismatch"})
    assert not wrong.passed and "Jacobian mismatch" in wrong.text


def test_layers_in_order(fresh, path):
    """By execution, not by name: the state enters at `first`, the prediction leaves at `last`."""
    order = layers_in_order(copy.deepcopy(fresh).double(), path)
    assert order[-1] == "last" and order.index("time.0") < order.index("first") < order.index("down.0.0.conv1")
    assert not any(m._forward_hooks for m in fresh.modules())


def test_lpips_in_float64():
    """The double copy measures what LPIPS measures, and the shared network stays float32."""
    distance = perceptual_distance("lpips-alex")
    a, b = (torch.as_tensor(render_scene(s, (64, 64)).image / 255.0)[None, None] for s in (1, 2))
    exact = distance(a.double(), b.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), lpips_network()(a, b).detach(), atol=1e-5, rtol=1e-4)
    assert next(lpips_network().parameters()).dtype == torch.float32
    assert set(PERCEPTUAL) == {"lpips-alex", "lpips-vgg"}
    with pytest.raises(ValueError, match="'lpips-alex'"):
        perceptual_distance("lpips-squeeze")


def test_perceptual_network(fresh):
    """With LPIPS itself, also where flat areas of the up-sampled LR are ties for its maxima."""
    hr = torch.as_tensor(render_scene(1, (64, 64)).image / 127.5 - 1, dtype=torch.float32)[None, None]
    hr[..., :40, :] = 1.0
    up = upsample(downsample(hr / 2 + 0.5)) * 2 - 1
    codec = make_codec("packet")
    space = LatentSpace(codec, *measure_sigma(codec, [(hr, up)]))
    path = perceptual_path(space, ResShiftSchedule(), hr, up, perceptual_distance())
    for network, verdict in ((perturbed(fresh), "sound"), (fresh, "undecided")):
        check = check_gradients(verdict, network, path)
        assert check.verdict == verdict, check.reason


def test_losses(path):
    """Zero for the truth; weights per band; the images reach the distance in [0, 1]."""
    x0, seen = path.latent_space.encode(path.hr, path.up), []

    def recording(image, truth):
        seen.append((image, truth))
        return edges(image, truth)

    assert decoded_loss(x0, path.hr, path.up, path.latent_space, recording) < 1e-12
    torch.testing.assert_close(seen[0][1], (path.hr + 1) / 2)
    torch.testing.assert_close(seen[0][0], seen[0][1])
    weights = torch.zeros(16).index_fill(0, torch.tensor([3]), 16.0)
    torch.testing.assert_close(latent_mse(x0 + 1, x0, weights), torch.tensor(1.0, dtype=torch.float64))
