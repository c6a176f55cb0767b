"""The layout of weights on a CPU changes no result and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.models import cpu_layout, layers, rope
from starflow2_jax.params import init as init_params

SIZES = {"width": 24, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_width": 16}
OPTIONS = {
    "interleaved": {},
    "half": {"rope_pairs": "half", "norm": "rms_norm"},
    "qk_norm": {"qk_norm": True, "qkv_bias": False, "post_norm": True},
}


def queries_keys_values(cfg, params, h, tables):
    """Return the scores, which do not depend on the order of a head's channels, and the values."""
    q, k, v = layers.project_qkv(params, h, cfg, tables)
    k = jnp.repeat(k, cfg.heads // cfg.kv_heads, 1)
    return jnp.einsum("bhtd,bhsd->bhts", q, k), v


@pytest.mark.fast
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rotates", [True, False])
def test_scores_values_and_gradients_stay(name, rotates, x64, monkeypatch):
    cfg = layers.LayerConfig(**SIZES, **OPTIONS[name])
    params = jax.tree.map(lambda w: w[0], init_params(jax.random.key(0), layers.declare(cfg, 1)))
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape, w.dtype), params
    )
    h = jax.random.normal(jax.random.key(1), (2, 5, cfg.width), jnp.float64)
    angles = np.random.default_rng(0).uniform(0, 6, (2, 5, cfg.head_dim // 2))
    tables = rope.tables(angles, jnp.float64) if rotates else None

    def loss(params, h):
        return sum((a * jnp.cos(jnp.arange(a.size).reshape(a.shape))).sum() for a in
                   queries_keys_values(cfg, params, h, tables))  # fmt: skip

    def results():
        both = jax.jit(lambda p, h: (queries_keys_values(cfg, p, h, tables), jax.grad(loss)(p, h)))
        return both(params, h)

    actual = results()
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    expected = results()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.fast
def test_pairs_become_halves():
    layer = {name: {"weight": jnp.arange(8.0)[None]} for name in ("query", "key", "value")}
    permuted = cpu_layout.with_half_pairs(layer, 4)
    assert permuted["query"]["weight"].tolist() == [[0, 2, 1, 3, 4, 6, 5, 7]]
    assert permuted["value"] is layer["value"]


@pytest.mark.fast
def test_gelu_has_the_slope_of_its_definition(x64):
    x = jnp.linspace(-6, 6, 101)
    expected = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    gelu = layers._ACTIVATIONS["gelu"]
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), expected, atol=1e-14)
    np.testing.assert_allclose(jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1], expected, atol=1e-14)
    assert jax.grad(lambda x: gelu(x).sum())(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
