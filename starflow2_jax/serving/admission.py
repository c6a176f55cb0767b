"""Admission of requests: their layout, their pool of rows, and their caps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.row_caches import PREFILL_SIZES
from starflow2_jax.inference.row_items import RowItems, layout_conversation
from starflow2_jax.inference.row_pool import RowOptions, RowPool
from starflow2_jax.inference.turn import SampledItem
from starflow2_jax.serving import image_store
from starflow2_jax.serving.draw import ImageRow, draw
from starflow2_jax.serving.errors import RequestError
from starflow2_jax.serving.requests import Request
from starflow2_jax.serving.sessions import SessionCache, SessionRows


@dataclass(frozen=True, eq=False)
class Plan:
    """A request's layout, and the pool that samples it."""

    items: RowItems  # of the prompt
    null_items: RowItems | None  # of the unconditional branch, None without one
    null: str  # the null prompt of that branch
    num_parts: int  # number of parts before the answer
    max_tokens: int  # text tokens that the row has room for
    pool: int  # number of the pool with room for the row
    session: SessionRows | None  # the session that the conversation continues


def answer_items(model: Model, options: GenerateOptions, max_tokens: int) -> int:
    """Return the number of items that an answer of so many tokens may have."""
    size = model.model_config.num_patches + 2
    images = options.image_limit
    copies = 0
    if model.has_clean_copies:
        copies = images if max_tokens else max(images - 1, 0)
    # The end of the turn is sampled, too.
    return max_tokens + (images + copies) * size + 1


def plan_request(
    model: Model,
    request: Request,
    keys: Sequence[str],
    cache: SessionCache,
    capacities: Sequence[int],
) -> Plan:
    """Lay out a conversation, and choose the smallest pool with room for it and its answer.

    Args:
        keys: of all prefixes of the conversation, as in `sessions.prefix_keys`.
        capacities: of the pools, in items, in ascending order.

    Raises:
        RequestError: The conversation is too long for every pool.
    """
    conversation, options = request.conversation, request.options
    parts = cache.with_tokens(conversation.parts, keys)
    values = [image.values for image in conversation.images]
    items = layout_conversation(model, parts, values)
    null_items = None
    if options.needs_null_branch:
        null_items = layout_conversation(model, parts, values, options.null)
    size = max(len(items), len(null_items) if null_items else 0)
    needed = answer_items(model, options, min(options.max_tokens, 1))
    room = capacities[-1] - size - needed + min(options.max_tokens, 1)
    max_tokens = min(options.max_tokens, room)
    if room < 0 or (options.max_tokens and max_tokens < 1):
        raise RequestError(
            f"the conversation has {size} tokens and patches, which leaves no room for an answer "
            f"with {options.image_limit} images in the {capacities[-1]} of this server",
            param="messages",
            code="context_length_exceeded",
        )
    needed = size + answer_items(model, options, max_tokens)
    return Plan(
        items=items,
        null_items=null_items,
        null=options.null,
        num_parts=sum(part.is_counted for part in parts),
        max_tokens=max_tokens,
        pool=next(i for i, capacity in enumerate(capacities) if capacity >= needed),
        session=cache.find(keys),
    )


def compile_pool(model: Model, pool: RowPool) -> None:
    """Run every program of a pool once."""
    num_patches = model.model_config.num_patches
    size = max(min(sum(PREFILL_SIZES), pool.capacity - num_patches - 40), 1)
    prompt = [Part("text", "user", tokens=(model.tokenizer.encode("\n") * size)[:size])]
    items = layout_conversation(model, prompt, [])
    read, _ = pool.read(items)
    options = RowOptions(
        key=np.zeros(2, np.uint32), guidance=1.0, max_tokens=1, max_images=1, begins_image=True
    )
    row = pool.admit(items, read, options, 1, (items, read))
    sampled: list[SampledItem] = []
    while len(sampled) < num_patches + 2:
        sampled += pool.run_chunk(decode_loop.CHUNK)[row]
    if model.codec is not None:
        u = np.stack([item.u for item in sampled[1 : num_patches + 1]])
        can_denoise = model.has_clean_copies or model.cfg["sample"]["denoise"]
        view = ImageRow(*pool.row_session(row), sampled, 0) if can_denoise else None
        draw(model, u, view, denoise=view is not None)
    pool.release(row)
    pool.compile_copies()


def compile_images(model: Model) -> None:
    """Run the programs that read an image once."""
    if model.codec is not None:
        side = model.codec.model.pixels
        image_store.encode(model, np.zeros((side, side, 3), np.uint8))
