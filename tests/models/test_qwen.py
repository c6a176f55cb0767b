"""Qwen2.5-VL equals transformers: every hidden state, logits, cached decoding, greedy tokens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import published_qwen, qwen_decode
from helpers.golden_parity import error
from helpers.paths import GOLDEN
from helpers.qwen_parity import TOLERANCE, check, compute_outputs, from_state, make_prompt, step
from peer import torch_qwen

from starflow2_jax.checkpoints.convert.qwen_options import read_options
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.params import (
    abstract as abstract_params,
    count as count_params,
    init as init_params,
    shardings as param_shardings,
)

GOLDEN_FILE = GOLDEN / "qwen_tiny.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN_FILE) as file:
        arrays = dict(file)
    cfg = read_options(json.loads(str(arrays["config"])))
    state = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    return cfg, from_state(state, cfg), arrays


def case(arrays, name):
    keys = [k for k in arrays if k.startswith(f"{name}/")]
    return {k.removeprefix(f"{name}/"): arrays[k] for k in keys}


# ----------------------------------------------------------------------------------- without torch


@pytest.mark.fast
@pytest.mark.parametrize("name", ["text", "one", "three_left"])
def test_golden_states_and_logits(golden, name):
    cfg, params, arrays = golden
    check(params, cfg, case(arrays, name), case(arrays, name))


@pytest.mark.parametrize("name", ["one", "three_left"])
def test_golden_greedy_tokens(golden, name):
    cfg, params, arrays = golden
    inputs = case(arrays, name)
    rows = qwen_decode.generate(params, cfg, make_prompt(inputs, cfg), max_tokens=64)
    np.testing.assert_array_equal(np.array(rows), inputs["greedy"])


def test_generation_stops_and_samples(golden):
    cfg, params, arrays = golden
    inputs = case(arrays, "three_left")
    prompt, greedy = make_prompt(inputs, cfg), inputs["greedy"]
    stop = int(greedy[0, 5])
    rows = qwen_decode.generate(params, cfg, prompt, max_tokens=16, stop=[stop])
    for row, greedy_row in zip(rows, greedy[:, :16].tolist()):
        assert row == (greedy_row[: greedy_row.index(stop)] if stop in greedy_row else greedy_row)
    sampling = {"max_tokens": 16, "temperature": 1.0}
    first = qwen_decode.generate(params, cfg, prompt, seed=1, **sampling)
    assert first == qwen_decode.generate(params, cfg, prompt, seed=1, **sampling)
    assert first != qwen_decode.generate(params, cfg, prompt, seed=2, **sampling)
    nearly_greedy = qwen_decode.generate(params, cfg, prompt, max_tokens=16, temperature=1e-5)
    np.testing.assert_array_equal(nearly_greedy, greedy[:, :16])


def test_cached_steps_equal_one_forward_pass(golden):
    """Prefill of three, then one by one, with padding on the right."""
    cfg, params, arrays = golden
    inputs = case(arrays, "text")
    ids, valid = inputs["ids"], inputs["valid"]
    positions, length = qwen.rope_indices(ids, cfg, (), valid)[0], ids.shape[1]
    unstacked = layers.unstack(params["layers"])
    cache = qwen.empty_cache(cfg, len(ids), length + 2, jnp.float32)
    slots = np.arange(length + 2)
    visible = np.pad(valid, ((0, 0), (0, 2)))
    logits = []
    for first, last in [(0, 3), *((i, i + 1) for i in range(3, length))]:
        mask = visible[:, None] & (slots <= np.arange(first, last)[:, None])
        arguments = (ids[:, first:last], None, None, positions[:, first:last], mask, cache, cfg)
        out, cache = step(params, unstacked, *arguments)
        logits.append(np.asarray(out))
    logits = np.concatenate(logits, 1)
    assert int(cache.length) == length
    assert error(logits[valid], inputs["logits"][valid]) <= TOLERANCE


def test_images_do_not_attend_to_each_other(golden):
    cfg, params, arrays = golden
    inputs = case(arrays, "three_left")
    grids, patches = inputs["grids"], inputs["patches"]
    encode = jax.jit(qwen_vision.encode, static_argnums=3)
    encode_vision = lambda *patches_and_plan: encode(
        params["vision"], *patches_and_plan, cfg.vision
    )
    together = np.asarray(encode_vision(patches, qwen_vision.plan(grids, cfg.vision)))
    ends = np.cumsum(grids.prod(1))
    for i, end in enumerate(ends):
        start = end - grids[i].prod()
        alone = encode_vision(patches[start:end], qwen_vision.plan(grids[i : i + 1], cfg.vision))
        assert error(alone, together[start // 4 : end // 4]) <= TOLERANCE


def test_patch_states_are_in_the_order_of_the_patches(golden):
    """A layer that adds nothing leaves the patch embedding."""
    cfg, params, arrays = golden
    inputs = case(arrays, "three_left")
    identity_tower = jax.tree.map(lambda a: a, params["vision"])
    for name in ("out", "mlp_down"):
        identity_tower["layers"][name] = jax.tree.map(
            jnp.zeros_like, identity_tower["layers"][name]
        )
    plan = qwen_vision.plan(inputs["grids"], cfg.vision)
    states = qwen_vision.apply_layers(identity_tower, inputs["patches"], plan, cfg.vision)
    states = np.asarray(states).reshape(len(plan.order), -1, cfg.vision.width)[plan.restore]
    states = states.reshape(-1, cfg.vision.width)
    plain = inputs["patches"] @ np.asarray(params["vision"]["patch"]["weight"])
    np.testing.assert_allclose(states, plain, atol=1e-5)
    # Patches that contain their own number come block after block, in raster order within each.
    rows, columns = np.indices((4, 6))
    numbered = np.repeat(np.repeat((rows * 6 + columns)[..., None], 4, 0), 4, 1).repeat(3, -1)
    patches = qwen_vision.patchify(numbered.astype(np.float32), cfg.vision)
    blocks = patches[:, 0].reshape(2, 3, 2, 2).swapaxes(1, 2).reshape(4, 6)
    np.testing.assert_array_equal(blocks, rows * 6 + columns)


def test_patches_are_the_public_ones():
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if processor is None:
        pytest.skip("this release of transformers has no torch-free image processor")
    cfg = qwen.qwen2_5_vl_3b().vision
    image = np.random.default_rng(0).integers(0, 256, (112, 84, 3), np.uint8)
    expected = processor()(images=[image], return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, 8, 6]]
    for array in (image, jnp.asarray(image)):
        patches = qwen_vision.patchify(qwen_vision.normalize(array), cfg)
        np.testing.assert_allclose(patches, expected["pixel_values"], atol=2e-6)
    batch = qwen_vision.patchify(np.stack([image, image[::-1]]), cfg)
    np.testing.assert_array_equal(batch[1], qwen_vision.patchify(image[::-1], cfg))


@pytest.mark.parametrize(
    ("preset", "total", "vision"),
    [
        (qwen.qwen2_5_vl_3b, 3_754_622_976, 668_684_288),
        (qwen.qwen2_5_vl_7b, 8_292_166_656, 676_550_144),
        (published_qwen.qwen2_5_vl_32b, 33_452_718_336, 688_841_984),
        (published_qwen.qwen2_5_vl_72b, 73_410_777_344, 704_573_696),
    ],
)
def test_published_sizes(preset, total, vision):
    declared = qwen.declare(preset())
    assert count_params(declared) == total
    assert count_params(declared["vision"]) == vision


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("dp", "data=8"),
        ("fsdp", "fsdp=8"),
        ("tp", "tensor=8"),
        ("tp", "data=2,tensor=4"),
        ("fsdp_tp", "fsdp=4,tensor=2"),
        ("fsdp_tp", "fsdp=2,context=2,tensor=2"),
        ("hybrid", "data=2,fsdp=4"),
    ],
)
def test_the_7b_model_lowers(layout, sizes):
    cfg, mesh = qwen.qwen2_5_vl_7b(), make_mesh(sizes)
    params = abstract_params(qwen.declare(cfg), mesh, layout, jnp.bfloat16)
    plan = qwen_vision.plan([[1, 16, 16]] * 8, cfg.vision)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    patches = jax.ShapeDtypeStruct((8 * 256, cfg.vision.patch_values), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((8, 128, 3), jnp.int32)

    def forward(params, ids, patches, positions):
        return qwen.forward(params, ids, cfg, patches=patches, plan=plan, positions=positions)

    with jax.set_mesh(mesh):
        lowered = jax.jit(forward).lower(params, ids, patches, positions)
    assert lowered.out_info.shape == (8, 128, cfg.vocab)
    assert lowered.out_info.dtype == jnp.float32


@pytest.mark.parametrize("layout", [("fsdp", "fsdp=8"), ("tp", "tensor=8")])
def test_sharded_runs_give_the_same_logits(golden, layout):
    """Also if neither the windows nor the heads divide evenly."""
    cfg, _, arrays = golden
    vision = dataclasses.replace(cfg.vision, out_width=64)
    cfg = dataclasses.replace(cfg, width=64, mlp_width=64, vision=vision, sections=(2, 2, 4))
    params = init_params(jax.random.key(0), qwen.declare(cfg))
    inputs = case(arrays, "one")
    plain = compute_outputs(params, cfg, inputs)
    mesh = make_mesh(layout[1])
    placed = jax.device_put(params, param_shardings(qwen.declare(cfg), mesh, layout[0]))
    with jax.set_mesh(mesh):
        sharded = compute_outputs(placed, cfg, inputs)
    assert error(sharded["logits"], plain["logits"]) <= TOLERANCE


def test_embeddings_of_any_origin_and_gradients(golden):
    """The adapter's path: states of arbitrary embeddings, with a gradient to them."""
    cfg, params, arrays = golden
    ids = case(arrays, "text")["ids"]
    h = qwen.embed(params, ids, cfg)
    states, _ = qwen.apply_layers(params, h, cfg)
    np.testing.assert_allclose(
        qwen.logits(params, states, cfg), qwen.forward(params, ids, cfg), atol=1e-6
    )
    loss = lambda h, cfg: jnp.square(qwen.apply_layers(params, h, cfg)[0]).mean()
    plain = jax.grad(loss)(h, cfg)
    rematerialized = jax.grad(loss)(h, dataclasses.replace(cfg, remat="full"))
    assert float(jnp.abs(plain).max()) > 0 and error(rematerialized, plain) <= TOLERANCE
    bfloat16_logits = qwen.forward(params, ids, dataclasses.replace(cfg, compute_dtype="bfloat16"))
    assert (
        bfloat16_logits.dtype == jnp.float32
        and error(bfloat16_logits, qwen.forward(params, ids, cfg)) < 0.1
    )


