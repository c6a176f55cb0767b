"""Configurations of earlier versions: keys that were renamed or added since."""

from collections.abc import Mapping
from typing import Any

from starflow2_jax.config.keys import KEYS

# Old key -> current key, for runs and model folders written before the key was renamed.
RENAMED = {
    "data.blank": "data.blank_images",
    "distributed.probe": "distributed.rendezvous_timeout",
    "drop.all": "cfg_dropout.all",
    "drop.condition": "cfg_dropout.text",
    "eval_data.blank": "eval_data.blank_images",
    "fae.reconstructed": "fae.train_on_decoded_features",
    "image.layout": "image.channel_order",
    "sample.rule": "sample.guidance_rule",
    "text.chunk": "text.logit_chunk",
    "text.targets": "text.max_targets",
    "train.trains": "train.trainable",
    "vlm.language": "vlm.text_loss_weight",
    "vlm.reconstruction": "vlm.pixel_loss_weight",
    "vlm.tower": "vlm.train_tower",
    "vlm.words": "vlm.region_loss_weight",
}

# Keys that configurations of earlier versions lack: with its default, a run is what it was before
# the key existed.
ADDED = (
    "data.packing", "data.processes", "data.skip_long",
    "eval_data.packing", "eval_data.processes", "eval_data.skip_long",
    "fae.gradient", "frozen_layout", "noise.context_sigma", "sample.spread", "teacher.tower",
    "text.vlm_positions",
)  # fmt: skip


def upgrade(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a stored nested configuration with `RENAMED` keys under their new names.

    An experiment, and groups that exist in any mapping, get the defaults of missing `ADDED` keys.
    """
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in cfg.items()}
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        if isinstance(result.get(group), dict) and name in result[group]:
            new_group, _, new_name = new.rpartition(".")
            value = result[group].pop(name)
            result.setdefault(new_group, {}).setdefault(new_name, value)
            if not result[group]:
                del result[group]
    for added in ADDED:
        group, _, name = added.rpartition(".")
        target = result.get(group) if group else result
        if isinstance(target, dict) and (group or "layout" in result):
            target.setdefault(name, KEYS[added].default)
    return result
