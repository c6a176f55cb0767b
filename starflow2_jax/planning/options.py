"""Keys of a `model` group, which names some of them in several places (a flow's and a VLM's)."""

from collections.abc import Mapping
from typing import Any


def changed(group: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A copy of nested dicts in which every key of these names, at any depth, has these values."""
    return {
        name: changed(inner, **values) if isinstance(inner, Mapping) else values.get(name, inner)
        for name, inner in group.items()
    }


def named(group: Mapping[str, Any], *names: str) -> list[Any]:
    """Values of the keys of these names, at any depth."""
    found = [group[name] for name in names if name in group]
    inner = [part for part in group.values() if isinstance(part, Mapping)]
    return found + [value for part in inner for value in named(part, *names)]


def remat(group: Mapping[str, Any]) -> str:
    """The policy of rematerialisation; several, where they differ, joined by `+`."""
    return "+".join(dict.fromkeys(named(group, "remat"))) or "none"
