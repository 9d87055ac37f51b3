"""Counts stay counts and temperatures temperatures: bit depth, units, FLIR's radiometric JPEG, palettes refused."""
import io
import struct
import sys
import zlib

import imagecodecs
import matplotlib
import numpy as np
import pytest
import tifffile
import torch
from flir_file import Camera, fff, flir_jpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from difiisr_dwt.batch import RECORDS
from difiisr_dwt.decoding import is_colour_mapped
from difiisr_dwt.images import (
    ImageError,
    ThermalImage,
    common_range,
    denormalize,
    find_images,
    level,
    normalize,
    read_image,
    robust_range,
    shared_data,
    to_display,
    write_image,
)
from difiisr_dwt.radiometry import flir_records

RNG = np.random.default_rng(7)


def kelvin_scene(height=48, width=64):
    "Ground that warms downwards, one warm and one cold body, 50 mK of noise."
    y, x = np.mgrid[:height, :width]
    warm, cold = (1 / (1 + np.exp(np.hypot(y - r, x - c) - 7)) for r, c in ((20, 20), (30, 48)))
    return 283 + y / 10 + 22 * warm - 30 * cold + .05 * RNG.standard_normal((height, width))


def palette(name):
    "256 colours uint8 [256, 3]."
    if name == 'iron':  # black, violet, red, orange, yellow, white, as FLIR's
        stops = [(0, 0, 0), (32, 0, 140), (144, 0, 156), (204, 32, 96), (236, 92, 8), (252, 172, 0), (255, 232, 96), (255, 255, 246)]
    elif name == 'rainbow-hc':  # the high-contrast one of many cameras
        stops = [(0, 0, 0), (100, 0, 100), (0, 0, 255), (0, 180, 255), (0, 200, 0), (255, 255, 0), (255, 60, 0), (255, 120, 180), (255, 255, 255)]
    elif name == 'arctic':
        stops = [(20, 20, 150), (0, 140, 255), (90, 110, 110), (200, 130, 30), (255, 220, 120)]
    elif name == 'lava':
        stops = [(0, 0, 30), (0, 60, 90), (90, 40, 130), (220, 20, 20), (255, 180, 40), (255, 255, 255)]
    else: return (255 * matplotlib.colormaps[name](np.arange(256))[:, :3]).round().astype(np.uint8)
    return np.stack([np.interp(np.linspace(0, len(stops) - 1, 256), np.arange(len(stops)), channel)
                     for channel in zip(*stops, strict=True)], -1).round().astype(np.uint8)


PALETTES = ('iron', 'rainbow-hc', 'arctic', 'lava', 'inferno', 'plasma', 'magma', 'viridis', 'cividis', 'hot', 'afmhot',
            'gist_heat', 'jet', 'turbo', 'rainbow', 'gist_rainbow', 'nipy_spectral', 'gist_ncar', 'hsv', 'cool', 'coolwarm',
            'seismic', 'bwr', 'Spectral', 'RdYlBu', 'YlOrRd', 'YlGnBu', 'copper', 'bone', 'pink', 'gnuplot', 'gnuplot2',
            'CMRmap', 'cubehelix', 'terrain', 'ocean', 'winter', 'autumn', 'summer', 'spring', 'brg', 'twilight')


def jpeg(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, 'JPEG', **options)
    return buffer.getvalue()


# FLIR

CAMERAS = {'black body': Camera(), 'emissivity': Camera(emissivity=.92, reflected=281.5),
           'air': Camera(emissivity=.95, reflected=288, distance=25, air=303, humidity=.8),
           'window': Camera(emissivity=.9, reflected=300, distance=3, window=295, window_transmission=.85),
           'another camera': Camera(.97, 1, 295, r1=14364.633, b=1385.4, f=1.0, o=-5753, r2=.010603162)}


@pytest.fixture
def flyr():
    return pytest.importorskip('flyr', reason="needs pip install 'difiisr_dwt[flir]'")


