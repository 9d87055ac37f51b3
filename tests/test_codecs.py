"Codecs: exact, differentiable, stateless; every backend, size, layout and compiler."
import math
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difiisr_dwt.band_codecs import fit_resampler, fold, unfold
from difiisr_dwt.codecs import CODECS, DetailCodec, make_codec
from difiisr_dwt.vq import VQModel
from difiisr_dwt.wavelets import dwt2

COMPLETE = ("packet", "pyramid", "dct", "pixel")  # all in the latent
KEEPING = ("ll", "ll_hh", "full_band")  # lossless with what they keep aside
LOSSY = ("all_bands", "all_bands_learnable")
LOSSLESS, WITHOUT_VQ = COMPLETE + KEEPING, COMPLETE + KEEPING + LOSSY
ON_WAVELETS = tuple(name for name in WITHOUT_VQ if name not in ("dct", "pixel"))
CHANNELS = {"ll": 1, "ll_hh": 2, "full_band": 4, "all_bands": 7, "all_bands_learnable": 7} | dict.fromkeys(COMPLETE, 16)
# The filters of these undo each other to the last bit, those of SHORT in float32 too (longer sums round more).
SHORT = ("haar", "db2", "coif1", "bior1.3", "bior2.2")
EXACT = (*SHORT, "db4", "db8", "coif3", "bior3.1", "rbio3.1")
# PyWavelets' tables of these have fewer digits: see test_perfect_reconstruction_defect.
ROUNDED = ("sym2", "sym4", "sym8", "bior4.4", "bior6.8", "rbio4.4")
SMALL_VQ = {
    "embed_dim": 3, "n_embed": 16,
    "ddconfig": {
        "double_z": False, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "padding_mode": "zeros",
    },
}


def random_image(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape)).to(dtype)


def extremes(height=40, width=24, dtype=torch.float32):
    "Images in [-1, 1] that round the most: noise, noise of ±1, and plain white."
    noise = random_image(2, 1, height, width)
    return torch.cat([noise, noise.sign(), torch.ones(1, 1, height, width)]).to(dtype)


def build(name, image_channels=1, **options):
    "A codec with those of the options that it has; `all_bands` at its only level."
    unknown = {"level"} if name in LOSSY else {"wavelet", "backend"} if name in ("dct", "pixel") else set()
    return make_codec(name, image_channels, **{k: v for k, v in options.items() if k not in unknown})


def tensors(kept):
    "All tensors in what a codec keeps aside."
    if isinstance(kept, torch.Tensor): return [kept]
    return [t for part in kept for t in tensors(part)] if isinstance(kept, tuple) else []


def largest(error):
    return error.abs().max().item()


def defect(wavelet):
    "How far the filters are from undoing each other in one dimension: Σ|error of the impulse response|."
    low, high, low_back, high_back = map(np.array, pywt.Wavelet(wavelet).filter_bank)
    mirror = (-1.0) ** np.arange(len(low))
    through = np.convolve(low, low_back) + np.convolve(high, high_back)
    alias = np.convolve(low * mirror, low_back) + np.convolve(high * mirror, high_back)
    through[len(low) - 1] -= 2
    return max(abs(through).sum(), abs(alias).sum()) / 2


# Lossless

