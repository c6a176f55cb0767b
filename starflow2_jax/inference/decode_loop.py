"""The interleaved decode loop: text and patches enter the caches of both streams as they are drawn.

Axes: B rows, R = B or 2B rows (behind them those of the unconditional branch), T new positions, S
slots of a cache, D latent channels, N patches of an image, V vocabulary.

A row's last item is *pending*: chosen, but not read yet. A step reads the pending items of all
rows into the caches of the VLM and of the deep flow and chooses the next ones, a token or a patch
by each row's mode. All rows write to one slot at a time, and `valid` says which slots are a row's
own: rows may be of any lengths, and to take items back is to unmark them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.inference import guidance as guiding
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.models import backbone, flow, qwen, starflow2 as pretzel
from starflow2_jax.models.backbone import BackboneConfig, BackboneInputs
from starflow2_jax.models.layers import KVCache
from starflow2_jax.params import Tree
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI

# Modes of a row: it draws tokens; patches; it must begin an image; it is done, and why.
TEXT, IMAGE, BEGIN, ENDED, OUT_OF_TOKENS = range(5)
# What a record holds in place of a token.
PATCH, NOTHING = -1, -2
# Steps of a chunk at most: what a record holds.
CHUNK = 64


class Ids(NamedTuple):
    """Token ids of the delimiters.

    Attributes:
        ends: those that end a turn; banned: those that are never drawn; size: number of ids that
            the tokenizer has.
    """

    vision_start: int
    vision_end: int
    ends: tuple[int, ...]
    banned: tuple[int, ...]
    size: int


@struct.dataclass
class Numbers:
    """How items are drawn; other numbers do not recompile.

    Attributes:
        temperature: of tokens, 0 takes the likeliest; top_k: 0 is all; top_p: 1 is all.
        image_temperature: of the noise of patches, a factor on its standard deviation.
        guidance: of patches, None without an unconditional branch.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    image_temperature: Any
    guidance: Guidance | None


@struct.dataclass
class State:
    """Where every row is.

    Attributes:
        caches: of the VLM and of the deep flow; valid: bool [R, S], the slots that are a row's own.
        token [B], u [B, D], is_image [B]: the pending item; at: int32 [R, 3], its VLM position.
        position: int32 [R], the VLM's of the item after an image or text; index: int32 [R], how
            many tokens and whole images there are, the pending one too.
        mode: int32 [B]; patch: int32 [B], number of the next patch.
        tokens, images, due: int32 [B], tokens and images that may still be drawn, and images that
            must be.
        part, item: int32 [B], numbers of what is drawn next: its noise depends on them.
    """

    caches: tuple[KVCache, ...]
    valid: jax.Array
    token: Any
    u: Any
    is_image: Any
    at: Any
    position: Any
    index: Any
    mode: Any
    patch: Any
    tokens: Any
    images: Any
    due: Any
    part: Any
    item: Any


@struct.dataclass
class Items:
    """Items to read: ids, is_image, real (no padding) [R, T], u [R, T, D], positions [R, T, 3] of
    the VLM, and following int32 [R, T, 3], the deep flow's of the items that they predict."""

    ids: Any
    u: Any
    is_image: Any
    real: Any
    positions: Any
    following: Any


@struct.dataclass
class Record:
    """What was drawn in each step: tokens (or PATCH, NOTHING) [B, CHUNK], u [B, CHUNK, D], and nats
    [B, CHUNK, 3]: of the plain model, of the density drawn from, of the unconditional branch."""

    token: jax.Array
    u: jax.Array
    nats: jax.Array


@partial(jax.jit, static_argnames="cfg")
def prepare(params: Tree, *, cfg: BackboneConfig) -> dict[str, Any]:
    """What the steps read of all parameters, laid out for them (`layers.unstack`)."""
    del cfg
    return backbone.unstack({n: t for n, t in params.items() if n != "shallow"})


