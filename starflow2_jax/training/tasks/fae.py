"""The training program of the latent codec's modules, with the interface of `training/program.py`.

The frozen teacher is an argument of the step: it has no gradient and no optimizer state.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from starflow2_jax.checkpoints.convert import lpips, teacher as teacher_weights
from starflow2_jax.mesh import batch_sharding, check_batch, replicated
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.config import model_config
from starflow2_jax.models.fae.teacher import Teacher
from starflow2_jax.models.patches import to_pixels
from starflow2_jax.params import (
    abstract as abstract_params,
    flatten,
    init as init_params,
    shardings as param_shardings,
    split as split_params,
)
from starflow2_jax.training import optimizer, preprocess
from starflow2_jax.training.losses import fae
from starflow2_jax.training.program import Program, TrainState, accumulate


def objective_of(cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher) -> fae.Objective:
    """What an experiment's `task` minimises."""
    kind = fae.features if cfg["task"] == "fae_features" else fae.pixels
    return kind(cfg, model, teacher)


def build(cfg: Mapping[str, Any], mesh: Mesh, codec: Any = None) -> Program:
    """Build the program of an experiment with a `task` of the codec.

    Its `init` reads the frozen weights from their folders, and draws those that have none.

    Args:
        codec: a `latents.codec.Codec`, whose encoder, feature decoder and tower the pixel
            decoder's training takes; where None they are drawn, and the tower is `teacher`'s.

    Raises:
        ValueError: a batch that the mesh does not divide, a layout that does not fit a weight, a
            wrong train.trainable, or a teacher or codec that does not fit the model.
    """
    model = model_config(cfg)
    teacher = codec.teacher if codec else teacher_weights.teacher_config(cfg, model)
    own = objective_of(cfg, model, teacher)
    train, rows, parts = cfg["train"], cfg["train"]["batch_size"], cfg["train"]["microbatches"]
    check_batch(rows, mesh)
    check_batch(rows // parts, mesh, "rows of a microbatch")
    if codec:
        _check_codec(own.declared, codec)
    if sorted(train["trainable"]) != sorted(own.trained + own.tracked):
        raise ValueError(
            f"config: train.trainable={list(train['trainable'])}, but task={cfg['task']!r} trains "
            f"{list(own.trained + own.tracked)}"
        )
    trained, frozen = split_params(own.declared, own.trained + own.tracked)
    everywhere, where_batch = replicated(mesh), batch_sharding(mesh)
    where = param_shardings(trained, mesh, cfg["layout"])
    where_frozen = param_shardings(frozen, mesh, cfg["layout"])
    tx = optimizer.optimizer(cfg["optim"], train["steps"])
    pick = lambda tree, names: {name: tree[name] for name in names}
    moments = {
        group: optimizer.state_shardings(
            tx, abstract_params(pick(trained, names)), pick(where, names), mesh
        )
        for group, names in own.groups.items()
    }
    where_state = TrainState(everywhere, where, where, moments)

    def first(key):
        params = init_params(key, trained)
        # A copy: the step donates both.
        ema = jax.tree.map(jnp.copy, params)
        opt_state = {group: tx.init(pick(params, names)) for group, names in own.groups.items()}
        return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state)

    begin = jax.jit(first, out_shardings=where_state)

    def init(key):
        given = codec.params if codec else {}
        found = {}
        for name in frozen:
            if name in given:
                found[name] = jax.device_put(given[name], where_frozen[name])
            elif name == "teacher":
                found[name] = teacher_weights.load(cfg, teacher, mesh, cfg["layout"])
            elif name == "lpips":
                tree = lpips.load(cfg["fae"]["lpips"])[1]
                found[name] = jax.device_put(tree, where_frozen[name])
            else:
                part = {name: frozen[name]}
                draw = jax.jit(
                    partial(init_params, tree=part), out_shardings=pick(where_frozen, part)
                )
                found |= draw(key)
        return begin(key), found

    def draws(step, ids):
        """Keys of each row [B, 2]: of its image, and of the loss."""
        keys = preprocess.row_keys(cfg["seed"], step, ids)
        return jax.vmap(lambda key: jax.random.split(key, 2))(keys)

    def step(state, frozen, batch):
        tracked = pick(state.params, own.tracked)

        def mean(params, batch, keys):
            given = own.prepare(frozen, batch, keys[:, 0], True)
            given = jax.lax.stop_gradient(given)
            full = {**params, **tracked}
            each, sums = own.loss({**frozen, **full}, frozen, given, keys[:, 1], state.step)
            mean = each.sum() / rows
            seen = {
                "params": own.observe(jax.lax.stop_gradient(full), given),
                "ema": own.observe(state.ema, given),
            }
            return mean, ({"loss": mean, **jax.tree.map(jnp.sum, sums)}, seen)

        params = pick(state.params, own.trained)
        now = (batch, draws(state.step, jnp.arange(rows)))
        grads, (metrics, seen) = accumulate(mean, params, now, rows, parts)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        fresh, opt_state = {}, {}
        for group, names in own.groups.items():
            old = pick(params, names)
            updates, after = tx.update(pick(grads, names), state.opt_state[group], old)
            now = (optax.apply_updates(old, updates), after)
            if own.begins.get(group):
                # Its warm-up, too, begins only then.
                on = state.step >= own.begins[group]
                keep = lambda a, b: jnp.where(on, a, b)  # noqa: B023
                now = jax.tree.map(keep, now, (old, state.opt_state[group]))
            fresh |= now[0]
            opt_state[group] = now[1]
        ema = optimizer.update_ema(pick(state.ema, own.trained), fresh, train["ema"], state.step)
        fresh |= own.track(tracked, seen["params"], metrics, state.step)
        ema |= own.track(pick(state.ema, own.tracked), seen["ema"], metrics, state.step)
        # A step that is not finite changes nothing but the counter, so the run stops in good state.
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        lr = optimizer.schedule(cfg["optim"], train["steps"])(state.step)
        state = TrainState(
            state.step + 1,
            keep(fresh, state.params),
            keep(ema, state.ema),
            keep(opt_state, state.opt_state),
        )
        return state, {**metrics, "grad_norm": norm, "finite": finite, "lr": lr}

    def evaluate(params, frozen, batch, row_ids, mask):
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(
            preprocess.row_keys(cfg["seed"] + 1, 0, row_ids)
        )
        given = own.prepare(frozen, batch, keys[:, 0], False)
        sums = own.loss({**frozen, **params}, frozen, given, keys[:, 1], None)[1]
        return jax.tree.map(lambda each: (mask * each).sum(), sums)

    def show(params, frozen, batch):
        keys = preprocess.row_keys(cfg["seed"], 0, jnp.arange(len(batch["image"])))
        given = own.prepare(frozen, batch, keys, False)
        shown = own.show({**frozen, **params}, frozen, given)
        return to_pixels(shown, "none")

    pixels = (rows, model.pixels, model.pixels, 3)
    batch = {"image": jax.ShapeDtypeStruct(pixels, jnp.uint8, sharding=where_batch)}
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    shapes = jax.eval_shape(first, jax.random.key(0))
    pinned = {"in_shardings": (where_state, where_frozen, where_batch), "donate_argnums": 0}
    return Program(
        cfg=cfg,
        mesh=mesh,
        model=model,
        declared=own.declared,
        init=init,
        step=jax.jit(step, out_shardings=(where_state, everywhere), **pinned),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        abstract_state=jax.tree.map(place, shapes, where_state),
        abstract_frozen=abstract_params(frozen, mesh, cfg["layout"]),
        abstract_batch=batch,
        identity=_identity(cfg, codec),
        means=own.means,
        show=jax.jit(show, out_shardings=everywhere) if own.show else None,
    )


def _identity(cfg: Mapping[str, Any], codec: Any) -> dict[str, str]:
    """sha256 of what is frozen and read, by name."""
    found = {"fae": codec.sha256} if codec else {}
    if not codec and cfg["teacher"]["path"]:
        found["teacher"] = teacher_weights.identity(cfg["teacher"]["path"])
    if cfg["task"] == "fae_pixels" and cfg["fae"]["lpips"]:
        found["lpips"] = teacher_weights.identity(cfg["fae"]["lpips"])
    return found


def _check_codec(declared: Mapping[str, Any], codec: Any) -> None:
    """ValueError where a codec's weights are not those that the experiment's model declares."""
    given = flatten(codec.params)
    for name, weight in flatten(declared).items():
        if name in given and tuple(given[name].shape) != weight.shape:
            raise ValueError(
                f"config: model and init.fae differ: {name} is {list(given[name].shape)} in "
                f"{codec.cfg['name']!r}, expected {list(weight.shape)}"
            )
