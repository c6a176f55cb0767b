"""STARFlow2's generation: interleaved parts in, interleaved parts out, one pass over one cache.

Axes: B rows, N patches, D latent channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from starflow2_jax import mesh
from starflow2_jax.inference import decode_loop, prompts, results as answers, session
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.model import Model, adapter_is_trained, flow_is_trained
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.results import Results
from starflow2_jax.inference.session import Conversation
from starflow2_jax.latents import codec
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.training import preprocess

# ------------------------------------------------------------------------------------- generation


def generate(
    model: Model, given: Any, *, continue_from: Results | None = None, options: GenerateOptions
) -> Results:
    """Generate what follows prompts; see `api.STARFlow2.generate`."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not len(given):
        raise ValueError("prompts: expected a list with one prompt a row")
    parts = [prompts.read(prompt, f"prompt {i}") for i, prompt in enumerate(given)]
    _check_images(model, parts)
    _check_trained(model, parts, options)
    copies = options.n * options.best_of
    if continue_from is not None:
        if len(parts) != len(continue_from):
            raise ValueError(f"prompts: {len(parts)} for the {len(continue_from)} rows to continue")
        if copies > 1:
            raise ValueError("n and best_of belong to the first call; a row continues as one")
        held = continue_from.session
        if bool(held.null) != _branches(options) and options.guidance:
            raise ValueError("guidance: the conversation was begun without it, and has no branch")
        held = session.heated(held, options.null_temperature)
    else:
        parts = [row for row in parts for _ in range(copies)]
        held = _begin(model, len(parts), options)
    keys, cfg = held.keys, model.model_config
    x = latents(model, parts, keys, held.parts)
    u = session.shallow(model.params, np.concatenate(x), cfg)[0]
    u = np.split(u, np.cumsum([len(images) for images in x])[:-1])
    held = session.extend(held, parts, u, cfg, model.tokenizer, _room(options, cfg))
    state = _ready(held.state, options, model, bool(continue_from is not None))
    held = dataclasses.replace(held, state=state)
    # Copies: the loop takes the arrays over.
    start, first = jax.tree.map(np.array, held.state.replace(caches=None)), held.read
    held, records, reasons = _loop(model, held, options, start, first)
    results = answers.finished(model, held, records, reasons, options, start, first)
    return answers.best(results, options) if options.best_of > 1 else results