def empty(params: Tree, cfg: BackboneConfig, rows: int, size: int) -> tuple[Any, jax.Array]:
    """Caches of `size` slots for R rows, and `valid`."""
    vlm = qwen.compute_dtype(params["vlm"], cfg.vlm)
    dtypes = (vlm, flow.compute_dtype(params["deep"], cfg.flow))
    return backbone.empty_caches(cfg, rows, size, dtypes), jnp.zeros((rows, size), bool)


@partial(jax.jit, static_argnames="cfg")
def prefill(
    params: Tree, caches: Any, valid: jax.Array, items: Items, heat: Any, *, cfg: BackboneConfig
) -> tuple[Any, jax.Array]:
    """Reads items [R, T] into the caches; the T slots must be there. Returns caches and valid.

    Args:
        params: of `prepare`; heat: temperature [R] of the deep flow's attention.
    """
    _, _, caches, valid = read(params, caches, valid, items, heat, cfg)
    return caches, valid


def read(
    params: Tree, caches: Any, valid: jax.Array, items: Items, heat: Any, cfg: BackboneConfig
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """All streams over new items: y [R, T, V], h [R, T, C], caches, valid."""
    first, count = caches[0].length, items.ids.shape[1]
    valid = jax.lax.dynamic_update_slice_in_dim(valid, items.real, first, 1)
    slots = jnp.arange(valid.shape[1])
    mask = valid[:, None, :] & (slots <= first + jnp.arange(count)[:, None])
    inputs = BackboneInputs(
        ids=items.ids,
        latents=items.u,
        adapter_input=items.u,
        is_image=items.is_image,
        positions=items.positions,
        next_positions=items.following,
        mask=mask,
    )
    states = cfg.forward(params, inputs, caches=caches, attention_temperature=heat)
    return states.vlm_states, states.flow_states, states.caches, valid


@partial(jax.jit, static_argnames=("cfg", "ids"), donate_argnames="state")
def run(
    params: Tree,
    state: State,
    keys: jax.Array,
    numbers: Numbers,
    heat: Any,
    steps: Any,
    *,
    cfg: BackboneConfig,
    ids: Ids,
) -> tuple[State, Record]:
    """At most `steps` steps, and `CHUNK`, fewer where all rows are done.

    Args:
        params: of `prepare`; keys: of each row [B]; heat: as in `prefill`.
    """
    rows = state.token.shape[0]
    wide = jnp.promote_types(state.u.dtype, jnp.float32)
    record = Record(
        token=jnp.full((rows, CHUNK), NOTHING, jnp.int32),
        u=jnp.zeros((rows, CHUNK, state.u.shape[-1]), state.u.dtype),
        nats=jnp.zeros((rows, CHUNK, 3), wide),
    )

    def going(carry):
        i, state, _ = carry
        return (i < jnp.minimum(steps, CHUNK)) & (state.mode < ENDED).any()

    def step(carry):
        i, state, record = carry
        state, token, u, nats = _step(params, state, keys, numbers, heat, cfg, ids)
        record = Record(
            token=record.token.at[:, i].set(token),
            u=record.u.at[:, i].set(u.astype(record.u.dtype)),
            nats=record.nats.at[:, i].set(nats.astype(wide)),
        )
        return i + 1, state, record

    _, state, record = jax.lax.while_loop(going, step, (jnp.int32(0), state, record))
    return state, record


def _step(params, state, keys, numbers, heat, cfg, ids):
    """(state, token, u, nats [B, 3]) after one step."""
    rows = state.token.shape[0]
    branches = lambda a: jnp.tile(a, (len(state.position) // rows, *(1,) * (a.ndim - 1)))
    alive = state.mode < ENDED
    drawing = (state.mode == IMAGE) & (state.patch < cfg.patches)
    row, column = jnp.divmod(jnp.where(drawing, state.patch, 0), cfg.flow.side)
    following = jnp.stack([branches(row), branches(column), state.index], -1)
    item = Items(
        ids=branches(state.token)[:, None],
        u=branches(state.u)[:, None],
        is_image=branches(state.is_image)[:, None],
        real=branches(alive)[:, None],
        positions=state.at[:, None],
        following=following[:, None],
    )
    y, h, caches, valid = read(params, state.caches, state.valid, item, heat, cfg)
    y, h = y[:, 0], h[:, 0]
    own = item_keys(keys, state, drawing)
    u, patch_nats = _draw_patch(params, h, own, state, numbers, cfg)
    may_begin = state.images > 0
    dtype = patch_nats.dtype
    nothing = lambda: (jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 3), dtype))
    words = lambda: _draw_token(params, y, h, own, may_begin, numbers, cfg, ids, dtype)
    speaking = alive & (state.mode == TEXT) & (state.tokens > 0)
    token, token_nats = jax.lax.cond(speaking.any(), words, nothing)

    # A turn does not end, and words do not run out, before the images that are due.
    last = jnp.isin(token, jnp.asarray(ids.ends))
    begun = (state.mode == BEGIN) | ((state.due > 0) & (last | (state.tokens <= 0)))
    closes = (state.mode == IMAGE) & ~drawing
    forced = closes | ((state.mode != IMAGE) & begun)
    token = jnp.where(forced, jnp.where(closes, ids.vision_end, ids.vision_start), token)
    nats = jnp.where(drawing[:, None], patch_nats, token_nats)
    nats = jnp.where((forced | ~alive)[:, None], 0, nats)
    state = _move(state.replace(caches=caches, valid=valid), token, u, drawing, forced, cfg, ids)
    shown = jnp.where(drawing, PATCH, token)
    return state, jnp.where(alive, shown, NOTHING), jnp.where(drawing[:, None], u, 0), nats


def item_keys(keys: jax.Array, state: State, drawing: jax.Array) -> jax.Array:
    """The key [B] of what each row draws next, by the numbers of its part and of the item in it.

    Args:
        drawing: bool [B], whether that is a patch.
    """
    of_part = jax.vmap(jax.random.fold_in)(keys, state.part)
    # An image that begins its part shares the part's number with the token that began it.
    number = jnp.where(drawing, state.patch + 1, state.item)
    return jax.vmap(jax.random.fold_in)(of_part, number)


def _draw_patch(params, h, keys, state, numbers, cfg):
    """u [B, D] of the next patch and its nats [B, 3]."""
    rows = len(keys)
    scale, mean = pretzel.image_head(params, h, cfg)
    plain, drawn = (scale[:rows], mean[:rows]), (scale, mean)
    if numbers.guidance is not None:
        fraction = ((state.patch + 1) / cfg.patches)[:, None, None]
        both = guiding.combine(numbers.guidance, scale[:, None], mean[:, None], fraction)
        drawn = tuple(a[:, 0] for a in both)
    heat = jnp.asarray(numbers.image_temperature, scale.dtype)
    drawn = (drawn[0] * heat, drawn[1])
    draw = lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype)
    u = drawn[1] + drawn[0] * jax.vmap(draw)(keys)

    def nats(scale, mean):
        z = (u - mean) / scale
        return -(0.5 * jnp.square(z) + jnp.log(scale) + HALF_LOG_2_PI).sum(-1)

    null = nats(scale[-rows:], mean[-rows:])
    return u, jnp.stack([nats(*plain), nats(*drawn), null], -1)


