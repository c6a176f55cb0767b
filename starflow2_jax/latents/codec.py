"""Load a trained latent codec with its tower, encode images and decode latents.

Axes: B images, H x W pixels, T patches in raster order, D latent channels.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from starflow2_jax import config, mesh
from starflow2_jax.checkpoints import hub, model_folder
from starflow2_jax.checkpoints.convert import teacher as teacher_weights
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.models import qwen_vision
from starflow2_jax.models.fae import codec as fae, dinov2, teacher as teachers
from starflow2_jax.models.fae.config import (
    declare_end_to_end_training,
    declare_features_training,
    declare_pixels_training,
    model_config,
)
from starflow2_jax.models.fae.teacher import Teacher
from starflow2_jax.models.patches import scale_pixels, to_pixels
from starflow2_jax.params import flatten

# Every image is encoded in a batch of this size, so that offline and online latents are equal.
BATCH = 8
# The subtrees that latents depend on.
ENCODER = ("encoder", "latent", "teacher")
DECODERS = ("feature_decoder", "pixel_decoder")
TASKS = ("fae_features", "fae_pixels", "fae_end_to_end")


@dataclass(frozen=True)
class Codec:
    """A latent codec with the frozen tower whose features it encodes."""

    cfg: Mapping[str, Any]  # the resolved configuration of its experiment
    model: fae.FAEConfig  # configuration of the codec
    teacher: Teacher  # configuration of the tower
    # `encoder`, `feature_decoder`, `latent` and `teacher`, and `pixel_decoder` once that is trained
    params: Mapping[str, Any]
    sha256: str  # digest of everything that a latent depends on


def load(path: str) -> Codec:
    """Load a codec from a run, a step (both with the averaged weights) or a model folder."""
    saved = open_model(path)
    cfg, frozen = saved.config, saved.frozen
    if saved.task not in TASKS:
        raise ValueError(
            f"{path}: task={saved.task!r}, expected a latent codec (one of {', '.join(TASKS)})"
        )
    model = model_config(cfg)
    if saved.is_folder:
        shape = cfg["teacher_shape"]
        kind = dinov2.DinoConfig if shape["kind"] == "dinov2" else qwen_vision.VisionConfig
        tower = config.build(kind, shape["tower"], "teacher_shape.tower")
        teacher = Teacher(shape["kind"], tower, cfg["teacher"]["pixels"])
        declared = {**fae.declare(model), "teacher": teachers.declare(teacher)}
        if saved.task == "fae_features":
            del declared["pixel_decoder"]
        return from_params(cfg, model, teacher, saved.read_params(declared))
    if cfg["init"]["fae"]:
        start = load(cfg["init"]["fae"])
        if start.sha256 != frozen["fae"]:
            raise ValueError(
                f"{path}: the codec in {cfg['init']['fae']} is not the one that its training "
                f"started from: sha256 {start.sha256}, expected {frozen['fae']}"
            )
        trained = saved.read_params(_declare_training(saved.task, cfg, model, start.teacher))
        parts = {name: trained[name] for name in (*ENCODER, *DECODERS) if name in trained}
        return from_params(cfg, model, start.teacher, {**start.params, **parts})
    teacher = teacher_weights.teacher_config(cfg, model)
    trained = saved.read_params(_declare_training(saved.task, cfg, model, teacher))
    if "teacher" in trained:
        return from_params(cfg, model, teacher, trained)
    folder = cfg["teacher"]["path"]
    if folder and (digest := teacher_weights.identity(folder)) != frozen["teacher"]:
        raise ValueError(
            f"{path}: the tower in {folder} is not the one that it was trained with: sha256 "
            f"{digest}, expected {frozen['teacher']}"
        )
    return from_params(
        cfg, model, teacher, {**trained, "teacher": teacher_weights.load(cfg, teacher)}
    )


def _declare_training(task: str, cfg: Any, model: fae.FAEConfig, teacher: Teacher) -> Any:
    """Declare the subtrees in the checkpoints of a codec's training."""
    if task == "fae_features":
        return declare_features_training(model)
    if task == "fae_pixels":
        return declare_pixels_training(cfg, model)
    return declare_end_to_end_training(cfg, model, teacher)


