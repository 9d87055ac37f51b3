"Published checkpoints: wrapped in every way, wrong in every way, run as published, converted."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from difiisr_dwt.configuration import configure
from difiisr_dwt.images import shared_data
from difiisr_dwt.models import ModelConfig, ModelError, RestorationModel, save_model
from difiisr_dwt.pipeline import SuperResolver, foreign_tensors
from difiisr_dwt.published import (
    CHAINS,
    convert,
    guess_chain,
    is_pickled,
    is_published,
    load_first_stage,
    load_network,
    load_published,
    published_tiles,
    read_checkpoint,
    reflect_pad,
    swin_config,
    vq_config,
)
from difiisr_dwt.unet_swin import UNetModelSwin
from difiisr_dwt.vq import VQModel

GOLDEN = shared_data() and shared_data().parent / 'golden'
needs_golden = pytest.mark.skipif(not (GOLDEN and GOLDEN.is_dir()), reason='the reference values are not here')
SWIN = dict(image_size=32, in_channels=6, out_channels=3, model_channels=32, channel_mult=[1, 2], num_res_blocks=[1, 2], attention_resolutions=[32, 16],
            num_head_channels=16, swin_embed_dim=32, window_size=4, mlp_ratio=4, use_scale_shift_norm=True, swin_depth=2)
VQ = dict(embed_dim=3, n_embed=64, ddconfig=dict(z_channels=3, resolution=256, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 4], num_res_blocks=1))


@pytest.fixture(scope='module')
def states():
    torch.manual_seed(0)
    network = UNetModelSwin(**SWIN)
    with torch.no_grad():
        for p in network.parameters(): p.add_(0.05 * torch.randn_like(p))
    return network.state_dict(), VQModel(**VQ).state_dict()


@pytest.fixture
def files(states, tmp_path):
    paths = tmp_path / 'DifIISR.pth', tmp_path / 'autoencoder_vq_f4.pth'
    for state, path in zip(states, paths): torch.save(state, path)
    return paths


def fails(call, *arguments, **options):
    with pytest.raises(ModelError) as error: call(*arguments, **options)
    text = str(error.value)
    assert '\n' not in text and len(text) < 500
    return text


