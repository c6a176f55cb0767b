"""Checks of configuration values: kinds of keys, and the fields of config dataclasses.

Every number is finite and has bounds, so that no value overflows an int32, a float32 or a shape.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_INT = 2**31 - 1
#: Seeds are those that numpy and jax take, and their successors.
MAX_SEED = 2**32 - 2
MAX_NUMBER = 1e9
MAX_SECONDS = 1_000_000
MAX_THREADS = 1024
_MAX_ITEMS = 10_000
_MAX_SHOWN = 200
# Fields of any config dataclass with these names.
_CHOICES = {"compute_dtype": (None, "float32", "bfloat16", "float64")}


@dataclass(frozen=True)
class Key:
    """A key's default, its meaning, the check of its value, and the expected values in words."""

    default: Any
    doc: str
    is_valid: Callable[[Any], bool]
    expected: str


def is_whole(value: Any, low: int = 0, high: int = MAX_INT) -> bool:
    """Return whether a value is an int (no bool) within the bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float = 0.0, high: float = MAX_NUMBER) -> bool:
    """Return whether a value is an int or a float (no bool, no NaN) within the bounds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_text(value: Any) -> bool:
    """Return whether a value is a string that a file can hold and a file name can be."""
    return isinstance(value, str) and "\0" not in value and not any(map(_is_surrogate, value))


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def positive(default: int, doc: str, high: int = MAX_INT) -> Key:
    """Return a key for a whole number from 1."""
    expected = f"a positive whole number, at most {high}"
    return Key(default, doc, lambda v: is_whole(v, 1, high), expected)


def count(default: int, doc: str, high: int = MAX_INT) -> Key:
    """Return a key for a whole number from 0."""
    expected = f"a whole number, 0 or more, at most {high}"
    return Key(default, doc, lambda v: is_whole(v, 0, high), expected)


def number(default: float, doc: str, low: float = 0.0, high: float = MAX_NUMBER) -> Key:
    """Return a key for a finite number."""
    expected = f"a number from {low:g} to {high:g}"
    return Key(default, doc, lambda v: is_number(v, low, high), expected)


def choice(default: str, doc: str, *allowed: str) -> Key:
    """Return a key for one of a few strings."""
    expected = f"one of {', '.join(allowed)}"
    return Key(default, doc, lambda v: isinstance(v, str) and v in allowed, expected)


def flag(default: bool, doc: str) -> Key:
    """Return a key for a bool."""
    return Key(default, doc, lambda v: isinstance(v, bool), "True or False")


def text(default: str, doc: str) -> Key:
    """Return a key for a string."""
    return Key(default, doc, is_text, "a string")


def items(default: tuple, doc: str, is_item: Callable[[Any], bool], expected: str) -> Key:
    """Return a key for a list, of any length, of items that pass a check."""
    return Key(default, doc, lambda v: is_list(v) and all(map(is_item, v)), expected)


def is_list(value: Any, high: int = _MAX_ITEMS) -> bool:
    """Return whether a value is a list or a tuple of at most `high` items."""
    return isinstance(value, list | tuple) and len(value) <= high


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping, as dicts and ConfigDicts are, with strings as keys."""
    return hasattr(value, "items") and all(isinstance(key, str) for key in value)


def display(value: Any) -> str:
    """Return the repr of a value of any size for an error message."""
    try:
        line = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or deep nesting
        return f"a {type(value).__name__} too large to print"
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def check_fields(kind: type, values: Mapping[str, Any], prefix: str, least: int = 1) -> None:
    """Check values for the fields of a config dataclass against the types of its fields.

    An int is at least `least`, or 0 if that is the field's default, as it then switches an option
    off. The items of a list of ints, such as numbers of layers or indices, are at least 0. Floats
    are at least 0.

    Args:
        prefix: name of the dataclass or group, for errors.

    Raises:
        ValueError: If a value is not of its field's type or out of bounds.
    """
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue
        value, low = values[f.name], 0 if f.default == 0 else least
        key = f"{prefix}.{f.name}"
        if f.name in _CHOICES:
            if not any(value is a or (isinstance(value, str) and value == a)
                       for a in _CHOICES[f.name]):  # fmt: skip
                allowed = ", ".join(map(str, _CHOICES[f.name]))
                raise ValueError(f"{key}={display(value)} must be one of {allowed}")
        elif not _matches(value, hints[f.name], low):
            expected = _describe(hints[f.name], low)
            raise ValueError(f"{key}={display(value)} must be {expected}")


def _matches(value: Any, hint: Any, low: int) -> bool:
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_matches(value, arg, low) for arg in args)
    if typing.get_origin(hint) is tuple:
        if not is_list(value):
            return False
        hints = [args[0]] * len(value) if args[-1] is ... else args
        return len(value) == len(hints) and all(_matches(v, h, 0) for v, h in zip(value, hints))
    checks: dict[Any, Callable[[Any], bool]] = {
        int: lambda v: is_whole(v, low),
        float: is_number,
        str: is_text,
    }
    return checks[hint](value) if hint in checks else isinstance(value, hint)


def _describe(hint: Any, low: int) -> str:
    args: Sequence[Any] = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(arg, low) for arg in args)
    if typing.get_origin(hint) is tuple:
        length = "" if args[-1] is ... else f"{len(args)} "
        return f"a list of {length}items, each {_describe(args[0], 0)}"
    words = {
        int: f"a whole number from {low} to {MAX_INT}",
        float: f"a number from 0 to {MAX_NUMBER:g}",
        str: "a string",
        bool: "True or False",
        type(None): "None",
    }
    return words.get(hint, "a group of keys")
