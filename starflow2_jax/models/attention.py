"""Causal grouped-query attention: a plain XLA implementation and kernels for accelerators.

The kernels, splash attention on TPUs and cuDNN on GPUs, are causal within segments and never store
the [T, S] scores. The plain implementation is their reference.

Shapes: B batch, H query and K key/value heads, T query and S key positions, D channels of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from starflow2_jax.mesh import ACTIVATIONS, activation_shards, constrain, platform

KERNELS = ("auto", "plain", "splash", "cudnn")
# The plain path splits queries into this many chunks, each with the keys up to its end. With a
# causal mask that skips (chunks - 1) / (2 chunks) of the scores.
CAUSAL_CHUNKS = 4
# The TPU kernel reads keys in blocks of whole lanes.
LANES = 128
LARGEST_BLOCK = 512


def segment_mask(segments: jax.Array) -> jax.Array:
    """Return the mask bool [B, T, T] of packed rows: causal, and within a segment of [B, T]."""
    length = segments.shape[1]
    return (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)


def grouped_query_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | np.ndarray | None,
    temperature: Any = 1.0,
    segments: jax.Array | None = None,
    kernel: str = "plain",
) -> jax.Array:
    """Compute softmax(q k^T / (sqrt(D) temperature)) v in grouped heads, the softmax in float32.

    Args:
        q: [B, H, T, D].
        k, v: [B, K, S, D], or [K, S, D] for a single row.
        mask: bool, broadcastable to [B, T, S], True where a query may attend. None is causal; the
            queries are then at the last T of the S positions.
        temperature: a number or [B].
        segments: int32 [B, S] of packed rows: a query attends to its own segment only, up to
            itself. Padding is segment 0 and attends to padding. Requires `mask=None`.
        kernel: a name in `KERNELS`; used only with `mask=None`.

    Returns:
        [B, H, T, D].
    """
    if segments is not None and mask is not None:
        raise ValueError("attention: segments require mask=None; include them in the mask")
    batch_size, heads, length, channels = q.shape
    kv_heads, num_keys = k.shape[-3:-1]
    scale = channels**-0.5 / jnp.reshape(jnp.asarray(temperature, q.dtype), (-1, 1, 1, 1, 1))
    kernel = "plain" if mask is not None else select_kernel(kernel, q, k)
    if kernel == "splash":
        return _splash(q * scale[..., 0], k, v, segments, interpret=platform() != "tpu")
    if kernel == "cudnn":
        return dot_product_attention(q * scale[..., 0], k, v, segments, "cudnn")
    q = q.reshape(batch_size, kv_heads, heads // kv_heads, length, channels) * scale
    if mask is not None:
        mask = mask[..., None, None, :, :]
        if k.ndim == 3:
            q, mask = q[0], mask.reshape(mask.shape[-4:])
        out = _softmax_attention(q, k, v, mask)
        return out.reshape(batch_size, heads, length, channels)
    chunks = CAUSAL_CHUNKS if length % CAUSAL_CHUNKS == 0 and length >= 16 * CAUSAL_CHUNKS else 1
    if activation_shards()["length"] > 1:
        # The queries are already sharded by position: a chunk of them would lie on few devices.
        k, v, chunks = constrain(k, "batch", "heads"), constrain(v, "batch", "heads"), 1
    first_query, chunk_len, outputs = num_keys - length, length // chunks, []
    for start in range(0, length, chunk_len):
        begin, end = first_query + start, first_query + start + chunk_len
        causal = np.arange(begin, end)[:, None] >= np.arange(end)[None, :]
        if segments is not None:
            same_segment = segments[:, begin:end, None] == segments[:, None, :end]
            causal = (causal & same_segment)[:, None, None]
        q_chunk = q[:, :, :, start : start + chunk_len]
        outputs.append(_softmax_attention(q_chunk, k[..., :end, :], v[..., :end, :], causal))
    return jnp.concatenate(outputs, 3).reshape(batch_size, heads, length, channels)


def _softmax_attention(q, k, v, mask):
    """Return softmax(q k^T) v of scaled q [(B,) K, G, T, D]; mask like [(B,) 1, 1, T, S]."""
    scores = jnp.einsum("...kgtd,...ksd->...kgts", q, k)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    # The mask is finite and added: the backward pass of a sum is free, and a query that may attend
    # to nothing yields numbers rather than NaN.
    masked_score = 0.5 * float(jnp.finfo(scores.dtype).min)
    xp = np if isinstance(mask, np.ndarray) else jnp
    weights = jax.nn.softmax(scores + xp.where(mask, 0.0, masked_score).astype(scores.dtype))
    return jnp.einsum("...kgts,...ksd->...kgtd", weights.astype(v.dtype), v)


def select_kernel(kernel: str, q: jax.Array, k: jax.Array) -> str:
    """Return `plain`, `splash` or `cudnn` for the platform that the program is traced for.

    `auto` selects the platform's kernel if it supports these arrays, else `plain`. Any other name
    is final: without a TPU, `splash` runs in an interpreter. Shapes are those of
    `grouped_query_attention`.
    """
    if kernel == "plain":
        return "plain"
    if kernel == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "plain")
        return "plain" if kernel == "plain" or _unsupported_reason(kernel, q, k) else kernel
    reason = _unsupported_reason(kernel, q, k)
    if reason:
        raise ValueError(f"attention={kernel!r}: {reason}")
    return kernel


def _unsupported_reason(kernel, q, k):
    """Return why a kernel does not support these arrays, empty if it does."""
    shards, heads, length = activation_shards(), k.shape[-3], q.shape[-2]
    if k.ndim != 4 or length != k.shape[-2]:
        return "keys and queries must be of the same positions"
    if q.shape[0] % shards["batch"] or heads % shards["heads"]:
        return (
            f"batch {q.shape[0]} and {heads} key heads are not divisible by the mesh's "
            f"{shards['batch']} x {shards['heads']}"
        )
    if kernel == "splash":
        if length % (LANES * shards["length"]):
            return f"{length} positions are not a multiple of {LANES} x context {shards['length']}"
        if q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"dtype {q.dtype} is neither bfloat16 nor float32"
    if kernel == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"dtype {q.dtype} is not of 16 bits"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"{q.shape[-1]} head channels are not a multiple of 8 up to 128"
        if shards["length"] > 1:
            return "positions sharded over `context` are not supported"
    return ""


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, implementation: str
) -> jax.Array:
    """Return softmax(q k^T) v [B, H, T, D] of scaled q [B, H, T, D] and k, v [B, K, T, D].

    It is causal within segments. `implementation` is that of jax.nn.dot_product_attention: `cudnn`,
    or `xla` on any platform.
    """
    mask = None
    if segments is not None:
        mask = segments[:, None, :, None] == segments[:, None, None, :]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=1.0, is_causal=True, implementation=implementation
    )
    return out.swapaxes(1, 2)


def _splash(q, k, v, segments, interpret):
    # Imported here: pallas takes a second to import, and only this path needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    mesh = jax.sharding.get_abstract_mesh()
    shards = activation_shards()
    heads, length = q.shape[1] // shards["heads"], q.shape[2]
    block = next(
        size for size in range(LARGEST_BLOCK, 0, -LANES) if (length // shards["length"]) % size == 0
    )
    causal = splash_attention_mask.CausalMask((length, length), shard_count=shards["length"])
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=shards["length"],
        interpret=interpret,
    )

    def apply_kernel(kernel, q, k, v, q_segments, kv_segments):
        if q_segments is None:
            return jax.vmap(kernel)(q, k, v)
        segment_ids = splash_attention_kernel.SegmentIds(q_segments, kv_segments)
        return jax.vmap(kernel)(q, k, v, segment_ids)

    if mesh.empty or mesh.size == 1:
        return apply_kernel(kernel, q, k, v, segments, segments)

    # A kernel is opaque to the partitioner, so it runs under shard_map: every device computes its
    # own queries against all the keys.
    def spec(*names):
        return PartitionSpec(*(name and ACTIVATIONS[name] for name in names))

    q_spec, kv_spec = spec("batch", "heads", "length"), spec("batch", "heads", None)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, spec(None, "length")))
    has_segments = segments is not None
    sharded = jax.shard_map(
        apply_kernel,
        mesh=mesh,
        in_specs=(
            kernel_spec,
            q_spec,
            kv_spec,
            kv_spec,
            spec("batch", "length") if has_segments else None,
            spec("batch") if has_segments else None,
        ),
        out_specs=q_spec,
        check_vma=False,
    )
    return sharded(kernel, q, k, v, segments, segments)
