"The Swin U-Net beside its reference values and beside a plain implementation of the same network."
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difiisr_dwt.images import shared_data
from difiisr_dwt.unet_swin import UNetModelSwin

sys.path.insert(0, str(Path(__file__).parent))
from speed_swin import compare, randomized  # noqa: E402
from straightforward_swin import StraightforwardSwin  # noqa: E402

GOLDEN = shared_data() and shared_data().parent / 'golden'
needs_golden = pytest.mark.skipif(not (GOLDEN and GOLDEN.is_dir()), reason='the reference values are not here')

# other depths, window, heads, three levels, LQ four times as large as the latent
OTHER = dict(image_size=24, in_channels=5, model_channels=32, out_channels=2, cond_lq=True, lq_size=96, attention_resolutions=[24, 12],
             channel_mult=[1, 2, 3], num_res_blocks=[2, 1, 1], num_head_channels=8, use_scale_shift_norm=True, swin_depth=3,
             swin_embed_dim=64, window_size=6, mlp_ratio=2)
SMALL = OTHER | dict(in_channels=4, lq_size=24, swin_depth=2, channel_mult=[1, 2], num_res_blocks=[1, 1])


def example(config: dict, height: int, width: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(height * width)
    ratio = config.get('lq_size', config['image_size']) // config['image_size']
    x = torch.randn(batch, config['out_channels'], height, width, generator=generator)
    lq = torch.randn(batch, config['in_channels'] - config['out_channels'], ratio * height, ratio * width, generator=generator)
    return x, torch.arange(batch) * 7, lq


@needs_golden
def test_reference_values():
    model = UNetModelSwin(**json.loads((GOLDEN / 'unet_swin_small.config.json').read_text())).eval()
    weights = load_file(GOLDEN / 'unet_swin_small.weights.safetensors')
    own = model.state_dict()
    for name in weights:  # what is computed, not learned, is already there
        if name.endswith(('attn_mask', 'relative_position_index')): assert torch.equal(own[name], weights[name])
    model.load_state_dict(weights, strict=True)
    io = load_file(GOLDEN / 'unet_swin_small.io.safetensors')
    with torch.inference_mode():
        assert (model(io['x'], io['t'], io['lq']) - io['out']).abs().max() < 1e-4
    assert (model(io['x'], io['t'], io['lq']) - io['out']).abs().max() < 1e-4, 'with gradients, too'


@needs_golden
def test_full_manifest_is_accepted_strictly():
    config = json.loads((GOLDEN / 'difiisr_full.config.json').read_text())['model']['params']
    manifest = json.loads((GOLDEN / 'unet_swin_full.manifest.json').read_text())
    with torch.device('meta'):
        model = UNetModelSwin(**config)
        model.load_state_dict({name: torch.empty(shape) for name, shape in manifest.items()}, strict=True)
    assert sum(p.numel() for p in model.parameters()) == 118_593_583


@pytest.mark.parametrize('size', [(24, 24), (12, 24), (17, 31), (6, 5), (1, 1), (44, 40)])
def test_equals_the_plain_implementation(size):
    "Another configuration, its own size and sizes that force padding to windows and levels."
    model = randomized(OTHER)
    plain = StraightforwardSwin(model.state_dict(), OTHER)
    x, t, lq = example(OTHER, *size)
    with torch.inference_mode():
        found, expected = model(x, t, lq), plain(x, t, lq)
    assert found.shape == x.shape and expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_shift_and_mask_matter():
    "The comparison above would notice: without shift, or without mask, the result is another."
    model = randomized(SMALL)
    x, t, lq = example(SMALL, 24, 24)
    with torch.inference_mode():
        expected = model(x, t, lq)
        for module in model.modules():
            if hasattr(module, 'attn_mask'): module.attn_mask.zero_()
        unmasked = model(x, t, lq)
        for module in model.modules():
            if hasattr(module, 'attn_mask'): module.shift = 0
        unshifted = model(x, t, lq)
    assert (unmasked - expected).abs().max() > 1e-3 and (unshifted - unmasked).abs().max() > 1e-3


def test_packet_latent_of_any_size():
    config = SMALL | dict(in_channels=32, out_channels=16)
    model = randomized(config)
    for size in [(1, 1), (3, 50), (24, 25)]:
        x, t, lq = example(config, *size, batch=1)
        with torch.inference_mode():
            assert model(x, t, lq).isfinite().all() and model(x, t, lq).shape == x.shape


def test_inference_first_then_training():
    "What inference mode caches must serve a training of the same size, and every parameter is reached."
    model = randomized(OTHER)
    x, t, lq = example(OTHER, 12, 18)
    with torch.inference_mode(): expected = model(x, t, lq)
    out = model.train()(x, t, lq)
    assert torch.allclose(out, expected, atol=1e-4 * float(expected.abs().max()))
    out.square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0]
    assert not silent, silent