WRAPS = {
    'plain': lambda s: s,
    'module': lambda s: {f'module.{k}': v for k, v in s.items()},
    'compiled': lambda s: {f'_orig_mod.{k}': v for k, v in s.items()},
    'both, nested': lambda s: {'state_dict': {f'module._orig_mod.{k}': v for k, v in s.items()}, 'epoch': 3, 'lr': 1e-4},
    'nested twice': lambda s: {'model': {'state_dict': {f'_orig_mod.module.{k}': v for k, v in s.items()}}},
    'ema': lambda s: {'params_ema': s, 'iters': torch.tensor(5).item()},
    'half': lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize('wrap', WRAPS)
def test_wrapped_checkpoints(states, wrap, tmp_path):
    for state, load in zip(states, (load_network, load_first_stage)):
        torch.save(WRAPS[wrap](state), tmp_path / 'file.pth')
        loaded = load(tmp_path / 'file.pth').state_dict()
        assert loaded.keys() == state.keys() and all(torch.allclose(loaded[k].float(), state[k].float(), atol=2e-3) for k in state)
        assert all(v.dtype != torch.float16 for v in loaded.values())


def test_safetensors_training_leftovers_and_missing_buffers(states, tmp_path):
    network, stage = states
    save_file({k: v.contiguous() for k, v in stage.items()} | {'loss.discriminator.weight': torch.ones(3)}, tmp_path / 'vq.safetensors')
    assert load_first_stage(tmp_path / 'vq.safetensors')
    torch.save({k: v for k, v in network.items() if not k.endswith(('attn_mask', 'relative_position_index'))}, tmp_path / 'n.pth')
    with torch.inference_mode():
        x = torch.randn(1, 3, 16, 16)
        full = UNetModelSwin(**SWIN | dict(image_size=64, attention_resolutions=[64, 32])).eval()  # 64 where no mask tells
        full.load_state_dict({k: v for k, v in network.items() if 'attn_mask' not in k}, strict=False)
        assert torch.allclose(load_network(tmp_path / 'n.pth')(x, torch.tensor([3]), x), full(x, torch.tensor([3]), x), atol=1e-5)


@needs_golden
def test_full_size_arguments_are_read_off():
    config = json.loads((GOLDEN / 'difiisr_full.config.json').read_text())
    for name, read, wanted in (('unet_swin', swin_config, config['model']['params']), ('vq_f4', vq_config, config['autoencoder']['params'])):
        manifest = json.loads((GOLDEN / f'{name}_full.manifest.json').read_text())
        found = read({k: torch.empty(v, device='meta') for k, v in manifest.items()})
        for key in set(found) & set(wanted) - {'ddconfig'}: assert found[key] == wanted[key], key
        for key in found.get('ddconfig', {}): assert found['ddconfig'][key] == wanted['ddconfig'][key], key


@pytest.mark.parametrize('changes', [
    {}, dict(lq_size=128, in_channels=4), dict(window_size=8, swin_depth=3, num_res_blocks=[2, 1]), dict(use_scale_shift_norm=False, patch_norm=True),
    dict(attention_resolutions=[16], channel_mult=[1, 3], swin_embed_dim=64), dict(cond_lq=False, in_channels=3),
    dict(channel_mult=[1, 2, 2, 2], num_res_blocks=[1, 1, 1, 1], attention_resolutions=[32, 8], window_size=8)])
def test_arguments_of_other_networks(changes):
    wanted = SWIN | dict(cond_lq=True) | changes
    found = swin_config(UNetModelSwin(**wanted).state_dict())
    assert {k: found[k] for k in wanted} == wanted


@pytest.mark.parametrize('name, chain', [('DifIISR.pth', 'difiisr'), ('resshift_realsrx4_s15_v1.pth', 'resshift'), ('resshift_realsrx4_s4_v3.pth', 'resshift4'),
                                         ('SinSR_v1.pth', 'sinsr'), ('resshift_bicx4_s4.safetensors', 'resshift4')])
def test_chain_by_name(name, chain):
    assert guess_chain(name) == chain


@pytest.mark.parametrize('chain, steps', [('difiisr', 15), ('difiisr', 4), ('difiisr', 1), ('resshift4', 4), ('sinsr', 1)])
def test_inference_written_out(files, chain, steps):
    model, _ = load_published(*files, chain=chain)
    lr, draws = torch.rand(1, 1, 16, 8) * 2 - 1, torch.randn(20, 1, 3, 16, 8)
    with torch.inference_mode():
        found = model.restore(lr, steps, noise_sampler=iter(draws).__next__)
        schedule, noises = CHAINS[chain].schedule.respace(steps), iter(draws)
        three = lr.repeat(1, 3, 1, 1)
        y = model.first_stage.encode(F.interpolate(three, scale_factor=4, mode='bicubic'))
        x = y + 2 * 0.99 * next(noises)
        for t in reversed(range(steps)):
            eta, before = float(schedule.etas[t]), float(schedule.etas_prev[t])
            x0 = model.network(x / (4 * eta + 1) ** 0.5, schedule.timesteps[t][None], three)
            x = before / eta * x + (eta - before) / eta * x0
            if t: x = x + 2 * (before / eta * (eta - before)) ** 0.5 * next(noises)
        expected = model.first_stage.decode(x).mean(1, keepdim=True)
    assert found.shape == (1, 1, 64, 32)
    assert (found - expected).abs().mean() < 1e-4  # a pixel on the edge between two codes may change sides


def test_padding_and_tiles():
    image = torch.arange(5.)[None, None, None].expand(1, 1, 3, 5)
    assert reflect_pad(image, 4)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1] and reflect_pad(image, 4).shape == (1, 1, 4, 8)
    assert torch.equal(reflect_pad(image, 16), torch.from_numpy(np.pad(image, ((0, 0), (0, 0), (0, 13), (0, 11)), 'reflect')))
    assert (reflect_pad(torch.ones(1, 1, 1, 1), 64) == 1).all()
    for height, width in [(64, 64), (64, 320), (192, 256)]:
        total = np.zeros((height * 4, width * 4))
        for part in published_tiles(height, width, 128, 16, 4):
            assert part.height == min(height, 128) and part.width == min(width, 128)
            total[part.top * 4:(part.top + part.height) * 4, part.left * 4:(part.left + part.width) * 4] += part.weight
        assert np.allclose(total, 1, atol=1e-6)


