"""AdamW or Muon with warm-up, cosine decay and clipping, all by optax; the averaged weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import Mesh

from starflow2_jax.mesh import replicated
from starflow2_jax.params import Tree, flatten

# Root mean square of an update of Muon at a rate of 1: about that of AdamW's.
_MUON_RMS = 0.2


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
    """The gradient transformation of an experiment's `optim` group.

    With `muon_lr` the stacked matrices of the layers [L, in, out] are trained by Muon (Jordan et
    al. 2024, as in optax), whose updates are orthogonal, and all other weights by AdamW.
    """
    clip = optax.clip_by_global_norm(cfg["clip"]) if cfg["clip"] else optax.identity()
    given = (schedule(cfg, steps), cfg["b1"], cfg["b2"], cfg["eps"])
    if not cfg["muon_lr"]:
        return optax.chain(clip, optax.adamw(*given, weight_decay=cfg["weight_decay"]))
    muon = optax.contrib.muon(
        schedule({**cfg, "lr": cfg["muon_lr"]}, steps),
        beta=cfg["b1"],
        eps=cfg["eps"],
        weight_decay=cfg["weight_decay"],
        adam_b1=cfg["b1"],
        adam_b2=cfg["b2"],
        adam_weight_decay=cfg["weight_decay"],
        adam_learning_rate=given[0],
        muon_weight_dimension_numbers=_stacked_matrices,
        consistent_rms=_MUON_RMS,
    )
    return optax.chain(clip, muon)


def _stacked_matrices(params: Tree) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda weight: axes if weight.ndim == 3 else None, params)


def state_shardings(
    optimizer: optax.GradientTransformation, params: Tree, shardings: Tree, mesh: Mesh
) -> Any:
    """Shardings of the optimizer's state: moments live where their weights do.

    Args:
        params: arrays or ShapeDtypeStructs; shardings: those of the same tree.
    """
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    where = flatten(shardings)

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        # Before a weight's own name stand those of the optimizer's parts.
        for first in range(len(names)):
            name = "/".join(names[first:])
            if shapes.get(name) == leaf.shape:
                return where[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def update_ema(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Any:
    """ema + (1 - d)(params - ema), with d = min(decay, (1 + step) / (10 + step)) early on."""
    step = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p - e), ema, params)
