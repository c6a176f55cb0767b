"""Optimizers from optax (AdamW or Muon; warm-up, cosine decay, clipping), and weight averaging."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import Mesh

from starflow2_jax.mesh import replicated
from starflow2_jax.params import Tree, flatten, unflatten
from starflow2_jax.training.run_config import OptimConfig

# Root mean square of a Muon update at a learning rate of 1, about that of an AdamW update.
_MUON_RMS = 0.2


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear to `optim.lr`, then a cosine to `optim.final_lr`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=cfg.lr / (cfg.warmup + 1),
        peak_value=cfg.lr,
        warmup_steps=cfg.warmup,
        decay_steps=max(steps, cfg.warmup + 1),
        end_value=min(cfg.final_lr, cfg.lr),
    )


def optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Return the gradient transformation of an experiment.

    With `muon_lr` the stacked matrices of the layers [L, in, out] are trained by Muon (Jordan et
    al. 2024, as in optax), whose updates are orthogonal, and all other weights by AdamW.
    """
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
    learning_rate = schedule(cfg, steps)
    if not cfg.muon_lr:
        adamw = optax.adamw(learning_rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay)
        return optax.chain(clip, adamw)
    muon = optax.contrib.muon(
        schedule(dataclasses.replace(cfg, lr=cfg.muon_lr), steps),
        beta=cfg.b1,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_weight_decay=cfg.weight_decay,
        adam_learning_rate=learning_rate,
        muon_weight_dimension_numbers=_stacked_matrices,
        consistent_rms=_MUON_RMS,
    )
    return optax.chain(clip, muon)


def _stacked_matrices(params: Tree) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda weight: axes if weight.ndim == 3 else None, params)


def per_group(
    tx: optax.GradientTransformation,
    groups: Mapping[str, tuple[str, ...]],
    first_steps: Mapping[str, int],
) -> optax.GradientTransformationExtraArgs:
    """Give every group of subtrees an optimizer of its own, with its own clipping and state.

    The training of a group, with its warm-up, begins at its step in `first_steps`, 0 by default.
    """

    def init(params):
        return {
            group: tx.init({name: params[name] for name in names})
            for group, names in groups.items()
        }

    def update(grads, state, params=None, *, step, **_):
        updates, new_state = {}, {}
        for group, names in groups.items():
            group_grads = {name: grads[name] for name in names}
            group_params = {name: params[name] for name in names}
            result = tx.update(group_grads, state[group], group_params)
            if first_steps.get(group):
                started = step >= first_steps[group]
                unchanged = (jax.tree.map(jnp.zeros_like, result[0]), state[group])
                result = jax.tree.map(partial(jnp.where, started), result, unchanged)
            updates |= result[0]
            new_state[group] = result[1]
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def without_updates(
    tx: optax.GradientTransformation, prefix: str
) -> optax.GradientTransformationExtraArgs:
    """Leave the parameters whose names start with `prefix` as they are, weight decay included."""

    def update(grads, state, params=None, **_):
        updates, state = tx.update(grads, state, params)
        flat = {
            name: jnp.zeros_like(a) if name.startswith(prefix) else a
            for name, a in flatten(updates).items()
        }
        return unflatten(flat), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def state_shardings(
    optimizer: optax.GradientTransformation, params: Tree, shardings: Tree, device_mesh: Mesh
) -> Any:
    """Return the shardings of the optimizer's state: moments are sharded like their weights."""
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    shardings = flatten(shardings)

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        # The names of the optimizer's parts precede that of the weight.
        for first in range(len(names)):
            name = "/".join(names[first:])
            if shapes.get(name) == leaf.shape:
                return shardings[name]
        return replicated(device_mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def update_ema(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Any:
    """Return ema + (1 - d)(params - ema), with d = min(decay, (1 + step) / (10 + step))."""
    step = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p - e), ema, params)
