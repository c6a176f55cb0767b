"""The pre-norm decoder layer that every transformer of the project shares.

Shapes: B batch, T query positions, S key positions, C width, H query heads, K key/value heads,
G = H / K query heads per key head, D head channels, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.mesh import activation_shards, constrain, constrain_states, platform
from starflow2_jax.models import cpu_layout, rope
from starflow2_jax.models.attention import KERNELS, grouped_query_attention
from starflow2_jax.params import Init, ParamSpec, Tree, fan_in, gather_layer, ones, zeros

# The mask [T, S] of attention without a mask.
ATTEND_ALL = np.ones((1, 1), bool)
# Number of layers that the scan over layers unrolls on a CPU.
CPU_UNROLL = 8

# (cos, sin), for queries and keys alike or one for each.
RopeTables = tuple[jax.Array, jax.Array] | rope.QueryKeyTables


@dataclass(frozen=True)
class LayerConfig:
    """The shape and options of one layer."""

    width: int  # C
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    mlp_width: int  # hidden channels of the MLP
    # `layer_norm`, `rms_norm` (scales by weight) or `rms_norm_offset` (by 1 + weight)
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    gated: bool = False  # whether the MLP is down(act(gate x) * up x) rather than down(act(up x))
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False  # whether queries and keys are normalized, per head
    post_norm: bool = False  # whether the outputs of attention and MLP are normalized
    rope_pairs: str = "interleaved"  # channel pairs of RoPE, `interleaved` or `half` (see `rotate`)
    attention: str = "auto"  # a name in `attention.KERNELS`

    def __post_init__(self):
        for field, allowed in (
            ("attention", KERNELS),
            ("norm", ("layer_norm", "rms_norm", "rms_norm_offset")),
            ("activation", tuple(_ACTIVATIONS)),
            ("rope_pairs", ("interleaved", "half")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")
        for field in ("width", "heads", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field}={getattr(self, field)} must be at least 1; a width is at least that "
                    f"of one head"
                )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")


@struct.dataclass
class KVCache:
    """Rotated keys and values of the positions read so far.

    A single row has no batch axis: with an axis of size one, XLA's fusions on a CPU copy the whole
    cache at every step.
    """

    keys: tuple[jax.Array, ...]  # one [B, K, S, D] array per layer
    values: tuple[jax.Array, ...]  # of the same shapes
    # int32 [] or [B], number of positions that are filled, equal in all rows or one for each
    length: jax.Array


def empty_cache(
    cfg: LayerConfig, num_layers: int, batch_size: int, size: int, dtype: Any
) -> KVCache:
    """Return a cache of `size` positions, none of them filled."""
    batch_axis = (batch_size,) if batch_size > 1 else ()
    shape = (*batch_axis, cfg.kv_heads, size, cfg.head_dim)
    zero_layers = tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
    return KVCache(keys=zero_layers, values=zero_layers, length=jnp.zeros((), jnp.int32))


def declare_linear(
    inputs: int, outputs: int, axes: tuple[str | None, str | None], init: Init = fan_in
) -> dict[str, ParamSpec]:
    """Declare a linear layer with a bias; `axes` are the logical axes of its weight [in, out]."""
    return {
        "weight": ParamSpec((inputs, outputs), axes, init),
        "bias": ParamSpec((outputs,), axes[1:], zeros),
    }


def declare_norm(kind: str, shape: tuple[int, ...], axes: tuple) -> dict[str, ParamSpec]:
    """Declare the parameters of `norm`, with these logical axes."""
    if kind == "layer_norm":
        return {"weight": ParamSpec(shape, axes, ones), "bias": ParamSpec(shape, axes, zeros)}
    return {"weight": ParamSpec(shape, axes, zeros if kind == "rms_norm_offset" else ones)}


def declare(cfg: LayerConfig, num_layers: int) -> dict[str, Any]:
    """Declare `num_layers` layers, stacked on a leading `layers` axis; weights are [in, out]."""

    def linear(inputs, outputs, axes, bias):
        specs = {"weight": ParamSpec((num_layers, inputs, outputs), ("layers", *axes))}
        if bias:
            specs["bias"] = ParamSpec((num_layers, outputs), ("layers", axes[1]), zeros)
        return specs

    def norm(kind, size, axis):
        return declare_norm(kind, (num_layers, size), ("layers", axis))

    q_width, kv_width = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    tree = {
        "attention_norm": norm(cfg.norm, cfg.width, "embed"),
        "query": linear(cfg.width, q_width, ("embed", "heads"), cfg.qkv_bias),
        "key": linear(cfg.width, kv_width, ("embed", "kv_heads"), cfg.qkv_bias),
        "value": linear(cfg.width, kv_width, ("embed", "kv_heads"), cfg.qkv_bias),
        "out": linear(q_width, cfg.width, ("heads", "embed"), cfg.out_bias),
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


def linear(
    params: Tree, x: jax.Array, pin: Callable[[jax.Array], jax.Array] = lambda y: y
) -> jax.Array:
    """Return pin(x @ weight) (+ bias) in x's dtype, [..., in] to [..., out].

    `pin` fixes the sharding of the product where devices hold parts of its sum.
    """
    if activation_shards()["states"] > 1 and "panels" not in params:
        # Not flattened: sharded positions would not remain sharded.
        y = pin(x @ params["weight"].astype(x.dtype))
        return y + params["bias"].astype(x.dtype) if "bias" in params else y
    # Flattened, because on a CPU the backward pass of [B, T, in] takes up to twice as long.
    flat = x.reshape(-1, x.shape[-1])
    if "panels" in params:
        y = cpu_layout.multiply_panels(flat, params["panels"])
    else:
        y = flat @ params["weight"].astype(x.dtype)
    if "bias" in params:
        y = y + params["bias"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def layer_norm(params: Tree, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Normalize the last axis to zero mean and unit variance; statistics in at least float32."""
    y = at_least_float32(x)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * params["weight"] + params["bias"]).astype(x.dtype)


