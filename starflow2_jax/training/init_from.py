"""Start training from the parameters of another run or of a model folder."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.params import flatten
from starflow2_jax.training.program import Program, TrainState

# Subtrees of a codec's training that no model folder contains; they keep their initial values.
DISCRIMINATOR_SUBTREES = ("discriminator", "lecam")


def init_from_checkpoint(
    program: Program,
    state: TrainState,
    path: str,
    *,
    ema: bool = True,
    identity: Mapping[str, str] | None = None,
) -> TrainState:
    """Return the state with parameters, raw and averaged, from another run or model folder.

    Args:
        path: a workdir, a step in it, or a model folder. A codec's folder has the subtrees that the
            run trains, but no discriminator, which keeps its initial values.
        ema: whether to read a checkpoint's averaged parameters.
        identity: sha256 of every frozen model by name, including the codec that made the latents;
            by default those of the task. An earlier stage must have used the same models.
    """
    task, saved = program.task, open_model(path)

    def without_foreign(tree):
        return {name: subtree for name, subtree in tree.items() if name not in task.foreign}

    specs = without_foreign(program.abstract_state.params)
    if saved.is_folder and task.load_start:
        loaded = _fit(task.load_start(saved.path), specs, saved.path)
    else:
        loaded = saved.read_params(
            without_foreign(task.declared),
            program.mesh,
            program.cfg["layout"],
            dtype=np.float32,
            ema=ema,
            subtrees=tuple(specs),
        )
    if task.foreign:
        identity = task.frozen_identity() if identity is None else identity
        _check_frozen(path, saved.frozen, identity)
    params = {**state.params, **loaded}
    return state.replace(params=params, ema=jax.tree.map(lambda a: a.copy(), params))


def _check_frozen(path: str, stored: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise ValueError if an earlier stage used another VLM or another codec's latents."""
    for name, difference in (("vlm", "with another VLM"), ("fae", "on latents of another codec")):
        if stored.get(name) != current.get(name):
            raise ValueError(
                f"init.from={path!r} was trained {difference}: its sha256 is {stored.get(name)}, "
                f"that of this run is {current.get(name)}"
            )


def _fit(params: Mapping[str, Any], specs: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the subtrees of a codec that a run trains, placed like `specs`."""
    missing = [name for name in specs if name not in (*params, *DISCRIMINATOR_SUBTREES)]
    if missing:
        raise ValueError(f"{path}: the codec holds {', '.join(params)}, expected {missing[0]} too")
    specs = {name: tree for name, tree in specs.items() if name in params}
    loaded = flatten({name: params[name] for name in specs})
    for name, spec in flatten(specs).items():
        if name not in loaded or loaded[name].shape != spec.shape:
            actual = list(loaded[name].shape) if name in loaded else "missing"
            raise ValueError(f"{path}: {name} is {actual}, expected {list(spec.shape)}")

    def place(array, spec):
        return jax.device_put(np.asarray(array), spec.sharding)

    return jax.tree.map(place, {name: params[name] for name in specs}, specs)