@pytest.mark.parametrize('png', [False, True], ids=['raw', 'png'])
@pytest.mark.parametrize('name', CAMERAS)
def test_flir_temperatures_are_the_closed_form(tmp_path, flyr, name, png):
    camera, kelvin = CAMERAS[name], kelvin_scene(120, 160)
    counts = camera.counts(kelvin)
    assert 4000 < counts.min() < counts.max() < 40000 and len(np.unique(counts)) > 500
    preview = palette('iron')[np.interp(kelvin, (280, 310), (0, 255)).astype(np.uint8)].repeat(2, 0).repeat(2, 1)
    (tmp_path/'a.jpg').write_bytes(flir_jpeg(counts, camera, preview, png, model='T1020', segment=9000))
    image = read_image(tmp_path/'a.jpg')
    assert image.dtype == np.float32 and image.pixels.shape == (120, 160)
    assert image.metadata['unit'] == 'celsius' and image.metadata['format'] == 'FLIR'
    assert 'FLIR Systems AB T1020; emissivity' in image.metadata['description']
    celsius = image.native()
    assert np.abs(celsius - (camera.kelvin(counts) - 273.15)).max() < 2e-3  # flyr has float32 constants, rounds to 0.01 K
    half_a_count = np.abs(camera.kelvin(counts + 1.) - camera.kelvin(counts)) / 2
    assert (np.abs(celsius - (kelvin - 273.15)) < half_a_count + 2e-3).all(), 'not the temperatures of the scene'


def test_flir_in_exact_constants_is_exact(tmp_path, flyr):
    "Where all constants are float32 numbers and the air is dry, what is left is the rounding of float32 °C."
    exact = {name: float(np.float32(getattr(Camera(), name))) for name in ('r1', 'b', 'r2')}
    for humidity, error in ((0, 3e-6), (.5, 3e-4)):  # flyr has 273.17 where the formula of water vapour has 273.15
        camera = Camera(emissivity=.75, reflected=300.5, air=290.25, window=290.25, alpha=(.0078125, .015625),
                        beta=(-.001953125, -.0078125), x=2, distance=8, humidity=humidity, **exact)
        counts = camera.counts(kelvin_scene())
        (tmp_path/'a.jpg').write_bytes(flir_jpeg(counts, camera, np.zeros((48, 64), np.uint8)))
        assert np.abs(read_image(tmp_path/'a.jpg').native() - (camera.kelvin(counts) - 273.15)).max() < error


def test_flir_becomes_a_float_tiff(tmp_path, flyr):
    counts = Camera().counts(kelvin_scene())
    (tmp_path/'a.jpg').write_bytes(flir_jpeg(counts, Camera(), np.zeros((48, 64), np.uint8)))
    image = read_image(tmp_path/'a.jpg')
    write_image(tmp_path/'a.tif', image)
    again = read_image(tmp_path/'a.tif')
    assert again.dtype == np.float32 and again.metadata == image.metadata | {'format': 'TIFF'}
    assert np.abs(again.native() - image.native()).max() < 4e-6 and again.metadata['unit'] == 'celsius'
    assert 'unit: celsius' in tifffile.TiffFile(tmp_path/'a.tif').pages[0].description, 'other programs should see it'
    assert read_image(tmp_path/'a.jpg', unit='°C').metadata == image.metadata
    with pytest.raises(ImageError, match='read in celsius; leave unit out'): read_image(tmp_path/'a.jpg', unit='K')
    with pytest.raises(ImageError, match='floats; leave bits out'): read_image(tmp_path/'a.jpg', bits=14)


def test_flir_is_turned_as_its_picture(tmp_path, flyr):
    counts = Camera().counts(kelvin_scene())
    for orientation, turned in ((1, counts), (3, counts[::-1, ::-1]), (6, np.rot90(counts, -1))):
        (tmp_path/'a.jpg').write_bytes(flir_jpeg(counts, Camera(), np.zeros((48, 64), np.uint8), orientation=orientation))
        expected = Camera().kelvin(turned) - 273.15
        assert np.abs(read_image(tmp_path/'a.jpg').native() - expected).max() < 1e-3


def test_flir_counts_without_a_temperature_are_masked(tmp_path, flyr):
    counts = Camera().counts(kelvin_scene())
    counts[5:9, 7:9] = 3  # below −O: no radiance
    (tmp_path/'a.jpg').write_bytes(flir_jpeg(counts, Camera(), np.zeros((48, 64), np.uint8)))
    native = read_image(tmp_path/'a.jpg').native()
    assert np.array_equal(np.isnan(native), counts == 3) and np.abs(native[counts > 3] - 10).max() < 40


