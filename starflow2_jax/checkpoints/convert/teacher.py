"""Read the frozen tower of an experiment: its configuration, its weights and their digest."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from starflow2_jax import config, params
from starflow2_jax.checkpoints.convert import dinov2, qwen, qwen_options
from starflow2_jax.checkpoints.digest import sha256_file
from starflow2_jax.checkpoints.model_folder import (
    CONFIG_FILE,
    check,
    locate,
    read_config,
)
from starflow2_jax.models.fae import teacher as teachers
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.teacher import Teacher


def teacher_config(cfg: Mapping[str, Any], model: FAEConfig) -> Teacher:
    """Return the tower of an experiment's `teacher` group, checked against the codec `model`."""
    group = cfg["teacher"]
    kind, path = group["kind"], group["path"]
    if not path:
        tower = teachers.RANDOM_INIT_TOWERS[kind]
        if group.get("tower"):
            tower = config.build(type(tower), group["tower"], "teacher.tower")
    elif kind == "dinov2":
        tower = dinov2.read_options(read_config(locate(path)))
    else:
        source = str(locate(path) / CONFIG_FILE)
        tower = qwen_options.read_options(read_config(locate(path)), source).vision
        assert tower is not None, "read_options requires vision_config"
    teacher = Teacher(kind, tower, group["pixels"])
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
    """Return the tower's weights in float32: from `teacher.path`, or else drawn from the seed."""
    path, tree = cfg["teacher"]["path"], teachers.declare(teacher)
    if not path:
        return params.draw(cfg["seed"], tree, mesh, layout)
    path = locate(path)
    if teacher.kind == "dinov2":
        return dinov2.load(path, mesh, layout, jnp.float32)[1]
    return qwen.load(path, mesh, layout, jnp.float32, only="vision")[1]["vision"]


def identity(path: str) -> str:
    """Return the sha256 of a file, or of config.json and the safetensors in a folder.

    Raises:
        ValueError, FileNotFoundError: Files of a folder differ from its own list of digests.
    """
    digest = hashlib.sha256()
    root = locate(path)
    if root.is_dir():
        check(root)  # names what is damaged, where the sha256 would say that something differs
    for file in sorted(root.iterdir()) if root.is_dir() else [root]:
        if file.name == CONFIG_FILE or file.suffix == ".safetensors":
            inner = sha256_file(file)
            digest.update(f"{file.name} {inner}\n".encode())
    return digest.hexdigest()
