"""The tasks by name: the only module that reads the configuration key `task`."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from starflow2_jax.latents import codec as latent_codec
from starflow2_jax.models.fae import codec
from starflow2_jax.models.fae.config import model_config
from starflow2_jax.params import Tree
from starflow2_jax.training.program import Program, build_program
from starflow2_jax.training.tasks import fae, flow, starflow2, vlm
from starflow2_jax.training.tasks.task import Task


def make_task(cfg: Mapping[str, Any], *, null_text: Any = None, dry_run: bool = False) -> Task:
    """Return the task of an experiment.

    Args:
        null_text: features [n, E] of the empty prompt, for a flow that reads text features.
        dry_run: parameters will not be loaded, so folders that hold only parameters may be absent.
    """
    if kind(cfg) == "fae_features":
        return fae.make_features_task(cfg)
    if kind(cfg) == "fae_pixels":
        path = cfg["init"]["fae"]
        if not path and not dry_run:
            raise ValueError("config: init.fae is needed if task='fae_pixels'")
        return fae.make_pixels_task(cfg, latent_codec.load(path) if path else None)
    if kind(cfg) == "fae_end_to_end":
        path = cfg["init"]["fae"]
        return fae.make_end_to_end_task(cfg, latent_codec.load(path) if path else None)
    if kind(cfg) == "vlm":
        return vlm.make_task(cfg)
    if kind(cfg) == "starflow2":
        return starflow2.make_task(cfg)
    return flow.make_task(cfg, null_text=null_text)


def build(cfg: Mapping[str, Any], device_mesh: Mesh, **options: Any) -> Program:
    """Build the program of an experiment; `options` are those of `make_task`."""
    return build_program(cfg, device_mesh, make_task(cfg, **options))


def kind(cfg: Mapping[str, Any]) -> str:
    """Return the kind of training; a configuration without the key `task` trains a flow."""
    return cfg.get("task", "flow")


def declare_model(cfg: Mapping[str, Any]) -> Tree:
    """Declare the model of an experiment, without the parts that only its training needs."""
    if kind(cfg) in latent_codec.TASKS:
        return codec.declare(model_config(cfg))
    if kind(cfg) == "vlm":
        return vlm.declare(vlm.model_config(cfg))
    if kind(cfg) == "starflow2":
        return starflow2.model_config(cfg).declare()
    return flow.declare(cfg, flow.model_config(cfg))
