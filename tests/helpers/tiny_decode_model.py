"""A very small STARFlow2 for decoding, with a tokenizer of single letters."""

import numpy as np

from helpers.pretzel_batch import random_params
from starflow2_jax import config
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.inference.api import STARFlow2
from starflow2_jax.inference.prompts import Part
from starflow2_jax.models import qwen, starflow2

SIDE, CHANNELS = 2, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz .?!\nAB"
FIRST_LETTER = 7
VOCAB = FIRST_LETTER + len(LETTERS) + 1  # one id beyond the tokenizer's
TOKENIZER = Tokenizer(
    encode=lambda text: tuple(FIRST_LETTER + LETTERS.index(c) for c in text),
    decode=lambda ids: "".join(LETTERS[i - FIRST_LETTER] for i in ids if i >= FIRST_LETTER),
    turn_start=1,
    turn_end=2,
    vision_start=3,
    vision_end=4,
    image=5,
    pad=0,
    opening=(),
    vocab_size=VOCAB - 1,
)


def model(seed=0, noise=0.4, codec=None, flow=None, context_sigma=None, **changes):
    """Return a model of two streams of two layers, none of whose parameters is zero.

    `flow` changes options of the flow, `changes` those of the Pretzel.
    """
    vlm = qwen.QwenConfig(
        vocab=VOCAB,
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        mlp_width=48,
        sections=(2, 3, 3),
        image_token=5,
        video_token=6,
        vision_start_token=3,
        vision_end_token=4,
    )
    sizes = {
        **(flow or {}),
        "side": SIDE,
        "channels": CHANNELS,
        "width": 40,
        "head_dim": 20,
        "layers": (1, 1, 2),
    }
    cfg = config.default()
    cfg.task, cfg.noise.sigma, cfg.noise.context_sigma = "starflow2", 0.1, context_sigma
    model_config = starflow2.PretzelConfig(
        vlm, starflow2.flow_config(vlm.width, **sizes), **changes
    )
    tree = random_params(model_config, seed, noise)
    return STARFlow2(config.to_dict(cfg), model_config, tree, TOKENIZER, codec)


def latent(seed):
    """Return random latents [N, D] of an image."""
    return np.random.default_rng(seed).standard_normal((SIDE * SIDE, CHANNELS))


def image_part(seed, role="user"):
    """Return a message part of random latents."""
    return Part("image", role, latent=latent(seed))
