"""What runs over an interleaved row: the Pretzel, with one crossing or several, or its rival.

Training and decoding call these, whatever the model is. Heads, shallow flow and text states are
those of `models.starflow2` for all of them.

Axes: B rows, T positions, D latent channels, V width of the VLM, C of the flow.
"""

from typing import Any

import jax

from starflow2_jax.models import layers, qwen, starflow2 as pretzel
from starflow2_jax.models.ablations import crossings, mot
from starflow2_jax.models.layers import KVCache
from starflow2_jax.params import Tree

Config = pretzel.Config | mot.Config


def declare(cfg: Config) -> dict[str, Any]:
    """Every weight, in subtrees: `vlm`, and some of `starflow2.SUBTREES`."""
    return mot.declare(cfg) if isinstance(cfg, mot.Config) else pretzel.declare(cfg)


def states(
    params: Tree,
    ids: jax.Array,
    u: jax.Array,
    eyes: jax.Array | None,
    is_image: jax.Array,
    positions: Any,
    following: Any,
    mask: jax.Array | None,
    cfg: Config,
    *,
    segments: jax.Array | None = None,
    images: bool = True,
    skips: bool = True,
    caches: tuple[KVCache, ...] | None = None,
    heat: Any = 1.0,
) -> tuple[jax.Array, jax.Array | None, tuple[KVCache, ...] | None]:
    """y [B, T, V], which the VLM's head reads but for W_D h; h [B, T, C], which the image head
    reads; and the caches where some were given.

    Args:
        params: with caches as `unstack` lays them out.
        ids: int [B, T]; u: [B, T, D] as `starflow2.place` gives it; eyes: the same for the adapter,
            None where it is off; is_image: bool [B, T].
        positions: int [B, T, 3] of the VLM; following: (row, column, k) [B, T, 3] of the items to
            predict; mask, segments: as in `layers.attention`.
        images: False leaves the deep flow out, and h is None; skips: False leaves the crossings
            out, which is exact while they are zero. A mixture of transformers heeds neither.
        heat: temperature of the deep flow's attention, of a mixture's one attention.
    """
    text = qwen.embed(params["vlm"], ids, cfg.vlm)
    if isinstance(cfg, mot.Config):
        begins = (ids == cfg.vlm.vision_start_token) & ~is_image
        args = (params, text, u, begins, is_image, positions, following, mask, cfg)
        options = {"segments": segments, "heat": heat}
        y, h, cache = mot.states(*args, cache=caches and caches[0], **options)
        return y, h, caches and (cache,)
    if cfg.crossings > 1 and images:
        args = (params, text, u, eyes, is_image, positions, following, mask, cfg)
        options = {"segments": segments, "skips": skips, "caches": caches}
        return crossings.states(*args, heat=heat, **options)
    vlm, deep = caches or (None, None)
    h = pretzel.vlm_input(params, text, eyes, is_image, cfg)
    y = pretzel.vlm_states(params, h, positions, mask, cfg, vlm, segments)
    if caches:
        y, vlm = y
    if not images:
        return y, None, caches and (vlm, deep)
    h = pretzel.deep_input(params, y, u, is_image, cfg, skips=skips)
    at = pretzel.deep_positions(following, cfg)
    h = pretzel.deep_states(params, h, at, mask, cfg, deep, segments, heat)
    if caches:
        h, deep = h
    return y, h, caches and (vlm, deep)


def empty_caches(cfg: Config, rows: int, size: int, dtypes: tuple[Any, Any]) -> tuple[KVCache, ...]:
    """Caches of `size` positions for the VLM and the deep flow, of these dtypes; or a mixture's."""
    vlm = qwen.empty_cache(cfg.vlm, rows, size, dtypes[0])
    if isinstance(cfg, mot.Config):
        return (vlm,)
    return vlm, layers.empty_cache(cfg.deep.layer, cfg.deep.depth, rows, size, dtypes[1])


def unstack(params: Tree, cfg: Config) -> dict[str, Any]:
    """params as cached steps take them."""
    return mot.unstack(params, cfg) if isinstance(cfg, mot.Config) else pretzel.unstack(params, cfg)
