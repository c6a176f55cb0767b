"""One pre-norm decoder layer that serves every causal transformer of the project.

Axes: B batch, T query positions, S key positions, C width, H query heads, K key/value heads,
G = H / K query heads per key head, D head channels, L layers.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.mesh import activation_ways, constrain, platform
from starflow2_jax.models import attention as kernels
from starflow2_jax.params import ParamSpec, Tree, ones, zeros

# Queries are attended in this many parts, each to the keys before its end: with a causal mask that
# leaves out (parts - 1) / (2 parts) of the scores.
CAUSAL_PARTS = 4
# Layers that a CPU runs without a loop between them.
CPU_UNROLL = 8
# Columns of a tall weight that a CPU's decode step reads side by side (see `unstack`).
PANEL = 64


@dataclass(frozen=True)
class LayerConfig:
    """Shape and options of a layer. `rms_norm_offset` scales by 1 + weight, not weight; `attention`
    is a name in `attention.KERNELS`.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    post_norm: bool = False
    rope_pairs: str = "interleaved"
    attention: str = "auto"

    def __post_init__(self):
        for field, allowed in (
            ("attention", kernels.KERNELS),
            ("norm", ("layer_norm", "rms_norm", "rms_norm_offset")),
            ("activation", tuple(_ACTIVATIONS)),
            ("rope_pairs", ("interleaved", "half")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")


@struct.dataclass
class KVCache:
    """Rotated keys and values, a pair of [B, K, S, D] arrays a layer, and how many are filled.

    A single row's have no batch axis: with an axis of one, XLA's fusions on a CPU copy the whole
    cache at every step.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array


def empty_cache(cfg: LayerConfig, layers: int, batch: int, size: int, dtype: Any) -> KVCache:
    """A cache of `size` positions with none filled."""
    rows = (batch,) if batch > 1 else ()
    shape = (*rows, cfg.kv_heads, size, cfg.head_dim)
    blank = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return KVCache(keys=blank, values=blank, length=jnp.zeros((), jnp.int32))


def _norm_weights(kind: str, shape: tuple[int, ...], axes: tuple) -> dict[str, ParamSpec]:
    if kind == "layer_norm":
        return {"weight": ParamSpec(shape, axes, ones), "bias": ParamSpec(shape, axes, zeros)}
    return {"weight": ParamSpec(shape, axes, zeros if kind == "rms_norm_offset" else ones)}


def declare(cfg: LayerConfig, layers: int) -> dict[str, Any]:
    """Weights of `layers` layers, stacked on a leading `layers` axis; linears are [in, out]."""

    def linear(inputs, outputs, axes, bias):
        weights = {"weight": ParamSpec((layers, inputs, outputs), ("layers", *axes))}
        if bias:
            weights["bias"] = ParamSpec((layers, outputs), ("layers", axes[1]), zeros)
        return weights

    def norm(kind, size, axis):
        return _norm_weights(kind, (layers, size), ("layers", axis))

    queries, keys = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    tree = {
        "attention_norm": norm(cfg.norm, cfg.width, "embed"),
        "query": linear(cfg.width, queries, ("embed", "heads"), cfg.qkv_bias),
        "key": linear(cfg.width, keys, ("embed", "kv_heads"), cfg.qkv_bias),
        "value": linear(cfg.width, keys, ("embed", "kv_heads"), cfg.qkv_bias),
        "out": linear(queries, cfg.width, ("heads", "embed"), cfg.out_bias),
        "mlp_norm": norm(cfg.norm, cfg.width, "embed"),
        "mlp_up": linear(cfg.width, cfg.mlp_width, ("embed", "mlp"), cfg.mlp_bias),
        "mlp_down": linear(cfg.mlp_width, cfg.width, ("mlp", "embed"), cfg.mlp_bias),
    }
    if cfg.gated:
        tree["mlp_gate"] = linear(cfg.width, cfg.mlp_width, ("embed", "mlp"), cfg.mlp_bias)
    if cfg.qk_norm:
        tree["query_norm"] = norm("rms_norm_offset", cfg.head_dim, None)
        tree["key_norm"] = norm("rms_norm_offset", cfg.head_dim, None)
    if cfg.post_norm:
        tree["attention_post_norm"] = norm("rms_norm_offset", cfg.width, "embed")
        tree["mlp_post_norm"] = norm("rms_norm_offset", cfg.width, "embed")
    return tree


def at_least_float32(x: jax.Array) -> jax.Array:
    """Cast up to float32, never down: float64 stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear(params: Tree, x: jax.Array) -> jax.Array:
    """x @ weight (+ bias) in x's dtype, [..., in] to [..., out].

    Rows are flattened first: on a CPU the backward pass of [B, T, in] takes up to twice as long.
    """
    rows = x.reshape(-1, x.shape[-1])
    if "panels" in params:
        panels = params["panels"].astype(x.dtype)
        each = jnp.broadcast_to(rows, (len(panels), *rows.shape))
        y = jnp.einsum("pri,pio->pro", each, panels).swapaxes(0, 1).reshape(len(rows), -1)
    else:
        y = rows @ params["weight"].astype(x.dtype)
    if "bias" in params:
        y = y + params["bias"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def layer_norm(params: Tree, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Zero mean, unit variance over the last dimension; statistics in at least float32."""
    wide = at_least_float32(x)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * params["weight"] + params["bias"]).astype(x.dtype)


def rms_norm(params: Tree, x: jax.Array, eps: float = 1e-6, offset: bool = True) -> jax.Array:
    """Unit mean square over the last dimension, times 1 + weight (or weight: `offset=False`)."""
    wide = at_least_float32(x)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    scale = at_least_float32(params["weight"])
    return (wide * (1 + scale if offset else scale)).astype(x.dtype)


def norm(params: Tree, x: jax.Array, kind: str, eps: float) -> jax.Array:
    """`layer_norm`, `rms_norm` or `rms_norm_offset` by name."""
    if kind == "layer_norm":
        return layer_norm(params, x, eps)
    return rms_norm(params, x, eps, offset=kind == "rms_norm_offset")


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], pairs: str) -> jax.Array:
    """Rotate the channel pairs of x [B, heads, T, D] by tables [T, D/2] or [B, T, D/2].

    `interleaved` pairs channels (2i, 2i+1), `half` pairs (i, i + D/2).
    """
    cos, sin = (t[..., None, :, :].astype(x.dtype) for t in tables)
    if pairs == "interleaved":
        pair = x.reshape(*x.shape[:-1], -1, 2)
        a, b = pair[..., 0], pair[..., 1]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(q, k, v, mask):
    """softmax(q k) v for scaled q [B, K, G, T, D]; mask broadcasts to [B, 1, 1, T, S].

    All of them may lack the axis B.
    """
    scores = at_least_float32(jnp.einsum("...kgtd,...ksd->...kgts", q, k))
    # Added and finite: a sum has no work to do in the backward pass, and a row which may attend to
    # nothing gives numbers, not NaN.
    closed = 0.5 * float(jnp.finfo(scores.dtype).min)
    xp = np if isinstance(mask, np.ndarray) else jnp
    weights = jax.nn.softmax(scores + xp.where(mask, 0.0, closed).astype(scores.dtype))
    return jnp.einsum("...kgts,...ksd->...kgtd", weights.astype(v.dtype), v)


def segment_mask(segments: jax.Array) -> jax.Array:
    """Bool [B, T, T] of packed rows: causal, and within one of the segments int [B, T]."""
    length = segments.shape[1]
    return (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    temperature: Any = 1.0,
    segments: jax.Array | None = None,
    kernel: str = "plain",
) -> jax.Array:
    """Grouped-query attention with scale 1 / (sqrt(D) temperature) and softmax in float32.

    Args:
        q: [B, H, T, D]; k, v: [B, K, S, D], or [K, S, D] of a single row.
        mask: boolean, broadcastable to [B, T, S], True where a query may look; None is causal,
            the queries being the last T of the S positions.
        temperature: a number or [B].
        segments: int32 [B, S], for packed rows: a query looks only at positions of its own segment,
            up to itself. Padding has segment 0, and looks at padding. With `mask=None` only.
        kernel: a name in `attention.KERNELS`, heeded where `mask` is None.

    Returns:
        [B, H, T, D].

    Raises:
        ValueError: segments beside a mask, or a kernel that cannot serve (see `attention.choose`).
    """
    if segments is not None and mask is not None:
        raise ValueError("attention: segments are for mask=None; put them into the mask")
    batch, heads, length, channels = q.shape
    kv_heads, keys = k.shape[-3:-1]
    scale = channels**-0.5 / jnp.reshape(jnp.asarray(temperature, q.dtype), (-1, 1, 1, 1, 1))
    chosen = "plain" if mask is not None else kernels.choose(kernel, q, k)
    if chosen != "plain":
        return kernels.attend(chosen, q * scale[..., 0], k, v, segments)
    q = q.reshape(batch, kv_heads, heads // kv_heads, length, channels) * scale
    if mask is not None:
        mask = mask[..., None, None, :, :]
        if k.ndim == 3:
            q, mask = q[0], mask.reshape(mask.shape[-4:])
        return _attend(q, k, v, mask).reshape(batch, heads, length, channels)
    before = keys - length
    parts = CAUSAL_PARTS if length % CAUSAL_PARTS == 0 and length >= 16 * CAUSAL_PARTS else 1
    if activation_ways()["length"] > 1:
        # Each device has a part of the queries already: a part of those would be on few devices.
        k, v, parts = constrain(k, "batch", "heads"), constrain(v, "batch", "heads"), 1
    step, mixed = length // parts, []
    for start in range(0, length, step):
        end = before + start + step
        causal = np.arange(before + start, end)[:, None] >= np.arange(end)[None, :]
        if segments is not None:
            own, seen = segments[:, before + start : end], segments[:, :end]
            causal = (causal & (own[:, :, None] == seen[:, None, :]))[:, None, None]
        now = q[:, :, :, start : start + step]
        mixed.append(_attend(now, k[..., :end, :], v[..., :end, :], causal))
    return jnp.concatenate(mixed, 3).reshape(batch, heads, length, channels)


def _gelu(x):
    # By erf, not jax.nn.gelu's erfc, which takes twice as long on a CPU.
    wide = at_least_float32(x)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


_ACTIVATIONS = {
    # Recomputed in the backward pass: a third of what it would keep.
    "gelu": jax.checkpoint(_gelu),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def mlp(params: Tree, x: jax.Array, cfg: LayerConfig) -> jax.Array:
    """down(act(up x)), or down(act(gate x) * up x) where gated."""
    act = _ACTIVATIONS[cfg.activation]
    up = constrain(linear(params["mlp_up"], x), "batch", "length", "mlp")
    hidden = act(linear(params["mlp_gate"], x)) * up if cfg.gated else act(up)
    return linear(params["mlp_down"], hidden)


def queries_keys_values(
    params: Tree, h: jax.Array, cfg: LayerConfig, tables: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, ...]:
    """q [B, H, T, D], k and v [B, K, T, D] of a layer that reads h [B, T, C]."""

    def by_head(y):
        y = y.reshape(*x.shape[:2], -1, cfg.head_dim)
        return constrain(y.swapaxes(1, 2), "batch", "heads", "length")

    x = norm(params["attention_norm"], h, cfg.norm, cfg.norm_eps)
    if "query_key_value" in params:
        ends = np.cumsum([cfg.heads, cfg.kv_heads]) * cfg.head_dim
        parts = jnp.split(linear(params["query_key_value"], x), ends, -1)
    else:
        parts = (linear(params[name], x) for name in ("query", "key", "value"))
    q, k, v = map(by_head, parts)
    if cfg.qk_norm:
        q, k = rms_norm(params["query_norm"], q), rms_norm(params["key_norm"], k)
    if tables is not None:
        q, k = rotate(q, tables, cfg.rope_pairs), rotate(k, tables, cfg.rope_pairs)
    return q, k, v


def mix(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cfg: LayerConfig,
    mask: jax.Array | None,
    temperature: Any = 1.0,
    cached: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What queries attend to [B, T, H D], and keys and values; arguments as in `decoder_layer`."""

    def write(array, new, offset):
        new = new.astype(array.dtype).reshape(*array.shape[:-2], *new.shape[-2:])
        return jax.lax.dynamic_update_slice_in_dim(array, new, offset, array.ndim - 2)

    if cached is not None:
        k, v = write(cached[0], k, cached[2]), write(cached[1], v, cached[2])
    kernel = "plain" if cached is not None else cfg.attention
    now = (q, k.astype(q.dtype), v.astype(q.dtype))
    mixed = attention(*now, mask, temperature, segments, kernel)
    return mixed.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1), (k, v)


def after_attention(params: Tree, h: jax.Array, mixed: jax.Array, cfg: LayerConfig) -> jax.Array:
    """The rest of a layer: h [B, T, C] with `mix`'s output and the MLP's added."""
    mixed = linear(params["out"], mixed)
    if cfg.post_norm:
        mixed = rms_norm(params["attention_post_norm"], mixed)
    h = h + mixed
    y = mlp(params, norm(params["mlp_norm"], h, cfg.norm, cfg.norm_eps), cfg)
    if cfg.post_norm:
        y = rms_norm(params["mlp_post_norm"], y)
    return constrain(h + y, "batch", "length")


def decoder_layer(
    params: Tree,
    h: jax.Array,
    cfg: LayerConfig,
    tables: tuple[jax.Array, jax.Array] | None,
    mask: jax.Array | None,
    temperature: Any = 1.0,
    cached: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """h + attention(norm h), then h + mlp(norm h) (paper.md 3.2).

    Args:
        params: one layer's weights, without the leading layers axis; h: [B, T, C].
        tables: cos and sin of the T new positions, None without RoPE.
        mask: as in `attention`, over the S positions of the cache where there is one.
        cached: keys and values of earlier positions, as in `KVCache`, and the offset at which the
            new ones are written.
        segments: int32 [B, T] as in `attention`, without a cache.

    Returns:
        h [B, T, C] and the layer's keys and values, with the new ones in place.
    """
    h = constrain(h, "batch", "length")
    q, k, v = queries_keys_values(params, h, cfg, tables)
    mixed, held = mix(q, k, v, cfg, mask, temperature, cached, segments)
    return after_attention(params, h, mixed, cfg), held


REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def run_layers(
    params: Tree,
    h: jax.Array,
    cfg: LayerConfig,
    tables: tuple[jax.Array, jax.Array] | None,
    mask: jax.Array | None = None,
    temperature: Any = 1.0,
    remat: str = "none",
    segments: jax.Array | None = None,
) -> jax.Array:
    """All stacked layers over h [B, T, C] by a scan, rematerialised by the policy named `remat`.

    `segments` int32 [B, T]: as in `attention`.
    """

    def body(h, layer):
        return decoder_layer(layer, h, cfg, tables, mask, temperature, None, segments)[0], None

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    # A loop keeps what the backward pass needs by copying it in and out of stacked arrays: on a CPU
    # an eighth of the step's time.
    return jax.lax.scan(body, h, params, unroll=CPU_UNROLL if platform() == "cpu" else 1)[0]


def unstack(params: Tree, layers: int) -> tuple[Tree, ...]:
    """One tree a layer from the stacked one. Done before a decode loop, so that the loop reads the
    weights where they are.

    On a CPU they are laid out for a few rows at a time: query, key and value are one linear, and
    linears with more inputs than outputs are `panels`, blocks of PANEL columns one after the other.
    """
    each = (jax.tree.map(lambda w, i=i: w[i], params) for i in range(layers))
    return tuple(_for_few_rows(layer) for layer in each) if platform() == "cpu" else tuple(each)


def _for_few_rows(layer):
    def panels(tree):
        inputs, outputs = tree["weight"].shape
        if inputs <= outputs or outputs % PANEL:
            return tree
        rest = {name: leaf for name, leaf in tree.items() if name != "weight"}
        weight = tree["weight"].reshape(inputs, -1, PANEL).swapaxes(0, 1)
        return {"panels": weight, **rest}

    joined = [layer[name] for name in ("query", "key", "value")]
    rest = {name: tree for name, tree in layer.items() if name not in ("query", "key", "value")}
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *joined)
    rest["mlp_down"] = panels(rest["mlp_down"])
    return {"query_key_value": whole, **rest}


def run_layers_cached(
    layers: tuple[Tree, ...],
    h: jax.Array,
    cfg: LayerConfig,
    tables: tuple[jax.Array, jax.Array] | None,
    mask: jax.Array,
    cache: KVCache,
    temperature: Any = 1.0,
) -> tuple[jax.Array, KVCache]:
    """The same over new positions h [B, T, C], reading and extending a cache.

    Layers are unrolled (see `unstack`), each with arrays of its own in the cache: a scan would copy
    the stacked cache at every step.
    """
    keys, values = [], []
    for layer, k, v in zip(layers, cache.keys, cache.values):
        cached = (k, v, cache.length)
        h, (k, v) = decoder_layer(layer, h, cfg, tables, mask, temperature, cached)
        keys.append(k)
        values.append(v)
    return h, KVCache(tuple(keys), tuple(values), cache.length + h.shape[1])
