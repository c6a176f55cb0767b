"""Random changes of bytes and of nested values, for fuzzing."""

import copy
import json
import random
from typing import Any

TOKENS = (
    b"\x00", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\xed\xa0\x80", b"[" * 3000, b"{}",
    b"null", b"NaN", b"1e999", b"-1", b"99999999999999999999", b"\r\n", b"\xe2\x80\xa8", b"../../x",
    b"<|im_start|>", b"<image>", b"%s%n", b"\"", b",", b":", b"\x7fELF", b"{{ 7 * 7 }}",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 2**70, 1e308, 0.5, "", "a", "\0", "\ufffe",
    "a\u2028b", "x" * 70_000, "../../etc/passwd", "/dev/zero", "<image>", "<|im_end|>", "\x1b[2J",
    [], {}, [[]], [None], {"": None}, ["a", 1], {"a": {"b": {"c": []}}}, "nan", "\r\n", b"\xff\xfe",
)  # fmt: skip


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes after one to eight random changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        first = rng.randrange(len(data) + 1)
        last = min(len(data), first + rng.choice((1, 1, 4, 16, 100)))
        kind = rng.randrange(8)
        if kind == 0 and first < len(data):
            data[first] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[first:last] = rng.randbytes(last - first)
        elif kind == 2:
            del data[first:last]
        elif kind == 3:
            data[first:first] = rng.choice(TOKENS)
        elif kind == 4:
            data[first:last] = rng.choice(TOKENS)
        elif kind == 5:
            data[first:first] = data[first:last] * rng.choice((1, 2, 50))
        elif kind == 6 and rng.random() < 0.3:
            del data[first:]
        elif last - first >= 4:
            number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)))
            data[first : first + 4] = number.to_bytes(4, rng.choice(("little", "big")))
    return bytes(data)


def change_value(value: Any, rng: random.Random) -> Any:
    """Return a copy of nested dicts and lists after one to three random changes."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(root))
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 2:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and parent is not root:
            del parent[key]
        elif kind == 4 and isinstance(parent, list) and parent is not root:
            parent.insert(key, copy.deepcopy(parent[key]))
        elif isinstance(parent, dict):
            name = rng.choice(("", "\0", "unknown", str(key).upper(), "x" * 2000))
            parent[name] = parent.pop(key)
        else:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    return root[0]


def to_json(value: Any) -> bytes | None:
    """Return JSON, None for a value that it cannot hold."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        return None


def changed_json(value: Any, rng: random.Random) -> bytes | None:
    """Return the JSON of a changed value, or changed bytes of its JSON."""
    if rng.random() < 0.4:
        return change_bytes(json.dumps(value).encode(), rng)
    return to_json(change_value(value, rng))


def _places(group: Any):
    """Yield (container, key) of every value under a list or dict."""
    items = group.items() if isinstance(group, dict) else enumerate(group)
    for key, value in list(items):
        yield group, key
        if isinstance(value, dict | list):
            yield from _places(value)
