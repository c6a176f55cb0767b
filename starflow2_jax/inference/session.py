"""Conversations between their steps: parts laid out and read into the caches, items taken back.

Axes: B rows, R = B or 2B rows (behind them the unconditional branch), T new positions, S slots,
I images, N patches, D latent channels. Runs on the host but for what `decode` and the shallow flow
compute.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.decode_loop import State
from starflow2_jax.inference.prompts import Part
from starflow2_jax.models import starflow2 as pretzel
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.models.layers import at_least_float32

if TYPE_CHECKING:  # heavy
    from starflow2_jax.data.chat_layout import Tokenizer, TokenSequence

# New positions are padded to a multiple of the first, caches to one of the second, so that similar
# prompts share their programs.
LENGTH_STEP, CACHE_STEP = 16, 64


@dataclass(frozen=True)
class Conversation:
    """What a batch of rows has read, ready to go on.

    Attributes:
        params: as `decode.prepare` lays them out; keys: of each row [B]; heat: [R].
        null: of the unconditional branch, "" without one.
        roles: whose turn is open in each row, "" before its first part; parts: how many parts each
            row has.
        fixed: whether the caches keep their size.
    """

    params: Any
    keys: jax.Array
    heat: jax.Array
    null: str
    roles: tuple[str, ...]
    parts: tuple[int, ...]
    fixed: bool
    state: State

    @property
    def rows(self) -> int:
        """B."""
        return len(self.roles)

    @property
    def size(self) -> int:
        """S."""
        return self.state.valid.shape[1]

    @property
    def read(self) -> int:
        """Slots that are written."""
        return int(self.state.caches[0].length)


def delimiters(held: "Tokenizer", cfg: BackboneConfig) -> decode_loop.Ids:
    """What the loop has to know of the tokenizer."""
    banned = (held.vision_end, held.image, held.turn_start, cfg.vlm.video_token)
    ends = (held.turn_end, held.pad)
    size = min(held.vocab_size, cfg.vlm.vocab)
    return decode_loop.Ids(held.vision_start, held.vision_end, ends, banned, size)


def begin(
    params: Any, cfg: BackboneConfig, keys: jax.Array, null: str, heat: Any, size: int, fixed: bool
) -> Conversation:
    """Rows that have read nothing, with caches of `size` slots.

    Args:
        params: as `decode.prepare` lays them out; heat: temperature of the deep flow's attention in
            the unconditional branch.
    """
    rows = len(keys)
    count = rows * (2 if null else 1)
    caches, valid = decode_loop.empty(params, cfg, count, size)
    many, few = jnp.zeros(count, jnp.int32), jnp.zeros(rows, jnp.int32)
    dtype = at_least_float32(params["deep"]["proj_in"]["weight"][:0]).dtype
    state = State(
        caches=caches,
        valid=valid,
        token=few - 1,
        u=jnp.zeros((rows, cfg.flow.channels), dtype),
        is_image=jnp.zeros(rows, bool),
        at=jnp.zeros((count, 3), jnp.int32),
        position=many,
        index=many,
        mode=few,
        patch=few,
        tokens=few,
        images=few,
        due=few,
        part=few,
        item=few,
    )
    args = (null, ("",) * rows, (0,) * rows, fixed, state)
    return heated(Conversation(params, keys, jnp.ones(rows), *args), heat)


def heated(held: Conversation, heat: Any) -> Conversation:
    """The same with another temperature of the unconditional branch's attention."""
    null = jnp.full(held.rows if held.null else 0, heat)
    return dataclasses.replace(held, heat=jnp.concatenate([jnp.ones(held.rows), null]))


def lay_out(
    given: Sequence[Part], tokenizer: "Tokenizer", patches: int, null: str, role: str
) -> "TokenSequence":
    """The items of new parts of a row whose open turn is that of `role`, "" at the beginning."""
    from starflow2_jax.data import chat_layout as layouts

    images = iter(range(len(given)))
    parts = []
    for part in given:
        content: Any = part.tokens or part.text
        parts.append(
            layouts.MessagePart(part.role, next(images) if part.kind == "image" else content)
        )
    if not given or all(part.role == "none" for part in given):
        opened = []
    else:
        opened = [] if given[-1].role == "assistant" else [layouts.MessagePart("assistant", "")]
    return layouts.apply_chat_template(
        [*parts, *opened], tokenizer, patches, null=null or "none", closed=False, open_role=role
    )


