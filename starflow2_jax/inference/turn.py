"""The items that are sampled in a turn: their positions, and how to remove the last ones again.

Shapes: B rows, D latent channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.decode_loop import DecodeState
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.session import Session


class SampledItem(NamedTuple):
    """A sampled token or patch, or the `<|vision_end|>` of a clean copy."""

    token: int  #: the token id, or `decode_loop.PATCH`
    u: np.ndarray  #: the patch [D]; zeros for a token
    log_probs: np.ndarray  #: nats [3] as in `decode_loop.StepOutput`
    slot: int  #: the slot of the caches that the item is read into


@dataclass(frozen=True)
class TurnStart:
    """The point at which a turn's generation began."""

    state: DecodeState  # the state of the decode loop, copied to the host, without caches
    slot: int  # the slot into which the pending item is read


def turn_start(session: Session) -> TurnStart:
    """Return the current point of a session; arrays are copied, because the loop donates them."""
    state = jax.tree.map(np.array, session.state.replace(caches=None))
    return TurnStart(state, session.cache_length)


def copy_starts(
    model: Model, sampled_ids: Sequence[int], needs_copy: bool
) -> tuple[set[int], bool]:
    """Return which items (token ids or `PATCH`) sampled in a row's turn begin clean copies.

    `needs_copy` and the second result are those of `DecodeState`, before and after the items.
    """
    special, starts = model.special_tokens, set()
    for t, token in enumerate(sampled_ids):
        if token == special.vision_start and needs_copy:
            starts.add(t)
            needs_copy = False
        elif token == decode_loop.PATCH:
            needs_copy = model.has_clean_copies
    return starts, needs_copy


def advance_counters(
    model: Model, start: TurnStart, b: int, sampled_ids: Sequence[int]
) -> dict[str, Any]:
    """Return the counters of row b after the items (token ids or `PATCH`) sampled in its turn.

    `position_steps` and `flow_steps` are the growth of `next_vlm_position` and `flow_index`.
    """
    cfg, special = model.model_config, model.special_tokens
    position_steps = flow_steps = patches = 0
    part_index, index_in_part = int(start.state.part_index[b]), int(start.state.index_in_part[b])
    copies, needs_copy = copy_starts(model, sampled_ids, bool(start.state.needs_copy[b]))
    for t, token in enumerate(sampled_ids):
        if token == decode_loop.PATCH:
            patches += 1
            if patches == cfg.num_patches:
                position_steps += cfg.flow.side
                flow_steps += 1
                patches = 0
            continue
        position_steps += 1
        flow_steps += 1
        if t in copies or t - 1 in copies:
            if t in copies and t + 1 < len(sampled_ids):  # Its patches are no sampled items.
                position_steps += cfg.flow.side
                flow_steps += 1
        elif token == special.vision_start:
            part_index, index_in_part = part_index + (index_in_part > 0), 0
        elif token == special.vision_end:
            part_index, index_in_part = part_index + 1, 0
        else:
            index_in_part += 1
    return {
        "position_steps": position_steps,
        "flow_steps": flow_steps,
        "part_index": part_index,
        "index_in_part": index_in_part,
        "needs_copy": needs_copy,
    }


def truncate_rows(
    model: Model,
    state: DecodeState,
    start: TurnStart,
    kept_items: Mapping[int, Sequence[SampledItem]],
) -> DecodeState:
    """Return a state in which some rows keep only the items `kept_items`, and are done.

    The last item that a row keeps, if any, is a token.
    """
    caches = state.caches
    host = jax.tree.map(np.array, state.replace(caches=None))
    before = start.state
    for b, items in kept_items.items():
        ids = [item.token for item in items]
        counters = advance_counters(model, start, b, ids)
        for r in range(b, len(host.next_vlm_position), len(host.token)):
            # The last item that stays is pending again.
            host.valid[r, items[-1].slot if items else start.slot :] = False
            position = before.next_vlm_position[r] + counters["position_steps"]
            host.next_vlm_position[r] = position
            flow_index = before.flow_index[r] + counters["flow_steps"]
            host.flow_index[r] = flow_index
            # The last item is a token.
            last_position = np.array([0, 0, flow_index - 1])
            host.flow_position[r] = last_position if ids else before.flow_position[r]
            host.vlm_position[r] = position - 1 if ids else before.vlm_position[r]
        host.token[b] = ids[-1] if ids else before.token[b]
        host.is_image[b] = False if ids else before.is_image[b]
        host.u[b] = host.u[b] if ids else before.u[b]
        host.part_index[b] = counters["part_index"]
        host.index_in_part[b] = counters["index_in_part"]
        host.needs_copy[b] = counters["needs_copy"]
        host.mode[b] = decode_loop.ENDED
    return jax.tree.map(jnp.asarray, host).replace(caches=caches)
