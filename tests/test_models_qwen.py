"""Qwen2.5-VL beside transformers: every hidden state, logits, cached decoding, greedy tokens."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_parity import error
from peer import torch_qwen

from starflow2_jax import params as weights
from starflow2_jax.generation import chat
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.weights import qwen as table
from starflow2_jax.weights import sources
from starflow2_jax.weights.qwen_options import read_options

GOLDEN = pathlib.Path(__file__).parent / "golden" / "qwen_tiny.npz"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    cfg = read_options(json.loads(str(arrays["config"])))
    state = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    return cfg, from_state(state, cfg), arrays


def from_state(state, cfg):
    """Our tree of a state dict of theirs, by the table of names alone."""
    renamed = {}
    for name, array in state.items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        renamed[name] = array
    source, leaves = sources.open_source(renamed), {}
    for piece in table.table(cfg):
        part = table._read(source, piece)
        part = part.T if piece.transposed else part
        leaves.setdefault(piece.leaf, []).append(part)
        if piece.layer is None:
            leaves[piece.leaf] = part
    return weights.unflatten({name: jnp.asarray(np.array(leaf)) for name, leaf in leaves.items()})


def ours(params, cfg, given):
    """What `torch_qwen.reference` gives."""
    positions = qwen.rope_indices(given["ids"], cfg, given["grids"], given["valid"])[0]
    patches, at = None, None
    if len(given["grids"]):
        patches, at = given["patches"], qwen_vision.plan(given["grids"], cfg.vision)
    found = _compute(params, given["ids"], given["valid"], positions, patches, at, cfg)
    return {"positions": positions, **found}


@functools.partial(jax.jit, static_argnames="cfg")
def _compute(params, ids, valid, positions, patches, at, cfg):
    found, mask = {}, qwen.causal_mask(valid)
    if patches is not None:
        seen = (params["vision"], patches, at, cfg.vision)
        found["vision"] = qwen_vision.hidden_states(*seen)
        found["features"] = qwen_vision.encode(*seen)
    h = qwen.embed_all(params, ids, cfg, patches, at)
    found["hidden"] = qwen.hidden_states(params, h, positions, mask, cfg)
    found["logits"] = qwen.forward(
        params, ids, cfg, patches=patches, at=at, positions=positions, mask=mask
    )
    return found


@functools.partial(jax.jit, static_argnames="cfg")
def _step(params, unstacked, ids, patches, at, positions, mask, cache, cfg):
    """Logits of new tokens against a cache."""
    h = qwen.embed_all(params, ids, cfg, patches, at)
    states, cache = qwen.run({**params, "layers": unstacked}, h, positions, mask, cfg, cache)
    return qwen.logits(params, states, cfg), cache


def check(params, cfg, given, reference):
    """Every array is as the reference; what padding sees is nobody's business."""
    made, valid = ours(params, cfg, given), given["valid"]
    np.testing.assert_array_equal(made["positions"], reference["positions"])
    for key in made:
        if key == "positions":
            continue
        mine, theirs = np.asarray(made[key]), reference[key]
        assert mine.shape == theirs.shape, key
        if key == "hidden":
            pairs = [(a[valid], b[valid]) for a, b in zip(mine, theirs)]
        elif key == "vision":
            pairs = list(zip(mine, theirs))
        else:
            pairs = [(mine, theirs)] if key == "features" else [(mine[valid], theirs[valid])]
        for i, pair in enumerate(pairs):
            assert error(*pair) <= TOLERANCE, f"{key} {i}: off by {error(*pair):.2e}"


def case(arrays, name):
    keys = [k for k in arrays if k.startswith(f"{name}/")]
    return {k.removeprefix(f"{name}/"): arrays[k] for k in keys}


def prompt_of(given, cfg):
    positions, following = qwen.rope_indices(given["ids"], cfg, given["grids"], given["valid"])
    patches = given["patches"] if len(given["grids"]) else None
    return chat.Prompt(given["ids"], given["valid"], positions, following, patches, given["grids"])


