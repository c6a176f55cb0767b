"""Likelihoods of interleaved rows, computed in parallel with teacher forcing.

Shapes: B rows, T positions, M images of a row, N patches, D latent channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference.image_latents import encode_images
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part, parse_prompt, to_messages
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI
from starflow2_jax.training.losses.interleaved import Stage

# Rows are padded to a multiple of this, so that similar ones share a program.
LENGTH_STEP = 64


def log_likelihood(model: Model, rows: Any, *, seed: int = 0) -> list[list[float]]:
    """Return the log-likelihood in nats of every part of interleaved rows, without delimiters.

    Args:
        rows: prompts (see `inference.prompts`). Generated parts are scored as they were sampled;
            other images with noise from the seed, the row and the part's number; other texts as the
            tokenizer encodes each by itself. The first token of a row is a condition. Images of the
            user are conditions, of 0 nats, if the model reads images with a noise of their own
            (`noise.context_sigma`).
    """
    parts = [parse_prompt(row, f"row {i}") for i, row in enumerate(rows)]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(parts)))
    batch, part_index = build_batch(
        model, parts, *encode_images(model, parts, keys, [0] * len(parts))
    )
    terms = _loss_terms(dict(model.params), batch, cfg=model.model_config)
    dims = model.model_config.num_patches * model.model_config.flow.channels
    image_nats = np.asarray(sum(terms.log_dets) - terms.half_square - dims * HALF_LOG_2_PI)
    image_nats = np.where(np.asarray(terms.image), image_nats, 0)
    is_copy = np.zeros_like(image_nats, bool)
    if model.has_clean_copies:
        is_copy = np.asarray(interleaved.target_images(batch)[1])
    positions, is_token, nll = (np.asarray(a) for a in (terms.target_index, terms.token, terms.nll))
    result = []
    for b, row in enumerate(parts):
        row_images = iter(image_nats[b][~is_copy[b]].tolist())
        nats = [next(row_images) if part.kind == "image" else 0.0 for part in row]
        for position, token_nll in zip(positions[b][is_token[b]], nll[b][is_token[b]]):
            # The state at a position predicts the next token.
            nats[part_index[b][position + 1]] -= float(token_nll)
        result.append(nats)
    return result


@partial(jax.jit, static_argnames="cfg")
def _loss_terms(params, batch, *, cfg):
    return interleaved.loss_terms(params, batch, batch["latent_mean"], cfg, Stage(True, True))


def build_batch(
    model: Model,
    rows: Sequence[Sequence[Part]],
    x: Sequence[np.ndarray],
    copies: Sequence[np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return a batch (see `training.losses.interleaved`), and the part index of all positions.

    Every part is a target, but for images that the model reads with a noise of their own;
    delimiters and clean copies have part index -1. The latents x [I, N, D] of each row's images,
    and those of their clean `copies`, become `latent_mean`.
    """
    from starflow2_jax.data import chat_layout
    from starflow2_jax.data.packed_batches import build_packed_row
    from starflow2_jax.data.packing import PackingSpec

    tokenizer, cfg = model.tokenizer, model.model_config
    messages = [to_messages(row, lambda text: tuple(tokenizer.encode(text)), True) for row in rows]
    if model.has_clean_copies:
        messages = [chat_layout.insert_copies(row)[0] for row in messages]
    sequences = [
        chat_layout.apply_chat_template(row, tokenizer, cfg.num_patches, closed=False)
        for row in messages
    ]
    longest = max(len(sequence.ids) for sequence in sequences)
    max_images = max(1, *(len(chat_layout.image_slots(sequence)) for sequence in sequences))
    spec = PackingSpec(-(-longest // LENGTH_STEP) * LENGTH_STEP, cfg.num_patches, max_images)
    packed = [build_packed_row([s], spec, cfg.flow.side, tokenizer.pad) for s in sequences]
    batch = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    latents = np.zeros((len(rows), max_images, cfg.num_patches, cfg.flow.channels), x[0].dtype)
    copies = x if copies is None else copies
    for b, sequence in enumerate(sequences):
        # Delimiters are not targets.
        is_condition = [model.has_clean_copies and part.is_context for part in rows[b]] + [True]
        batch["target"][b, : len(sequence.ids)] = ~np.asarray(is_condition)[sequence.part_index]
        is_copy = sequence.is_copy[sequence.patch_index == 0]
        for slot, image in enumerate(chat_layout.image_slots(sequence)):
            latents[b, slot] = (copies if is_copy[slot] else x)[b][image]
    return {**batch, "latent_mean": latents}, [sequence.part_index for sequence in sequences]