def _draw_token(params, y, h, keys, may_begin, numbers, cfg, ids, dtype):
    """The next token int32 [B] and its nats [B, 3]."""
    rows = len(keys)
    logits = pretzel.text_logits(params, pretzel.text_states(params, y, h, cfg), cfg)
    plain = jax.nn.log_softmax(logits.astype(dtype))
    number = jnp.arange(logits.shape[-1])
    open_ = (number < ids.size) & ~jnp.isin(number, jnp.asarray(ids.banned))
    open_ = open_ & (may_begin[:, None] | (number != ids.vision_start))
    scores = jnp.where(open_, logits[:rows], -jnp.inf)
    greedy = jnp.asarray(numbers.temperature) <= 0
    warm = scores / jnp.where(greedy, 1.0, numbers.temperature)
    cuts = (jnp.asarray(numbers.top_k) > 0) | (jnp.asarray(numbers.top_p) < 1)
    warm = jax.lax.cond(
        cuts, lambda s: truncate(s, numbers.top_k, numbers.top_p), lambda s: s, warm
    )
    drawn = jax.vmap(jax.random.categorical)(keys, warm)
    token = jnp.where(greedy, jnp.argmax(scores, -1), drawn).astype(jnp.int32)
    pick = lambda logs: jnp.take_along_axis(logs, token[:, None], -1)[:, 0]
    density = jnp.where(greedy, 0.0, pick(jax.nn.log_softmax(warm.astype(dtype))))
    return token, jnp.stack([pick(plain[:rows]), density, pick(plain[-rows:])], -1)


