"""The golden table of metrics: fixed pairs of images, and what independent libraries say of them.

`python tests/golden_metrics.py` measures again with the libraries installed here and writes `golden_metrics.json`.
The images are formulas over integers, so that they are the same on every machine and with every version of numpy.
"""
import json
import math
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FILE = Path(__file__).with_suffix(".json")


def grain(height: int, width: int, seed: int) -> np.ndarray:
    """Noise of a linear congruential generator: a sum of four uniform numbers, mean 0, deviation 1."""
    state, values = seed + 1, []
    for _ in range(4 * height * width):
        state = (1664525 * state + 1013904223) % 2**32
        values.append(state)
    return (np.array(values, dtype=np.float64).reshape(4, height, width) / 2**32 - 0.5).sum(0) * math.sqrt(3)


def scene(height: int, width: int) -> np.ndarray:
    """Warm discs and a bar on a slope, with fine stripes, in grey levels."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = 60 + 40 * x / width + 25 * y / height + 6 * np.cos(1.9 * x + 0.7 * y)
    for row, column, radius, level in ((0.3, 0.25, 0.16, 70), (0.65, 0.7, 0.2, 110), (0.25, 0.8, 0.07, -45)):
        image[(y - row * height) ** 2 + (x - column * width) ** 2 < (radius * height) ** 2] += level
    image[(abs(y - 0.8 * height) < 4) & (x < 0.6 * width)] += 55
    return image


def levels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (result, truth), uint8."""
    truth = levels(scene(96, 128) + 2 * grain(96, 128, 1))
    small = Image.fromarray(truth).resize((32, 24), Image.Resampling.BICUBIC)
    enlarged = np.asarray(small.resize((128, 96), Image.Resampling.BICUBIC))
    odd = levels(scene(75, 101) + 3 * grain(75, 101, 2))
    return {
        "bicubic": (enlarged, truth),
        "bicubic and grain": (levels(enlarged + 3 * grain(96, 128, 3)), truth),
        "grain": (levels(truth + 6 * grain(96, 128, 4)), truth),
        "contrast": (levels(0.8 * truth + 20.0), truth),
        "shifted, odd sides": (np.roll(odd, 1, axis=1), odd),
    }


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32) / 255)[None, None]


@lru_cache
def lpips_of_torchmetrics(net: str):
    """TorchMetrics' network with its own linear layers, on the backbone's weights that are here."""
    from torchmetrics.functional.image.lpips import _LPIPS

    from difiisr_dwt.metrics import lpips_network

    with torch.random.fork_rng(devices=[]):
        network = _LPIPS(pretrained=True, net=net, pnet_rand=True, eval_mode=True)
    network.net.load_state_dict(lpips_network(net).network.net.state_dict())
    return lambda sr, hr: network(sr.expand(-1, 3, -1, -1), hr.expand(-1, 3, -1, -1), normalize=True).item()


def rings_of_scipy(image: np.ndarray, rings: int = 32) -> np.ndarray:
    """Log of the mean power in rings of frequency by scipy's FFT, window and binned means, over the whole plane."""
    from scipy import fft, signal, stats

    height, width = image.shape
    window = np.outer(signal.get_window("hann", height), signal.get_window("hann", width))
    x = image / 255 - np.average(image / 255, weights=window)
    power = np.abs(fft.fft2(x * window)) ** 2 / (window**2).sum()
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.fftfreq(width))
    inside = frequency < 0.5  # scipy would count its last edge to the last bin
    return np.log(stats.binned_statistic(frequency[inside], power[inside], "mean", bins=rings, range=(0, 0.5))[0] + 1e-12)


def measure(nets: tuple[str, ...] = ("alex", "vgg")) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> pair -> library -> value, by every library that can be imported."""
    found: dict[str, dict[str, dict[str, float]]] = {}

    def note(metric: str, pair: str, library: str, value: float) -> None:
        found.setdefault(metric, {}).setdefault(pair, {})[library] = round(float(value), 8)

    for name, (sr, hr) in pairs().items():
        a, b = tensor(sr), tensor(hr)
        note("spectrum", name, "scipy", 10 / np.log(10) * np.sqrt(np.mean((rings_of_scipy(sr) - rings_of_scipy(hr)) ** 2)))
        try:
            from skimage.metrics import peak_signal_noise_ratio, structural_similarity
            note("psnr", name, "scikit-image", peak_signal_noise_ratio(hr, sr, data_range=255))
            note("ssim", name, "scikit-image", structural_similarity(
                sr.astype(float), hr.astype(float), data_range=255, gaussian_weights=True, use_sample_covariance=False))
        except ImportError:
            pass
        try:
            import piq
            note("psnr", name, "piq", piq.psnr(a, b))
            note("ssim", name, "piq", piq.ssim(a.double(), b.double(), downsample=False))
            note("gmsd", name, "piq", piq.gmsd(a.double(), b.double()))
        except ImportError:
            pass
        try:
            from torchmetrics.functional.image import peak_signal_noise_ratio as psnr
            from torchmetrics.functional.image import structural_similarity_index_measure as ssim
            note("psnr", name, "torchmetrics", psnr(a.double(), b.double(), data_range=1.0))
            # its own mean goes over a reflected border too
            whole = ssim(a.double(), b.double(), data_range=1.0, sigma=1.5, return_full_image=True)[1]
            note("ssim", name, "torchmetrics", whole[..., 5:-5, 5:-5].mean())
            with torch.inference_mode():
                for net in nets:
                    note(f"lpips_{net}", name, "torchmetrics", lpips_of_torchmetrics(net)(a, b))
        except ImportError:
            pass
    return found


if __name__ == "__main__":
    libraries = ("scikit-image", "scipy", "piq", "torchmetrics", "torch", "torchvision", "numpy", "pillow")
    table = {
        "made_by": "python tests/golden_metrics.py",
        "versions": {name: version(name) for name in libraries},
        "published": {
            "lpips_alex": {"ex_ref.png, ex_p0.png": 0.722, "ex_ref.png, ex_p1.png": 0.138},
            "note": "README of github.com/richzhang/PerceptualSimilarity; its images are in no package, so no test measures them",
        },
        "not_here": "NIQE: none of these libraries has it; tests/test_no_reference.py compares its parts with scipy",
        "values": measure(),
    }
    FILE.write_text(json.dumps(table, indent=1) + "\n")