def test_positions_of_parts():
    positions, next_position = qwen.part_positions([2, (1, 4, 6), 1], merge=2)
    expected = [[0, 0, 0], [1, 1, 1]]
    expected += [[2, 2 + r, 2 + c] for r in range(2) for c in range(3)] + [[5, 5, 5]]
    assert positions.tolist() == expected and next_position == 6
    clip, next_position = qwen.part_positions([(2, 1, 2)], start=7)
    assert clip.tolist() == [[7, 7, 7], [7, 7, 8], [8, 7, 7], [8, 7, 8]] and next_position == 9


@pytest.mark.fast
def test_images_and_tokens_that_do_not_match_are_refused(golden):
    cfg = golden[0]
    inputs = torch_qwen.inputs([[3, None, 4]], "left", torch_qwen.SIZES[:1])
    ids = inputs["ids"]
    with pytest.raises(ValueError, match="row 0: image tokens beyond the 0 images given"):
        qwen.rope_indices(ids, cfg)
    with pytest.raises(ValueError, match="1 of 2 images have no image tokens"):
        qwen.rope_indices(ids, cfg, [(1, 4, 6), (1, 4, 4)])
    with pytest.raises(ValueError, match="image 0 of 1 x 8 x 8 patches needs 16 image tokens"):
        qwen.rope_indices(ids, cfg, [(1, 8, 8)])
    with pytest.raises(ValueError, match="video tokens"):
        qwen.rope_indices(np.full((1, 3), cfg.video_token), cfg)
    plan = qwen_vision.plan([(1, 4, 6)], cfg.vision)
    with pytest.raises(ValueError, match=r"expected \[24, 96\] by the plan, got \[20, 96\]"):
        qwen_vision.encode({}, np.zeros((20, 96), np.float32), plan, cfg.vision)


