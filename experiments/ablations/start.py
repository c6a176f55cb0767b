"""The weights that a run of the table starts from: those of an earlier stage, as far as they fit.

Skips are zero and unused before stage 3, and the adapter is unused before stage 2, so a row with
other skips or another adapter can start from the same weights as all others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.open_model import SavedModel, open_model
from starflow2_jax.params import Tree, flatten, init as init_params, unflatten
from starflow2_jax.training.tasks import starflow2

# Subtrees that may have other shapes than in the earlier stage, and then start as they always do.
REPLACEABLE = ("skip", "adapter")


def write(cfg: Mapping[str, Any], source: str, folder: str, fresh: Sequence[str] = ()) -> str:
    """Return a path for `init.from` of a run: `source`, or `folder`, which is written if need be.

    Args:
        cfg: the configuration of the run.
        source: workdir of the earlier stage.
        fresh: subtrees that start as they always do, whatever the earlier stage holds.

    Raises:
        ValueError: A subtree other than those of `REPLACEABLE` has other shapes.
        FileNotFoundError, FileExistsError: `source` is missing, or `folder` holds something else.
    """
    saved = open_model(source)
    declared, stored = _declared(cfg), _declared(saved.config)
    if not fresh and _shapes(declared) == _shapes(stored):
        return source
    params = _combined(cfg, declared, _read(saved, stored), fresh, source)
    stored_cfg = {**saved.config, "model": cfg["model"], "frozen": saved.frozen, "parts": []}
    model_folder.write_folder(folder, params, stored_cfg)
    return folder


def _declared(cfg: Mapping[str, Any]) -> dict[str, Any]:
    declared = starflow2.model_config(cfg).declare()
    return {name: tree for name, tree in declared.items() if name != "vlm"}


def _shapes(declared: Tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(spec.shape) for name, spec in flatten(declared).items()}


def _read(saved: SavedModel, declared: Tree) -> dict[str, Any]:
    """Return the averaged weights of a run, by their flat names."""
    return flatten(saved.read_params(declared, dtype=np.float32))


def _combined(
    cfg: Mapping[str, Any],
    declared: Tree,
    stored: Mapping[str, Any],
    fresh: Sequence[str],
    source: str,
) -> dict[str, Any]:
    """Return initial parameters, with stored arrays in place of those of equal name and shape."""
    params = flatten(init_params(jax.random.key(cfg["seed"]), declared))
    for name, array in params.items():
        subtree, loaded = name.split("/")[0], stored.get(name)
        if subtree not in fresh and loaded is not None and loaded.shape == array.shape:
            params[name] = loaded
        elif subtree not in REPLACEABLE:
            shape = "missing" if loaded is None else list(loaded.shape)
            raise ValueError(f"{source}: {name} is {shape}, expected {list(array.shape)}")
    return unflatten({name: np.asarray(array) for name, array in params.items()})
