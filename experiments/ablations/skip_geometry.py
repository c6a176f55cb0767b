"""Length and direction of the VLM's skip in the deep flow's input, at the patches of images.

The flow reads b + s at a patch, with s = W_vlm y, and b = u or, if the skip leads into its width,
b = W_in u. The share of s is |s| / (|b| + |s|). In the paper it is 0.47, and the two are nearly
orthogonal.

Shapes: B rows, T positions, M images of a row, N patches, D latent channels.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data import packed_batches
from starflow2_jax.inference.model import Model
from starflow2_jax.models import flow, starflow2
from starflow2_jax.models.backbone import BackboneInputs
from starflow2_jax.models.layers import at_least_float32, linear
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.tasks import starflow2 as task

ARRAYS = ("ids", "segments", "image", "target", "positions", "flow_positions",
          "latent_mean", "latent_logvar", "mask")  # fmt: skip


def measure(
    model: Model, entry: Mapping[str, Any], *, rows: int = 32, batch_size: int = 16
) -> dict[str, float]:
    """Return `skip_share` and `skip_cosine`, means over the patches of a dataset's first rows.

    The result is empty for a model that is no Pretzel with this skip.

    Args:
        entry: a dataset of captions with images, `{path, latents}`.
    """
    if model.model_config.kind != "pretzel" or "vlm" not in model.model_config.skips:
        return {}
    options = task.data_options(
        model.cfg, model.model_config, path=entry["path"], latents=entry["latents"], mixture=()
    )
    sums = np.zeros(3)
    for batch in packed_batches.eval_batches(options, batch_size=batch_size):
        keys = preprocess.row_keys(2, 0, np.asarray(batch["row"], np.int32))
        arrays = {name: batch[name] for name in ARRAYS}
        x = interleaved.sample_latents(arrays, keys, model.cfg)
        sums += np.asarray(_sums(model.params, arrays, x, cfg=model.model_config), np.float64)
        rows -= batch_size
        if rows <= 0:
            break
    share, cosine, count = sums
    return {"skip_share": float(share / count), "skip_cosine": float(cosine / count)}


@partial(jax.jit, static_argnames="cfg")
def _sums(params, batch, x, *, cfg):
    """Return the sums over patches of share and cosine, and the number of patches, float32 [3]."""
    is_image = (batch["image"] >= 0) & (batch["mask"][:, None] > 0)
    outputs, _ = starflow2.shallow_forward(params, x.reshape(-1, *x.shape[2:]), cfg)
    u = starflow2.latents_at_positions(outputs[-1].reshape(x.shape), batch["image"])
    inputs = BackboneInputs(
        ids=batch["ids"],
        latents=u,
        adapter_input=u,
        is_image=is_image,
        positions=batch["positions"],
        next_positions=batch["flow_positions"],
        segments=batch["segments"],
    )
    y = cfg.forward(params, inputs, with_flow=False).vlm_states
    skip = at_least_float32(linear(params["skip"]["vlm"], y))
    base = u if cfg.skip_into == "latent" else flow.embed_tokens(params["deep"], u, cfg.deep)
    base = at_least_float32(base)
    share = starflow2.skip_ratio(base, skip)
    lengths = jnp.linalg.norm(base, axis=-1) * jnp.linalg.norm(skip, axis=-1)
    cosine = (base * skip).sum(-1) / jnp.maximum(lengths, 1e-30)
    return jnp.stack([jnp.where(is_image, a, 0).sum() for a in (share, cosine, is_image)])
