"""Every configuration key with its default, its meaning and the check of its value.

An experiment file's `get_config(variant)` starts from `default()` and sets what differs. The group
`model` has no fixed keys: they are the fields of the model's config dataclass (see `build`).
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
# Top-level keys that are not settings: the model's own group, and what a model folder adds.
NON_SETTINGS = ("model", "name", "classes", "null_text")
BYTE_VOCABULARY = 257


@dataclass(frozen=True)
class Key:
    """A key's default, its meaning, the check of its value, and the expected values in words."""

    default: Any
    doc: str
    is_valid: Callable[[Any], bool] = lambda value: True
    expected: str = ""


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(default, doc):
    return Key(default, doc, lambda v: _is_whole(v) and v > 0, "a positive whole number")


def _count(default, doc):
    return Key(default, doc, lambda v: _is_whole(v) and v >= 0, "a whole number, 0 or more")


def _number(default, doc, low=0.0, high=float("inf")):
    expected = f"a number from {low:g} to {high:g}" if high < float("inf") else f"at least {low:g}"
    return Key(default, doc, lambda v: _is_number(v) and low <= v <= high, expected)


def _choice(default, doc, *allowed):
    return Key(default, doc, lambda v: v in allowed, f"one of {', '.join(map(str, allowed))}")


def _flag(default, doc):
    return Key(default, doc, lambda v: isinstance(v, bool), "True or False")


def _text(default, doc):
    return Key(default, doc, lambda v: isinstance(v, str), "a string")


_DATA = {
    "path": _text("", "dataset folder"),
    "mixture": Key((), "several datasets instead of one path: a list of {path, weight, latents}"),
    "resize": _choice("none", "how to treat images of another size", "none", "center_crop"),
    "labels": _flag(False, "read meta.label as the class"),
    "text": _choice(
        "none", "captions as UTF-8 bytes or as stored features", "none", "bytes", "features"
    ),
    "latents": _text("", "dataset folder of latents parallel to `path`, read instead of pixels"),
    "features": _text("", "dataset folder of text features parallel to `path`"),
    "shuffle": _flag(True, "draw a new global order for every epoch"),
    "threads": _positive(4, "decoding threads"),
    "blank_images": _flag(False, "replace the images of interleaved rows with gray ones"),
    "packing": _choice(
        "dataset",
        "a training row is of one dataset, or of the mixture (weights: shares of rows, of records)",
        *("dataset", "mixture"),
    ),
    "skip_long": _count(0, "records longer than a row that may be left out of all rows"),
    "skip_bad": _count(0, "records that may fail to decode before the run stops"),
}

TASKS = ("flow", "fae_features", "fae_pixels", "fae_end_to_end", "vlm", "starflow2")

