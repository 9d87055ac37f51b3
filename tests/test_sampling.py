"Samplers: published trajectories, the order of calls, gradients."
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difiisr_dwt.images import shared_data
from difiisr_dwt.sampling import deterministic_step, sample_ancestral, sample_ddim
from difiisr_dwt.schedule import ResShiftSchedule

GOLDEN = shared_data() and shared_data().parent / 'golden'
needs_golden = pytest.mark.skipif(not (GOLDEN and GOLDEN.is_dir()), reason='the reference values are not here')
SAMPLERS = {'ancestral': sample_ancestral, 'ddim': sample_ddim}


def noise(seed=0, shape=(2, 3, 4, 4)): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_golden
@pytest.mark.parametrize('kind', SAMPLERS)
@pytest.mark.parametrize('name', ['s15', 's4', 'k1', 'p1', 's10'])
def test_published_trajectory(name, kind):
    values = json.loads((GOLDEN / 'resshift_schedules.json').read_text())[name]
    schedule = ResShiftSchedule(**{k: v for k, v in values.items() if not isinstance(v, list)})
    tensors = pytest.importorskip('safetensors.torch').load_file(GOLDEN / 'resshift_trajectories.safetensors')
    lq, published = tensors[f'{name}.lq'], tensors[f'{name}.{kind}']
    noises, steps = iter(tensors[f'{name}.noises']), []
    final = SAMPLERS[kind](lambda x, t: torch.tanh(0.7 * x + 0.3 * lq) + 0.01 * t.view(-1, 1, 1, 1),
                           tensors[f'{name}.y'], schedule, noise_sampler=lambda: next(noises), callback=steps.append)
    states = torch.stack([*(step['x_t'] for step in steps), final])
    torch.testing.assert_close(states, published, atol=1e-5, rtol=0)
    assert torch.equal(final, steps[-1]['x0']), 'the walk ends in the last guess'
    assert [(step['i'], step['t']) for step in steps] == [(i, schedule.steps - 1 - i) for i in range(schedule.steps)]


@pytest.mark.parametrize('n', [1, 2, 4, 15])
@pytest.mark.parametrize('kind', SAMPLERS)
def test_calls(kind, n):
    "What the network is told, and how often noise is drawn."
    told, drawn = [], []

    def denoise(x, t):
        assert t.dtype == torch.int64 and t.shape == (2,)
        told.append(t[0].item())
        return 0.5 * x

    def noise_sampler():
        drawn.append(len(told))
        return noise(len(drawn))

    schedule = ResShiftSchedule().respace(n)
    SAMPLERS[kind](denoise, noise(), schedule, noise_sampler=noise_sampler)
    assert told == schedule.timesteps.flip(0).tolist()
    assert drawn == (list(range(n)) if kind == 'ancestral' else [0]), 'x_T first, then after each guess but the last'


@pytest.mark.parametrize('kind', SAMPLERS)
def test_full_respacing_is_the_chain_and_seeds_decide(kind):
    def run(schedule, seed):
        torch.manual_seed(seed)
        return SAMPLERS[kind](lambda x, t: torch.tanh(x), noise(), schedule)
    assert torch.equal(run(ResShiftSchedule(), 0), run(ResShiftSchedule().respace(15), 0))
    assert not torch.equal(run(ResShiftSchedule(), 0), run(ResShiftSchedule(), 1))


@pytest.mark.parametrize('kind', SAMPLERS)
def test_one_step_is_one_evaluation(kind):
    def denoise(x, t): return torch.tanh(x) + 0.1 * t.view(-1, 1, 1, 1)
    single, y, t = ResShiftSchedule().respace(1), noise(), torch.tensor([0, 0])
    expected = denoise(single.scale_input(single.prior_sample(y, noise(1)), t), torch.tensor([14, 14]))
    assert torch.equal(SAMPLERS[kind](denoise, y, single, noise_sampler=lambda: noise(1)), expected)


@pytest.mark.parametrize('kind', SAMPLERS)
def test_gradients_belong_to_the_caller(kind):
    condition = torch.zeros(2, 3, 4, 4, requires_grad=True)
    sample = SAMPLERS[kind](lambda x, t: torch.tanh(x + condition), noise(), ResShiftSchedule())
    sample.sum().backward()
    assert condition.grad.abs().min() > 0
    with torch.no_grad():
        assert not SAMPLERS[kind](lambda x, t: torch.tanh(x + condition), noise(), ResShiftSchedule()).requires_grad


@given(st.integers(2, 20), st.floats(0.5, 3), st.data())
@settings(deadline=None, max_examples=40)
def test_deterministic_step_keeps_the_noise(steps, kappa, data):
    "With the true x0, the step leads from q_sample at t to q_sample at t - 1 with the same noise."
    schedule, t = ResShiftSchedule(steps=steps, kappa=kappa), data.draw(st.integers(1, steps - 1))
    x0, y, eps = (noise(seed).double() for seed in range(3))
    at = [schedule.q_sample(x0, y, torch.full((2,), position), eps) for position in (t - 1, t)]
    torch.testing.assert_close(deterministic_step(x0, at[1], y, t, schedule), at[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize('kind', SAMPLERS)
def test_a_perfect_denoiser_returns_the_truth(kind):
    truth = noise(5)
    assert torch.equal(SAMPLERS[kind](lambda x, t: truth, noise(), ResShiftSchedule()), truth)
