"""Meshes and layouts: every large weight is cut where the layout says, also at full size."""

import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import EXPERIMENTS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from starflow2_jax import config, params
from starflow2_jax.mesh import (
    batch_sharding,
    check_batch,
    constrain,
    constrain_states,
    gather_weight,
    make_mesh,
    parse_mesh,
    replicated,
    weight_spec,
)
from starflow2_jax.training.tasks import registry


@pytest.mark.fast
def test_parse_mesh():
    assert parse_mesh("data=2, fsdp=-1") == {"data": 2, "fsdp": -1}
    assert parse_mesh("") == {}
    for bad in ("data", "data=", "data=two", "2", "data=--2"):
        with pytest.raises(ValueError, match=f"mesh: '{bad}' is not axis=size"):
            parse_mesh(bad)
    with pytest.raises(ValueError, match="axis 'data' is named twice in 'data=2,data=4'"):
        parse_mesh("data=2,data=4")


@pytest.mark.fast
def test_make_mesh():
    mesh = make_mesh("data=2,fsdp=-1")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert dict(make_mesh().shape)["data"] == 8
    assert make_mesh({"tensor": 2}, jax.devices()[:2]).devices.size == 2
    for sizes, words in (
        ("data=2,model=4", "unknown axis 'model'; the axes are data, fsdp, context, tensor"),
        ("data=-1,fsdp=-1", "at most one of them -1"),
        ("data=0", "sizes must be positive"),
        ("data=-2", "sizes must be positive"),
        ("data=4", "needs 4 devices, 8 are there"),
        ("data=3,fsdp=-1", "'data': 3, 'fsdp': 2.* needs 6 devices, 8 are there"),
        ("data=16", "needs 16 devices, 8 are there"),
    ):
        with pytest.raises(ValueError, match=words):
            make_mesh(sizes)


@pytest.mark.fast
def test_weight_spec_and_its_errors():
    mesh = make_mesh("fsdp=4,tensor=2")
    weight = ("mlp_up", (2, 16, 64), ("layers", "embed", "mlp"), mesh)
    assert weight_spec(*weight, "dp") == PartitionSpec(None, None, None)
    assert weight_spec(*weight, "fsdp") == PartitionSpec(None, "fsdp", None)
    assert weight_spec(*weight, "tp") == PartitionSpec(None, None, "tensor")
    assert weight_spec(*weight, "fsdp_tp") == PartitionSpec(None, "fsdp", "tensor")
    # Where there is no `embed` to cut, fsdp cuts `mlp`.
    bias = ("mlp_up", (2, 64), ("layers", "mlp"), mesh)
    assert weight_spec(*bias, "fsdp") == PartitionSpec(None, "fsdp")
    assert weight_spec(*bias, "fsdp_tp") == PartitionSpec(None, "tensor")
    with pytest.raises(ValueError, match="'fdsp' is not one of dp, fsdp, tp, fsdp_tp, hybrid"):
        weight_spec(*weight, "fdsp")
    with pytest.raises(
        ValueError,
        match=r"layout 'fsdp': weight mlp_up has 18 in dimension 1 \(embed\), which mesh axis "
        r"'fsdp' of size 4 does not divide",
    ):
        weight_spec("mlp_up", (2, 18, 64), weight[2], mesh, "fsdp")


