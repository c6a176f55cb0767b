"""Decode sessions: rows whose parts are in the caches, ready to be extended.

Shapes: B rows, R = B or 2B rows (followed by those of the unconditional branch), T new positions,
S slots of a cache, N patches, D latent channels. All but `decode_loop.prefill` runs on the host.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.decode_loop import DecodeState
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part, to_messages
from starflow2_jax.mesh import cache_sharding, decoding_mesh, params_mesh
from starflow2_jax.models.backbone import BackboneInputs
from starflow2_jax.params import Tree

if TYPE_CHECKING:  # heavy
    from starflow2_jax.data.chat_layout import MessagePart, Tokenizer, TokenSequence

# New positions are padded to a multiple of the first, caches to one of the second, so that similar
# prompts share their programs.
LENGTH_STEP, CACHE_STEP = 16, 64


@dataclass(frozen=True)
class Session:
    """A batch of rows and the caches that hold what they have read."""

    params: Tree  # parameters in the layout of `decode_loop.prepare_params`
    keys: jax.Array  # random keys of the rows [B]
    null: str  # null prompt of the unconditional branch; "" without that branch
    open_roles: tuple[str, ...]  # the role whose turn is open in each row; "" before its first part
    part_counts: tuple[int, ...]  # number of parts of each row
    has_fixed_cache: bool  # true if the caches keep their size
    # Values u [N, D] of the clean copy of each row's last image, if the row has not read it yet
    copies: tuple[np.ndarray | None, ...]
    state: DecodeState  # the state of the decode loop

    @property
    def batch_size(self) -> int:
        """The number of rows, B."""
        return len(self.open_roles)

    @property
    def branches(self) -> tuple[str, ...]:
        """The null prompt of every branch; "" is the conditional one."""
        return ("", self.null) if self.null else ("",)

    @property
    def cache_size(self) -> int:
        """The number of slots of a cache, S."""
        return self.state.valid.shape[1]

    @property
    def cache_length(self) -> int:
        """The number of slots that have been written."""
        return int(self.state.caches[0].length)

    def count_parts(self, rows: Sequence[Sequence[Part]]) -> tuple[int, ...]:
        """Return `part_counts` after new parts of every row."""
        return tuple(n + sum(p.is_counted for p in row) for n, row in zip(self.part_counts, rows))


def new_session(
    model: Model, keys: jax.Array, null: str, cache_size: int, has_fixed_cache: bool
) -> Session:
    """Return a session whose rows have read nothing; see the fields of `Session`."""
    params, batch_size = model.decode_params, len(keys)
    state = decode_loop.empty_state(
        params, model.model_config, batch_size, cache_size, has_null_branch=bool(null)
    )
    if (device_mesh := params_mesh(params)) is not None:

        def place(a):
            return jax.device_put(a, cache_sharding(a.shape, device_mesh))

        state = state.replace(caches=decode_loop.map_caches(place, state.caches))
    return Session(
        params=params,
        keys=keys,
        null=null,
        open_roles=("",) * batch_size,
        part_counts=(0,) * batch_size,
        has_fixed_cache=has_fixed_cache,
        copies=(None,) * batch_size,
        state=state,
    )


# ------------------------------------------------------------------------------ reading new parts


def layout_parts(
    parts: Sequence[Part], tokenizer: "Tokenizer", patches: int, null: str, open_role: str
) -> "TokenSequence":
    """Return the items of new parts of a row, and open the assistant's turn after them.

    `null` and `open_role` are those of the branch and the row in `Session`.
    """
    return layout_messages(open_turn(parts), tokenizer, patches, null, open_role)


def open_turn(parts: Sequence[Part]) -> "list[MessagePart]":
    """Return the messages of new parts, and an empty one of the assistant if it is its turn."""
    from starflow2_jax.data.chat_layout import MessagePart

    messages = to_messages(parts)
    is_plain = all(part.role == "none" for part in parts)
    if not is_plain and parts[-1].role != "assistant":
        messages.append(MessagePart("assistant", ""))
    return messages


def layout_messages(
    messages: "Sequence[MessagePart]",
    tokenizer: "Tokenizer",
    patches: int,
    null: str,
    open_role: str,
) -> "TokenSequence":
    """Return the items of messages; `null` and `open_role` are as in `Session`."""
    from starflow2_jax.data.chat_layout import apply_chat_template

    return apply_chat_template(
        messages, tokenizer, patches, null=null or "none", closed=False, open_role=open_role
    )


def extend(
    model: Model,
    session: Session,
    rows: Sequence[Sequence[Part]],
    u: Sequence[np.ndarray],
    reserved: int,
    copies: Sequence[np.ndarray] | None = None,
) -> Session:
    """Read new parts of every row into the caches, except for the last item, which stays pending.

    Args:
        u: values [I, N, D] of each row's images.
        reserved: number of slots to leave free for what will be generated.
        copies: values [I, N, D] of their clean copies; None inserts no copies.
    """
    from starflow2_jax.data.chat_layout import MessagePart, insert_copies

    messages, tables = [open_turn(row) for row in rows], list(u)
    new_copies: list[np.ndarray | None] = [None] * len(rows)
    if copies is not None:
        for b, row_copies in enumerate(copies):
            old, last_image, count = session.copies[b], None, len(u[b])
            if old is not None:
                last_image = MessagePart(session.open_roles[b], count, True)
                row_copies = np.concatenate([row_copies, old[None]])
            messages[b], last_image = insert_copies(messages[b], last_image)
            new_copies[b] = None if last_image is None else row_copies[last_image.content]
            # The values of images, and of copies behind them.
            tables[b] = np.concatenate([np.resize(u[b], row_copies.shape), row_copies])
    session = _read_messages(model, session, messages, tables, reserved)
    counts = session.count_parts(rows)
    state = session.state
    part_index = [n if row else old for row, n, old in zip(rows, counts, state.part_index.tolist())]
    index_in_part = [0 if row else old for row, old in zip(rows, state.index_in_part.tolist())]
    # The counters of the turn are reset by the caller.
    state = state.replace(
        part_index=jnp.asarray(part_index, jnp.int32),
        index_in_part=jnp.asarray(index_in_part, jnp.int32),
        needs_copy=jnp.asarray([copy is not None for copy in new_copies]),
    )
    open_roles = [_open_role(row, role) for row, role in zip(rows, session.open_roles)]
    return dataclasses.replace(
        session,
        open_roles=tuple(open_roles),
        part_counts=counts,
        copies=tuple(new_copies),
        state=state,
    )


def append_copies(
    model: Model, session: Session, copies: Mapping[int, np.ndarray], reserved: int
) -> Session:
    """Read clean copies of the last images of some rows, with values u [N, D], by their rows.

    Each row's pending item is the `<|vision_end|>` of its image or the `<|vision_start|>` of the
    copy; afterwards it is the copy's `<|vision_end|>`.
    """
    from starflow2_jax.data.chat_layout import MessagePart

    shape = (0, model.model_config.num_patches, model.model_config.flow.channels)
    messages = [
        [MessagePart(session.open_roles[b], 0, is_copy=True)] if b in copies else []
        for b in range(session.batch_size)
    ]
    tables = [
        np.stack([copies[b]] * 2) if b in copies else np.zeros(shape)
        for b in range(session.batch_size)
    ]
    session = _read_messages(model, session, messages, tables, reserved)
    needs_copy = [n and b not in copies for b, n in enumerate(session.state.needs_copy.tolist())]
    return dataclasses.replace(
        session,
        copies=tuple(None if b in copies else old for b, old in enumerate(session.copies)),
        state=session.state.replace(needs_copy=jnp.asarray(needs_copy)),
    )


def _read_messages(model, session, messages, tables, reserved) -> Session:
    """Read new messages of every row; `tables` are the values of its images and of its copies."""
    state = jax.tree.map(np.asarray, session.state.replace(caches=None))
    sequences = [
        _new_sequence(model, session, state, b, branch, messages[b], tables[b])
        for branch in range(len(session.branches))
        for b in range(session.batch_size)
    ]
    longest = max(len(sequence["ids"]) for sequence in sequences) - 1
    padded = -(-longest // LENGTH_STEP) * LENGTH_STEP
    session = _ensure_slots(session, longest, padded, reserved)
    caches, valid = session.state.caches, session.state.valid
    if longest:
        inputs, is_real = _pad_sequences(sequences, padded, state.u)
        with decoding_mesh(session.params, session.batch_size):
            caches, valid = decode_loop.prefill(
                session.params, caches, valid, inputs, is_real, cfg=model.model_config
            )
    else:  # A copy, because the next steps donate the arrays.
        caches, valid = jax.tree.map(jnp.copy, (caches, valid))
    conditional = sequences[: session.batch_size]
    new_state = session.state.replace(
        caches=caches,
        valid=valid,
        token=jnp.asarray([s["ids"][-1] for s in conditional], jnp.int32),
        u=jnp.asarray(np.stack([s["latents"][-1] for s in conditional])),
        is_image=jnp.asarray([s["is_image"][-1] for s in conditional]),
        vlm_position=jnp.asarray(np.stack([s["positions"][-1] for s in sequences])),
        next_vlm_position=jnp.asarray([s["next_vlm_position"] for s in sequences], jnp.int32),
        flow_position=jnp.asarray(np.stack([s["item_positions"][-1] for s in sequences])),
        flow_index=jnp.asarray([s["flow_index"] for s in sequences], jnp.int32),
    )
    return dataclasses.replace(session, state=new_state)


def _open_role(parts: Sequence[Part], previous: str) -> str:
    if not parts:
        return previous
    return "none" if all(part.role == "none" for part in parts) else "assistant"


def _new_sequence(model, session, state, b, branch, messages, table) -> dict[str, Any]:
    """Return the pending and the new items of row b in one branch, with absolute positions."""
    from starflow2_jax.data import chat_layout

    cfg, tokenizer = model.model_config, model.tokenizer
    r = branch * session.batch_size + b
    position, flow_index = int(state.next_vlm_position[r]), int(state.flow_index[r])
    null, role = session.branches[branch], session.open_roles[b]
    has_pending, token = state.token[b] >= 0, int(state.token[b])
    items = layout_messages(messages, tokenizer, cfg.num_patches, null, role)
    if messages and messages[0].is_copy and token == tokenizer.vision_start and has_pending:
        items = type(items)(*(column[1:] for column in items))  # The row has begun the copy.
    is_image = items.patch_index >= 0
    values = np.zeros((len(items.ids), cfg.flow.channels), state.u.dtype)
    if is_image.any():
        entry = items.image_index + len(table) // 2 * items.is_copy
        values[is_image] = np.asarray(table)[entry[is_image], items.patch_index[is_image]]
    flow_offset = np.array([0, 0, flow_index])
    sequence = {
        "ids": items.ids,
        "latents": values,
        "is_image": is_image,
        "positions": chat_layout.vlm_positions(items, cfg.flow.side) + position,
        "next_positions": chat_layout.flow_positions(items, cfg.flow.side) + flow_offset,
        "item_positions": chat_layout.item_flow_positions(items, cfg.flow.side) + flow_offset,
        "is_counted": items.patch_index <= 0,
    }
    if not has_pending and not len(items.ids):
        raise ValueError(f"row {b}: the prompt is empty, so there is nothing to generate from")
    ends_turn = token in model.special_tokens.turn_ends and not state.is_image[b]
    if has_pending and messages and ends_turn:
        if not len(items.ids) or items.ids[0] != tokenizer.turn_end:
            raise ValueError(
                f"row {b}: the turn of {role} has ended; continue with a part of another role"
            )
        # Whichever token the model ended its turn with, the delimiter is `turn_end`.
        token = tokenizer.turn_end
        sequence = {name: array[1:] for name, array in sequence.items()}
        sequence["positions"] = sequence["positions"] - 1
        for name in ("next_positions", "item_positions"):
            sequence[name] = sequence[name] - np.array([0, 0, 1])
    end = position
    if len(sequence["ids"]):
        end = int(sequence["positions"][-1, 0]) + 1
    flow_end = flow_index + int(sequence["is_counted"].sum())
    if has_pending:
        pending = {
            "ids": np.array([token], np.int32),
            "latents": state.u[b : b + 1],
            "is_image": state.is_image[b : b + 1],
            "positions": state.vlm_position[r : r + 1],
            "next_positions": np.array([[0, 0, flow_index]], np.int32),
            "item_positions": state.flow_position[r : r + 1],
            "is_counted": np.zeros(1, bool),
        }
        sequence = {name: np.concatenate([pending[name], sequence[name]]) for name in sequence}
    return {**sequence, "next_vlm_position": end, "flow_index": flow_end}


def _pad_sequences(sequences, length, u) -> tuple[BackboneInputs, np.ndarray]:
    """Return all but the last item of each row, padded on the right, and which items are real."""
    count = len(sequences)
    is_real = np.zeros((count, length), bool)
    inputs = BackboneInputs(
        ids=np.zeros((count, length), np.int32),
        latents=np.zeros((count, length, u.shape[-1]), u.dtype),
        adapter_input=None,
        is_image=np.zeros((count, length), bool),
        positions=np.zeros((count, length, 3), np.int32),
        next_positions=np.zeros((count, length, 3), np.int32),
        item_positions=np.zeros((count, length, 3), np.int32),
    )
    names = ("ids", "latents", "is_image", "positions", "next_positions", "item_positions")
    for r, sequence in enumerate(sequences):
        size = len(sequence["ids"]) - 1
        is_real[r, :size] = True
        for name in names:
            getattr(inputs, name)[r, :size] = sequence[name][:-1]
    return inputs, is_real


# ------------------------------------------------------------------------------------- the caches


def _ensure_slots(session: Session, longest: int, padded: int, reserved: int) -> Session:
    needed = session.cache_length + padded + reserved
    if needed <= session.cache_size:
        return session
    if session.has_fixed_cache:
        raise ValueError(
            f"the cache has {session.cache_size} positions, of which {session.cache_length} are "
            f"used; {longest} of the prompt and {reserved} for the answer do not fit "
            f"(cache={session.cache_size}; at least {needed} are needed)"
        )
    new_slots = -(-needed // CACHE_STEP) * CACHE_STEP - session.cache_size

    def pad(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, new_slots), (0, 0)])

    state = session.state.replace(
        caches=decode_loop.map_caches(pad, session.state.caches),
        valid=jnp.pad(session.state.valid, ((0, 0), (0, new_slots))),
    )
    return dataclasses.replace(session, state=state)


def select_rows(session: Session, rows: Sequence[int]) -> Session:
    """Return the session of some rows, which may occur more than once."""
    selected = np.asarray(rows)
    branch_rows = selected
    if session.null:
        branch_rows = np.concatenate([selected, selected + session.batch_size])

    def select(a):
        # A cache of one row has no batch axis.
        a = a[None] if session.state.valid.shape[0] == 1 else a
        a = a[branch_rows]
        return a if len(branch_rows) > 1 else a[0]

    fields = {
        field.name: getattr(session.state, field.name)[
            branch_rows if field.name in decode_loop.BRANCH_FIELDS else selected
        ]
        for field in dataclasses.fields(DecodeState)
        if field.name != "caches"
    }
    return dataclasses.replace(
        session,
        keys=session.keys[selected],
        open_roles=tuple(session.open_roles[i] for i in rows),
        part_counts=tuple(session.part_counts[i] for i in rows),
        copies=tuple(session.copies[i] for i in rows),
        state=DecodeState(decode_loop.map_caches(select, session.state.caches), **fields),
    )