def rms_norm(params: Tree, x: jax.Array, eps: float = 1e-6, offset: bool = True) -> jax.Array:
    """Normalize the last axis to unit mean square and scale it by 1 + weight.

    `offset=False` scales by weight alone. Statistics are in at least float32.
    """
    y = at_least_float32(x)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    scale = at_least_float32(params["weight"])
    return (y * (1 + scale if offset else scale)).astype(x.dtype)


def norm(params: Tree, x: jax.Array, kind: str, eps: float) -> jax.Array:
    """Apply `layer_norm`, `rms_norm` or `rms_norm_offset`, by name, to the last axis of x."""
    if kind == "layer_norm":
        return layer_norm(params, x, eps)
    return rms_norm(params, x, eps, offset=kind == "rms_norm_offset")


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], pairs: str) -> jax.Array:
    """Rotate the channel pairs of x [B, heads, T, D] by tables [T, D/2] or [B, T, D/2].

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). `interleaved` pairs channels (2i, 2i + 1),
    `half` pairs (i, i + D/2).
    """
    cos, sin = (t[..., None, :, :].astype(x.dtype) for t in tables)
    if pairs == "interleaved":
        pair = x.reshape(*x.shape[:-1], -1, 2)
        a, b = pair[..., 0], pair[..., 1]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@jax.custom_jvp
def _gelu(x):
    # This uses erf; jax.nn.gelu uses erfc, which takes twice as long on a CPU.
    y = at_least_float32(x)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    y = at_least_float32(x)
    # One expression: what JAX derives from the function takes one and a half times as long.
    density = jnp.exp(-0.5 * jnp.square(y)) * (2 * np.pi) ** -0.5
    slope = 0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5) + y * density
    return _gelu(x), tangent * slope.astype(x.dtype)


