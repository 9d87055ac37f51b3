"Wavelets: against PyWavelets and pytorch-wavelets, properties over sizes and layouts, gradients, compilation."
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difiisr_dwt import wavelets
from difiisr_dwt.wavelets import MODES, dwt2, idwt2, ipacket2, packet2, wavedec2, waverec2

WAVELETS = ("haar", "db2", "db4", "bior1.3", "bior4.4", "sym4")
SIZES = ((2, 2), (2, 3), (5, 7), (8, 8), (16, 6), (33, 20), (31, 47), (64, 32))
LONG = ("db8", "sym8", "coif1", "coif3", "rbio3.1", "rbio4.4", "db1", "dmey")
ORTHONORMAL = ("haar", "db2", "db4", "db8", "coif1")  # to 1e-12: PyWavelets' own table of sym4 is good to 1e-12 only


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def flat(coefficients):
    return [coefficients[0], *(band for detail in coefficients[1:] for band in detail)]


def compare(x, wavelet, mode, level):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # levels deeper than the image
        expected = pywt.wavedec2(x, wavelet, mode, level)
    result = wavedec2(torch.from_numpy(x), wavelet, level, mode)
    assert [b.shape for b in flat(result)] == [b.shape for b in flat(expected)]
    for ours, theirs in zip(flat(result), flat(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    # the inverse on coefficients of its own, so that it is not only tested where it undoes the transform
    random = np.random.default_rng(1)
    noise = [random.standard_normal(expected[0].shape)]
    noise += [tuple(random.standard_normal(b.shape) for b in detail) for detail in expected[1:]]
    for coefficients in (expected, noise):
        tensors = [torch.from_numpy(coefficients[0]), *(tuple(map(torch.from_numpy, d)) for d in coefficients[1:])]
        back = waverec2(tensors, wavelet, mode)
        np.testing.assert_allclose(back, pywt.waverec2(coefficients, wavelet, mode), rtol=0, atol=1e-9)
    h, w = x.shape[-2:]
    restored = waverec2(result, wavelet, mode)[..., :h, :w]
    np.testing.assert_allclose(restored, x, rtol=0, atol=.05 if wavelet == "dmey" else 1e-9)  # dmey is approximate


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_equals_pywavelets(wavelet, mode):
    for size in SIZES:
        for level in (1, 2, 3):
            n = min(size)
            for _ in range(level - 1): n = wavedec2(torch.zeros(n, n), wavelet, 1, "zero")[0].shape[-1]
            if mode == "reflect" and n < 2: continue  # PyWavelets and we refuse, see below
            compare(random_image(*size), wavelet, mode, level)


@pytest.mark.parametrize("wavelet", LONG)
def test_long_filters_equal_pywavelets(wavelet):
    for mode in MODES:
        for size in ((5, 7), (33, 20)): compare(random_image(*size), wavelet, mode, 2)


def test_every_discrete_wavelet():
    for wavelet in pywt.wavelist(kind="discrete"):
        x = random_image(12, 14)
        for mode in ("periodization", "symmetric"):
            ll, details = dwt2(torch.from_numpy(x), wavelet, mode)
            expected, others = pywt.dwt2(x, wavelet, mode)
            np.testing.assert_allclose(torch.stack([ll, *details]), np.stack([expected, *others]), rtol=0, atol=1e-9)


def test_leading_dimensions_and_default_level():
    x = random_image(2, 3, 40, 37)
    for wavelet in ("haar", "db2", "db8"):
        ours, theirs = wavedec2(torch.from_numpy(x), wavelet), pywt.wavedec2(x, wavelet, "periodization")
        assert len(ours) == len(theirs)
        for a, b in zip(flat(ours), flat(theirs)): np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    for n in range(1, 70):
        for wavelet in ("haar", "db2", "bior4.4"):
            level = pywt.dwt_max_level(n, pywt.Wavelet(wavelet).dec_len)
            assert len(wavedec2(torch.zeros(n, 80), wavelet)) == level + 1
    assert torch.equal(wavedec2(torch.ones(3, 3), level=0)[0], torch.ones(3, 3))


def test_missing_bands_are_zeros():
    ll, (lh, hl, hh) = pywt.dwt2(random_image(10, 12), "db2", "symmetric")
    ours = idwt2((torch.from_numpy(ll), (None, torch.from_numpy(hl), None)), "db2", "symmetric")
    np.testing.assert_allclose(ours, pywt.idwt2((ll, (None, hl, None)), "db2", "symmetric"), atol=1e-12)
    ours = waverec2([torch.from_numpy(ll), (None, None, None)], "db2", "symmetric")
    np.testing.assert_allclose(ours, pywt.waverec2([ll, (None, None, None)], "db2", "symmetric"), atol=1e-12)


def test_equals_pytorch_wavelets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytorch_wavelets = pytest.importorskip("pytorch_wavelets", exc_type=ImportError)  # needs setuptools < 82
    x = torch.from_numpy(random_image(2, 3, 32, 48)).float()
    for wavelet in ("haar", "db2", "bior4.4"):
        for mode in MODES:
            ll, details = pytorch_wavelets.DWTForward(J=2, wave=wavelet, mode=mode)(x)
            ours = wavedec2(x, wavelet, 2, mode)
            torch.testing.assert_close(ours[0], ll, rtol=0, atol=1e-5)
            for mine, theirs in zip(ours[:0:-1], details):  # theirs: finest first, bands in dimension 2
                torch.testing.assert_close(torch.stack(mine, 2), theirs, rtol=0, atol=1e-5)
            back = pytorch_wavelets.DWTInverse(wave=wavelet, mode=mode)((ll, details))
            torch.testing.assert_close(waverec2(ours, wavelet, mode), back, rtol=0, atol=1e-5)


def test_packet_is_the_walsh_hadamard_transform():
    filters = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])/2
    x = random_image(2, 3, 8, 12)
    blocks = x.reshape(2, 3, 2, 4, 3, 4)
    expected = np.einsum("ip,bchpwq,jq->bijchw", filters, blocks, filters).reshape(2, 48, 2, 3)
    np.testing.assert_allclose(packet2(torch.from_numpy(x)), expected, rtol=0, atol=1e-14)


