"""The weights of a CPU's decode steps, in panels, compute what the trained layout computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax import params
from starflow2_jax.inference import inverse
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.models import cpu_layout, flow, layers
from starflow2_jax.models.flow import Conditioning, FlowConfig

# Widths of whole panels, as in models of the usual sizes; the other tests' flows are narrower.
CFG = FlowConfig(
    side=4,
    channels=3,
    width=3 * cpu_layout.PANEL,
    layers=(1, 2),
    head_dim=32,
    gated_mlp=True,
    text_channels=5,
    text_length=6,
)


def model(seed=0):
    """Return random parameters and the inputs of two rows."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, spec in params.flatten(flow.declare(CFG)).items():
        arrays[name] = jnp.asarray(0.1 * rng.standard_normal(spec.shape).astype(np.float32))
    z = rng.standard_normal((2, 16, 3)).astype(np.float32)
    text = rng.standard_normal((2, 6, 5)).astype(np.float32)
    return params.unflatten(arrays), z, text


@pytest.mark.fast
@pytest.mark.parametrize("rows", [1, 2, 8, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_panels_multiply_as_the_weight_does(rows, dtype):
    rng = np.random.default_rng(0)
    names = {name: (64, 64) for name in ("query", "key", "value", "mlp_up")}
    tree = {
        name: {"weight": jnp.asarray(rng.standard_normal((1, *shape)), jnp.float32)}
        for name, shape in {**names, "out": (64, 128), "mlp_down": (192, 96)}.items()
    }
    (layer,) = layers.unstack(tree)
    assert layer["query_key_value"]["panels"].shape == (3, 64, 64)
    assert layer["out"]["panels"].shape == (2, 64, 64)
    assert "weight" in layer["mlp_down"]  # 96 columns are no whole panels
    x = jnp.asarray(rng.standard_normal((rows, 64)), dtype)
    expected = [x @ tree[name]["weight"][0].astype(dtype) for name in ("query", "key", "value")]
    actual = layers.linear(layer["query_key_value"], x)
    assert actual.dtype == dtype
    tolerance = 2e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(
        actual.astype(np.float32), jnp.concatenate(expected, -1).astype(np.float32), atol=tolerance
    )


@pytest.mark.fast
@pytest.mark.parametrize("inputs", [192, 512, 768])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_panels_multiply_rows_of_usual_widths(rows, inputs):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((rows, inputs)), rng.standard_normal((inputs, 192))
    panels = jnp.asarray(weight.reshape(inputs, 3, 64).swapaxes(0, 1), jnp.float32)

    @jax.jit
    def steps(x, panels):  # As in a decode loop, the row is the result of another operation.
        step = lambda x, _: (jnp.tanh(x), cpu_layout.multiply_panels(jnp.tanh(x), panels))
        return jax.lax.scan(step, x, None, length=2)[1]

    x = jnp.asarray(x, jnp.float32)
    first = jax.jit(cpu_layout.multiply_panels)(x, panels)
    np.testing.assert_allclose(first, x @ weight, atol=1e-3)
    expected = np.tanh(np.tanh(np.asarray(x, np.float64))) @ weight
    np.testing.assert_allclose(steps(x, panels)[1], expected, atol=1e-3)


@pytest.mark.fast
def test_a_library_that_multiplies_wrongly_gets_no_panels(monkeypatch):
    right, check = cpu_layout.multiply_panels, cpu_layout.reads_panels.__wrapped__
    assert check() == cpu_layout.reads_panels()
    monkeypatch.setattr(cpu_layout, "multiply_panels", lambda x, panels: right(x, panels) * 1.01)
    assert not check()


def test_panels_are_read_by_the_library_of_xla():
    # Anywhere else this sum takes ten times as long as a matrix product.
    for rows in (1, 8):
        x, weight = jnp.ones((rows, 512)), jnp.ones((8, 512, cpu_layout.PANEL))
        program = jax.jit(cpu_layout.multiply_panels).lower(x, weight).compile()
        assert f"= f32[8,{max(rows, 2)},{cpu_layout.PANEL}]" in program.as_text()
        assert "__ynn_fusion" in program.as_text()


def test_a_machine_without_that_library_has_no_panels(monkeypatch):
    monkeypatch.setattr(cpu_layout, "reads_panels", lambda: False)
    tree, _, _ = model()
    (layer,) = layers.unstack(tree["blocks"]["0"]["layers"])
    assert layer["query_key_value"]["weight"].shape == (192, 576)


@pytest.mark.parametrize("options", [{}, {"guidance": Guidance(1.5)}, {"jacobi": Jacobi(4, 0.0)}])
def test_prepared_parameters_sample_the_same_as_trained_ones(options):
    tree, z, text = model()
    call = (z, CFG, Conditioning(text=text))
    x, _ = inverse.inverse(tree, *call, **options)
    prepared, _ = inverse.inverse(inverse.prepare_params(tree), *call, **options)
    np.testing.assert_allclose(prepared, x, atol=2e-5)
    if "guidance" not in options:
        back, _ = flow.forward(tree, x, CFG, Conditioning(text=text))
        np.testing.assert_allclose(back, z, atol=2e-4)


def test_a_row_alone_is_sampled_as_in_a_batch():
    tree, z, text = model()
    prepared = inverse.prepare_params(tree)
    batch, _ = inverse.inverse(prepared, z, CFG, Conditioning(text=text))
    for row in (slice(0, 1), slice(1, 2)):
        alone, _ = inverse.inverse(prepared, z[row], CFG, Conditioning(text=text[row]))
        np.testing.assert_allclose(alone, batch[row], atol=2e-5)


def test_a_cache_that_grows_changes_nothing(monkeypatch):
    tree, z, text = model()
    call = (inverse.prepare_params(tree), z[:1], CFG, Conditioning(text=text[:1]))
    full_cache, _ = inverse.inverse(*call)
    monkeypatch.setattr(inverse, "SEGMENT_STEPS", 5)
    jax.clear_caches()
    grown, _ = inverse.inverse(*call)
    np.testing.assert_allclose(grown, full_cache, atol=2e-5)
    assert inverse._segments(16) == [(0, 5), (5, 10), (10, 16)]
