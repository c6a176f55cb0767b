"""Published sizes of Qwen2.5-VL beyond those that the package has as presets."""

import dataclasses

from starflow2_jax.models import qwen


def _with_larger_tower(**sizes):
    cfg = qwen.qwen2_5_vl_7b()
    tower = dataclasses.replace(cfg.vision, mlp_width=3456, out_width=sizes["width"])
    return dataclasses.replace(cfg, vision=tower, vocab=152064, kv_heads=8, **sizes)


def qwen2_5_vl_32b():
    """Return the configuration of the published 32B model."""
    return _with_larger_tower(width=5120, layers=64, heads=40, mlp_width=27648)


def qwen2_5_vl_72b():
    """Return the configuration of the published 72B model."""
    return _with_larger_tower(width=8192, layers=80, heads=64, mlp_width=29568)
