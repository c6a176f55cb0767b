"""The Pretzel: equal to its parts while the skips are zero, causal, exact, of published size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pretzel_batch
from helpers.backbone_checks import backbone_inputs, check_log_det, heads, random_latents
from helpers.pretzel_batch import EDIT, I2T, REASON, T2I, TEXT

from starflow2_jax.data.chat_layout import MessagePart
from starflow2_jax.models import attention, flow, qwen, rope, starflow2
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.params import count as count_params, flatten
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage

STAGE1, STAGE2, STAGE3 = Stage(True, False), Stage(False, True), Stage(True, True)
PACKED = [[T2I, I2T], [EDIT, TEXT], [REASON, TEXT]]


def terms(params, batch, cfg, stage, **options):
    x = jnp.asarray(batch["latent_mean"])
    return interleaved.loss_terms(params, batch, x, cfg, stage, **options)


# ------------------------------------------------------------------------------ with zero skips


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_with_zero_skips_is_the_vlm_bit_for_bit(dtype):
    cfg = pretzel_batch.model(compute_dtype=dtype)
    params = pretzel_batch.random_params(cfg, zero=("adapter", "skip"))
    batch = pretzel_batch.batch(PACKED)
    is_image = batch["image"] >= 0
    mask = attention.segment_mask(jnp.asarray(batch["segments"]))

    @jax.jit
    def vlm_logits(params):
        h = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
        h = jnp.where(is_image[..., None], 0, h)
        states, _ = qwen.apply_layers(params["vlm"], h, cfg.vlm, batch["positions"], mask)
        return qwen.logits(params["vlm"], states, cfg.vlm)

    @jax.jit
    def pretzel_logits(params):
        x = batch["latent_mean"]
        u = starflow2.shallow_forward(params, x.reshape(-1, *x.shape[2:]), cfg)[0][-1]
        u = starflow2.latents_at_positions(u.reshape(x.shape), batch["image"])
        return heads(params, starflow2.forward(params, backbone_inputs(batch, u), cfg), cfg)[2]

    expected = np.asarray(vlm_logits(params))
    np.testing.assert_array_equal(np.asarray(pretzel_logits(params)), expected)
    assert expected.std() > 0.1
    with_skips = {**params, "skip": pretzel_batch.random_params(cfg, 1)["skip"]}
    assert not np.array_equal(np.asarray(pretzel_logits(with_skips)), expected)


@pytest.mark.parametrize("length", [44, 64])
def test_text_is_the_vlms_across_row_lengths(length):
    cfg = pretzel_batch.model()
    params = pretzel_batch.random_params(cfg, zero=("adapter", "skip"))
    nll = lambda batch: np.asarray(
        jax.jit(lambda p: terms(p, batch, cfg, STAGE3, text_targets=12).nll)(params)
    )
    alone = nll(pretzel_batch.batch([[T2I], [I2T]], length=26))
    together = nll(pretzel_batch.batch([[T2I, I2T]], length=length))
    both = np.concatenate([row[row != 0] for row in alone])
    np.testing.assert_allclose(together[together != 0], both, rtol=1e-5, atol=1e-5)


def prefix_nats(params, batch, cfg):
    """Return the nats of each row's first image by `flow.forward`, without the constant."""
    x = jnp.asarray(batch["latent_mean"])
    mask = attention.segment_mask(jnp.asarray(batch["segments"]))
    is_image = batch["image"] >= 0
    text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
    h = jnp.where(is_image[..., None], 0, text)
    run = jax.jit(
        lambda h: qwen.apply_layers(params["vlm"], h, cfg.vlm, batch["positions"], mask)[0]
    )
    y, nats = run(h), []
    blocks = {**params["shallow"], str(len(params["shallow"])): params["deep"]}
    forward = jax.jit(
        lambda x, conditioning: flow.forward({"blocks": blocks}, x, cfg.flow, conditioning)
    )
    for b in range(len(x)):
        first = int(np.argmax(batch["image"][b] == 0))
        positions = jnp.asarray(batch["flow_positions"][b, : first + cfg.num_patches - 1])
        items = None
        if cfg.flow.key_positions == "own":
            items = jnp.pad(positions[:-1], ((1, 0), (0, 0)))
        positions = rope.Positions(positions, items)
        conditioning = Conditioning(text=y[b : b + 1, :first], positions=positions)
        z, log_det = forward(x[b, :1], conditioning)
        nats.append(0.5 * np.square(z).sum() - log_det[0])
    return np.array(nats) / (cfg.num_patches * cfg.flow.channels)


