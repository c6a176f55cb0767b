"""Draw images from a trained TarFlow or STARFlow, and compute likelihoods.

Shapes: B images, T tokens, D channels.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from starflow2_jax import config
from starflow2_jax.checkpoints import hub
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.inference import denoise
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi, inverse, prepare_params
from starflow2_jax.mesh import to_host
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.patches import to_pixels, unpatchify
from starflow2_jax.runtime import memory
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses.flow import log_likelihood
from starflow2_jax.training.tasks import flow

_score_step = jax.jit(denoise.score_step, static_argnames="cfg")
_log_likelihood = jax.jit(log_likelihood, static_argnames="cfg")


@dataclass(frozen=True)
class FlowModel:
    """A trained flow of images (TarFlow, STARFlow)."""

    cfg: Mapping[str, Any]  # the resolved configuration of the training run
    model_config: FlowConfig  # sizes and options of the flow
    params: Mapping[str, Any]  # every parameter subtree
    source: str = ""  # the path, or the run and its step, that the model was loaded from
    classes: tuple[str, ...] = ()  # names of the classes, if they are known
    null_text: Any = None  # text features [n, E] of the empty prompt; zeros if None
    # sha256 of every frozen model that the flow was trained with, by name (`fae`)
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def sampling_params(self) -> Mapping[str, Any]:
        """The flow's parameters laid out for sampling, a copy made on first use."""
        return prepare_params(self.params["flow"])


@dataclass(frozen=True)
class FlowSampling:
    """Options of `generate`."""

    guidance: float = 0.0  # guidance weight; 0 is none
    rule: str = "product"  # guidance rule, see `guidance.Guidance`
    guidance_temperature: float = 1.0  # attention temperature with guidance
    temperature: float = 1.0  # attention temperature without guidance
    jacobi: Jacobi | None = None  # settings of Jacobi iteration; None samples sequentially
    denoise: bool = True  # apply a score step, if the flow was trained with Gaussian noise
    seed: int = 0  # image i of a call is drawn from fold_in(key(seed), i)
    batch: int = 16  # number of images drawn at a time


