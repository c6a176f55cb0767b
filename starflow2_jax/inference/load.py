"""STARFlow2 from a run, a step of it, or a model folder, with its VLM, tokenizer and codec.

A model folder holds `config.json`, the tensors of adapter, shallow and deep flow and skips, and the
digests of both; `vlm/`, `fae/` and `tokenizer/` in it, or the paths in its configuration, which are
read from the folder they stand in. What is frozen is compared with what the model was trained with.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.convert import teacher as teacher_weights
from starflow2_jax.inference.api import STARFlow2
from starflow2_jax.latents import codec as codecs
from starflow2_jax.mesh import make_mesh
from starflow2_jax.params import abstract as abstract_params
from starflow2_jax.training.tasks import starflow2

TASK = "starflow2"


def load(
    path: str,
    mesh: Any = None,
    layout: str = "dp",
    *,
    vlm: str = "",
    fae: str = "",
) -> STARFlow2:
    """A model with the averaged weights of a checkpoint.

    Args:
        vlm, fae: folders of the VLM and the codec, where they are not where the run found them.

    Raises:
        FileNotFoundError: no such run or folder, or none of its VLM.
        ValueError: another kind of model, damaged files, or another VLM or codec than the model was
            trained with.
    """
    meta = settings(path)
    cfg, frozen = meta["config"], meta["frozen"]
    path = str(model_folder.locate(path))
    vlm, fae = vlm or cfg["vlm"]["path"], fae or cfg["fae"]["path"]
    cfg["vlm"]["path"], cfg["fae"]["path"], cfg["layout"] = vlm, fae, layout
    for what, at in (("VLM", vlm), ("codec", fae)):
        if at and not model_folder.locate(at).is_dir():
            raise FileNotFoundError(f"{path}: no folder {at}, where its {what} should be")
    if vlm and frozen.get("vlm") not in (None, identity := teacher_weights.identity(vlm)):
        raise ValueError(
            f"{path} was trained beside another VLM than the one in {vlm}: sha256 "
            f"{frozen['vlm']} then, {identity} now"
        )
    shape = starflow2.model_config(cfg)
    declared = shape.declare()
    codec = codecs.load(fae) if fae else None
    if codec is not None:
        _check_codec(codec, shape, frozen.get("fae"), path, fae)
    mesh = mesh or make_mesh("data=1", jax.local_devices()[:1])
    own = {name: tree for name, tree in declared.items() if name != "vlm"}
    if model_folder.is_folder(path):
        params = model_folder.read_folder(path, own, mesh, layout)
    else:
        params = _averaged(path, own, declared, cfg, mesh, layout)
    if "vlm" not in params:
        dtype = jnp.dtype(cfg["frozen_dtype"])
        params |= starflow2.frozen_vlm(cfg, shape, mesh, dtype)
    from starflow2_jax.data.chat_layout import open_tokenizer  # heavy

    words = model_folder.locate(cfg["text"]["tokenizer"] or vlm)
    return STARFlow2(cfg, shape, params, open_tokenizer(words), codec, path)


def task(path: str) -> str:
    """What a run, a step or a model folder is a training of."""
    path = str(model_folder.locate(path))
    cfg = _meta(path, model_folder.is_folder(path))["config"]
    return cfg.get("starflow2_jax", cfg).get("task", "flow")


def settings(path: str) -> dict[str, Any]:
    """What a training, or a use, of a model has to know: `config`, whose paths of VLM, codec and
    tokenizer are those from here, and `frozen`, the sha256 of what it was trained with.

    Raises:
        FileNotFoundError: no such run or folder. ValueError: another kind of model.
    """
    found = str(model_folder.locate(path))
    meta = _meta(found, model_folder.is_folder(found))
    cfg = meta["config"]
    if cfg.get("task") != TASK:
        raise ValueError(f"{path}: task={cfg.get('task')!r}, expected a model of interleaved parts")
    base = path if model_folder.is_folder(found) else ""
    at = {
        "vlm": {**cfg["vlm"], "path": _found(base, "vlm", cfg["vlm"]["path"])},
        "fae": {**cfg["fae"], "path": _found(base, "fae", cfg["fae"].get("path") or "")},
        "text": {**cfg["text"], "tokenizer": _found(base, "tokenizer", cfg["text"]["tokenizer"])},
        # Models of before this key drew with all the noise.
        "sample": {"image_temperature": 1.0, **cfg["sample"]},
    }
    return {"config": {**cfg, **at}, "frozen": meta.get("frozen") or {}}


def _meta(path: str, folder: bool) -> dict[str, Any]:
    if not folder:
        from starflow2_jax.checkpoints import orbax, steps  # heavy

        return orbax.read_meta(*steps.locate(path))
    cfg = model_folder.read_config(path)
    return {"config": cfg, "frozen": cfg.get("frozen")}


def _found(base: str, name: str, path: str) -> str:
    """A folder inside of a model folder, or a path, which may be seen from there."""
    for inner in (name, path) if base else ():
        if (
            inner
            and not Path(inner).is_absolute()
            and model_folder.locate(Path(base, inner)).is_dir()
        ):
            return str(Path(base, inner))
    return path


def _check_codec(codec: codecs.Codec, shape: Any, expected: str | None, path: str, fae: str):
    given = (codec.model.tokens, codec.model.latent)
    if given != (shape.patches, shape.flow.channels):
        raise ValueError(
            f"{path} draws {shape.patches} x {shape.flow.channels} latents, the codec in {fae} has "
            f"{given[0]} x {given[1]} (tokens x channels)"
        )
    if expected and codec.sha256 != expected:
        raise ValueError(
            f"{path} was trained on latents of another codec than the one in {fae}: sha256 "
            f"{expected} then, {codec.sha256} now"
        )


def _averaged(path, own, declared, cfg, mesh, layout):
    from starflow2_jax.checkpoints import orbax, steps

    workdir, step = steps.locate(path)
    held = {**own, **({"vlm": declared["vlm"]} if "vlm" in cfg["train"]["trainable"] else {})}
    wanted = {"ema": abstract_params(held, mesh, layout)}
    return orbax.restore(workdir, step, wanted, only=("ema",))[0]["ema"]


def export(
    path: str,
    out: str,
    *,
    embed: bool = True,
    vlm: str = "",
    fae: str = "",
    overwrite: bool = False,
) -> STARFlow2:
    """Writes a model folder from a run, a step of it, or another model folder.

    Args:
        embed: copy VLM, tokenizer and codec into it; otherwise it holds paths to them as seen from
            the folder.
        vlm, fae, overwrite: as in `load` and `files.write_folder`.

    Raises:
        FileNotFoundError, ValueError: as `load`. FileExistsError, OSError: as `files.write_folder`.
    """
    before = settings(path)["frozen"]
    model = load(path, vlm=vlm, fae=fae)
    vlm, fae = model.cfg["vlm"]["path"], model.cfg["fae"]["path"]
    words = model.cfg["text"]["tokenizer"] or vlm
    frozen = before | ({"vlm": teacher_weights.identity(vlm)} if vlm else {})
    frozen |= {"fae": model.codec.sha256} if model.codec else {}
    shipped = lambda p: model_folder.locate(p) != Path(p)
    near = lambda p: p if shipped(p) else os.path.relpath(Path(p).resolve(), Path(out).resolve())
    seen = lambda p: "" if embed or not p else near(p)
    cfg = {
        **model.cfg,
        "vlm": {**model.cfg["vlm"], "path": seen(vlm)},
        "fae": {**model.cfg["fae"], "path": seen(fae)},
        "text": {**model.cfg["text"], "tokenizer": seen(words)},
        "frozen": frozen,
    }
    trained = {name: tree for name, tree in model.params.items() if name != "vlm"}
    model_folder.write_folder(out, jax.tree.map(np.asarray, trained), cfg, overwrite=overwrite)
    if embed:
        for name, source in (("vlm", vlm), ("fae", fae), ("tokenizer", words)):
            if source and not (name == "tokenizer" and source == vlm):
                shutil.copytree(model_folder.locate(source), Path(out) / name)
    return model
