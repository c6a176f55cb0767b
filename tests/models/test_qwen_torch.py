"""Qwen2.5-VL equals transformers on torch: random models of several shapes, real widths."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import qwen_decode
from helpers.golden_parity import error
from helpers.qwen_parity import TOLERANCE, check, from_state, make_prompt, step
from peer import torch_qwen

from starflow2_jax.checkpoints.convert.qwen_options import read_options
from starflow2_jax.models import layers, qwen, qwen_vision


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


WIDER_TEXT = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


WIDER_MODEL = {"seed": 2, "tied": True, "text": WIDER_TEXT, "vision": {"out_hidden_size": 48}}
WINDOWS = {"seed": 3, "vision": {"window_size": 24, "fullatt_block_indexes": [0, 2]}}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *(({"seed": 1}, name) for name in torch_qwen.CASES),
        (WIDER_MODEL, "three_right"),
        (WINDOWS, "three_left"),
    ],
)
def test_random_models(torch, build, name):
    model, inputs = torch_qwen.make(**build), torch_qwen.CASES[name]()
    cfg, params = converted(model)
    assert cfg.tied == build.get("tied", False) and ("head" in params) != cfg.tied
    check(params, cfg, inputs, torch_qwen.reference(model, inputs))


@pytest.mark.parametrize("name", ["one", "three_left", "three_right"])
def test_cached_decoding_step_by_step(torch, name):
    """After images and padding on either side, each step's logits are those of the cached model."""
    model, inputs = torch_qwen.make(seed=4), torch_qwen.CASES[name]()
    cfg, params = converted(model)
    ids, valid, grids = inputs["ids"], inputs["valid"], inputs["grids"]
    rows, length, steps = *ids.shape, 6
    extra = np.random.default_rng(5).integers(3, 80, (rows, steps))
    position_ids, delta = torch_qwen.positions(model, inputs)
    positions, next_positions = qwen.rope_indices(ids, cfg, grids, valid)
    np.testing.assert_array_equal(
        next_positions, (delta[:, 0] + torch.tensor(valid.sum(1))).numpy()
    )

    out = model(**torch_qwen.arguments(inputs), position_ids=position_ids, use_cache=True)
    expected, past = [out.logits[:, -1].numpy()], out.past_key_values
    visible = np.concatenate([valid, np.ones((rows, steps), bool)], 1)
    for i in range(steps):
        out = model(
            input_ids=torch.tensor(extra[:, i : i + 1]),
            attention_mask=torch.tensor(visible[:, : length + i + 1].astype(np.int64)),
            position_ids=torch.tensor(np.broadcast_to((next_positions + i)[:, None], (3, rows, 1))),
            past_key_values=past,
            use_cache=True,
        )
        expected.append(out.logits[:, 0].numpy())

    unstacked = layers.unstack(params["layers"])
    cache = qwen.empty_cache(cfg, rows, length + steps, jnp.float32)
    slots = np.arange(length + steps)
    plan = qwen_vision.plan(grids, cfg.vision)
    mask = visible[:, None] & (slots <= np.arange(length)[:, None])
    arguments = (ids, inputs["patches"], plan, positions, mask, cache, cfg)
    out, cache = step(params, unstacked, *arguments)
    actual = [np.asarray(out)[:, -1]]
    for i in range(steps):
        mask = visible[:, None] & (slots <= length + i)
        step_positions = np.repeat((next_positions + i)[:, None, None], 3, 2)
        arguments = (
            extra[:, i : i + 1].astype(np.int32),
            None,
            None,
            step_positions,
            mask,
            cache,
            cfg,
        )
        out, cache = step(params, unstacked, *arguments)
        actual.append(np.asarray(out)[:, 0])
    ends_in_token = valid[:, -1]
    assert error(actual[0][ends_in_token], expected[0][ends_in_token]) <= TOLERANCE
    for a, b in zip(actual[1:], expected[1:]):
        assert error(a, b) <= TOLERANCE


@pytest.mark.parametrize("name", ["text", "three_left"])
def test_greedy_tokens(torch, name):
    model = torch_qwen.make(seed=6)
    inputs = torch_qwen.CASES[name]()
    if name == "text":
        inputs = torch_qwen.inputs([[20], [13]], "left")
    cfg, params = converted(model)
    rows = qwen_decode.generate(params, cfg, make_prompt(inputs, cfg), max_tokens=64)
    np.testing.assert_array_equal(np.array(rows), torch_qwen.greedy(model, inputs))


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
    inputs = torch_qwen.inputs(rows, "left", sizes, values=1176)
    cfg, params = converted(model)
    check(params, cfg, inputs, torch_qwen.reference(model, inputs))
