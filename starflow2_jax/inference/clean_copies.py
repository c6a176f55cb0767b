"""Clean copies of sampled images, which a row reads before its conversation goes on.

A sampled image has the noise of a target. Denoised, it stands for the image without noise that
follows a target in training (`data.chat_layout.insert_copies`).

Shapes: N patches, D latent channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import config
from starflow2_jax.inference import decode_loop, denoise
from starflow2_jax.inference.denoise import ImageStart
from starflow2_jax.inference.image_latents import shallow_forward, shallow_inverse
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.session import Session, append_copies
from starflow2_jax.inference.turn import SampledItem, TurnStart, advance_counters, copy_starts


def image_starts(model: Model, start: TurnStart, b: int, items: Sequence[SampledItem]) -> list[int]:
    """Return the items of row b that begin its sampled images, without those of copies."""
    tokens = [item.token for item in items]
    copies, _ = copy_starts(model, tokens, bool(start.state.needs_copy[b]))
    vision_start = model.special_tokens.vision_start
    return [t for t, token in enumerate(tokens) if token == vision_start and t not in copies]


class CleanImage(NamedTuple):
    """A sampled image after denoising."""

    denoised: np.ndarray  #: latents [N, D]
    copy: np.ndarray  #: latents [N, D] of its clean copy, with the noise of context


def clean_image(
    model: Model,
    session: Session,
    start: TurnStart,
    b: int,
    items: Sequence[SampledItem],
    t: int,
    x: np.ndarray,
) -> CleanImage:
    """Return latents x [N, D] of the image that item t of row b begins, after a score step.

    The training noise must be Gaussian.
    """
    counters = advance_counters(model, start, b, [item.token for item in items[: t + 1]])
    vlm_position = int(start.state.next_vlm_position[b]) + counters["position_steps"]
    flow_index = int(start.state.flow_index[b]) + counters["flow_steps"]
    image_start = ImageStart(
        token=jnp.int32(model.special_tokens.vision_start),
        slot=jnp.int32(items[t].slot),
        vlm_position=jnp.int32(vlm_position),
        flow_index=jnp.int32(flow_index),
    )
    denoised = _denoise(model, session, b, image_start, x)
    part_key = jax.random.fold_in(session.keys[b], counters["part_index"])
    return CleanImage(denoised, _add_context_noise(model, part_key, denoised))


def _denoise(
    model: Model, session: Session, b: int, image_start: ImageStart, x: np.ndarray
) -> np.ndarray:
    """Return latents x [N, D] of an image of row b after a score step."""
    noise = model.cfg["noise"]
    if noise["kind"] != "gaussian" or not noise["sigma"]:
        raise ValueError(
            f"denoise needs a model that was trained with Gaussian noise, but this one was trained "
            f"with noise.kind={noise['kind']!r}, noise.sigma={noise['sigma']!r}"
        )
    image = jnp.asarray(x)
    denoised = denoise.image_score_step(
        {"shallow": model.params["shallow"]},
        session.params,
        session.state,
        b,
        image_start,
        image,
        jnp.asarray(noise["sigma"], image.dtype),
        cfg=model.model_config,
    )
    return np.asarray(denoised)


def _add_context_noise(model: Model, part_key: jax.Array, clean: np.ndarray) -> np.ndarray:
    """Return clean latents [N, D] with the noise of context, drawn from the key of their part."""
    sigma = config.context_sigma(model.cfg)
    if not sigma:
        return clean
    # The patches of the image and the item after it have the numbers 1 ... N + 1 of its part.
    key = jax.random.fold_in(part_key, model.model_config.num_patches + 2)
    return clean + sigma * np.asarray(jax.random.normal(key, clean.shape, clean.dtype))


def read_copies(
    model: Model,
    session: Session,
    start: TurnStart,
    items: list[list[SampledItem]],
    reserved: int,
    jacobi: Jacobi | None,
) -> tuple[Session, dict[tuple[int, int], CleanImage]]:
    """Let the rows that wait for a copy read it, in one pass.

    Args:
        items: of every row; each copy's `<|vision_end|>` is appended.
        reserved: slots to leave free.

    Returns:
        The session, and the images of the copies that were sampled in this turn, by their row and
        first item.
    """
    mode, num_patches = np.asarray(session.state.mode), model.model_config.num_patches
    rows = np.flatnonzero(mode >= decode_loop.COPY_TEXT).tolist()
    # An image of an earlier turn has no items in this one.
    last = {b: starts[-1] for b in rows if (starts := image_starts(model, start, b, items[b]))}
    images = {}
    copies = {b: session.copies[b] for b in rows}
    if last:
        u = [[i.u for i in items[b][t + 1 : t + 1 + num_patches]] for b, t in last.items()]
        x = shallow_inverse(model.params, np.asarray(u), model.model_config, jacobi)
        for (b, t), image in zip(last.items(), x):
            images[b, t] = clean_image(model, session, start, b, items[b], t, image)
        x = np.stack([image.copy for image in images.values()])
        copies |= zip(last, shallow_forward(model.params, x, model.model_config)[0])
    first_slot = session.cache_length
    session = append_copies(model, session, copies, reserved)
    for b in rows:
        items[b][-1] = items[b][-1]._replace(slot=first_slot)
        end = model.special_tokens.vision_end
        blank = SampledItem(end, np.zeros_like(items[b][-1].u), np.zeros(3), session.cache_length)
        items[b].append(blank)
    new_mode = np.where(mode == decode_loop.COPY_TEXT, decode_loop.TEXT, mode)
    new_mode = np.where(mode == decode_loop.COPY_IMAGE, decode_loop.BEGIN_IMAGE, new_mode)
    state = session.state.replace(mode=jnp.asarray(new_mode))
    return dataclasses.replace(session, state=state), images