def test_ll2_is_four_times_the_mean_of_a_block():
    x = torch.from_numpy(random_image(1, 2, 16, 16))
    torch.testing.assert_close(packet2(x)[:, :2], 4*torch.nn.functional.avg_pool2d(x, 4))


@pytest.mark.parametrize("level", (1, 2, 3, 4))
def test_haar_matrix_equals_haar_tree(monkeypatch, level):
    x = torch.from_numpy(random_image(2, 3, 32, 48))
    fast = packet2(x, level=level)
    monkeypatch.setattr(wavelets, "_HAAR", ())
    torch.testing.assert_close(packet2(x, level=level), fast, rtol=0, atol=1e-13)
    torch.testing.assert_close(ipacket2(fast, level=level), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("wavelet", ("db2", "bior4.4"))
def test_packet_equals_pywavelets_tree(wavelet):
    x = random_image(16, 24)
    result = packet2(torch.from_numpy(x)[None, None], wavelet)[0]
    tree = pywt.WaveletPacket2D(x, wavelet, "periodization", maxlevel=2)
    bits = {"a": (0, 0), "h": (1, 0), "v": (0, 1), "d": (1, 1)}  # high along H, high along W
    for first in bits:
        for second in bits:
            row, column = (bits[first][k] + 2*bits[second][k] for k in (0, 1))
            np.testing.assert_allclose(result[4*row + column], tree[first + second].data, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WAVELETS + LONG[:5]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3),
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from(("contiguous", "channels_last", "transposed", "strided", "expanded")), st.integers(0, 99),
)
def test_packet_properties(wavelet, level, channels, batch, blocks, dtype, layout, seed):
    h, w = (n*2**level for n in blocks)
    x = torch.from_numpy(random_image(batch, channels, h, w, seed=seed)).to(dtype)
    if layout == "channels_last": x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed": x = x.mT.contiguous().mT
    if layout == "strided": x = x.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded": x = x[:, :1].expand(-1, channels, -1, -1)
    before = x.clone()
    z = packet2(x, wavelet, level)
    assert z.shape == (batch, channels*4**level, *blocks) and z.dtype == dtype
    torch.testing.assert_close(z, packet2(x.contiguous(), wavelet, level), rtol=0, atol=1e-5)
    single = torch.stack([packet2(x[:, c:c + 1], wavelet, level) for c in range(channels)], 2).flatten(1, 2)
    torch.testing.assert_close(z, single, rtol=0, atol=1e-5)  # band-major, channels apart
    z = z.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else z
    back = ipacket2(z, wavelet, level)
    assert back.dtype == dtype and torch.equal(x, before)
    exact = wavelet in ORTHONORMAL
    bound = (1e-6 if wavelet == "haar" else 2e-5) if dtype == torch.float32 else (1e-12 if exact else 1e-10)
    torch.testing.assert_close(back, x, rtol=0, atol=bound)
    if exact: torch.testing.assert_close(z.square().sum(), x.square().sum(), rtol=1e-5 if dtype == torch.float32 else 1e-12,
                                         atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WAVELETS), st.sampled_from(MODES), st.integers(0, 2), st.integers(9, 40), st.integers(9, 40),
    st.sampled_from((torch.float32, torch.float64)), st.booleans(),
)
def test_pyramid_properties(wavelet, mode, level, h, w, dtype, transposed):
    x = torch.from_numpy(random_image(2, w, h) if transposed else random_image(2, h, w)).to(dtype)
    x = x.mT if transposed else x
    coefficients = wavedec2(x, wavelet, level, mode)
    assert all(b.dtype == dtype for b in flat(coefficients))
    back = waverec2(coefficients, wavelet, mode)[..., :h, :w]
    torch.testing.assert_close(back, x, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-10)


