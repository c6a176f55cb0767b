"""AdamW with warm-up, cosine decay and clipping, all by optax; the averaged weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from starflow2_jax.mesh import replicated
from starflow2_jax.params import Tree


def schedule(cfg: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Learning rate by step: linear up to `optim.lr`, then a cosine to `optim.final_lr`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=cfg["lr"] / (cfg["warmup"] + 1),
        peak_value=cfg["lr"],
        warmup_steps=cfg["warmup"],
        decay_steps=max(steps, cfg["warmup"] + 1),
        end_value=min(cfg["final_lr"], cfg["lr"]),
    )


def optimizer(cfg: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """The gradient transformation of an experiment's `optim` group."""
    clip = optax.clip_by_global_norm(cfg["clip"]) if cfg["clip"] else optax.identity()
    adamw = optax.adamw(
        schedule(cfg, steps), cfg["b1"], cfg["b2"], cfg["eps"], weight_decay=cfg["weight_decay"]
    )
    return optax.chain(clip, adamw)


def state_shardings(
    optimizer: optax.GradientTransformation, params: Tree, shardings: Tree, mesh: Mesh
) -> Any:
    """Shardings of the optimizer's state: moments live where their weights do.

    Args:
        params: arrays or ShapeDtypeStructs; shardings: those of the same tree.
    """
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def update_ema(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Any:
    """ema + (1 - d)(params - ema), with d = min(decay, (1 + step) / (10 + step)) early on."""
    step = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p - e), ema, params)