def first_image_nats(params, batch, cfg, stage):
    result = jax.jit(lambda p: terms(p, batch, cfg, stage))(params)
    nats = result.half_square - sum(result.log_dets)
    return np.asarray(nats)[:, 0] / (cfg.num_patches * cfg.flow.channels)


@pytest.mark.parametrize("stage", [STAGE1, STAGE3])
@pytest.mark.parametrize("flow_options", [{}, pretzel_batch.OWN_KEYS], ids=["next", "own"])
def test_images_with_zero_skips_are_starflows(stage, flow_options):
    cfg = pretzel_batch.model(flow=flow_options)
    params = pretzel_batch.random_params(cfg, zero=("adapter", "skip"))
    batch = pretzel_batch.batch([[T2I, I2T], [T2I], [EDIT]])
    expected = prefix_nats(params, batch, cfg)
    np.testing.assert_allclose(
        first_image_nats(params, batch, cfg, stage), expected, rtol=1e-6, atol=1e-6
    )
    assert not np.allclose(expected[0], expected[2], atol=1e-2)


@pytest.mark.parametrize(
    "packed, size, reads",
    [
        ([[T2I, TEXT], [T2I, T2I]], 20, [9, 18]),  # up to <|vision_start|>, and no text record
        ([[T2I], [EDIT, T2I], []], 28, [9, 23, 0]),  # an edit with its first image
        # A question about an image has no target image.
        pytest.param([[REASON], [I2T]], 20, [15, 0], marks=pytest.mark.slow),
        pytest.param([[T2I], [EDIT, T2I]], 12, [9, 23], marks=pytest.mark.slow),  # more than 12
    ],
)
def test_stage_1_applies_the_vlm_to_what_it_reads(packed, size, reads):
    cfg = pretzel_batch.model()
    params = jax.tree.map(jnp.asarray, pretzel_batch.random_params(cfg, zero=("adapter", "skip")))
    batch = pretzel_batch.batch(packed, length=48)
    assert interleaved.is_read_by_images(batch).sum(1).tolist() == reads

    def loss(trained, vlm_positions):
        all_params = {**params, **trained}
        result = terms(all_params, batch, cfg, STAGE1, vlm_positions=vlm_positions)
        return result.half_square.sum() - sum(a.sum() for a in result.log_dets), result.half_square

    trained = {name: params[name] for name in ("shallow", "deep")}
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (expected, gradients) = gradient(trained, 0)
    (values, fewer_gradients) = gradient(trained, size)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), values, expected)
    for name, array in flatten(gradients).items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(
            flatten(fewer_gradients)[name] / scale, array / scale, atol=1e-5, err_msg=name
        )
    assert scale > 0


def test_images_with_zero_skips_are_starflows_in_float64(x64):
    cfg = pretzel_batch.model(compute_dtype="float64")
    params = pretzel_batch.random_params(cfg, zero=("adapter", "skip"))
    batch = pretzel_batch.batch([[T2I, I2T], [EDIT]], dtype=np.float64)
    expected = prefix_nats(params, batch, cfg)
    assert expected.dtype == np.float64
    actual = first_image_nats(params, batch, cfg, STAGE3)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("into, flow_options", [("latent", {}), ("width", pretzel_batch.OWN_KEYS)])
def test_every_pair_of_positions_is_causal(into, flow_options, x64):
    """Row of text, image, text, image, and one more record: what each output depends on."""
    cfg = pretzel_batch.model(skip_into=into, flow=flow_options, compute_dtype="float64")
    params = pretzel_batch.random_params(cfg)
    record = (
        *(MessagePart("none", "ab"), MessagePart("none", 0, True)),
        *(MessagePart("none", "c"), MessagePart("none", 1, True)),
    )
    batch = pretzel_batch.batch([[record, T2I]], length=32, dtype=np.float64)
    segments, is_image = batch["segments"], batch["image"] >= 0
    mask = attention.segment_mask(jnp.asarray(segments))
    u = random_latents(batch, cfg.flow.channels)
    text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)

    def outputs(text, u):
        states = starflow2.forward(params, backbone_inputs(batch, u, text), cfg)
        return [output[0] for output in heads(params, states, cfg)]

    by_text, by_u = zip(*jax.jit(jax.jacrev(outputs, (0, 1)))(text, jnp.asarray(u)))
    allowed = np.asarray(mask[0])
    # The input of a position is an embedding or a patch, never both.
    for jacobians, is_input in ((by_text, ~is_image[0]), (by_u, is_image[0])):
        for jacobian in jacobians:
            reached = np.abs(np.asarray(jacobian)[:, :, 0]).max((1, 3))
            in_segment = segments[0] > 0
            expected = allowed & is_input[None]
            np.testing.assert_array_equal((reached > 0)[in_segment], expected[in_segment])


