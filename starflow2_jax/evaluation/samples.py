"""A grid of images for fixed prompts and seeds, to watch a run with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from starflow2_jax.data import image_batches
from starflow2_jax.inference.flow_sampler import FlowModel, FlowSampling, generate
from starflow2_jax.training.program import Program, to_device


def draw(model: FlowModel, options: Mapping[str, Any]) -> tuple[np.ndarray, list[str] | None]:
    """Images uint8 [n, H, W, 3] and captions, as the `sample` keys of the configuration say.

    Classes take turns; captions are those of `sample.prompts`, or of the first rows of a dataset.

    Args:
        options: of `data.image_batches`, for the prompts of a model that reads text.
    """
    sample, count, cfg = model.cfg["sample"], model.cfg["sample"]["count"], model.model_config
    given: dict[str, Any] = {}
    captions = None
    if cfg.classes:
        given["labels"] = np.arange(count) % cfg.classes
        captions = [str(model.classes[i] if model.classes else i) for i in given["labels"]]
    elif cfg.text_channels:
        first = next(iter(image_batches.eval_batches(options, batch_size=count)))
        if model.cfg["text"]["vocabulary"]:
            prompts = list(sample["prompts"]) or [_caption(row) for row in first["tokens"]]
            given["prompts"] = captions = [prompts[i % len(prompts)] for i in range(count)]
        else:
            given["text"], captions = first["text"], list(first["id"])
    settings = FlowSampling(
        guidance=sample["guidance"],
        rule=sample["guidance_rule"],
        denoise=sample["denoise"],
        seed=model.cfg["seed"],
        batch=count,
    )
    tokens = generate(model, count, **given, sampling=settings)
    return _as_pictures(tokens, model), captions


def _as_pictures(drawn: np.ndarray, model: FlowModel) -> np.ndarray:
    """Images as they are; of latents the first three channels, as there is no decoder here."""
    if drawn.dtype == np.uint8:
        return drawn
    side = model.model_config.side
    shown = drawn[..., :3].reshape(len(drawn), side, side, -1)
    low, high = np.quantile(shown, 0.01), np.quantile(shown, 0.99)
    return (255 * np.clip((shown - low) / (high - low), 0, 1)).astype(np.uint8)


def _caption(tokens: np.ndarray) -> str:
    return bytes(int(t) - 1 for t in tokens if t).decode(errors="replace")


def beside(
    program: Program, state: Any, frozen: Any, options: Mapping[str, Any]
) -> tuple[np.ndarray, None]:
    """The first images of a dataset, and beside each what the decoder makes of it."""
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    size = -(-program.cfg["sample"]["count"] // 2 // ways) * ways
    batch = next(iter(image_batches.eval_batches(options, batch_size=size)))
    placed = to_device(program, batch)
    shown = np.asarray(program.reconstruct(state.ema, frozen, placed))
    return np.stack([batch["image"], shown], 1).reshape(-1, *shown.shape[1:]), None
