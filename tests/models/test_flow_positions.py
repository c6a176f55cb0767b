"""Positions of a flow: the place of queries and keys, frequencies of the grid, and copying."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import pretzel_batch

from starflow2_jax import params as parameters
from starflow2_jax.models import backbone, flow, rope
from starflow2_jax.models.backbone import BackboneInputs
from starflow2_jax.models.flow import Conditioning, FlowConfig

# ------------------------------------------------------------------------------------- coordinates


def coordinates(array):
    """Return coordinates as tuples of integers."""
    return [tuple(int(v) for v in row) for row in np.round(array).tolist()]


@pytest.mark.fast
@pytest.mark.parametrize("start", ["token", "shift", "prefix"])
def test_queries_stand_where_they_predict_and_keys_at_their_tokens(start):
    cfg = FlowConfig(
        side=2,
        channels=1,
        width=20,
        layers=(1, 1),
        head_dim=20,
        start=start,
        text_channels=1,
        text_length=2,
        key_positions="own",
    )
    patches = [(0, 0), (0, 1), (1, 0), (1, 1)]
    # In the deep block, behind two text tokens.
    queries, keys = flow.block_positions(cfg.block(-1), (2, 2), 2)
    if start == "prefix":
        assert coordinates(queries) == [(0, 0, 1), *((*p, 2) for p in patches)]
        assert coordinates(keys) == [(0, 0, 0), (0, 0, 1), *((*p, 2) for p in patches[:-1])]
    else:
        text = [(0, 0, 0), (0, 0, 1)]
        predicted, read = patches, [(0, -1), *patches[:-1]]
        if start == "shift":  # The last input predicts no token.
            predicted, read = [*patches[1:], (1, 2)], patches
        assert coordinates(queries) == [*text, *((*p, 0) for p in predicted)]
        assert coordinates(keys) == [*text, *((*p, 0) for p in read)]
    # In the shallow block, which reads no text; places are those of the sequence, also reversed.
    for index in range(2):
        block = flow.BlockConfig(**{**vars(cfg.block(0)), "reverse": bool(index)})
        queries, keys = flow.block_positions(block, (2, 2), 0)
        if start != "shift":
            assert coordinates(queries) == [(*p, 0) for p in patches]
            assert coordinates(keys) == [(0, -1, 0), *((*p, 0) for p in patches[:-1])]


@pytest.mark.fast
def test_larger_grids_are_interpolated():
    cfg = FlowConfig(side=2, channels=1, width=8, layers=(1,), head_dim=8, key_positions="own")
    queries, keys = flow.block_positions(cfg.block(0), (4, 4), 0)
    np.testing.assert_allclose(queries[:3], [[0, 0], [0, 0.5], [0, 1]])
    np.testing.assert_allclose(keys[:3], [[0, -0.5], [0, 0], [0, 0.5]])


@pytest.mark.fast
def test_items_of_packed_rows_stand_where_they_were_predicted():
    rows = [[pretzel_batch.EDIT, pretzel_batch.T2I], [pretzel_batch.REASON]]
    batch = pretzel_batch.batch(rows, length=64)
    inputs = BackboneInputs(
        *(None,) * 5, next_positions=batch["flow_positions"], segments=batch["segments"]
    )
    positions = np.asarray(backbone.item_positions(inputs))
    for b, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            record = segments == segment
            image = batch["image"][b, record]
            patch = np.maximum(image, 0) % pretzel_batch.PATCHES
            is_start = (image < 0) | (patch == 0)
            expected = [patch // 2, patch % 2, np.cumsum(is_start) - 1]
            np.testing.assert_array_equal(positions[b, record], np.stack(expected, -1))
    masked = inputs.replace(mask=np.ones((1, 1), bool))
    with pytest.raises(ValueError, match="item_positions is None"):
        backbone.item_positions(masked)


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"key_positions": "self"}, r"model\.key_positions='self' is not one of"),
        ({"rope_frequencies": "fine"}, r"model\.rope_frequencies='fine' is not one of"),
        (
            {"key_positions": "own", "positions": "learned"},
            r"model\.key_positions='own' needs model\.positions='rope'",
        ),
        (
            {"rope_frequencies": "grid", "positions": "learned"},
            r"model\.rope_frequencies='grid' needs model\.positions='rope'",
        ),
    ],
)
def test_impossible_positions_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        FlowConfig(side=2, channels=1, width=8, layers=(1,), head_dim=8, **changes)


# ------------------------------------------------------------------------------------- frequencies


def alignment(distance, head_dim, grid_side):
    """Return the mean cosine of the angles between two columns, the most that RoPE can score."""
    positions = np.array([[0, 0, 0], [0, distance, 0]], np.float64)
    first, second = rope.angles(positions, head_dim, grid_side)
    columns = slice((head_dim // 2 - 8) // 2, head_dim // 2 - 8)
    return np.cos(second - first)[columns].mean()


@pytest.mark.fast
def test_grid_frequencies_resolve_every_place_of_the_grid():
    np.testing.assert_allclose(rope.grid_frequencies(4, 8), np.pi / 8 * np.array([1, 2, 3, 4]))
    # No frequency turns further than half a circle from a place to the next one.
    np.testing.assert_allclose(rope.grid_frequencies(4, 2), np.pi / 4 * np.array([1, 2, 3, 4]))
    # The loss of score at a neighbor, of four pairs.
    assert 4 * (1 - alignment(1, 32, None)) == pytest.approx(0.465, abs=1e-3)
    assert 4 * (1 - alignment(1, 32, 8)) == pytest.approx(1.987, abs=1e-3)
    for distance in range(1, 8):
        assert alignment(distance, 32, 8) < 0.51
    # The third coordinate and the released frequencies of the others are the same as ever.
    positions = np.random.default_rng(0).standard_normal((5, 3))
    plain, grid = (rope.angles(positions, 32, side) for side in (None, 8))
    np.testing.assert_array_equal(plain[:, 8:], grid[:, 8:])
    np.testing.assert_allclose(plain[:, :4], positions[:, :1] * [1, 0.1, 0.01, 0.001])


# ----------------------------------------------------------------------------------------- copying

COPY_SIDE, COPY_CHANNELS = 6, 4
BASELINE = ("released", "next")


def copy_config(frequencies, keys):
    """Return a flow whose deep block reads a source image where others read text."""
    return FlowConfig(
        side=COPY_SIDE,
        channels=COPY_CHANNELS,
        width=64,
        layers=(1, 2),
        head_dim=32,
        start="prefix",
        order="L2R",
        soft_clip=4.0,
        final_norm=True,
        text_channels=COPY_CHANNELS,
        text_length=1,
        rope_frequencies=frequencies,
        key_positions=keys,
    )


def copy_positions(keys):
    """Return the deep block's positions in a row of a source image, a token and its copy."""
    rows, columns = np.divmod(np.arange(COPY_SIDE**2), COPY_SIDE)
    image = [np.stack([rows, columns, np.full_like(rows, k)], -1) for k in (0, 2)]
    items = jnp.asarray(np.concatenate([image[0], [[0, 0, 1]], image[1]]))
    return rope.Positions(items[1:], items[:-1] if keys == "own" else None)


