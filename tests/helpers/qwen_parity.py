"""Ours beside transformers: what both make of a case, and how far they are apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from helpers import qwen_decode
from helpers.golden_parity import error
from starflow2_jax.checkpoints import tensor_files
from starflow2_jax.checkpoints.convert import qwen as table
from starflow2_jax.models import qwen, qwen_vision
from starflow2_jax.params import unflatten

TOLERANCE = 1e-5


def from_state(state, cfg):
    """Our tree of a state dict of theirs, by the table of names alone."""
    renamed = {}
    for name, array in state.items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        renamed[name] = array
    source, leaves = tensor_files.open_source(renamed), {}
    for piece in table.table(cfg):
        part = table._read(source, piece)
        part = part.T if piece.transposed else part
        leaves.setdefault(piece.leaf, []).append(part)
        if piece.layer is None:
            leaves[piece.leaf] = part
    return unflatten({name: jnp.asarray(np.array(leaf)) for name, leaf in leaves.items()})


def ours(params, cfg, given):
    """What `torch_qwen.reference` gives."""
    positions = qwen.rope_indices(given["ids"], cfg, given["grids"], given["valid"])[0]
    patches, at = None, None
    if len(given["grids"]):
        patches, at = given["patches"], qwen_vision.plan(given["grids"], cfg.vision)
    found = compute(params, given["ids"], given["valid"], positions, patches, at, cfg)
    return {"positions": positions, **found}


@functools.partial(jax.jit, static_argnames="cfg")
def compute(params, ids, valid, positions, patches, at, cfg):
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
def step(params, unstacked, ids, patches, at, positions, mask, cache, cfg):
    """Logits of new tokens against a cache."""
    h = qwen.embed_all(params, ids, cfg, patches, at)
    states, cache = qwen.apply_layers(
        {**params, "layers": unstacked}, h, cfg, positions, mask, cache=cache
    )
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


def prompt_of(given, cfg):
    positions, following = qwen.rope_indices(given["ids"], cfg, given["grids"], given["valid"])
    patches = given["patches"] if len(given["grids"]) else None
    return qwen_decode.Prompt(
        given["ids"], given["valid"], positions, following, patches, given["grids"]
    )
