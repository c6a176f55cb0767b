"""The parts of the PyTorch yardstick below a flow block: options, norms, caches, rope, layers.

See torch_flow.py, which explains what these are for. Shapes: rows [B, T, C], heads [B, H, T, d].
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

DEFAULTS = dict(
    patch_size=4, head_dim=64, num_heads=None, num_kv_heads=None, rope=0, pt_seq_len=None, sos=0,
    txt_size=0, txt_dim=0, cond_top_only=0, use_softplus=0, use_swiglu=0, use_bias=1,
    use_qk_norm=0, use_post_norm=0, use_final_norm=0, hf_style_rope=0, norm_type="layer_norm",
    soft_clip=0, seq_order="R2L", top_block_channels=None, nvp=1, num_classes=0,
)  # fmt: skip
REQUIRED = ("in_channels", "img_size", "channels", "num_blocks", "layers_per_block")


def parse(options: dict) -> SimpleNamespace:
    """Options with defaults and derived sizes; `nvp` or `num_classes` means TarFlow."""
    unknown = sorted(set(options) - set(DEFAULTS) - set(REQUIRED))
    if unknown:
        raise ValueError(f"unknown flow options {unknown}")
    o = SimpleNamespace(**DEFAULTS | options)
    o.tarflow = ("nvp" in options or "num_classes" in options) and not (o.rope or o.sos)
    o.token_width = o.in_channels * o.patch_size**2
    o.side = o.img_size // o.patch_size
    o.trained_side = o.pt_seq_len or o.side
    depths = o.layers_per_block
    depths = [int(n) for n in depths.split()] if isinstance(depths, str) else depths
    depths = [depths] if isinstance(depths, int) else list(depths)
    o.depths = depths * o.num_blocks if len(depths) == 1 else depths
    return o


def widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class OffsetRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        widened = widen(x)
        widened = widened * torch.rsqrt(widened.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (widened * (1 + widen(self.weight))).type_as(x)


class WideLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(widen(x)).type(x.dtype)


def pre_norm(width, o):
    if o.norm_type == "rms_norm":
        return OffsetRMSNorm(width)
    return WideLayerNorm(width) if o.tarflow else nn.LayerNorm(width)


class JoinedCache:
    """TarFlow's: a list of pieces for each layer, joined anew at every call."""

    def __init__(self):
        self.pieces = {}

    def __call__(self, layer, key, value):
        keys, values = self.pieces.setdefault(layer, ([], []))
        keys.append(key)
        values.append(value)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


class FilledCache:
    """STARFlow's: a zeroed array for each layer, filled from the left with unrotated keys."""

    def __init__(self, layers, batch, heads, length, width, like):
        shape = (2, batch, heads, length, width)
        self.arrays = [torch.zeros(shape, dtype=like.dtype) for _ in range(layers)]
        self.used = [0] * layers

    def __call__(self, layer, key, value):
        array, start = self.arrays[layer], self.used[layer]
        end = self.used[layer] = start + key.size(2)
        array[0][:, :, start:end] = key
        array[1][:, :, start:end] = value
        return array[0][:, :, :end], array[1][:, :, :end]

    def rewind(self, count):
        self.used = [used - count for used in self.used]


def rope_angles(o, grid, text_length, like) -> torch.Tensor:
    """[L + rows*columns, d] angles by (row, column, text); without text options two axes only."""
    pairs, third = o.head_dim // 2, 8 if o.txt_size else 0
    planar = pairs - third
    # Frequencies in float64; positions rounded to float32, as in the published program.
    steps = lambda n, over: (torch.arange(n) / over * o.trained_side).double()
    slow = 10000.0 ** (-torch.arange(0, planar, 2).double() / planar)
    mean_side = (grid[0] * grid[1]) ** 0.5
    row = steps(grid[0], mean_side).repeat_interleave(grid[1])[:, None]
    column = steps(grid[1], mean_side).repeat(grid[0])[:, None]
    angles = torch.cat([row * slow, column * slow, torch.zeros(len(row), third)], dim=-1)
    if text_length:
        word = steps(text_length, text_length)[:, None]
        word = word * 10000.0 ** (-torch.arange(third).double() / third)
        angles = torch.cat([functional.pad(word, (pairs - third, 0)), angles])
    angles = torch.cat([angles] * 2, -1) if o.hf_style_rope else angles.repeat_interleave(2, -1)
    return angles.to(like.dtype)


def rotate(x, angles, half_split):
    if half_split:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


class Attention(nn.Module):
    def __init__(self, width, o):
        super().__init__()
        self.o, self.heads = o, o.num_heads or width // o.head_dim
        self.kv_heads = o.num_kv_heads or self.heads
        joint = (self.heads + 2 * self.kv_heads) * o.head_dim
        self.norm = pre_norm(width, o)
        self.qkv = nn.Linear(width, joint, bias=bool(o.use_bias))
        self.proj = nn.Linear(self.heads * o.head_dim, width, bias=bool(o.use_bias))
        self.query_norm = OffsetRMSNorm(o.head_dim) if o.use_qk_norm else None
        self.key_norm = OffsetRMSNorm(o.head_dim) if o.use_qk_norm else None
        self.post_norm = OffsetRMSNorm(width) if o.use_post_norm else None

    def forward(self, x, layer, angles=None, cache=None, mask=None, temperature=1.0):
        batch, length, _ = x.shape
        rows = self.qkv(self.norm(x)).view(batch, length, -1, self.o.head_dim).transpose(1, 2)
        q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if cache is not None:
            k, v = cache(layer, k, v)
        if angles is not None:
            q = rotate(q, angles[k.size(2) - length : k.size(2)], self.o.hf_style_rope)
            k = rotate(k, angles[: k.size(2)], self.o.hf_style_rope)
        if self.kv_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scale, past = self.o.head_dim**-0.5 / temperature, k.size(2) - length
        if self.o.tarflow:  # a dense mask in training, none for the one query of a sampling step
            mask = None if mask is None else mask.bool()
        elif past:
            mask = torch.tril(torch.ones(length, k.size(2), dtype=torch.bool), diagonal=past)
        causal = not self.o.tarflow and mask is None
        q, k, v = q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale
        )
        out = self.proj(out.transpose(1, 2).reshape(batch, length, -1))
        return out if self.post_norm is None else self.post_norm(out)


class Mlp(nn.Module):
    def __init__(self, width, o):
        super().__init__()
        inner, bias = 4 * width, bool(o.use_bias)
        self.norm = pre_norm(width, o)
        if o.use_swiglu:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
            self.up_proj = nn.Linear(width, inner, bias=bias)
            self.down_proj = nn.Linear(inner, width, bias=bias)
        else:
            up, down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)
            self.main = nn.Sequential(up, nn.GELU(), down)
        self.gated = bool(o.use_swiglu)
        self.post_norm = OffsetRMSNorm(width) if o.use_post_norm else None

    def forward(self, x):
        x = self.norm(x)
        if self.gated:
            gate = functional.gelu(self.gate_proj(x), approximate="tanh")
            x = self.down_proj(gate * self.up_proj(x))
        else:
            x = self.main(x)
        return x if self.post_norm is None else self.post_norm(x)


class Layer(nn.Module):
    def __init__(self, width, o):
        super().__init__()
        self.attention, self.mlp = Attention(width, o), Mlp(width, o)

    def forward(self, x, text, *call):
        stream = x if text is None else torch.cat([text, x], dim=1)
        stream = stream + self.attention(stream, *call)
        stream = stream + self.mlp(stream)
        if text is None:
            return stream, None
        return stream[:, text.size(1) :], stream[:, : text.size(1)]