def extend(
    held: Conversation,
    given: Sequence[Sequence[Part]],
    latents: Sequence[np.ndarray],
    cfg: BackboneConfig,
    tokenizer: "Tokenizer",
    room: int,
) -> Conversation:
    """Reads new parts of every row, all but their last item, which is then the pending one.

    Args:
        latents: u [I, N, D] of each row's images in turn; room: slots that have to be left for what
            will be drawn.

    Raises:
        ValueError: a row without anything to go on from, or more positions than the caches have
            room for.
    """
    state = jax.tree.map(np.asarray, held.state.replace(caches=None))
    branches = [""] if not held.null else ["", held.null]
    rows = [
        _sequence(held, state, b, branch, given[b], latents[b], cfg, tokenizer, number)
        for number, branch in enumerate(branches)
        for b in range(held.rows)
    ]
    longest = max(len(row["ids"]) for row in rows) - 1
    padded = -(-longest // LENGTH_STEP) * LENGTH_STEP
    needed = held.read + padded + room
    if needed > held.size:
        if held.fixed:
            raise ValueError(
                f"the cache has {held.size} positions, {held.read} of them read; {longest} of the "
                f"prompt and {room} for what may be drawn do not fit (cache={held.size}; "
                f"{needed} would do)"
            )
        held = _grown(held, -(-needed // CACHE_STEP) * CACHE_STEP)
    caches, valid = held.state.caches, held.state.valid
    if longest:
        items = _padded(rows, padded, cfg.flow.channels, state.u.dtype)
        caches, valid = decode_loop.prefill(held.params, caches, valid, items, held.heat, cfg=cfg)
    else:  # The steps to come take the arrays over.
        caches, valid = jax.tree.map(jnp.copy, (caches, valid))
    first = rows[: held.rows]
    new = State(
        caches=caches,
        valid=valid,
        token=jnp.asarray([row["ids"][-1] for row in first], jnp.int32),
        u=jnp.asarray(np.stack([row["u"][-1] for row in first])),
        is_image=jnp.asarray([row["is_image"][-1] for row in first]),
        at=jnp.asarray(np.stack([row["positions"][-1] for row in rows])),
        position=jnp.asarray([row["position"] for row in rows], jnp.int32),
        index=jnp.asarray([row["index"] for row in rows], jnp.int32),
        **{name: jnp.asarray(getattr(state, name)) for name in _COUNTERS},
    )
    parts, roles, numbers, items_ = [], [], [], []
    for b, (row, before) in enumerate(zip(given, held.parts)):
        count = before + sum(part.counts for part in row)
        parts.append(count)
        plain = bool(row) and all(part.role == "none" for part in row)
        roles.append(held.roles[b] if not row else "none" if plain else "assistant")
        numbers.append(count if row else int(state.part[b]))
        items_.append(0 if row else int(state.item[b]))
    new = new.replace(part=jnp.asarray(numbers, jnp.int32), item=jnp.asarray(items_, jnp.int32))
    return dataclasses.replace(held, roles=tuple(roles), parts=tuple(parts), state=new)


_COUNTERS = ("mode", "patch", "tokens", "images", "due", "part", "item")


def _sequence(held, state, b, branch, given, latents, cfg, tokenizer, number):
    """The pending and the new items of a row in one branch, with absolute positions."""
    from starflow2_jax.data import chat_layout as layouts

    r = number * held.rows + b
    position, index = int(state.position[r]), int(state.index[r])
    items = lay_out(given, tokenizer, cfg.patches, branch, held.roles[b])
    where = items.patch_index >= 0
    channels, dtype = cfg.flow.channels, state.u.dtype
    u = np.zeros((len(items.ids), channels), dtype)
    if where.any():
        u[where] = np.asarray(latents)[items.image_index[where], items.patch_index[where]]
    made = {
        "ids": items.ids,
        "u": u,
        "is_image": where,
        "positions": layouts.vlm_positions(items, cfg.flow.side) + position,
        "following": layouts.flow_positions(items, cfg.flow.side) + np.array([0, 0, index]),
        "counts": items.patch_index <= 0,
    }
    begun = state.token[b] >= 0
    token = int(state.token[b])
    ends = delimiters(tokenizer, cfg).ends
    if begun and given and token in ends and not state.is_image[b]:
        if not len(items.ids) or items.ids[0] != tokenizer.turn_end:
            raise ValueError(
                f"row {b}: the turn of {held.roles[b]} has ended; go on with another role"
            )
        # The model has ended its turn by itself, by whatever token: that is the delimiter.
        token = tokenizer.turn_end
        made = {name: values[1:] for name, values in made.items()}
        made["positions"] = made["positions"] - 1
        made["following"] = made["following"] - np.array([0, 0, 1])
    elif not begun and not len(items.ids):
        raise ValueError(f"row {b}: the prompt is empty, there is nothing to begin from")
    end = int(made["positions"][-1, 0]) + 1 if len(made["ids"]) else position
    if begun:
        pending = {
            "ids": np.array([token], np.int32),
            "u": state.u[b : b + 1],
            "is_image": state.is_image[b : b + 1],
            "positions": state.at[r : r + 1],
            "following": np.array([[0, 0, index]], np.int32),
            "counts": np.zeros(1, bool),
        }
        made = {name: np.concatenate([pending[name], made[name]]) for name in made}
    return {**made, "position": end, "index": index + int(made["counts"].sum())}


def _padded(rows, length, channels, dtype):
    """`decode.Items` of all but the last item of each row."""
    count = len(rows)
    made = decode_loop.Items(
        ids=np.zeros((count, length), np.int32),
        u=np.zeros((count, length, channels), dtype),
        is_image=np.zeros((count, length), bool),
        real=np.zeros((count, length), bool),
        positions=np.zeros((count, length, 3), np.int32),
        following=np.zeros((count, length, 3), np.int32),
    )
    for r, row in enumerate(rows):
        size = len(row["ids"]) - 1
        made.real[r, :size] = True
        for name in ("ids", "u", "is_image", "positions", "following"):
            getattr(made, name)[r, :size] = row[name][:-1]
    return made


def _grown(held: Conversation, size: int) -> Conversation:
    """Caches of more slots."""
    more = size - held.size

    def wider(cache):
        pad = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more), (0, 0)])
        keys, values = (tuple(map(pad, side)) for side in (cache.keys, cache.values))
        return cache.replace(keys=keys, values=values)

    caches = tuple(map(wider, held.state.caches))
    valid = jnp.pad(held.state.valid, ((0, 0), (0, more)))
    return dataclasses.replace(held, state=held.state.replace(caches=caches, valid=valid))


