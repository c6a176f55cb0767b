"""A trained small vision-language model: as a run, or as a folder that transformers reads too.

Axes: B rows, T positions, S records of a row.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import config
from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.convert import qwen as qwen_weights
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.params import abstract as abstract_params
from starflow2_jax.training.losses import text
from starflow2_jax.training.tasks import vlm


@dataclass(frozen=True)
class VLM:
    """An experiment's resolved configuration, its model and weights, its tokenizer's folder."""

    cfg: Mapping[str, Any]
    model_config: QwenConfig
    params: Mapping[str, Any]
    tokenizer_folder: str


def load(path: str) -> VLM:
    """A workdir (newest checkpoint, averaged weights), a step folder in it, or an exported folder.

    Raises:
        FileNotFoundError: nothing of the kind is there. ValueError: it is damaged or another kind
            of model.
    """
    from starflow2_jax.checkpoints import orbax, steps

    path = str(model_folder.locate(path))
    if model_folder.is_folder(path):
        held = model_folder.read_config(path)
        if model_folder.EXPERIMENT_KEY not in held:
            raise ValueError(f"{path}: no folder that `convert export` made of a task='vlm' run")
        model, params = qwen_weights.load(path, dtype=jnp.float32)
        return VLM(held[model_folder.EXPERIMENT_KEY], model, params, str(path))
    workdir, step = steps.locate(path)
    cfg = orbax.read_meta(workdir, step)["config"]
    if cfg.get("task") != "vlm":
        raise ValueError(f"{path}: task={cfg.get('task')!r}, expected a training with task='vlm'")
    model = vlm.model_config(cfg)
    wanted = {"ema": abstract_params(vlm.declare(cfg, model))}
    found = orbax.restore(workdir, step, wanted, only=("ema",))[0]["ema"]
    return VLM(cfg, model, found["vlm"], cfg["text"]["tokenizer"])


def export(reader: VLM, path: str, *, dtype: Any = "float32", overwrite: bool = False) -> None:
    """Writes a Hugging Face folder with weights, tokenizer, chat template and image processor.

    Raises:
        FileExistsError, FileNotFoundError, OSError: as `checkpoints.convert.qwen.export`.
    """
    kept = config.to_dict(reader.cfg)
    ids = json.loads((Path(reader.tokenizer_folder) / "tokenizer.json").read_text("utf-8"))
    ids = {token["content"]: token["id"] for token in ids["added_tokens"]}
    end = ids["<|endoftext|>"]
    special = {"bos_token_id": end, "eos_token_id": ids["<|im_end|>"], "pad_token_id": end}
    qwen_weights.export(
        jax.tree.map(lambda a: np.asarray(a, jnp.dtype(dtype)), reader.params),
        reader.model_config,
        path,
        processor=reader.tokenizer_folder,
        extra={**special, model_folder.EXPERIMENT_KEY: kept},
        overwrite=overwrite,
    )


def score(reader: VLM, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of every record of a batch of rows, [B, S]: target `tokens`, how many are not the likeliest
    (`wrong`), and their `nll` in nats."""
    return jax.device_get(_score(reader.params, _arrays(batch), model=reader.model_config))


def _arrays(batch):
    names = ("ids", "segments", "image", "target", "positions", "images")
    return {name: batch[name] for name in names}


@partial(jax.jit, static_argnames="model")
def _score(params, batch, *, model):
    seen = vlm.see(params, batch["images"], model)
    return text.record_sums(vlm.read(params, batch, seen, model), batch)
