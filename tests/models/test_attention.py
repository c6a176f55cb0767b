"""The kernels of accelerators equal the plain path, by interpreter; what each can serve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax import mesh
from starflow2_jax.models import attention, layers


def arrays(batch=2, heads=4, kv_heads=2, length=256, channels=16):
    keys = jax.random.split(jax.random.key(0), 3)
    of = lambda key, n: jax.random.normal(key, (batch, n, length, channels))
    return of(keys[0], heads), of(keys[1], kv_heads), of(keys[2], kv_heads)


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


def with_gradients(function, *given):
    """Values and gradients of a weighted sum, so that no two positions count the same."""
    weighted = lambda *given: (function(*given) * jnp.cos(jnp.arange(given[0].size)).reshape(
        given[0].shape)).sum()  # fmt: skip
    return function(*given), jax.grad(weighted, argnums=(0, 1, 2))(*given)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert float(jnp.abs(a - b).max()) < tolerance * max(1.0, float(jnp.abs(b).max()))


@pytest.mark.fast
@pytest.mark.parametrize("length", [128, 96, 50])
def test_segments_are_the_mask_that_they_say(length):
    """With the queries in parts (128, 96) and whole (50)."""
    given, segments = arrays(length=length), packed()[:, 30 : 30 + length]
    ours = attention.grouped_query_attention(*given, None, 1.3, segments)
    np.testing.assert_array_equal(
        ours.shape, attention.grouped_query_attention(*given, as_mask(segments), 1.3).shape
    )
    assert_close(ours, attention.grouped_query_attention(*given, as_mask(segments), 1.3), 1e-6)
    whole = attention.grouped_query_attention(*given, None, 1.3, jnp.ones_like(segments))
    assert_close(whole, attention.grouped_query_attention(*given, None, 1.3), 1e-6)
    assert float(jnp.abs(ours - whole).max()) > 0.1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kernel", ["splash", "xla"])
def test_kernels_equal_the_plain_path(kernel, packing):
    """Values and gradients; `xla` stands for cuDNN, which is the same call on a GPU."""
    given, segments = arrays(), packed() if packing else None
    plain = lambda q, k, v: attention.grouped_query_attention(q, k, v, None, 1.3, segments)
    if kernel == "splash":
        other = lambda q, k, v: attention.grouped_query_attention(
            q, k, v, None, 1.3, segments, "splash"
        )
    else:
        scale = 1 / (1.3 * given[0].shape[-1] ** 0.5)
        other = lambda q, k, v: attention.dot_product_attention(q * scale, k, v, segments, "xla")
    assert_close(with_gradients(other, *given), with_gradients(plain, *given), 2e-5)


@pytest.mark.parametrize("sizes", ["data=2,tensor=2,fsdp=2", "fsdp=4,context=2"])
def test_kernels_and_segments_on_a_mesh(sizes):
    """Heads cut over tensor, positions over context: queries are cut, keys are whole."""
    given, segments = arrays(batch=4), jnp.tile(packed(), (2, 1))
    expected = with_gradients(
        lambda *g: attention.grouped_query_attention(*g, None, 1.0, segments), *given
    )
    with jax.set_mesh(mesh.make_mesh(sizes)):
        for kernel in ("plain", "splash"):
            own = lambda *g, k=kernel: attention.grouped_query_attention(*g, None, 1.0, segments, k)
            # Compiled: an eager shard_map takes many times as long.
            assert_close(jax.jit(lambda *g: with_gradients(own, *g))(*given), expected, 2e-5)  # noqa: B023


def test_a_layer_takes_segments():
    cfg = layers.LayerConfig(32, 4, 2, 8, 64)
    from starflow2_jax.params import init as init_params

    params = init_params(jax.random.key(0), layers.declare(cfg, 3))
    h, segments = jax.random.normal(jax.random.key(1), (2, 64, 32)), packed(length=64)
    ours, _ = layers.apply_layers(params, h, cfg, None, remat="full", segments=segments)
    assert_close(ours, layers.apply_layers(params, h, cfg, None, as_mask(segments))[0], 1e-5)
    with pytest.raises(ValueError, match="segments require mask=None"):
        layers.apply_layers(params, h, cfg, None, as_mask(segments), segments=segments)


def test_kernels_are_selected_by_what_they_support():
    q, k, _ = arrays()
    assert attention.select_kernel("auto", q, k) == "plain"  # this is a CPU
    assert attention.select_kernel("splash", q, k) == "splash"
    for kernel, given, words in (
        ("splash", arrays(length=100), "100 positions are not a multiple of 128 x context 1"),
        ("cudnn", arrays(), "dtype float32 is not of 16 bits"),
        ("splash", (q, k[:, :, :128]), "of the same positions"),
    ):
        with pytest.raises(ValueError, match=f"attention='{kernel}': .*{words}"):
            attention.select_kernel(kernel, *given[:2])
    with jax.set_mesh(mesh.make_mesh("tensor=8")), pytest.raises(ValueError, match="key heads"):
        attention.select_kernel("splash", q, k)
    with pytest.raises(ValueError, match="attention='flash' is not one of"):
        layers.LayerConfig(32, 4, 2, 8, 64, attention="flash")
