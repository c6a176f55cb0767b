"""Text that can be shown while a row is still being sampled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starflow2_jax.inference.model import Model
from starflow2_jax.inference.turn import SampledItem

if TYPE_CHECKING:  # heavy
    from starflow2_jax.data.chat_layout import Tokenizer

# The decoder's mark of bytes that are no character (yet).
_INCOMPLETE = "\ufffd"


def stable_text(tokenizer: "Tokenizer", tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Return the text of the first tokens of a part as far as later tokens cannot change it.

    It lacks a last character whose bytes are incomplete, and an end that may begin a stop text.
    """
    text = tokenizer.decode(tokens) if tokens else ""
    text = text.rstrip(_INCOMPLETE)
    begins = (
        size for s in stop for size in range(min(len(s) - 1, len(text)), 0, -1)
        if text.endswith(s[:size])
    )  # fmt: skip
    return text[: len(text) - max(begins, default=0)]


class TextPrinter:
    """A printer of one row's text while it is sampled; `text` is what it has printed."""

    def __init__(self, model: Model, stop: Sequence[str]):
        self._model, self._stop, self.text = model, stop, ""

    def show(self, items: Sequence[SampledItem]) -> None:
        """Print the text of a row's items, but for what has been printed."""
        turn_ends = self._model.special_tokens.turn_ends
        tokens = [item.token for item in items if item.token not in turn_ends]
        text = stable_text(self._model.tokenizer, tokens, self._stop)
        if len(text) > len(self.text):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text