def generate_many(
    model: Model,
    given: Sequence[Any],
    options: GenerateOptions,
    rows: int = 16,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[list[Part]]]:
    """The samples of each prompt in turn, drawn some `rows` at a time by one program.

    Sample k of prompt number i is row i n best_of + k of the seed, whatever `rows` is.

    Args:
        numbers: of the prompts, where they do not stand in their order.
    """
    copies = options.n * options.best_of
    own = np.arange(len(given)) if numbers is None else np.asarray(numbers)
    together = min(max(rows // copies, 1), len(given))
    for first in range(0, len(given), together):
        # The last ones are filled up, so that no other program is needed.
        at = np.minimum(np.arange(first, first + together), len(given) - 1)
        samples = (own[at][:, None] * copies + np.arange(copies)).ravel()
        now = dataclasses.replace(options, samples=tuple(samples.tolist()))
        found = generate(model, [given[i] for i in at], options=now)
        for i in range(min(together, len(given) - first)):
            yield found.rows[i * options.n : (i + 1) * options.n]


def _branches(options: GenerateOptions) -> bool:
    return bool(options.guidance) or options.best_of_gain


def _begin(model: Model, rows: int, options: GenerateOptions) -> Conversation:
    samples = options.samples or tuple(range(rows))
    if len(samples) != rows:
        raise ValueError(f"samples: {len(samples)} numbers for {rows} rows")
    key = jax.random.key(options.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(samples))
    null = options.null if _branches(options) else ""
    args = (null, options.null_temperature, options.cache or 0, options.cache is not None)
    return session.begin(model.decode_params, model.model_config, keys, *args)


def _room(options: GenerateOptions, cfg: BackboneConfig) -> int:
    """Steps that drawing takes at most."""
    return options.max_tokens + options.most_images * (cfg.patches + 2) + 1


def _check_images(model: Model, parts: Sequence[Sequence[Part]]) -> None:
    for i, row in enumerate(parts):
        for j, part in enumerate(row):
            where = f"prompt {i}, part {j}"
            if part.kind != "image":
                continue
            if part.latent is not None:
                shape = (model.model_config.patches, model.model_config.flow.channels)
                if part.latent.shape != shape:
                    raise ValueError(f"{where}: latent {part.latent.shape}, expected {shape}")
            elif model.codec is None:
                raise ValueError(f"{where}: the model has no codec (--fae) to read an image with")
            else:
                prompts.check_pixels(part.image, model.codec.model.pixels, where)


def _check_trained(model: Model, parts: Sequence[Sequence[Part]], options: GenerateOptions) -> None:
    """Refuses what the checkpoint's stage has not learnt."""
    if options.most_images and not flow_is_trained(model):
        raise ValueError(
            f"{model.source or 'model'}: its flow is as it was born (a checkpoint of stage 2 that "
            "began from nothing?), it draws no images; images=0 gives text alone"
        )
    shown = any(part.kind == "image" for row in parts for part in row)
    if shown and not adapter_is_trained(model):
        raise ValueError(
            f"{model.source or 'model'}: its adapter is zero (a checkpoint of stage 1?), so that "
            "its VLM sees no images; give text alone, or a checkpoint of stage 2 or 3"
        )


def latents(
    model: Model, parts: Sequence[Sequence[Part]], keys: jax.Array, before: Sequence[int]
) -> list[np.ndarray]:
    """Noisy latents [I, N, D] of every row's images, as the model is trained to read them.

    Args:
        keys: of the rows [B]; before: how many parts each row has already. An image's noise depends
            on its row's key and the number of its part.
    """
    dtype = np.asarray(model.params["deep"]["proj_in"]["weight"][:0]).dtype
    wide = np.promote_types(dtype, np.float32)
    given = lambda part: part.kind == "image" and part.latent is None
    distinct = {id(part.image): part.image for row in parts for part in row if given(part)}
    moments = {}
    if distinct:
        mean, log_variance = codec.encode(model.codec, np.stack(list(distinct.values())))
        moments = {name: pair for name, *pair in zip(distinct, mean, log_variance)}
    found = []
    for b, row in enumerate(parts):
        number, x = before[b], []
        for part in row:
            if part.kind == "image" and part.latent is not None:
                x.append(np.asarray(part.latent, wide))
            elif part.kind == "image":
                mean, log_variance = moments[id(part.image)]
                batch = {"latent_mean": mean[None], "latent_logvar": log_variance[None]}
                key = jax.random.fold_in(keys[b], number)
                x.append(np.asarray(preprocess.tokens(batch, key[None], model.cfg, False))[0])
            number += part.counts
        shape = (len(x), model.model_config.patches, model.model_config.flow.channels)
        found.append(np.asarray(x, wide).reshape(shape))
    return found


def _ready(
    state: decode_loop.State, options: GenerateOptions, model: Model, going_on: bool
) -> decode_loop.State:
    """The counters of a turn. A row whose turn has ended stays so unless it was told more."""
    token, is_image = np.asarray(state.token), np.asarray(state.is_image)
    due = options.images or 0
    mode = decode_loop.BEGIN if options.image_start or not options.max_tokens else decode_loop.TEXT
    full = lambda value: jnp.full(len(token), value, jnp.int32)
    modes = np.full(len(token), mode, np.int32)
    if going_on:
        ends = session.delimiters(model.tokenizer, model.model_config).ends
        modes[np.isin(token, ends) & ~is_image] = decode_loop.ENDED
    return state.replace(
        mode=jnp.asarray(modes),
        patch=full(0),
        tokens=full(options.max_tokens),
        images=full(options.most_images),
        due=full(due),
    )


def _loop(model: Model, held: Conversation, options: GenerateOptions, start: Any, first: int):
    """Chunks of steps until every row is done; the host looks for stop texts between them.

    Args:
        start, first: as in `answers.finished`.

    Returns:
        the conversation, every row's (tokens, u, nats) of what was drawn and kept, and why each
        ended.
    """
    cfg, ids = model.model_config, session.delimiters(model.tokenizer, model.model_config)
    # With stop texts a row may run on past one to the end of its chunk.
    steps = jnp.int32(16 if options.stop else decode_loop.CHUNK)
    wide = jnp.promote_types(held.state.u.dtype, jnp.float32)
    guided = None
    if held.null:
        guided = Guidance(
            jnp.asarray(options.guidance, wide), rule=options.rule, what=options.what,
            annealed=options.annealed, temperature_on="unconditional",
        )  # fmt: skip
    numbers = decode_loop.Numbers(
        temperature=jnp.asarray(options.temperature, wide),
        top_k=jnp.int32(options.top_k),
        top_p=jnp.asarray(options.top_p, wide),
        image_temperature=jnp.asarray(options.image_temperature, wide),
        guidance=guided,
    )
    state = held.state
    rows: list[list[Any]] = [[] for _ in range(held.rows)]
    stopped: set[int] = set()
    while (np.asarray(state.mode) < decode_loop.ENDED).any():
        args = (held.params, _placed(state), held.keys, numbers, held.heat, steps)
        state, record = decode_loop.run(*args, cfg=cfg, ids=ids)
        token, u, nats = (np.asarray(a) for a in (record.token, record.u, record.nats))
        for b, row in enumerate(rows):
            count = int((token[b] != decode_loop.NOTHING).sum())
            row += zip(token[b, :count].tolist(), u[b, :count], nats[b, :count])
        cuts = {}
        for b in set(range(len(rows))) - stopped if options.stop else ():
            keep = answers.stop_at(model.tokenizer, rows[b], options.stop, ids)
            if keep is not None:
                rows[b] = rows[b][:keep]
                cuts[b] = [pick for pick, _, _ in rows[b]]
        if cuts:
            stopped |= cuts.keys()
            state = session.cut(state, start, first, cuts, cfg, ids)
    modes = np.asarray(state.mode)
    reasons = ["stop" if b in stopped else "end" for b in range(len(rows))]
    if options.max_tokens:
        for b in np.flatnonzero(modes == decode_loop.OUT_OF_TOKENS):
            reasons[b] = "length"
    return dataclasses.replace(held, state=state), rows, reasons


def _placed(state: decode_loop.State) -> decode_loop.State:
    """Its arrays on the mesh of the caches, as a chunk leaves them: what comes from the host is of
    another type, and would need another program."""
    where = state.caches[0].keys[0].sharding
    if not isinstance(where, NamedSharding):
        return state
    rest = jax.device_put(state.replace(caches=None), mesh.replicated(where.mesh))
    return rest.replace(caches=state.caches)
