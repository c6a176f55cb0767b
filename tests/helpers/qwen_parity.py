"""Comparison of Qwen2.5-VL with transformers: both compute a case, every array is compared."""

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
    """Return the parameter tree of a published state dict."""
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


def compute_outputs(params, cfg, case):
    """Return the arrays that `torch_qwen.reference` returns."""
    positions = qwen.rope_indices(case["ids"], cfg, case["grids"], case["valid"])[0]
    patches = plan = None
    if len(case["grids"]):
        patches, plan = case["patches"], qwen_vision.plan(case["grids"], cfg.vision)
    outputs = compute(params, case["ids"], case["valid"], positions, patches, plan, cfg)
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
    """Return the logits of new tokens and the extended cache."""
    h = qwen.embed_multimodal(params, ids, cfg, patches, plan)
    states, cache = qwen.apply_layers(
        {**params, "layers": unstacked}, h, cfg, positions, mask, cache=cache
    )
    return qwen.logits(params, states, cfg), cache


def check(params, cfg, case, reference):
    """Compare every array with the reference, at valid positions only."""
    outputs, valid = compute_outputs(params, cfg, case), case["valid"]
    np.testing.assert_array_equal(outputs["positions"], reference["positions"])
    for key in outputs:
        if key == "positions":
            continue
        values, expected = np.asarray(outputs[key]), reference[key]
        assert values.shape == expected.shape, key
        if key == "hidden":
            pairs = [(a[valid], b[valid]) for a, b in zip(values, expected)]
        elif key == "vision":
            pairs = list(zip(values, expected))
        else:
            mask = ... if key == "features" else valid
            pairs = [(values[mask], expected[mask])]
        for i, pair in enumerate(pairs):
            assert error(*pair) <= TOLERANCE, f"{key} {i}: off by {error(*pair):.2e}"


def make_prompt(case, cfg):
    """Return the prompt of a case for `qwen_decode`."""
    positions, next_positions = qwen.rope_indices(case["ids"], cfg, case["grids"], case["valid"])
    patches = case["patches"] if len(case["grids"]) else None
    return qwen_decode.Prompt(
        case["ids"], case["valid"], positions, next_positions, patches, case["grids"]
    )
