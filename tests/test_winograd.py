"The quick convolution beside the ordinary one: sizes, batches, layouts, changed weights, threads, precision."
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difiisr_dwt.winograd import POINTS, Conv3x3, conv3x3, cook_toom, transform_kernel


@pytest.mark.parametrize('points, outputs', [(POINTS, 4), ((0., 1., -1.), 2), ((0., 1., -1., 2., -2.), 4), ((0., 1., -1., .5, 2.), 2)])
def test_cook_toom(points, outputs):
    a, g, b = cook_toom(points, outputs)
    n, taps = len(points) + 1, len(points) + 2 - outputs
    w, d = torch.randn(taps, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    assert a.shape == (n, outputs) and g.shape == (n, taps) and b.shape == (n, n)
    assert torch.allclose(a.T @ ((g @ w) * (b.T @ d)), F.conv1d(d[None, None], w[None, None])[0, 0], atol=1e-10)


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 4, 4), (2, 5, 3), (1, 64, 33), (5, 7, 40), (1, 300, 310)])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_equals_convolution(shape, channels_last, bias):
    torch.manual_seed(0)
    batch, height, width = shape
    x, w = torch.randn(batch, 5, height, width), torch.randn(7, 5, 3, 3) / 45**.5
    b = torch.randn(7) if bias else None
    if channels_last: x = x.contiguous(memory_format=torch.channels_last)
    found, expected = conv3x3(x, transform_kernel(w), b), F.conv2d(x.double(), w.double(), b.double() if bias else None, padding=1)
    assert found.shape == expected.shape and (found - expected).abs().max() < 2e-5


def pair(i=32, o=40):
    torch.manual_seed(0)
    fast, plain = Conv3x3(i, o).requires_grad_(False), nn.Conv2d(i, o, 3, padding=1).requires_grad_(False)
    plain.load_state_dict(fast.state_dict())
    return fast, plain, torch.randn(1, i, 32, 32)


def ordinary(fast, x):
    "Whether the ordinary convolution was taken: nothing is kept."
    fast._kernel = None
    fast(x)
    return fast._kernel is None


def test_which_way():
    fast, plain, x = pair()
    assert not ordinary(fast, x)
    assert ordinary(fast, x[..., :8, :8]) and ordinary(Conv3x3(4, 64), torch.randn(1, 4, 64, 64))
    assert ordinary(fast.double(), x.double()) and not ordinary(fast.float(), x)
    with torch.autocast('cpu', torch.bfloat16): assert ordinary(fast, x) and fast(x).dtype == torch.bfloat16
    fast.requires_grad_(True)
    assert ordinary(fast, x)
    with torch.no_grad(): assert not ordinary(fast, x)
    fast.requires_grad_(False)
    assert ordinary(fast, x.clone().requires_grad_())


@pytest.mark.parametrize('change', ['in place', 'data', 'load', 'replace', 'one weight', 'inference'])
def test_follows_its_weights(change):
    fast, plain, x = pair()
    fast(x)
    new = torch.randn_like(plain.weight)
    if change == 'one weight':
        new = plain.weight.clone()
        new[3, 20, 0, 2] += 1
    if change == 'in place':
        with torch.no_grad(): fast.weight.copy_(new)
    elif change == 'data': fast.weight.data.copy_(new)
    elif change == 'load': fast.load_state_dict({'weight': new, 'bias': fast.bias})
    elif change == 'replace': fast.weight = nn.Parameter(new, requires_grad=False)
    elif change == 'one weight':
        with torch.no_grad(): fast.weight[3, 20, 0, 2] += 1
    else:
        with torch.inference_mode(): fast.weight = nn.Parameter(new.clone(), requires_grad=False)
    plain.weight.copy_(new)
    with torch.inference_mode(): assert (fast(x) - plain(x)).abs().max() < 1e-3 * plain(x).abs().max()


def test_inference_first_then_training():
    fast, plain, x = pair()
    with torch.inference_mode(): fast(x)
    fast.requires_grad_(True)
    plain.requires_grad_(True)
    for module in (fast, plain): module(x).square().sum().backward()
    assert torch.allclose(fast.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-2)
    with torch.no_grad(): assert torch.allclose(fast(x), plain(x), atol=1e-4)


def test_threads():
    fast, plain, x = pair()
    found = []
    threads = [threading.Thread(target=lambda: found.append(fast(x))) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 8 and all(torch.allclose(f, plain(x), atol=1e-4) for f in found)