# ----------------------------------------------------------------------------------- without torch


@pytest.mark.parametrize("name", ["text", "one", "three_left"])
def test_golden_states_and_logits(golden, name):
    cfg, params, arrays = golden
    check(params, cfg, case(arrays, name), case(arrays, name))


@pytest.mark.parametrize("name", ["one", "three_left"])
def test_golden_greedy_tokens(golden, name):
    cfg, params, arrays = golden
    given = case(arrays, name)
    rows = chat.generate(params, cfg, prompt_of(given, cfg), max_tokens=64)
    np.testing.assert_array_equal(np.array(rows), given["greedy"])


def test_generation_stops_and_draws(golden):
    cfg, params, arrays = golden
    given = case(arrays, "three_left")
    prompt, greedy = prompt_of(given, cfg), given["greedy"]
    stop = int(greedy[0, 5])
    rows = chat.generate(params, cfg, prompt, max_tokens=16, stop=[stop])
    for row, whole in zip(rows, greedy[:, :16].tolist()):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    drawn = {"max_tokens": 16, "temperature": 1.0}
    first = chat.generate(params, cfg, prompt, seed=1, **drawn)
    assert first == chat.generate(params, cfg, prompt, seed=1, **drawn)
    assert first != chat.generate(params, cfg, prompt, seed=2, **drawn)
    cold = chat.generate(params, cfg, prompt, max_tokens=16, temperature=1e-5)
    np.testing.assert_array_equal(cold, greedy[:, :16])


def test_cached_steps_are_the_whole(golden):
    """Prefill of three, then one by one, with padding on the right."""
    cfg, params, arrays = golden
    given = case(arrays, "text")
    ids, valid = given["ids"], given["valid"]
    positions, length = qwen.rope_indices(ids, cfg, (), valid)[0], ids.shape[1]
    unstacked = layers.unstack(params["layers"], cfg.layers)
    cache = qwen.empty_cache(cfg, len(ids), length + 2, jnp.float32)
    slots = np.arange(length + 2)
    seen = np.pad(valid, ((0, 0), (0, 2)))
    found = []
    for first, last in [(0, 3), *((i, i + 1) for i in range(3, length))]:
        mask = seen[:, None] & (slots <= np.arange(first, last)[:, None])
        args = (ids[:, first:last], None, None, positions[:, first:last], mask, cache, cfg)
        out, cache = _step(params, unstacked, *args)
        found.append(np.asarray(out))
    found = np.concatenate(found, 1)
    assert int(cache.length) == length
    assert error(found[valid], given["logits"][valid]) <= TOLERANCE


