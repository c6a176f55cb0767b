"""STARFlow2's generation: interleaved parts in, interleaved parts out, in one pass over one cache.

A call extends the session by the prompts, runs the decode loop in chunks until every row is done,
and turns the sampled items into parts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.clean_copies import CleanImage, read_copies
from starflow2_jax.inference.decode_loop import DecodeState
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.image_latents import encode_images, shallow_forward
from starflow2_jax.inference.model import Model, adapter_is_trained, flow_is_trained
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part, check_image_size, parse_prompt
from starflow2_jax.inference.results import (
    Results,
    collect_results,
    find_stop,
    select_best,
)
from starflow2_jax.inference.sampling import SamplingParams
from starflow2_jax.inference.session import (
    CACHE_STEP,
    LENGTH_STEP,
    Session,
    append_copies,
    extend,
    new_session,
)
from starflow2_jax.inference.turn import SampledItem, TurnStart, truncate_rows, turn_start
from starflow2_jax.mesh import decoding_mesh, replicated
from starflow2_jax.runtime import memory

# Steps between two searches for stop texts, or calls of `on_chunk`. A row may run past a stop text
# to the end of its chunk.
_SHORT_CHUNK = 16

# A function of the items that each row has sampled, which is called after every chunk. If it
# returns true, all rows end with their last whole token or image.
OnChunk = Callable[[Sequence[Sequence[SampledItem]]], bool | None]


def generate(
    model: Model,
    prompts: Any,
    *,
    continue_from: Results | None = None,
    options: GenerateOptions,
    on_chunk: OnChunk | None = None,
) -> Results:
    """Generate what follows the prompts; see `api.STARFlow2.generate`."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError("prompts: expected a non-empty list with one prompt per row")
    rows = [parse_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    _check_images(model, rows)
    _check_trained(model, rows, options)
    _check_memory(model, len(rows), options)
    if continue_from is None:
        rows = [row for row in rows for _ in range(options.copies)]
        session = _start_session(model, len(rows), options)
    else:
        _check_continuation(continue_from, len(rows), options)
        session = continue_from.session
    latents, copies = encode_images(model, rows, session.keys, session.part_counts)

    def shallow(x):
        u, _ = shallow_forward(model.params, np.concatenate(x), model.model_config)
        return np.split(u, np.cumsum([len(images) for images in x])[:-1])

    u_copies = shallow(copies) if model.has_clean_copies else None
    reserved = _reserved_slots(model, options, options.max_tokens, options.image_limit)
    session = extend(model, session, rows, shallow(latents), reserved, u_copies)
    state = _reset_counters(model, session.state, options, continues=continue_from is not None)
    session = dataclasses.replace(session, state=state)
    if model.has_clean_copies:
        session = _read_early_copies(model, session, reserved)
    start = turn_start(session)
    session, items, finish, clean = _decode_turn(model, session, options, start, on_chunk)
    results = collect_results(model, session, items, finish, options, start, clean)
    return select_best(results, options.best_of) if options.best_of > 1 else results


def generate_many(
    model: Model,
    prompts: Sequence[Any],
    options: GenerateOptions,
    max_rows: int = 16,
    numbers: Sequence[int] | None = None,
    on_chunk: OnChunk | None = None,
) -> Iterator[list[list[Part]]]:
    """Yield the samples of every prompt, generated in batches of `max_rows` by one program.

    Sample k of the prompt with number i (of `numbers`; 0, 1, ... if None) draws its noise as row
    i * n * best_of + k, whatever `max_rows` is. The batch that `on_chunk` ends is the last one.
    """
    copies = options.copies
    prompt_numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
    batch_size = min(max(max_rows // copies, 1), len(prompts))
    for first in range(0, len(prompts), batch_size):
        # The last batch is padded with repeated prompts, so that one program serves all.
        batch = np.minimum(np.arange(first, first + batch_size), len(prompts) - 1)
        samples = (prompt_numbers[batch][:, None] * copies + np.arange(copies)).ravel()
        batch_options = dataclasses.replace(options, samples=tuple(samples.tolist()))
        rows = [prompts[i] for i in batch]
        results = generate(model, rows, options=batch_options, on_chunk=on_chunk)
        for i in range(min(batch_size, len(prompts) - first)):
            yield results.rows[i * options.n : (i + 1) * options.n]
        if "interrupted" in results.finish:
            return


# ---------------------------------------------------------------------------------------- checks


def _check_images(model: Model, rows: Sequence[Sequence[Part]]) -> None:
    """Raise ValueError unless the model can read every image."""
    expected = (model.model_config.num_patches, model.model_config.flow.channels)
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            location = f"prompt {i}, part {j}"
            if part.latent is not None:
                if part.latent.shape != expected:
                    raise ValueError(f"{location}: latent {part.latent.shape}, expected {expected}")
            elif part.kind == "image" and model.codec is None:
                raise ValueError(
                    f"{location}: the model has no codec to read an image with; give one with fae="
                )
            elif part.kind == "image":
                check_image_size(part.image, model.codec.model.pixels, location)


def _check_trained(model: Model, rows: Sequence[Sequence[Part]], options: GenerateOptions) -> None:
    """Raise ValueError if a part that the call needs has not been trained."""
    name = model.source or "model"
    if options.image_limit and not flow_is_trained(model):
        raise ValueError(
            f"{name}: the flow is untrained (output layer is still zero), so this checkpoint "
            "cannot generate images. Pass images=0 for text only."
        )
    has_images = any(part.kind == "image" for row in rows for part in row)
    # The flow reads the image of an edit by itself, so a stage 1 with edits can make them.
    only_image = options.images and not options.max_tokens
    if has_images and not only_image and not adapter_is_trained(model):
        raise ValueError(
            f"{name}: the adapter is untrained (last layer is still zero, as after stage 1), so "
            "the VLM cannot see images. Pass text only, ask for an image alone (images=1, "
            "max_tokens=0), or use a checkpoint of stage 2 or 3."
        )


def _check_memory(model: Model, num_prompts: int, options: GenerateOptions) -> None:
    """Raise ValueError if the caches cannot fit, before anything is allocated."""
    rows = num_prompts * options.copies * (2 if options.needs_null_branch else 1)
    reserved = _reserved_slots(model, options, options.max_tokens, options.image_limit)
    slots = options.cache or -(-(LENGTH_STEP + reserved) // CACHE_STEP) * CACHE_STEP
    # Keys and values, of at least two bytes each.
    slot = sum(4 * n * c.kv_heads * c.head_dim for c, n in model.model_config.stacks)
    what = f"generate: {rows} rows of {slots} positions"
    memory.check(what, {"the caches": rows * slots * slot}, memory.capacity())


def _check_continuation(results: Results, row_count: int, options: GenerateOptions) -> None:
    if row_count != len(results):
        raise ValueError(f"prompts: {row_count} for the {len(results)} rows to continue")
    if options.copies > 1:
        raise ValueError("n and best_of belong to the first call: a row continues as one row")
    if options.guidance and not results.session.null:
        raise ValueError(
            "guidance: the session was started without guidance and has no unconditional branch; "
            "pass guidance in the first call"
        )


# --------------------------------------------------------------------------------------- decoding


def _start_session(model: Model, batch_size: int, options: GenerateOptions) -> Session:
    samples = options.samples or tuple(range(batch_size))
    if len(samples) != batch_size:
        raise ValueError(f"samples: {len(samples)} numbers for {batch_size} rows")
    key = jax.random.key(options.seed)
    return new_session(
        model,
        keys=jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(samples)),
        null=options.null if options.needs_null_branch else "",
        cache_size=options.cache or 0,
        has_fixed_cache=options.cache is not None,
    )


def _reserved_slots(model: Model, options: GenerateOptions, tokens: int, images: int) -> int:
    """Return the slots of an answer of so many tokens and images, with copies of the images."""
    size = model.model_config.num_patches + 2
    slots = tokens + images * size + 1
    if model.has_clean_copies:
        # The last image has a copy only if text may follow it.
        num_copies = images if options.max_tokens else max(images - 1, 0)
        slots += num_copies * (-(-size // LENGTH_STEP) * LENGTH_STEP + 1)
    return slots


def _read_early_copies(model: Model, session: Session, reserved: int) -> Session:
    """Read the copies of rows that have to begin another image, after that of an earlier turn."""
    is_next = np.asarray(session.state.mode) == decode_loop.BEGIN_IMAGE
    rows = np.flatnonzero(is_next & np.asarray(session.state.needs_copy)).tolist()
    if not rows:
        return session
    return append_copies(model, session, {b: session.copies[b] for b in rows}, reserved)


def _reset_counters(
    model: Model, state: DecodeState, options: GenerateOptions, continues: bool
) -> DecodeState:
    """Return the state with a turn's counters; a row stays ended unless its prompt opened one."""
    token, is_image = np.asarray(state.token), np.asarray(state.is_image)
    begins_image = options.image_start or not options.max_tokens
    first_mode = decode_loop.BEGIN_IMAGE if begins_image else decode_loop.TEXT
    mode = np.full(len(token), first_mode, np.int32)
    if continues:
        mode[np.isin(token, model.special_tokens.turn_ends) & ~is_image] = decode_loop.ENDED

    def full(value: int) -> jax.Array:
        return jnp.full(len(token), value, jnp.int32)

    return state.replace(
        mode=jnp.asarray(mode),
        patch=full(0),
        tokens_left=full(options.max_tokens),
        images_left=full(options.image_limit),
        images_required=full(options.images or 0),
    )


def _decode_turn(
    model: Model,
    session: Session,
    options: GenerateOptions,
    start: TurnStart,
    on_chunk: OnChunk | None,
) -> tuple[Session, list[list[SampledItem]], list[str], dict[tuple[int, int], CleanImage]]:
    """Run chunks until every row is done.

    Returns:
        The session, the items and the reason to end of every row, and the images that were denoised
        for their copies, by their row and first item.
    """
    items: list[list[SampledItem]] = [[] for _ in range(session.batch_size)]
    stopped: set[int] = set()
    interrupted: set[int] = set()
    chunk_size = _SHORT_CHUNK if options.stop or on_chunk else decode_loop.CHUNK
    clean: dict[tuple[int, int], CleanImage] = {}
    while True:
        state = session.state
        mode = np.asarray(state.mode)
        if (mode < decode_loop.ENDED).any():
            state = _decode_chunk(model, session, options, items, chunk_size)
        elif (mode >= decode_loop.COPY_TEXT).any():
            tokens, images = int(state.tokens_left.max()), int(state.images_left.max())
            reserved = _reserved_slots(model, options, tokens, images)
            session, images = read_copies(model, session, start, items, reserved, options.jacobi)
            clean |= images
            continue
        else:
            break
        kept_items = {}
        for b in set(range(len(items))) - stopped if options.stop else ():
            size = find_stop(model, items[b], options.stop)
            if size is not None:
                kept_items[b] = items[b] = items[b][:size]
        if kept_items:
            stopped |= kept_items.keys()
            state = truncate_rows(model, state, start, kept_items)
        if on_chunk and on_chunk(items):
            mode = np.asarray(state.mode)
            is_done = (mode == decode_loop.ENDED) | (mode == decode_loop.OUT_OF_TOKENS)
            interrupted = set(np.flatnonzero(~is_done).tolist())
            for b in interrupted:
                items[b] = items[b][: _complete_size(model, items[b])]
            state = truncate_rows(model, state, start, {b: items[b] for b in interrupted})
        session = dataclasses.replace(session, state=state)
    finish = ["stop" if b in stopped else "end" for b in range(len(items))]
    for b in interrupted:
        finish[b] = "interrupted"
    if options.max_tokens:
        for b in np.flatnonzero(np.asarray(session.state.mode) == decode_loop.OUT_OF_TOKENS):
            finish[b] = "length"
    return session, items, finish, clean


def _complete_size(model: Model, items: Sequence[SampledItem]) -> int:
    """Return the number of items up to the last whole token or image."""
    begin = len(items)
    while begin and items[begin - 1].token == decode_loop.PATCH:
        begin -= 1
    if begin and items[begin - 1].token == model.special_tokens.vision_start:
        return begin - 1
    return len(items)


def _decode_chunk(
    model: Model,
    session: Session,
    options: GenerateOptions,
    items: list[list[SampledItem]],
    chunk_size: int,
) -> DecodeState:
    """Run one chunk, append its items to those of every row, and return the new state."""
    slot = session.cache_length
    with decoding_mesh(session.params, session.batch_size):
        state, output = decode_loop.decode_chunk(
            session.params,
            _replicate(session.state),
            session.keys,
            _sampling_params(session, options),
            jnp.int32(chunk_size),
            cfg=model.model_config,
            special=model.special_tokens,
            clean_copies=model.has_clean_copies,
        )
    token, u, log_probs = map(np.asarray, (output.token, output.u, output.log_probs))
    for b, row in enumerate(items):
        count = int((token[b] != decode_loop.EMPTY).sum())
        # Item i is pending after step i, and the next step reads it.
        slots = range(slot + 1, slot + 1 + count)
        row += map(SampledItem, token[b, :count].tolist(), u[b, :count], log_probs[b], slots)
    return state


def _sampling_params(session: Session, options: GenerateOptions) -> SamplingParams:
    dtype = jnp.promote_types(session.state.u.dtype, jnp.float32)
    guidance = None
    if session.null:
        guidance = Guidance(jnp.asarray(options.guidance, dtype), rule=options.rule)
    return SamplingParams(
        temperature=jnp.asarray(options.temperature, dtype),
        top_k=jnp.int32(options.top_k),
        top_p=jnp.asarray(options.top_p, dtype),
        image_temperature=jnp.asarray(options.image_temperature, dtype),
        guidance=guidance,
    )


def _replicate(state: DecodeState) -> DecodeState:
    """Put the host's arrays on the caches' mesh: other shardings would need another program."""
    sharding = state.caches[0].keys[0].sharding
    if not isinstance(sharding, NamedSharding):
        return state
    rest = jax.device_put(state.replace(caches=None), replicated(sharding.mesh))
    return rest.replace(caches=state.caches)
