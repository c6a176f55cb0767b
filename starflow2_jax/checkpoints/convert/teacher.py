"""The frozen tower of an experiment: its shape, its weights, and what they were read from."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.checkpoints.convert import dinov2, qwen, qwen_options
from starflow2_jax.checkpoints.model_folder import CONFIG_FILE, locate, read_config
from starflow2_jax.models.fae import teacher as teachers
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.teacher import Teacher


def describe(cfg: Mapping[str, Any]) -> Teacher:
    """The tower of an experiment's `teacher` group; no weight is read.

    Raises:
        FileNotFoundError: no such folder. ValueError: another architecture, a model without a
            tower, or images that the tower cannot cut.
    """
    group = cfg["teacher"]
    kind, path = group["kind"], group["path"]
    if not path:
        return Teacher(kind, teachers.RANDOM_INIT_TOWERS[kind], group["pixels"])
    folder = locate(path)
    if kind == "dinov2":
        tower = dinov2.read_options(read_config(folder))
    else:
        tower = qwen_options.read_options(read_config(folder), str(folder / CONFIG_FILE)).vision
    return Teacher(kind, tower, group["pixels"])


def teacher_of(cfg: Mapping[str, Any], model: FAEConfig) -> Teacher:
    """Return the tower of an experiment, whose features the codec encodes.

    Raises:
        FileNotFoundError, ValueError: See `describe`; or the tower's features have another grid or
            width than the model's.
    """
    teacher = describe(cfg)
    for name, actual, expected in (
        ("side", teacher.side, model.side),
        ("feature_width", teacher.width, model.feature_width),
    ):
        if actual != expected:
            raise ValueError(
                f"config: model.{name}={expected}, but the teacher ({teacher.kind}, "
                f"teacher.pixels={teacher.pixels}) gives {actual}"
            )
    return teacher


def load(
    cfg: Mapping[str, Any], teacher: Teacher, mesh: Mesh | None = None, layout: str = "dp"
) -> dict[str, Any]:
    """Its weights in float32, read from `teacher.path`, or else drawn from the experiment's seed.

    Raises:
        FileNotFoundError, ValueError: as `dinov2.load` and `qwen.load` of this folder.
    """
    path, tree = cfg["teacher"]["path"], teachers.declare(teacher)
    if not path:
        where = None if mesh is None else params.shardings(tree, mesh, layout)
        draw = jax.jit(partial(params.init, tree=tree), out_shardings=where)
        return draw(jax.random.key(cfg["seed"]))
    path = locate(path)
    if teacher.kind == "dinov2":
        return dinov2.load(path, mesh, layout, jnp.float32)[1]
    return qwen.load(path, mesh, layout, jnp.float32, only="vision")[1]["vision"]


def identity(path: str) -> str:
    """sha256 over names and contents of the files of a folder that make a model, or of one file."""
    digest = hashlib.sha256()
    path = locate(path)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.name == CONFIG_FILE or file.suffix == ".safetensors":
            with file.open("rb") as stream:
                inner = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name} {inner}\n".encode())
    return digest.hexdigest()
