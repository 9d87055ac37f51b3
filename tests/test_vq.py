"The VQ-f4 first stage beside its reference values, and what quantization must do at any size and precision."
import json

import pytest
import torch
from safetensors.torch import load_file

from difiisr_dwt.images import shared_data
from difiisr_dwt.vq import VectorQuantizer, VQModel

GOLDEN = shared_data() and shared_data().parent / 'golden'
needs_golden = pytest.mark.skipif(not (GOLDEN and GOLDEN.is_dir()), reason='the reference values are not here')
DDCONFIG = dict(double_z=False, z_channels=3, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 4], num_res_blocks=1,
                attn_resolutions=[], dropout=0.0, padding_mode='zeros')


@needs_golden
def test_reference_values():
    model = VQModel(**json.loads((GOLDEN / 'vq_f4_small.config.json').read_text())).eval()
    model.load_state_dict(load_file(GOLDEN / 'vq_f4_small.weights.safetensors'), strict=True)
    io = load_file(GOLDEN / 'vq_f4_small.io.safetensors')
    with torch.inference_mode():
        assert (model.encode(io['image']) - io['latent']).abs().max() < 1e-4
        assert (model.decode(io['latent']) - io['decoded']).abs().max() < 1e-4
        assert (model.decode(io['latent'], quantize=False) - io['decoded_not_quantized']).abs().max() < 1e-4


@needs_golden
def test_full_manifest_is_accepted_strictly():
    config = json.loads((GOLDEN / 'difiisr_full.config.json').read_text())['autoencoder']['params']
    manifest = json.loads((GOLDEN / 'vq_f4_full.manifest.json').read_text())
    with torch.device('meta'):
        model = VQModel(**config)
        model.load_state_dict({name: torch.empty(shape) for name, shape in manifest.items()}, strict=True)
    assert sum(p.numel() for p in model.parameters()) == 55_322_782


@pytest.mark.parametrize('codes, width, shape', [(1, 3, (1, 1, 1)), (64, 3, (2, 5, 7)), (5000, 4, (1, 40, 33)), (8192, 3, (3, 33, 17))])
def test_nearest_code(codes, width, shape):
    "Chunks of any size find what the whole table of distances finds."
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes, width)
    torch.nn.init.normal_(quantizer.embedding.weight)
    latent = torch.randn(shape[0], width, *shape[1:])
    indices = quantizer.indices(latent)
    distances = torch.cdist(latent.movedim(1, -1).flatten(0, 2).double(), quantizer.embedding.weight.double())
    assert indices.shape == shape
    assert (distances.gather(1, indices.view(-1, 1))[:, 0] - distances.amin(1)).abs().max() < 1e-6
    assert torch.equal(quantizer(latent), quantizer.embedding.weight[indices].movedim(-1, 1))


def test_no_table_of_all_distances(monkeypatch):
    "At no time is there a tensor near pixels × codes."
    largest = 0
    addmm = torch.addmm

    def watched(*args, **options):
        nonlocal largest
        result = addmm(*args, **options)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, 'addmm', watched)
    VectorQuantizer(8192, 3).indices(torch.randn(1, 3, 64, 64))
    assert 0 < largest <= 2**22


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_chooses_the_same_codes(dtype):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8192, 3)
    latent = quantizer.embedding.weight[torch.randint(8192, (1, 9, 9))].movedim(-1, 1).detach()  # codes themselves
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(quantizer(latent), latent)


def test_gradient_passes_straight_through():
    torch.manual_seed(0)
    model = VQModel(3, 64, DDCONFIG)
    latent = torch.randn(1, 3, 8, 8, requires_grad=True)
    out = model.quantize(latent)
    out.backward(weight := torch.randn_like(out))
    assert torch.equal(latent.grad, weight)
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(image).square().mean().backward()
    assert image.grad.abs().max() > 0
    silent = [n for n, p in model.named_parameters() if n != 'quantize.embedding.weight' and not (p.grad is not None and p.grad.abs().sum() > 0)]
    # keys only shift all scores of a row alike by their bias: its gradient is rounding
    assert not [n for n in silent if not n.endswith('attn_1.k.bias')], silent


def test_attention_resolutions_and_sizes():
    model = VQModel(3, 16, DDCONFIG | {'attn_resolutions': [16]})
    names = set(model.state_dict())
    assert 'encoder.down.1.attn.0.q.weight' in names and 'decoder.up.1.attn.1.q.weight' in names
    assert not any(n.startswith(('encoder.down.0.attn', 'encoder.down.2.attn', 'decoder.up.0.attn')) for n in names)
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 12, 20)).shape == (1, 3, 12, 20)
        with pytest.raises(ValueError, match='multiples of 4'):
            model.encode(torch.randn(1, 3, 13, 20))
    with pytest.raises(TypeError, match='chanels'):
        VQModel(3, 16, DDCONFIG | {'chanels': 3})