def test_an_image_sees_all_of_itself_and_nothing_later(x64):
    cfg = pretzel_batch.model(compute_dtype="float64")
    params = pretzel_batch.random_params(cfg)
    batch = pretzel_batch.batch([[EDIT, T2I]], length=48, dtype=np.float64)

    def nats(x):
        result = interleaved.loss_terms(params, batch, x, cfg, STAGE3, text_targets=8)
        return (result.half_square - sum(result.log_dets))[0], result.nll[0]

    images, tokens = jax.jit(jax.jacrev(nats))(jnp.asarray(batch["latent_mean"]))
    by_image = np.abs(np.asarray(images))[:3, 0, :3].max((2, 3)) > 0
    # Two images of the first record, one of the second.
    expected = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(by_image, expected)
    assert (np.abs(np.asarray(images))[[0, 1, 2], 0, [0, 1, 2]] > 0).all()
    result = jax.jit(lambda p: terms(p, batch, cfg, STAGE3, text_targets=8))(params)
    index, is_token = np.asarray(result.target_index)[0], np.asarray(result.token)[0]
    reached = np.abs(np.asarray(tokens))[is_token, 0, :3].max((2, 3)) > 0
    first = [int(np.argmax(batch["image"][0] == m * cfg.num_patches)) for m in range(3)]
    last = [f + cfg.num_patches - 1 for f in first]
    for number, position in enumerate(index[is_token]):
        for m in range(3):
            same = batch["segments"][0, first[m]] == batch["segments"][0, position]
            assert reached[number, m] == (same and position >= last[m])


# --------------------------------------------------------------------------------------- likelihood


@pytest.mark.fast
@pytest.mark.parametrize("flow_options", [{}, pretzel_batch.OWN_KEYS], ids=["next", "own"])
def test_log_det_is_the_jacobians(flow_options, x64):
    """An image of a row behind another one, through the shallow and the deep flow."""
    cfg = pretzel_batch.model(flow=flow_options, compute_dtype="float64")
    check_log_det(cfg, pretzel_batch.random_params(cfg))


@pytest.mark.parametrize(
    "flow_options",
    [pytest.param({}, marks=pytest.mark.slow), pretzel_batch.OWN_KEYS],
    ids=["next", "own"],
)
def test_packed_rows_equal_rows_of_one_record(flow_options, x64):
    cfg = pretzel_batch.model(flow=flow_options, compute_dtype="float64")
    params = pretzel_batch.random_params(cfg)
    records = [T2I, I2T, EDIT, TEXT, REASON]
    packed = pretzel_batch.batch([records[:3], records[3:]], length=64, dtype=np.float64)
    separate = pretzel_batch.batch([[record] for record in records], length=36, dtype=np.float64)

    @jax.jit
    def loss(params, batch):
        result = interleaved.loss_terms(params, batch, batch["latent_mean"], cfg, STAGE3)
        metrics = interleaved.row_metrics(result, batch, STAGE3)
        totals = jax.tree.map(jnp.sum, interleaved.target_counts(batch, STAGE3))
        losses = interleaved.per_example_loss(metrics, totals, text_weight=0.7, latent_penalty=1e-2)
        return losses.sum(), result

    loss_and_grad = jax.value_and_grad(loss, has_aux=True)
    (packed_loss, packed_terms), packed_grads = loss_and_grad(params, packed)
    (separate_loss, separate_terms), separate_grads = loss_and_grad(params, separate)
    np.testing.assert_allclose(float(packed_loss), float(separate_loss), rtol=1e-10)
    for a, b in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(separate_grads)):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)

    def image_nats(terms):
        return np.asarray(terms.half_square - sum(terms.log_dets))[np.asarray(terms.image)]

    def token_nats(terms):
        return np.asarray(terms.nll)[np.asarray(terms.token)]

    for nats in (image_nats, token_nats):
        np.testing.assert_allclose(nats(packed_terms), nats(separate_terms), rtol=1e-10)
    assert len(image_nats(packed_terms)) == 4 and len(token_nats(packed_terms)) > 15


