"""Interleaved rows in parallel, teacher-forced: likelihoods of their parts, and clean-up of images.

Axes: B rows, T positions, M image places of a row, N patches, D latent channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference import generate, prompts
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.training.losses import interleaved as starflow2_loss
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI
from starflow2_jax.training.losses.interleaved import Stage

# Rows are padded to a multiple of this, so that similar ones share a program.
LENGTH_STEP = 64


def log_likelihood(model: Model, rows: Any, *, seed: int = 0) -> list[list[float]]:
    """Nats of every part of interleaved rows, given all before it, delimiters not counted.

    Args:
        rows: as prompts (`inference.prompts`). Generated parts are scored as they were drawn;
            other images with noise of `seed`, the row and the part's number; other texts as the
            tokenizer reads each alone. The first token of a row is given.

    Raises:
        ValueError: as `Model.generate` of prompts.
    """
    parts = [prompts.read(row, f"row {i}") for i, row in enumerate(rows)]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(parts)))
    x = generate.latents(model, parts, keys, [0] * len(parts))
    batch, owners = lay_out(model, parts, x)
    found = _terms(dict(model.params), batch, cfg=model.model_config)
    dims = model.model_config.patches * model.model_config.flow.channels
    image = np.asarray(sum(found.log_dets) - found.half_square - dims * HALF_LOG_2_PI)
    at, token, nll = (np.asarray(a) for a in (found.target_index, found.token, found.nll))
    result = []
    for b, row in enumerate(parts):
        of_image = iter(image[b].tolist())
        nats = [next(of_image) if part.kind == "image" else 0.0 for part in row]
        for where, nats_ in zip(at[b][token[b]], nll[b][token[b]]):
            nats[owners[b][where + 1]] -= float(nats_)
        result.append(nats)
    return result


@partial(jax.jit, static_argnames="cfg")
def _terms(params, batch, *, cfg):
    return starflow2_loss.loss_terms(params, batch, batch["latent_mean"], cfg, Stage(True, True))


def lay_out(
    model: Model, parts: Sequence[Sequence[Part]], x: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """A batch of rows (see `training.losses.interleaved`) in which every part is learnt.

    Args:
        x: latents [I, N, D] of each row's images in turn; they are `latent_mean`.

    Returns:
        the batch, and which part every position of a row is of, -1 for delimiters.
    """
    from starflow2_jax.data import chat_layout as layouts, packed_batches as row_arrays, packing

    held, cfg = model.tokenizer, model.model_config
    laid = []
    for row in parts:
        numbers = iter(range(len(row)))
        laid.append(
            layouts.apply_chat_template(
                [
                    layouts.MessagePart(
                        part.role,
                        next(numbers)
                        if part.kind == "image"
                        else part.tokens or tuple(held.encode(part.text)),
                        True,
                    )
                    for part in row
                ],
                held,
                cfg.patches,
                closed=False,
            )
        )
    length = -(-max(len(items.ids) for items in laid) // LENGTH_STEP) * LENGTH_STEP
    places = max(max(map(len, x)), 1)
    room = packing.PackingSpec(length, cfg.patches, places)
    made = [row_arrays.build_packed_row([items], room, cfg.flow.side, held.pad) for items in laid]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    owners = [items.part_index for items in laid]
    for b, items in enumerate(laid):
        # Delimiters are not asked for.
        batch["target"][b, : len(items.part_index)] = items.part_index >= 0
    latents = np.zeros((len(parts), places, cfg.patches, cfg.flow.channels), x[0].dtype)
    for b, images in enumerate(x):
        latents[b, : len(images)] = images
    return {**batch, "latent_mean": latents}, owners
