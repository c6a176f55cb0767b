"""STARFlow2's generation: interleaved parts in, interleaved parts out, in one pass over one cache.

A call extends the session by the prompts, runs the decode loop in chunks until every row is done,
and turns the sampled items into parts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.decode_loop import DecodeState
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.image_latents import encode_images, shallow_forward
from starflow2_jax.inference.model import Model, adapter_is_trained, flow_is_trained
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part, check_image_size, parse_prompt
from starflow2_jax.inference.results import (
    Results,
    SampledItem,
    collect_results,
    find_stop,
    select_best,
)
from starflow2_jax.inference.sampling import SamplingParams
from starflow2_jax.inference.session import (
    Session,
    TurnStart,
    extend,
    new_session,
    truncate_rows,
    turn_start,
)
from starflow2_jax.mesh import replicated

# Steps between two searches for stop texts. A row may run past one to the end of its chunk.
_STOP_CHUNK = 16


def generate(
    model: Model, prompts: Any, *, continue_from: Results | None = None, options: GenerateOptions
) -> Results:
    """Generate what follows the prompts; see `api.STARFlow2.generate`."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError("prompts: expected a non-empty list with one prompt per row")
    rows = [parse_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    _check_images(model, rows)
    _check_trained(model, rows, options)
    if continue_from is None:
        rows = [row for row in rows for _ in range(options.copies)]
        session = _start_session(model, len(rows), options)
    else:
        _check_continuation(continue_from, len(rows), options)
        session = continue_from.session
    cfg = model.model_config
    latents = encode_images(model, rows, session.keys, session.part_counts)
    u, _ = shallow_forward(model.params, np.concatenate(latents), cfg)
    row_u = np.split(u, np.cumsum([len(x) for x in latents])[:-1])
    reserved = options.max_tokens + options.image_limit * (cfg.num_patches + 2) + 1
    session = extend(model, session, rows, row_u, reserved)
    state = _reset_counters(model, session.state, options, continues=continue_from is not None)
    session = dataclasses.replace(session, state=state)
    start = turn_start(session)
    session, items, finish = _decode_turn(model, session, options, start)
    results = collect_results(model, session, items, finish, options, start)
    return select_best(results, options.best_of) if options.best_of > 1 else results


def generate_many(
    model: Model,
    prompts: Sequence[Any],
    options: GenerateOptions,
    max_rows: int = 16,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[list[Part]]]:
    """Yield the samples of every prompt, generated in batches of `max_rows` by one program.

    Sample k of the prompt with number i (of `numbers`; 0, 1, ... if None) draws its noise as row
    i * n * best_of + k, whatever `max_rows` is.
    """
    copies = options.copies
    prompt_numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
    batch_size = min(max(max_rows // copies, 1), len(prompts))
    for first in range(0, len(prompts), batch_size):
        # The last batch is padded with repeated prompts, so that one program serves all.
        batch = np.minimum(np.arange(first, first + batch_size), len(prompts) - 1)
        samples = (prompt_numbers[batch][:, None] * copies + np.arange(copies)).ravel()
        batch_options = dataclasses.replace(options, samples=tuple(samples.tolist()))
        results = generate(model, [prompts[i] for i in batch], options=batch_options)
        for i in range(min(batch_size, len(prompts) - first)):
            yield results.rows[i * options.n : (i + 1) * options.n]


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
    if has_images and not adapter_is_trained(model):
        raise ValueError(
            f"{name}: the adapter is untrained (last layer is still zero, as after stage 1), so "
            "the VLM cannot see images. Pass text only, or use a checkpoint of stage 2 or 3."
        )


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
    model: Model, session: Session, options: GenerateOptions, start: TurnStart
) -> tuple[Session, list[list[SampledItem]], list[str]]:
    """Run chunks until every row is done; return session, items and reason to end of each row."""
    max_steps = jnp.int32(_STOP_CHUNK if options.stop else decode_loop.CHUNK)
    sampling = _sampling_params(session, options)
    state = session.state
    items: list[list[SampledItem]] = [[] for _ in range(session.batch_size)]
    stopped: set[int] = set()
    while (np.asarray(state.mode) < decode_loop.ENDED).any():
        state, output = decode_loop.decode_chunk(
            session.params,
            _replicate(state),
            session.keys,
            sampling,
            max_steps,
            cfg=model.model_config,
            special=model.special_tokens,
        )
        token, u, log_probs = map(np.asarray, (output.token, output.u, output.log_probs))
        for b, row in enumerate(items):
            count = int((token[b] != decode_loop.EMPTY).sum())
            row += map(SampledItem, token[b, :count].tolist(), u[b, :count], log_probs[b, :count])
        kept_ids = {}
        for b in set(range(len(items))) - stopped if options.stop else ():
            size = find_stop(model, items[b], options.stop)
            if size is not None:
                items[b] = items[b][:size]
                kept_ids[b] = [item.token for item in items[b]]
        if kept_ids:
            stopped |= kept_ids.keys()
            state = truncate_rows(model, state, start, kept_ids)
    finish = ["stop" if b in stopped else "end" for b in range(len(items))]
    if options.max_tokens:
        for b in np.flatnonzero(np.asarray(state.mode) == decode_loop.OUT_OF_TOKENS):
            finish[b] = "length"
    return dataclasses.replace(session, state=state), items, finish


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