def test_without_flyr_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'flyr', None)
    (tmp_path/'a.jpg').write_bytes(flir_jpeg(np.full((8, 9), 16000, np.uint16), Camera(), np.zeros((8, 9), np.uint8)))
    with pytest.raises(ImageError, match=r"needs flyr; install it with pip install 'difiisr_dwt\[flir\]'") as raised:
        read_image(tmp_path/'a.jpg')
    assert str(tmp_path/'a.jpg') in str(raised.value) and raised.value.__context__ is None
    (tmp_path/'b.jpg').write_bytes(jpeg(np.full((8, 9), 16, np.uint8)))
    assert read_image(tmp_path/'b.jpg').dtype == np.uint8, 'other JPEGs do not need it'


def test_flir_that_is_not_radiometric_or_broken(tmp_path, flyr):
    counts, gray = Camera().counts(kelvin_scene()), np.full((48, 64), 90, np.uint8)
    path = tmp_path/'a.jpg'
    for kinds in ((32,), (1,), ()):  # no counts, or no constants: an ordinary picture
        path.write_bytes(flir_jpeg(counts, Camera(), gray, kinds=kinds))
        assert read_image(path).dtype == np.uint8
    for broken in (flir_jpeg(counts, Camera(emissivity=0), gray),
                   flir_jpeg(counts, Camera(), gray).replace(struct.pack('<HHH', 2, 64, 48), struct.pack('<HHH', 2, 64, 50)),
                   flir_jpeg(counts, Camera(), gray).replace(struct.pack('<HHH', 2, 64, 48), struct.pack('>HHH', 2, 64, 48)),
                   flir_jpeg(counts, Camera(), gray, png=True).replace(b'IDAT', b'IDOT')):
        path.write_bytes(broken)
        with pytest.raises(ImageError, match='export it as a float TIFF') as raised: read_image(path)
        assert raised.value.__context__ is None
    endless = flir_jpeg(counts, Camera(), gray).replace(struct.pack('>III', 100, 64, 14), struct.pack('>III', 100, 64, 2**31))
    path.write_bytes(endless)  # flyr would read two billion records
    with pytest.raises(ImageError, match='export it as a float TIFF'): read_image(path)
    path.write_bytes(flir_jpeg(counts, Camera(), gray)[:-40])
    with pytest.raises(ImageError, match='truncated'): read_image(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flir_damage_never_shows_a_library_error(tmp_path, flyr, draw):
    data = bytearray(flir_jpeg(np.full((8, 9), 16000, np.uint16), Camera(), np.zeros((8, 9), np.uint8), draw.draw(st.booleans())))
    for _ in range(draw.draw(st.integers(1, 5))):
        data[draw.draw(st.integers(2, min(1500, len(data) - 1)))] = draw.draw(st.integers(0, 255))
    flir_records(bytes(data))
    (tmp_path/'a.jpg').write_bytes(data)
    try: read_image(tmp_path/'a.jpg')
    except ImageError as error: assert error.__context__ is None


def test_records_of_either_byte_order():
    container = fff(np.full((3, 4), 9, np.uint16), Camera())
    little = container[:20] + b''.join(container[k:k + 4][::-1] for k in (20, 24, 28)) + container[32:64]
    for k in range(64, 64 + 32 * 14, 32):
        entry = container[k:k + 32]
        little += entry[:2][::-1] + entry[2:4][::-1] + b''.join(entry[j:j + 4][::-1] for j in range(4, 32, 4))
    little += container[64 + 32 * 14:]
    for data in (container, little):
        picture = b'\xff\xd8\xff\xe1' + struct.pack('>H', len(data) + 10) + b'FLIR\0\1\0\0' + data + b'\xff\xda'
        assert flir_records(picture)[1].keys() >= {1, 32} and flir_records(picture)[1][1] == 64 + 32 * 14


# Bit depth

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png_with(counts, kind, body):
    "A 16-bit PNG with one more chunk after its header."
    data = imagecodecs.png_encode(counts)
    return data[:33] + chunk(kind, body) + data[33:]


COUNTS14 = RNG.integers(6800, 9400, (30, 41)).astype(np.uint16)
FOURTEEN = {
    'packed.tif': lambda path: tifffile.imwrite(path, COUNTS14, bitspersample=14, metadata=None),
    'maximum.tif': lambda path: tifffile.imwrite(
        path, COUNTS14, metadata=None, description='lens 25 mm\nunit: kelvin', resolution=(300, 300), resolutionunit='INCH',
        datetime='2024:05:06 07:08:09', extratags=[(281, 'H', 1, 16383, True), (271, 's', 0, 'Camera makers', True)]),
    'whiteiszero.tif': lambda path: tifffile.imwrite(
        path, 16383 - COUNTS14, metadata=None, photometric='miniswhite', extratags=[(281, 'H', 1, 16383, True)]),
    'sbit.png': lambda path: path.write_bytes(png_with(COUNTS14, b'sBIT', b'\x0e')),
    'maximum.png': lambda path: path.write_bytes(png_with(COUNTS14, b'tEXt', b'MaxSampleValue\x0016383')),
}


@pytest.mark.parametrize('name', FOURTEEN)
def test_fourteen_bits_read_and_written_are_the_identity(tmp_path, name):
    FOURTEEN[name](tmp_path/name)
    image = read_image(tmp_path/name)
    assert np.array_equal(image.native(), COUNTS14) and image.native().dtype == np.uint16
    assert image.value_range == (0, 16383) and image.metadata['bits'] == 14 and level(image) == 1 / 16383
    write_image(tmp_path/f'again-{name}', image)
    again = read_image(tmp_path/f'again-{name}')
    assert np.array_equal(again.native(), COUNTS14) and again.value_range == image.value_range
    assert again.metadata == image.metadata
    for other in ('b.png', 'b.tif'):  # into the other format too, what both know
        write_image(tmp_path/other, image)
        moved = read_image(tmp_path/other)
        assert np.array_equal(moved.native(), COUNTS14) and moved.value_range == (0, 16383)
        assert moved.metadata.get('unit') == image.metadata.get('unit')
    if name == 'maximum.tif':
        assert image.metadata == {'format': 'TIFF', 'unit': 'kelvin', 'description': 'lens 25 mm', 'resolution': (300, 300),
                                  'bits': 14, 'tags': {'Make': 'Camera makers', 'DateTime': '2024:05:06 07:08:09'}}


def test_scaled_significant_bits_are_sixteen_bits_and_handed_on(tmp_path):
    "PNG's specification: 14 significant bits are scaled to the type, here by repeating the first bits or by zeros."
    for counts in (COUNTS14 << 2 | COUNTS14 >> 12, COUNTS14 << 2):
        (tmp_path/'a.png').write_bytes(png_with(counts, b'sBIT', b'\x0e'))
        image = read_image(tmp_path/'a.png')
        assert image.value_range == (0, 65535) and image.metadata['sbit'] == 14 and 'bits' not in image.metadata
        write_image(tmp_path/'b.png', image)
        assert b'sBIT\x0e' in (tmp_path/'b.png').read_bytes()
        again = read_image(tmp_path/'b.png')
        assert np.array_equal(again.native(), counts) and again.metadata == image.metadata
    write_image(tmp_path/'c.png', ThermalImage.from_native(COUNTS14, {'bits': 14}))
    assert b'sBIT' not in (tmp_path/'c.png').read_bytes(), 'netpbm and others would shift unscaled counts'


def test_a_stated_depth_that_is_not_true_is_not_believed(tmp_path):
    counts = COUNTS14 * 3
    tifffile.imwrite(tmp_path/'a.tif', counts, metadata=None, extratags=[(281, 'H', 1, 16383, True)])
    tifffile.imwrite(tmp_path/'b.tif', counts, metadata=None, extratags=[(281, 'H', 1, int(counts.max()), True)])
    (tmp_path/'c.png').write_bytes(png_with(counts, b'tEXt', b'MaxSampleValue\x00many'))
    for name in ('a.tif', 'b.tif', 'c.png'):
        image = read_image(tmp_path/name)
        assert image.value_range == (0, 65535) and np.array_equal(image.native(), counts) and 'bits' not in image.metadata


def test_the_caller_knows_the_depth(tmp_path):
    Image.fromarray(COUNTS14).save(tmp_path/'a.png')
    assert read_image(tmp_path/'a.png').value_range == (0, 65535)
    image = read_image(tmp_path/'a.png', bits=14, unit='K')
    assert image.value_range == (0, 16383) and np.array_equal(image.native(), COUNTS14)
    assert image.metadata == {'format': 'PNG', 'bits': 14, 'unit': 'kelvin'}
    write_image(tmp_path/'b.png', image)
    assert read_image(tmp_path/'b.png').metadata == image.metadata
    assert read_image(tmp_path/'b.png', bits=16).value_range == (0, 65535)
    for bits, words in ((13, 'reach 9[0-9]+, more than 13 bits'), (3, '3 bits of uint16'), (20, '20 bits')):
        with pytest.raises(ImageError, match=words): read_image(tmp_path/'a.png', bits=bits)
    with pytest.raises(ImageError, match="unit 'F' is not known; use kelvin or celsius"): read_image(tmp_path/'a.png', unit='F')


def test_results_stay_within_the_depth():
    image = ThermalImage.from_native(COUNTS14, {'bits': 14})
    beyond = image.with_pixels(np.array([[-.1, 1.2, .5]]))
    assert beyond.native().tolist() == [[0, 16383, 8192]]


# Temperatures in float files

@pytest.mark.parametrize('unit,offset', [('kelvin', 0), ('celsius', -273.15)])
@pytest.mark.parametrize('description', ['unit: {}', '{{"sensor": "A655", "unit": "{}"}}', 'a camera\nUnits = {};\nlens'])
def test_unit_of_a_float_tiff(tmp_path, unit, offset, description):
    values = (kelvin_scene() + offset).astype(np.float32)
    values[3:6, 4:9] = np.nan
    values[0, 0], values[0, 1] = np.inf, -np.inf
    tifffile.imwrite(tmp_path/'a.tif', values, metadata=None, description=description.format(unit))
    image = read_image(tmp_path/'a.tif')
    assert image.metadata['unit'] == unit
    write_image(tmp_path/'b.tif', image)
    again = read_image(tmp_path/'b.tif')
    assert again.metadata == image.metadata
    for one in (image, again):
        finite = np.isfinite(values)
        assert one.value_range == (values[finite].min(), values[finite].max())
        assert np.array_equal(np.isfinite(one.native()), finite)
        assert np.array_equal(one.native()[~finite], values[~finite], equal_nan=True), 'NaN or inf moved or changed'
        if unit == 'kelvin': assert np.array_equal(one.native(), values, equal_nan=True), 'not the identity'
        else: assert np.abs(one.native()[finite] - values[finite]).max() < 4e-6


def test_unit_in_other_places(tmp_path):
    values = kelvin_scene().astype(np.float32)
    tifffile.imwrite(tmp_path/'shaped.tif', values, metadata={'unit': 'K'})
    image = read_image(tmp_path/'shaped.tif')
    assert image.metadata == {'format': 'TIFF', 'unit': 'kelvin'}
    write_image(tmp_path/'b.tif', image)
    assert read_image(tmp_path/'b.tif').metadata == image.metadata
    tifffile.imwrite(tmp_path/'silent.tif', values, metadata=None, description='21 °C outside'.encode())
    assert 'unit' not in read_image(tmp_path/'silent.tif').metadata
    assert read_image(tmp_path/'silent.tif', unit='kelvin').metadata['unit'] == 'kelvin'


def test_common_range_of_a_pair(tmp_path):
    hr = kelvin_scene().astype(np.float32)
    lr = hr.reshape(12, 4, 16, 4).mean((1, 3))
    for name, values in (('hr', hr), ('lr', lr)): write_image(tmp_path/f'{name}.tif', ThermalImage.from_native(values, {'unit': 'kelvin'}))
    one, two = (read_image(tmp_path/f'{name}.tif') for name in ('hr', 'lr'))
    assert one.value_range != two.value_range
    shared = common_range(one, two)
    assert shared[0].value_range == shared[1].value_range == one.value_range
    assert np.array_equal(shared[0].native(), hr) and np.array_equal(shared[1].native(), lr)
    assert np.abs(shared[0].pixels.reshape(12, 4, 16, 4).mean((1, 3)) - shared[1].pixels).max() < 2e-6
    counts = ThermalImage.from_native(COUNTS14)
    assert common_range(counts, counts)[0] is counts
    with pytest.raises(ImageError, match='kelvin and in celsius'):
        common_range(one, ThermalImage.from_native(lr, {'unit': 'celsius'}))


def test_a_level_of_temperatures_is_a_cameras_noise():
    for width in (4., 40.):
        values = np.linspace(290, 290 + width, 50, dtype=np.float32)[None]
        assert level(ThermalImage.from_native(values, {'unit': 'kelvin'})) == pytest.approx(.05 / width)
        assert level(ThermalImage.from_native(values)) == 1 / 255
    wall = (295 + .05 * RNG.standard_normal((64, 64))).astype(np.float32)  # noise, no scene
    image = ThermalImage.from_native(wall, {'unit': 'kelvin'})
    seen = normalize(image.pixels, robust_range(image.pixels, min_width=32 * level(image)))
    assert seen.std() < .1, 'noise was stretched to full contrast'


# The range that the network sees

RANGES = [(0, 1), (.1, .9), (.107, .111), (7000 / 65535, 7255 / 65535), (-.05, .4), (.99, 1.04), (.5, .5 + 32 / 65535)]


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('make', [np.asarray, torch.from_numpy], ids=['numpy', 'torch'])
def test_normalize_is_undone_exactly_on_every_integer_of_every_depth(bits, make):
    "All counts, seen through ranges wide and narrow, within and beyond: the bound of the notebook, and the identity."
    dtype = np.uint8 if bits == 8 else np.uint16
    counts = np.arange(2**bits, dtype=dtype)[None]
    image = ThermalImage.from_native(counts, {'bits': bits} if bits not in (8, 16) else {})
    for value_range in RANGES:
        lo, hi = (float(np.float32(v)) for v in value_range)
        back = np.asarray(denormalize(normalize(make(image.pixels.copy()), (lo, hi)), (lo, hi)))
        p, error = image.pixels.astype(np.float64), np.abs(back.astype(np.float64) - image.pixels)
        assert back.dtype == np.float32
        assert (error <= 2.**-24 * (7 * np.abs(p - lo) + (hi - lo) / 2 + np.abs(p)) + 1e-12).all()
        assert np.array_equal(image.with_pixels(back).native(), counts)


@settings(max_examples=60, deadline=None)
@given(st.floats(200, 400), st.floats(1, 200), st.integers(0, 2**32 - 1))
def test_normalize_is_undone_on_temperatures(low, width, seed):
    "To 8.5·2⁻²⁴ of the frame's range, and half a step of the float32 in which the result is stored."
    values = np.random.default_rng(seed).uniform(low, low + width, (16, 16)).astype(np.float32)
    image = ThermalImage.from_native(values)
    seen = robust_range(image.pixels, min_width=32 * level(image))
    back = image.with_pixels(denormalize(normalize(image.pixels, seen), seen)).native()
    assert (np.abs(back - values.astype(np.float64)) <= 8.5 * 2**-24 * width * 1.05 + np.spacing(values)).all()


def test_display_is_stretched_and_the_data_are_not():
    image = ThermalImage.from_native(COUNTS14, {'bits': 14})
    before = image.pixels.copy()
    shown = to_display(image, 1, 99)
    assert shown.dtype == np.uint8 and shown.shape == COUNTS14.shape and (shown.min(), shown.max()) == (0, 255)
    assert (shown == 0).mean() == pytest.approx(.01, abs=.006)
    assert np.array_equal(image.pixels, before) and np.array_equal(image.native(), COUNTS14)
    assert np.array_equal(np.argsort(shown.ravel(), kind='stable')[-5:] >= 0, [True] * 5)
    fixed = to_display(image, value_range=(0, 16383))
    assert np.abs(fixed.astype(float) - COUNTS14 / 16383 * 255).max() <= .5
    values = np.array([[np.nan, 280., 300., np.inf, -np.inf, 290.]], np.float32)
    assert to_display(ThermalImage.from_native(values), 0, 100).tolist() == [[0, 0, 255, 255, 0, 128]]
    assert np.ptp(to_display(ThermalImage.from_native(np.full((4, 4), 9, np.uint8)))) == 0


# Palettes

def frames(step=1):
    "Gray frames uint8: procedural ones, and real ones where they are."
    yield np.interp(kelvin_scene(192, 256), (280, 310), (0, 255)).astype(np.uint8)
    rough = np.cumsum(np.cumsum(RNG.standard_normal((192, 256)), 0), 1)
    yield np.interp(rough + 9 * RNG.standard_normal(rough.shape), (rough.min(), rough.max()), (0, 255)).astype(np.uint8)
    for name in ('hit_uav/val', 'roadscene/val', 'm3fd/HR', 'tno'):
        if folder := shared_data(name):
            for path in find_images(folder)[::9 * step]: yield read_image(path).native()[:384, :384]


def why_refused(path):
    with pytest.raises(ImageError, match='colour-mapped.*export the single-channel infrared image') as raised: read_image(path)
    return 'it is colour-mapped' in str(raised.value)


@pytest.mark.parametrize('name', PALETTES)
def test_colour_mapped_frames_are_refused(tmp_path, name):
    "Always; and called so for certain where nothing was lost."
    colours = palette(name)
    for number, gray in enumerate(frames(3)):
        rgb = colours[gray]
        Image.fromarray(rgb).save(tmp_path/'a.png')
        assert why_refused(tmp_path/'a.png')
        (tmp_path/'b.jpg').write_bytes(jpeg(rgb, quality=(90, 60)[number % 2]))
        why_refused(tmp_path/'b.jpg')
    indexed = Image.fromarray(gray).convert('P')
    indexed.putpalette(colours.ravel().tolist())
    indexed.save(tmp_path/'indexed.png')
    tifffile.imwrite(tmp_path/'a.tif', rgb, photometric='rgb')
    tifffile.imwrite(tmp_path/'rgba16.tif', np.dstack([rgb.astype(np.uint16) * 257, np.full_like(gray, 65535, np.uint16)]),
                     photometric='rgb', extrasamples=['unassalpha'])
    for file in ('indexed.png', 'a.tif', 'rgba16.tif'): assert why_refused(tmp_path/file)


def test_jpegs_of_palettes_are_mostly_called_so():
    called = {name: is_colour_mapped(np.asarray(Image.open(io.BytesIO(jpeg(palette(name)[gray], quality=90)))))
              for name in PALETTES for gray in list(frames(3))[-1:]}
    assert called['iron'] and called['inferno'] and called['jet'] and called['hot']
    assert np.mean(list(called.values())) >= .8, [name for name, is_called in called.items() if not is_called]


def test_gray_frames_stay_gray_however_they_are_saved(tmp_path):
    "As three channels; as JPEG, twice; with the chroma noise of a video; in the gray palettes."
    for gray in frames():
        for options in ({}, {'quality': 30}, {'quality': 95, 'subsampling': 0}):
            data = jpeg(gray[..., None].repeat(3, -1), **options)
            data = jpeg(np.asarray(Image.open(io.BytesIO(data))), quality=70)
            (tmp_path/'a.jpg').write_bytes(data)
            assert np.abs(read_image(tmp_path/'a.jpg').native().astype(int) - gray).mean() < 10
        noise = RNG.integers(-1, 2, (*gray.shape, 2))  # of Cb and Cr: 128 and one level more or less
        planes = np.dstack([gray, 128 + noise]).astype(np.uint8)
        video = Image.fromarray(planes, 'YCbCr').convert('RGB')
        for file in ('v.png', 'v.jpg'):
            video.save(tmp_path/file)
            assert np.abs(read_image(tmp_path/file).native().astype(int) - gray).mean() < 6, file
        for name in ('gray', 'Greys', 'gist_yarg'):
            Image.fromarray(palette(name)[gray]).save(tmp_path/'a.png')
            expected = palette(name)[:, 0][gray]
            assert np.array_equal(read_image(tmp_path/'a.png').native(), expected)


@pytest.mark.skipif(shared_data() is None, reason='needs the shared images')
def test_no_real_infrared_frame_is_refused():
    read = 0
    for name in ('hit_uav', 'roadscene', 'm3fd', 'tno'):
        for path in find_images(shared_data(name))[::7]:
            assert read_image(path).pixels.ndim == 2
            read += 1
    assert read > 100


@pytest.mark.skipif(shared_data('matlab_bicubic_x4') is None, reason='needs the shared images')
def test_photographs_are_refused_and_seldom_called_colour_mapped(tmp_path):
    "What the sentence calls them is a guess; that they are refused is not."
    called = []
    for path in find_images(shared_data('matlab_bicubic_x4')/'HR'):
        called.append(why_refused(path))
    assert len(called) >= 16 and np.mean(called) <= .15


def test_coloured_marks_on_gray_are_named(tmp_path):
    rgb = np.interp(kelvin_scene(192, 256), (280, 310), (0, 255)).astype(np.uint8)[..., None].repeat(3, -1)
    rgb[90:92, 100:140] = 255, 0, 0
    Image.fromarray(rgb).save(tmp_path/'a.png')
    with pytest.raises(ImageError, match=r'0.16 % of its pixels are coloured, such as a mark or a logo'): read_image(tmp_path/'a.png')


# Upscaling

def upscaled(tmp_path, name):
    "What `difiisr upscale` makes of a file, and where."
    from difiisr_dwt.cli import main

    assert main(['upscale', str(tmp_path/name), '--out', str(tmp_path/'out'), '--device', 'cpu', '--threads', '1']) == 0
    (result,) = (path for path in (tmp_path/'out').iterdir() if path.name != RECORDS)
    return result


def block_means(values): return values.reshape(values.shape[0] // 4, 4, values.shape[1] // 4, 4).mean((1, 3))


def test_upscale_a_flir_jpeg_to_a_float_tiff_in_celsius(tmp_path, flyr):
    kelvin = kelvin_scene()
    counts = Camera().counts(kelvin)
    (tmp_path/'frame.jpg').write_bytes(flir_jpeg(counts, Camera(), palette('iron')[np.zeros((48, 64), int)]))
    result = upscaled(tmp_path, 'frame.jpg')
    image = read_image(result)
    assert result.name == 'frame.tif' and image.dtype == np.float32 and image.pixels.shape == (192, 256)
    assert image.metadata['unit'] == 'celsius' and 'emissivity 1' in image.metadata['description']
    assert np.abs(block_means(image.native()) - (Camera().kelvin(counts) - 273.15)).mean() < .15


@pytest.mark.parametrize('unit,offset', [('kelvin', 0), ('celsius', -273.15)])
def test_upscale_keeps_the_unit_and_the_mask(tmp_path, unit, offset):
    values = (kelvin_scene() + offset).astype(np.float32)
    values[5:9, 10:14], values[0, 0] = np.nan, np.inf
    tifffile.imwrite(tmp_path/'a.tiff', values, metadata=None, description=f'unit: {unit}', resolution=(50, 50), resolutionunit='INCH')
    result = upscaled(tmp_path, 'a.tiff')
    image = read_image(result)
    assert result.name == 'a.tiff' and image.dtype == np.float32
    assert image.metadata == {'format': 'TIFF', 'unit': unit, 'resolution': (200, 200)}
    large = values.repeat(4, 0).repeat(4, 1)
    masked = ~np.isfinite(large)
    assert np.array_equal(~np.isfinite(image.native()), masked) and np.array_equal(image.native()[masked], large[masked], equal_nan=True)
    means = block_means(np.where(masked, 0, image.native()))[10:, 20:]
    assert np.abs(means - values[10:, 20:]).mean() < .15


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_upscale_keeps_fourteen_bits(tmp_path, suffix):
    counts = np.interp(kelvin_scene(), (275, 300), (13000, 16383)).astype(np.uint16)  # up to the last one
    write_image(tmp_path/f'a{suffix}', ThermalImage.from_native(counts, {'bits': 14, 'unit': 'kelvin'}))
    result = upscaled(tmp_path, f'a{suffix}')
    image = read_image(result)
    assert result.suffix == suffix and image.dtype == np.uint16 and image.value_range == (0, 16383)
    assert image.metadata['bits'] == 14 and image.metadata['unit'] == 'kelvin'
    native = image.native()
    assert native.max() == 16383 and np.abs(block_means(native) - counts).mean() < 30