def export(codec: Codec, path: str, *, overwrite: bool = False) -> None:
    """Write a model folder that includes the tower."""
    tower = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(codec.teacher.tower)
        if (value := getattr(codec.teacher.tower, field.name)) != field.default
    }
    shape = {"kind": codec.teacher.kind, "tower": tower}
    cfg = {**config.to_dict(codec.cfg), "teacher_shape": shape}
    model_folder.write_folder(path, codec.params, cfg, overwrite=overwrite)


def encode(codec: Codec, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and log-variance float32 [B, T, D] of the normalized latents of images.

    Images are uint8 [B, H, W, 3].
    """
    side = codec.model.pixels
    if image.shape[1:] != (side, side, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"codec: {image.dtype}{list(image.shape)}, expected uint8 [B, {side}, {side}, 3]"
        )
    encoder, parts = {name: codec.params[name] for name in ENCODER}, []
    # One device, so that a training on many devices runs the same program as `prepare latents`.
    with jax.set_mesh(mesh.make_mesh("data=1", jax.local_devices()[:1])):
        for first in range(0, len(image), BATCH):
            rows = image[first : first + BATCH]
            empty = np.zeros((BATCH - len(rows), *rows.shape[1:]), np.uint8)
            padded = np.concatenate([rows, empty])
            encoded = _encode(encoder, padded, model=codec.model, teacher=codec.teacher)
            parts.append([np.asarray(a)[: len(rows)] for a in encoded])
    mean, log_variance = (np.concatenate(a) for a in zip(*parts))
    return mean, log_variance


@partial(jax.jit, static_argnames=("model", "teacher"))
def _encode(params, image, *, model, teacher):
    x = teachers.features(params["teacher"], scale_pixels(image), teacher)
    return fae.encode(params, x, model)


def decode(codec: Codec, latents: np.ndarray) -> np.ndarray:
    """Return images uint8 [B, H, W, 3] of normalized latents [B, T, D]."""
    if "pixel_decoder" not in codec.params:
        raise ValueError(f"codec {codec.cfg['name']!r}: it has no pixel decoder (task=fae_pixels)")
    parts = []
    for first in range(0, len(latents), BATCH):
        rows = latents[first : first + BATCH]
        # Rows are repeated up to a power of two, so that few programs serve any number of images.
        padded = rows[np.arange(1 << (len(rows) - 1).bit_length()) % len(rows)]
        parts.append(np.asarray(_decode(codec.params, padded, model=codec.model))[: len(rows)])
    return np.concatenate(parts)


@partial(jax.jit, static_argnames="model")
def _decode(params, latents, *, model):
    x = fae.decode_features(params, latents, model)
    return to_pixels(fae.decode_pixels(params, x, model), "none")


def open_encoder(path: str) -> tuple[Callable, dict[str, Any]]:
    """Return the two arguments of `latents.write.write`: an encode function and its description.

    The description includes `path`, so that sample grids can decode latents from this encoder.
    """
    codec = load(path)
    return partial(encode, codec), {**describe(codec), "path": hub.pin(path)}


def describe(codec: Codec) -> dict[str, Any]:
    """Return a manifest's description of an encoder: `sha256`, `pixels` and `shape` [T, D]."""
    shape = [codec.model.tokens, codec.model.latent]
    return {"sha256": codec.sha256, "pixels": codec.model.pixels, "shape": shape}


def _digest_text(model: fae.FAEConfig, teacher: Teacher) -> str:
    """Return the sizes of a codec as they enter its sha256, which must never change.

    The class names are those of the first release, whatever the classes are called today. Fields
    that came later enter only where they differ from their default.
    """
    later = ("frequency_gain", "gain_frequencies")

    def fields(value: Any) -> str:
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return ", ".join(
            f"{field.name}={value!r}"
            for field, value in pairs
            if field.name not in later or value != field.default
        )

    tower_class = {"dinov2": "Config", "qwen": "VisionConfig"}[teacher.kind]
    tower = f"{tower_class}({fields(teacher.tower)})"
    return (
        f"Config({fields(model)}) "
        f"Teacher(kind={teacher.kind!r}, tower={tower}, pixels={teacher.pixels})\n"
    )


def from_params(cfg: Any, model: fae.FAEConfig, teacher: Teacher, params: Any) -> Codec:
    """Return the codec with the sha256 of everything that its latents depend on."""
    digest = hashlib.sha256(_digest_text(model, teacher).encode())
    for name, leaf in flatten({part: params[part] for part in ENCODER}).items():
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype}{list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return Codec(cfg, model, teacher, params, digest.hexdigest())
