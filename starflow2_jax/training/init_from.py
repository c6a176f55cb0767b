"""What a run starts from where it does not resume: weights of another run, a trained codec."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from starflow2_jax.checkpoints import model_folder, orbax, steps
from starflow2_jax.latents import codec as codecs
from starflow2_jax.params import flatten
from starflow2_jax.training import program as programs

# Of the codec's training alone; no model folder holds them.
_BESIDE = ("discriminator", "lecam")


def warm(
    program: programs.Program,
    state: Any,
    init: Mapping[str, Any],
    identity: Mapping[str, str] | None = None,
) -> Any:
    """Weights of another run or model folder in place of the drawn ones, and nothing else of it.

    Of a codec's folder the parts that the run trains; its discriminator stays as drawn.

    Args:
        identity: sha256 of what is frozen, the latents' codec too; the program's by default.

    Raises:
        FileNotFoundError: no such run or folder.
        ValueError: other subtrees, names or shapes than this program's, all of them listed; or a
            stage before that was trained beside another VLM or on another codec's latents.
    """
    path = str(model_folder.locate(init["from"]))
    stage = program.cfg["task"] == "starflow2"
    # A stage's VLM, even one that is trained, comes from its own folder.
    kept = lambda tree: {n: each for n, each in tree.items() if not (stage and n == "vlm")}
    own = kept(program.abstract_state.params)
    frozen = program.identity if identity is None else identity
    if model_folder.is_folder(path) and program.cfg["task"] in codecs.TASKS:
        found = _of_codec(program, state.params, path)
    elif model_folder.is_folder(path):
        args = (kept(program.declared), program.mesh, program.cfg["layout"], np.float32)
        whole = model_folder.read_folder(path, *args)
        found = {name: whole[name] for name in own}
        if stage:
            _check_before(init["from"], model_folder.read_config(path), frozen)
    else:
        source, step = steps.locate(path)
        part = "ema" if init["ema"] else "params"
        parts, meta = orbax.restore(source, step, {part: own}, only=(part,))
        found = parts[part]
        if stage:
            _check_before(init["from"], meta, frozen)
    found = {**state.params, **found}
    return state.replace(params=found, ema=jax.tree.map(lambda a: a.copy(), found))


def _check_before(source: str, meta: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """ValueError where a stage before saw another VLM or another codec's latents."""
    before = meta.get("frozen") or {}
    for name, what in (("vlm", "beside another VLM"), ("fae", "on latents of another codec")):
        if before.get(name) != identity.get(name):
            raise ValueError(
                f"init.from={source!r} was trained {what}: sha256 {before.get(name)} then, "
                f"{identity.get(name)} now"
            )


def _of_codec(program: programs.Program, params: Any, path: str) -> Any:
    given = codecs.load(path).params
    absent = [name for name in params if name not in (*given, *_BESIDE)]
    if absent:
        raise ValueError(f"{path}: the codec holds {', '.join(given)}, expected {absent[0]} too")
    taken = {name: given[name] for name in params if name in given}
    where = {name: program.abstract_state.params[name] for name in taken}
    flat = flatten(taken)
    for name, wanted in flatten(where).items():
        if name not in flat or flat[name].shape != wanted.shape:
            found = list(flat[name].shape) if name in flat else "missing"
            raise ValueError(f"{path}: {name} is {found}, expected {list(wanted.shape)}")
    place = lambda a, wanted: jax.device_put(np.asarray(a), wanted.sharding)
    return {**params, **jax.tree.map(place, taken, where)}


def codec(cfg: dict[str, Any], dry_run: bool) -> codecs.Codec | None:
    """The codec whose pixel decoder is trained."""
    path = cfg["init"]["fae"]
    if cfg["task"] != "fae_pixels":
        return None
    if not path and not dry_run:
        raise ValueError("config: init.fae is needed where task='fae_pixels'")
    return codecs.load(path) if path else None
