"""Both families against numbers from the published PyTorch code: every f32/ and f64*/ key."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.golden_parity import check_all, error
from helpers.paths import GOLDEN

from starflow2_jax.checkpoints.convert import starflow
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi, inverse
from starflow2_jax.models import flow, layers, rope
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.models.patches import patchify, unpatchify
from starflow2_jax.training.losses.flow import flow_loss

TARFLOW = {
    "in_channels": 3, "img_size": 16, "patch_size": 4, "channels": 64, "num_blocks": 4,
    "layers_per_block": 2, "nvp": True,
}  # fmt: skip
STARFLOW = {
    "in_channels": 4, "img_size": 8, "patch_size": 1, "channels": 64, "num_blocks": 4,
    "layers_per_block": [2, 2, 2, 4], "head_dim": 32, "rope": 1, "sos": 1, "txt_size": 8,
    "txt_dim": 24, "cond_top_only": 1, "use_softplus": 1, "use_final_norm": 1, "soft_clip": 4,
    "seq_order": "L2R",
}  # fmt: skip
ADAMW = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-4)


def read(name):
    return np.load(GOLDEN / name)


def weights_of(golden, options, dtype, without=()):
    state = {
        k.removeprefix("params/"): golden[k].astype(dtype)
        for k in golden.files
        if k.startswith("params/") and not any(w in k for w in without)
    }
    cfg, params = starflow.load(state, options)
    return cfg, jax.tree.map(jnp.asarray, params)


@partial(jax.jit, static_argnames="cfg")
def losses(params, x, cfg, penalty, conditioning):
    row_losses, sums = flow_loss(params, x, cfg, conditioning, latent_penalty=penalty)
    return row_losses.sum() / x.size, sums


def grad_norms(grads, cfg, names):
    arrays = starflow.export(grads, cfg)
    return np.stack([np.linalg.norm(np.asarray(arrays[str(n)], np.float64)) for n in names])


def adamw_losses(params, x, cfg, conditioning, penalty):
    """(plain, with penalty) before each of six updates on one batch."""

    @jax.jit
    def update(params, state):
        mean = lambda p: losses(p, x, cfg, penalty, conditioning)[0]
        total, grads = jax.value_and_grad(mean)(params)
        plain = losses(params, x, cfg, 0.0, conditioning)[0]
        updates, state = ADAMW.update(grads, state, params)
        return optax.apply_updates(params, updates), state, plain, total

    state, rows = ADAMW.init(params), []
    for _ in range(6):
        params, state, plain, total = update(params, state)
        rows.append((plain, total))
    return np.asarray(rows, np.float64).T


def tarflow_values(golden, dtype, conditional, head_dim):
    """Every stored quantity of one TarFlow run."""
    without = () if conditional else ("class_embed",)
    options = {**TARFLOW, "num_classes": 5 if conditional else 0}
    cfg, params = weights_of(golden, options, dtype, without)
    cfg = dataclasses.replace(cfg, head_dim=head_dim)
    x = patchify(jnp.asarray(golden["x"], dtype).transpose(0, 2, 3, 1), 4, "channel_first")
    noise = jnp.asarray(golden["z_noise"], dtype)
    y, drop = jnp.asarray(golden["y"]), jnp.asarray(golden["y_drop"])
    to_image = lambda t: unpatchify(t, (4, 4), 4, "channel_first").transpose(0, 3, 1, 2)
    values = {}
    cases = {"y": y, "ydrop": drop, "ynone": None} if conditional else {"ynone": None}
    names = golden["param_names/cond" if conditional else "param_names/uncond"]
    for case, labels in cases.items():
        conditioning = Conditioning(labels=labels)
        outputs, log_dets = jax.jit(flow.forward_blocks, static_argnames="cfg")(
            params, x, cfg=cfg, conditioning=conditioning
        )
        mean = lambda p, x: losses(p, x, cfg, 0.0, conditioning)[0]  # noqa: B023
        loss, grads = jax.value_and_grad(mean, argnums=(0, 1))(params, x)
        values |= {
            f"{case}/z": outputs[-1],
            f"{case}/logdet": sum(log_dets) / (x.shape[1] * x.shape[2]),
            f"{case}/loss": loss,
            f"{case}/grad_x": to_image(grads[1]),
            f"{case}/grad_norms": grad_norms(grads[0], cfg, names),
            **{f"{case}/block_out_{i}": outputs[i + 1] for i in range(4)},
        }
    labels = y if conditional else None
    sample = lambda guidance=None, labels=labels: inverse(
        params, noise, cfg, Conditioning(labels=labels), guidance=guidance
    )
    guide = partial(
        Guidance, rule="linear_log_scale", temperature_on="unconditional", all_blocks=True
    )
    plain, info = sample()
    values |= {f"sample/seq_{i}": to_image(t) for i, t in enumerate(info["tokens"])}
    values["sample/g0"] = to_image(plain)
    if conditional:
        values["sample/g0_ynone"] = to_image(sample(labels=None)[0])
        for annealed in (False, True):
            tail = "_annealed" if annealed else ""
            for what in ("ab", "a", "b"):
                g = guide(1.5, what=what, annealed=annealed)
                values[f"sample/g1.5_{what}{tail}"] = to_image(sample(g)[0])
            g = guide(1.5, temperature=0.7, annealed=annealed)
            values[f"sample/g1.5_ab_temp0.7{tail}"] = to_image(sample(g)[0])
    else:
        values["sample/g1_ab_temp0.5"] = to_image(sample(guide(1.0, temperature=0.5))[0])
    if head_dim == 64:
        values["adamw_losses"] = adamw_losses(params, x, cfg, Conditioning(labels=labels), 0.0)[0]
    return values


def tolerance_32(key):
    return 5e-5 if key.startswith("sample") else 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["cond", pytest.param("uncond", marks=pytest.mark.slow)])
def test_tarflow_float32(kind):
    golden = read("tarflow_tiny.npz")
    values = tarflow_values(golden, np.float32, kind == "cond", 64)
    check_all(values, golden, f"f32/{kind}/", tolerance_32)


@pytest.mark.parametrize(
    "prefix, head_dim, kind",
    [
        ("f64", 64, "cond"),
        pytest.param("f64", 64, "uncond", marks=pytest.mark.slow),
        ("f64_hd16", 16, "cond"),
        pytest.param("f64_hd16", 16, "uncond", marks=pytest.mark.slow),
    ],
)
def test_tarflow_float64(x64, prefix, head_dim, kind):
    golden = read("tarflow_tiny.npz")
    values = tarflow_values(golden, np.float64, kind == "cond", head_dim)
    check_all(values, golden, f"{prefix}/{kind}/", lambda key: 1e-10)


def channels_last(golden, name, dtype):
    x = jnp.asarray(golden[name], dtype).transpose(0, 2, 3, 1)
    return patchify(x, 1, "channel_last"), x.shape[1:3]


def deep_text_states(params, x, cfg, text):
    """Text rows of the deep block after its final norm."""
    block, weights = cfg.block(-1), params["blocks"]["3"]
    start = jnp.broadcast_to(weights["start"], (x.shape[0], 1, cfg.channels))
    h = flow.embed_tokens(weights, jnp.concatenate([start, x[:, :-1]], 1), block)
    h = jnp.concatenate([flow.embed_text(weights, text, x.shape[0], block), h], 1)
    h, _ = flow.apply_layers(weights, h, block, flow.block_positions(block, (8, 8), 8))
    return layers.rms_norm(weights["final_norm"], h)[:, :8]


def forward_values(params, cfg, x, grid, text, names=None):
    conditioning = Conditioning(text=text, grid=grid)
    loss, sums = losses(params, x, cfg, 0.0, conditioning)
    log_det = sum(sums[f"log_det/{i}"] for i in range(4))
    z, _ = flow.forward(params, x, cfg, conditioning)
    to_image = lambda t: unpatchify(t, grid, 1, "channel_last").transpose(0, 3, 1, 2)
    values = {
        "z": to_image(z),
        "loss": loss,
        "loss_z": sums["half_square"].sum() / x.size,
        "loss_logdet": -log_det.sum() / x.size,
        "logdet_per_example": log_det / (x.size / len(x)),
        "logdet_sum_per_example": log_det,
    }
    if names is not None:
        mean = lambda p, x: losses(p, x, cfg, 0.0, conditioning)[0]
        grads = jax.grad(mean, argnums=(0, 1))(params, x)
        values["grad_x"] = to_image(grads[1])
        values["grad_norms"] = grad_norms(grads[0], cfg, names)
    return values


def starflow_values(golden, dtype):
    """Every stored quantity of one STARFlow run."""
    cfg, params = weights_of(golden, STARFLOW, dtype)
    text, null = (jnp.asarray(golden[n], dtype) for n in ("y", "y_uncond"))
    x, grid = channels_last(golden, "x", dtype)
    names = golden["param_names"]
    values = {f"fwd/{k}": v for k, v in forward_values(params, cfg, x, grid, text, names).items()}
    for case, name, case_text in (
        ("fwd_rect", "x_rect", text), ("fwd_wide", "x_wide", text), ("fwd_txt5", "x", text[:, :5])
    ):  # fmt: skip
        case_values = forward_values(params, cfg, *channels_last(golden, name, dtype), case_text)
        values |= {f"{case}/{k}": v for k, v in case_values.items()}
    outputs, _ = flow.forward_blocks(params, x, cfg, Conditioning(text=text))
    for i, tokens in enumerate(outputs):
        values[f"fwd/block_out_{i}"] = tokens.reshape(2, 8, 8, 4)
    for i in range(4):
        block, tokens = cfg.block(i), outputs[i]
        tokens = tokens[:, ::-1] if block.reverse else tokens
        conditioning = Conditioning(text=text if block.text else None, grid=grid)
        scale, _ = flow.predict_gaussian(params["blocks"][str(i)], tokens, block, conditioning)
        values[f"fwd/block_logdet_{i}"] = -jnp.log(scale)
    values["fwd/y_out"] = deep_text_states(params, outputs[3], cfg, text)
    plain, with_penalty = adamw_losses(params, x, cfg, Conditioning(text=text), 1e-4)
    values |= {"adamw_losses": plain, "adamw_losses_with_latent_reg": with_penalty}

    noise, _ = channels_last(golden, "z_noise", dtype)
    rect, rect_grid = channels_last(golden, "z_noise_rect", dtype)
    to_image = lambda t, g=grid: unpatchify(t, g, 1, "channel_last").transpose(0, 3, 1, 2)
    sample = partial(inverse, params, noise, cfg, Conditioning(text=text))
    guide = partial(Guidance, 2.5, text=null)
    guided, info = sample(guidance=guide())
    values |= {f"sample/g2.5_seq_{i}": to_image(t) for i, t in enumerate(info["tokens"])}
    values |= {
        "sample/g0": to_image(sample()[0]),
        "sample/g0_temp0.8": to_image(sample(temperature=0.8)[0]),
        "sample/g0_rect": to_image(
            inverse(params, rect, cfg, Conditioning(text=text, grid=rect_grid))[0], rect_grid
        ),
        "sample/g2.5": to_image(guided),
        "sample/g2.5_temp0.8": to_image(sample(guidance=guide(temperature=0.8))[0]),
    }
    for size, threshold in ((16, 1e-3), (16, 1e-6), (16, 0), (64, 1e-6)):
        name = f"sample/jacobi_bs{size}_th{threshold}"
        runs = [sample(jacobi=Jacobi(size, threshold), guidance=g) for g in (None, guide())]
        values[f"{name}_g0"], values[f"{name}_g2.5"] = (to_image(x) for x, _ in runs)
        values[f"{name}_iters"] = np.array([int(info["passes"].sum()) for _, info in runs])
    return values


def tolerance_iterations(tolerance):
    """Counts of forward passes are equal; everything else to the tolerance of its kind."""
    return lambda key: 0.0 if key.endswith("_iters") else tolerance(key)


@pytest.mark.slow
def test_starflow_float32():
    golden = read("starflow_tiny.npz")
    check_all(
        starflow_values(golden, np.float32), golden, "f32/", tolerance_iterations(tolerance_32)
    )


def test_starflow_float64(x64):
    golden = read("starflow_tiny.npz")
    all_values = starflow_values(golden, np.float64)
    exact = tolerance_iterations(lambda key: 1e-10)
    check_all(all_values, golden, "f64_exact_rope/", exact)
    # The peer's rope frequencies are float32 here, all_values float64: 1e-8.
    variants = {
        "exp_scale": {"use_softplus": 0},
        "noclip": {"soft_clip": 0},
        "R2L": {"seq_order": "R2L"},
    }
    for option, changes in variants.items():
        cfg, params = weights_of(golden, {**STARFLOW, **changes}, np.float64)
        text = jnp.asarray(golden["y"], np.float64)
        x, grid = channels_last(golden, "x", np.float64)
        noise, _ = channels_last(golden, "z_noise", np.float64)
        values = forward_values(params, cfg, x, grid, text)
        image = unpatchify(
            inverse(params, noise, cfg, Conditioning(text=text))[0], grid, 1, "channel_last"
        )
        values["sample_g0"] = image.transpose(0, 3, 1, 2)
        all_values |= {f"variant_{option}/{k}": v for k, v in values.items()}
    check_all(all_values, golden, "f64/", tolerance_iterations(lambda key: 1e-8))


@pytest.mark.fast
def test_rope_tables(x64):
    golden = read("starflow_tiny.npz")
    for rows, columns, length in ((8, 8, 8), (8, 8, 0), (4, 8, 8), (4, 16, 0)):
        positions = rope.after_text(rope.plane((rows, columns), 8), length, 8)
        key = f"{rows}x{columns}_txt{length}"
        assert error(positions, golden[f"rope/pos_{key}"]) < 1e-6  # float32 in the peer
        doubled = np.repeat(rope.angles(positions, 32), 2, -1)
        assert error(doubled, golden[f"rope/angles_{key}"]) < 1e-5
