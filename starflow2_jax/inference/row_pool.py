"""Rows that begin and end independently, in caches with one length for each row.

A pool has a fixed number of rows and slots, so one program serves every mixture of requests, and
what a row samples does not depend on its neighbors. A row with guidance takes a second row for its
unconditional branch, which reads the same items after another prompt.

Shapes: R rows, S slots of a cache, T new items, D latent channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from starflow2_jax.inference import decode_loop, row_caches
from starflow2_jax.inference.decode_loop import DecodeState
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.row_caches import SPARE_SLOTS, Caches, ReadRow
from starflow2_jax.inference.row_items import RowContent, RowItems, layout_copy
from starflow2_jax.inference.sampling import Branches, SamplingParams
from starflow2_jax.inference.session import Session
from starflow2_jax.inference.turn import SampledItem, TurnStart
from starflow2_jax.mesh import replicated
from starflow2_jax.models.backbone import empty_caches


@dataclass(frozen=True)
class RowOptions:
    """Numbers of one row, all of them traced."""

    key: np.ndarray  # key data of the row's random key
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    image_temperature: float = 1.0
    guidance: float = 0.0
    max_tokens: int = 256
    max_images: int = 0
    images_required: int = 0
    begins_image: bool = False


@dataclass
class _Row:
    """The host's notes on a row in use."""

    content: RowContent  # all items, the pending one included
    start: TurnStart  # the point at which sampling began
    null: int | None  # the row of the unconditional branch
    prompt_size: int  # number of items before the answer


