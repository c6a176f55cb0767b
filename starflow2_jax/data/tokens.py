"""Text to token ids."""

import numpy as np

from starflow2_jax.data.manifest import DatasetError


def byte_tokens(text: str, length: int, where: str = "text") -> np.ndarray:
    """UTF-8 bytes + 1 of `text`, padded with 0 at the end: int32 [length].

    Raises:
      DatasetError: naming `where`, if the text has more than `length` bytes.
    """
    data = text.encode("utf-8")
    if len(data) > length:
        raise DatasetError(
            f"{where}: the text has {len(data)} bytes, but text_length is {length}: {text[:80]!r}"
        )
    tokens = np.zeros(length, np.int32)
    tokens[: len(data)] = np.frombuffer(data, np.uint8)
    tokens[: len(data)] += 1
    return tokens