def test_without_an_image_before_it_the_adapter_changes_no_image():
    cfg = pretzel_batch.model()
    zero_adapter = pretzel_batch.random_params(cfg, zero=("skip",))
    open_adapter = {**zero_adapter, "adapter": pretzel_batch.random_params(cfg, 5)["adapter"]}
    batch = pretzel_batch.batch([[T2I], [EDIT]], length=40)
    read = jax.jit(lambda p: terms(p, batch, cfg, STAGE3))
    nats = [
        np.asarray(t.half_square - sum(t.log_dets)) for t in map(read, (zero_adapter, open_adapter))
    ]
    np.testing.assert_array_equal(nats[0][0], nats[1][0])
    assert nats[0][1, 0] == nats[1][1, 0] and nats[0][1, 1] != nats[1][1, 1]


def test_gradient_of_the_text_into_the_flow_can_be_stopped():
    cfg = pretzel_batch.model()
    params, batch = pretzel_batch.random_params(cfg), pretzel_batch.batch([[I2T]], length=40)
    for into_flow in (True, False):
        read = lambda p: terms(p, batch, cfg, STAGE3, text_into_flow=into_flow).nll.sum()  # noqa: B023
        grads = jax.jit(jax.grad(read))(params)
        size = {name: max(np.abs(g).max() for g in jax.tree.leaves(t)) for name, t in grads.items()}
        assert size["adapter"] > 0 and size["skip"] > 0
        assert (size["deep"] > 0) == into_flow and (size["shallow"] > 0) == into_flow


def test_chunks_and_limits_of_targets_change_nothing():
    cfg = pretzel_batch.model()
    params, batch = pretzel_batch.random_params(cfg), pretzel_batch.batch(PACKED)
    read = lambda **options: jax.jit(lambda p: terms(p, batch, cfg, STAGE3, **options).nll)(params)
    unlimited, max_count = np.asarray(read()), int(np.asarray(read() != 0).sum(1).max())
    limited = np.asarray(read(text_targets=max_count, text_chunk=5))
    np.testing.assert_allclose(limited, unlimited[:, :max_count], rtol=1e-5, atol=1e-6)
    # More targets than room: never a smaller loss.
    assert np.isnan(np.asarray(read(text_targets=max_count - 1))).any()


# --------------------------------------------------------------------------------- sizes and errors


def test_paper_has_the_published_size():
    cfg = starflow2.preset("paper")
    tree = starflow2.declare(cfg)
    sizes = {name: count_params(part) for name, part in tree.items()}
    print(sizes)
    blocks = {**tree["shallow"], "deep": tree["deep"]}
    assert sum(count_params(b["layers"]) for b in blocks.values()) == 3_625_156_608
    assert sizes == {
        "vlm": 7_615_616_512,
        "adapter": 12_966_912,
        "shallow": 906_891_456,
        "deep": 2_730_181_696,
        "skip": 11_124_736,
    }
    assert sizes["shallow"] + sizes["deep"] == 3_637_073_152
    assert sum(sizes.values()) - sizes["vlm"] == 3_661_164_800


def test_tiny_is_tiny():
    sizes = {n: count_params(p) for n, p in starflow2.declare(starflow2.preset("tiny")).items()}
    assert 2.5e6 < sum(sizes.values()) - sizes["vlm"] < 3.5e6


@pytest.mark.parametrize("blocks", [(2,), (1, 2), (1, 1, 2), (1, 0, 1, 2), (1, 1, 1, 1, 2)])
def test_the_deep_block_reads_forwards(blocks):
    cfg = pretzel_batch.model(flow={"layers": blocks})
    assert not cfg.deep.reverse
    assert [cfg.flow.block(i).reverse for i in range(len(blocks))][::-2] == [False] * (
        (len(blocks) + 1) // 2
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter": "none"}, "model.adapter='none'"),
        ({"skip_into": "u"}, "model.skip_into='u'"),
        ({"skips": ("both",)}, "'both'"),
        ({"flow": {"text_channels": 7}}, "text_channels=7 is not the VLM's width 32"),
        ({"flow": {"start": "token"}}, "start='prefix'"),
        ({"flow": {"order": "L2R"}}, "backwards"),
        ({"flow": {"positions": "learned"}}, "'rope'"),
        ({"flow": {"layers": (1, 1, 0)}}, "no layers"),
    ],
)
def test_invalid_configs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        pretzel_batch.model(**changes)
    with pytest.raises(ValueError, match=r"large.*tiny, small, paper"):
        starflow2.preset("large")
