"""Load a trained model from a run, a step of a run, or a model folder.

The model folder of a STARFlow2 contains `config.json` and the tensors of everything but the frozen
models. Those are in its folders `vlm/`, `fae/` and `tokenizer/`, or at the paths in its
configuration, and are compared with the sha256 that was recorded in training.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow2_jax import mesh
from starflow2_jax.checkpoints import hub, model_folder
from starflow2_jax.checkpoints.convert import teacher
from starflow2_jax.checkpoints.open_model import SavedModel, open_model
from starflow2_jax.inference import flow_sampler
from starflow2_jax.inference.api import STARFlow2
from starflow2_jax.inference.flow_sampler import FlowModel
from starflow2_jax.latents.codec import Codec, load as load_codec
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.training.tasks import starflow2

TASK = "starflow2"


def load(
    path: str,
    device_mesh: Mesh | None = None,
    layout: str = "dp",
    *,
    vlm: str = "",
    fae: str = "",
) -> STARFlow2 | FlowModel:
    """Load a trained model with the averaged weights of its checkpoint.

    Args:
        path: a workdir (its newest checkpoint), a step folder of it, or a model folder, also
            `hf://user/name[@revision]`.
        device_mesh: where the weights go; the default device if None.
        vlm, fae: folders of a STARFlow2's VLM and codec, if they have moved since the training.

    Raises:
        FileNotFoundError: If there is no such run or folder, or its VLM or codec is missing.
        ValueError: If the files are damaged, or VLM or codec are not those of the training.
    """
    if open_model(path).task == TASK:
        return load_starflow2(path, device_mesh, layout, vlm=vlm, fae=fae)
    if vlm or fae:
        raise ValueError(f"{path}: this model has neither a VLM nor a codec; drop --vlm and --fae")
    return flow_sampler.load_flow(path, device_mesh, layout)


def load_starflow2(
    path: str,
    device_mesh: Mesh | None = None,
    layout: str = "dp",
    *,
    vlm: str = "",
    fae: str = "",
) -> STARFlow2:
    """Load a STARFlow2; arguments and errors are those of `load`."""
    saved, cfg = _open_starflow2(path)
    replaced = [name for name, folder in (("vlm", vlm), ("fae", fae)) if folder]
    _check_parts(saved, cfg, replaced)
    if saved.is_folder:
        # First, as damage to one file may look as if another one did not fit.
        model_folder.check(saved.path, lambda name: name.split("/")[0] not in replaced)
    vlm, fae = vlm or cfg["vlm"]["path"], fae or cfg["fae"]["path"]
    cfg["vlm"]["path"], cfg["fae"]["path"] = vlm, fae
    cfg["layout"], cfg["frozen_layout"] = layout, ""
    for name, folder in (("VLM", vlm), ("codec", fae)):
        if folder and not model_folder.locate(folder).is_dir():
            raise FileNotFoundError(f"{path}: its {name} is missing: there is no folder {folder}")
    if vlm:
        _check_digest(path, "VLM", vlm, teacher.identity(vlm), saved.frozen.get("vlm"))
    model_config = starflow2.model_config(cfg)
    codec = load_codec(fae) if fae else None
    if codec is not None:
        _check_latent_shape(path, fae, codec, model_config)
        _check_digest(path, "codec", fae, codec.sha256, saved.frozen.get("fae"))
    from starflow2_jax.data.chat_layout import open_tokenizer  # heavy

    tokenizer_folder = model_folder.locate(cfg["text"]["tokenizer"] or vlm)
    device_mesh = device_mesh or mesh.make_mesh("data=1", jax.local_devices()[:1])
    return STARFlow2(
        cfg=cfg,
        model_config=model_config,
        params=_read_params(saved, cfg, model_config, device_mesh, layout),
        tokenizer=open_tokenizer(tokenizer_folder, model_config.vlm.vocab),
        codec=codec,
        source=hub.pin(path) if hub.is_address(path) else str(model_folder.locate(path)),
    )


def missing_parts(saved: SavedModel, cfg: Mapping[str, Any]) -> dict[str, str]:
    """Return the folders that a STARFlow2 needs and that do not exist, by part.

    `cfg` is its configuration with resolved paths, see `read_config`.
    """
    embedded = saved.metadata.get("parts") or ()
    if saved.is_folder and saved.metadata.get("parts") is None:
        # Folders that were exported before `parts` was recorded.
        embedded = [name for name in ("vlm", "fae") if saved.frozen.get(name)]
    paths = {"vlm": cfg["vlm"]["path"], "fae": cfg["fae"]["path"]}
    paths["tokenizer"] = cfg["text"]["tokenizer"]
    folders = {name: path or name for name, path in paths.items() if path or name in embedded}
    inside = {name: Path(saved.path) / name for name, path in folders.items() if path == name}
    return {
        name: str(inside.get(name, path))
        for name, path in folders.items()
        if not model_folder.locate(inside.get(name, path)).is_dir()
    }


def _check_parts(saved: SavedModel, cfg: Mapping[str, Any], replaced: Sequence[str]) -> None:
    """Raise FileNotFoundError if a part is missing that no other folder replaces."""
    labels = {"vlm": "VLM", "fae": "codec", "tokenizer": "tokenizer"}
    for name, folder in missing_parts(saved, cfg).items():
        if name not in replaced:
            raise FileNotFoundError(
                f"{saved.path}: its {labels[name]} is missing: there is no folder {folder}"
            )


def read_config(path: str) -> dict[str, Any]:
    """Return the configuration of a STARFlow2, with paths of VLM, codec and tokenizer resolved."""
    return _open_starflow2(path)[1]


def _open_starflow2(path: str) -> tuple[SavedModel, dict[str, Any]]:
    saved = open_model(path)
    if saved.task != TASK:
        expected = f"a model of interleaved text and images (task={TASK!r})"
        raise ValueError(f"{path}: task={saved.task!r}, expected {expected}")
    cfg = saved.config

    def resolve(name: str, stored: str) -> str:
        return _resolve(path, saved, name, stored)

    return saved, {
        **cfg,
        "vlm": {**cfg["vlm"], "path": resolve("vlm", cfg["vlm"]["path"])},
        "fae": {**cfg["fae"], "path": resolve("fae", cfg["fae"].get("path") or "")},
        "text": {**cfg["text"], "tokenizer": resolve("tokenizer", cfg["text"]["tokenizer"])},
        # Checkpoints saved before this key existed used temperature 1.
        "sample": {"image_temperature": 1.0, **cfg["sample"]},
    }


def _resolve(path: str, saved: SavedModel, name: str, stored: str) -> str:
    """Return the path of `name` or of the relative path `stored` in a model folder, else `stored`.

    `path` is that of the model, with which the result begins.
    """
    for relative in (name, stored) if saved.is_folder else ():
        is_relative = relative and not Path(relative).is_absolute() and "://" not in relative
        if is_relative and Path(saved.path, relative).is_dir():
            return hub.join(hub.pin(path), relative)
    return stored


def _check_digest(path: str, name: str, folder: str, actual: str, expected: str | None) -> None:
    if expected and actual != expected:
        raise ValueError(
            f"{path} was trained with another {name} than the one in {folder}: expected sha256 "
            f"{expected}, got {actual}"
        )


def _check_latent_shape(path: str, fae: str, codec: Codec, model_config: BackboneConfig) -> None:
    actual = (codec.model.tokens, codec.model.latent)
    expected = (model_config.num_patches, model_config.flow.channels)
    if actual != expected:
        raise ValueError(
            f"{path} generates {expected[0]} x {expected[1]} latents (tokens x channels), but the "
            f"codec in {fae} has {actual[0]} x {actual[1]}"
        )


def _read_params(saved, cfg, model_config, device_mesh, layout) -> dict[str, Any]:
    declared = model_config.declare()
    if not _vlm_is_trained(cfg):
        del declared["vlm"]
    params = saved.read_params(declared, device_mesh, layout)
    if "vlm" not in params:
        dtype = jnp.dtype(cfg["frozen_dtype"])
        params |= starflow2.load_frozen_vlm(cfg, model_config, device_mesh, dtype)
    return params


def _vlm_is_trained(cfg: Mapping[str, Any]) -> bool:
    """Return whether a model's own weights contain the VLM's, which its training changed."""
    return "vlm" in cfg["train"]["trainable"]


def export(
    path: str,
    out: str,
    *,
    embed: bool = True,
    vlm: str = "",
    fae: str = "",
    overwrite: bool = False,
) -> STARFlow2:
    """Write a model folder from a run, a step of a run, or another model folder.

    Args:
        path: as in `load`, like `vlm` and `fae`.
        embed: copy VLM, tokenizer and codec into the folder; otherwise its configuration holds
            their paths, relative to the folder.
    """
    model = load_starflow2(path, vlm=vlm, fae=fae)
    vlm, fae = model.cfg["vlm"]["path"], model.cfg["fae"]["path"]
    tokenizer = model.cfg["text"]["tokenizer"] or vlm
    frozen = open_model(path).frozen
    if vlm:
        frozen["vlm"] = teacher.identity(vlm)
    if model.codec is not None:
        frozen["fae"] = model.codec.sha256

    folders = {"vlm": vlm, "fae": fae, "tokenizer": "" if tokenizer == vlm else tokenizer}
    located = {name: model_folder.locate(source) for name, source in folders.items() if source}
    target = Path(out).resolve()
    # What lies in a folder that is replaced has to be copied.
    embedded = {
        name: source
        for name, source in located.items()
        if embed or source.resolve().is_relative_to(target)
    }

    def stored_path(name):
        source = folders[name]
        if not source or name in embedded:
            return ""
        if located[name] != Path(source):  # A model that ships with the package.
            return source
        return os.path.relpath(Path(source).resolve(), target)

    cfg = {
        **model.cfg,
        "vlm": {**model.cfg["vlm"], "path": stored_path("vlm")},
        "fae": {**model.cfg["fae"], "path": stored_path("fae")},
        "text": {**model.cfg["text"], "tokenizer": stored_path("tokenizer")},
        "frozen": frozen,
        "parts": sorted(embedded),
    }
    params = dict(model.params)
    if not _vlm_is_trained(model.cfg):
        del params["vlm"]  # It is in the folder `vlm`.
    model_folder.write_folder(
        out, jax.tree.map(np.asarray, params), cfg, folders=embedded, overwrite=overwrite
    )
    return model