_ACTIVATIONS = {
    # The backward pass recomputes it, which saves two thirds of its residuals.
    "gelu": jax.checkpoint(_gelu),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def mlp(params: Tree, x: jax.Array, cfg: LayerConfig) -> jax.Array:
    """Return down(act(up x)) of x [B, T, C], or down(act(gate x) * up x) in a gated layer."""
    act = _ACTIVATIONS[cfg.activation]
    up = constrain(linear(params["mlp_up"], x), "batch", "length", "mlp")
    hidden = act(linear(params["mlp_gate"], x)) * up if cfg.gated else act(up)
    return linear(params["mlp_down"], hidden, constrain_states)


def project_qkv(
    params: Tree, h: jax.Array, cfg: LayerConfig, tables: RopeTables | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q [B, H, T, D], k and v [B, K, T, D] of a layer with input h [B, T, C].

    `tables` is (cos, sin) of queries and keys alike, or a pair of them.
    """

    def split_heads(y):
        y = y.reshape(*x.shape[:2], -1, cfg.head_dim)
        return constrain(y.swapaxes(1, 2), "batch", "heads", "length")

    x = constrain(norm(params["attention_norm"], h, cfg.norm, cfg.norm_eps), "batch", "length")
    pairs, is_joined = cfg.rope_pairs, "query_key_value" in params
    if platform() == "cpu" and not is_joined and activation_shards()["states"] == 1:
        if tables is not None and pairs == "interleaved":
            params, pairs = cpu_layout.with_half_pairs(params, cfg.head_dim), "half"
        params = {**params, "query_key_value": cpu_layout.join_qkv(params)}
    if "query_key_value" in params:
        bounds = np.cumsum([cfg.heads, cfg.kv_heads]) * cfg.head_dim
        projections = jnp.split(linear(params["query_key_value"], x), bounds, -1)
    else:
        projections = [linear(params[name], x) for name in ("query", "key", "value")]
    q, k, v = map(split_heads, projections)
    if cfg.qk_norm:
        q, k = rms_norm(params["query_norm"], q), rms_norm(params["key_norm"], k)
    if tables is not None:
        is_pair = isinstance(tables, rope.QueryKeyTables)
        query_tables, key_tables = tables if is_pair else (tables, tables)
        q, k = rotate(q, query_tables, pairs), rotate(k, key_tables, pairs)
    return q, k, v


def self_attention(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    cfg: LayerConfig,
    mask: jax.Array | np.ndarray | None,
    temperature: Any = 1.0,
    layer_cache: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attend with `project_qkv`'s output; the other arguments are those of `decoder_layer`.

    Returns:
        The attended values [B, T, H D], and the keys and values with the new ones in place.
    """
    q, k, v = qkv

    def write(cached, new, offset):
        new = new.astype(cached.dtype).reshape(*cached.shape[:-2], *new.shape[-2:])
        if not offset.ndim:
            return jax.lax.dynamic_update_slice_in_dim(cached, new, offset, cached.ndim - 2)
        # Every row writes behind its own last slot; what is beyond the cache is dropped.
        rows, slots = jnp.arange(len(new))[:, None], offset[:, None] + jnp.arange(new.shape[-2])
        return cached.at[rows, :, slots].set(new.swapaxes(1, 2))

    if layer_cache is not None:
        cached_k, cached_v, offset = layer_cache
        k, v = write(cached_k, k, offset), write(cached_v, v, offset)
    out = grouped_query_attention(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        mask,
        temperature,
        segments,
        kernel="plain" if layer_cache is not None else cfg.attention,
    )
    return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1), (k, v)


def add_attention_and_mlp(
    params: Tree, h: jax.Array, attended: jax.Array, cfg: LayerConfig
) -> jax.Array:
    """Return h [B, T, C] plus the projected attention output, plus the MLP of that sum."""
    attended = linear(params["out"], attended, constrain_states)
    if cfg.post_norm:
        attended = rms_norm(params["attention_post_norm"], attended)
    h = h + attended
    x = constrain(norm(params["mlp_norm"], h, cfg.norm, cfg.norm_eps), "batch", "length")
    y = mlp(params, x, cfg)
    if cfg.post_norm:
        y = rms_norm(params["mlp_post_norm"], y)
    return constrain_states(h + y)


def decoder_layer(
    params: Tree,
    h: jax.Array,
    cfg: LayerConfig,
    tables: RopeTables | None,
    mask: jax.Array | np.ndarray | None,
    temperature: Any = 1.0,
    layer_cache: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Apply one layer: h <- h + attention(norm(h)), then h <- h + mlp(norm(h)).

    Args:
        params: one layer's parameters, without the leading layers axis.
        h: [B, T, C].
        tables: of the T new positions, as in `project_qkv`; None without RoPE.
        mask, temperature: as in `grouped_query_attention`, over the S positions of a cache.
        layer_cache: keys and values of earlier positions, as in `KVCache`, and the offset at which
            the new ones are written.
        segments: int32 [B, T] as in `grouped_query_attention`, without a cache.

    Returns:
        h [B, T, C], and the layer's keys and values with the new ones in place.
    """
    h = constrain_states(h)
    qkv = project_qkv(params, h, cfg, tables)
    attended, keys_values = self_attention(qkv, cfg, mask, temperature, layer_cache, segments)
    return add_attention_and_mlp(params, h, attended, cfg), keys_values


# Rematerialization policies: the results of the forward pass that the backward pass may keep.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def run_layers(
    layer: Callable[..., Any],
    carry: Any,
    params: Any,
    remat: str,
    cache: KVCache | None,
    specs: Any,
) -> tuple[Any, KVCache | None]:
    """Return the carry after all layers, and the extended cache, None without one.

    Args:
        layer: (carry, layer_params, layer_cache) -> carry and `self_attention`'s keys and values.
        carry: states [B, T, C], or a tuple of them.
        params: the stacked layers; with a cache one tree per layer (see `unstack`), since a scan
            would copy the stacked cache at every step.
        remat: a name in `REMAT`, without a cache.
        specs: the declarations of the stacked layers, for any number of them.
    """
    if cache is None:

        def step(carry, layer_params):
            layer_params = gather_layer(layer_params, specs, jax.tree.leaves(carry)[0].dtype)
            return layer(carry, layer_params, None)[0], None

        if REMAT[remat] is not None:
            step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
        # A loop copies the residuals of the backward pass into and out of stacked arrays. On a CPU
        # that takes an eighth of the step's time.
        unroll = CPU_UNROLL if platform() == "cpu" else 1
        return jax.lax.scan(step, carry, params, unroll=unroll)[0], None
    keys, values = [], []
    for layer_params, k, v in zip(params, cache.keys, cache.values):
        carry, (k, v) = layer(carry, layer_params, (k, v, cache.length))
        keys.append(k)
        values.append(v)
    num_new = jax.tree.leaves(carry)[0].shape[1]
    return carry, KVCache(tuple(keys), tuple(values), cache.length + num_new)


def apply_layers(
    params: Any,
    h: jax.Array,
    cfg: LayerConfig,
    tables: RopeTables | None,
    mask: jax.Array | np.ndarray | None = None,
    *,
    temperature: Any = 1.0,
    remat: str = "none",
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Apply all layers to h [B, T, C]; arguments as in `decoder_layer` and `run_layers`.

    Returns:
        h [B, T, C], and the cache extended by the T positions, None without one.
    """

    if tables is not None and platform() == "cpu":
        # Without a barrier, XLA computes sines and cosines anew in each layer, for each head.
        tables = jax.lax.optimization_barrier(tables)

    def layer(h, layer_params, layer_cache):
        return decoder_layer(layer_params, h, cfg, tables, mask, temperature, layer_cache, segments)

    return run_layers(layer, h, params, remat, cache, declare(cfg, 1))


def unstack(params: Tree) -> tuple[Tree, ...]:
    """Return one tree per layer of stacked layers.

    Call it before a decode loop, so that the loop reads the weights in place. On a CPU the weights
    are also laid out for a few rows at a time (`cpu_layout.decode_layer`).
    """
    num_layers = len(jax.tree.leaves(params)[0])
    layers = tuple(jax.tree.map(lambda w, i=i: w[i], params) for i in range(num_layers))
    return tuple(map(cpu_layout.decode_layer, layers)) if platform() == "cpu" else layers
