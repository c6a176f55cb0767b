"""Every option of a block: the log-determinant is exact and the inverse inverts, in every pair."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_parity import error
from helpers.paths import GOLDEN

from starflow2_jax.checkpoints.convert import starflow
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi, inverse
from starflow2_jax.models import flow, patches
from starflow2_jax.models.attention import grouped_query_attention
from starflow2_jax.models.flow import Conditioning, FlowConfig
from starflow2_jax.params import flatten, ones, unflatten

# Rows such that every two values of different options meet in one of them, where they can.
OPTIONS = {
    "start": ("token", "shift", "prefix"),
    "positions": ("interleaved", "half", "learned"),
    "scale": ("softplus", "exp"),
    "soft_clip": (0.0, 1.5),
    "final_norm": (False, True),
    "classes": (0, 3),
    "text": ("none", "deep", "all"),
    "kv_heads": (None, 1),
    "qk_norm": (False, True),
    "post_norm": (False, True),
    "gated_mlp": (False, True),
    "norm": ("layer_norm", "rms_norm"),
    "bias": (True, False),
    "deep_width": (None, 60),
    "layers": ((1, 1), (1, 0, 1)),
    "order": ("R2L", "L2R"),
    "grid": (None, (2, 3)),
    "rope_frequencies": ("released", "grid"),
    "key_positions": ("next", "own"),
}
ROWS = [
    ("shift", "half", "exp", 0.0, True, 0, "all", 1, False, True, False, "rms_norm", False,
     None, (1, 0, 1), "L2R", None, "released", "next"),
    ("token", "learned", "softplus", 1.5, False, 3, "deep", None, True, False, True,
     "layer_norm", True, 60, (1, 1), "R2L", None, "released", "next"),
    ("prefix", "interleaved", "softplus", 0.0, False, 3, "deep", None, False, True, False,
     "layer_norm", False, None, (1, 1), "L2R", (2, 3), "released", "own"),
    ("shift", "interleaved", "exp", 1.5, True, 0, "none", 1, True, False, True, "rms_norm",
     True, 60, (1, 0, 1), "R2L", (2, 3), "released", "next"),
    ("prefix", "half", "exp", 1.5, False, 0, "all", 1, False, False, True, "layer_norm", False,
     60, (1, 1), "R2L", (2, 3), "grid", "next"),
    ("token", "learned", "softplus", 0.0, True, 3, "none", None, True, True, False, "rms_norm",
     False, 60, (1, 0, 1), "L2R", None, "released", "next"),
    ("token", "half", "exp", 0.0, True, 0, "deep", None, True, False, False, "layer_norm", True,
     None, (1, 0, 1), "R2L", (2, 3), "grid", "own"),
    ("prefix", "learned", "exp", 1.5, True, 3, "all", 1, False, True, True, "rms_norm", True,
     None, (1, 1), "L2R", None, "released", "next"),
    ("shift", "half", "softplus", 0.0, False, 3, "none", None, False, True, True, "layer_norm",
     False, None, (1, 1), "R2L", (2, 3), "grid", "own"),
    ("token", "interleaved", "softplus", 1.5, False, 0, "all", 1, False, False, False,
     "rms_norm", False, 60, (1, 0, 1), "L2R", None, "grid", "own"),
    ("prefix", "learned", "softplus", 0.0, False, 0, "all", None, True, True, True,
     "layer_norm", True, None, (1, 0, 1), "L2R", None, "released", "next"),
    ("shift", "learned", "softplus", 1.5, True, 3, "deep", 1, True, True, False, "rms_norm",
     True, 60, (1, 0, 1), "L2R", None, "released", "next"),
]  # fmt: skip
CASES = [dict(zip(OPTIONS, row)) for row in ROWS]
NAMES = [f"{i}-{row[0]}-{row[1]}-text_{row[6]}" for i, row in enumerate(ROWS)]
TEXT_LENGTH = 3
forward = jax.jit(flow.forward, static_argnames="cfg")


def config_of(case):
    """The flow of a row, 2 x 2 tokens of 2 channels in training."""
    options = dict(case)
    grid, text, positions = options.pop("grid"), options.pop("text"), options.pop("positions")
    if text != "none":
        options |= {"text_channels": 3, "text_length": TEXT_LENGTH, "text_blocks": text}
    options |= {"positions": "learned"} if positions == "learned" else {"rope_pairs": positions}
    return FlowConfig(side=2, channels=2, width=40, head_dim=20, **options), grid


def random_params(cfg, seed=0, dtype=np.float64):
    """Return parameters off their initial values: norms near theirs, linears scaled by fan-in."""
    rng, params = np.random.default_rng(seed), {}
    for name, weight in flatten(flow.declare(cfg)).items():
        is_matrix = name.split("/")[-1] == "weight" and "norm" not in name
        spread = 0.7 * weight.shape[-2] ** -0.5 if is_matrix else 0.2
        value = float(weight.init is ones) + spread * rng.standard_normal(weight.shape)
        params[name] = jnp.asarray(np.asarray(value, dtype))
    return unflatten(params)


def inputs_of(cfg, grid, seed=0, dtype=np.float64, rows=2):
    """Random tokens x and their conditioning."""
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1] if grid else cfg.tokens
    x = jnp.asarray(rng.standard_normal((rows, tokens, cfg.channels)).astype(dtype))
    conditioning = Conditioning(grid=grid)
    if cfg.text_channels:
        text = rng.standard_normal((rows, cfg.text_length, cfg.text_channels))
        conditioning = conditioning.replace(text=jnp.asarray(text.astype(dtype)))
    if cfg.classes:
        labels = jnp.asarray([1, -1] * (rows // 2), jnp.int32)
        conditioning = conditioning.replace(labels=labels)
    return x, conditioning


@pytest.mark.fast
def test_every_pair_of_options_is_covered():
    # Learned positions fix T and rotate nothing.
    impossible = {("prefix", "none")} | {("learned", other) for other in ((2, 3), "grid", "own")}
    for (a, values_a), (b, values_b) in itertools.combinations(OPTIONS.items(), 2):
        for pair in itertools.product(values_a, values_b):
            covered = any(case[a] == pair[0] and case[b] == pair[1] for case in CASES)
            assert covered or pair in impossible, (a, b, pair)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_log_det_is_that_of_the_jacobian_and_the_inverse_inverts(x64, case):
    cfg, grid = config_of(case)
    params = random_params(cfg)
    x, conditioning = inputs_of(cfg, grid)

    @jax.jit
    def both(params, x, conditioning):
        def run(x):
            z, log_det = flow.forward(params, x, cfg, conditioning)
            return z, (z, log_det)

        return jax.jacfwd(run, has_aux=True)(x)

    jacobian, (z, log_det) = both(params, x, conditioning)
    size = x.shape[1] * x.shape[2]
    matrix = np.asarray(jacobian).reshape(2, size, 2, size)
    assert not matrix[0, :, 1].any() and not matrix[1, :, 0].any()  # rows do not mix
    for row in range(2):
        sign, expected = np.linalg.slogdet(matrix[row, :, row])
        assert sign == 1 and abs(expected - log_det[row]) < 1e-9
    assert abs(float(log_det[0])) > 0.01
    call = partial(inverse, cfg=cfg, conditioning=conditioning)
    back, info = call(params, z)
    assert error(back, x) < 1e-9
    assert not info["residual"].any()
    tokens = x.shape[1]
    by_jacobi, info = call(params, z, jacobi=Jacobi(tokens, threshold=0.0, max_iterations=tokens))
    assert error(by_jacobi, back) < 1e-12
    assert info["passes"].tolist() == [tokens if depth else 0 for depth in cfg.layers]
    sliding, info = call(params, z, jacobi=Jacobi(3, tolerance=0.0))
    assert error(sliding, back) < 1e-10
    assert (info["passes"] <= tokens).all() and info["residual"].max() == 0


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_round_trip_in_float32(case):
    cfg, grid = config_of(case)
    params = random_params(cfg, 1, np.float32)
    x, conditioning = inputs_of(cfg, grid, 1, np.float32)
    z, log_det = forward(params, x, cfg, conditioning)
    assert z.dtype == log_det.dtype == jnp.float32
    back, _ = inverse(params, z, cfg, conditioning)
    assert error(back, x) < 1e-5
    assert error(z, x) > 0.1


@pytest.mark.fast
@pytest.mark.parametrize("row", [0, 1, 2, 11], ids=lambda row: NAMES[row])
def test_a_token_is_predicted_from_those_before_it_alone(x64, row):
    cfg, grid = config_of(CASES[row])
    block, params = cfg.block(-1), random_params(cfg)["blocks"][str(len(cfg.layers) - 1)]
    x, conditioning = inputs_of(cfg, grid, rows=2)
    conditioning = flow.check_inputs(cfg, x.shape, conditioning)
    predict = lambda x: flow.predict_gaussian(params, x, block, conditioning)
    slopes = jax.jit(jax.jacfwd(predict))(x)
    # The first token depends on none, so every one does on all those before it, and no other.
    expected = np.tri(x.shape[1], k=-1, dtype=bool)
    for slope in slopes:
        reached = np.abs(np.asarray(slope)[0, :, :, 0]).max((1, 3))  # [token predicted, token read]
        np.testing.assert_array_equal(reached > 0, expected)


# ------------------------------------------------------------------------- against PyTorch

STORED = np.load(GOLDEN / "options_tiny.npz")


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in STORED.files}))
def test_stored_option_cases(x64, name):
    golden = {k.split("/", 1)[1]: STORED[k] for k in STORED.files if k.startswith(f"{name}/")}
    options = json.loads(str(golden["options"]))
    state = {k[7:]: v.astype(np.float64) for k, v in golden.items() if k.startswith("params/")}
    cfg, params = starflow.load(state, options)
    params = jax.tree.map(jnp.asarray, params)
    grid = tuple(int(n) for n in golden["grid"])
    x, noise = jnp.asarray(golden["x"]), jnp.asarray(golden["noise"])
    conditions = {k: jnp.asarray(golden[k]) for k in ("text", "labels") if k in golden}
    conditioning = Conditioning(**conditions, grid=grid)

    @jax.jit
    def run(params, x, conditioning):
        def mean(x):
            z, log_det = flow.forward(params, x, cfg, conditioning)
            return (0.5 * jnp.square(z).sum() - log_det.sum()) / x.size, (z, log_det)

        (loss, (z, log_det)), grad = jax.value_and_grad(mean, has_aux=True)(x)
        return {"z": z, "log_det": log_det, "loss": loss, "grad_x": grad}

    values = run(params, x, conditioning)
    values["sample"], _ = inverse(params, noise, cfg, conditioning)
    if "sample_guided" in golden:
        guidance = Guidance(float(golden["guidance"]), text=jnp.asarray(golden["null_text"]))
        guided = inverse(params, noise, cfg, conditioning, guidance=guidance)
        values["sample_guided"] = guided[0]
    patch = options["patch_size"]
    to_image = lambda t: patches.unpatchify(t, grid, patch, "channel_last").transpose(0, 3, 1, 2)
    for key in ("z", "sample"):
        values[f"{key}_image"] = to_image(values[key])
    image = jnp.asarray(golden["x_image"]).transpose(0, 2, 3, 1)
    values["x"] = patches.patchify(image, patch, "channel_last")
    compared = set(golden) - {"options", "grid", "noise", "text", "null_text", "labels", "guidance"}
    compared = {key for key in compared if not key.startswith("params/")} - {"x_image"}
    assert compared == set(values)
    for key in sorted(compared):
        assert error(values[key], golden[key]) < 1e-10, key


# --------------------------------------------------------------- conditions when sampling


@pytest.fixture(scope="module")
def conditioned():
    """A flow with classes and text in every block."""
    return config_of({**CASES[9], "classes": 3, "layers": (1, 1), "grid": (2, 3)})


def test_guidance_weights_of_zero_and_minus_one(x64, conditioned):
    cfg, grid = conditioned
    params = random_params(cfg)
    z, conditioning = inputs_of(cfg, grid)
    draw = partial(inverse, params, z, cfg, conditioning)
    plain = draw()[0]
    zeros = jnp.zeros_like(conditioning.text)
    null = inverse(params, z, cfg, conditioning.replace(text=zeros, labels=None))[0]
    assert error(null, plain) > 0.01
    for rule, annealed in (("product", True), ("linear_log_scale", False), ("linear_scale", True)):
        guide = partial(Guidance, rule=rule, annealed=annealed, temperature_on="unconditional")
        assert error(draw(guidance=guide(0.0, temperature=0.5))[0], plain) < 1e-12
        assert error(draw(guidance=guide(1.0))[0], plain) > 0.01
        if not annealed:
            # (mean, scale) = null's own where the extrapolation goes all the way back.
            assert error(draw(guidance=guide(-1.0))[0], null) < 1e-10
    # With every pass at a temperature, weight 0 is sampling at that temperature.
    guided = draw(guidance=Guidance(0.0, temperature=0.7))[0]
    assert error(guided, draw(temperature=0.7)[0]) < 1e-12
    with pytest.raises(ValueError, match=r"guidance.rule='cfg' is not one of \('product'"):
        draw(guidance=Guidance(1.0, rule="cfg"))


def test_guided_jacobi_equals_guided_sequential(x64, conditioned):
    cfg, grid = conditioned
    params = random_params(cfg)
    z, conditioning = inputs_of(cfg, grid)
    draw = partial(inverse, params, z, cfg, conditioning, guidance=Guidance(1.5))
    exact, info = draw(jacobi=Jacobi(4, 0.0, 4))
    assert error(exact, draw()[0]) < 1e-12
    assert info["passes"].tolist() == [8, 8]
    # A loose threshold stops early, a tight one is near.
    loose, info = draw(jacobi=Jacobi(4, 1e-2, 4))
    assert info["passes"].sum() < 16 and (info["residual"] < 1e-2).all()
    assert error(loose, exact) < 1
    with pytest.raises(ValueError, match="must be a whole number from 1"):
        draw(jacobi=Jacobi(0))


@pytest.mark.parametrize("guidance", [None, Guidance(1.5)])
@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_sliding_jacobi_does_not_depend_on_the_batch(x64, conditioned, guidance, block):
    cfg, grid = conditioned
    params = random_params(cfg)
    z, conditioning = inputs_of(cfg, grid)

    def draw(rows, jacobi):
        text, labels = (
            None if a is None else a[rows] for a in (conditioning.text, conditioning.labels)
        )
        inputs = conditioning.replace(text=text, labels=labels)
        return inverse(params, z[rows], cfg, inputs, guidance=guidance, jacobi=jacobi)

    every = np.arange(len(z))
    exact, steps = draw(every, None)
    for tolerance, limit in ((0.0, 1e-12), (1e-6, 1e-4), (1e-2, 1.0)):
        x, info = draw(every, Jacobi(block, tolerance=tolerance))
        assert error(x, exact) < limit
        assert (info["passes"] <= steps["passes"]).all() and info["residual"].max() <= tolerance
        alone = [draw(every[i : i + 1], Jacobi(block, tolerance=tolerance)) for i in every]
        assert error(np.concatenate([row for row, _ in alone]), x) < 1e-12
        passes = np.stack([row_info["passes"] for _, row_info in alone])
        np.testing.assert_array_equal(passes.max(0), info["passes"])
    if block == 100:
        assert info["passes"].sum() < steps["passes"].sum()


def test_temperature_divides_the_attention_logits(x64, conditioned):
    cfg, grid = conditioned
    params = random_params(cfg)
    z, conditioning = inputs_of(cfg, grid)
    draw = partial(inverse, z=z, cfg=cfg, conditioning=conditioning)
    # Logits are linear in the queries, rotation included.
    cooler = flatten(params)
    for name in cooler:
        if "/query/" in name:
            cooler[name] = cooler[name] / 0.6
    expected = draw(unflatten(cooler))[0]
    assert error(draw(params, temperature=0.6)[0], expected) < 1e-12
    assert error(draw(params)[0], expected) > 1e-3


def test_the_null_class_is_the_mean_in_both_directions(x64, conditioned):
    cfg, grid = conditioned
    params = random_params(cfg)
    x, conditioning = inputs_of(cfg, grid)

    def labels(n):
        labels = None if n is None else jnp.full(len(x), n, jnp.int32)
        return conditioning.replace(labels=labels)

    averaged = flatten(params)
    for name in averaged:
        if name.endswith("class_embed"):
            table = averaged[name]
            averaged[name] = jnp.broadcast_to(table.mean(0), table.shape)
    for run in (partial(forward, cfg=cfg), partial(inverse, cfg=cfg)):
        null = run(params, x, conditioning=labels(-1))[0]
        assert error(run(params, x, conditioning=labels(None))[0], null) < 1e-12
        assert error(run(unflatten(averaged), x, conditioning=labels(2))[0], null) < 1e-12
        assert error(run(params, x, conditioning=labels(2))[0], null) > 1e-3


@pytest.mark.parametrize("keys", ["next", "own"])
def test_explicit_positions_of_the_deep_block(x64, keys):
    cfg, grid = config_of(CASES[2])
    params = random_params(cfg)
    x, conditioning = inputs_of(cfg, grid)
    cfg = dataclasses.replace(cfg, key_positions=keys)
    positions = flow.block_positions(cfg.block(-1), grid, TEXT_LENGTH)
    assert positions.queries.shape == (TEXT_LENGTH + 5, 3)
    plain = forward(params, x, cfg, conditioning)[0]
    explicit = conditioning.replace(positions=jax.tree.map(jnp.asarray, positions))
    assert error(forward(params, x, cfg, explicit)[0], plain) < 1e-12
    moved = conditioning.replace(positions=jax.tree.map(lambda a: jnp.asarray(a) * 3, positions))
    z = forward(params, x, cfg, moved)[0]
    assert error(z, plain) > 1e-4
    back = inverse(params, z, cfg, moved)[0]
    assert error(back, x) < 1e-9
    if keys == "own":
        bare = conditioning.replace(positions=positions._replace(keys=None))
        with pytest.raises(ValueError, match="key_positions='own' needs those of the keys"):
            flow.forward(params, x, cfg, bare)


def test_causal_attention_in_parts_is_causal_attention(x64):
    rng = np.random.default_rng(0)
    draw = lambda heads, length: jnp.asarray(rng.standard_normal((2, heads, length, 4)))
    for queries, keys in ((64, 64), (128, 128), (64, 80), (66, 66)):
        q, k, v = draw(4, queries), draw(2, keys), draw(2, keys)
        mask = np.tril(np.ones((queries, keys), bool), keys - queries)
        scores = np.einsum("bkgtd,bksd->bkgts", q.reshape(2, 2, 2, queries, 4), k) / 2
        weights = np.exp(np.where(mask, scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bkgts,bksd->bkgtd", weights, v).reshape(q.shape)
        assert error(grouped_query_attention(q, k, v, None), expected) < 1e-12
        assert error(grouped_query_attention(q, k, v, jnp.asarray(mask)), expected) < 1e-12


# ------------------------------------------------------------------------------ bad input


@pytest.mark.fast
def test_inputs_that_do_not_fit_are_named(conditioned):
    cfg, grid = conditioned
    params = random_params(cfg, dtype=np.float32)
    x, conditioning = inputs_of(cfg, grid, dtype=np.float32)
    bare = dataclasses.replace(cfg, text_channels=0, text_length=0, classes=0)
    learned = dataclasses.replace(
        bare, positions="learned", rope_frequencies="released", key_positions="next"
    )
    for other, changes, words in (
        (cfg, {"x": x[..., :1]}, r"tokens: expected \[B, T, 2\], got \[2, 6, 1\]"),
        (cfg, {"text": None}, "text: is missing"),
        (cfg, {"text": conditioning.text[..., :2]}, r"text: expected \[B, L, 3\], got \[2, 3, 2\]"),
        (cfg, {"grid": (2, 2)}, "grid: 2 x 2 does not hold 6 tokens"),
        (cfg, {"grid": None}, "grid: 2 x 2 does not hold 6 tokens"),
        (bare, {"labels": None}, "text: the model has none"),
        (bare, {"text": None}, "labels: the model has no classes"),
        (learned, {"text": None, "labels": None}, "learned positions need T=4, got 6"),
    ):
        tokens = changes.pop("x", x)
        with pytest.raises(ValueError, match=words):
            flow.forward(params, tokens, other, conditioning.replace(**changes))
        with pytest.raises(ValueError, match=words):
            inverse(params, tokens, other, conditioning.replace(**changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 8, "head_dim": 16}, "block 0 of width 8: heads=0 must be at least 1"),
        ({"deep_width": 8, "head_dim": 16}, "block 1 of width 8: heads=0 must be at least 1"),
        ({"kv_heads": 3}, "block 0 of width 32: heads=2 is not a multiple of kv_heads=3"),
    ],
)
def test_blocks_without_whole_heads_are_named(changes, words):
    values = {"width": 32, "head_dim": 16, "side": 2, "channels": 4, "layers": (1, 1), **changes}
    with pytest.raises(ValueError, match=f"model.layers, {words}"):
        flow.declare(flow.FlowConfig(**values))
