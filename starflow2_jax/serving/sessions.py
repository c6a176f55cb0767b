"""The caches of conversations, by the prefix of their messages, of which the oldest go first."""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.row_caches import ReadRow

# Answers whose tokens are kept after their caches have gone.
_MAX_TEXTS = 4096


def prefix_keys(parts: Sequence[Part], digests: Sequence[str]) -> list[str]:
    """Return a key for each number of first parts; `digests` are the sha256 of the images."""
    running, keys, images = hashlib.sha256(), [], iter(digests)
    for part in parts:
        content = part.text if part.kind == "text" else next(images)
        entry = f"{part.role} {part.kind} {len(content)} ".encode() + content.encode()
        running.update(entry)
        keys.append(running.hexdigest())
    return keys


@dataclass(frozen=True, eq=False)
class SessionRows:
    """The branches of a row by their null prompts; "" is the conditional one."""

    branches: Mapping[str, ReadRow]


class SessionCache:
    """Rows of conversations that may go on, at most `size` of them. One thread uses it.

    A key stands for the parts up to the end of an answer. An answer's text is tokenized again when
    a client sends it back, so the tokens that were sampled are kept with the key.
    """

    def __init__(self, size: int):
        self._size = size
        self._rows: OrderedDict[str, SessionRows] = OrderedDict()
        self._tokens: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, keys: Sequence[str]) -> SessionRows | None:
        """Return the row of the longest prefix, by the keys of all prefixes."""
        for key in reversed(keys):
            if key in self._rows:
                self.hits += 1
                self._rows.move_to_end(key)
                return self._rows[key]
        self.misses += 1
        return None

    def put(self, key: str, row: SessionRows) -> None:
        """Keep the row of a conversation; the one that was used longest ago may go."""
        if self._size:
            self._rows[key] = row
            self._rows.move_to_end(key)
        while len(self._rows) > self._size:
            self._rows.popitem(last=False)

    def put_tokens(self, key: str, tokens: tuple[int, ...]) -> None:
        """Keep the tokens of the text that is the last part of a prefix."""
        self._tokens[key] = tokens
        while len(self._tokens) > _MAX_TEXTS:
            self._tokens.popitem(last=False)

    def with_tokens(self, parts: Sequence[Part], keys: Sequence[str]) -> list[Part]:
        """Return the parts of a conversation, its sampled texts with their tokens.

        `keys` are those of all prefixes. Other threads may call this, too.
        """
        return [
            dataclasses.replace(part, tokens=self.tokens(key))
            if part.kind == "text" and part.role == "assistant"
            else part
            for part, key in zip(parts, keys)
        ]

    def tokens(self, key: str) -> tuple[int, ...]:
        """Return the tokens of the text that is the last part of a prefix, if it was sampled."""
        return self._tokens.get(key, ())
