"""Declared weights: born by name, born sharded, counted exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax import params
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import flow
from starflow2_jax.params import ParamSpec, fan_in, normal, ones, zeros

pytestmark = pytest.mark.fast

TREE = {
    "blocks": {
        "0": {
            "weight": ParamSpec((64, 256), ("embed", "mlp")),
            "bias": ParamSpec((256,), ("mlp",), zeros),
        },
        "1": {"weight": ParamSpec((64, 256), ("embed", "mlp"))},
    },
    "start": ParamSpec((32,), (None,), normal(0.5)),
    "scale": ParamSpec((), (), ones),
}


def assert_equal(actual, expected):
    actual, expected = params.flatten(actual), params.flatten(expected)
    assert list(actual) == list(expected)
    for name, array in actual.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), err_msg=name)


def test_a_weight_depends_on_the_seed_and_its_own_name_alone():
    tree = params.init(jax.random.key(0), TREE)
    assert_equal(params.init(jax.random.key(0), TREE), tree)
    fewer = {"blocks": {"1": TREE["blocks"]["1"]}, "other": ParamSpec((4, 4), (None, None))}
    again = params.init(jax.random.key(0), fewer)
    np.testing.assert_array_equal(again["blocks"]["1"]["weight"], tree["blocks"]["1"]["weight"])
    # Equal shapes of other names, and equal names of another seed, have other values.
    assert (tree["blocks"]["0"]["weight"] != tree["blocks"]["1"]["weight"]).mean() > 0.99
    other = params.init(jax.random.key(1), TREE)
    assert (tree["start"] != other["start"]).all()


def test_initial_distributions():
    tree = params.init(jax.random.key(0), TREE)
    weight = np.asarray(tree["blocks"]["0"]["weight"])
    assert np.abs(weight).max() <= 1 / 8 and np.abs(weight).max() > 0.99 / 8
    assert weight.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert not np.asarray(tree["blocks"]["0"]["bias"]).any()
    assert float(tree["scale"]) == 1
    assert np.asarray(tree["start"]).std() == pytest.approx(0.5, rel=0.4)
    # The inputs are the last dimension but one, also where layers are stacked before them.
    stacked = fan_in(jax.random.key(0), (3, 16, 4), jnp.float32)
    assert 0.24 < np.abs(stacked).max() <= 0.25


def test_dtype_of_init_and_abstract(x64):
    for dtype in (jnp.bfloat16, jnp.float64):
        tree = params.init(jax.random.key(0), TREE, dtype)
        shapes = params.abstract(TREE, dtype=dtype)
        pairs = zip(params.flatten(tree).values(), params.flatten(shapes).values())
        for array, shape in pairs:
            assert array.dtype == shape.dtype == dtype and array.shape == shape.shape


@pytest.mark.parametrize(
    "layout, sizes", [("dp", "data=8"), ("fsdp", "fsdp=8"), ("fsdp_tp", "fsdp=4,tensor=2")]
)
def test_initialized_shards_have_the_values_of_one_device(layout, sizes):
    mesh = make_mesh(sizes)
    shardings = params.shardings(TREE, mesh, layout)
    build = jax.jit(lambda key: params.init(key, TREE), out_shardings=shardings)
    compiled = build.lower(jax.random.key(0)).compile()
    tree = compiled(jax.random.key(0))
    assert_equal(tree, params.init(jax.random.key(0), TREE))
    abstract = params.flatten(params.abstract(TREE, mesh, layout))
    for name, array in params.flatten(tree).items():
        assert array.sharding == abstract[name].sharding
        assert array.shape == abstract[name].shape and array.dtype == abstract[name].dtype
    cut = {"dp": (64, 256), "fsdp": (8, 256), "fsdp_tp": (16, 128)}[layout]
    for block in ("0", "1"):
        array = tree["blocks"][block]["weight"]
        assert {shard.data.shape for shard in array.addressable_shards} == {cut}
    if layout != "dp":
        # No device ever holds a whole weight, 64 KiB: neither as output nor on the way.
        memory = compiled.memory_analysis()
        assert memory.output_size_in_bytes < 32 << 10 and memory.temp_size_in_bytes < 64 << 10


def test_flatten_split_count_table():
    flat = params.flatten(TREE)
    assert list(flat) == ["blocks/0/bias", "blocks/0/weight", "blocks/1/weight", "scale", "start"]
    assert params.unflatten(flat) == TREE
    total = 2 * 64 * 256 + 256 + 32 + 1
    assert params.count(TREE) == total == params.count(params.init(jax.random.key(0), TREE))
    assert params.count(params.abstract(TREE)) == total
    chosen, rest = params.split(TREE, ("blocks",))
    assert list(chosen) == ["blocks"] and sorted(rest) == ["scale", "start"]
    assert params.split(TREE, ()) == ({}, TREE)
    lines = params.table(TREE, lambda name: "frozen" if name == "start" else "")
    assert lines[1].split() == ["blocks/0/weight", "64x256", "16,384"]
    assert lines[3].split() == ["scale", "scalar", "1"]
    assert lines[4].split() == ["start", "32", "32", "frozen"]
    assert lines[-1].split() == ["total", f"{total:,}"]


def test_bad_declarations_and_names():
    with pytest.raises(ValueError, match=r"1 axes \('embed',\) for shape \(2, 3\)"):
        ParamSpec((2, 3), ("embed",))
    with pytest.raises(ValueError, match="no subtree 'vlm'; there are blocks, scale, start"):
        params.split(TREE, ("blocks", "vlm"))
    with pytest.raises(ValueError, match=r"weight blocks/0/bias has 256 in dimension 0 \(mlp\)"):
        params.shardings(TREE, make_mesh("tensor=3", jax.devices()[:3]), "tp")


def test_the_released_model_has_exactly_its_parameters():
    assert params.count(flow.declare(flow.starflow_3b())) == 3_858_281_544


def test_tarflow_counts_by_hand():
    """Blocks of l layers: l (12 C^2 + 13 C) + (D + 1) C + (C + 1) 2 D + T C (+ classes C)."""
    tokens, channels, width, depth, classes = 1024, 12, 768, 8, 7
    layer = 12 * width**2 + 13 * width
    ends = (channels + 1) * width + (width + 1) * 2 * channels + tokens * width
    cfg = flow.tarflow(32, channels, width, (depth,) * 8, classes=classes)
    assert params.count(flow.declare(cfg)) == 8 * (depth * layer + ends + classes * width)