@pytest.mark.parametrize("name", LOSSLESS)
def test_round_trip_and_energy(name):
    for channels in (1, 3):
        for level in (1, 2, 3):
            for wavelet in EXACT if name in ON_WAVELETS else ("haar",):
                codec = build(name, channels, wavelet=wavelet, level=level)
                assert codec.lossless and not list(codec.parameters())
                for dtype in (torch.float32, torch.float64):
                    image = extremes(dtype=dtype).expand(-1, channels, -1, -1)
                    latent, kept = codec.encode(image)
                    assert latent.dtype == dtype
                    narrow = 1e-6 if wavelet in SHORT and level < 3 else 3e-6
                    assert largest(codec.decode(latent, kept) - image) <= (narrow if dtype == torch.float32 else 1e-12)
                    if pywt.Wavelet(wavelet).orthogonal:
                        energy = sum(t.double().square().sum() for t in (latent, *tensors(kept)))
                        torch.testing.assert_close(energy, image.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wavelet", ROUNDED + EXACT)
def test_perfect_reconstruction_defect(wavelet):
    "In float64 what is left is the error of PyWavelets' own filter tables, not of the transform."
    exact, bound = wavelet in EXACT, float(defect(wavelet))
    assert (bound < 1e-14) == exact
    image = extremes(dtype=torch.float64)
    for name in ("packet", "pyramid", "full_band"):
        for level in (1, 2, 3):
            error = largest(build(name, wavelet=wavelet, level=level)(image) - image)
            # twice per level, and through the inverse of the coarser levels, which can enlarge it a little
            assert error <= (1e-12 if exact else 2 * level * 2 * bound + 1e-13), (name, level)
            if level == 1 and not exact:  # PyWavelets has the same error
                theirs = pywt.idwt2(pywt.dwt2(image.numpy(), wavelet, "periodization"), wavelet, "periodization")
                assert largest(torch.from_numpy(theirs) - image) == pytest.approx(error, rel=0.05)


def test_every_discrete_wavelet():
    image = random_image(1, 1, 24, 20)
    for wavelet in pywt.wavelist(kind="discrete"):
        if pywt.Wavelet(wavelet).dec_len > 42 and wavelet != "dmey": continue  # their tables are exact too, but they are slow
        for name in ("packet", "pyramid"):
            assert largest(make_codec(name, wavelet=wavelet)(image) - image) <= 12 * defect(wavelet) + 1e-13, (name, wavelet)


layouts = st.sampled_from(("contiguous", "channels_last", "transposed", "strided", "cropped", "expanded"))


def laid_out(x, layout):
    "The same values in another order of memory."
    if layout == "channels_last": return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed": return x.mT.contiguous().mT
    if layout == "strided": return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "cropped": return torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2]
    return x[:, :1].expand(-1, x.shape[1], -1, -1) if layout == "expanded" else x


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(WITHOUT_VQ), st.sampled_from(EXACT + ROUNDED), st.integers(1, 3), st.sampled_from((1, 3)), st.integers(0, 2),
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from((torch.float32, torch.float64)), layouts, st.integers(0, 99),
)
def test_properties(name, wavelet, level, channels, batch, size, dtype, layout, seed):
    codec = build(name, channels, wavelet=wavelet, level=level).to(dtype)
    image = laid_out(random_image(batch, channels, *size, seed=seed, dtype=dtype), layout)
    before, state = image.clone(), {k: v for k, v in vars(codec).items() if not k.startswith("_")}
    with torch.no_grad():
        latent, kept = codec.encode(image)
        back = codec.decode(laid_out(latent, layout) if layout != "expanded" else latent, kept)
        again, _ = codec.encode(before)
    factor = 4 if name in LOSSY else 2**level
    assert codec.factor == factor and codec.channels == latent.shape[1]
    assert latent.shape == (batch, codec.channels, *(math.ceil(n / factor) for n in size))
    assert back.shape == image.shape and back.dtype == latent.dtype == dtype
    assert torch.equal(image, before) and state == {k: v for k, v in vars(codec).items() if not k.startswith("_")}
    torch.testing.assert_close(latent, again, rtol=0, atol=1e-5)
    if codec.lossless and batch:
        assert largest(back - image) <= (1e-5 if dtype == torch.float32 else 1e-12 if wavelet in EXACT else 1e-10)
    if codec.detail_channels:
        details = codec.details(kept)
        assert details.shape == (batch, codec.detail_channels, *latent.shape[2:])
        assert all(map(torch.equal, tensors(codec.with_details(kept, details)), tensors(kept)))
    if batch == 2:  # images and channels apart
        with torch.no_grad(): single, other = codec.encode(image[1:])
        torch.testing.assert_close(single, latent[1:], rtol=0, atol=1e-5)
        if channels == 3 and name != "all_bands_learnable":
            alone = build(name, 1, wavelet=wavelet, level=level).to(dtype).encode(image[:, 1:2])[0]
            torch.testing.assert_close(latent[:, 1::3], alone, rtol=0, atol=1e-5)  # band-major


