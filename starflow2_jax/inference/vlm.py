"""A small vision-language model trained by this package, as a run or a Hugging Face folder.

Shapes: B rows, S records of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import config
from starflow2_jax.checkpoints.convert import qwen
from starflow2_jax.checkpoints.model_folder import EXPERIMENT_KEY, locate
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.runtime import json_text
from starflow2_jax.training.losses import text, vlm as vlm_loss
from starflow2_jax.training.tasks import vlm


@dataclass(frozen=True)
class VLM:
    """A trained vision-language model."""

    cfg: Mapping[str, Any]  # the resolved configuration of the training run
    model_config: QwenConfig  # sizes and options of the network
    params: Mapping[str, Any]  # parameters of the language model and its vision tower
    tokenizer_folder: str  # folder of the tokenizer


def load(path: str) -> VLM:
    """Load a workdir (newest checkpoint, averaged weights), a step of it, or an exported folder."""
    saved = open_model(path)
    cfg = saved.config
    if saved.task != "vlm":
        raise ValueError(
            f"{path}: task={saved.task!r}, expected a run with task='vlm' or a folder that "
            "`convert export` made of one"
        )
    if saved.is_folder:
        model_config, params = qwen.load(saved.path, dtype=jnp.float32)
        return VLM(cfg, model_config, params, saved.path)
    model_config = vlm.model_config(cfg)
    params = saved.read_params(vlm.declare(model_config))["vlm"]
    return VLM(cfg, model_config, params, str(locate(cfg["text"]["tokenizer"])))


def export(model: VLM, path: str, *, dtype: Any = "float32", overwrite: bool = False) -> None:
    """Write a Hugging Face folder with weights, tokenizer, chat template and image processor."""
    tokenizer_file = Path(model.tokenizer_folder) / "tokenizer.json"
    tokenizer = json_text.decode(tokenizer_file.read_bytes(), str(tokenizer_file))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    qwen.export(
        jax.tree.map(lambda a: np.asarray(a, jnp.dtype(dtype)), model.params),
        model.model_config,
        path,
        processor=model.tokenizer_folder,
        extra={
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            EXPERIMENT_KEY: config.to_dict(model.cfg),
        },
        overwrite=overwrite,
    )


def score(model: VLM, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return sums over the targets of every record, [B, S], of a batch of packed rows.

    `tokens` is their number, `wrong` the number of those that are not the most likely, and `nll`
    their negative log-likelihood in nats.
    """
    names = ("ids", "segments", "image", "target", "positions", "images")
    inputs = {name: batch[name] for name in names}
    return jax.device_get(_score(model.params, inputs, model_config=model.model_config))


@partial(jax.jit, static_argnames="model_config")
def _score(params, batch, *, model_config):
    features = vlm_loss.encode_images(params, batch["images"], model_config)
    logits = vlm_loss.next_token_logits(params, batch, features, model_config)
    return text.record_sums(logits, batch)