def take(held: Conversation, rows: Sequence[int]) -> Conversation:
    """The conversation of some rows, which may come more than once."""
    picked = np.asarray(rows)
    both = picked if not held.null else np.concatenate([picked, picked + held.rows])
    count, before = len(both), held.state.valid.shape[0]

    def of_cache(a):
        a = a if before > 1 else a[None]
        a = a[both]
        return a if count > 1 else a[0]

    caches = tuple(
        c.replace(keys=tuple(map(of_cache, c.keys)), values=tuple(map(of_cache, c.values)))
        for c in held.state.caches
    )
    fields = {f.name for f in dataclasses.fields(State)} - {"caches"}
    long = {"valid", "at", "position", "index"}
    small = {name: getattr(held.state, name)[both if name in long else picked] for name in fields}
    return dataclasses.replace(
        held,
        keys=held.keys[picked],
        heat=held.heat[both],
        roles=tuple(held.roles[i] for i in picked),
        parts=tuple(held.parts[i] for i in picked),
        state=State(caches=caches, **small),
    )


def moved(
    picks: Sequence[int], start: Any, b: int, cfg: BackboneConfig, ids: decode_loop.Ids
) -> dict[str, Any]:
    """How far a row's counters are after `picks` tokens and patches (`decode.Record`).

    Args:
        start: the state before them, on the host; b: the row.

    Returns:
        `position` and `index`, by how much they grew; `part` and `item`, what they are.
    """
    position = index = patches = 0
    part, item = int(start.part[b]), int(start.item[b])
    for pick in picks:
        if pick == decode_loop.PATCH:
            patches += 1
            if patches == cfg.patches:
                position, index, patches = position + cfg.flow.side, index + 1, 0
            continue
        position, index = position + 1, index + 1
        if pick == ids.vision_start:
            part, item = part + (item > 0), 0
        elif pick == ids.vision_end:
            part, item = part + 1, 0
        else:
            item += 1
    return {"position": position, "index": index, "part": part, "item": item}