@pytest.mark.parametrize("name", WITHOUT_VQ)
def test_channels_of_the_design(name):
    assert make_codec(name).channels == CHANNELS[name] and make_codec(name, 3).channels == 3 * CHANNELS[name]
    assert make_codec(name).encode(random_image(1, 1, 31, 18).float())[0].shape == (1, CHANNELS[name], 8, 5)


def test_padding_repeats_the_border():
    "An odd size is that of the image continued by its last row and column, cut again."
    for name in LOSSLESS:
        codec = make_codec(name)
        image = random_image(1, 1, 13, 6)
        padded = torch.nn.functional.pad(image, (0, 2, 0, 3), mode="replicate")
        assert torch.equal(codec.encode(image)[0], codec.encode(padded)[0])
        assert codec.encode(image)[1][0] == (13, 6)


def test_dct_and_pixel_against_numpy():
    image = random_image(1, 2, 8, 12)
    blocks = image.reshape(2, 2, 4, 3, 4).permute(0, 1, 3, 2, 4)
    assert torch.equal(make_codec("pixel", 2).encode(image)[0], blocks.permute(3, 4, 0, 1, 2).reshape(1, 32, 2, 3))
    from scipy.fft import dctn
    expected = torch.from_numpy(dctn(blocks.numpy(), axes=(3, 4), norm="ortho")).permute(3, 4, 0, 1, 2).reshape(1, 32, 2, 3)
    torch.testing.assert_close(make_codec("dct", 2).encode(image)[0], expected, rtol=0, atol=1e-14)
    for n in (2, 4): assert torch.equal(unfold(fold(image, n), n), image)