def test_gradients_equal_those_of_the_plain_implementation():
    model = randomized(SMALL)
    x, t, lq = example(SMALL, 13, 24)
    model(x, t, lq).square().mean().backward()
    state = {n: v.detach().clone().requires_grad_(v.is_floating_point()) for n, v in model.state_dict().items()}
    plain = StraightforwardSwin.__new__(StraightforwardSwin)
    plain.state, plain.config, plain.heads = state, SMALL, SMALL['swin_embed_dim'] // SMALL['num_head_channels']
    plain(x, t, lq).square().mean().backward()
    rounding = 1e-6 * max(float(p.grad.abs().max()) for p in model.parameters())
    for name, parameter in model.named_parameters():
        expected = state[name].grad
        assert (parameter.grad - expected).abs().max() < 1e-4 * expected.abs().max() + rounding, name


def test_threads_and_sizes():
    model = randomized(SMALL)
    inputs = [example(SMALL, *size, batch=1) for size in [(24, 24), (7, 30), (24, 24), (12, 12)]]
    with torch.inference_mode(): expected = [model(*i) for i in inputs]
    found = {}

    def work(k):
        with torch.inference_mode(): found[k] = model(*inputs[k % 4])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(12)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 12 and all(torch.allclose(found[k], expected[k % 4], atol=1e-5) for k in found)


@pytest.mark.parametrize('options', [dict(resblock_updown=True), dict(conv_resample=False), dict(use_scale_shift_norm=False),
                                     dict(patch_norm=True), dict(num_head_channels=-1, num_heads=4), dict(num_res_blocks=2)])
def test_every_constructor_argument_does_something(options):
    base, model = UNetModelSwin(**SMALL), randomized(SMALL | options)
    shapes = [[(n, tuple(v.shape)) for n, v in m.state_dict().items()] for m in (base, model)]
    assert shapes[0] != shapes[1]
    x, t, lq = example(SMALL, 10, 11)
    with torch.inference_mode(): assert model(x, t, lq).shape == x.shape


@pytest.mark.parametrize('use', ['fp16', 'autocast', 'half'])
def test_half_precision(use):
    model = randomized(SMALL | dict(use_fp16=use == 'fp16'))
    x, t, lq = example(SMALL, 12, 13)
    with torch.inference_mode():
        expected = randomized(SMALL)(x, t, lq)
        if use == 'half': found = model.bfloat16()(x.bfloat16(), t, lq.bfloat16()).float()
        else:
            with torch.autocast('cpu', torch.bfloat16, enabled=use == 'autocast'): found = model(x, t, lq)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_without_lq_and_impossible_requests():
    model = UNetModelSwin(**SMALL | dict(cond_lq=False, in_channels=2)).eval()
    x, t, lq = example(SMALL, 8, 8)
    assert model(x, t).shape == x.shape
    with pytest.raises(ValueError, match='sees no LR'): model(x, t, lq)
    with pytest.raises(ValueError, match='beside the state'): UNetModelSwin(**SMALL)(x, t)
    with pytest.raises(ValueError, match='power of two'): UNetModelSwin(**SMALL | dict(lq_size=36))
    with pytest.raises(ValueError, match='num_res_blocks'): UNetModelSwin(**SMALL | dict(num_res_blocks=[1]))
    with pytest.raises(ValueError, match='dims'): UNetModelSwin(**SMALL | dict(dims=3))


def test_full_size_equals_the_plain_implementation():
    "How much faster it is depends on the processor (1.15 to 1.5 times, one thread): tests/speed_swin.py tells."
    found = compare(threads=1, rounds=1, clock=time.process_time)
    assert found['difference'] < 1e-4 and found['speedup_best'] > 0
