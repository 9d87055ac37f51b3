"The ResShift chain: published values, and identities that hold for every chain."
import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difiisr_dwt.images import shared_data
from difiisr_dwt.schedule import ResShiftSchedule

GOLDEN = shared_data() and shared_data().parent / 'golden'
needs_golden = pytest.mark.skipif(not (GOLDEN and GOLDEN.is_dir()), reason='the reference values are not here')
NAMES = ('s15', 's4', 'k1', 'p1', 's10')

schedules = st.builds(ResShiftSchedule, steps=st.integers(1, 40), min_noise_level=st.floats(0.005, 0.5),
                      kappa=st.floats(0.3, 4), power=st.floats(0.2, 3), etas_end=st.floats(0.3, 0.999))


def golden(name):
    values = json.loads((GOLDEN / 'resshift_schedules.json').read_text())[name]
    return ResShiftSchedule(**{k: v for k, v in values.items() if not isinstance(v, list)}), values


@needs_golden
@pytest.mark.parametrize('name', NAMES)
def test_published_coefficients(name):
    schedule, values = golden(name)
    for key, value in values.items():
        if isinstance(value, list):
            np.testing.assert_allclose(getattr(schedule, key).numpy(), value, rtol=1e-12, atol=1e-15, err_msg=key)


@needs_golden
@pytest.mark.parametrize('name', NAMES)
def test_published_forward_states(name):
    safetensors = pytest.importorskip('safetensors.torch')
    tensors = safetensors.load_file(GOLDEN / 'resshift_trajectories.safetensors')
    x0, y, t, eps, x_t, scaled = (tensors[f'{name}.{k}'] for k in ('x0', 'y', 't', 'eps', 'x_t', 'scaled_x_t'))
    schedule, _ = golden(name)
    torch.testing.assert_close(schedule.q_sample(x0, y, t, eps), x_t, atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.scale_input(x_t, t), scaled, atol=1e-6, rtol=0)


@given(schedules, st.data())
@settings(deadline=None, max_examples=60)
def test_posterior_composes_to_the_marginal(schedule, data):
    "Forward to t, one step back with the true x0: the marginal of t - 1, of the full and of any respaced chain."
    schedule = schedule.respace(data.draw(st.integers(1, schedule.steps)))
    t = torch.arange(len(schedule))
    x0, y = torch.randn(2, len(schedule), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = schedule.posterior(x0, schedule.q_sample(x0, y, t, torch.zeros_like(x0)), t)
    torch.testing.assert_close(mean, x0 + schedule.etas_prev[:, None] * (y - x0), atol=1e-9, rtol=0)
    marginal = schedule.kappa ** 2 * schedule.etas_prev
    carried = schedule.posterior_mean_coef1 ** 2 * schedule.kappa ** 2 * schedule.etas
    torch.testing.assert_close(carried + variance.flatten(), marginal, atol=1e-9, rtol=0)


@given(schedules)
@settings(deadline=None, max_examples=60)
def test_noise_rises(schedule):
    assert (schedule.sqrt_etas.diff() > 0).all() and (schedule.posterior_variance >= 0).all()
    assert schedule.sqrt_etas[-1].item() == pytest.approx(schedule.etas_end, rel=1e-12)
    assert (schedule.weight_loss_mse > 0).all() and torch.isfinite(schedule.weight_loss_mse).all()


def test_posterior_variance_rises_by_default():
    assert (ResShiftSchedule().posterior_variance.diff() > 0).all()
    assert (ResShiftSchedule().weight_loss_mse.diff() < 0).all()


@given(st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=100)
def test_respaced_steps(steps, data):
    schedule, n = ResShiftSchedule(steps=steps), data.draw(st.integers(1, steps))
    short = schedule.respace(n)
    kept = short.timesteps
    assert short.steps == len(short) == n and kept.dtype == torch.int64
    assert kept[-1] == steps - 1 and (kept.diff() > 0).all()
    assert n == 1 or kept.diff().max() - kept.diff().min() <= 1, 'evenly'
    assert torch.equal(short.sqrt_etas, schedule.sqrt_etas[kept])
    assert short.respace(1) == schedule.respace(1)


@pytest.mark.parametrize('n', [15, np.int64(15)])
def test_respaced_to_itself(n):
    schedule, same = ResShiftSchedule(), ResShiftSchedule().respace(n)
    for key in ('timesteps', 'sqrt_etas', 'posterior_mean_coef1', 'posterior_mean_coef2', 'posterior_variance',
                'weight_loss_mse'):
        assert torch.equal(getattr(schedule, key), getattr(same, key)), key


@pytest.mark.parametrize('n', [0, -1, 16, 2.5, True])
def test_respace_says_how_many_there_are(n):
    with pytest.raises(ValueError, match='15 steps'): ResShiftSchedule().respace(n)


@pytest.mark.parametrize('bad', [dict(steps=0), dict(steps=2.5), dict(etas_end=0), dict(etas_end=1),
                                 dict(etas_end=0.01),
                                 dict(kappa=0), dict(kappa=float('inf')), dict(power=-1), dict(power=float('nan')),
                                 dict(min_noise_level=0)])
def test_invalid_values(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): ResShiftSchedule(**bad)


def test_frozen_hashable_plain():
    schedule = ResShiftSchedule()
    assert schedule == ResShiftSchedule() and hash(schedule) == hash(ResShiftSchedule())
    assert dataclasses.asdict(schedule) == dict(steps=15, min_noise_level=0.04, kappa=2.0, power=0.3, etas_end=0.99)
    with pytest.raises(dataclasses.FrozenInstanceError): schedule.kappa = 1.0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_type(dtype):
    schedule, t = ResShiftSchedule(), torch.tensor([0, 14])
    x = torch.ones(2, 1, 4, 4, dtype=dtype)
    assert {schedule.q_sample(x, x, t, x).dtype, schedule.scale_input(x, t).dtype, schedule.prior_sample(x, x).dtype,
            *(part.dtype for part in schedule.posterior(x, x, t))} == {dtype}


def test_usable_for_training_after_inference_mode():
    schedule, t, x = ResShiftSchedule(), torch.tensor([3]), torch.ones(1, 1, 2, 2)
    with torch.inference_mode(): schedule.q_sample(x, x, t, x)
    x.requires_grad_()
    schedule.scale_input(schedule.q_sample(x, x, t, x), t).pow(2).sum().backward()
    assert x.grad is not None
