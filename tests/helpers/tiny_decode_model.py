"""A very small STARFlow2 whose every path is open, and a tokenizer of letters, shared by tests."""

import jax
import numpy as np

from starflow2_jax import config, params
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.inference.api import STARFlow2
from starflow2_jax.inference.prompts import Part
from starflow2_jax.models import qwen, starflow2

SIDE, CHANNELS = 2, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz .?!\nAB"
FIRST = 7
VOCAB = FIRST + len(LETTERS) + 1  # one id beyond the tokenizer's
TOKENIZER = Tokenizer(
    encode=lambda text: tuple(FIRST + LETTERS.index(c) for c in text),
    decode=lambda ids: "".join(LETTERS[i - FIRST] for i in ids if i >= FIRST),
    turn_start=1,
    turn_end=2,
    vision_start=3,
    vision_end=4,
    image=5,
    pad=0,
    opening=(),
    vocab_size=VOCAB - 1,
)


def model(seed=0, shake=0.4, fae=None, **changes):
    """Two streams of two layers; weights float32, or float64 under x64."""
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
    sizes = {"side": SIDE, "channels": CHANNELS, "width": 40, "head_dim": 20, "layers": (1, 1, 2)}
    shape = starflow2.PretzelConfig(vlm, starflow2.flow_config(vlm.width, **sizes), **changes)
    tree = params.init(jax.random.key(seed), starflow2.declare(shape))
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    rng = np.random.default_rng(seed)

    def change(leaf):
        size = shake / max(leaf.shape[-2] if leaf.ndim > 1 else 10, 1) ** 0.5
        return np.asarray(leaf, dtype) + size * rng.standard_normal(leaf.shape).astype(dtype)

    cfg = config.default()
    cfg.task, cfg.noise.sigma = "starflow2", 0.1
    return STARFlow2(config.to_dict(cfg), shape, jax.tree.map(change, tree), TOKENIZER, fae)


def latent(seed):
    """Of an image [N, D]."""
    return np.random.default_rng(seed).standard_normal((SIDE * SIDE, CHANNELS))


def picture(seed, role="user"):
    return Part("image", role, latent=latent(seed))