class RowPool:
    """R rows that are admitted, sampled and released independently.

    Only one thread may use a pool. `snapshot` returns arrays that other threads may read.
    """

    def __init__(self, model: Model, num_rows: int, num_slots: int):
        if num_rows < 2:
            raise ValueError(f"a pool of {num_rows} rows: expected at least 2")
        self.model, self.num_rows, self.num_slots = model, num_rows, num_slots
        self.params, self._cfg = model.decode_params, model.model_config
        state = decode_loop.empty_state(
            self.params, self._cfg, num_rows, num_slots, has_null_branch=False
        )
        self._dtypes = tuple(cache.keys[0].dtype for cache in state.caches)
        self._caches: Caches = self._empty_caches(num_rows)
        # The small arrays live on the host, where rows come and go.
        self._state: DecodeState = jax.tree.map(np.array, state.replace(caches=None))
        self._state = self._state.replace(valid=None)
        self._state.mode[:] = decode_loop.ENDED
        self._lengths = np.zeros(num_rows, np.int32)
        self._keys = np.zeros((num_rows, 2), np.uint32)
        self._numbers = _empty_numbers(num_rows, self._state.u.dtype)
        self._source, self._null = np.arange(num_rows), np.arange(num_rows)
        self._rows: dict[int, _Row] = {}
        self._used: set[int] = set()

    @property
    def capacity(self) -> int:
        """The number of items that a row has room for."""
        return self.num_slots - SPARE_SLOTS

    @property
    def num_free(self) -> int:
        """The number of rows that nothing uses."""
        return self.num_rows - len(self._used)

    @property
    def is_active(self) -> bool:
        """True if a step would sample an item of some row."""
        return bool((self._state.mode < decode_loop.ENDED).any())

    def mode(self, row: int) -> int:
        """Return the mode of a row, `decode_loop.TEXT` and so on."""
        return int(self._state.mode[row])

    def read(self, items: RowItems, cached: ReadRow | None = None) -> tuple[ReadRow, int]:
        """Read all items but the last into the caches of one row, which is in no pool yet.

        Args:
            cached: a row whose first items may be the same; those are not read again.

        Returns:
            The row, and the number of items that were taken from `cached`.
        """
        first = 0
        if cached is not None:
            first = min(cached.content.common_prefix(items.content), len(items) - 1)
        if first:
            caches = row_caches.first_items(cached.caches, np.int32(first), slots=self.num_slots)
        else:
            caches = self._empty_caches(1)
        caches = row_caches.prefill(self.params, self._place(caches), items, first, self._cfg)
        return ReadRow(caches, items.content.first(len(items) - 1)), first

    def admit(
        self,
        items: RowItems,
        row: ReadRow,
        options: RowOptions,
        num_parts: int,
        null: tuple[RowItems, ReadRow] | None = None,
    ) -> int:
        """Let a row that `read` returned sample an answer, and return its number.

        Args:
            num_parts: number of parts before the answer.
            null: items and row of the unconditional branch.
        """
        free = [r for r in range(self.num_rows) if r not in self._used]
        rows = free[: 1 if null is None else 2]
        branches = [(items, row), *([] if null is None else [null])]
        for r, (branch_items, branch_row) in zip(rows, branches):
            self._used.add(r)
            self._caches = row_caches.write_row(
                self._placed_caches(), branch_row.caches, np.int32(r)
            )
            self._lengths[r] = len(branch_items) - 1
            self._source[r], self._null[r] = rows[0], rows[-1]
            self._set_pending(r, branch_items)
            self._set_options(r, options, num_parts)
        start = TurnStart(jax.tree.map(np.array, self._state), int(self._lengths[rows[0]]))
        for r, (branch_items, _) in zip(rows, branches):
            partner = rows[1] if r == rows[0] and null is not None else None
            self._rows[r] = _Row(branch_items.content, start, partner, len(branch_items))
        return rows[0]

    def run_chunk(
        self, max_steps: int, *, until_row_ends: bool = False
    ) -> dict[int, list[SampledItem]]:
        """Run at most `max_steps` steps; return the new items of every conditional row.

        The chunk ends with the first row that ends if something waits for a row.
        """
        state = self._state.replace(
            caches=self._placed_caches(),
            # Derived from the lengths in every step.
            valid=np.zeros((self.num_rows, self.num_slots), bool),
        )
        is_admitted = [r for r in self._rows if self._source[r] == r]
        state, output = decode_loop.decode_chunk(
            self.params,
            state,
            jax.random.wrap_key_data(jnp.asarray(self._keys)),
            self._sampling_params(),
            np.int32(max_steps),
            cfg=self._cfg,
            special=self.model.special_tokens,
            clean_copies=self.model.has_clean_copies,
            until_row_ends=np.bool_(until_row_ends),
        )
        self._caches = state.caches
        self._lengths = np.array(state.caches[0].length)
        self._state = jax.tree.map(np.array, state.replace(caches=None, valid=None))
        token, u, log_probs = map(np.asarray, (output.token, output.u, output.log_probs))
        return {r: self._append(r, token[r], u[r], log_probs[r]) for r in is_admitted}

    def _append(self, row, token, u, log_probs) -> list[SampledItem]:
        """Note the items that a row and its unconditional branch have sampled."""
        count = int((token != decode_loop.EMPTY).sum())
        is_patch = token[:count] == decode_loop.PATCH
        ids = np.where(is_patch, self.model.tokenizer.image, token[:count])
        first = len(self._rows[row].content)
        for r in self._branches(row):
            content = self._rows[r].content
            self._rows[r].content = RowContent(
                np.concatenate([content.ids, ids.astype(np.int32)]),
                np.concatenate([content.latents, u[:count]]),
                np.concatenate([content.is_image, is_patch]),
            )
        slots = range(first, first + count)
        return list(map(SampledItem, token[:count].tolist(), u[:count], log_probs, slots))

    def _branches(self, row: int) -> list[int]:
        null = self._rows[row].null
        return [row] if null is None else [row, null]

    def truncate(self, row: int, items: Sequence[SampledItem]) -> None:
        """End a row after the first of its sampled items `items`, the last of which is a token."""
        size = items[-1].slot + 1 - self._rows[row].prompt_size if items else 0
        for r in self._branches(row):
            notes = self._rows[r]
            notes.content = notes.content.first(notes.prompt_size + size)
            self._lengths[r] = min(int(self._lengths[r]), len(notes.content) - 1)
            self._state.mode[r] = decode_loop.ENDED

    def release(self, row: int) -> None:
        """Free a row and its unconditional branch."""
        for r in self._branches(row):
            self._state.mode[r] = decode_loop.ENDED
            self._source[r] = self._null[r] = r
            self._used.discard(r)
            del self._rows[r]

    def snapshot(self, row: int) -> list[ReadRow]:
        """Return copies of what a row and, if it has one, its unconditional branch have read."""
        result = []
        for r in self._branches(row):
            length = int(self._lengths[r])
            slots = row_caches.kept_slots(length, self.num_slots)
            caches = self._row_caches(r, slots)
            result.append(ReadRow(caches, self._rows[r].content.first(length)))
        return result

    def compile_copies(self) -> None:
        """Run the programs that copy a row to and from the sizes in which `snapshot` keeps it."""
        sizes = {row_caches.kept_slots(n, self.num_slots) for n in range(1, self.num_slots + 1)}
        for slots in sorted(sizes):
            caches = self._row_caches(0, slots)
            row_caches.first_items(caches, np.int32(0), slots=self.num_slots)

    def row_session(self, row: int) -> tuple[Session, TurnStart]:
        """Return a row as a session of its own, which has a copy of the caches, and its start."""
        notes = self._rows[row]

        def select(state: DecodeState) -> DecodeState:
            return jax.tree.map(lambda a: a[row : row + 1], state)

        valid = (np.arange(self.num_slots) < self._lengths[row])[None]
        caches = self._row_caches(row, self.num_slots)
        session = Session(
            params=self.params,
            keys=jax.random.wrap_key_data(jnp.asarray(self._keys[row : row + 1])),
            null="",
            open_roles=("assistant",),
            part_counts=(0,),
            has_fixed_cache=True,
            copies=(None,),
            state=select(self._state).replace(caches=caches, valid=valid),
        )
        return session, TurnStart(select(notes.start.state), notes.start.slot)

    def read_copy(self, row: int, values: np.ndarray) -> SampledItem:
        """Let a row that waits for a clean copy read it, with u [N, D], and go on.

        Returns:
            The copy's `<|vision_end|>`.
        """
        state = self._state
        resumed = {
            decode_loop.COPY_TEXT: decode_loop.TEXT,
            decode_loop.COPY_IMAGE: decode_loop.BEGIN_IMAGE,
        }[self.mode(row)]
        for r in self._branches(row):
            notes = self._rows[r]
            pending = _pending_item(state, r)
            items = layout_copy(self.model, pending, values)
            caches = self._row_caches(r, self.num_slots)
            caches = row_caches.prefill(
                self.params, caches, items, 0, self._cfg, int(self._lengths[r])
            )
            self._caches = row_caches.write_row(self._caches, caches, np.int32(r))
            self._lengths[r] += len(items) - 1
            notes.content = notes.content.extended(items.ids[1:-1], values, True)
            notes.content = notes.content.extended(items.ids[-1:], values[:1] * 0, False)
            self._set_pending(r, items)
            state.needs_copy[r], state.mode[r] = False, resumed
        end = self.model.special_tokens.vision_end
        slot = len(self._rows[row].content) - 1
        return SampledItem(end, np.zeros_like(values[0]), np.zeros(3), slot)

    # ------------------------------------------------------------------------------- internals

    def _place(self, arrays: Any) -> Any:
        """Put arrays where the parameters are: other shardings would need other programs."""
        leaf = jax.tree.leaves(self.params)[0]
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return jax.device_put(arrays, replicated(sharding.mesh))
        return arrays

    def _empty_caches(self, num_rows: int) -> Caches:
        cfg, size = self._cfg, self.num_slots
        caches = empty_caches(cfg, num_rows, size, self._dtypes)
        # Empty caches share one array, but arrays that are donated must differ.
        length = np.zeros(num_rows if num_rows > 1 else (), np.int32)
        caches = decode_loop.map_caches(jnp.copy, caches)
        return self._place(tuple(c.replace(length=jnp.array(length)) for c in caches))

    def _row_caches(self, row: int, slots: int) -> Caches:
        return row_caches.read_row(self._placed_caches(), np.int32(row), slots=slots)

    def _placed_caches(self) -> Caches:
        """Return the caches with the lengths that the host has set."""
        self._caches = tuple(
            cache.replace(length=self._place(jnp.array(self._lengths))) for cache in self._caches
        )
        return self._caches

    def _set_pending(self, r: int, items: RowItems) -> None:
        """Make the last of the items the pending one of a row."""
        state = self._state
        state.token[r], state.u[r], state.is_image[r] = items.ids[-1], items.latents[-1], False
        state.vlm_position[r] = items.positions[-1]
        state.next_vlm_position[r] = items.next_vlm_position
        state.flow_position[r] = items.item_positions[-1]
        state.flow_index[r] = items.flow_index

    def _set_options(self, r: int, options: RowOptions, num_parts: int) -> None:
        state, numbers = self._state, self._numbers
        begins = options.begins_image or not options.max_tokens
        state.mode[r] = decode_loop.BEGIN_IMAGE if begins else decode_loop.TEXT
        state.patch[r], state.index_in_part[r], state.needs_copy[r] = 0, 0, False
        state.part_index[r] = num_parts
        state.tokens_left[r] = options.max_tokens
        state.images_left[r] = options.max_images
        state.images_required[r] = options.images_required
        self._keys[r] = options.key
        for name in numbers:
            numbers[name][r] = getattr(options, name)

    def _sampling_params(self) -> SamplingParams:
        numbers = {name: value for name, value in self._numbers.items() if name != "guidance"}
        rule = self.model.cfg["sample"]["guidance_rule"]
        return SamplingParams(
            **numbers,
            guidance=Guidance(self._numbers["guidance"], rule=rule),
            branches=Branches(
                source=self._source.astype(np.int32), null=self._null.astype(np.int32)
            ),
        )


def _empty_numbers(num_rows: int, dtype: Any) -> Mapping[str, np.ndarray]:
    dtype = np.promote_types(dtype, np.float32)
    defaults = {field.name: field.default for field in dataclasses.fields(RowOptions)}
    names = ("temperature", "top_k", "top_p", "image_temperature", "guidance")
    return {
        name: np.full(num_rows, defaults[name], np.int32 if name == "top_k" else dtype)
        for name in names
    }


def _pending_item(state: DecodeState, r: int) -> RowItems:
    """Return the pending token of a row."""
    return RowItems(
        ids=state.token[r : r + 1],
        latents=np.zeros_like(state.u[r : r + 1]),
        is_image=np.zeros(1, bool),
        positions=state.vlm_position[r : r + 1],
        next_positions=np.zeros((1, 3), np.int32),
        item_positions=state.flow_position[r : r + 1],
        next_vlm_position=int(state.next_vlm_position[r]),
        flow_index=int(state.flow_index[r]),
    )
