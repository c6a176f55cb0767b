"""What a run starts from where it does not resume: weights of another run, a trained codec."""

from typing import Any

import jax
import numpy as np

from starflow2_jax.generation import codec as codecs
from starflow2_jax.training import checkpoint, step_folders
from starflow2_jax.training import step as programs
from starflow2_jax.weights import files


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