def truncate(logits: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Logits [..., V] with -inf where a token is neither one of the `top_k` likeliest (0 for all)
    nor of the fewest that hold the share `top_p` of the probability."""
    ordered = -jnp.sort(-logits, axis=-1)
    size = logits.shape[-1]
    wanted = jnp.where(jnp.asarray(top_k) > 0, jnp.clip(top_k, 1, size), size)
    ordered = jnp.where(jnp.arange(size) < wanted, ordered, -jnp.inf)
    share = jax.nn.softmax(ordered)
    # A token stays where those before it do not hold the share yet; the likeliest always does.
    before = jnp.cumsum(share, -1) - share
    kept = (before < top_p) & (ordered > -jnp.inf)
    least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(least, ordered[..., :1]), logits, -jnp.inf)


def _move(state, token, u, drawing, forced, cfg, ids):
    """The state with what was drawn as pending items."""
    rows = len(token)
    alive = state.mode < ENDED
    patch, word = alive & drawing, alive & ~drawing
    complete = patch & (state.patch + 1 == cfg.patches)
    begins = word & (token == ids.vision_start)
    closes = word & (token == ids.vision_end)
    tokens = state.tokens - (word & ~forced)
    images, due = state.images - begins, jnp.maximum(state.due - begins, 0)
    mode = jnp.where(begins, IMAGE, jnp.where(closes, TEXT, state.mode))
    ends = word & jnp.isin(token, jnp.asarray(ids.ends))
    mode = jnp.where(ends, ENDED, mode)
    spent = word & (mode == TEXT) & (tokens <= 0) & (due <= 0)
    mode = jnp.where(spent, OUT_OF_TOKENS, mode)
    part = state.part + ((begins & (state.item > 0)) | closes)
    item = jnp.where(begins | closes, 0, state.item + word)

    branches = lambda a: jnp.tile(a, len(state.position) // rows)
    row, column = (branches(a) for a in jnp.divmod(state.patch, cfg.flow.side))
    start = state.position
    of_patch = jnp.stack([start, start + row, start + column], -1)
    at = jnp.where(branches(drawing)[:, None], of_patch, start[:, None])
    step = branches(word + cfg.flow.side * complete)
    return state.replace(
        token=jnp.where(word, token, state.token),
        u=jnp.where(patch[:, None], u.astype(state.u.dtype), state.u),
        is_image=jnp.where(alive, drawing, state.is_image),
        at=jnp.where(branches(alive)[:, None], at, state.at),
        position=start + step,
        index=state.index + branches((word | complete).astype(jnp.int32)),
        mode=mode,
        patch=jnp.where(begins, 0, state.patch + patch),
        tokens=tokens,
        images=images,
        due=due,
        part=part,
        item=item,
    )