def test_super_resolver_and_conversion(files, tmp_path):
    frame = np.random.default_rng(0).integers(0, 255, (11, 18)).astype(np.uint8)
    converted, stage = tmp_path / 'all.safetensors', tmp_path / 'stage.safetensors'
    assert 'denoiser and first stage' in convert(files[0], converted, files[1], chain='resshift4')
    assert 'first stage' in convert(files[1], stage) and 'denoiser' in convert(files[0], tmp_path / 'net.safetensors')
    resolver = SuperResolver.from_pretrained(files[0], device='cpu', first_stage=files[1])
    assert resolver.max_steps == 15 and resolver.scale == 4
    expected = resolver.upscale(frame, steps=2)
    assert expected.shape == (44, 72) and expected.dtype == np.uint8 and expected.std() > 0
    again = SuperResolver.from_pretrained(tmp_path / 'net.safetensors', device='cpu', first_stage=stage)
    assert again.max_steps == 15 and np.abs(again.upscale(frame, steps=2).astype(int) - expected).max() <= 1
    four = SuperResolver.from_pretrained(converted, device='cpu')
    assert four.max_steps == 4 and four.upscale(frame, steps=4).shape == expected.shape
    assert SuperResolver.from_pretrained(converted, device='cpu', chain='sinsr').max_steps == 1
    kelvin = 290 + frame.astype(np.float32) / 10
    kelvin[3, 4] = np.nan
    result = four.upscale(kelvin)
    assert np.isnan(result).sum() == 16
    assert four.upscale(np.zeros((9, 72), np.uint8), tile=64).shape == (36, 288)
    assert four.upscale(np.zeros((1, 1), np.uint8)).shape == (4, 4)


def test_wrong_files_are_told_in_a_sentence(files, states, tmp_path):
    network, stage = states
    bad = tmp_path / 'bad.pth'

    def saved(state):
        torch.save(state, bad)
        return bad

    assert 'no such file' in fails(read_checkpoint, tmp_path / 'none.pth')
    assert 'first_stage=' in fails(load_published, files[0])
    assert 'first_stage=' in fails(SuperResolver.from_pretrained, files[0])
    assert 'give it as first_stage' in fails(load_published, files[1], files[1])
    assert 'denoiser, not a first stage' in fails(load_published, files[0], files[0])
    assert 'time_embed.0.weight' in fails(load_network, saved({'a': torch.ones(1)}))
    assert 'middle_block.2.out_layers.0.bias' in fails(load_network, saved({k: v for k, v in network.items() if k != 'middle_block.2.out_layers.0.bias'}))
    assert '[5] instead of [32]' in fails(load_network, saved(network | {'out.0.weight': torch.ones(5)}))
    assert "unknown: 1, first 'extra'" in fails(load_network, saved(network | {'extra': torch.ones(5)}))
    assert 'decoder.mid.block_1.norm1.bias' in fails(load_first_stage, saved({k: v for k, v in stage.items() if k != 'decoder.mid.block_1.norm1.bias'}))
    assert 'no tensors' in fails(read_checkpoint, saved({'epoch': 3}))
    assert 'no tensors' in fails(read_checkpoint, saved(torch.ones(3)))
    assert 'more than tensors' in fails(read_checkpoint, saved({'state_dict': network, 'arguments': ModelError('code')}))
    for length in (0, 1, 100, files[0].stat().st_size // 2, files[0].stat().st_size - 100):
        bad.write_bytes(files[0].read_bytes()[:length])
        assert str(bad) in fails(read_checkpoint, bad)
    bad.write_bytes(b'<html>not found</html>')
    assert 'readable' in fails(read_checkpoint, bad)
    assert '.safetensors' in fails(convert, files[0], tmp_path / 'x.pth')
    assert "did you mean 'sinsr'" in fails(load_published, *files, chain='sinrs')
    model, _ = load_published(*files, chain='sinsr')
    assert 'steps must be 1 for' in fails(model.check, 2, 'ancestral')
    other = VQModel(**VQ | dict(embed_dim=4)).state_dict()
    assert 'trained together' in fails(load_published, files[0], saved(other))


@pytest.mark.parametrize("length", range(0x4200, 0x4300, 8))
def test_a_model_whose_header_begins_like_a_pickle(tmp_path, length):
    """Safetensors begin with the length of their header, and the lowest byte of 0x4280 is also the first of a pickle."""
    header = {"format": 1, "config": {"network": {"channels": [8], "blocks": 1}}, "info": {"padding": ""}}
    model = RestorationModel(configure(ModelConfig, header["config"]))
    file = tmp_path / "model.safetensors"
    save_model(file, model, {"padding": ""})
    now = int.from_bytes(file.read_bytes()[:8], "little")
    save_model(file, model, {"padding": "x" * (length - now)})
    assert abs(int.from_bytes(file.read_bytes()[:8], "little") - length) < 8
    assert not is_pickled(file) and not is_published(file) and foreign_tensors(file) is None
    SuperResolver.from_pretrained(file)


def test_a_model_of_ours_is_read_once(tmp_path, monkeypatch):
    """Whose file it is, its header tells."""
    file = tmp_path / "model.safetensors"
    save_model(file, RestorationModel(configure(ModelConfig, {"network": {"channels": [8], "blocks": 1}})))
    monkeypatch.setattr("difiisr_dwt.pipeline.read_checkpoint", lambda path: pytest.fail("its tensors were read to see whose it is"))
    assert foreign_tensors(file) is None
    SuperResolver.from_pretrained(file)