def test_packet_round_trip_of_large_images():
    x = torch.from_numpy(random_image(2, 1, 256, 256))
    assert (ipacket2(packet2(x)) - x).abs().max() <= 1e-12
    assert (ipacket2(packet2(x.float())) - x.float()).abs().max() <= 1e-6


@pytest.mark.parametrize("wavelet", ("haar", "db2", "bior4.4", "db10"))  # matrix, one pass, long and very long filters
def test_gradients(wavelet):
    x = torch.from_numpy(random_image(1, 1, 4, 8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packet2(x, wavelet), x)
    assert torch.autograd.gradcheck(lambda z: ipacket2(z, wavelet), packet2(x, wavelet).detach().requires_grad_())
    odd = torch.from_numpy(random_image(3, 5)).requires_grad_()
    for mode in MODES:
        def forward(x, mode=mode):
            ll, details = dwt2(x, wavelet, mode)
            return torch.stack([ll, *details])
        def inverse(z, mode=mode):
            ll, *details = z
            return idwt2((ll, details), wavelet, mode)
        assert torch.autograd.gradcheck(forward, odd)
        assert torch.autograd.gradcheck(inverse, forward(odd).detach().requires_grad_())


def test_haar_packet_gradient_of_the_gradient():
    x = torch.from_numpy(random_image(1, 1, 4, 4)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ipacket2(packet2(x)**3), x)


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
def test_autocast_does_not_round(wavelet):
    x = torch.from_numpy(random_image(1, 1, 32, 32)).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = packet2(x, wavelet)
        back = ipacket2(z, wavelet)
    assert z.dtype == back.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


def test_threads_do_not_disturb_each_other():
    jobs = [(wavelet, n) for wavelet in WAVELETS for n in (8, 16, 24)]*4
    def run(job):
        wavelet, n = job
        x = torch.from_numpy(random_image(1, 2, n, n))
        return (ipacket2(packet2(x, wavelet), wavelet) - x).abs().max()
    with ThreadPoolExecutor(4) as pool: assert max(pool.map(run, jobs)) < 1e-10


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
def test_compiles_and_exports(wavelet):
    class RoundTrip(torch.nn.Module):
        def forward(self, x):
            return ipacket2(2*packet2(x, wavelet), wavelet)
    x, larger = (torch.from_numpy(random_image(2, 1, n, 16)).float() for n in (8, 24))
    compiled = torch.compile(RoundTrip(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2*x)
    height = 4*torch.export.Dim("height", min=1, max=4096)
    exported = torch.export.export(RoundTrip(), (x,), dynamic_shapes=({2: height},)).module()
    torch.testing.assert_close(exported(larger), 2*larger)


@pytest.mark.parametrize("call, words", [
    (lambda x: packet2(x[..., :6]), "multiples of 4"),
    (lambda x: packet2(x[0]), "batch of images"),
    (lambda x: packet2(x, level=0), "level of at least 1"),
    (lambda x: packet2(x, "db2", mode="symmetric"), "periodization"),
    (lambda x: ipacket2(x), "packet of level 2"),
    (lambda x: dwt2(x, "db22222"), "nearest"),
    (lambda x: dwt2(x, "morl"), "Unknown wavelet 'morl'"),
    (lambda x: dwt2(x, mode="periodic"), "Unknown border mode 'periodic'"),
    (lambda x: dwt2(x.int()), "floating-point"),
    (lambda x: dwt2(x[..., :0]), "at least one pixel"),
    (lambda x: dwt2(x[..., :1], mode="reflect"), "at least two rows and columns"),
    (lambda x: wavedec2(x, level=-1), "negative"),
    (lambda x: waverec2([]), "no coefficients"),
    (lambda x: idwt2((x, (x, x, x[..., 1:]))), "one shape"),
    (lambda x: idwt2((None, (None, None, None))), "At least one band"),
])
def test_mistakes_get_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error: call(torch.zeros(1, 1, 8, 8))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
