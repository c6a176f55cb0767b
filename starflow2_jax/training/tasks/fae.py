"""The tasks that train the latent codec: its features, then its pixels, or both end to end."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.convert import lpips, teacher as teacher_weights
from starflow2_jax.data.options import image_batch_options
from starflow2_jax.latents import codec as latent_codec
from starflow2_jax.latents.codec import Codec
from starflow2_jax.mesh import frozen_layout
from starflow2_jax.models.fae.config import model_config
from starflow2_jax.models.patches import to_pixels
from starflow2_jax.params import (
    Tree,
    draw as draw_params,
    flatten,
    shardings as param_shardings,
    split as split_params,
)
from starflow2_jax.training import optimizer
from starflow2_jax.training.losses import fae
from starflow2_jax.training.losses.fae import Objective
from starflow2_jax.training.preprocess import split_keys
from starflow2_jax.training.run_config import run_config
from starflow2_jax.training.tasks.task import Task, check_trainable


def make_features_task(cfg: Mapping[str, Any]) -> Task:
    """Return the task that trains encoder and feature decoder on the teacher's features."""
    model = model_config(cfg)
    teacher = teacher_weights.teacher_config(cfg, model)
    return _make_task(cfg, model, fae.features(cfg, model, teacher), teacher, None)


def make_pixels_task(cfg: Mapping[str, Any], codec: Codec | None = None) -> Task:
    """Return the task that trains the pixel decoder.

    Encoder, feature decoder and tower are the codec's. Without a codec, encoder and decoder are
    drawn from the seed, and the tower is that of the configuration group `teacher`.
    """
    model = model_config(cfg)
    teacher = codec.teacher if codec else teacher_weights.teacher_config(cfg, model)
    objective = fae.pixels(cfg, model, teacher)
    if codec:
        _check_codec(objective.declared, codec)
    return _make_task(cfg, model, objective, teacher, codec)


def make_end_to_end_task(cfg: Mapping[str, Any], codec: Codec | None = None) -> Task:
    """Return the task that trains encoder and decoders together on pixels through latent noise.

    Training starts from the codec or, without one, from the seed. The tower is trained as well if
    `train.trainable` names `teacher`.
    """
    model = model_config(cfg)
    teacher = codec.teacher if codec else teacher_weights.teacher_config(cfg, model)
    objective = fae.end_to_end(cfg, model, teacher)
    loaded: tuple[str, ...] = ()
    if codec:
        _check_codec(objective.declared, codec)
        state_subtrees = objective.trained + objective.tracked
        loaded = tuple(name for name in state_subtrees if name in codec.params)
    return _make_task(cfg, model, objective, teacher, codec, loaded)


def _make_task(
    cfg: Mapping[str, Any],
    model: Any,
    objective: Objective,
    teacher: Any,
    codec: Codec | None,
    loaded: tuple[str, ...] = (),
) -> Task:
    settings = run_config(cfg)
    rows = settings.train.batch_size
    state_subtrees = objective.trained + objective.tracked
    check_trainable(cfg, state_subtrees)
    frozen_specs = split_params(objective.declared, state_subtrees)[1]

    def loss(params, batch, keys, context):
        image_keys, loss_keys = split_keys(keys, 2)
        tracked = {name: context.state.params[name] for name in objective.tracked}
        params = {**params, **tracked}
        inputs = objective.prepare({**context.frozen, **params}, batch, image_keys, True)
        inputs = jax.lax.stop_gradient(inputs)
        row_losses, sums = objective.loss(
            {**context.frozen, **params}, inputs, loss_keys, context.state.step
        )
        observed = {"ema": objective.observe({**context.frozen, **context.state.ema}, inputs)}
        observed["params"] = observed["ema"]
        if objective.uses_statistics:
            observed["params"] = objective.observe(jax.lax.stop_gradient(params), inputs)
        return row_losses.sum() / rows, sums, observed

    def evaluate(params, batch, keys):
        image_keys, loss_keys = split_keys(keys, 2)
        inputs = objective.prepare(params, batch, image_keys, False)
        return objective.loss(params, inputs, loss_keys, None)[1]

    def reconstruct(params, batch, keys):
        inputs = objective.prepare(params, batch, keys, False)
        return to_pixels(objective.reconstruct(params, inputs), "none")

    tx = optimizer.optimizer(settings.optim, settings.train.steps)
    return Task(
        model_config=model,
        declared=objective.declared,
        trainable=objective.trained,
        carried=objective.tracked,
        optimizer=optimizer.per_group(tx, objective.groups, objective.first_steps),
        load_params=partial(
            _load_subtrees,
            cfg,
            {**frozen_specs, **{name: objective.declared[name] for name in loaded}},
            teacher,
            codec,
        ),
        loaded=loaded,
        frozen_identity=partial(_frozen_identity, cfg, "lpips" in frozen_specs, codec),
        load_start=lambda path: latent_codec.load(path).params,
        abstract_batch={
            "image": jax.ShapeDtypeStruct((rows, model.pixels, model.pixels, 3), jnp.uint8)
        },
        loss=loss,
        evaluate=evaluate,
        finalize_metrics=objective.finalize_metrics,
        track=objective.track,
        reconstruct=reconstruct if objective.reconstruct else None,
        sample_kind="reconstruction" if objective.reconstruct else "",
        data_options=partial(image_batch_options, cfg, model),
        step_cost=lambda: {"tokens": rows * model.tokens, "flops": 0},
    )


def _load_subtrees(
    cfg: Mapping[str, Any], specs: Tree, teacher: Any, codec: Codec | None, device_mesh: Any
) -> dict[str, Tree]:
    """Load subtrees from the codec and from files, and draw the others."""
    layout = frozen_layout(cfg)
    shardings = param_shardings(specs, device_mesh, layout)
    stored = codec.params if codec else {}
    loaded = {}
    for name, tree in specs.items():
        if name in stored:
            loaded[name] = jax.device_put(stored[name], shardings[name])
        elif name == "teacher":
            loaded[name] = teacher_weights.load(cfg, teacher, device_mesh, layout)
        elif name == "lpips":
            source = model_folder.locate(cfg["fae"]["lpips"])
            loaded[name] = jax.device_put(lpips.load(source)[1], shardings[name])
        else:
            loaded |= draw_params(cfg["seed"], {name: tree}, device_mesh, layout)
    return loaded


def _frozen_identity(
    cfg: Mapping[str, Any], uses_lpips: bool, codec: Codec | None
) -> dict[str, str]:
    """Return the sha256 of every frozen model that is read from files, by name."""
    digests = {"fae": codec.sha256} if codec else {}
    if not codec and cfg["teacher"]["path"]:
        digests["teacher"] = teacher_weights.identity(cfg["teacher"]["path"])
    if uses_lpips:
        digests["lpips"] = teacher_weights.identity(cfg["fae"]["lpips"])
    return digests


def _check_codec(declared: Mapping[str, Any], codec: Codec) -> None:
    """Raise ValueError if a codec's parameters are not those that the experiment declares."""
    stored = flatten(codec.params)
    for name, spec in flatten(declared).items():
        if name in stored and tuple(stored[name].shape) != spec.shape:
            raise ValueError(
                f"config: model and init.fae differ: {name} is {list(stored[name].shape)} in "
                f"{codec.cfg['name']!r}, expected {list(spec.shape)}"
            )