def test_an_image_does_not_see_its_neighbours(golden):
    cfg, params, arrays = golden
    given = case(arrays, "three_left")
    grids, patches = given["grids"], given["patches"]
    encode = jax.jit(qwen_vision.encode, static_argnums=3)
    see = lambda *seen: encode(params["vision"], *seen, cfg.vision)
    whole = np.asarray(see(patches, qwen_vision.plan(grids, cfg.vision)))
    ends = np.cumsum(grids.prod(1))
    for i, end in enumerate(ends):
        start = end - grids[i].prod()
        alone = see(patches[start:end], qwen_vision.plan(grids[i : i + 1], cfg.vision))
        assert error(alone, whole[start // 4 : end // 4]) <= TOLERANCE


def test_patch_states_are_in_the_order_of_the_patches(golden):
    """A layer that adds nothing leaves the patch embedding."""
    cfg, params, arrays = golden
    given = case(arrays, "three_left")
    quiet = jax.tree.map(lambda a: a, params["vision"])
    for name in ("out", "mlp_down"):
        quiet["layers"][name] = jax.tree.map(jnp.zeros_like, quiet["layers"][name])
    at = qwen_vision.plan(given["grids"], cfg.vision)
    states = qwen_vision.patch_states(quiet, given["patches"], at, cfg.vision)
    plain = given["patches"] @ np.asarray(params["vision"]["patch"]["weight"])
    np.testing.assert_allclose(states, plain, atol=1e-5)
    # Rows and columns of a picture whose patches know where they are.
    rows, columns = np.indices((4, 6))
    numbered = np.repeat(np.repeat((rows * 6 + columns)[..., None], 4, 0), 4, 1).repeat(3, -1)
    patches = qwen_vision.patchify(numbered.astype(np.float32), cfg.vision)
    raster = qwen_vision.raster(patches, (4, 6), cfg.vision)
    np.testing.assert_array_equal(raster[..., 0], rows * 6 + columns)


def test_patches_are_the_public_ones():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if kind is None:
        pytest.skip("this release of transformers has no torch-free image processor")
    cfg = qwen.qwen2_5_vl_3b().vision
    image = np.random.default_rng(0).integers(0, 256, (112, 84, 3), np.uint8)
    theirs = kind()(images=[image], return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 6]]
    for array in (image, jnp.asarray(image)):
        patches = qwen_vision.patchify(qwen_vision.normalise(array), cfg)
        np.testing.assert_allclose(patches, theirs["pixel_values"], atol=2e-6)
    batch = qwen_vision.patchify(np.stack([image, image[::-1]]), cfg)
    np.testing.assert_array_equal(batch[1], qwen_vision.patchify(image[::-1], cfg))


@pytest.mark.parametrize(
    ("preset", "total", "vision"),
    [
        (qwen.qwen2_5_vl_3b, 3_754_622_976, 668_684_288),
        (qwen.qwen2_5_vl_7b, 8_292_166_656, 676_550_144),
        (qwen.qwen2_5_vl_32b, 33_452_718_336, 688_841_984),
        (qwen.qwen2_5_vl_72b, 73_410_777_344, 704_573_696),
    ],
)
def test_published_sizes(preset, total, vision):
    declared = qwen.declare(preset())
    assert weights.count(declared) == total
    assert weights.count(declared["vision"]) == vision


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("dp", "data=8"),
        ("fsdp", "fsdp=8"),
        ("tp", "tensor=8"),
        ("tp", "data=2,tensor=4"),
        ("fsdp_tp", "fsdp=4,tensor=2"),
        ("fsdp_tp", "fsdp=2,context=2,tensor=2"),
    ],
)
def test_the_7b_model_lowers(layout, sizes):
    cfg, mesh = qwen.qwen2_5_vl_7b(), make_mesh(sizes)
    params = weights.abstract(qwen.declare(cfg), mesh, layout, jnp.bfloat16)
    at = qwen_vision.plan([[1, 16, 16]] * 8, cfg.vision)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    patches = jax.ShapeDtypeStruct((8 * 256, cfg.vision.patch_values), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((8, 128, 3), jnp.int32)

    def forward(params, ids, patches, positions):
        return qwen.forward(params, ids, cfg, patches=patches, at=at, positions=positions)

    with jax.set_mesh(mesh):
        lowered = jax.jit(forward).lower(params, ids, patches, positions)
    assert lowered.out_info.shape == (8, 128, cfg.vocab)
    assert lowered.out_info.dtype == jnp.float32


@pytest.mark.parametrize("layout", [("fsdp", "fsdp=8"), ("tp", "tensor=8")])
def test_sharded_runs_give_the_same(golden, layout):
    """Also where neither the windows nor the heads can be shared out evenly."""
    cfg, _, arrays = golden
    vision = dataclasses.replace(cfg.vision, out_width=64)
    cfg = dataclasses.replace(cfg, width=64, mlp_width=64, vision=vision, sections=(2, 2, 4))
    params = weights.init(jax.random.key(0), qwen.declare(cfg))
    given = case(arrays, "one")
    plain = ours(params, cfg, given)
    mesh = make_mesh(layout[1])
    placed = jax.device_put(params, weights.shardings(qwen.declare(cfg), mesh, layout[0]))
    with jax.set_mesh(mesh):
        spread = ours(placed, cfg, given)
    assert error(spread["logits"], plain["logits"]) <= TOLERANCE


def test_embeddings_of_any_origin_and_gradients(golden):
    """The adapter's path: states from given embeddings, with a gradient to them, rematerialised."""
    cfg, params, arrays = golden
    ids = case(arrays, "text")["ids"]
    h = qwen.embed(params, ids, cfg)
    states = qwen.run(params, h, None, None, cfg)
    np.testing.assert_allclose(
        qwen.logits(params, states, cfg), qwen.forward(params, ids, cfg), atol=1e-6
    )
    loss = lambda h, cfg: jnp.square(qwen.run(params, h, None, None, cfg)).mean()
    plain = jax.grad(loss)(h, cfg)
    kept = jax.grad(loss)(h, dataclasses.replace(cfg, remat="full"))
    assert float(jnp.abs(plain).max()) > 0 and error(kept, plain) <= TOLERANCE
    low = qwen.forward(params, ids, dataclasses.replace(cfg, compute_dtype="bfloat16"))
    assert low.dtype == jnp.float32 and error(low, qwen.forward(params, ids, cfg)) < 0.1


def test_positions_of_parts():
    found, following = qwen.part_positions([2, (1, 4, 6), 1], merge=2)
    expected = [[0, 0, 0], [1, 1, 1]]
    expected += [[2, 2 + r, 2 + c] for r in range(2) for c in range(3)] + [[5, 5, 5]]
    assert found.tolist() == expected and following == 6
    clip, following = qwen.part_positions([(2, 1, 2)], start=7)
    assert clip.tolist() == [[7, 7, 7], [7, 7, 8], [8, 7, 7], [8, 7, 8]] and following == 9


def test_images_and_tokens_that_do_not_belong_together(golden):
    cfg = golden[0]
    given = torch_qwen.inputs([[3, None, 4]], "left", torch_qwen.SIZES[:1])
    ids = given["ids"]
    with pytest.raises(ValueError, match="row 0: image tokens beyond the 0 images given"):
        qwen.rope_indices(ids, cfg)
    with pytest.raises(ValueError, match="1 of 2 images have no image tokens"):
        qwen.rope_indices(ids, cfg, [(1, 4, 6), (1, 4, 4)])
    with pytest.raises(ValueError, match="image 0 of 1 x 8 x 8 patches needs 16 image tokens"):
        qwen.rope_indices(ids, cfg, [(1, 8, 8)])
    with pytest.raises(ValueError, match="video tokens"):
        qwen.rope_indices(np.full((1, 3), cfg.video_token), cfg)
    at = qwen_vision.plan([(1, 4, 6)], cfg.vision)
    with pytest.raises(ValueError, match=r"expected \[24, 96\] by the plan, got \[20, 96\]"):
        qwen_vision.encode({}, np.zeros((20, 96), np.float32), at, cfg.vision)


def test_images_of_the_wrong_size():
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


def test_configurations_that_cannot_be(golden):
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


# -------------------------------------------------------------------------------------- with torch


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="parity needs the [parity] extra")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


