"The down-sampling kernels against the libraries they are named after."

import numpy as np
import pytest
import torch
from PIL import Image

from difiisr_dwt.degradations import KERNELS, crop_to_multiple, downsample, downsample_pixels, resize_matrix, upsample
from difiisr_dwt.images import shared_data


def grey(x) -> np.ndarray:
    return np.rint(255 * np.asarray(x)).astype(np.int64)


def random_image(rng, height, width, kind):
    if kind == "binary":
        return rng.integers(0, 2, (height, width), dtype=np.uint8) * np.uint8(255)
    return rng.integers(0, 256, (height, width), dtype=np.uint8)


def by_pillow(pixels, scale=4):
    height, width = pixels.shape
    return np.asarray(Image.fromarray(pixels).resize((width // scale, height // scale), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["uniform", "binary"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_pillow_bit_for_bit(scale, dtype, kind):
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (2, 1), (1, 2), (3, 5), (9, 9), (16, 32), (25, 13), (50, 99)]:
        pixels = random_image(rng, scale * height, scale * width, kind)
        ours = grey(downsample_pixels((pixels / 255).astype(dtype), "bicubic", scale, levels=255))
        assert np.array_equal(ours, by_pillow(pixels, scale)), (height, width)


def test_bicubic_runs_the_horizontal_pass_first_on_tall_images_too():
    # Pillow 13 changed the order for images more than twice as tall as wide; the published sets predate it
    pixels = random_image(np.random.default_rng(1), 200, 40, "binary")
    horizontal = np.asarray(Image.fromarray(pixels).resize((10, 200), Image.Resampling.BICUBIC))
    expected = np.asarray(Image.fromarray(horizontal).resize((10, 50), Image.Resampling.BICUBIC))
    assert np.array_equal(grey(downsample_pixels(pixels / 255, levels=255)), expected)


@pytest.mark.parametrize("kernel, flag", [("cv2-cubic", "INTER_CUBIC"), ("box", "INTER_AREA")])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_opencv(kernel, flag, scale):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(2)
    for height, width in [(4, 4), (16, 9), (9, 25), (64, 80)]:
        for kind in ("uniform", "binary"):
            pixels = random_image(rng, height * scale, width * scale, kind)
            expected = cv2.resize(pixels, (width, height), interpolation=getattr(cv2, flag))
            difference = np.abs(grey(downsample_pixels(pixels / 255, kernel, scale, levels=255)) - expected)
            assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
    exact = rng.random((16 * scale, 24 * scale)).astype(np.float32)
    expected = cv2.resize(exact, (24, 16), interpolation=getattr(cv2, flag))
    assert np.abs(downsample_pixels(exact, kernel, scale) - expected).max() < 1e-5


def _pairs(hr, lr):
    folder_hr, folder_lr = shared_data(hr), shared_data(lr)
    if folder_hr is None or folder_lr is None:
        pytest.skip(f"no shared data: {hr} is not compared")
    for path in sorted(folder_hr.iterdir()):
        yield tuple(np.asarray(Image.open(p).convert("RGB")) for p in (path, next(folder_lr.glob(path.stem + "*"))))


def _difference(hr, lr, kernel):
    x = torch.tensor(hr / 255).permute(2, 0, 1)[None]
    return np.abs(grey(downsample(x, kernel, levels=255)[0].permute(1, 2, 0)) - lr)


def test_bicubic_equals_the_files_of_m3fd():
    for hr, lr in _pairs("m3fd/HR", "m3fd/LR_bicubic_x4"):
        assert _difference(hr, lr, "bicubic").max() == 0


def test_matlab_equals_the_files_of_imresize():
    for hr, lr in _pairs("matlab_bicubic_x4/HR", "matlab_bicubic_x4/LR_matlab_x4"):
        difference = _difference(hr, lr, "matlab")
        assert difference.max() <= 1 and (difference == 0).mean() >= 0.995


def test_box_is_the_block_mean():
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    mean = x.reshape(2, 3, 4, 4, 6, 4).mean((3, 5))
    assert torch.allclose(downsample(x, "box"), mean, atol=1e-14)
    pixels = grey(torch.rand(32, 32))
    assert np.array_equal(
        grey(downsample_pixels(pixels / 255, "box", levels=255)), np.rint(pixels.reshape(8, 4, 8, 4).mean((1, 3)))
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_operator_has_its_adjoint_and_matrix(kernel):
    x = torch.rand(2, 1, 24, 40, dtype=torch.float64, requires_grad=True)
    low = downsample(x, kernel)
    y = torch.randn_like(low)
    (adjoint,) = torch.autograd.grad(low, x, y)
    assert torch.allclose((low * y).sum(), (x * adjoint).sum(), rtol=1e-12)
    wy, wx = resize_matrix(24, 6, kernel), resize_matrix(40, 10, kernel)
    assert np.allclose(low[0, 0].detach(), wy @ x[0, 0].detach().numpy() @ wx.T, atol=1e-14)
    assert np.allclose(wy.sum(1), 1) and not wy.flags.writeable


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("levels", [255, 65535])
def test_levels_give_a_file(kernel, levels):
    x = torch.rand(2, 3, 32, 48) * 1.4 - 0.2
    low = downsample(x, kernel, levels=levels)
    assert low.shape == (2, 3, 8, 12) and low.dtype == x.dtype
    assert low.min() >= 0 and low.max() <= 1
    assert ((low * levels) - (low * levels).round()).abs().max() < 1e-2
    inside = (torch.rand(2, 3, 32, 48) * 0.5 + 0.25).mul(levels).round() / levels  # no pass overshoots, so none clips
    difference = downsample(inside, kernel, levels=levels) - downsample(inside, kernel)
    assert difference.abs().max() <= 1.6 / levels, "at most one rounding per pass"


def test_linear_is_not_clipped():
    step = torch.zeros(1, 1, 16, 16)
    step[..., 9:] = 1
    assert downsample(step, "cv2-cubic").min() < 0 or downsample(step, "cv2-cubic").max() > 1


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="crop_to_multiple"):
        downsample(torch.rand(1, 1, 15, 16))
    with pytest.raises(ValueError, match="cv2-cubic"):
        downsample(torch.rand(1, 1, 16, 16), "lanczos")
    assert crop_to_multiple(torch.rand(1, 1, 15, 18)).shape == (1, 1, 12, 16)
    assert crop_to_multiple(np.zeros((9, 8))).shape == (8, 8)


@pytest.mark.parametrize("size", [(9, 12), (36, 36), (20, 130)])
def test_upsample_is_pillow_in_float(size):
    low = torch.rand(1, 1, *size)
    expected = Image.fromarray(low[0, 0].numpy()).resize((size[1] * 4, size[0] * 4), Image.Resampling.BICUBIC)
    assert np.abs(upsample(low)[0, 0].numpy() - np.asarray(expected)).max() < 1e-5


def test_upsample_is_linear_differentiable_and_keeps_the_dtype():
    x = torch.rand(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert upsample(x).dtype == torch.float64 and upsample(x).shape == (1, 2, 16, 20)
    assert torch.autograd.gradcheck(upsample, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert upsample(torch.rand(1, 1, 8, 8)).dtype == torch.float32
