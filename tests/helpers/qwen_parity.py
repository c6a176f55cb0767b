"""Ours beside transformers: what both make of a case, and how far they are apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from helpers import qwen_decode
from helpers.golden_parity import error
from starflow2_jax.checkpoints import tensor_files
from starflow2_jax.checkpoints.convert import qwen as convert_qwen, tensor_map
from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.params import flatten, unflatten

TOLERANCE = 1e-5


def from_state(state, cfg):
    """Return our tree of a published state dict."""
    renamed = {}
    for name, array in state.items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        renamed[name] = array
    source = tensor_files.open_source(renamed)
    leaves = flatten(tensor_map.to_tree(convert_qwen.table(cfg), source, qwen.declare(cfg)))
    return unflatten({name: jnp.asarray(tensor.read()) for name, tensor in leaves.items()})


def causal_mask(valid):
    """Return [B, T, T]: each position attends to the valid [B, T] ones up to itself."""
    return jnp.asarray(valid)[:, None, :] & np.tri(valid.shape[1], dtype=bool)


def hidden_states(params, h, positions, mask, cfg):
    """Return [layers + 1, B, T, C]: h, the states after each layer, the last ones normed."""
    tables = qwen.rope_tables(positions, cfg, jnp.promote_types(h.dtype, jnp.float32))

    def body(h, layer_params):
        return layers.decoder_layer(layer_params, h, cfg.layer, tables, mask)[0], h

    last, inputs = jax.lax.scan(body, h, params["layers"])
    return jnp.concatenate([inputs, qwen.final_norm(params, last, cfg)[None]])


def vision_hidden_states(params, patches, plan, cfg):
    """Return [depth + 1, N, C]: the input of the tower's layers and the output of each."""
    states = []
    for depth in range(cfg.depth + 1):
        first_layers = jax.tree.map(lambda w, n=depth: w[:n], params["layers"])
        shallow = dataclasses.replace(cfg, depth=depth)
        shallow_params = {**params, "layers": first_layers}
        states.append(qwen_vision.apply_layers(shallow_params, patches, plan, shallow))
    return jnp.stack(states)


def ours(params, cfg, given):
    """Return what `torch_qwen.reference` returns."""
    positions = qwen.rope_indices(given["ids"], cfg, given["grids"], given["valid"])[0]
    patches = plan = None
    if len(given["grids"]):
        patches, plan = given["patches"], qwen_vision.plan(given["grids"], cfg.vision)
    outputs = compute(params, given["ids"], given["valid"], positions, patches, plan, cfg)
    return {"positions": positions, **outputs}


@functools.partial(jax.jit, static_argnames="cfg")
def compute(params, ids, valid, positions, patches, plan, cfg):
    outputs, mask = {}, causal_mask(valid)
    if patches is not None:
        outputs["vision"] = vision_hidden_states(params["vision"], patches, plan, cfg.vision)
        outputs["features"] = qwen_vision.encode(params["vision"], patches, plan, cfg.vision)
    h = qwen.embed_multimodal(params, ids, cfg, patches, plan)
    outputs["hidden"] = hidden_states(params, h, positions, mask, cfg)
    outputs["logits"] = qwen.forward(
        params, ids, cfg, patches=patches, plan=plan, positions=positions, mask=mask
    )
    return outputs


@functools.partial(jax.jit, static_argnames="cfg")
def step(params, unstacked, ids, patches, plan, positions, mask, cache, cfg):
    """Logits of new tokens against a cache."""
    h = qwen.embed_multimodal(params, ids, cfg, patches, plan)
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
