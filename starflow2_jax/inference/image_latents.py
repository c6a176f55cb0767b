"""Images of interleaved rows as latents x, and as the values u that the deep flow models.

    pixels --codec--> mean, variance --noise--> x [N, D] --shallow flow--> u [N, D]

Shapes: I images, N patches, D latent channels.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import config
from starflow2_jax.inference.inverse import Jacobi, inverse
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents import codec
from starflow2_jax.models import starflow2
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.params import Tree
from starflow2_jax.training import preprocess


def encode_images(
    model: Model, rows: Sequence[Sequence[Part]], keys: jax.Array, part_counts: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the latents [I, N, D] of every row's images, as training preprocesses them.

    Generated images keep their latents. The noise of another image depends on the key of its row
    and the number of its part; `part_counts` are the numbers of earlier parts. Images of the user
    have the noise of images that are only read.

    Returns:
        The noisy latents, and those of the images' clean copies, equal if there are none.
    """
    context_sigma = config.context_sigma(model.cfg)
    dtype = np.asarray(model.params["deep"]["proj_in"]["weight"][:0]).dtype
    dtype = np.promote_types(dtype, np.float32)
    moments = _encode_distinct(model, rows)

    def encode(part, key, is_context):
        mean, log_variance = moments[id(part.image)]
        batch = {"latent_mean": mean[None], "latent_logvar": log_variance[None]}
        sigma = jnp.full(1, context_sigma) if is_context and context_sigma is not None else None
        return np.asarray(preprocess.tokens(batch, key[None], model.cfg, False, sigma=sigma))[0]

    latents, copies = [], []
    for b, row in enumerate(rows):
        part_index, row_latents, row_copies = part_counts[b], [], []
        for part in row:
            if part.kind == "image" and part.latent is not None:
                row_latents.append(np.asarray(part.latent, dtype))
                clean = part.latent if part.clean_latent is None else part.clean_latent
                row_copies.append(np.asarray(clean, dtype))
            elif part.kind == "image":
                key = jax.random.fold_in(keys[b], part_index)
                row_latents.append(encode(part, key, part.is_context))
                needs_copy = model.has_clean_copies and not part.is_context
                row_copies.append(encode(part, key, True) if needs_copy else row_latents[-1])
            part_index += part.is_counted
        shape = (len(row_latents), model.model_config.num_patches, model.model_config.flow.channels)
        latents.append(np.asarray(row_latents, dtype).reshape(shape))
        copies.append(np.asarray(row_copies, dtype).reshape(shape))
    return latents, copies


def _encode_distinct(model: Model, rows: Sequence[Sequence[Part]]) -> dict[int, Any]:
    """Return (mean, log_variance) [N, D] of every distinct pixel array, by its id."""
    images = {
        id(part.image): part.image
        for row in rows
        for part in row
        if part.kind == "image" and part.latent is None
    }
    if not images:
        return {}
    mean, log_variance = codec.encode(model.codec, np.stack(list(images.values())))
    return dict(zip(images, zip(mean, log_variance)))


def shallow_forward(
    params: Tree, x: np.ndarray, cfg: BackboneConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return u [I, N, D] of latents x, and the log-determinant [I] of the shallow flow."""
    if not len(x):
        return x, np.zeros(0, x.dtype)
    u, log_det = _shallow_forward({"shallow": params["shallow"]}, _pad_images(x), cfg=cfg)
    return np.asarray(u)[: len(x)], np.asarray(log_det)[: len(x)]


@partial(jax.jit, static_argnames="cfg")
def _shallow_forward(params, x, *, cfg):
    outputs, log_dets = starflow2.shallow_forward(params, x, cfg)
    return outputs[-1], sum(log_dets)


def shallow_inverse(
    params: Tree, u: np.ndarray, cfg: BackboneConfig, jacobi: Jacobi | None = None
) -> np.ndarray:
    """Return latents x [I, N, D] of u."""
    if not len(u):
        return u
    # A deep block without layers is the identity, and reads no text.
    shallow_cfg = dataclasses.replace(cfg.flow, layers=(*cfg.flow.layers[:-1], 0))
    x, _ = inverse(
        {"blocks": params["shallow"]},
        jnp.asarray(_pad_images(u)),
        shallow_cfg,
        Conditioning(text=jnp.zeros((1, 1, shallow_cfg.text_channels))),
        jacobi=jacobi,
    )
    return np.asarray(x)[: len(u)]


def _pad_images(x: np.ndarray) -> np.ndarray:
    """Repeat images up to a power of two, so that few programs serve any number of them."""
    count = 1 << (len(x) - 1).bit_length()
    return x[np.arange(count) % len(x)]
