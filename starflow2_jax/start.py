"""What a run starts from: its program, and where it does not resume, weights of another run or a
trained codec.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.generation import codec as codecs
from starflow2_jax.training import checkpoint, fae_step, step_folders
from starflow2_jax.training import step as programs
from starflow2_jax.weights import files


def build(
    cfg: dict[str, Any], mesh: Mesh, *, null_text: Any = None, dry_run: bool = False
) -> programs.Program:
    """The program of an experiment, whatever its `task`: what train and plan compile.

    Args:
        null_text: features of the empty prompt (see `training.step.build`); dry_run: nothing will
            be trained, so what it would be trained on may be missing.

    Raises:
        ValueError: as `training.step.build` and `training.fae_step.build`.
    """
    if cfg["task"] == "flow":
        return programs.build(cfg, mesh, null_text=null_text)
    return fae_step.build(cfg, mesh, codec(cfg, dry_run))


def warm(program: programs.Program, state: Any, init: dict[str, Any]) -> Any:
    """Trained weights of another run or model folder in place of the drawn ones."""
    if files.is_folder(init["from"]):
        args = (program.declared, program.mesh, program.cfg["layout"], np.float32)
        whole = files.read_folder(init["from"], *args)
        found = {name: whole[name] for name in state.params}
    else:
        source, step = step_folders.locate(init["from"])
        part = "ema" if init["ema"] else "params"
        wanted = {part: program.abstract_state.params}
        found = checkpoint.restore(source, step, wanted, only=(part,))[0][part]
    return state.replace(params=found, ema=jax.tree.map(lambda a: a.copy(), found))


def codec(cfg: dict[str, Any], dry_run: bool) -> codecs.Codec | None:
    """The codec whose pixel decoder is trained."""
    path = cfg["init"]["fae"]
    if cfg["task"] != "fae_pixels":
        return None
    if not path and not dry_run:
        raise ValueError("config: init.fae is needed where task='fae_pixels'")
    return codecs.load(path) if path else None
