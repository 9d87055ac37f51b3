"""The Swin U-Net written down plainly: dense attention with a softmax, [B, C, H, W] in memory order, one operation a line.

A function of a state dict, so it shares names with `difiisr_dwt.unet_swin` and nothing else: the oracle of the tests, and
what the speed is measured against.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


class StraightforwardSwin:
    "`StraightforwardSwin(state, config)(x, t, lq)` with the published names and constructor arguments."

    def __init__(self, state: dict[str, Tensor], config: dict):
        self.state = {name: value.contiguous() for name, value in state.items()}
        self.config = config
        self.heads = config['swin_embed_dim'] // config['num_head_channels']

    def __call__(self, x: Tensor, t: Tensor, lq: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        multiple = 2 ** (len(self.config['channel_mult']) - 1)
        pad_down, pad_right = -height % multiple, -width % multiple
        x = F.pad(x, (0, pad_right, 0, pad_down), mode='replicate')
        if lq is not None:
            ratio = self.config.get('lq_size', self.config['image_size']) // self.config['image_size']
            lq = F.pad(lq, (0, ratio * pad_right, 0, ratio * pad_down), mode='replicate')
            for k in range(int(math.log2(ratio))):  # convolution, SiLU, strided convolution
                lq = F.silu(self.conv(f'feature_extractor.{3 * k}', lq))
                lq = self.conv(f'feature_extractor.{3 * k + 2}.op', lq, stride=2)
            x = torch.cat([x, lq], 1)

        half = self.config['model_channels'] // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.linear('time_embed.0', torch.cat([torch.cos(angles), torch.sin(angles)], 1))
        emb = self.linear('time_embed.2', F.silu(emb))

        size = [self.config['image_size']]  # of the level in the images trained on: decides whether windows shift
        h, skips = x, []
        for block in range(self.count('input_blocks')):
            h = self.block(f'input_blocks.{block}', h, emb, size)
            skips.append(h)
        for layer in range(3):
            h = self.layer(f'middle_block.{layer}', h, emb, size)
        for block in range(self.count('output_blocks')):
            h = self.block(f'output_blocks.{block}', torch.cat([h, skips.pop()], 1), emb, size)
        h = F.silu(torch.group_norm(h, 32, self.state['out.0.weight'], self.state['out.0.bias']))
        return self.conv('out.2', h)[..., :height, :width]

    def count(self, prefix: str) -> int:
        return 1 + max(int(name.split('.')[1]) for name in self.state if name.startswith(prefix))

    def block(self, name: str, h: Tensor, emb: Tensor, size: list[int]) -> Tensor:
        layers = sorted({int(key.split('.')[2]) for key in self.state if key.startswith(f'{name}.')})
        for layer in layers:
            h = self.layer(f'{name}.{layer}', h, emb, size)
        return h

    def layer(self, name: str, h: Tensor, emb: Tensor, size: list[int]) -> Tensor:
        if f'{name}.weight' in self.state:
            return self.conv(name, h)
        if f'{name}.op.weight' in self.state:
            size[0] //= 2
            return self.conv(f'{name}.op', h, stride=2)
        if f'{name}.conv.weight' in self.state:
            size[0] *= 2
            return self.conv(f'{name}.conv', F.interpolate(h, scale_factor=2, mode='nearest'))
        if f'{name}.patch_embed.proj.weight' in self.state:
            return self.swin(name, h, size[0])
        return self.resblock(name, h, emb)

    def resblock(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.norm(f'{name}.in_layers.0', x))
        h = self.conv(f'{name}.in_layers.2', h)
        scale, shift = self.linear(f'{name}.emb_layers.1', F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm(f'{name}.out_layers.0', h) * (1 + scale) + shift
        h = self.conv(f'{name}.out_layers.3', F.silu(h))
        if f'{name}.skip_connection.weight' in self.state:
            x = self.conv(f'{name}.skip_connection', x)
        return x + h

    def swin(self, name: str, x: Tensor, size: int) -> Tensor:
        h = self.conv(f'{name}.patch_embed.proj', x)
        for k in range(self.config['swin_depth']):
            shift = self.config['window_size'] // 2 if k % 2 and size > self.config['window_size'] else 0
            block = f'{name}.blocks.{k}'
            h = h + self.attention(f'{block}.attn', self.norm(f'{block}.norm1', h), shift, min(self.config['window_size'], size))
            m = self.conv(f'{block}.mlp.fc1', self.norm(f'{block}.norm2', h))
            h = h + self.conv(f'{block}.mlp.fc2', F.gelu(m))
        return self.conv(f'{name}.patch_unembed.proj', h)

    def attention(self, name: str, x: Tensor, shift: int, window: int) -> Tensor:
        batch, channels, height, width = x.shape
        x = F.pad(x, (0, -width % window, 0, -height % window))
        x = torch.roll(x, (-shift, -shift), (2, 3))
        rows, columns = x.shape[2] // window, x.shape[3] // window
        x = x.reshape(batch, channels, rows, window, columns, window)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, window * window, channels)
        qkv = self.linear(f'{name}.qkv', x).reshape(len(x), window * window, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * (channels // self.heads) ** -0.5) @ k.transpose(-2, -1)
        table, index = self.state[f'{name}.relative_position_bias_table'], self.state[f'{name}.relative_position_index']
        scores = scores + table[index.reshape(-1)].reshape(window**2, window**2, self.heads).permute(2, 0, 1)
        mask = self.mask(height, width, shift, window)[None, :, None]
        scores = (scores.reshape(batch, rows * columns, self.heads, window**2, window**2) + mask).reshape(scores.shape)
        x = (F.softmax(scores, -1) @ v).transpose(1, 2).reshape(len(x), window * window, channels)
        x = self.linear(f'{name}.proj', x)
        x = x.reshape(batch, rows, columns, window, window, channels).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(batch, channels, rows * window, columns * window)
        return torch.roll(x, (shift, shift), (2, 3))[..., :height, :width]

    @staticmethod
    @functools.lru_cache(64)
    def mask(height: int, width: int, shift: int, window: int) -> Tensor:
        """-100 where a pair must not attend, else 0; [windows, N, N].

        Padding is told from pixels by where it lies. The pixels that the roll brought together should be told apart by row
        in the last windows of every column, and by column in the last of every row; the published masks are other: they
        split the last row of windows by column, and nothing else.
        """
        rows, columns = height + -height % window, width + -width % window
        mask = torch.zeros(rows // window, columns // window, window, window, window, window)
        for i, j in torch.cartesian_prod(torch.arange(rows // window), torch.arange(columns // window)).tolist():
            region = torch.zeros(window, window)
            for y in range(window):
                for x in range(window):
                    outside_y = (i * window + y + shift) % rows >= height
                    outside_x = (j * window + x + shift) % columns >= width
                    split = shift > 0 and i == rows // window - 1 and x >= window - shift
                    region[y, x] = 4 * outside_y + 2 * outside_x + split
            mask[i, j] = torch.where(region[:, :, None, None] == region, 0.0, -100.0)
        return mask.reshape(-1, window**2, window**2)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f'{name}.weight']
        return F.conv2d(x, weight, self.state[f'{name}.bias'], stride=stride, padding=weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f'{name}.weight'], self.state[f'{name}.bias'])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return torch.group_norm(x, 32, self.state[f'{name}.weight'], self.state[f'{name}.bias'])
