"""Parts of an answer with their likelihoods, built from the items of one row as they are sampled.

Shapes: N patches, D latent channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.turn import SampledItem

_LIKELIHOODS = ("log_likelihood", "sampling_log_likelihood", "unconditional_log_likelihood")


class SampledImage(NamedTuple):
    """An image whose last patch has been sampled."""

    part: int  #: the number of its part in the answer
    first: int  #: the number of the item that began it
    u: np.ndarray  #: [N, D]


class PartBuilder:
    """The parts of one row's answer.

    Attributes:
        parts: complete parts; images lack latents, pixels and the log-determinant.
        images: the images among them.
        tokens: tokens of the text that has not ended, which becomes the next part.
        total: nats [3] of all items, as in `decode_loop.StepOutput`.
    """

    def __init__(self, model: Model, needs_copy: bool = False):
        """Start without items; `needs_copy` is the row's in `DecodeState` before them."""
        self._model, self._needs_copy = model, needs_copy
        self.parts: list[Part] = []
        self.images: list[SampledImage] = []
        self.total = np.zeros(3)
        self._num_items = self._first = 0
        self._text: list[SampledItem] = []
        self._patches: list[SampledItem] = []
        self._opening_nats = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the text that has not ended."""
        return tuple(item.token for item in self._text)

    def add(self, items: Sequence[SampledItem]) -> None:
        """Add the next items of the row."""
        for item in items:
            self.total = self.total + item.log_probs
            self._add(item)
            self._num_items += 1

    def _add(self, item: SampledItem) -> None:
        special = self._model.special_tokens
        if item.token == decode_loop.PATCH:
            self._patches.append(item)
            self._needs_copy = self._model.has_clean_copies
            if len(self._patches) == self._model.model_config.num_patches:
                self._end_image()
            return
        is_copy = item.token == special.vision_start and self._needs_copy
        self._needs_copy = self._needs_copy and not is_copy
        if item.token == special.vision_start and not is_copy:
            self.end_text()
            self._first, self._opening_nats = self._num_items, float(item.log_probs[0])
        elif item.token in special.turn_ends or is_copy:
            self.end_text()
            if not self.parts and not is_copy:
                self.parts.append(Part("text", log_likelihood=0.0))
            if self.parts:  # Otherwise it is the copy of an image of an earlier turn.
                nats = self.parts[-1].delimiters + float(item.log_probs[0])
                self.parts[-1] = dataclasses.replace(self.parts[-1], delimiters=nats)
        elif item.token != special.vision_end:
            self._text.append(item)

    def end_text(self) -> None:
        """Make a part of the text that has not ended, if there is one."""
        if self._text:
            tokens = self.tokens
            text = self._model.tokenizer.decode(tokens)
            self.parts.append(Part("text", text=text, tokens=tokens, **_likelihoods(self._text)))
            self._text = []

    def _end_image(self) -> None:
        u = np.stack([patch.u for patch in self._patches])
        self.images.append(SampledImage(len(self.parts), self._first, u))
        likelihoods = _likelihoods(self._patches)
        self.parts.append(Part("image", delimiters=self._opening_nats, **likelihoods))
        self._patches = []


def _likelihoods(items: Sequence[SampledItem]) -> dict[str, float]:
    sums = np.sum([item.log_probs for item in items], 0, dtype=np.float64)
    return dict(zip(_LIKELIHOODS, map(float, sums)))


def with_log_det(part: Part, nats: float) -> Part:
    """Return an image part whose likelihoods include the log-determinant of the shallow flow."""
    changes = {name: getattr(part, name) + nats for name in _LIKELIHOODS}
    return dataclasses.replace(part, **changes)
