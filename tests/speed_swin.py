"""Ours beside the plain implementation, full size at 64×64, in turn in one run: `python tests/speed_swin.py [threads] [rounds]`.

A matrix product of 2048³ taken in the same turns says what the same multiply-accumulates would take as plain matrix products.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from straightforward_swin import StraightforwardSwin  # noqa: E402

from difiisr_dwt.unet_swin import UNetModelSwin  # noqa: E402

FULL = dict(image_size=64, in_channels=6, model_channels=160, out_channels=3, cond_lq=True, attention_resolutions=[64, 32, 16, 8],
            channel_mult=[1, 2, 2, 4], num_res_blocks=[2, 2, 2, 2], num_head_channels=32, use_scale_shift_norm=True,
            swin_depth=2, swin_embed_dim=192, window_size=8, mlp_ratio=4)
GMAC = 50.8  # of one evaluation, ../shared/golden/README.md


def randomized(config: dict, seed: int = 0) -> UNetModelSwin:
    "A network that does something: without zero-initialized ends, and with biases that are heard."
    torch.manual_seed(seed)
    model = UNetModelSwin(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith('table'):
                parameter.normal_(std=(parameter[0].numel()) ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def interleaved(calls: dict[str, Callable], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    "Seconds of every call, each round taking all in turn, after one round not counted."
    times = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if k: times[name].append(clock() - start)
    return times


def compare(threads: int = 2, rounds: int = 10, config: dict = FULL, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    "Best times in seconds, their ratios, and the largest difference of the outputs relative to the largest output."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = randomized(config)
        plain = StraightforwardSwin(ours.state_dict(), config)
        x, lq, t = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64), torch.tensor([7])
        matrix = torch.randn(2048, 2048)
        with torch.inference_mode():
            expected = plain(x, t, lq)
            difference = float((ours(x, t, lq) - expected).abs().max() / expected.abs().max())
            times = interleaved({'product': lambda: matrix @ matrix, 'plain': lambda: plain(x, t, lq), 'ours': lambda: ours(x, t, lq)}, rounds, clock)
    finally:
        torch.set_num_threads(before)
    best, median = ({k: f(v) for k, v in times.items()} for f in (min, statistics.median))
    products = best['product'] * GMAC / (2048**3 / 1e9)
    return {'plain_s': best['plain'], 'ours_s': best['ours'], 'same_macs_as_products_s': products,
            'speedup_best': best['plain'] / best['ours'], 'speedup_median': median['plain'] / median['ours'],
            'ours_over_products': best['ours'] / products, 'plain_over_products': best['plain'] / products, 'difference': difference}


if __name__ == '__main__':
    for key, value in compare(*map(int, sys.argv[1:])).items():
        print(f'{key:>24} {value:.3g}')
