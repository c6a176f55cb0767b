"""The configuration of an experiment: defaults, checks, and the dataclasses built from it.

An experiment file's `get_config(variant)` starts from `default()` and sets what differs. The group
`model` has no fixed keys: they are the fields of the model's config dataclass (see `build`).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from starflow2_jax.config import checks
from starflow2_jax.config.earlier_versions import (
    ADDED as ADDED,
    RENAMED as RENAMED,
    upgrade as upgrade,
)
from starflow2_jax.config.keys import KEYS as KEYS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
# Top-level keys that are not settings: the model's own group, and what a model folder adds.
NON_SETTINGS = ("model", "name", "classes", "null_text")


def default() -> Any:
    """Return an ml_collections ConfigDict with every key at its default and an empty `model`."""
    from ml_collections import ConfigDict  # heavy

    return ConfigDict(plain())


def plain() -> dict[str, Any]:
    """Return the defaults as nested dicts."""
    cfg: dict[str, Any] = {"model": {}, "name": ""}
    for name, key in KEYS.items():
        group = cfg
        *path, last = name.split(".")
        for part in path:
            group = group.setdefault(part, {})
        group[last] = key.default
    return cfg


def flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys, without those of `NON_SETTINGS`."""
    values: dict[str, Any] = {}

    def walk(prefix, group):
        for name, value in group.items():
            dotted = f"{prefix}{name}"
            if dotted in NON_SETTINGS:
                continue
            if hasattr(value, "items") and dotted not in KEYS:
                walk(f"{dotted}.", value)
            else:
                values[dotted] = value

    walk("", cfg)
    return values


def unknown_key(name: str) -> str:
    """Return the message for a key that does not exist, with its new name or the nearest one."""
    if name in RENAMED:
        return f"config: key {name!r} is now called {RENAMED[name]!r}"
    group, _, rest = name.partition(".")
    groups = {key.partition(".")[0] for key in KEYS} | {"model"}
    near = difflib.get_close_matches(group, [g for g in groups if g != group], 1, 0.6)
    if rest and near and (near[0] == "model" or f"{near[0]}.{rest}" in KEYS):
        return f"config: unknown key {name!r}; did you mean '{near[0]}.{rest}'?"
    return f"config: unknown key {name!r}{nearest(name, KEYS)}"


def nearest(word: str, words: Any) -> str:
    """Return `; did you mean ...?` for an unknown word, or nothing if no word is close."""
    close = difflib.get_close_matches(word, list(words), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError if a name or a value of a whole experiment configuration is wrong."""
    values = flat(cfg)
    for name, value in values.items():
        if name not in KEYS:
            raise ValueError(unknown_key(name))
        if not KEYS[name].is_valid(value):
            raise ValueError(
                f"config: {name}={checks.display(value)} must be {KEYS[name].expected}"
            )
    if not checks.is_text(cfg.get("name", "")):
        raise ValueError(f"config: name={checks.display(cfg['name'])} must be a string")
    subgroup(cfg, "model", "")
    missing = [name for name in KEYS if name not in values]
    if missing:
        raise ValueError(f"config: key {missing[0]!r} is missing")
    if values["train.batch_size"] % values["train.microbatches"]:
        raise ValueError(
            f"config: train.batch_size={values['train.batch_size']} is not a multiple of "
            f"train.microbatches={values['train.microbatches']}"
        )


def subgroup(cfg: Mapping[str, Any], name: str, prefix: str) -> dict[str, Any]:
    """Return a copy of a group of keys in `cfg`, empty if it is absent or None.

    Raises:
        ValueError: If it is no group; `prefix` is the dotted name of `cfg` with a final dot.
    """
    group = cfg.get(name)
    if group is not None and not checks.is_mapping(group):
        raise ValueError(f"config: {prefix}{name}={checks.display(group)} must be a group of keys")
    return dict(group or {})


def build(kind: type[Config], group: Mapping[str, Any], prefix: str, *, least: int = 1) -> Config:
    """Build a frozen config dataclass from a mapping with its fields as keys.

    Args:
        prefix: dotted name of the group, for errors.
        least: the smallest int for fields with another default than 0 (see `check_fields`).
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in group:
        if name not in fields:
            raise ValueError(f"config: unknown key '{prefix}.{name}'{nearest(name, fields)}")
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in group:
            raise ValueError(f"config: key '{prefix}.{name}' is missing")
    checks.check_fields(kind, group, f"config: {prefix}", least)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}
    return kind(**values)


def model_group(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` group of a causal model, with the shared keys that are not the default.

    These are `compute_dtype` and `attention`; old configurations lack the latter.
    """
    group = subgroup(cfg, "model", "")
    if cfg["compute_dtype"] != "float32":
        group["compute_dtype"] = cfg["compute_dtype"]
    if cfg.get("attention", "auto") != "auto":
        group["attention"] = cfg["attention"]
    return group


def context_sigma(cfg: Mapping[str, Any]) -> float | None:
    """Return the noise of images that are only read; None if it is that of targets."""
    noise = cfg["noise"]
    value = noise.get("context_sigma")
    return None if noise["kind"] != "gaussian" or value == noise["sigma"] else value


def to_dict(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain nested dict (tuples as lists), as it is saved in runs and checkpoints."""

    def plain(value: Any) -> Any:
        if hasattr(value, "items"):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(cfg)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key: old -> new` for every key that differs, including those of `model`."""

    def values(cfg):
        nested = to_dict(cfg)
        return {**flat(nested), **{f"model.{k}": v for k, v in nested.get("model", {}).items()}}

    a, b = values(old), values(new)
    pairs = {name: (a.get(name, "(absent)"), b.get(name, "(absent)")) for name in sorted({*a, *b})}
    return [f"{name}: {x!r} -> {y!r}" for name, (x, y) in pairs.items() if x != y]


def set_nested(group: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return a copy of nested dicts in which these keys have new values at every depth."""
    return {
        name: set_nested(inner, **values) if isinstance(inner, Mapping) else values.get(name, inner)
        for name, inner in group.items()
    }


def find_nested(group: Mapping[str, Any], *names: str) -> list[Any]:
    """Return the values of these keys at every depth of nested dicts."""
    values = [group[name] for name in names if name in group]
    for inner in group.values():
        if isinstance(inner, Mapping):
            values += find_nested(inner, *names)
    return values


def remat_policy(group: Mapping[str, Any]) -> str:
    """Return the rematerialization policy of a `model` group; several are joined by `+`."""
    return "+".join(dict.fromkeys(find_nested(group, "remat"))) or "none"
