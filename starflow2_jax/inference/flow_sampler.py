"""A trained flow, ready to draw images and to tell likelihoods.

`load(path)` takes a workdir, a step in it, or a model folder. Axes: B images, T tokens, D channels.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from starflow2_jax.inference import denoise
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi, inverse
from starflow2_jax.mesh import to_host
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.patches import to_pixels, unpatchify
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses.flow import log_likelihood
from starflow2_jax.training.program import declare, frozen_weights, model_config as flow_config


@dataclass(frozen=True)
class FlowModel:
    """An experiment's resolved configuration, its flow, and all of its weights.

    Attributes:
        classes: their names, where known; null_text: features [n, E] of the empty prompt, for a
            model that reads features; zeros where None.
        frozen: sha256 of what stood beside it in training, by name (`fae`).
    """

    cfg: Mapping[str, Any]
    model_config: FlowConfig
    params: Mapping[str, Any]
    source: str = ""
    classes: tuple[str, ...] = ()
    null_text: Any = None
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class FlowSampling:
    """How images are drawn.

    Attributes:
        guidance, rule, what, annealed, guidance_temperature: see `guidance.Guidance`; 0 is none.
        temperature: of the attention logits, without guidance.
        jacobi: block-wise Jacobi instead of sequential sampling.
        denoise: a score step after sampling, where the model was trained with gaussian noise.
        seed: image i of a call is drawn from fold_in(key(seed), i).
        batch: images drawn at a time.
    """

    guidance: float = 0.0
    rule: str = "product"
    what: str = "ab"
    annealed: bool = False
    guidance_temperature: float = 1.0
    temperature: float = 1.0
    jacobi: Jacobi | None = None
    denoise: bool = True
    seed: int = 0
    batch: int = 16


def load(
    path: str,
    mesh: jax.sharding.Mesh | None = None,
    layout: str = "dp",
    *,
    vlm: str = "",
    fae: str = "",
) -> Any:
    """A model from a workdir (newest checkpoint), a step folder in it, or a model folder.

    The averaged weights of a checkpoint are taken, and no others are read.

    Args:
        vlm, fae: of a STARFlow2, see `loading.load`.

    Returns:
        a `FlowModel`, or of a STARFlow2 an `api.STARFlow2`.

    Raises:
        FileNotFoundError: nothing of the kind is there. ValueError: it is damaged or of another
            model than its own configuration says.
    """
    from starflow2_jax.inference import load as loading

    if loading.task(path) == loading.TASK:
        return loading.load(path, mesh, layout, vlm=vlm, fae=fae)
    if vlm or fae:
        raise ValueError(f"{path}: it has neither a VLM nor a codec; --vlm, --fae are not for it")

    from etils import epath

    from starflow2_jax.checkpoints import model_folder, orbax, steps
    from starflow2_jax.params import abstract as abstract_params, split as split_params

    if (epath.Path(path) / "config.json").exists() and not (
        epath.Path(path) / steps.FOLDER
    ).exists():
        cfg = model_folder.read_config(path)
        model = flow_config(cfg)
        params = model_folder.read_folder(path, declare(cfg, model), mesh, layout)
        about = (tuple(cfg.get("classes") or ()), cfg.get("null_text"), cfg.get("frozen") or {})
        return FlowModel(cfg, model, params, str(path), *about)
    workdir, step = steps.locate(path)
    meta = orbax.read_meta(workdir, step)
    cfg = meta["config"]
    model = flow_config(cfg)
    declared = declare(cfg, model)
    trained, _ = split_params(declared, tuple(cfg["train"]["trainable"]))
    wanted = {"ema": abstract_params(trained, mesh, layout)}
    found, _ = orbax.restore(workdir, step, wanted, only=("ema",))
    params = {**found["ema"], **frozen_weights({**cfg, "layout": layout}, declared, mesh)}
    source = json.dumps({"workdir": str(workdir), "step": meta["step"]})
    about = (tuple(meta["classes"] or ()), meta["null_text"], meta.get("frozen") or {})
    return FlowModel(cfg, model, params, source, *about)


def generate(
    model: FlowModel,
    count: int,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    text: np.ndarray | None = None,
    sampling: FlowSampling | None = None,
) -> np.ndarray:
    """Draw images.

    Args:
        prompts: `count` captions, for a model with a token embedding; labels: `count` classes, -1
            for none in particular; text: features [count, L, E], for a model that reads them.

    Returns:
        uint8 [count, H, W, 3]; for a model of latents, float32 tokens [count, T, D].

    Raises:
        ValueError: conditions that the model does not take or needs, or a wrong number of them.
    """
    sampling = sampling or FlowSampling()
    batch = _conditions(model, count, prompts, labels, text)
    drawn = []
    for start in range(0, count, sampling.batch):
        rows = np.arange(start, start + sampling.batch)
        # The last batch is filled up with repeated conditions, so that one program serves all.
        part = {name: values[np.minimum(rows, count - 1)] for name, values in batch.items()}
        guided = None
        if sampling.guidance:
            guided = Guidance(
                weight=sampling.guidance,
                temperature=sampling.guidance_temperature,
                rule=sampling.rule,
                what=sampling.what,
                annealed=sampling.annealed,
                temperature_on="all" if model.model_config.text_channels else "unconditional",
                text=_null_text(model),
            )
        drawn.append(_draw(model, part, rows, sampling, guided))
    return np.concatenate(drawn)[:count]


def _null_text(model):
    """[1, L, E], None for a model without text."""
    return (
        preprocess.pad_text(model.null_text, model.model_config)[None]
        if model.model_config.text_channels
        else None
    )


def _draw(model, part, rows, sampling, guided):
    cfg, shape = model.model_config, (model.model_config.tokens, model.model_config.channels)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(sampling.seed)))(rows)
    z = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    conditioning = preprocess.conditions(model.params, part, keys, 0.0)
    x, _ = inverse(
        model.params["flow"],
        z,
        cfg,
        conditioning,
        guidance=guided,
        jacobi=sampling.jacobi,
        temperature=sampling.temperature,
    )
    noise, image = model.cfg["noise"], model.cfg["image"]
    if sampling.denoise and noise["kind"] == "gaussian" and noise["sigma"]:
        x = _score_step(model.params["flow"], x, noise["sigma"], conditioning, cfg=cfg)
    if not image["pixels"]:
        return to_host(x)
    pixels = unpatchify(x, (cfg.side, cfg.side), image["patch"], image["channel_order"])
    return to_host(to_pixels(pixels, noise["kind"]))


@partial(jax.jit, static_argnames="cfg")
def _score_step(params, x, sigma, conditioning, *, cfg):
    return denoise.score_step(params, x, cfg, sigma, conditioning)


def likelihood(
    model: FlowModel,
    x: np.ndarray,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    text: np.ndarray | None = None,
) -> np.ndarray:
    """log p [B] in nats of tokens x [B, T, D] as they are (no noise is added)."""
    batch = _conditions(model, len(x), prompts, labels, text)
    keys = jax.random.split(jax.random.key(0), len(x))
    conditioning = preprocess.conditions(model.params, batch, keys, 0.0)
    return np.asarray(
        _log_likelihood(model.params["flow"], x, conditioning, cfg=model.model_config)
    )


@partial(jax.jit, static_argnames="cfg")
def _log_likelihood(params, x, conditioning, *, cfg):
    return log_likelihood(params, x, cfg, conditioning)


def _conditions(model, count, prompts, labels, text) -> dict[str, Any]:
    """Conditions as the data pipeline gives them, checked."""
    cfg, batch = model.model_config, {}
    embeds = bool(model.cfg["text"]["vocabulary"])
    for name, values, takes in (
        ("prompts", prompts, embeds),
        ("labels", labels, bool(cfg.classes)),
        ("text", text, bool(cfg.text_channels) and not embeds),
    ):
        if values is not None and not takes:
            raise ValueError(f"{name}: this model does not take them")
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: expected {count}, got {len(values)}")
    if embeds:
        from starflow2_jax.data.chat_layout import byte_tokens

        given = [""] * count if prompts is None else prompts
        batch["tokens"] = np.stack(
            [byte_tokens(p, cfg.text_length, f"prompt {i}") for i, p in enumerate(given)]
        )
    elif cfg.text_channels:
        shape = (count, cfg.text_length, cfg.text_channels)
        empty = np.broadcast_to(_null_text(model), shape)
        batch["text"] = empty if text is None else np.asarray(text, np.float32)
    if cfg.classes:
        given = np.full(count, -1) if labels is None else np.asarray(labels)
        if given.max() >= cfg.classes:
            raise ValueError(f"labels: {given.max()} is not below the {cfg.classes} classes")
        batch["label"] = given.astype(np.int32)
    return batch
