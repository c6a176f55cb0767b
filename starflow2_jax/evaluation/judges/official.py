"""Prompts of judges, read from the files of a benchmark without running any of its code.

The prompts belong to the benchmarks and are no part of this package: the user names a checkout.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starflow2_jax.data import untrusted

_MAX_BYTES = 16 << 20


class MessageTemplate(NamedTuple):
    """A message whose text has fields: `text` is a list of texts and, as 1-tuples, of fields."""

    role: str
    text: tuple[str | tuple[str], ...]

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text with the values of its fields."""
        return "".join(p if isinstance(p, str) else str(values[p[0]]) for p in self.text)


def read_constants(path: str | Path, names: Sequence[str]) -> dict[str, str]:
    """Return the strings that a Python file assigns to names at its top level.

    Raises:
        ValueError: The file is no Python, or does not assign a string to one of the names.
    """
    constants = {}
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    constants[target.id] = node.value.value
    missing = [name for name in names if name not in constants]
    if missing:
        raise ValueError(f"{path}: no text is assigned to {', '.join(missing)}")
    return {name: constants[name] for name in names}


def read_messages(path: str | Path, function: str) -> list[MessageTemplate]:
    """Return the messages that a function of a Python file makes of f-strings and constants.

    A field of an f-string is the subscript `item['name']`, and its name is `name`.

    Raises:
        ValueError: There is no such function, or its texts are made in another way.
    """
    tree = _parse(path)
    bodies = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    if not bodies:
        raise ValueError(f"{path}: there is no function {function}")
    messages = []
    for node in ast.walk(bodies[0]):
        entries = _entries(node)
        if "role" in entries and "content" in entries:
            role = ast.literal_eval(entries["role"])
            texts = [_entries(part).get("text") for part in ast.walk(entries["content"])]
            for text in texts:
                if text is not None:
                    messages.append(MessageTemplate(role, _template(text, str(path))))
    if not messages:
        raise ValueError(f"{path}: the function {function} makes no messages")
    return messages


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with the values of `{name}`, as `str.format` does for plain fields."""

    def replace(match: re.Match[str]) -> str:
        text = match[0]
        return {"{{": "{", "}}": "}"}.get(text) or values[text[1:-1]]

    return re.sub(r"\{\{|\}\}|\{\w+\}", replace, template)


def _parse(path: str | Path) -> ast.Module:
    source = untrusted.read_file(path, _MAX_BYTES)
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a Python file: {error}") from error


def _entries(node: ast.AST) -> dict[str, ast.expr]:
    """Return the entries of a dict display with constant keys; empty for other nodes."""
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values)
    return {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}


def _template(node: ast.expr, path: str) -> tuple[str | tuple[str], ...]:
    parts: list[str | tuple[str]] = []
    for value in node.values if isinstance(node, ast.JoinedStr) else [node]:
        field = value.value if isinstance(value, ast.FormattedValue) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            parts.append(value.value)
        elif isinstance(field, ast.Subscript) and isinstance(field.slice, ast.Constant):
            parts.append((str(field.slice.value),))
        else:
            raise ValueError(f"{path}:{node.lineno}: a text that is neither constant nor f-string")
    return tuple(parts)
