"""Down-sampling the result gives the input: the projection, whole counts, chains, tiles, files, and what is refused."""
import numpy as np
import pytest
import torch
from flir_file import Camera, flir_jpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from difiisr_dwt.cli import main
from difiisr_dwt.codecs import make_codec
from difiisr_dwt.consistency import Projection, back_project, consistent_counts, deviation, deviation_from, project
from difiisr_dwt.degradations import KERNELS, crop_to_multiple, downsample, resize_matrix, upsample
from difiisr_dwt.guidance import Guidance
from difiisr_dwt.images import ImageError, ThermalImage, find_images, read_image, shared_data, write_image
from difiisr_dwt.latent_space import LatentSpace
from difiisr_dwt.models import ModelConfig, ModelError, NetworkConfig, RestorationModel, available_models, save_model
from difiisr_dwt.pipeline import SuperResolver, sequence_range
from difiisr_dwt.sampling import sample_ancestral, sample_ddim
from difiisr_dwt.schedule import ResShiftSchedule

kernels = pytest.mark.parametrize('kernel', list(KERNELS))


def random(*shape, seed=0):
    """Uniform in [0, 1], float64."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(n, kernel, scale):
    """R [n, scale n]."""
    return torch.from_numpy(resize_matrix(n * scale, n, kernel).copy())


# Projection


@kernels
@pytest.mark.parametrize('scale', [2, 4])
def test_back_projection_converges(kernel, scale):
    lr = random(2, 1, 9, 12)
    sr = back_project(upsample(lr, scale), lr, kernel, scale, iterations=150)
    torch.testing.assert_close(downsample(sr, kernel, scale), lr, atol=1e-7, rtol=0)
    torch.testing.assert_close(back_project(sr, lr, kernel, scale), sr, atol=1e-6, rtol=0)  # a fixed point
    assert torch.equal(back_project(sr, lr, kernel, scale, iterations=0), sr)


@kernels
@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize('shape', [(1, 1), (5, 1), (9, 12), (127, 3), (131, 300)])
def test_projection_is_the_pseudo_inverse(kernel, scale, shape):
    """Large axes, made of small matrices, against the dense pseudo-inverse."""
    lr, sr = random(1, 2, *shape), random(1, 2, *(scale * n for n in shape), seed=1)
    found = project(sr, lr, kernel, scale)
    r, c = (dense(n, kernel, scale) for n in shape)
    torch.testing.assert_close(found, sr + torch.linalg.pinv(r) @ (lr - r @ sr @ c.T) @ torch.linalg.pinv(c).T, atol=1e-10, rtol=0)
    torch.testing.assert_close(downsample(found, kernel, scale), lr, atol=1e-12, rtol=0)
    torch.testing.assert_close(project(found, lr, kernel, scale), found, atol=1e-12, rtol=0)
    single = project(sr.float(), lr.float(), kernel, scale)
    torch.testing.assert_close(single.double(), found, atol=5e-6, rtol=0)


@kernels
def test_saturated_pixels_are_asked_one_side(kernel):
    lr = random(1, 1, 9, 12).clamp(.2, .8)
    sr = .5 + 2 * (upsample(lr) - .5)
    low = downsample(project(sr, lr, kernel, saturated=(.2, .8)), kernel)
    before, inside = downsample(sr, kernel), (lr > .2) & (lr < .8)
    torch.testing.assert_close(low[inside], lr[inside], atol=1e-12, rtol=0)
    assert (low[lr == .8] > .8 - 1e-12).all() and (low[lr == .2] < .2 + 1e-12).all()
    beyond = (lr == .8) & (before > .8) | (lr == .2) & (before < .2)
    assert beyond.any()
    torch.testing.assert_close(low[beyond], before[beyond], atol=1e-12, rtol=0)


def test_sizes_and_kernels_are_checked():
    for function in (back_project, project):
        with pytest.raises(ValueError, match='16x16'): function(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 4, 5))
        with pytest.raises(ValueError, match='nearest'):
            function(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 4, 4), kernel='nearest')


# Chains


@kernels
@pytest.mark.parametrize('codec', ['ll', 'll_hh', 'full_band', 'all_bands', 'packet', 'pyramid', 'dct', 'pixel'])
@pytest.mark.parametrize('target', ['residual', 'image'])
def test_x0_is_consistent(kernel, codec, target):
    """Exactly, where the latent can carry what A sees: lossless codecs with any kernel, Haar's approximation with box."""
    codec_ = make_codec(codec, scale=torch.linspace(.5, 2, make_codec(codec).channels).tolist())
    space = LatentSpace(codec_, torch.linspace(.1, .3, codec_.channels), target=target, band_kappa=torch.linspace(1, 2, codec_.channels)).double()
    lr = 2 * random(2, 1, 8, 10) - 1
    up = upsample(lr)
    wrong = torch.randn(space.prior(up).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = Projection(lr, kernel)(lambda x, t: x, None, space, up)(wrong, None)
    before, after = ((downsample(space.decode(x, up), kernel) - lr).abs().max() for x in (wrong, x0))
    carried = codec in ('packet', 'pyramid', 'dct', 'pixel') or kernel == 'box'
    assert after < (1e-5 if carried else before), (before, after)
    if kernel == 'box' and codec not in ('dct', 'pixel'):
        assert torch.equal(x0[:, 1:], wrong[:, 1:]), 'one band is overwritten'
        torch.testing.assert_close(space.codec.encode(space.decode(x0, up))[0][:, :1] * codec_.scale[:1], 4 * lr, atol=1e-6, rtol=0)


@kernels
@pytest.mark.parametrize('sampler', [sample_ancestral, sample_ddim])
def test_every_step_is_consistent(kernel, sampler):
    space = LatentSpace(make_codec('packet'), torch.linspace(.1, .3, 16))
    lr = (2 * random(1, 1, 8, 8) - 1).float()
    up, chain, errors = upsample(lr), ResShiftSchedule().respace(4), []
    denoise = Projection(lr, kernel)(lambda x, t: .5 * x, chain, space, up)
    with torch.inference_mode():
        sampler(denoise, space.prior(up), chain, callback=lambda s: errors.append(
            (downsample(space.decode(s['x0'], up), kernel) - lr).abs().max().item()))
    assert len(errors) == 4 and max(errors) < 1e-5


# Whole counts


def scene(height, width, seed, contrast):
    """Discs, bars and noise in [0, 1], more of them beyond its ends the larger the contrast."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = .5 + .1 * np.sin(x / 9) + rng.normal(0, .01, (height, width))
    for _ in range(6):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(1, 14)
        image += rng.uniform(-.5, .5) * (np.hypot(y - cy, x - cx) < r)
        image += rng.uniform(-.3, .3) * (np.abs(x - cx) < r / 8)
    return torch.from_numpy(.5 + contrast * (image - .5)).clamp(0, 1)


def through_file(z, kernel, top):
    """What the library stores of counts on 8 or 16 bits, by the emulation that is bit for bit its own."""
    return (downsample(z[None, None] / top, kernel, levels=int(top))[0, 0] * top).round()


@kernels
@pytest.mark.parametrize('top', [255, 65535])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10 ** 6), contrast=st.sampled_from([.01, .5, 1., 3.]), height=st.integers(1, 24), width=st.integers(1, 24))
def test_counts_are_consistent(kernel, top, seed, contrast, height, width):
    truth = (scene(4 * height, 4 * width, seed, contrast) * top).round()
    lr = through_file(truth, kernel, top)
    start = truth + (upsample(lr[None, None])[0, 0] - truth) / 2
    z = consistent_counts(start, lr, kernel, top)
    assert torch.equal(z, z.round()) and z.min() >= 0 and z.max() <= top
    linear = downsample(z[None, None], kernel)[0, 0]
    error = torch.where(lr == 0, (linear - lr).clamp(min=0), torch.where(lr == top, (linear - lr).clamp(max=0), linear - lr)).abs().max()
    assert torch.equal(through_file(z, kernel, top), lr) and deviation(z, lr, kernel, top).abs().max() <= .5
    torch.testing.assert_close(deviation(z, lr, kernel, top, stored=False).abs().max(), error)
    assert error <= .5
    if kernel == 'box': assert error < 1e-9, 'the mean of a block is the pixel'


@kernels
def test_what_is_saturated_is_filled(kernel):
    """A hot region, clipped in LR, that the result does not quite fill: momentum gets there, though not nearer at every step."""
    y, x = torch.meshgrid(torch.arange(160.), torch.arange(160.), indexing='ij')
    for radius, off, seed in ((240, 1000, 2), (60, 300, 2), (240, 300, 3)):
        hr = (1.3 - ((y - 80) ** 2 + (x - 80) ** 2).sqrt() / radius).clamp(0, 1).double()
        lr = (65535 * downsample(hr[None, None], kernel, 4, 65535)[0, 0]).round()
        waves = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(seed))
        sr = 65535 * hr + off * torch.nn.functional.interpolate(waves, size=(160, 160), mode='bicubic')[0, 0].double()
        counts = consistent_counts(sr, lr, kernel, 65535)
        assert deviation(counts, lr, kernel, 65535).abs().max() <= .5 and (lr == 65535).sum() >= 50


@kernels
def test_nothing_is_moved_without_need(kernel):
    truth = (scene(96, 80, 3, .5) * 255).round()
    z = consistent_counts(truth, through_file(truth, kernel, 255), kernel, 255)
    assert (z - truth).abs().max() <= 2 and (z - truth).square().mean() < .3  # the LR's own rounding, spread over its block


def test_the_impossible_is_told():
    lr = 255. * ((torch.arange(12)[:, None] + torch.arange(16)) % 2).double()
    z = consistent_counts(upsample(lr[None, None])[0, 0], lr, 'bicubic', 255)
    assert deviation(z, lr, 'bicubic', 255).abs().max() > .5 and z.min() >= 0 and z.max() <= 255
    assert deviation(consistent_counts(z, lr, 'box', 255), lr, 'box', 255).abs().max() == 0


# Images


@pytest.fixture(scope='module')
def tiny():
    """A model that changes the picture, for nothing better."""
    torch.manual_seed(0)
    model = RestorationModel(ModelConfig(network=NetworkConfig(channels=(16, 24), blocks=1)), sigma=torch.full((16,), .03))
    for parameter in model.parameters(): parameter.data += .05 * torch.randn_like(parameter)
    return SuperResolver(model.eval(), torch.device('cpu'), {})


@pytest.fixture(scope='module')
def compact():
    """The shipped model."""
    if 'compact' not in available_models(): pytest.skip('no weights are shipped')
    return SuperResolver.from_pretrained('compact', device='cpu')


def small(truth, kernel, top=255):
    return through_file(truth, kernel, top).numpy()


@kernels
@pytest.mark.parametrize('tile', [0, 64, 256])
@pytest.mark.parametrize('mapping', ['uint8', 'counts', 'uint16', '14 bits'])
def test_images_through_files(tiny, tmp_path, kernel, tile, mapping):
    """Tiles, rounding, clipping and formats: what is read from the file down-samples to the input's file."""
    top = {'uint16': 65535, '14 bits': 16383}.get(mapping, 255)
    lr = small((scene(4 * 40, 4 * 100, 5, 2.) * top).round(), kernel, top)
    array = lr.astype(np.uint8) if mapping == 'uint8' else (lr + 7000 * (mapping == 'counts')).astype(np.uint16)
    image = ThermalImage.from_native(array, {'bits': 14} if mapping == '14 bits' else {})
    for name in ('a.png', 'b.tif'):
        write_image(tmp_path / name, tiny.upscale_image(image, steps=2, tile=tile, kernel=kernel, consistent=True))
        result = read_image(tmp_path / name)
        assert result.dtype == image.dtype and deviation_from(image, result, kernel) <= .5
    counts = torch.from_numpy(result.native().astype(np.float64))
    assert counts.max() <= (16383 if mapping == '14 bits' else 65535)
    if mapping in ('uint8', 'uint16'): assert np.array_equal(through_file(counts, kernel, top).numpy(), array)
    plain = tiny.upscale_image(image, steps=2, tile=tile)
    assert deviation_from(image, plain, kernel) > .5


@kernels
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_temperatures_stay(tiny, tmp_path, kernel, dtype):
    """Kelvin in, kelvin out: the mask kept, the rest as far as a float can tell."""
    lr = (290 + small((scene(4 * 40, 4 * 50, 5, 1.) * 255).round(), kernel) / 10).astype(dtype)
    lr[10:13, 20:25], lr[0, 0] = np.nan, np.inf
    image = ThermalImage.from_native(lr, {'unit': 'kelvin', 'format': 'TIFF'})
    write_image(tmp_path / 'a.tif', tiny.upscale_image(image, tile=0, kernel=kernel, consistent=True))
    result = read_image(tmp_path / 'a.tif')
    assert result.dtype == dtype and result.metadata['unit'] == 'kelvin'
    assert np.array_equal(np.isnan(result.native()), np.isnan(lr).repeat(4, 0).repeat(4, 1))
    assert deviation_from(image, result, kernel) <= 4 * np.finfo(np.float32).eps * 320


def test_one_count_of_float16(tiny):
    lr = small((scene(80, 80, 5, 1.) * 255).round(), 'box').astype(np.float16)
    image = ThermalImage.from_native(lr)
    assert deviation_from(image, tiny.upscale_image(image, kernel='box', consistent=True), 'box') <= np.finfo(np.float16).eps * 256


def test_with_guidance(tiny):
    """Guided first, then consistent."""
    lr = small((scene(80, 80, 5, 1.) * 255).round(), 'matlab').astype(np.uint8)
    options = {'steps': 2, 'kernel': 'matlab', 'consistent': True}
    guide = lambda low: Guidance(lambda image: image.square().mean((1, 2, 3)), .5)
    plain, guided = tiny.upscale(lr, **options), tiny.upscale(lr, guide=guide, **options)
    assert not np.array_equal(plain, guided)
    for sr in (plain, guided): assert np.array_equal(small(torch.from_numpy(sr.astype(np.float64)), 'matlab'), lr)


def test_what_is_refused(tiny):
    lr = np.zeros((8, 8), np.uint8)
    for kernel in (None, 'unknown'):
        with pytest.raises(ModelError, match='consistent needs the kernel'): tiny.upscale(lr, kernel=kernel, consistent=True)
    with pytest.raises(ModelError, match="did you mean 'matlab'"): tiny.upscale(lr, kernel='matlap', consistent=True)
    with pytest.raises(ModelError, match='consistent needs'): tiny.check(1, 0, 'ancestral', 0, consistent=True)


# Real frames


SETS = {'m3fd/HR': [0, 7], 'tno': [0, 3, 11], 'hit_uav/val': [0], 'roadscene/val': [0]}


@pytest.mark.parametrize('name', SETS)
@kernels
def test_real_frames(compact, name, kernel):
    """At most half a level or count, and no worse by PSNR than without, for the right kernel. All of them: the stage `consistency`."""
    folder = shared_data(name)
    if not folder: pytest.skip('the data sets are not beside this repository')
    for number in SETS[name]:
        hr = crop_to_multiple(torch.from_numpy(read_image(find_images([folder])[number]).native().astype(np.float64)))[:512, :512]
        lr = small(hr, kernel)
        for array, tile in ((lr.astype(np.uint8), 0), ((lr + 7000).astype(np.uint16), 64)):
            image = ThermalImage.from_native(array)
            plain, sr = (compact.upscale_image(image, tile=tile, kernel=kernel, consistent=c) for c in (False, True))
            assert deviation_from(image, sr, kernel) <= .5
            if tile == 0: assert np.array_equal(small(torch.from_numpy(sr.native().astype(np.float64)), kernel), lr)
            mse = [np.square(np.clip(x.native().astype(float) - (array.dtype == np.uint16) * 7000, 0, 255) - hr.numpy()).mean() for x in (plain, sr)]
            assert 10 * np.log10(mse[1] / mse[0]) <= .02, (number, mse)


# Sequences


def test_sequences_do_not_flicker(compact):
    """A static scene below a hot object that comes and goes: the level of what does not move."""
    base = 40 * scene(4 * 48, 4 * 64, 5, 1.) + 7000
    frames = []
    for k in range(4):
        hr = base.clone()
        hr[8:40, 8 + 30 * k:40 + 30 * k] += 900 * (k > 0)
        frames.append(downsample(hr[None, None])[0, 0].round().numpy().astype(np.uint16))
    images = [ThermalImage.from_native(frame) for frame in frames]
    shared = sequence_range(images)
    assert all(shared[0] <= np.percentile(f, .2) and shared[1] >= np.percentile(f, 99.8) for f in frames)
    flicker = []
    for value_range in (None, shared):
        results = np.stack([compact.upscale_image(i, value_range=value_range, tile=0).native().astype(float)[80:] for i in images])
        flicker.append(np.abs(np.diff(results, axis=0)).mean())
    assert flicker[1] < .5 * flicker[0], flicker
    consistent = compact.upscale_image(images[1], value_range=shared, kernel='bicubic', consistent=True)
    assert deviation_from(images[1], consistent, 'bicubic') <= .5


def test_ranges_of_sequences():
    frames = [np.full((9, 9), v, np.uint16) for v in (100, 7000)]
    assert sequence_range(map(ThermalImage.from_native, frames)) == pytest.approx((100 - 16, 7000 + 16), abs=.01)
    kelvin, celsius = (ThermalImage.from_native(np.ones((4, 4), np.float32), {'unit': u}) for u in ('kelvin', 'celsius'))
    for images in ([kelvin, celsius], [kelvin, ThermalImage.from_native(frames[0])], []):
        with pytest.raises(ImageError, match='sequence'): sequence_range(images)


# The command line


@pytest.fixture(scope='module')
def model_file(tiny, tmp_path_factory):
    """The tiny model's file."""
    path = tmp_path_factory.mktemp('model') / 'model.safetensors'
    save_model(path, tiny.model)
    return str(path)


def command(capsys, *words):
    """Exit code, and what stands on standard output and error."""
    code = main(['upscale', *map(str, words)])
    return code, *capsys.readouterr()


@kernels
def test_command_line(model_file, tmp_path, capsys, kernel):
    for name, dtype in (('a.png', np.uint8), ('b.tif', np.uint16), ('c.tif', np.float32)):
        low = small((scene(80, 120, 5, 1.) * 255).round(), kernel)
        write_image(tmp_path / 'in' / name, ThermalImage.from_native(low.astype(dtype), {'unit': 'celsius'} if dtype == np.float32 else {}))
    code, out, _ = command(capsys, tmp_path / 'in', '--out', tmp_path / 'out', '--model', model_file, '--kernel', kernel, '--consistent')
    assert code == 0 and out.startswith('3 done, 0 failed; made small again, they are the inputs to 0') and 'counts' in out and 'celsius' in out
    for name in ('a.png', 'b.tif', 'c.tif'):
        image, result = (read_image(tmp_path / folder / name) for folder in ('in', 'out'))
        assert deviation_from(image, result, kernel) <= (.5 if name != 'c.tif' else 1e-4)


def test_command_line_tells(model_file, tmp_path, capsys):
    for k, level_ in enumerate((90, 120)):
        write_image(tmp_path / f'in/{k}.png', ThermalImage.from_native(np.full((20, 20), level_, np.uint8)))
    where = (tmp_path / 'in', '--out', tmp_path / 'out', '--model', model_file)
    code, _, err = command(capsys, *where, '--consistent')
    assert code == 2 and 'consistent needs the kernel' in err and not (tmp_path / 'out/0.png').exists()
    code, _, err = command(capsys, *where, '--kernel', 'pilow')
    assert code == 2 and "'pilow'" in err
    checkerboard = (255 * ((np.arange(20)[:, None] + np.arange(20)) % 2)).astype(np.uint8)
    write_image(tmp_path / 'in/1.png', ThermalImage.from_native(checkerboard))
    code, out, err = command(capsys, *where, '--kernel', 'bicubic', '--consistent')
    assert code == 0 and 'more than the half promised' in err and '2 done' in out


def test_sequences_on_the_command_line(model_file, tmp_path, capsys):
    """Two folders, each with a range of its own; frames that differ in type are refused."""
    rng = np.random.default_rng(0)
    frames = {'a/0.png': 100, 'a/1.png': 200, 'b/0.png': 7}
    for name, level_ in frames.items():
        write_image(tmp_path / 'in' / name, ThermalImage.from_native(rng.integers(level_, level_ + 40, (20, 24), dtype=np.uint8)))
    (tmp_path / 'in/a/broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    where = (tmp_path / 'in', '--out', tmp_path / 'out', '--model', model_file, '--sequence')
    code, out, err = command(capsys, *where)
    assert code == 2 and '3 done, 1 failed' in out and 'broken.png' in err
    resolver = SuperResolver.from_pretrained(model_file, device='cpu')
    for folder in 'ab':
        images = {n: read_image(tmp_path / 'in' / n) for n in frames if n[0] == folder}
        for name, image in images.items():
            expected = resolver.upscale_image(image, value_range=sequence_range(images.values())).native()
            assert np.array_equal(read_image(tmp_path / 'out' / name).native(), expected)
    write_image(tmp_path / 'in/b/1.png', ThermalImage.from_native(np.full((9, 9), 7000, np.uint16)))
    code, _, err = command(capsys, *where)
    assert code == 2 and 'differ in type or unit' in err


def test_flir_in_temperatures_out(model_file, tmp_path, capsys):
    pytest.importorskip('flyr')
    camera = Camera()
    kelvin = 290 + 20 * scene(40, 48, 5, 1.).numpy()
    (tmp_path / 'a.jpg').write_bytes(flir_jpeg(camera.counts(kelvin), camera, np.zeros(kelvin.shape, np.uint8)))
    code, out, _ = command(capsys, tmp_path / 'a.jpg', '--out', tmp_path / 'out', '--model', model_file, '--kernel', 'box', '--consistent')
    assert code == 0 and 'celsius' in out
    image, result = read_image(tmp_path / 'a.jpg'), read_image(tmp_path / 'out/a.tif')
    assert result.dtype == np.float32 and result.metadata['unit'] == image.metadata['unit'] == 'celsius'
    assert np.abs(image.native() + 273.15 - kelvin).max() < .1
    blocks = result.native().astype(np.float64).reshape(40, 4, 48, 4).mean((1, 3))
    assert np.abs(blocks - image.native()).max() < 1e-5