def copying_nats(frequencies, keys, steps, batch_size=16, sigma=0.3, learning_rate=3e-3):
    """Train a flow to copy Gaussian latents, and return its nats/dim at every step.

    The source is clean, its copy has the noise of training: a perfect copy costs
    log(sigma) + log(2 pi e) / 2 = 0.215 at 0.3, and an image that is not looked at 1.46.
    """
    cfg, positions = copy_config(frequencies, keys), copy_positions(keys)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    params = parameters.init(jax.random.key(0), flow.declare(cfg))

    def loss(params, key):
        source_key, noise_key = jax.random.split(key)
        shape = (batch_size, COPY_SIDE**2, COPY_CHANNELS)
        source = jax.random.normal(source_key, shape)
        x = source + sigma * jax.random.normal(noise_key, shape)
        text = jnp.pad(source, ((0, 0), (0, 1), (0, 0)))
        z, log_det = flow.forward(params, x, cfg, Conditioning(text=text, positions=positions))
        nats = 0.5 * jnp.square(z).sum((1, 2)) - log_det
        return nats.mean() / (shape[1] * shape[2]) + 0.5 * np.log(2 * np.pi)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            nats, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), nats

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    return np.asarray(train(params))


def test_copying_is_learned_sooner_at_resolved_places():
    """Check that the same few steps teach a flow to copy only with the positions for it."""
    nats = partial(copying_nats, steps=80)
    resolved, released = (nats(*names)[-10:].mean() for names in (("grid", "own"), BASELINE))
    # A perfect copy costs 0.215, an image whose source is ignored 1.46.
    assert resolved < 0.4 and released > 0.6