def converted(model):
    cfg = read_options(json.loads(model.config.to_json_string()))
    state = {name: w.numpy() for name, w in model.state_dict().items()}
    if cfg.tied:
        state.pop("lm_head.weight", None)
    return cfg, from_state(state, cfg)


WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


WIDE = {"seed": 2, "tied": True, "text": WIDER, "vision": {"out_hidden_size": 48}}
WINDOWS = {"seed": 3, "vision": {"window_size": 24, "fullatt_block_indexes": [0, 2]}}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *(({"seed": 1}, name) for name in torch_qwen.CASES),
        (WIDE, "three_right"),
        (WINDOWS, "three_left"),
    ],
)
def test_random_models(torch, build, name):
    model, given = torch_qwen.make(**build), torch_qwen.CASES[name]()
    cfg, params = converted(model)
    assert cfg.tied == build.get("tied", False) and ("head" in params) != cfg.tied
    check(params, cfg, given, torch_qwen.reference(model, given))


@pytest.mark.parametrize("name", ["one", "three_left", "three_right"])
def test_cached_decode_step_by_step(torch, name):
    """After images and padding on either side, each step's logits are those of the cached model."""
    model, given = torch_qwen.make(seed=4), torch_qwen.CASES[name]()
    cfg, params = converted(model)
    ids, valid, grids = given["ids"], given["valid"], given["grids"]
    rows, length, steps = *ids.shape, 6
    extra = np.random.default_rng(5).integers(3, 80, (rows, steps))
    at, delta = torch_qwen.positions(model, given)
    positions, following = qwen.rope_indices(ids, cfg, grids, valid)
    np.testing.assert_array_equal(following, (delta[:, 0] + torch.tensor(valid.sum(1))).numpy())

    out = model(**torch_qwen.arguments(given), position_ids=at, use_cache=True)
    theirs, past = [out.logits[:, -1].numpy()], out.past_key_values
    seen = np.concatenate([valid, np.ones((rows, steps), bool)], 1)
    for i in range(steps):
        out = model(
            input_ids=torch.tensor(extra[:, i : i + 1]),
            attention_mask=torch.tensor(seen[:, : length + i + 1].astype(np.int64)),
            position_ids=torch.tensor(np.broadcast_to((following + i)[:, None], (3, rows, 1))),
            past_key_values=past,
            use_cache=True,
        )
        theirs.append(out.logits[:, 0].numpy())

    unstacked = layers.unstack(params["layers"], cfg.layers)
    cache = qwen.empty_cache(cfg, rows, length + steps, jnp.float32)
    slots = np.arange(length + steps)
    plan = qwen_vision.plan(grids, cfg.vision)
    mask = seen[:, None] & (slots <= np.arange(length)[:, None])
    args = (ids, given["patches"], plan, positions, mask, cache, cfg)
    out, cache = _step(params, unstacked, *args)
    mine = [np.asarray(out)[:, -1]]
    for i in range(steps):
        mask = seen[:, None] & (slots <= length + i)
        where = np.repeat((following + i)[:, None, None], 3, 2)
        args = (extra[:, i : i + 1].astype(np.int32), None, None, where, mask, cache, cfg)
        out, cache = _step(params, unstacked, *args)
        mine.append(np.asarray(out)[:, 0])
    whole = valid[:, -1]
    assert error(mine[0][whole], theirs[0][whole]) <= TOLERANCE
    for a, b in zip(mine[1:], theirs[1:]):
        assert error(a, b) <= TOLERANCE


@pytest.mark.parametrize("name", ["text", "three_left"])
def test_greedy_tokens(torch, name):
    model = torch_qwen.make(seed=6)
    given = torch_qwen.CASES[name]()
    if name == "text":
        given = torch_qwen.inputs([[20], [13]], "left")
    cfg, params = converted(model)
    rows = chat.generate(params, cfg, prompt_of(given, cfg), max_tokens=64)
    np.testing.assert_array_equal(np.array(rows), torch_qwen.greedy(model, given))


@pytest.mark.slow
def test_at_the_widths_of_the_7b_model(torch):
    """Two layers of each stack and a small vocabulary; 0.6 billion parameters."""
    text = {
        "vocab_size": 2048,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {
        "depth": 2,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
    }
    model = torch_qwen.make(text=text, vision=vision, sections=(16, 24, 24))
    sizes = ((1, 12, 10), (1, 6, 18))
    rows = [[5, None, 6], [3, None, 2]]
    given = torch_qwen.inputs(rows, "left", sizes, values=1176)
    cfg, params = converted(model)
    check(params, cfg, given, torch_qwen.reference(model, given))
