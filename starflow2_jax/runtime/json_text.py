"""Decoding of JSON that others wrote, or that may be damaged: one kind of error, with its place.

Python's decoder ends in one of four errors, of which a recursion limit is not even a ValueError.
`data/untrusted.py` also checks the types of fields.
"""

import json
from typing import Any


def decode(text: str | bytes, location: str, **options: Any) -> Any:
    """Return a JSON value.

    Args:
        text: JSON; bytes are UTF-8.
        location: a file, or another description of the text, for the error.
        options: those of `json.loads`.

    Raises:
        ValueError: Not JSON, not UTF-8, or nested too deeply; begins with `location`.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"{location}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{location}: not JSON: {error}") from error
