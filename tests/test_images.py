"""Files in and out: bad input, atomicity, and the round trip over shapes, types and formats."""
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from difiisr_dwt.images import (
    IMAGE_SUFFIXES,
    ImageError,
    ThermalImage,
    atomic_path,
    denormalize,
    find_images,
    level,
    normalize,
    read_image,
    robust_range,
    shared_data,
    write_image,
    write_json,
)

RNG = np.random.default_rng(0)


def scene(height=24, width=31, dtype=np.uint8):
    "A smooth warm blob with noise, in the whole range of an integer type."
    y, x = np.mgrid[:height, :width]
    blob = np.exp(-((y - height / 2) ** 2 + (x - width / 2) ** 2) / 60) + 0.02 * RNG.standard_normal((height, width))
    return (np.clip(blob, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def encoded(array, name, **options):
    "A file's bytes as another program would write them."
    buffer = io.BytesIO()
    if name == 'TIFF': tifffile.imwrite(buffer, array, **options)
    else: Image.fromarray(array).save(buffer, format=name, **options)
    return buffer.getvalue()


def rgb(gray): return np.repeat(gray[..., None], 3, -1)


def rgba(gray, alpha=None):
    return np.dstack([rgb(gray), np.full_like(gray, np.iinfo(gray.dtype).max if alpha is None else alpha)])


def png_of_size(width, height):
    "A well-formed PNG that declares a size and holds one byte of pixels."
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


def without_pixels(data):
    "The TIFF with its ImageLength set to 0."
    with tifffile.TiffFile(io.BytesIO(data)) as tiff: tag = tiff.pages[0].tags['ImageLength']
    return data[:tag.valueoffset] + bytes(4) + data[tag.valueoffset + 4:]


GRAY8, GRAY16 = scene(), scene(dtype=np.uint16)
BIG = scene(200, 300, np.uint16)
COLOUR = RNG.integers(0, 256, (24, 31, 3)).astype(np.uint8)
FLOAT = (290 + 10 * RNG.random((24, 31))).astype(np.float32)
FLOAT[3, 4] = np.nan
PALETTE = Image.fromarray(GRAY8).convert('P')
PALETTE.putpalette([v for k in range(256) for v in (k, k, k)])
COLOUR_PALETTE = Image.fromarray(GRAY8).convert('P')
COLOUR_PALETTE.putpalette([v for k in range(256) for v in (k, 255 - k, k // 2)])


def saved(picture, name, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=name, **options)
    return buffer.getvalue()


GOOD = {
    'gray8.png': (encoded(GRAY8, 'PNG'), GRAY8),
    'gray16.png': (encoded(GRAY16, 'PNG'), GRAY16),
    'imagecodecs16.png': (imagecodecs.png_encode(GRAY16), GRAY16),
    'rgb8.png': (encoded(rgb(GRAY8), 'PNG'), GRAY8),
    'rgba8.png': (encoded(rgba(GRAY8), 'PNG'), GRAY8),
    'la8.png': (imagecodecs.png_encode(np.dstack([GRAY8, np.full_like(GRAY8, 255)])), GRAY8),
    'rgb16.png': (imagecodecs.png_encode(rgb(GRAY16)), GRAY16),
    'rgba16.png': (imagecodecs.png_encode(rgba(GRAY16)), GRAY16),
    'palette.png': (saved(PALETTE, 'PNG'), GRAY8),
    'gray8.bmp': (encoded(GRAY8, 'BMP'), GRAY8),
    'rgb8.bmp': (encoded(rgb(GRAY8), 'BMP'), GRAY8),
    'gray8.tif': (encoded(GRAY8, 'TIFF'), GRAY8),
    'gray16.tif': (encoded(GRAY16, 'TIFF'), GRAY16),
    'bigendian16.tif': (encoded(GRAY16, 'TIFF', byteorder='>'), GRAY16),
    'bigendian-lzw16.tif': (encoded(GRAY16, 'TIFF', byteorder='>', compression='lzw', predictor=True), GRAY16),
    'deflate16.tif': (encoded(GRAY16, 'TIFF', compression='zlib'), GRAY16),
    'zstd16.tif': (encoded(GRAY16, 'TIFF', compression='zstd'), GRAY16),
    'packbits8.tif': (encoded(GRAY8, 'TIFF', compression='packbits'), GRAY8),
    'tiled16.tif': (encoded(BIG, 'TIFF', tile=(64, 64)), BIG),
    'tiled-lzw16.tif': (encoded(BIG, 'TIFF', tile=(64, 64), compression='lzw'), BIG),
    'strips16.tif': (encoded(BIG, 'TIFF', rowsperstrip=7), BIG),
    'bigtiff16.tif': (encoded(GRAY16, 'TIFF', bigtiff=True), GRAY16),
    'rgb16.tif': (encoded(rgb(GRAY16), 'TIFF', photometric='rgb'), GRAY16),
    'planar16.tif': (encoded(np.stack([GRAY16] * 3), 'TIFF', photometric='rgb', planarconfig='separate'), GRAY16),
    'rgba8.tif': (encoded(rgba(GRAY8), 'TIFF', photometric='rgb', extrasamples=['unassalpha']), GRAY8),
    'whiteiszero8.tif': (encoded(255 - GRAY8, 'TIFF', photometric='miniswhite'), GRAY8),
    'pillow8.tif': (saved(Image.fromarray(GRAY8), 'TIFF'), GRAY8),
    'pillow16.tif': (saved(Image.fromarray(GRAY16), 'TIFF'), GRAY16),
    'palette.tif': (saved(PALETTE, 'TIFF'), GRAY8),
    'twelvebit.tif': (encoded(GRAY16 >> 4, 'TIFF', bitspersample=12), GRAY16 >> 4),
    'latin1-description.tif': (encoded(GRAY16, 'TIFF', metadata=None, description=b'21 \xb0C'), GRAY16),
    'float32.tif': (encoded(FLOAT, 'TIFF'), FLOAT),
    'float32-deflate.tif': (encoded(FLOAT, 'TIFF', compression='zlib', predictor=True, byteorder='>'), FLOAT),
    'really-a-png.jpg': (encoded(GRAY16, 'PNG'), GRAY16),
}


@pytest.mark.parametrize('name', GOOD)
def test_reads_what_other_programs_write(tmp_path, name):
    data, expected = GOOD[name]
    (tmp_path/name).write_bytes(data)
    image = read_image(tmp_path/name)
    assert image.pixels.dtype == np.float32 and image.pixels.shape == expected.shape
    assert np.nanmin(image.pixels) >= 0 and np.nanmax(image.pixels) <= 1
    assert image.dtype == expected.dtype and image.dtype.isnative
    if expected.dtype.kind == 'f':
        assert image.value_range == (np.nanmin(expected), np.nanmax(expected))
        assert np.allclose(image.native(), expected, rtol=0, atol=1e-5, equal_nan=True)
        assert np.array_equal(np.isnan(image.native()), np.isnan(expected))
    else:
        assert image.value_range == (0, 4095 if name == 'twelvebit.tif' else np.iinfo(expected.dtype).max)
        assert np.array_equal(image.native(), expected)


@pytest.mark.parametrize('options', [{}, {'quality': 50}, {'subsampling': '4:2:0', 'quality': 30},
                                     {'progressive': True}])
def test_gray_jpeg_in_three_channels_is_gray(tmp_path, options):
    gray = scene(64, 48)
    (tmp_path/'three.jpg').write_bytes(encoded(rgb(gray), 'JPEG', **options))
    (tmp_path/'one.jpg').write_bytes(encoded(gray, 'JPEG', **{k: v for k, v in options.items() if k != 'subsampling'}))
    three, one = (read_image(tmp_path/name).native().astype(int) for name in ('three.jpg', 'one.jpg'))
    assert np.abs(three - one).max() <= 1


@pytest.mark.parametrize('suffix,name', [('.jpg', 'JPEG'), ('.png', 'PNG'), ('.bmp', 'BMP'), ('.tif', 'TIFF')])
def test_a_few_levels_of_chroma_are_gray(tmp_path, suffix, name):
    "As video decoders leave them: 8 levels in a JPEG, 4 elsewhere, none in 16 bits."
    allowed = 8 if name == 'JPEG' else 4
    options = {'quality': 100, 'subsampling': 0} if name == 'JPEG' else {'photometric': 'rgb'} if name == 'TIFF' else {}
    path = tmp_path/f'a{suffix}'
    for levels in range(1, 13):
        tinted = rgb(np.full((16, 16), 100, np.uint8))
        tinted[..., 2] += levels
        path.write_bytes(encoded(tinted, name, **options))
        decoded = np.asarray(Image.open(path)).astype(int)
        if np.ptp(decoded, axis=-1).max() <= allowed:
            assert abs(read_image(path).native().astype(int) - 100).max() <= 2
        else:
            with pytest.raises(ImageError, match='three channels differ'): read_image(path)
    if name == 'TIFF':
        path.write_bytes(encoded((tinted > 100).astype(np.uint16) + 100, name, **options)) # one level apart
        with pytest.raises(ImageError, match='three channels differ'): read_image(path)


PNG, JPEG, TIFF = encoded(GRAY16, 'PNG'), encoded(scene(64, 64), 'JPEG'), encoded(GRAY16, 'TIFF')
BAD = {
    'text.png': (b'not an image at all', 'not a PNG'),
    'gif.png': (saved(Image.fromarray(GRAY8), 'GIF'), 'not a PNG'),
    'empty.png': (b'', 'empty'),
    'empty.tif': (b'', 'empty'),
    'magic-only.png': (PNG[:8], 'truncated'),
    'magic-only.jpg': (JPEG[:3], 'truncated'),
    'magic-only.tif': (TIFF[:4], 'truncated'),
    'half.png': (PNG[:len(PNG) // 2], 'truncated'),
    'half.jpg': (JPEG[:len(JPEG) // 2], 'truncated'),
    'half.tif': (TIFF[:len(TIFF) // 2], 'truncated'),
    'half-tiled.tif': (GOOD['tiled-lzw16.tif'][0][:9000], 'truncated'),
    'half.bmp': (GOOD['gray8.bmp'][0][:1500], 'truncated'),
    'no-end.jpg': (JPEG[:-2], 'truncated'),
    'no-end.png': (PNG[:-12], 'truncated'),
    'flipped-bit.png': (PNG[:700] + bytes([PNG[700] ^ 1]) + PNG[701:], 'truncated, damaged'),
    'zero-width.png': (png_of_size(0, 5), r'no pixels \(0×5\)'),
    'zero-height.tif': (without_pixels(TIFF), 'no pixels'),
    'bomb.png': (png_of_size(60000, 60000), 'declares 60000×60000 pixels'),
    'bomb.tif': (TIFF, 'declares'), # under a lower limit, set by the test
    'too-few-pixels.png': (png_of_size(50, 50), 'truncated'),
    'colour.png': (encoded(COLOUR, 'PNG'), 'three channels differ .*single-channel infrared'),
    'colour.jpg': (encoded(COLOUR, 'JPEG'), 'three channels differ'),
    'colour.tif': (encoded(COLOUR, 'TIFF', photometric='rgb'), 'three channels differ'),
    'colour.bmp': (encoded(COLOUR, 'BMP'), 'three channels differ'),
    'colour16.png': (imagecodecs.png_encode(COLOUR.astype(np.uint16)), 'three channels differ'),
    'one-pixel-colour.png': (encoded(np.where(np.arange(24 * 31 * 3).reshape(24, 31, 3) == 0, 1, rgb(GRAY8) * 0 + 9)
                                     .astype(np.uint8), 'PNG'), r'by up to 8 levels'),
    'colour-palette.png': (saved(COLOUR_PALETTE, 'PNG'), 'three channels differ'),
    'transparent.png': (encoded(rgba(GRAY8, 128), 'PNG'), 'transparent'),
    'cmyk.jpg': (saved(Image.fromarray(COLOUR).convert('CMYK'), 'JPEG'), 'CMYK'),
    'bilevel.png': (saved(Image.fromarray(GRAY8).convert('1'), 'PNG'), 'not 8- or 16-bit'),
    'bilevel.tif': (saved(Image.fromarray(GRAY8).convert('1'), 'TIFF'), '1 bits per sample'),
    'signed16.tif': (encoded(GRAY16.astype(np.int16), 'TIFF'), 'int16 are not supported; convert to uint8'),
    'integer32.tif': (encoded(GRAY16.astype(np.uint32), 'TIFF'), 'uint32 are not supported'),
    'complex.tif': (encoded(FLOAT.astype(np.complex64), 'TIFF'), 'complex64 are not supported'),
    'five-bands.tif': (encoded(np.zeros((9, 8, 5), np.uint8), 'TIFF', photometric='minisblack', planarconfig='contig'),
                       '5 channels'),
    'video.tif': (encoded(np.zeros((7, 9, 8), np.uint16), 'TIFF', photometric='minisblack'), 'holds 7 frames'),
    'imagej-video.tif': (encoded(np.zeros((7, 9, 8), np.uint16), 'TIFF', imagej=True), 'holds 7 frames'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_sentence(tmp_path, name, capfd, monkeypatch):
    data, words = BAD[name]
    (tmp_path/name).write_bytes(data)
    if name == 'bomb.tif': monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 700)
    with pytest.raises(ImageError, match=words) as raised: read_image(tmp_path/name)
    sentence = str(raised.value)
    assert str(tmp_path/name) in sentence and '\n' not in sentence and ';' in sentence, sentence
    assert raised.value.__cause__ is None and raised.value.__context__ is None, 'a library error would be printed too'
    assert capfd.readouterr() == ('', ''), 'a library spoke on its own'


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path/'pipe.png')
    (tmp_path/'loop.png').symlink_to(tmp_path/'loop.png')
    for path, words in ((tmp_path, 'is a folder'), (tmp_path/'none.png', 'no such file'),
                        (tmp_path/'pipe.png', 'regular'), (tmp_path/'loop.png', 'cannot read'),
                        (tmp_path/('n' * 300 + '.png'), 'cannot read'), ('a\0b.png', 'cannot read')):
        with pytest.raises(ImageError, match=words): read_image(path)


@pytest.mark.skipif(os.name == 'posix' and os.geteuid() == 0, reason='root reads everything')
def test_unreadable_file(tmp_path):
    (tmp_path/'a.png').write_bytes(PNG)
    (tmp_path/'a.png').chmod(0)
    with pytest.raises(ImageError, match='ermission'): read_image(tmp_path/'a.png')


@pytest.mark.parametrize('name', ['gray8.png', 'gray16.png', 'rgb16.png', 'gray16.tif', 'strips16.tif', 'tiled16.tif',
                                  'bigendian-lzw16.tif', 'tiled-lzw16.tif', 'pillow8.tif', 'pillow16.tif', 'gray8.bmp',
                                  'jpeg', 'progressive'])
def test_every_truncation_is_noticed(tmp_path, name):
    if name == 'jpeg': data = encoded(scene(), 'JPEG')
    elif name == 'progressive': data = encoded(scene(), 'JPEG', progressive=True)
    else: data = GOOD[name][0]
    path = tmp_path/'cut'
    path.write_bytes(data)
    read_image(path)
    for length in range(0, len(data), max(1, len(data) // 150)):
        path.write_bytes(data[:length])
        try: read_image(path)
        except ImageError: continue
        raise AssertionError(f'{length} of {len(data)} bytes were accepted')


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damage_never_shows_a_library_error(tmp_path, name, draw):
    data = bytearray(GOOD[name][0])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, min(len(data), 600) - 1))] = draw.draw(st.integers(0, 255))
    (tmp_path/'damaged').write_bytes(data)
    try: read_image(tmp_path/'damaged')
    except ImageError as error: assert error.__context__ is None


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.integers(1, 70), st.integers(1, 70)),
       st.sampled_from(['uint8', 'uint16', 'float16', 'float32', 'float64']),
       st.sampled_from(IMAGE_SUFFIXES), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_round_trip(tmp_path, shape, dtype, suffix, seed, kind):
    rng = np.random.default_rng(seed)
    unit = (rng.random(shape), np.zeros(shape), np.ones(shape), rng.random(shape) > .5)[kind]
    array = (unit * (np.iinfo(dtype).max if dtype[0] == 'u' else 300)).astype(dtype)
    image, path = ThermalImage.from_native(array), tmp_path/f'image{suffix}'
    if dtype[0] == 'f' and suffix not in ('.tif', '.tiff') or dtype == 'uint16' and suffix in ('.jpg', '.jpeg', '.bmp'):
        with pytest.raises(ImageError, match='use .*TIFF'): write_image(path, image)
        return
    write_image(path, image)
    again = read_image(path)
    assert again.dtype == image.dtype and again.pixels.shape == shape
    if suffix in ('.jpg', '.jpeg'): assert np.abs(again.native().astype(int) - array).mean() < 12
    elif dtype[0] == 'u': assert np.array_equal(again.native(), array)
    else: assert np.allclose(again.native(), array, rtol=1e-3 if dtype == 'float16' else 1e-6, atol=2e-5)
    assert [p for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_every_integer_survives_float_pixels():
    for dtype in (np.uint8, np.uint16):
        values = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)[None]
        assert np.array_equal(ThermalImage.from_native(values).native(), values)


def test_written_files_are_what_other_programs_expect(tmp_path):
    image = ThermalImage.from_native(GRAY16)
    write_image(tmp_path/'a.png', image)
    write_image(tmp_path/'a.TIFF', image)
    assert np.array_equal(imagecodecs.png_decode((tmp_path/'a.png').read_bytes()), GRAY16)
    assert np.array_equal(np.asarray(Image.open(tmp_path/'a.TIFF')), GRAY16)
    write_image(tmp_path/'a.jpg', ThermalImage.from_native(GRAY8))
    assert Image.open(tmp_path/'a.jpg').mode == 'L'


def test_native_rounds_and_clips_integers_and_refuses_nan():
    image = ThermalImage(np.array([[-.2, 1.3, .5, 100.4 / 255]], np.float32), np.dtype('uint8'), (0., 255.), {})
    assert image.native().tolist() == [[0, 255, 128, 100]]
    masked = ThermalImage(np.array([[np.nan]], np.float32), np.dtype('uint8'), (0., 255.))
    with pytest.raises(ImageError, match='NaN'): masked.native()


@pytest.mark.parametrize('array', [np.zeros((2, 3, 3), np.uint8), np.zeros((0, 3), np.uint8), np.zeros(3, np.uint8),
                                   np.zeros((2, 2), bool), np.zeros((2, 2), np.int64)])
def test_from_native_refuses(array):
    with pytest.raises(ImageError): ThermalImage.from_native(array)


def test_float_without_a_range():
    for array in (np.full((3, 3), 300, np.float32), np.full((3, 3), np.nan, np.float32), np.zeros((2, 2), np.float32)):
        image = ThermalImage.from_native(array)
        assert np.array_equal(image.native(), array, equal_nan=True)
        assert image.value_range[1] > image.value_range[0]


def test_jpeg_inside_tiff(tmp_path):
    gray = scene(64, 48)
    for array, options in ((gray, {}), (rgb(gray), {'photometric': 'rgb'})):
        tifffile.imwrite(tmp_path/'a.tif', array, compression='jpeg', compressionargs={'level': 95}, **options)
        assert np.abs(read_image(tmp_path/'a.tif').native().astype(int) - gray).mean() < 3


def test_strange_descriptions_can_be_written_back(tmp_path):
    (tmp_path/'a.tif').write_bytes(GOOD['latin1-description.tif'][0])
    write_image(tmp_path/'b.tif', read_image(tmp_path/'a.tif'))
    assert read_image(tmp_path/'b.tif').metadata['description'] == read_image(tmp_path/'a.tif').metadata['description']


def test_metadata_is_kept_and_written_back(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text('Comment', 'emissivity 0.95, 21 °C')
    Image.fromarray(GRAY8).save(tmp_path/'a.png', pnginfo=text, dpi=(300, 300))
    image = read_image(tmp_path/'a.png')
    assert image.metadata['format'] == 'PNG' and image.metadata['text']['Comment'] == 'emissivity 0.95, 21 °C'
    assert image.metadata['resolution'] == pytest.approx((300, 300), abs=.1)
    write_image(tmp_path/'b.png', image)
    assert read_image(tmp_path/'b.png').metadata['text'] == image.metadata['text']

    tifffile.imwrite(tmp_path/'a.tif', GRAY16, metadata=None, description='21 °C'.encode(), resolution=(100, 100),
                     resolutionunit='INCH')
    image = read_image(tmp_path/'a.tif')
    assert image.metadata == {'format': 'TIFF', 'description': '21 °C', 'resolution': (100, 100)}
    write_image(tmp_path/'b.tif', image)
    assert read_image(tmp_path/'b.tif').metadata['description'] == '21 °C'
    tifffile.imwrite(tmp_path/'shaped.tif', GRAY16) # its description is the shape, wrong beside another one
    assert 'description' not in read_image(tmp_path/'shaped.tif').metadata


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_applied_as_pillow_does(tmp_path, orientation):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(GRAY8).save(tmp_path/'a.png', exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/'a.png')))
    assert np.array_equal(read_image(tmp_path/'a.png').native(), expected)
    tifffile.imwrite(tmp_path/'a.tif', GRAY8, extratags=[(274, 'H', 1, orientation, True)])
    assert np.array_equal(read_image(tmp_path/'a.tif').native(), expected)


# Atomicity

def hidden(folder): return [path.name for path in Path(folder).iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_the_old_file(tmp_path, error):
    (tmp_path/'a.txt').write_text('old')
    with pytest.raises(error):
        with atomic_path(tmp_path/'a.txt') as temporary:
            assert temporary.parent == tmp_path and temporary.name.startswith('.') and temporary.suffix == '.txt'
            temporary.write_text('half')
            raise error
    assert (tmp_path/'a.txt').read_text() == 'old' and hidden(tmp_path) == []


def test_atomic_path_corners(tmp_path):
    with atomic_path(tmp_path/'new'/'folder'/'a.txt') as temporary: temporary.write_text('made')
    assert (tmp_path/'new'/'folder'/'a.txt').read_text() == 'made'
    with atomic_path(tmp_path/'a') as one, atomic_path(tmp_path/'a') as two:
        assert one != two
        one.write_text('1')
        two.write_text('2')
    with pytest.raises(FileNotFoundError):
        with atomic_path(tmp_path/'never'): pass
    (tmp_path/'link').symlink_to(tmp_path/'a')
    with atomic_path(tmp_path/'link') as temporary: temporary.write_text('through')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'a').read_text() == 'through'
    with atomic_path(tmp_path/('ü' * 120 + '.png')) as temporary: temporary.write_text('long name')
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(OSError, match='regular'):
        with atomic_path(tmp_path/'pipe'): pass
    assert hidden(tmp_path) == []


KILLED = '''
import sys, time, numpy as np
from difiisr_dwt import images
from PIL import Image
save = Image.Image.save
def slow_save(self, path, **options):
    save(self, path, **options)
    with open(path, 'r+b') as file: file.truncate(1000) # half-way
    print('writing', flush=True)
    time.sleep(60)
Image.Image.save = slow_save
images.write_image(sys.argv[1], images.ThermalImage.from_native(np.ones((300, 400), np.uint16)))
'''


def test_sigkill_during_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path/'a.png'
    write_image(path, ThermalImage.from_native(GRAY16))
    before = path.read_bytes()
    process = subprocess.Popen([sys.executable, '-c', KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == 'writing\n'
        assert len(hidden(tmp_path)) == 1, 'the process should be in the middle of its temporary file'
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_bytes() == before
    assert find_images(tmp_path) == [path], 'what the killed process left behind must not count as an image'
    write_image(path, ThermalImage.from_native(GRAY8))
    assert np.array_equal(read_image(path).native(), GRAY8)


def test_readers_beside_a_writer_see_whole_files(tmp_path):
    path = tmp_path/'a.tif'
    loop = ('import sys, itertools, numpy as np\nfrom difiisr_dwt.images import ThermalImage, write_image\n'
            'for k in itertools.count():\n'
            '    write_image(sys.argv[1], ThermalImage.from_native(np.full((200, 200), k % 9, np.uint16)))')
    write_image(path, ThermalImage.from_native(np.zeros((200, 200), np.uint16)))
    process = subprocess.Popen([sys.executable, '-c', loop, str(path)])
    try:
        seen, end = set(), time.monotonic() + 20
        while len(seen) < 4 and time.monotonic() < end:
            values = np.unique(read_image(path).native())
            assert len(values) == 1
            seen.add(int(values[0]))
    finally:
        process.kill()
        process.wait()
    assert len(seen) >= 4, 'the writer did not write'


def test_unwritable_output(tmp_path):
    image = ThermalImage.from_native(GRAY8)
    (tmp_path/'file').write_text('not a folder')
    (tmp_path/'folder.png').mkdir()
    for path, words in ((tmp_path/'file'/'a.png', 'file'), (tmp_path/'folder.png', 'regular'),
                        (tmp_path/'a.webp', 'unknown suffix'), (tmp_path/'a', 'unknown suffix'),
                        (tmp_path/('n' * 300 + '.png'), 'too long'), (Path('/proc/none/a.png'), 'cannot write')):
        with pytest.raises(ImageError, match=words) as raised: write_image(path, image)
        assert str(path) in str(raised.value) and '\n' not in str(raised.value)
    with pytest.raises(ImageError, match='JPEG does not hold uint16 pixels; use PNG or TIFF'):
        write_image(tmp_path/'a.jpg', ThermalImage.from_native(GRAY16))
    with pytest.raises(ImageError, match='PNG does not hold float32 pixels; use TIFF'):
        write_image(tmp_path/'a.png', ThermalImage.from_native(FLOAT))
    with pytest.raises(ImageError, match='cannot write'): # JPEG ends at 65500 pixels
        write_image(tmp_path/'a.jpg', ThermalImage.from_native(np.zeros((1, 70000), np.uint8)))
    with pytest.raises(ImageError, match='cannot write'): write_json(tmp_path/'file'/'a.json', {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder.png']


@pytest.mark.skipif(os.name == 'posix' and os.geteuid() == 0, reason='root writes everywhere')
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ImageError, match='ermission'): write_image(tmp_path/'a.png', ThermalImage.from_native(GRAY8))
    tmp_path.chmod(0o700)


# Finding

def test_find_images(tmp_path):
    for name in ('b/2.jpeg', 'b/10.TIF', 'a/z.png', 'c.bmp', 'notes.txt', '.git/x.png', 'a/.tmp.png'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    inside = [tmp_path/name for name in ('a/z.png', 'b/10.TIF', 'b/2.jpeg', 'c.bmp')]
    assert find_images(tmp_path) == find_images(str(tmp_path)) == find_images([tmp_path]) == inside
    given_first = [tmp_path/'c.bmp', tmp_path/'notes.txt']
    assert find_images([*given_first, tmp_path]) == [*given_first, *inside[:3]]
    (tmp_path/'none').mkdir()
    for path in (tmp_path/'none', tmp_path/'missing'):
        with pytest.raises(ImageError, match=f'{path.name}.*;'): find_images([tmp_path, path])
    assert find_images([]) == []


# Value ranges

@pytest.mark.parametrize('lowest,highest', [(0, 255), (60, 160), (100, 104), (128, 128)])
def test_eight_bits_and_sixteen_bit_counts_are_the_same_tensor(lowest, highest):
    "The network sees the same frame; what differs is the float32 rounding of pixels near 7000/65535, 3.7e-9 of them."
    frame = RNG.integers(lowest, highest + 1, (200, 300)).astype(np.uint8)
    seen, backs = [], []
    for native in (frame, frame.astype(np.uint16) + 7000):
        image = ThermalImage.from_native(native)
        value_range = robust_range(image.pixels, min_width=32 * level(image.dtype))
        assert value_range[1] - value_range[0] > 31.99 * level(image.dtype)
        seen.append(normalize(image.pixels, value_range))
        back = denormalize(seen[-1], value_range)
        assert np.array_equal(ThermalImage(back, image.dtype, image.value_range).native(), native)
        backs.append(back)
    assert seen[0].dtype == np.float32
    assert np.abs(seen[0] - seen[1]).max() < (1e-5 if highest - lowest >= 100 else 3e-5)


def test_robust_range_ignores_outliers_and_masks():
    pixels = np.full((100, 100), .5, np.float32)
    pixels[::2] = .7
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = np.nan, np.inf, 1.
    assert robust_range(pixels) == pytest.approx((.5, .7), abs=1e-6)
    assert robust_range(np.full((4, 4), np.nan)) == (0, 1)
    assert robust_range(np.full((4, 4), .25), min_width=.1) == pytest.approx((.2, .3))
    assert robust_range(torch.tensor([[0., 1.]]), 0, 100) == (0, 1)
    assert level('uint8') == 1 / 255 and level(np.uint16) == 1 / 65535


@settings(max_examples=60, deadline=None)
@given(st.floats(-10, 10), st.floats(1e-3, 10), st.integers(0, 2**32 - 1), st.booleans())
def test_normalize_is_inverted_and_clips_nothing(lo, width, seed, tensor):
    x = np.append(np.random.default_rng(seed).uniform(lo - width, lo + 2 * width, 50), lo + 2 * width)
    value_range, values = (lo, lo + width), torch.from_numpy(x) if tensor else x
    y = normalize(values, value_range)
    assert type(y) is type(values) and y.dtype == values.dtype
    assert np.abs(np.asarray(y)).max() > 1, 'something was clipped'
    assert np.allclose(np.asarray(denormalize(y, value_range)), x, rtol=0, atol=1e-13 * (abs(lo) + width) * 10)
    assert normalize(np.array([lo, lo + width]), value_range) == pytest.approx([-1, 1], abs=1e-9)


def test_shared_data(tmp_path, monkeypatch):
    (tmp_path/'data'/'m3fd'/'HR').mkdir(parents=True)
    monkeypatch.setenv('DIFIISR_SHARED', str(tmp_path))
    assert shared_data() == tmp_path/'data' and shared_data('m3fd/HR') == tmp_path/'data'/'m3fd'/'HR'
    assert shared_data('tno') is None
    monkeypatch.setenv('DIFIISR_SHARED', str(tmp_path/'absent'))
    assert shared_data() is None