def test_bands_against_pywavelets():
    image = random_image(2, 1, 16, 24)
    low, (lh, hl, hh), fine = pywt.wavedec2(image.numpy(), "db2", "periodization", 2)
    expected = [torch.from_numpy(b) for b in (low, lh, hl, hh)]
    for name, bands in (("ll", (0,)), ("ll_hh", (0, 3)), ("full_band", (0, 1, 2, 3))):
        latent, (_, (copied, rest)) = make_codec(name, wavelet="db2").encode(image)
        torch.testing.assert_close(latent, torch.cat([expected[i] for i in bands], 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(list(copied), [expected[i] for i in range(4) if i not in bands], rtol=0, atol=1e-12)
        torch.testing.assert_close(list(rest[0]), [torch.from_numpy(b) for b in fine], rtol=0, atol=1e-12)
    pyramid = make_codec("pyramid", wavelet="db2").encode(image)[0]
    folded = torch.cat([*expected, *(fold(torch.from_numpy(b), 2) for b in fine)], 1)
    torch.testing.assert_close(pyramid, folded, rtol=0, atol=1e-12)
    resized = torch.nn.functional.avg_pool2d(torch.from_numpy(np.concatenate(fine, 1)), 2)
    torch.testing.assert_close(make_codec("all_bands", wavelet="db2").encode(image)[0], torch.cat([*expected, resized], 1), rtol=0, atol=1e-12)


# Gradients

@pytest.mark.parametrize("wavelet", ("haar", "db2", "bior4.4"))
@pytest.mark.parametrize("name", WITHOUT_VQ)
def test_gradients(name, wavelet):
    if name in ("dct", "pixel") and wavelet != "haar": pytest.skip("has no wavelet")
    for channels, size, level in ((1, (8, 8), 2), (3, (3, 5), 2), (1, (5, 3), 1), (1, (9, 7), 3)):
        codec = build(name, channels, wavelet=wavelet, level=level).double()
        image = random_image(1, channels, *size).requires_grad_()
        latent, kept = codec.encode(image.detach())
        assert torch.autograd.gradcheck(lambda x, codec=codec: codec.encode(x)[0], image)
        assert torch.autograd.gradcheck(lambda z, codec=codec, kept=kept: codec.decode(z, kept), latent.detach().requires_grad_())
        assert torch.autograd.gradcheck(codec, image)  # through what is kept aside too
        if codec.detail_channels:
            details = codec.details(kept).requires_grad_()
            assert torch.autograd.gradcheck(lambda d, c=codec, z=latent, k=kept: c.decode(z, c.with_details(k, d)), details)


def gradient_reaches_every_channel(codec, image):
    "The image's own gradient is never zero or detached: not for one number of the latent, and not per channel."
    latent, kept = codec.encode(image)
    latent = latent.detach().requires_grad_()
    decoded = codec.decode(latent, kept)
    assert decoded.requires_grad and decoded.grad_fn is not None
    weights = random_image(*decoded.shape, seed=5).to(decoded)
    (gradient,) = torch.autograd.grad((decoded * weights).sum(), latent)
    assert gradient.isfinite().all() and (gradient.flatten(2).norm(dim=2) > 1e-3).all()
    return gradient


@pytest.mark.parametrize("name", WITHOUT_VQ)
def test_gradient_of_the_image_is_never_zero(name):
    for channels in (1, 3):
        for wavelet in ("haar", "db2", "bior4.4", "sym4") if name in ON_WAVELETS else ("haar",):
            for level in (1, 2, 3) if name not in LOSSY else (2,):
                codec = build(name, channels, wavelet=wavelet, level=level)
                gradient = gradient_reaches_every_channel(codec, random_image(2, channels, 16, 24).float())
                assert (gradient != 0).float().mean() > 0.99  # each number, not only each channel


def test_gradient_through_the_inverse_is_the_transform():
    "An orthonormal codec's gradient has the energy of the image's: nothing vanishes on the way."
    for name in COMPLETE:
        codec = build(name, wavelet="db2")
        latent, kept = codec.encode(random_image(1, 1, 32, 32))
        decoded = codec.decode(latent.requires_grad_(), kept)
        weights = random_image(1, 1, 32, 32, seed=3)
        (gradient,) = torch.autograd.grad((decoded * weights).sum(), latent)
        torch.testing.assert_close(gradient, codec.encode(weights)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", (1, 3))
def test_vq_f4(channels):
    torch.manual_seed(0)
    codec = make_codec("vq_f4", channels, network=VQModel(**SMALL_VQ))
    assert (codec.channels, codec.factor, codec.lossless, codec.detail_channels) == (3, 4, False, 0)
    image = random_image(2, channels, 21, 30).float().requires_grad_()
    latent, kept = codec.encode(image)
    assert latent.shape == (2, 3, 6, 8) and codec.decode(latent, kept).shape == image.shape
    gradient_reaches_every_channel(codec, image.detach())
    (gradient,) = torch.autograd.grad(codec(image).square().sum(), image)
    assert (gradient.flatten(2).norm(dim=2) > 0).all()
    assert not any(p.requires_grad for p in codec.parameters())  # frozen
    if channels == 1: torch.testing.assert_close(latent, make_codec("vq_f4", 3, network=codec.network).encode(image.expand(-1, 3, -1, -1))[0])


def test_resampler_is_trained_and_frozen():
    codec, images = make_codec("all_bands_learnable"), [random_image(4, 1, 32, 32, seed=i).float().cumsum(-1) / 8 for i in range(60)]
    held_out = random_image(4, 1, 32, 32, seed=1000).float().cumsum(-1) / 8
    before = [p.clone() for p in codec.parameters()]
    error = (codec(held_out) - held_out).square().mean()
    assert isinstance(fit_resampler(codec, images), float)
    assert (codec(held_out) - held_out).square().mean() < 0.95 * error
    assert not any(p.requires_grad for p in codec.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, codec.parameters()))


# Backends

@pytest.mark.parametrize("wavelet", ("haar", "db2", "db4", "sym4", "coif1", "bior1.3", "bior2.2", "bior3.1", "bior4.4", "rbio3.1", "db8"))
def test_backends_agree(wavelet):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
        for name in ON_WAVELETS:
            for level, size in ((1, (33, 40)), (2, (64, 72)), (3, (128, 130)), (2, (64, 70))):
                if level != 2 and name in LOSSY: continue
                native = build(name, 2, wavelet=wavelet, level=level).double()
                image = random_image(1, 2, *size)
                latent, kept = native.encode(image)
                noise = random_image(*latent.shape, seed=1)  # not only where the inverse undoes the transform
                decoded = native.decode(noise, kept)
                for backend, bound in (("pywavelets", 1e-12), ("pytorch-wavelets", 1e-6)):  # the latter has float32 filters
                    bound = bound * max(1, largest(latent))
                    other = build(name, 2, wavelet=wavelet, level=level, backend=backend).double()
                    other.load_state_dict(native.state_dict())
                    with torch.no_grad():
                        theirs, aside = other.encode(image)
                        assert theirs.dtype == latent.dtype and largest(theirs - latent) <= bound, (name, backend, size)
                        for a, b in zip(tensors(aside), tensors(kept), strict=True): assert largest(a - b) <= bound
                        assert largest(other.decode(noise, kept) - decoded) <= bound, (name, backend, size)


def test_pytorch_wavelets_is_wrong_for_short_images():
    "A bug of its own: `roll` and one addition wrap the border once, so a filter longer than the image leaves something out."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
    for wavelet, length in (("db2", 4), ("bior1.3", 6), ("db4", 8), ("coif3", 18)):
        for n in range(2, 2 * length, 2):
            image = random_image(1, 1, n, n).float()
            expected = pywt.dwt2(image.numpy(), wavelet, "periodization")[0]
            theirs = other.DWTForward(J=1, wave=wavelet, mode="periodization")(image)[0].numpy()
            assert (abs(theirs - expected).max() > 1e-4) == (n < length)
            if n >= length: continue
            codec = make_codec("packet", wavelet=wavelet, level=1, backend="pytorch-wavelets")
            with pytest.raises(ValueError, match="wrong for images shorter"): codec.encode(image)
            with pytest.raises(ValueError, match="wrong for images shorter"): codec.decode(torch.zeros(1, 4, n // 2, n // 2), ((n, n), ()))


@pytest.mark.parametrize("name", ON_WAVELETS)
def test_pywavelets_refuses_inside_autograd(name):
    codec, image = build(name, backend="pywavelets"), random_image(1, 1, 16, 16).float()
    if name == "all_bands_learnable": codec.requires_grad_(False)
    latent, kept = codec.encode(image)
    with pytest.raises(RuntimeError, match="would cut the gradient"): codec.encode(image.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="would cut the gradient"): codec.decode(latent.clone().requires_grad_(), kept)
    with torch.no_grad():  # where no gradient is asked for, it computes
        torch.testing.assert_close(codec.encode(image.clone().requires_grad_())[0], latent)


def test_pytorch_wavelets_passes_gradients():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
        for name in ON_WAVELETS:
            gradient_reaches_every_channel(build(name, backend="pytorch-wavelets", wavelet="db2"), random_image(2, 1, 16, 24).float())


# Stateless

@pytest.mark.parametrize("backend", ("native", "pywavelets", "pytorch-wavelets"))
@pytest.mark.parametrize("name", WITHOUT_VQ)
def test_threads_and_batches_in_turn(name, backend):
    if backend != "native" and name in ("dct", "pixel"): pytest.skip("has no backends")
    if backend == "pytorch-wavelets":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("pytorch_wavelets", exc_type=ImportError)
    codec = build(name, wavelet="db2", backend=backend).requires_grad_(False)
    images = [random_image(batch, 1, h, w, seed=i).float() for i, (batch, h, w) in enumerate([(1, 16, 16), (3, 13, 22), (2, 32, 12)])]
    alone = [(codec.encode(i), codec(i)) for i in images]

    def interleaved(order):
        # all are encoded before one is decoded, so what is kept on the module would be that of another
        encoded = {i: codec.encode(images[i]) for i in order}
        return {i: (encoded[i][0], codec.decode(*encoded[i])) for i in reversed(order)}

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(interleaved, [(0, 1, 2), (2, 0, 1)] * 6):
            for i, (latent, image) in result.items():
                assert torch.equal(latent, alone[i][0][0]) and torch.equal(image, alone[i][1])
    # kept of another image of the size is used, not that of the last call
    if codec.detail_channels:
        first, second = random_image(1, 1, 16, 16, seed=8).float(), random_image(1, 1, 16, 16, seed=9).float()
        kept = codec.encode(first)[1]
        latent = codec.encode(second)[0]
        mixed = codec.decode(latent, kept)
        assert largest(mixed - second) > 0.1 and torch.equal(mixed, codec.decode(latent, kept))
        torch.testing.assert_close(codec.details(codec.encode(mixed)[1]), codec.details(kept), rtol=0, atol=1e-5)
        torch.testing.assert_close(codec.encode(mixed)[0], latent, rtol=0, atol=1e-5)


# Details

@pytest.mark.parametrize("name", KEEPING)
def test_detail_codec_is_the_complement(name):
    for level in (1, 2, 3):
        codec = make_codec(name, 3, level=level, wavelet="db2")
        if not codec.detail_channels:
            assert name == "full_band" and level == 1
            with pytest.raises(ValueError, match="no details to restore"): DetailCodec(codec)
            with pytest.raises(ValueError, match="keeps no bands aside"): codec.details(codec.encode(random_image(1, 3, 8, 8))[1])
            continue
        complement = DetailCodec(codec)
        assert complement.channels + codec.channels == 3 * 4**level and complement.factor == codec.factor
        a, b = random_image(2, 3, 29, 18, seed=1), random_image(2, 3, 29, 18, seed=2)
        assert largest(complement(a) - a) <= 1e-12
        latent, kept = codec.encode(a)
        details, (approximation, aside) = complement.encode(b)
        assert torch.equal(details, codec.details(codec.encode(b)[1])) and torch.equal(approximation, codec.encode(b)[0])
        mixed = codec.decode(latent, codec.with_details(kept, details))  # approximation of a, details of b
        torch.testing.assert_close(mixed, complement.decode(details, (latent, kept)))
        padded = torch.nn.functional.pad  # an odd size would be cut: compare on a size that is not
        a, b = (padded(x, (0, 6, 0, 3), mode="replicate") for x in (a, b))
        mixed = codec.decode(codec.encode(a)[0], codec.with_details(codec.encode(a)[1], codec.details(codec.encode(b)[1])))
        torch.testing.assert_close(codec.encode(mixed)[0], codec.encode(a)[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(codec.details(codec.encode(mixed)[1]), codec.details(codec.encode(b)[1]), rtol=0, atol=1e-12)


def test_details_are_coarse_first_and_folded():
    image = random_image(1, 1, 16, 16)
    low, (lh, hl, hh) = dwt2(image)
    coarse = dwt2(low)[1]
    codec = make_codec("ll")
    expected = torch.cat([*coarse, *(fold(b, 2) for b in (lh, hl, hh))], 1)
    torch.testing.assert_close(codec.details(codec.encode(image)[1]), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", (*COMPLETE, *LOSSY))
def test_no_details_where_nothing_is_kept(name):
    codec = make_codec(name)
    _, kept = codec.encode(random_image(1, 1, 8, 8).float())
    assert codec.detail_channels == 0 and not tensors(kept)
    with pytest.raises(ValueError, match="no details to restore"): DetailCodec(codec)
    with pytest.raises(ValueError, match="keeps no bands aside"): codec.details(kept)


# Compilers

class Halves(torch.nn.Module):
    "Encode, change the latent, decode."

    def __init__(self, codec):
        super().__init__()
        self.codec = codec

    def forward(self, image):
        latent, kept = self.codec.encode(image)
        return latent, self.codec.decode(2 * latent, kept)


def all_codecs(wavelet):
    torch.manual_seed(0)
    names = WITHOUT_VQ if wavelet == "haar" else ON_WAVELETS
    codecs = {name: build(name, wavelet=wavelet).requires_grad_(False) for name in names}
    return codecs | ({"vq_f4": make_codec("vq_f4", network=VQModel(**SMALL_VQ))} if wavelet == "haar" else {})


@pytest.mark.parametrize("wavelet, name", [(w, name) for w in ("haar", "db2") for name in all_codecs(w)])
def test_compiles_and_exports(wavelet, name):
    torch._dynamo.reset()
    module = Halves(all_codecs(wavelet)[name]).eval()
    image, larger = random_image(2, 1, 16, 24).float(), random_image(3, 1, 40, 32).float()
    expected, expected_larger = module(image), module(larger)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), expected)
    if name == "vq_f4":  # static: the chunks of its codebook search follow the size
        torch.testing.assert_close(torch.export.export(module, (image,)).module()(image), expected)
        return
    shape = {0: torch.export.Dim("batch", min=1, max=64)}
    shape |= {d: 8 * torch.export.Dim(k, min=1, max=512) for d, k in ((2, "height"), (3, "width"))}
    exported = torch.export.export(module, (image,), dynamic_shapes=(shape,)).module()
    torch.testing.assert_close(exported(image), expected)
    torch.testing.assert_close(exported(larger), expected_larger)


# Precision, scale, mistakes

@pytest.mark.parametrize("name", LOSSLESS)
def test_autocast_does_not_round(name):
    for wavelet in ("haar", "db2") if name in ON_WAVELETS else ("haar",):
        codec, image = build(name, wavelet=wavelet), extremes()
        with torch.autocast("cpu", torch.bfloat16):
            latent, kept = codec.encode(image)
            back = codec.decode(latent, kept)
            assert torch.is_autocast_enabled("cpu")  # as before
        assert latent.dtype == back.dtype == torch.float32 and largest(back - image) <= 1e-6


@pytest.mark.parametrize("name", WITHOUT_VQ)
def test_scale_divides_and_multiplies(name):
    plain = build(name, 3, wavelet="db2").double()
    scale = torch.linspace(0.5, 4, plain.channels)
    options = {"wavelet": "db2"} if name in ON_WAVELETS else {}
    for given_as in (scale, scale.tolist()):
        codec = make_codec(name, 3, scale=given_as, **options).double()
        codec.load_state_dict(plain.state_dict())  # the scale is no part of it
        image = random_image(1, 3, 17, 12)
        latent, kept = codec.encode(image)
        torch.testing.assert_close(latent * scale.double()[:, None, None], plain.encode(image)[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(codec.decode(latent, kept), plain(image), rtol=0, atol=1e-12)
    for wrong in (scale[1:], -scale, 0 * scale, scale[:, None]):
        with pytest.raises(ValueError, match=f"{plain.channels} positive numbers"): make_codec(name, 3, scale=wrong)


@pytest.mark.parametrize("call, words", [
    (lambda: make_codec("packets"), "packet"),
    (lambda: make_codec(None), "codec"),
    (lambda: make_codec("packet", wavlet="db2"), "wavelet"),
    (lambda: make_codec("dct", wavelet="db2"), "option"),
    (lambda: make_codec("packet", wavelet="db0"), "nearest"),
    (lambda: make_codec("packet", wavelet="morl"), "Unknown wavelet"),
    (lambda: make_codec("packet", backend="pywt"), "backend"),
    (lambda: make_codec("ll", level=0), "level must be 1, 2 or 3"),
    (lambda: make_codec("packet", level=4), "level must be 1, 2 or 3"),
    (lambda: make_codec("pixel", level=2.5), "level must be 1, 2 or 3"),
    (lambda: make_codec("all_bands", level=1), "level must be 2"),
    (lambda: make_codec("all_bands", level=3), "level must be 2"),
    (lambda: make_codec("all_bands_learnable", level=1), "level must be 2"),
    (lambda: make_codec("all_bands_learnable", level=3), "level must be 2"),
    (lambda: make_codec("vq_f4"), "needs network="),
    (lambda: make_codec("vq_f4", 2, network=VQModel(**SMALL_VQ)), "1 or 3 image channels"),
])
def test_mistakes_get_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error: call()
    assert "\n" not in str(error.value)


def test_every_codec_is_tested():
    assert set(CODECS) == {*WITHOUT_VQ, "vq_f4"}


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor():
    torch._dynamo.reset()
    module, image = Halves(make_codec("packet")), random_image(2, 1, 16, 24).float()
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(image), module(image), rtol=0, atol=1e-5)
