"""The interleaved decode loop: sampled text and patches enter the caches of both streams.

Shapes: B rows, R = B or 2B rows (followed by those of the unconditional branch), T new positions, S
slots of a cache, D latent channels, N patches of an image, V vocabulary.

A row's last item is *pending*: it is chosen, but not read yet. A step reads the pending items
into both caches and chooses the next ones, tokens or patches by each row's mode. All rows write to
one slot; `valid` marks those that belong to a row, and unmarking slots removes items again. If the
caches have one length for each row (`inference.row_pool`), a row writes behind its own last slot,
and rows can begin and end independently.

With clean copies, a row that has sampled an image ends its turn or samples another
`<|vision_start|>`. Then it waits until the caller has read the image's clean copy
(`clean_copies.read_copies`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.inference.sampling import (
    SamplingParams,
    SpecialTokens,
    sample_patch,
    sample_token,
)
from starflow2_jax.mesh import constrain_cache
from starflow2_jax.models import backbone, flow, qwen, starflow2
from starflow2_jax.models.backbone import BackboneConfig, BackboneInputs
from starflow2_jax.models.layers import KVCache, at_least_float32
from starflow2_jax.params import Tree

# Modes of a row: it samples tokens; it samples patches; it must begin an image; its turn has ended;
# it has used up its tokens; it waits for a clean copy, then samples tokens, or must begin an image.
# The loop does nothing in the last four.
TEXT, IMAGE, BEGIN_IMAGE, ENDED, OUT_OF_TOKENS, COPY_TEXT, COPY_IMAGE = range(7)
# Values in place of a token id: a patch was sampled; nothing was sampled, as the row is done.
PATCH, EMPTY = -1, -2
# The maximum number of steps of a chunk, which is the size of its output.
CHUNK = 64
# Fields of `DecodeState` with R rows; the others have B.
BRANCH_FIELDS = ("valid", "vlm_position", "next_vlm_position", "flow_position", "flow_index")


@struct.dataclass
class DecodeState:
    """The state of every row."""

    caches: tuple[KVCache, ...]  # key-value caches of the VLM and of the deep flow
    valid: jax.Array  # bool [R, S], the slots that belong to each row
    token: Any  # int32 [B], the pending item's id; -1 before a row's first item
    u: Any  # [B, D], the pending item's patch
    is_image: Any  # bool [B], whether the pending item is a patch
    vlm_position: Any  # int32 [R, 3], the pending item's VLM position
    next_vlm_position: Any  # int32 [R], VLM position of the text or image after the pending one
    flow_position: Any  # int32 [R, 3], the pending item's position in the deep flow
    # int32 [R], number of tokens and whole images: third coordinate of the flow's next position
    flow_index: Any
    mode: Any  # int32 [B], `TEXT`, `IMAGE`, ...
    patch: Any  # int32 [B], number of the next patch
    tokens_left: Any  # int32 [B], tokens that may still be sampled
    images_left: Any  # int32 [B], images that may still be begun
    images_required: Any  # int32 [B], images that must still be begun
    part_index: Any  # int32 [B], number of the next item's part, which determines its noise
    index_in_part: Any  # int32 [B], number of the next token in that part; also determines noise
    needs_copy: Any  # bool [B], whether the last image was a target and has no clean copy yet


@struct.dataclass
class StepOutput:
    """Items that were sampled in every step of a chunk."""

    token: jax.Array  # int32 [B, CHUNK], token ids, `PATCH` or `EMPTY`
    u: jax.Array  # [B, CHUNK, D], patches, zeros for tokens
    log_probs: jax.Array  # [B, CHUNK, 3], nats as in `sampling`


@jax.jit
def prepare_params(params: Tree) -> dict[str, Any]:
    """Return the parameters that the steps read, with layers unstacked."""
    return backbone.unstack({n: t for n, t in params.items() if n != "shallow"})


def empty_state(
    params: Tree, cfg: BackboneConfig, batch_size: int, cache_size: int, *, has_null_branch: bool
) -> DecodeState:
    """Return the state of B rows that have read nothing, with `params` from `prepare_params`."""
    rows = batch_size * (2 if has_null_branch else 1)
    vlm_dtype = qwen.compute_dtype(params["vlm"], cfg.vlm)
    dtypes = (vlm_dtype, flow.compute_dtype(params["deep"], cfg.flow))
    zeros, branch_zeros = jnp.zeros(batch_size, jnp.int32), jnp.zeros(rows, jnp.int32)
    u_dtype = at_least_float32(params["deep"]["proj_in"]["weight"][:0]).dtype
    return DecodeState(
        caches=backbone.empty_caches(cfg, rows, cache_size, dtypes),
        valid=jnp.zeros((rows, cache_size), bool),
        token=zeros - 1,
        u=jnp.zeros((batch_size, cfg.flow.channels), u_dtype),
        is_image=jnp.zeros(batch_size, bool),
        vlm_position=jnp.zeros((rows, 3), jnp.int32),
        next_vlm_position=branch_zeros,
        flow_position=jnp.zeros((rows, 3), jnp.int32),
        flow_index=branch_zeros,
        mode=zeros,
        patch=zeros,
        tokens_left=zeros,
        images_left=zeros,
        images_required=zeros,
        part_index=zeros,
        index_in_part=zeros,
        needs_copy=jnp.zeros(batch_size, bool),
    )


def map_caches(
    function: Callable[[jax.Array], jax.Array], caches: tuple[KVCache, ...]
) -> tuple[KVCache, ...]:
    """Apply a function to all keys and values."""
    return tuple(
        c.replace(keys=tuple(map(function, c.keys)), values=tuple(map(function, c.values)))
        for c in caches
    )


@partial(jax.jit, static_argnames="cfg")
def prefill(
    params: Tree,
    caches: Any,
    valid: jax.Array,
    inputs: BackboneInputs,
    is_real: jax.Array,
    *,
    cfg: BackboneConfig,
) -> tuple[Any, jax.Array]:
    """Read items [R, T] into T free slots of the caches; return the caches and `valid`."""
    _, _, caches, valid = forward_cached(params, caches, valid, inputs, is_real, cfg)
    return caches, valid


def forward_cached(
    params: Tree,
    caches: Any,
    valid: jax.Array,
    inputs: BackboneInputs,
    is_real: jax.Array,
    cfg: BackboneConfig,
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """Run both streams over new items, with `params` from `prepare_params`.

    Args:
        caches: key-value caches with at least T free slots.
        inputs: the new items [R, T]; the adapter's input and the mask are filled in.
        is_real: bool [R, T], False for padding, which is on the right if each row has a length.

    Returns:
        VLM states y [R, T, V], flow states h [R, T, C], caches, valid.
    """
    first, count = caches[0].length, inputs.ids.shape[1]
    slots = jnp.arange(valid.shape[1])
    if first.ndim:  # Padding stays behind a row's length, where later items replace it.
        length = first + is_real.sum(1, dtype=jnp.int32)
        valid = slots < length[:, None]
        mask = slots <= (first[:, None] + jnp.arange(count))[..., None]
    else:
        length = first + count
        valid = jax.lax.dynamic_update_slice_in_dim(valid, is_real, first, 1)
        mask = valid[:, None, :] & (slots <= first + jnp.arange(count)[:, None])
    inputs = inputs.replace(adapter_input=inputs.latents, mask=mask)
    states = cfg.forward(params, inputs, caches=caches)
    caches = map_caches(constrain_cache, states.caches)
    caches = tuple(cache.replace(length=length) for cache in caches)
    return states.vlm_states, states.flow_states, caches, valid


@partial(jax.jit, static_argnames=("cfg", "special", "clean_copies"), donate_argnames="state")
def decode_chunk(
    params: Tree,
    state: DecodeState,
    keys: jax.Array,
    sampling: SamplingParams,
    max_steps: Any,
    *,
    cfg: BackboneConfig,
    special: SpecialTokens,
    clean_copies: bool = False,
    until_row_ends: Any = False,
) -> tuple[DecodeState, StepOutput]:
    """Run at most `max_steps` steps, and at most `CHUNK`; the arrays of `state` are donated.

    If `until_row_ends`, a traced bool, is true, the chunk ends with the first row that ends, or
    that waits for a clean copy.
    """
    rows = state.token.shape[0]
    dtype = jnp.promote_types(state.u.dtype, jnp.float32)
    output = StepOutput(
        token=jnp.full((rows, CHUNK), EMPTY, jnp.int32),
        u=jnp.zeros((rows, CHUNK, state.u.shape[-1]), state.u.dtype),
        log_probs=jnp.zeros((rows, CHUNK, 3), dtype),
    )

    def num_active(state):
        return (state.mode < ENDED).sum()

    enough = jnp.where(until_row_ends, num_active(state), 1)

    def not_done(carry):
        i, state, _ = carry
        return (i < jnp.minimum(max_steps, CHUNK)) & (num_active(state) >= jnp.maximum(enough, 1))

    def step(carry):
        i, state, output = carry
        state, token, u, log_probs = _decode_step(
            params, state, keys, sampling, cfg, special, clean_copies
        )
        output = StepOutput(
            token=output.token.at[:, i].set(token),
            u=output.u.at[:, i].set(u.astype(output.u.dtype)),
            log_probs=output.log_probs.at[:, i].set(log_probs.astype(dtype)),
        )
        return i + 1, state, output

    _, state, output = jax.lax.while_loop(not_done, step, (jnp.int32(0), state, output))
    return state, output


def _decode_step(params, state, keys, sampling, cfg, special, clean_copies):
    """Return (state, token [B], u [B, D], log_probs [B, 3]) after one step."""
    rows = state.token.shape[0]
    tile = partial(_tile_branches, state)
    is_active = state.mode < ENDED
    is_patch = (state.mode == IMAGE) & (state.patch < cfg.num_patches)
    row, column = jnp.divmod(jnp.where(is_patch, state.patch, 0), cfg.flow.side)
    next_flow_position = jnp.stack([tile(row), tile(column), state.flow_index], -1)
    inputs = BackboneInputs(
        ids=tile(state.token)[:, None],
        latents=tile(state.u)[:, None],
        adapter_input=None,
        is_image=tile(state.is_image)[:, None],
        positions=state.vlm_position[:, None],
        next_positions=next_flow_position[:, None],
        item_positions=state.flow_position[:, None],
    )
    is_real = tile(is_active)[:, None]
    y, h, caches, valid = forward_cached(params, state.caches, state.valid, inputs, is_real, cfg)
    y, h = y[:, 0], h[:, 0]
    needs_copy = state.needs_copy if clean_copies else None
    step_keys = item_keys(keys, state, is_patch, needs_copy, cfg.num_patches)
    scale, mean = starflow2.image_head(params, h, cfg)
    fraction = (state.patch + 1) / cfg.num_patches
    u, patch_log_probs = sample_patch(scale, mean, step_keys, fraction, sampling)
    dtype = patch_log_probs.dtype

    def sample():
        may_begin_image = state.images_left > 0
        logits = starflow2.text_logits(params, starflow2.text_states(params, y, h, cfg), cfg)
        return sample_token(
            logits, step_keys, may_begin_image, sampling, special, dtype, needs_copy
        )

    def no_token():
        return jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 3), dtype)

    is_token = is_active & (state.mode == TEXT) & (state.tokens_left > 0)
    token, token_log_probs = jax.lax.cond(is_token.any(), sample, no_token)
    if sampling.branches is not None:
        token, u = token[sampling.branches.source], u[sampling.branches.source]

    # Required images come before the end of a turn, and before running out of tokens.
    is_turn_end = jnp.isin(token, jnp.asarray(special.turn_ends))
    is_last_chance = is_turn_end | (state.tokens_left <= 0)
    begins = (state.mode == BEGIN_IMAGE) | ((state.images_required > 0) & is_last_chance)
    closes = (state.mode == IMAGE) & ~is_patch
    is_forced = closes | ((state.mode != IMAGE) & begins)
    token = jnp.where(is_forced, jnp.where(closes, special.vision_end, special.vision_start), token)
    log_probs = jnp.where(is_patch[:, None], patch_log_probs, token_log_probs)
    log_probs = jnp.where((is_forced | ~is_active)[:, None], 0, log_probs)
    # The pending item will stand where it was predicted.
    flow_position = jnp.where(is_real, next_flow_position, state.flow_position)
    state = state.replace(caches=caches, valid=valid, flow_position=flow_position)
    state = _advance(state, token, u, is_patch, is_forced, cfg, special, clean_copies)
    token = jnp.where(is_active, jnp.where(is_patch, PATCH, token), EMPTY)
    return state, token, jnp.where(is_patch[:, None], u, 0), log_probs


def _tile_branches(state: DecodeState, a: jax.Array) -> jax.Array:
    """Repeat [B, ...] to [R, ...]: the rows of all branches read the same items."""
    branches = len(state.next_vlm_position) // len(state.token)
    return jnp.tile(a, (branches, *(1,) * (a.ndim - 1)))


def item_keys(
    keys: jax.Array,
    state: DecodeState,
    is_patch: jax.Array,
    needs_copy: jax.Array | None = None,
    num_patches: int = 0,
) -> jax.Array:
    """Return the random key [B] of each row's next item, a patch where `is_patch` [B] is true.

    The item after an image that `needs_copy` [B] belongs to the image's part, after its patches.
    """
    part_index = state.part_index
    # An image that begins its part shares the part's number with the token that began it.
    number = jnp.where(is_patch, state.patch + 1, state.index_in_part)
    if needs_copy is not None:
        part_index = part_index - needs_copy
        number = jnp.where(needs_copy, num_patches + 1, number)
    part_keys = jax.vmap(jax.random.fold_in)(keys, part_index)
    return jax.vmap(jax.random.fold_in)(part_keys, number)


def _advance(state, token, u, is_patch, is_forced, cfg, special, clean_copies) -> DecodeState:
    """Return the state with the sampled items as pending ones."""
    tile = partial(_tile_branches, state)
    is_active = state.mode < ENDED
    patch, text = is_active & is_patch, is_active & ~is_patch
    completes = patch & (state.patch + 1 == cfg.num_patches)
    begins = text & (token == special.vision_start)
    closes = text & (token == special.vision_end)
    counted = text
    if clean_copies:
        copies = begins & state.needs_copy
        begins, counted = begins & ~copies, text & ~copies
    tokens_left = state.tokens_left - (counted & ~is_forced)
    images_left = state.images_left - begins
    images_required = jnp.maximum(state.images_required - begins, 0)
    mode = jnp.where(begins, IMAGE, jnp.where(closes, TEXT, state.mode))
    mode = jnp.where(text & jnp.isin(token, jnp.asarray(special.turn_ends)), ENDED, mode)
    is_spent = text & (mode == TEXT) & (tokens_left <= 0) & (images_required <= 0)
    mode = jnp.where(is_spent, OUT_OF_TOKENS, mode)
    if clean_copies:
        mode = jnp.where(copies, jnp.where(is_forced, COPY_IMAGE, COPY_TEXT), mode)
        state = state.replace(needs_copy=(state.needs_copy & ~copies) | closes)
    row, column = (tile(a) for a in jnp.divmod(state.patch, cfg.flow.side))
    start = state.next_vlm_position
    patch_position = jnp.stack([start, start + row, start + column], -1)
    vlm_position = jnp.where(tile(is_patch)[:, None], patch_position, start[:, None])
    return state.replace(
        token=jnp.where(text, token, state.token),
        u=jnp.where(patch[:, None], u.astype(state.u.dtype), state.u),
        is_image=jnp.where(is_active, is_patch, state.is_image),
        vlm_position=jnp.where(tile(is_active)[:, None], vlm_position, state.vlm_position),
        next_vlm_position=start + tile(text + cfg.flow.side * completes),
        flow_index=state.flow_index + tile((text | completes).astype(jnp.int32)),
        mode=mode,
        patch=jnp.where(begins, 0, state.patch + patch),
        tokens_left=tokens_left,
        images_left=images_left,
        images_required=images_required,
        part_index=state.part_index + ((begins & (state.index_in_part > 0)) | closes),
        index_in_part=jnp.where(begins | closes, 0, state.index_in_part + counted),
    )