def test_images_of_a_wrong_size_are_refused():
    cfg = qwen.qwen2_5_vl_3b().vision
    for shape in ((56, 60), (27, 28), (0, 28)):
        with pytest.raises(ValueError, match=f"image: {shape[0]} x {shape[1]} pixels; the vision"):
            qwen_vision.patchify(np.zeros((*shape, 3), np.float32), cfg)
    with pytest.raises(ValueError, match="28028 x 28028 pixels are more than the 12845056 allowed"):
        qwen_vision.check_size(28028, 28028, cfg)
    with pytest.raises(ValueError, match="56 x 56 pixels are more than the 3135 allowed"):
        qwen_vision.patchify(np.zeros((56, 56, 3), np.float32), cfg, max_pixels=3135)
    with pytest.raises(ValueError, match="rows and columns must be multiples of 2"):
        qwen_vision.plan([(1, 4, 5)], cfg)
    with pytest.raises(ValueError, match=r"expected \[images, 3\] of positive numbers"):
        qwen_vision.plan([(1, 4, 0)], cfg)


def test_invalid_configurations_are_refused(golden):
    cfg = golden[0]
    for changes, message in (
        ({"sections": (1, 1, 1)}, "must be three numbers that sum to half of the 8 head channels"),
        ({"heads": 3}, "width=32 is not a multiple of 2 heads=3"),
        ({"width": 64, "sections": (2, 2, 4)}, "out_width=32 is not width=64"),
        ({"remat": "some"}, "remat='some' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cfg, **changes)
    with pytest.raises(ValueError, match="vision width=16 is not a multiple of 4 heads=3"):
        dataclasses.replace(cfg.vision, heads=3)
    with pytest.raises(ValueError, match="vision window=4 is smaller than 2 patches"):
        dataclasses.replace(cfg.vision, window=4)
