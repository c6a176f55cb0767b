"""Every configuration key with its default, its meaning and the check of its value.

An experiment file's `get_config(variant)` starts from `default()` and sets what differs. The group
`model` has no fixed keys: they are the fields of the model's config dataclass (see `build`).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from starflow2_jax import checks
from starflow2_jax.checks import Key, choice, count, flag, items, number, positive, text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
# Top-level keys that are not settings: the model's own group, and what a model folder adds.
NON_SETTINGS = ("model", "name", "classes", "null_text")
BYTE_VOCABULARY = 257


def _is_mixture_entry(value: Any) -> bool:
    """Return whether the values of an entry are of the right types; the readers know its keys."""
    return (
        checks.is_mapping(value)
        and all(checks.is_text(v) for k, v in value.items() if k != "weight")
        and checks.is_number(value.get("weight", 1.0))
    )


_DATA = {
    "path": text("", "dataset folder"),
    "mixture": items(
        (),
        "several datasets instead of one path: a list of {path, weight, latents}",
        _is_mixture_entry,
        f"a list of groups of strings, with a weight from 0 to {checks.MAX_NUMBER:g}",
    ),
    "resize": choice("none", "how to treat images of another size", "none", "center_crop"),
    "labels": flag(False, "read meta.label as the class"),
    "text": choice(
        "none", "captions as UTF-8 bytes or as stored features", "none", "bytes", "features"
    ),
    "latents": text("", "dataset folder of latents parallel to `path`, read instead of pixels"),
    "features": text("", "dataset folder of text features parallel to `path`"),
    "shuffle": flag(True, "draw a new global order for every epoch"),
    "threads": positive(4, "decoding threads", checks.MAX_THREADS),
    "blank_images": flag(False, "replace the images of interleaved rows with gray ones"),
    "packing": choice(
        "dataset",
        "a training row is of one dataset, or of the mixture (weights: shares of rows, of records)",
        *("dataset", "mixture"),
    ),
    "skip_long": count(0, "records longer than a row that may be left out of all rows"),
    "skip_bad": count(0, "records that may fail to decode before the run stops"),
}

TASKS = ("flow", "fae_features", "fae_pixels", "fae_end_to_end", "vlm", "starflow2")

KEYS: dict[str, Key] = {
    "task": choice("flow", "kind of training: a flow, a codec module, a VLM, STARFlow2", *TASKS),
    "seed": count(0, "seed of weights, data order, noise, dropout and samples", checks.MAX_SEED),
    "compute_dtype": choice("float32", "dtype of matmuls", "float32", "bfloat16", "float64"),
    "frozen_dtype": choice("float32", "dtype of a frozen VLM", "float32", "bfloat16"),
    "attention": choice(
        "auto",
        "kernel of causal attention; auto: that of the platform (models/attention.py)",
        *("auto", "plain", "splash", "cudnn"),
    ),
    "layout": text("dp", "sharding of the parameters: a name in mesh.LAYOUTS"),
    "mesh": text("data=-1", "devices along each mesh axis; -1 takes the rest"),
    "image.pixels": count(0, "height = width of the images; 0 if latents are read"),
    "image.patch": positive(1, "pixels along the side of a token"),
    "image.channel_order": choice(
        "channel_first", "order inside a token", "channel_first", "channel_last"
    ),
    "image.flip": flag(False, "mirror half of the rows, at random in each step"),
    "text.vocabulary": Key(
        0,
        "rows of the trained token embedding; 0: features are read",
        lambda v: checks.is_whole(v) and (v == 0 or v >= BYTE_VOCABULARY),
        f"0, or at least {BYTE_VOCABULARY} (every byte, and 0 as padding)",
    ),
    "text.tokenizer": text("", "folder of the tokenizer of interleaved rows"),
    "text.length": positive(256, "positions of an interleaved row"),
    "text.images": count(0, "maximum number of images in an interleaved row; 0: as many as fit"),
    "text.max_targets": count(0, "maximum number of target tokens in a row; 0: no limit"),
    "text.vlm_positions": count(
        0,
        "stage 1: positions of a row that the VLM reads, at least those before the end of a "
        "prompt; slower, and equal, if a row has more; 0: all",
    ),
    "text.logit_chunk": positive(256, "positions of a row whose logits are computed at a time"),
    "noise.kind": choice("gaussian", "noise added to the data", "gaussian", "uniform", "none"),
    "noise.sigma": number(0.05, "standard deviation of gaussian noise"),
    "noise.context_sigma": Key(
        None,
        "the same for images that are only read; None: noise.sigma",
        lambda v: v is None or checks.is_number(v),
        f"None, or a number from 0 to {checks.MAX_NUMBER:g}",
    ),
    "cfg_dropout.text": number(0.1, "share of rows that lose text and label", 0.0, 1.0),
    "cfg_dropout.all": number(0.0, "share of records that also lose their images", 0.0, 1.0),
    "vlm.text_loss_weight": number(1.0, "weight of the text loss; 0: the tower is trained alone"),
    "vlm.train_tower": flag(True, "train the vision tower; False: it does not change"),
    "vlm.region_loss_weight": number(0.0, "weight of predicting region words from features"),
    "vlm.pixel_loss_weight": number(0.1, "weight of predicting pixels from the tower's features"),
    "vlm.path": text("", "folder of the published VLM; empty: random weights from the seed"),
    "loss.text_weight": number(1.0, "weight of nats per token against nats per latent channel"),
    "loss.text_into_flow": flag(True, "let the text's gradient reach the flow through its skip"),
    "loss.latent_penalty": number(1e-4, "weight of the mean square before every block"),
    "teacher.kind": choice("dinov2", "the codec's frozen tower", "dinov2", "qwen"),
    "teacher.path": text(
        "", "its published folder, or pretrained/NAME; empty: a tiny tower, random from the seed"
    ),
    "teacher.tower": Key(
        {},
        "sizes of a new tower if teacher.path is empty; empty: a tiny one",
        checks.is_mapping,
        "a group of keys",
    ),
    "teacher.pixels": positive(64, "side of the images that the tower sees"),
    "fae.path": text(
        "", "workdir or model folder of the codec that encodes a flow's images and decodes samples"
    ),
    "fae.beta": number(1e-6, "weight of the KL in nats of a row against the mean square"),
    "fae.latent_noise": number(0.0, "noise on unit-variance latents for the feature decoder"),
    "fae.train_on_decoded_features": flag(
        False, "learn pixels from decoded latents with latent_noise, not from noisy tower features"
    ),
    "fae.l1": number(0.0, "weight of the mean absolute error of pixels"),
    "fae.l2": number(1.0, "weight of the mean square error of pixels"),
    "fae.gradient": number(
        0.0, "end to end: weight of the error of neighboring pixels' difference"
    ),
    "fae.perceptual": number(1.0, "weight of the perceptual distance"),
    "fae.lpips": text("", "safetensors of LPIPS or VGG16; empty: distance of tower features"),
    "fae.gan": number(0.1, "weight of the adversarial loss"),
    "fae.gan_start": count(0, "first step with a discriminator"),
    "fae.lecam": number(1e-3, "weight of LeCam's regularizer of the discriminator"),
    "fae.discriminator_widths": Key(
        (64, 128, 256, 512),
        "channels of the convolutions, each of which halves the sides",
        lambda v: checks.is_list(v, 16) and v and all(checks.is_whole(n, 1) for n in v),
        "a list of 1 to 16 positive whole numbers",
    ),
    "fae.discriminator_groups": positive(32, "norm groups; must divide all widths but the first"),
    "fae.statistics_decay": number(0.999, "decay of the latents' mean and std", 0.0, 1.0),
    **{f"data.{name}": key for name, key in _DATA.items()},
    **{f"eval_data.{name}": key for name, key in _DATA.items()},
    "train.batch_size": positive(64, "rows of the global batch"),
    "train.steps": positive(1000, "optimizer steps"),
    "train.microbatches": positive(1, "parts of a batch whose gradients are accumulated"),
    "train.ema": number(0.999, "decay of the averaged weights", 0.0, 1.0),
    "train.trainable": items(
        ("flow",),
        "top-level subtrees that are trained; the rest is frozen",
        checks.is_text,
        "a list of strings",
    ),
    "optim.lr": number(1e-4, "peak learning rate"),
    "optim.muon_lr": number(0.0, "peak rate of Muon for the layers' matrices; 0: AdamW instead"),
    "optim.final_lr": number(1e-6, "learning rate at the last step (cosine)"),
    "optim.warmup": count(100, "steps of linear warm-up"),
    "optim.b1": number(0.9, "AdamW beta 1", 0.0, 1.0),
    "optim.b2": number(0.95, "AdamW beta 2", 0.0, 1.0),
    "optim.eps": number(1e-8, "AdamW epsilon"),
    "optim.weight_decay": number(1e-4, "AdamW weight decay, on every weight"),
    "optim.clip": number(1.0, "largest global gradient norm; 0 does not clip"),
    "log.every": positive(10, "steps between rows of metrics.jsonl"),
    "log.trackers": items(
        (),
        "any of tensorboard, wandb, trackio",
        lambda v: isinstance(v, str) and v in ("tensorboard", "wandb", "trackio"),
        "a list of some of tensorboard, wandb, trackio",
    ),
    "log.project": text("starflow2_jax", "project name for wandb and trackio"),
    "log.profile_steps": Key(
        (),
        "(first, last) step of a profiler trace",
        lambda v: (
            checks.is_list(v, 2)
            and all(checks.is_whole(n, 1) for n in v)
            and (not v or (len(v) == 2 and v[0] <= v[1]))
        ),
        "empty, or the numbers of two steps, from 1, the first not after the last",
    ),
    "sample.every": count(500, "steps between sample grids; 0: none"),
    "sample.count": positive(16, "images in a grid"),
    "sample.prompts": items(
        (),
        "captions of the grid, repeated; empty: from the evaluation data",
        checks.is_text,
        "a list of strings",
    ),
    "sample.guidance": number(0.0, "guidance weight"),
    "sample.guidance_rule": choice(
        "product", "guidance rule", "product", "linear_log_scale", "linear_scale"
    ),
    "sample.image_temperature": number(1.0, "STARFlow2: factor on the noise of patches", 1e-3),
    "sample.denoise": flag(True, "denoise samples by a score step if the noise is gaussian"),
    "evaluate.every": count(500, "steps between evaluations; 0: only at the end"),
    "evaluate.rows": positive(1000, "rows of the evaluation data that are used"),
    "evaluate.batch_size": positive(50, "rows evaluated at a time"),
    "checkpoint.every": positive(500, "steps between checkpoints"),
    "checkpoint.keep": positive(3, "newest checkpoints that are kept"),
    "checkpoint.keep_every": count(0, "never delete those at multiples of this step; 0: none"),
    "distributed.rendezvous_timeout": positive(
        45, "seconds for all to reach the coordinator", checks.MAX_SECONDS
    ),
    "distributed.initialization": positive(
        45, "seconds for jax.distributed to connect them", checks.MAX_SECONDS
    ),
    "distributed.heartbeat": positive(
        20, "seconds of silence until a process counts as lost", checks.MAX_SECONDS
    ),
    "distributed.shutdown": positive(
        30, "seconds to wait for the others at the end", checks.MAX_SECONDS
    ),
    "init.from": text("", "workdir or model folder whose weights start this run"),
    "init.fae": text(
        "", "workdir or model folder of the codec that a codec's training starts from"
    ),
    "init.ema": flag(True, "start from its averaged weights"),
}

# Old key -> current key, for runs and model folders written before the key was renamed.
RENAMED = {
    "data.blank": "data.blank_images",
    "distributed.probe": "distributed.rendezvous_timeout",
    "drop.all": "cfg_dropout.all",
    "drop.condition": "cfg_dropout.text",
    "eval_data.blank": "eval_data.blank_images",
    "fae.reconstructed": "fae.train_on_decoded_features",
    "image.layout": "image.channel_order",
    "sample.rule": "sample.guidance_rule",
    "text.chunk": "text.logit_chunk",
    "text.targets": "text.max_targets",
    "train.trains": "train.trainable",
    "vlm.language": "vlm.text_loss_weight",
    "vlm.reconstruction": "vlm.pixel_loss_weight",
    "vlm.tower": "vlm.train_tower",
    "vlm.words": "vlm.region_loss_weight",
}

# Keys that configurations of earlier versions lack: with its default, a run is what it was before
# the key existed.
ADDED = (
    "data.packing", "data.skip_long", "eval_data.packing", "eval_data.skip_long",
    "fae.gradient", "noise.context_sigma", "teacher.tower", "text.vlm_positions",
)  # fmt: skip


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


def upgrade(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a stored nested configuration with `RENAMED` keys under their new names.

    Groups that exist get the defaults of missing `ADDED` keys.
    """
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in cfg.items()}
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        if isinstance(result.get(group), dict) and name in result[group]:
            new_group, _, new_name = new.rpartition(".")
            value = result[group].pop(name)
            result.setdefault(new_group, {}).setdefault(new_name, value)
            if not result[group]:
                del result[group]
    for added in ADDED:
        group, _, name = added.rpartition(".")
        if isinstance(result.get(group), dict):
            result[group].setdefault(name, KEYS[added].default)
    return result


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