def cut(
    state: State,
    start: Any,
    first: int,
    kept: dict[int, Sequence[int]],
    cfg: BackboneConfig,
    ids: decode_loop.Ids,
) -> State:
    """Takes items back: of each row in `kept` only these picks stay, and the row is done.

    Args:
        start: the state before the first of the picks, on the host; first: the slot in which the
            item was read that was pending then. The last pick, if any, is a token.
    """  # fmt: skip
    caches = state.caches
    held = jax.tree.map(np.array, state.replace(caches=None))
    rows = len(held.token)
    for b, picks in kept.items():
        end = moved(picks, start, b, cfg, ids)
        for r in range(b, len(held.position), rows):
            # The last kept item is pending again.
            held.valid[r, first + len(picks) :] = False
            held.position[r] = start.position[r] + end["position"]
            held.index[r] = start.index[r] + end["index"]
            held.at[r] = held.position[r] - 1 if picks else start.at[r]
        held.token[b] = picks[-1] if picks else start.token[b]
        held.is_image[b] = False if picks else start.is_image[b]
        held.u[b] = held.u[b] if picks else start.u[b]
        held.part[b], held.item[b] = end["part"], end["item"]
        held.mode[b] = decode_loop.ENDED
    return jax.tree.map(jnp.asarray, held).replace(caches=caches)


# ---------------------------------------------------------------------------------- shallow flow


@partial(jax.jit, static_argnames="cfg")
def _shallow(params, x, *, cfg):
    outputs, log_dets = pretzel.shallow_forward(params, x, cfg)
    return outputs[-1], sum(log_dets)


def shallow(params: Any, x: np.ndarray, cfg: BackboneConfig) -> tuple[np.ndarray, np.ndarray]:
    """u [I, N, D] of latents x, and the log_det [I] of the shallow flow."""
    if not len(x):
        return x, np.zeros(0, x.dtype)
    filled, count = _filled(x)
    u, log_det = _shallow({"shallow": params["shallow"]}, filled, cfg=cfg)
    return np.asarray(u)[:count], np.asarray(log_det)[:count]


def _filled(x):
    """Images repeated up to a power of two, so that few programs serve any number."""
    count = 1 << (len(x) - 1).bit_length()
    return x[np.arange(count) % len(x)], len(x)


def shallow_inverse(
    params: Any, u: np.ndarray, cfg: BackboneConfig, jacobi: Any = None
) -> np.ndarray:
    """Latents x [I, N, D] of u."""
    from starflow2_jax.inference.inverse import inverse

    if not len(u):
        return u
    # The shallow blocks alone: the deep one is an identity, which reads no text.
    blocks = dataclasses.replace(cfg.flow, layers=(*cfg.flow.layers[:-1], 0))
    filled, count = _filled(u)
    args = ({"blocks": params["shallow"]}, jnp.asarray(filled), blocks)
    conditioning = Conditioning(text=jnp.zeros((1, 1, blocks.text_channels)))
    x, _ = inverse(*args, conditioning, jacobi=jacobi)
    return np.asarray(x)[:count]
