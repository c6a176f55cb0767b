"""Causal attention by the kernels of accelerators: splash attention on TPUs, cuDNN on GPUs.

Axes: B batch, H query heads, K key/value heads, T positions, D head channels.

Both attend causally inside segments and neither holds the [T, T] scores. `choose` says which one a
program gets; `layers.attention` is the plain path, their reference.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from starflow2_jax.mesh import ACTIVATIONS, activation_ways, platform

KERNELS = ("auto", "plain", "splash", "cudnn")
# The TPU kernel reads keys in blocks of whole lanes.
LANES = 128
LARGEST_BLOCK = 512


def choose(kernel: str, q: jax.Array, k: jax.Array) -> str:
    """`plain`, `splash` or `cudnn`, for the platform that the program is traced for.

    `auto` takes the platform's kernel where it serves these arrays, else `plain`. Any other name is
    taken at its word: `splash` runs in an interpreter where there is no TPU.

    Args:
        kernel: one of `KERNELS`; q: [B, H, T, D]; k: [B, K, S, D].

    Raises:
        ValueError: a kernel that was asked for and cannot serve; says why.
    """
    if kernel == "plain":
        return "plain"
    if kernel == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "plain")
        return "plain" if kernel == "plain" or _hindrance(kernel, q, k) else kernel
    hindrance = _hindrance(kernel, q, k)
    if hindrance:
        raise ValueError(f"attention={kernel!r}: {hindrance}")
    return kernel


def _hindrance(kernel, q, k):
    """Why a kernel does not serve, empty where it does."""
    shape, heads, length = activation_ways(), k.shape[-3], q.shape[-2]
    if k.ndim != 4 or length != k.shape[-2]:
        return "keys and queries must be of the same positions"
    if q.shape[0] % shape["batch"] or heads % shape["heads"]:
        return (
            f"batch {q.shape[0]} and {heads} key heads are not divisible by the mesh's "
            f"{shape['batch']} x {shape['heads']}"
        )
    if kernel == "splash":
        if length % (LANES * shape["length"]):
            return f"{length} positions are not a multiple of {LANES} x context {shape['length']}"
        if q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"dtype {q.dtype} is neither bfloat16 nor float32"
    if kernel == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"dtype {q.dtype} is not of 16 bits"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"{q.shape[-1]} head channels are not a multiple of 8 up to 128"
        if shape["length"] > 1:
            return "positions cut over `context` are not supported"
    return ""


def attend(
    kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """softmax(q k) v, causal inside segments, by `splash` or `cudnn`; [B, H, T, D].

    Args:
        q: [B, H, T, D], scaled; k, v: [B, K, T, D]; segments: int32 [B, T] or None.
    """
    if kernel == "splash":
        return _splash(q, k, v, segments, interpret=platform() != "tpu")
    return library(q, k, v, segments, "cudnn")


def library(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, implementation: str
) -> jax.Array:
    """`attend` by jax.nn.dot_product_attention, which has `cudnn` and, everywhere, `xla`."""
    inside = None
    if segments is not None:
        inside = segments[:, None, :, None] == segments[:, None, None, :]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q, k, v, mask=inside, scale=1.0, is_causal=True, implementation=implementation
    )
    return mixed.swapaxes(1, 2)


def _splash(q, k, v, segments, interpret):
    # Heavy and only for this path: pallas takes a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
        splash_attention_mask as masks,
    )

    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    ways = activation_ways()
    heads, length = q.shape[1] // ways["heads"], q.shape[2]
    block = next(
        size for size in range(LARGEST_BLOCK, 0, -LANES) if (length // ways["length"]) % size == 0
    )
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = masks.CausalMask((length, length), shard_count=ways["length"])
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([causal] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=ways["length"],
        interpret=interpret,
    )

    def local(kernel, q, k, v, of_queries, of_keys):
        if of_queries is None:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(of_queries, of_keys))

    if alone:
        return local(kernel, q, k, v, segments, segments)
    # A kernel is opaque to the partitioner. Every device takes its own queries, with all the keys.
    spec = lambda *names: PartitionSpec(*(n and ACTIVATIONS[n] for n in names))
    queries, keys = spec("batch", "heads", "length"), spec("batch", "heads", None)
    marks = (None, None) if segments is None else (spec("batch", "length"), spec("batch"))
    of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, spec(None, "length")))
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(of_kernel, queries, keys, keys, *marks),
        out_specs=queries,
        check_vma=False,
    )
    return mapped(kernel, q, k, v, segments, segments)
