"""A very small STARFlow2, random parameters for any backbone, and packed interleaved rows."""

import jax
import numpy as np

from starflow2_jax import params
from starflow2_jax.data import chat_layout, packed_batches, packing
from starflow2_jax.data.chat_layout import MessagePart
from starflow2_jax.models import qwen, starflow2
from starflow2_jax.models.ablations.crossings import CrossingsConfig

SIDE, CHANNELS, VOCAB = 2, 3, 64
PATCHES = SIDE * SIDE
# Positions of the flow other than the defaults.
OWN_KEYS = {"rope_frequencies": "grid", "key_positions": "own"}
FLOW = {"side": SIDE, "channels": CHANNELS, "width": 40, "head_dim": 20, "layers": (1, 1, 2)}


def model(**changes):
    """Return the configuration of two streams of two layers, with some fields changed."""
    dtype = {"compute_dtype": changes.pop("compute_dtype", None)}
    vlm = qwen.QwenConfig(
        vocab=VOCAB,
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        mlp_width=48,
        sections=(2, 3, 3),
        tied=changes.pop("tied", False),
        **dtype,
    )
    sizes = {**FLOW, **changes.pop("flow", {}), **dtype}
    kind = CrossingsConfig if "crossings" in changes else starflow2.PretzelConfig
    return kind(vlm, starflow2.flow_config(vlm.width, **sizes), **changes)


def random_params(cfg, seed=0, noise=0.3, zero=()):
    """Return parameters that are zero only in the subtrees `zero`; float64 under x64."""
    tree = params.init(jax.random.key(seed), cfg.declare())
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    rng = np.random.default_rng(seed)

    def add_noise(path, leaf):
        leaf = np.asarray(leaf, dtype)
        if path[0].key in zero:
            return np.zeros_like(leaf)
        size = noise / max(leaf.shape[-2] if leaf.ndim > 1 else 10, 1) ** 0.5
        return leaf + size * rng.standard_normal(leaf.shape).astype(dtype)

    return jax.tree_util.tree_map_with_path(add_noise, tree)


def _encode(text):
    roles = {"user\n": 6, "assistant\n": 7}
    return (roles[text],) if text in roles else tuple(8 + ord(c) % (VOCAB - 8) for c in text)


TOKENIZER = chat_layout.Tokenizer(
    encode=_encode,
    decode=str,
    turn_start=1,
    turn_end=2,
    vision_start=3,
    vision_end=4,
    image=5,
    pad=0,
    opening=(),
    vocab_size=VOCAB,
)
T2I = (MessagePart("user", "ab"), MessagePart("assistant", 0, True))
I2T = (MessagePart("user", 0), MessagePart("user", "what?"), MessagePart("assistant", "cd.", True))
EDIT = (MessagePart("user", 0, True), MessagePart("user", "e"), MessagePart("assistant", 1, True))
TEXT = (MessagePart("user", "hi"), MessagePart("assistant", "yo", True))
# A thought, an image and an answer.
REASON = (
    *(MessagePart("user", "f"), MessagePart("user", 0), MessagePart("assistant", "g", True)),
    *(MessagePart("assistant", 1, True), MessagePart("assistant", "h", True)),
)


def batch(packed, length=64, places=4, seed=0, dtype=np.float32):
    """Return the arrays of packed rows, each a list of records, with random latents.

    The images of a record have the same latents in whichever row it is packed.
    """
    spec, rows = packing.PackingSpec(length, PATCHES, places), []
    mean = np.zeros((len(packed), places, PATCHES, CHANNELS), dtype)
    for b, records in enumerate(packed):
        layouts = [
            chat_layout.apply_chat_template(record, TOKENIZER, PATCHES) for record in records
        ]
        rows.append(packed_batches.build_packed_row(layouts, spec, SIDE, TOKENIZER.pad))
        image = 0
        for record in records:
            rng = np.random.default_rng((seed, len(record), len(str(record))))
            for _ in range(sum(isinstance(p.content, int) for p in record)):
                mean[b, image] = rng.standard_normal(mean.shape[2:])
                image += 1
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**arrays, "latent_mean": mean, "latent_logvar": np.full_like(mean, -80.0)}
