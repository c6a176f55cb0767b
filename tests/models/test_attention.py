"""Attention kernels equal the plain path (run in an interpreter), and support what they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax import mesh
from starflow2_jax.models import attention, layers
from starflow2_jax.models.attention import grouped_query_attention
from starflow2_jax.params import init as init_params


def arrays(batch=2, heads=4, kv_heads=2, length=256, channels=16):
    keys = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, n: jax.random.normal(key, (batch, n, length, channels))
    return normal(keys[0], heads), normal(keys[1], kv_heads), normal(keys[2], kv_heads)


def packed(batch=2, length=256):
    """Two, then three segments and padding at the end."""
    segments = np.zeros((batch, length), np.int32)
    for row, ends in enumerate([(100, 200), (37, 130, 250)][:batch]):
        start = 0
        for number, end in enumerate(ends, 1):
            segments[row, start:end], start = number, end
    return jnp.asarray(segments)


def as_mask(segments):
    return np.tri(segments.shape[1], dtype=bool) & (segments[:, :, None] == segments[:, None, :])


def with_gradients(function, *qkv):
    """Values and gradients of a weighted sum, so that no two positions count the same."""
    weighted = lambda *qkv: (function(*qkv) * jnp.cos(jnp.arange(qkv[0].size)).reshape(
        qkv[0].shape)).sum()  # fmt: skip
    return function(*qkv), jax.grad(weighted, argnums=(0, 1, 2))(*qkv)


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(a - b).max()) < tolerance * max(1.0, float(jnp.abs(b).max()))


@pytest.mark.fast
@pytest.mark.parametrize("length", [128, 96, 50])
def test_segments_equal_the_mask_they_describe(length):
    """With the queries in parts (128, 96) and one_segment (50)."""
    qkv, segments = arrays(length=length), packed()[:, 30 : 30 + length]
    packed_output = grouped_query_attention(*qkv, None, 1.3, segments)
    np.testing.assert_array_equal(
        packed_output.shape, grouped_query_attention(*qkv, as_mask(segments), 1.3).shape
    )
    assert_close(packed_output, grouped_query_attention(*qkv, as_mask(segments), 1.3), 1e-6)
    one_segment = grouped_query_attention(*qkv, None, 1.3, jnp.ones_like(segments))
    assert_close(one_segment, grouped_query_attention(*qkv, None, 1.3), 1e-6)
    assert float(jnp.abs(packed_output - one_segment).max()) > 0.1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kernel", ["splash", "xla"])
def test_kernels_equal_the_plain_path(kernel, packing):
    """Values and gradients; `xla` stands for cuDNN, which is the same call on a GPU."""
    qkv, segments = arrays(), packed() if packing else None
    plain_output = lambda q, k, v: grouped_query_attention(q, k, v, None, 1.3, segments)
    if kernel == "splash":
        kernel_output = lambda q, k, v: grouped_query_attention(
            q, k, v, None, 1.3, segments, "splash"
        )
    else:
        scale = 1 / (1.3 * qkv[0].shape[-1] ** 0.5)
        kernel_output = lambda q, k, v: attention.dot_product_attention(
            q * scale, k, v, segments, "xla"
        )
    assert_close(with_gradients(kernel_output, *qkv), with_gradients(plain_output, *qkv), 2e-5)


@pytest.mark.parametrize(
    "sizes", [pytest.param("data=2,tensor=2,fsdp=2", marks=pytest.mark.slow), "fsdp=4,context=2"]
)
def test_kernels_and_segments_on_a_mesh(sizes):
    """Heads are sharded over tensor, queries over context; keys are not sharded by position."""
    qkv, segments = arrays(batch=4), jnp.tile(packed(), (2, 1))
    expected = with_gradients(lambda *g: grouped_query_attention(*g, None, 1.0, segments), *qkv)
    with jax.set_mesh(mesh.make_mesh(sizes)):
        for kernel in ("plain", "splash"):
            attend = lambda *g, k=kernel: grouped_query_attention(*g, None, 1.0, segments, k)
            # Compiled: an eager shard_map takes many times as long.
            assert_close(jax.jit(lambda *g: with_gradients(attend, *g))(*qkv), expected, 2e-5)  # noqa: B023


def test_a_layer_takes_segments():
    cfg = layers.LayerConfig(32, 4, 2, 8, 64)
    params = init_params(jax.random.key(0), layers.declare(cfg, 3))
    h, segments = jax.random.normal(jax.random.key(1), (2, 64, 32)), packed(length=64)
    with_segments, _ = layers.apply_layers(params, h, cfg, None, remat="full", segments=segments)
    assert_close(
        with_segments, layers.apply_layers(params, h, cfg, None, as_mask(segments))[0], 1e-5
    )
    with pytest.raises(ValueError, match="segments require mask=None"):
        layers.apply_layers(params, h, cfg, None, as_mask(segments), segments=segments)


def test_kernels_are_selected_by_what_they_support():
    q, k, _ = arrays()
    assert attention.select_kernel("auto", q, k) == "plain"  # this is a CPU
    assert attention.select_kernel("splash", q, k) == "splash"
    for kernel, qkv, words in (
        ("splash", arrays(length=100), "100 positions are not a multiple of 128 x context 1"),
        ("cudnn", arrays(), "dtype float32 is not of 16 bits"),
        ("splash", (q, k[:, :, :128]), "of the same positions"),
    ):
        with pytest.raises(ValueError, match=f"attention='{kernel}': .*{words}"):
            attention.select_kernel(kernel, *qkv[:2])
    with jax.set_mesh(mesh.make_mesh("tensor=8")), pytest.raises(ValueError, match="key heads"):
        attention.select_kernel("splash", q, k)
    with pytest.raises(ValueError, match="attention='flash' is not one of"):
        layers.LayerConfig(32, 4, 2, 8, 64, attention="flash")
