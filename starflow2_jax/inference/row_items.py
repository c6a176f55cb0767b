"""The items of one row: a conversation laid out for the caches, and what decoding adds to it.

Shapes: T items, N patches of an image, D latent channels, I images of a conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.session import layout_messages, open_turn
from starflow2_jax.models.backbone import BackboneInputs


@dataclass(frozen=True, eq=False)
class RowItems:
    """Items in the order in which a row reads them; the last one is pending after a prompt."""

    ids: np.ndarray  # int32 [T]; patches have the id of an image slot
    latents: np.ndarray  # [T, D], u of patches, zeros at tokens
    is_image: np.ndarray  # bool [T]
    positions: np.ndarray  # int32 [T, 3], in the VLM
    next_positions: (
        np.ndarray
    )  # int32 [T, 3], of the item that each item predicts, in the deep flow
    item_positions: np.ndarray  # int32 [T, 3], of the items themselves in the deep flow
    next_vlm_position: int  # VLM position of the item after these
    flow_index: int  # number of tokens and whole images among all items of the row

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def content(self) -> "RowContent":
        """Return the items without their positions, which follow from what the items are."""
        return RowContent(self.ids, self.latents, self.is_image)


@dataclass(frozen=True, eq=False)
class RowContent:
    """The tokens and patches of a row."""

    ids: np.ndarray  # int32 [T]; patches have the id of an image slot
    latents: np.ndarray  # [T, D], u of patches, zeros at tokens
    is_image: np.ndarray  # bool [T]

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> "RowContent":
        """Return the first items."""
        return RowContent(self.ids[:count], self.latents[:count], self.is_image[:count])

    def extended(self, ids: Sequence[int], latents: np.ndarray, is_image: bool) -> "RowContent":
        """Return the content with more tokens, or with more patches."""
        return RowContent(
            np.concatenate([self.ids, np.asarray(ids, np.int32)]),
            np.concatenate([self.latents, latents.astype(self.latents.dtype)]),
            np.concatenate([self.is_image, np.full(len(ids), is_image)]),
        )

    def common_prefix(self, other: "RowContent") -> int:
        """Return the number of first items that both rows have in common."""
        size = min(len(self), len(other))
        a, b = self.first(size), other.first(size)
        same = (a.ids == b.ids) & (a.is_image == b.is_image)
        same &= ~a.is_image | (a.latents == b.latents).all(-1)
        return size if same.all() else int(np.argmin(same))


@dataclass(frozen=True, eq=False)
class ImageValues:
    """An image of a conversation as rows read it."""

    u: np.ndarray  # [N, D], with the noise of a target
    clean: np.ndarray  # [N, D] of the clean copy; `u` if the model reads no clean copies


def layout_conversation(
    model: Model, parts: Sequence[Part], images: Sequence[ImageValues], null: str = ""
) -> RowItems:
    """Return the items of a conversation, with clean copies, up to the answer that comes next.

    Args:
        parts: all parts, the last one not of the assistant.
        images: the values of the image parts, in order.
        null: the null prompt of an unconditional branch, as in `session.Session`.
    """
    from starflow2_jax.data import chat_layout

    cfg = model.model_config
    messages = open_turn(parts)
    if model.has_clean_copies:
        messages, _ = chat_layout.insert_copies(messages)
    sequence = layout_messages(messages, model.tokenizer, cfg.num_patches, null, "")
    is_image = sequence.patch_index >= 0
    dtype = np.promote_types(model.params["deep"]["proj_in"]["weight"].dtype, np.float32)
    latents = np.zeros((len(sequence.ids), cfg.flow.channels), dtype)
    image_parts = [part for part in parts if part.kind == "image"]
    for number, (part, image) in enumerate(zip(image_parts, images)):
        slots = is_image & (sequence.image_index == number)
        reads_clean = model.has_clean_copies and part.is_context
        for is_copy, values in (
            (False, image.clean if reads_clean else image.u),
            (True, image.clean),
        ):
            chosen = slots & (sequence.is_copy == is_copy)
            latents[chosen] = values[sequence.patch_index[chosen]]
    positions = chat_layout.vlm_positions(sequence, cfg.flow.side)
    return RowItems(
        ids=sequence.ids,
        latents=latents,
        is_image=is_image,
        positions=positions,
        next_positions=chat_layout.flow_positions(sequence, cfg.flow.side),
        item_positions=chat_layout.item_flow_positions(sequence, cfg.flow.side),
        # The last item is a token.
        next_vlm_position=int(positions[-1, 0]) + 1,
        flow_index=int((sequence.patch_index <= 0).sum()),
    )


def layout_copy(model: Model, pending: RowItems, values: np.ndarray) -> RowItems:
    """Return the items of a clean copy that a row has begun, with u [N, D].

    `pending` is the one pending item of the row, the copy's `<|vision_start|>`.
    """
    cfg, tokenizer = model.model_config, model.tokenizer
    vlm_position, flow_index = pending.next_vlm_position, pending.flow_index
    patch = np.arange(cfg.num_patches)
    rows, columns = np.divmod(patch, cfg.flow.side)
    end, end_index = vlm_position + cfg.flow.side, flow_index + 1
    patch_positions = np.stack([0 * patch, rows, columns], -1) + vlm_position
    places = np.stack([rows, columns, np.full_like(patch, flow_index)], -1)
    item_positions = np.concatenate([pending.item_positions, places, [[0, 0, end_index]]])
    return RowItems(
        ids=np.r_[pending.ids, np.full(len(patch), tokenizer.image), tokenizer.vision_end].astype(
            np.int32
        ),
        latents=np.concatenate([pending.latents, values, np.zeros_like(pending.latents)]),
        is_image=np.r_[False, np.ones(len(patch), bool), False],
        positions=np.concatenate([pending.positions, patch_positions, [[end] * 3]]),
        next_positions=np.concatenate([item_positions[1:], [[0, 0, end_index + 1]]]),
        item_positions=item_positions,
        next_vlm_position=end + 1,
        flow_index=flow_index + 2,
    )


def prefill_inputs(
    items: RowItems, first: int, size: int
) -> tuple[BackboneInputs, np.ndarray, int]:
    """Return the inputs of one row from item `first` on, padded to `size`, without the last item.

    Returns:
        The inputs, which of them are real bool [1, size], and the number of those.
    """
    count = min(len(items) - 1 - first, size)

    def pad(a: np.ndarray) -> np.ndarray:
        chosen = a[first : first + count]
        return np.pad(chosen, [(0, size - count)] + [(0, 0)] * (a.ndim - 1))[None]

    inputs = BackboneInputs(
        ids=pad(items.ids.astype(np.int32)),
        latents=pad(items.latents),
        adapter_input=None,
        is_image=pad(items.is_image),
        positions=pad(items.positions.astype(np.int32)),
        next_positions=pad(items.next_positions.astype(np.int32)),
        item_positions=pad(items.item_positions.astype(np.int32)),
    )
    return inputs, (np.arange(size) < count)[None], count
