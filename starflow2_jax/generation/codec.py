"""A trained latent codec with its tower, ready to encode images and to decode latents.

`load(path)` takes the workdir of a codec's training, a step in it, or a model folder. Axes: B
images, H x W pixels, T patches in raster order, D latent channels.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from starflow2_jax import config
from starflow2_jax import params as weights
from starflow2_jax.models import dinov2, fae, qwen_vision
from starflow2_jax.models import teacher as teachers
from starflow2_jax.models.teacher import Teacher
from starflow2_jax.training import checkpoint, fae_step, inputs, step_folders
from starflow2_jax.weights import files
from starflow2_jax.weights import teacher as teacher_weights

# Every image is encoded in a batch of this size, so that offline and online latents are equal.
BATCH = 8
ENCODER = ("encoder", "latent", "teacher")


@dataclass(frozen=True)
class Codec:
    """An experiment's configuration, the codec's and the tower's shapes, and their weights.

    Attributes:
        params: `encoder`, `feature_decoder`, `latent` and `teacher`.
        sha256: of all that a latent depends on.
    """

    cfg: Mapping[str, Any]
    model: fae.Config
    teacher: Teacher
    params: Mapping[str, Any]
    sha256: str


def load(path: str) -> Codec:
    """A codec; of a checkpoint the averaged weights.

    Raises:
        FileNotFoundError: nothing of the kind is there. ValueError: it is damaged, another kind of
            model, or its tower's files have changed since.
    """
    if files.is_folder(path):
        cfg = files.read_config(path)
        _check_task(cfg, path)
        model = fae_step.model_config(cfg)
        shape = cfg["teacher_shape"]
        kind = dinov2.Config if shape["kind"] == "dinov2" else qwen_vision.VisionConfig
        tower = config.build(kind, shape["tower"], "teacher_shape.tower")
        teacher = Teacher(shape["kind"], tower, cfg["teacher"]["pixels"])
        return _made(cfg, model, teacher, files.read_folder(path, _declare(model, teacher)))
    workdir, step = step_folders.locate(path)
    meta = checkpoint.read_meta(workdir, step)
    cfg = meta["config"]
    _check_task(cfg, path)
    model = fae_step.model_config(cfg)
    teacher = fae_step.teacher_of(cfg, model)
    folder = cfg["teacher"]["path"]
    if folder and teacher_weights.identity(folder) != meta["frozen"]["teacher"]:
        raise ValueError(f"{path}: the tower in {folder} is not the one it was trained on")
    own = {n: w for n, w in _declare(model, teacher).items() if n != "teacher"}
    wanted = {"ema": weights.abstract(own)}
    params = checkpoint.restore(workdir, step, wanted, only=("ema",))[0]["ema"]
    return _made(
        cfg, model, teacher, {**params, "teacher": teacher_weights.load(cfg, teacher, None)}
    )


def export(codec: Codec, path: str, *, overwrite: bool = False) -> None:
    """Writes a model folder that holds the tower as well.

    Raises:
        FileExistsError, OSError: as `files.write_folder`.
    """
    tower = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(codec.teacher.tower)
        if (value := getattr(codec.teacher.tower, field.name)) != field.default
    }
    shape = {"kind": codec.teacher.kind, "tower": tower}
    cfg = {**config.to_dict(codec.cfg), "teacher_shape": shape}
    files.write_folder(path, codec.params, cfg, overwrite=overwrite)


def encode(codec: Codec, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log-variance float32 [B, T, D] of the normalised latents of uint8 [B, H, W, 3].

    Raises:
        ValueError: images of another size or dtype.
    """
    side = codec.model.pixels
    if image.shape[1:] != (side, side, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"codec: {image.dtype}{list(image.shape)}, expected uint8 [B, {side}, {side}, 3]"
        )
    parts = []
    for first in range(0, len(image), BATCH):
        rows = image[first : first + BATCH]
        filled = np.concatenate([rows, np.zeros((BATCH - len(rows), *rows.shape[1:]), np.uint8)])
        own = {name: codec.params[name] for name in ENCODER}
        both = _encode(own, filled, model=codec.model, teacher=codec.teacher)
        parts.append([np.asarray(a)[: len(rows)] for a in both])
    mean, log_variance = (np.concatenate(a) for a in zip(*parts))
    return mean, log_variance


@partial(jax.jit, static_argnames=("model", "teacher"))
def _encode(params, image, *, model, teacher):
    x = teachers.features(params["teacher"], inputs.scale_pixels(image), teacher)
    return fae.encode(params, x, model)


def open_encoder(path: str) -> tuple[Callable, dict[str, Any]]:
    """What `data.latents` needs: images -> latents, and what a manifest says of the encoder."""
    codec = load(path)
    return partial(encode, codec), {"sha256": codec.sha256, "pixels": codec.model.pixels}


def _declare(model: fae.Config, teacher: Teacher) -> dict[str, Any]:
    tree = {**fae.declare(model), "teacher": teachers.declare(teacher)}
    del tree["pixel_decoder"]
    return tree


def _check_task(cfg: Mapping[str, Any], path: str) -> None:
    if cfg.get("task") != "fae_features":
        raise ValueError(
            f"{path}: task={cfg.get('task')!r}, expected a training with task='fae_features'"
        )


def _made(cfg: Any, model: fae.Config, teacher: Teacher, params: Any) -> Codec:
    digest = hashlib.sha256(f"{model} {teacher}\n".encode())
    for name, leaf in weights.flatten({part: params[part] for part in ENCODER}).items():
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype}{list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return Codec(cfg, model, teacher, params, digest.hexdigest())