KEYS: dict[str, Key] = {
    "task": _choice("flow", "kind of training: a flow, a codec module, a VLM, STARFlow2", *TASKS),
    "seed": _count(0, "seed of weights, data order, noise, dropout and samples"),
    "compute_dtype": _choice("float32", "dtype of matmuls", "float32", "bfloat16", "float64"),
    "frozen_dtype": _choice("float32", "dtype of a frozen VLM", "float32", "bfloat16"),
    "attention": _choice(
        "auto",
        "kernel of causal attention; auto: that of the platform (models/attention.py)",
        *("auto", "plain", "splash", "cudnn"),
    ),
    "layout": _text("dp", "sharding of the parameters: a name in mesh.LAYOUTS"),
    "mesh": _text("data=-1", "devices along each mesh axis; -1 takes the rest"),
    "image.pixels": _count(0, "height = width of the images; 0 if latents are read"),
    "image.patch": _positive(1, "pixels along the side of a token"),
    "image.channel_order": _choice(
        "channel_first", "order inside a token", "channel_first", "channel_last"
    ),
    "image.flip": _flag(False, "mirror half of the rows, at random in each step"),
    "text.vocabulary": Key(
        0,
        "rows of the trained token embedding; 0: features are read",
        lambda v: _is_whole(v) and (v == 0 or v >= BYTE_VOCABULARY),
        f"0, or at least {BYTE_VOCABULARY} (every byte, and 0 as padding)",
    ),
    "text.tokenizer": _text("", "folder of the tokenizer of interleaved rows"),
    "text.length": _positive(256, "positions of an interleaved row"),
    "text.images": _count(0, "maximum number of images in an interleaved row; 0: as many as fit"),
    "text.max_targets": _count(0, "maximum number of target tokens in a row; 0: no limit"),
    "text.vlm_positions": _count(
        0,
        "stage 1: positions of a row that the VLM reads, at least those before the end of a "
        "prompt; slower, and equal, if a row has more; 0: all",
    ),
    "text.logit_chunk": _positive(256, "positions of a row whose logits are computed at a time"),
    "noise.kind": _choice("gaussian", "noise added to the data", "gaussian", "uniform", "none"),
    "noise.sigma": _number(0.05, "standard deviation of gaussian noise"),
    "noise.context_sigma": Key(
        None,
        "the same for images that are only read; None: noise.sigma",
        lambda v: v is None or (_is_number(v) and v >= 0),
        "None, or a number from 0",
    ),
    "cfg_dropout.text": _number(0.1, "share of rows that lose text and label", 0.0, 1.0),
    "cfg_dropout.all": _number(0.0, "share of records that also lose their images", 0.0, 1.0),
    "vlm.text_loss_weight": _number(1.0, "weight of the text loss; 0: the tower is trained alone"),
    "vlm.train_tower": _flag(True, "train the vision tower; False: it does not change"),
    "vlm.region_loss_weight": _number(0.0, "weight of predicting region words from features"),
    "vlm.pixel_loss_weight": _number(0.1, "weight of predicting pixels from the tower's features"),
    "vlm.path": _text("", "folder of the published VLM; empty: random weights from the seed"),
    "loss.text_weight": _number(1.0, "weight of nats per token against nats per latent channel"),
    "loss.text_into_flow": _flag(True, "let the text's gradient reach the flow through its skip"),
    "loss.latent_penalty": _number(1e-4, "weight of the mean square before every block"),
    "teacher.kind": _choice("dinov2", "the codec's frozen tower", "dinov2", "qwen"),
    "teacher.path": _text(
        "", "its published folder, or pretrained/NAME; empty: a tiny tower, random from the seed"
    ),
    "teacher.tower": Key({}, "sizes of a new tower if teacher.path is empty; empty: a tiny one"),
    "teacher.pixels": _positive(64, "side of the images that the tower sees"),
    "fae.path": _text(
        "", "workdir or model folder of the codec that encodes a flow's images and decodes samples"
    ),
    "fae.beta": _number(1e-6, "weight of the KL in nats of a row against the mean square"),
    "fae.latent_noise": _number(0.0, "noise on unit-variance latents for the feature decoder"),
    "fae.train_on_decoded_features": _flag(
        False, "learn pixels from decoded latents with latent_noise, not from noisy tower features"
    ),
    "fae.l1": _number(0.0, "weight of the mean absolute error of pixels"),
    "fae.l2": _number(1.0, "weight of the mean square error of pixels"),
    "fae.gradient": _number(
        0.0, "end to end: weight of the error of neighboring pixels' difference"
    ),
    "fae.perceptual": _number(1.0, "weight of the perceptual distance"),
    "fae.lpips": _text("", "safetensors of LPIPS or VGG16; empty: distance of tower features"),
    "fae.gan": _number(0.1, "weight of the adversarial loss"),
    "fae.gan_start": _count(0, "first step with a discriminator"),
    "fae.lecam": _number(1e-3, "weight of LeCam's regularizer of the discriminator"),
    "fae.discriminator_widths": Key(
        (64, 128, 256, 512), "channels of the convolutions, each of which halves the sides"
    ),
    "fae.discriminator_groups": _positive(32, "norm groups; must divide all widths but the first"),
    "fae.statistics_decay": _number(0.999, "decay of the latents' mean and std", 0.0, 1.0),
    **{f"data.{name}": key for name, key in _DATA.items()},
    **{f"eval_data.{name}": key for name, key in _DATA.items()},
    "train.batch_size": _positive(64, "rows of the global batch"),
    "train.steps": _positive(1000, "optimizer steps"),
    "train.microbatches": _positive(1, "parts of a batch whose gradients are accumulated"),
    "train.ema": _number(0.999, "decay of the averaged weights", 0.0, 1.0),
    "train.trainable": Key(("flow",), "top-level subtrees that are trained; the rest is frozen"),
    "optim.lr": _number(1e-4, "peak learning rate"),
    "optim.muon_lr": _number(0.0, "peak rate of Muon for the layers' matrices; 0: AdamW instead"),
    "optim.final_lr": _number(1e-6, "learning rate at the last step (cosine)"),
    "optim.warmup": _count(100, "steps of linear warm-up"),
    "optim.b1": _number(0.9, "AdamW beta 1", 0.0, 1.0),
    "optim.b2": _number(0.95, "AdamW beta 2", 0.0, 1.0),
    "optim.eps": _number(1e-8, "AdamW epsilon"),
    "optim.weight_decay": _number(1e-4, "AdamW weight decay, on every weight"),
    "optim.clip": _number(1.0, "largest global gradient norm; 0 does not clip"),
    "log.every": _positive(10, "steps between rows of metrics.jsonl"),
    "log.trackers": Key((), "any of tensorboard, wandb, trackio"),
    "log.project": _text("starflow2_jax", "project name for wandb and trackio"),
    "log.profile_steps": Key((), "(first, last) step of a profiler trace"),
    "sample.every": _count(500, "steps between sample grids; 0: none"),
    "sample.count": _positive(16, "images in a grid"),
    "sample.prompts": Key((), "captions of the grid, repeated; empty: from the evaluation data"),
    "sample.guidance": _number(0.0, "guidance weight"),
    "sample.guidance_rule": _choice(
        "product", "guidance rule", "product", "linear_log_scale", "linear_scale"
    ),
    "sample.image_temperature": _number(1.0, "STARFlow2: factor on the noise of patches", 1e-3),
    "sample.denoise": _flag(True, "denoise samples by a score step if the noise is gaussian"),
    "evaluate.every": _count(500, "steps between evaluations; 0: only at the end"),
    "evaluate.rows": _positive(1000, "rows of the evaluation data that are used"),
    "evaluate.batch_size": _positive(50, "rows evaluated at a time"),
    "checkpoint.every": _positive(500, "steps between checkpoints"),
    "checkpoint.keep": _positive(3, "newest checkpoints that are kept"),
    "checkpoint.keep_every": _count(0, "never delete those at multiples of this step; 0: none"),
    "distributed.rendezvous_timeout": _positive(45, "seconds for all to reach the coordinator"),
    "distributed.initialization": _positive(45, "seconds for jax.distributed to connect them"),
    "distributed.heartbeat": _positive(20, "seconds of silence until a process counts as lost"),
    "distributed.shutdown": _positive(30, "seconds to wait for the others at the end"),
    "init.from": _text("", "workdir or model folder whose weights start this run"),
    "init.fae": _text(
        "", "workdir or model folder of the codec that a codec's training starts from"
    ),
    "init.ema": _flag(True, "start from its averaged weights"),
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
    "data.packing",
    "eval_data.packing",
    "fae.gradient",
    "noise.context_sigma",
    "teacher.tower",
    "text.vlm_positions",
)


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
            raise ValueError(f"config: {name}={value!r} must be {KEYS[name].expected}")
    missing = [name for name in KEYS if name not in values]
    if missing:
        raise ValueError(f"config: key {missing[0]!r} is missing")
    if values["train.batch_size"] % values["train.microbatches"]:
        raise ValueError(
            f"config: train.batch_size={values['train.batch_size']} is not a multiple of "
            f"train.microbatches={values['train.microbatches']}"
        )


def build(kind: type[Config], group: Mapping[str, Any], prefix: str) -> Config:
    """Build a frozen config dataclass from a mapping with its fields as keys."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in group:
        if name not in fields:
            raise ValueError(f"config: unknown key '{prefix}.{name}'{nearest(name, fields)}")
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in group:
            raise ValueError(f"config: key '{prefix}.{name}' is missing")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}
    return kind(**values)


def model_group(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` group of a causal model, with the shared keys that are not the default.

    These are `compute_dtype` and `attention`; old configurations lack the latter.
    """
    group = dict(cfg["model"])
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
