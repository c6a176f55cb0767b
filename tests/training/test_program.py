"""The training program: equal on every mesh, exact accumulation, nothing changed by a bad step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_flow import ROWS, batch_of, experiment

from starflow2_jax import mesh
from starflow2_jax.checkpoints import orbax
from starflow2_jax.inference.inverse import inverse
from starflow2_jax.models import flow
from starflow2_jax.models.patches import to_pixels
from starflow2_jax.training import preprocess
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import flow as flow_task, registry


def run(cfg, steps=5, devices=None, batches=None):
    """(losses, state) after some steps from the seed of the configuration."""
    devices = jax.devices()[:1] if devices is None else devices
    grid = mesh.make_mesh(cfg["mesh"], devices)
    with jax.set_mesh(grid):
        program = registry.build(cfg, grid)
        state, frozen = program.init(jax.random.key(cfg["seed"]))
        losses = []
        for i in range(steps):
            batch = to_device(program, batches[i] if batches else batch_of(seed=i))
            state, metrics = program.step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state, metrics


@pytest.fixture(scope="module")
def one_device():
    return run(experiment())[0]


@pytest.mark.parametrize(
    "layout, sizes",
    [
        ("dp", "data=8"),
        ("fsdp", "fsdp=8"),
        ("tp", "tensor=8"),
        ("fsdp_tp", "data=2,fsdp=2,tensor=2"),
        pytest.param("hybrid", "data=2,fsdp=4", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(one_device, layout, sizes):
    cfg = experiment(layout=layout, mesh=sizes)
    losses, state, _ = run(cfg, devices=jax.devices())
    np.testing.assert_allclose(losses, one_device, rtol=1e-5, atol=1e-5)
    assert losses[-1] != losses[0]
    up = state.params["flow"]["blocks"]["0"]["layers"]["mlp_up"]["weight"]
    local_size = up.addressable_shards[0].data.size
    shards = {"dp": 1, "fsdp": 8, "tp": 8, "fsdp_tp": 4, "hybrid": 4}[layout]
    assert local_size * shards == up.size
    moments = jax.tree.leaves(state.opt_state)
    assert any(m.shape == up.shape and m.sharding == up.sharding for m in moments)


def test_positions_over_context_equal_one_device(one_device):
    cfg = experiment(layout="fsdp", mesh="fsdp=4,context=2")
    losses, _, _ = run(cfg, devices=jax.devices())
    np.testing.assert_allclose(losses, one_device, rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_microbatches_equal_the_whole_batch(one_device):
    losses, _, _ = run(experiment(**{"train.microbatches": 4}))
    np.testing.assert_allclose(losses, one_device, rtol=1e-5, atol=1e-5)


def test_microbatches_on_a_mesh_equal_the_whole_batch(one_device):
    cfg = experiment(**{"train.microbatches": 2, "layout": "fsdp", "mesh": "fsdp=8"})
    losses, _, _ = run(cfg, devices=jax.devices())
    np.testing.assert_allclose(losses, one_device, rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_a_step_that_is_not_finite_changes_no_weight():
    cfg = experiment()
    grid = mesh.make_mesh("data=1", jax.devices()[:1])
    program = registry.build(cfg, grid)
    with jax.set_mesh(grid):
        state, frozen = program.init(jax.random.key(0))
        head = state.params["flow"]["blocks"]["1"]["proj_out"]
        head["bias"] = head["bias"].at[0].set(-2000.0)  # exp(2000) overflows
        host_before = jax.tree.map(np.asarray, (state.params, state.ema, state.opt_state))
        new_state, metrics = program.step(state, frozen, to_device(program, batch_of()))
    assert not metrics["finite"] and int(new_state.step) == 1
    host_after = jax.tree.map(np.asarray, (new_state.params, new_state.ema, new_state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, host_after, host_before)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"start": "token", "positions": "rope", "scale": "softplus", "soft_clip": 4.0},
    ],
    ids=["tarflow", "starflow"],
)
def test_trained_weights_invert_in_float32(kind):
    """After forty steps: the first weights are nearly the identity and would prove nothing."""
    cfg = experiment(**{"train.steps": 40, "image.flip": False})
    cfg["model"] |= kind
    _, state, _ = run(cfg, steps=40, batches=[batch_of()] * 40)
    model, batch = flow_task.model_config(cfg), batch_of(seed=1)
    keys = preprocess.row_keys(0, 0, jnp.arange(ROWS))
    image = {"image": batch["image"]}
    x = preprocess.tokens(image, keys, cfg, False)
    conditioning = flow.Conditioning(labels=jnp.asarray(batch["label"]))
    z, log_det = flow.forward(state.params["flow"], x, model, conditioning)
    assert float(jnp.abs(z - x).max()) > 0.5 and float(jnp.abs(log_det).min()) > 0.1
    back, _ = inverse(state.params["flow"], z, model, conditioning)
    np.testing.assert_allclose(np.asarray(back), np.asarray(x), rtol=1e-5, atol=1e-5)


def test_frozen_weights_stay_bit_for_bit_and_have_no_moments():
    plain = experiment()
    plain["text"]["vocabulary"] = 257
    plain["model"] |= {"text_channels": 8, "text_length": 6, "classes": 0, "start": "token"}
    grid = mesh.make_mesh("data=1", jax.devices()[:1])
    program = registry.build(plain, grid)
    with jax.set_mesh(grid):
        state, frozen = program.init(jax.random.key(0))
        before = np.asarray(frozen["text"]["embed"])
        tokens = np.tile(np.arange(6, dtype=np.int32), (ROWS, 1))
        batch = to_device(program, {**batch_of(), "tokens": tokens})
        for _ in range(3):
            state, metrics = program.step(state, frozen, batch)
    assert metrics["finite"] and set(state.params) == {"flow"}
    np.testing.assert_array_equal(np.asarray(frozen["text"]["embed"]), before)
    assert not any(m.shape == before.shape for m in jax.tree.leaves(state.opt_state))


@pytest.mark.fast
def test_noise_of_a_row_depends_on_seed_step_and_row_alone():
    cfg = experiment()
    batch = {k: v for k, v in batch_of().items() if k != "id"}
    rows = jnp.arange(ROWS)
    expected = preprocess.tokens(batch, preprocess.row_keys(3, 7, rows), cfg, True)
    part = {k: v[5:9] for k, v in batch.items()}
    some = preprocess.tokens(part, preprocess.row_keys(3, 7, rows[5:9]), cfg, True)
    np.testing.assert_array_equal(expected[5:9], some)
    keys = [
        jax.random.key_data(preprocess.row_keys(*spec, rows)) for spec in ((3, 7), (3, 8), (4, 7))
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * ROWS
    other = preprocess.tokens(part, preprocess.row_keys(3, 8, rows[5:9]), cfg, True)
    assert float(jnp.abs(other - some).min(axis=(1, 2)).max()) > 0


@pytest.mark.fast
def test_drops_reach_the_asked_share_and_lose_text_and_label():
    keys = preprocess.row_keys(0, 0, jnp.arange(4000))
    batch = {"label": jnp.ones(4000, jnp.int32), "text": jnp.ones((4000, 2, 3))}
    null = jnp.full((2, 3), 5.0)
    spec = preprocess.conditions({}, batch, keys, 0.1, null)
    lost = np.asarray(spec.labels) == -1
    assert 0.08 < lost.mean() < 0.12
    np.testing.assert_array_equal(np.asarray(spec.text)[lost], 5.0)
    np.testing.assert_array_equal(np.asarray(spec.text)[~lost], 1.0)


def test_uniform_noise_is_the_dequantisation_of_bits_per_dim():
    cfg = experiment(**{"noise.kind": "uniform"})
    batch = {k: v for k, v in batch_of().items() if k != "id"}
    x = preprocess.tokens(batch, preprocess.row_keys(0, 0, jnp.arange(ROWS)), cfg, False)
    from starflow2_jax.models.patches import unpatchify

    pixels = unpatchify(x, (2, 2), 4, "channel_first")
    np.testing.assert_array_equal(to_pixels(pixels, "uniform"), batch["image"])


@pytest.mark.fast
def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    cfg = experiment(**{"train.batch_size": 12})
    with pytest.raises(ValueError, match=r"train.batch_size=12 .* 8 x 1 = 8"):
        registry.build(cfg, mesh.make_mesh("data=8"))


@pytest.mark.fast
@pytest.mark.parametrize(
    "batch, message",
    [
        ({"image": np.zeros((16, 8, 8, 3), np.uint8)}, "'label' is missing"),
        ({**batch_of(), "image": np.zeros((16, 9, 8, 3), np.uint8)}, r"\(9, 8, 3\), expected"),
    ],
)
def test_a_batch_of_another_shape_is_refused(batch, message):
    program = registry.build(experiment(), mesh.make_mesh("data=1", jax.devices()[:1]))
    with pytest.raises(ValueError, match=message):
        to_device(program, batch)


def test_the_state_is_donated_and_the_frozen_weights_are_not():
    cfg = experiment(**{"text.vocabulary": 257, "model.classes": 0, "model.start": "token"})
    cfg["model"] |= {"text_channels": 8, "text_length": 6}
    grid = mesh.make_mesh("fsdp=8")
    program = registry.build(cfg, grid)
    with jax.set_mesh(grid):
        state, frozen = program.init(jax.random.key(0))
        batch = to_device(program, {**batch_of(), "tokens": np.ones((ROWS, 6), np.int32)})
        compiled = program.lower_step().compile()
        new_state, _ = compiled(state, frozen, batch)
    # Weights, average and moments are written over in place; all that is left is small.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, batch)))
    sizes = compiled.memory_analysis()
    assert sizes.output_size_in_bytes - sizes.alias_size_in_bytes < 4096
    # Out of the step as into it: the next one takes its output without a copy.
    for spec, leaf in zip(jax.tree.leaves(program.abstract_state), jax.tree.leaves(new_state)):
        assert spec.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_a_checkpoint_of_eight_devices_goes_on_with_four_and_with_one(one_device, tmp_path):
    """Bit for bit the same state, and then the losses of a run without a break."""
    cfg = experiment(layout="fsdp", mesh="fsdp=-1")
    _, state, _ = run(cfg, 3, jax.devices())
    writer = orbax.open(tmp_path)
    orbax.save(writer, 3, state, {})
    orbax.close(writer)
    saved = jax.tree.map(np.asarray, state)
    for devices in (4, 1):
        grid = mesh.make_mesh("fsdp=-1", jax.devices()[:devices])
        program = registry.build(cfg, grid)
        restored, _ = orbax.restore(tmp_path, 3, program.abstract_state)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, restored), saved)
        with jax.set_mesh(grid):
            for i in (3, 4):
                batch = to_device(program, batch_of(seed=i))
                restored, metrics = program.step(restored, {}, batch)
                loss = float(metrics["loss"])
                np.testing.assert_allclose(loss, one_device[i], rtol=1e-5, atol=1e-5)


def test_evaluation_changes_nothing_and_masks_rows():
    cfg = experiment()
    grid = mesh.make_mesh("data=8")
    program = registry.build(cfg, grid)
    with jax.set_mesh(grid):
        state, frozen = program.init(jax.random.key(0))
        batch, ids = to_device(program, batch_of()), jnp.arange(ROWS)
        mask = (jnp.arange(ROWS) < 5).astype(jnp.float32)
        some = program.evaluate(state.params, frozen, batch, ids, mask)
        twice = program.evaluate(state.params, frozen, batch, ids, mask)
        rest = program.evaluate(state.params, frozen, batch, ids, 1 - mask)
        expected = program.evaluate(state.params, frozen, batch, ids, jnp.ones(ROWS))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert float(some["count"]) == 5 * 4 * 48
    for name in expected:
        assert float(some[name]) == float(twice[name])
        np.testing.assert_allclose(some[name] + rest[name], expected[name], rtol=1e-5, atol=1e-4)