def load_flow(path: str, device_mesh: Mesh | None = None, layout: str = "dp") -> FlowModel:
    """Load a flow; path and errors are those of `inference.load.load`."""
    saved = open_model(path)
    if saved.task != "flow":
        raise ValueError(f"{path}: task={saved.task!r}, expected a flow or a STARFlow2")
    cfg = saved.config
    model_config = flow.model_config(cfg)
    declared = flow.declare(cfg, model_config)
    if saved.is_folder:
        params, source = saved.read_params(declared, device_mesh, layout), hub.pin(str(path))
    else:
        trainable = tuple(cfg["train"]["trainable"])
        params = saved.read_params(declared, device_mesh, layout, subtrees=trainable)
        params |= flow.init_frozen(
            {**cfg, "layout": layout, "frozen_layout": ""}, declared, device_mesh
        )
        source = json.dumps({"workdir": saved.path, "step": saved.step})
    return FlowModel(
        cfg=cfg,
        model_config=model_config,
        params=params,
        source=source,
        classes=saved.class_names,
        null_text=saved.metadata.get("null_text"),
        frozen=saved.frozen,
    )


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
        prompts: `count` captions, for a model with a token embedding.
        labels: `count` class numbers, -1 for no class.
        text: features [count, L, E], for a model that reads features.

    Returns:
        uint8 [count, H, W, 3]; for a flow of latents float32 tokens [count, T, D].
    """
    sampling = sampling or FlowSampling()
    row = model.model_config.tokens * model.model_config.channels
    row *= 1 if model.cfg["image"]["pixels"] else 4
    memory.check(f"generate: {count} images", {"the result": count * row}, memory.host_capacity())
    conditions = _conditions(model, count, prompts, labels, text)
    guidance = None
    if sampling.guidance:
        guidance = Guidance(
            weight=sampling.guidance,
            temperature=sampling.guidance_temperature,
            rule=sampling.rule,
            temperature_on="all" if model.model_config.text_channels else "unconditional",
            text=_null_text(model),
        )
    images = []
    for start in range(0, count, sampling.batch):
        rows = np.arange(start, start + sampling.batch)
        # The last batch is padded with repeated conditions, so that one program serves all.
        batch = {name: values[np.minimum(rows, count - 1)] for name, values in conditions.items()}
        images.append(_generate_batch(model, batch, rows, sampling, guidance))
    return np.concatenate(images)[:count]


def _null_text(model: FlowModel) -> jax.Array | None:
    """Return the features [1, L, E] of the empty prompt; None for a model without text."""
    if not model.model_config.text_channels:
        return None
    return preprocess.pad_text(model.null_text, model.model_config)[None]


def _generate_batch(model, batch, rows, sampling, guidance) -> np.ndarray:
    cfg, noise, image = model.model_config, model.cfg["noise"], model.cfg["image"]
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(sampling.seed)))(rows)
    z = jax.vmap(lambda key: jax.random.normal(key, (cfg.tokens, cfg.channels)))(keys)
    conditioning = preprocess.conditions(model.params, batch, keys, 0.0)
    x, _ = inverse(
        model.sampling_params,
        z,
        cfg,
        conditioning,
        guidance=guidance,
        jacobi=sampling.jacobi,
        temperature=sampling.temperature,
    )
    if sampling.denoise and noise["kind"] == "gaussian" and noise["sigma"]:
        x = _score_step(model.params["flow"], x, cfg, noise["sigma"], conditioning)
    if not image["pixels"]:
        return to_host(x)
    pixels = unpatchify(x, (cfg.side, cfg.side), image["patch"], image["channel_order"])
    return to_host(to_pixels(pixels, noise["kind"]))


def likelihood(
    model: FlowModel,
    x: np.ndarray,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    text: np.ndarray | None = None,
) -> np.ndarray:
    """Return log p [B] in nats of tokens x [B, T, D], to which no noise is added."""
    batch = _conditions(model, len(x), prompts, labels, text)
    keys = jax.random.split(jax.random.key(0), len(x))
    conditioning = preprocess.conditions(model.params, batch, keys, 0.0)
    return np.asarray(_log_likelihood(model.params["flow"], x, model.model_config, conditioning))


def _conditions(model, count, prompts, labels, text) -> dict[str, np.ndarray]:
    """Return checked conditions in the format of the data pipeline's batches."""
    cfg, batch = model.model_config, {}
    embeds_tokens = bool(model.cfg["text"]["vocabulary"])
    for name, values, is_supported in (
        ("prompts", prompts, embeds_tokens),
        ("labels", labels, bool(cfg.classes)),
        ("text", text, bool(cfg.text_channels) and not embeds_tokens),
    ):
        if values is not None and not is_supported:
            raise ValueError(f"{name}: this model does not take them")
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: expected {count}, got {len(values)}")
    if embeds_tokens:
        from starflow2_jax.data.chat_layout import byte_tokens

        captions = [""] * count if prompts is None else prompts
        batch["tokens"] = np.stack(
            [byte_tokens(p, cfg.text_length, f"prompt {i}") for i, p in enumerate(captions)]
        )
    elif cfg.text_channels:
        shape = (count, cfg.text_length, cfg.text_channels)
        empty = np.broadcast_to(_null_text(model), shape)
        batch["text"] = empty if text is None else np.asarray(text, np.float32)
    if cfg.classes:
        classes = np.full(count, -1) if labels is None else np.asarray(labels)
        if classes.max() >= cfg.classes:
            raise ValueError(f"labels: {classes.max()} is not below the {cfg.classes} classes")
        batch["label"] = classes.astype(np.int32)
    return batch


def class_number(label: str, classes: tuple[str, ...]) -> int:
    """Return the number of a class by its name, or by the number itself."""
    # A name comes first: a class may be called 12 and have another number.
    if label in classes:
        return classes.index(label)
    if label.isascii() and label.lstrip("-").isdigit():
        return int(label)
    known = ", ".join(classes[:12]) or "the model has no class names"
    suggestion = config.nearest(label, classes)
    raise ValueError(f"--label: unknown class {label!r}{suggestion}; classes: {known}")