def test_batches_are_cut_over_data_and_fsdp():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    rows = jax.device_put(np.zeros((8, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
    copies = jax.device_put(np.zeros((8, 3)), replicated(mesh))
    assert {shard.data.shape for shard in copies.addressable_shards} == {(8, 3)}
    check_batch(12, mesh)
    with pytest.raises(
        ValueError, match=r"train.batch_size=10 is not divisible by data x fsdp = 2 x 2 = 4"
    ):
        check_batch(10, mesh)


@pytest.mark.fast
def test_constrain():
    x = jnp.zeros((4, 2, 6))
    assert constrain(x, "batch", "length", "mlp") is x
    with jax.set_mesh(make_mesh("data=2,tensor=-1")):
        y = jax.jit(lambda x: constrain(x, "batch", None, None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2, 6)}
    with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
        assert constrain(x, "batch") is x


@pytest.mark.fast
def test_states_are_cut_by_position_where_tensor_divides_them():
    with jax.set_mesh(make_mesh("data=2,context=2,tensor=2")):
        cut = jax.jit(constrain_states)
        assert {s.data.shape for s in cut(jnp.zeros((2, 8, 6))).addressable_shards} == {(1, 2, 6)}
        assert {s.data.shape for s in cut(jnp.zeros((2, 6, 6))).addressable_shards} == {(1, 3, 6)}


@pytest.mark.fast
def test_a_weight_is_gathered_at_once_and_its_gradient_scattered():
    mesh = make_mesh("fsdp=4,tensor=2")
    axes = ("embed", "mlp")
    w = np.arange(16 * 6.0, dtype=np.float32).reshape(16, 6)
    x = np.linspace(-1, 1, 8 * 16, dtype=np.float32).reshape(8, 16)

    def loss(w, x):
        return jnp.square(x @ gather_weight(w, axes)).sum()

    expected = jax.grad(loss)(w, x)  # without a mesh, nothing is gathered
    shard = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    w, x = jax.device_put(w, shard), jax.device_put(x, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
        gathered = jax.jit(lambda w: gather_weight(w, axes))(w)
        odd = jax.jit(lambda w: gather_weight(w, axes))(np.zeros((16, 5), np.float32))
    gradient = compiled(w, x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert gradient.sharding.is_equivalent_to(shard, 2)
    assert {s.data.shape for s in gathered.addressable_shards} == {(16, 3)}
    assert {s.data.shape for s in odd.addressable_shards} == {(16, 5)}
    text = compiled.as_text()
    assert text.count(" all-gather(") == 1 and " collective-permute(" not in text


# -------------------------------------------------------------------- the released 3B model

MESHES = {
    "dp": "data=8",
    "fsdp": "fsdp=8",
    "fsdp_tp": "fsdp=4,tensor=2",
    "tp": "tensor=8",
    "hybrid": "data=2,fsdp=4",
}

# Written out by hand: the dimensions of a large weight that fsdp=8, fsdp=4 x tensor=2 and tensor=8
# cut, and into how many parts.
CUT = {
    r".*/layers/(query|key|value|mlp_up)/weight": ({1: 8}, {1: 4, 2: 2}, {2: 8}),
    r".*/layers/(out|mlp_down)/weight": ({2: 8}, {2: 4, 1: 2}, {1: 8}),
    r".*/layers/mlp_up/bias": ({1: 8}, {1: 2}, {1: 8}),
    r".*/proj_text/weight": ({1: 8}, {1: 4, 0: 2}, {0: 8}),
}


def expected_shard(name, shape, layout):
    if layout == "dp":
        return shape
    cuts = next(cut for pattern, cut in CUT.items() if re.fullmatch(pattern, name))
    if layout == "hybrid":
        cuts = [{dimension: 4 for dimension in cuts[0]}]
    parts = cuts[("fsdp", "fsdp_tp", "tp").index(layout) if len(cuts) > 1 else 0]
    return tuple(size // parts.get(dimension, 1) for dimension, size in enumerate(shape))


@pytest.mark.parametrize("layout", MESHES)
def test_3b_train_step_lowers_and_is_cut_as_the_layout_says(layout):
    get_config = runpy.run_path(str(EXPERIMENTS / "starflow_t2i.py"))["get_config"]
    cfg = get_config("3b")
    cfg.layout, cfg.mesh = layout, MESHES[layout]
    config.check(cfg)
    mesh = make_mesh(cfg.mesh)
    program = registry.build(config.to_dict(cfg), mesh)
    state = program.abstract_state
    assert params.count(state.params) == 3_858_281_544
    moments = state.opt_state[1][0]
    large = 0
    for tree in (state.params, state.ema, moments.mu, moments.nu):
        per_device = 0
        for name, leaf in params.flatten(tree).items():
            shard = leaf.sharding.shard_shape(leaf.shape)
            per_device += 4 * int(np.prod(shard))
            if 4 * int(np.prod(leaf.shape)) > 1 << 20:
                large += 1
                assert shard == expected_shard(name, leaf.shape, layout), name
        total = 4 * params.count(tree)
        # All but norms, biases and the two ends: an eighth on each device, a quarter in `hybrid`.
        num_shards = 4 if layout == "hybrid" else 8
        assert per_device == total if layout == "dp" else per_device < 1.01 * total / num_shards
    assert large >= 4 * (6 * 6 + 1)
    for leaf in jax.tree.leaves(program.abstract_batch):
        num_shards = {"dp": 8, "fsdp": 8, "fsdp_tp": 4, "tp": 1, "hybrid": 8}[layout]
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 1024 // num_shards
    lowered = program.lower_step()
    out, metrics = lowered.out_info
    assert jax.tree.map(lambda a: (a.shape, a.dtype), out) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert metrics["loss"].shape == ()
