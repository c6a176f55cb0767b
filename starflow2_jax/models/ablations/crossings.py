"""The Pretzel with several crossings (ablation): both stacks are cut into groups that run in turn.

    VLM group 1 -> deep group 1 -> VLM group 2 -> deep group 2 -> ... -> heads

The first crossing is the paper's: W_txt y at text, W_in (u + W_vlm y) at patches. Those behind it
add a projection of the one stream's states to the other's, at text and patches alike; they are zero
at birth, as the skips are, so that the text of a model just born is the frozen VLM's.
What crosses has passed the final norm of its own stream, whatever group it comes from.

Axes: B rows, T positions, D latent channels, V width of the VLM, C width of the flow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models import flow, layers, qwen, starflow2 as pretzel
from starflow2_jax.models.layers import KVCache, linear
from starflow2_jax.models.starflow2 import Config
from starflow2_jax.params import Tree


def groups(depth: int, count: int) -> list[tuple[int, int]]:
    """First layer and end of each of `count` groups of a stack, the larger ones first."""
    parts = np.array_split(np.arange(depth), count)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def states(
    params: Tree,
    text: jax.Array,
    u: jax.Array,
    eyes: jax.Array | None,
    is_image: jax.Array,
    positions: Any,
    following: Any,
    mask: jax.Array | None,
    cfg: Config,
    *,
    segments: jax.Array | None = None,
    skips: bool = True,
    caches: tuple[KVCache, KVCache] | None = None,
    heat: Any = 1.0,
) -> tuple[jax.Array, jax.Array, tuple[KVCache, KVCache] | None]:
    """y [B, T, V] and h [B, T, C] of both streams, and their caches; as `streams.states`.

    Args:
        text: token embeddings [B, T, V].
    """
    g = pretzel.vlm_input(params, text, eyes, is_image, cfg)
    at = qwen.tables(positions, cfg.vlm, jnp.promote_types(g.dtype, jnp.float32))
    deep_at = pretzel.deep_positions(following, cfg)
    cuts = zip(groups(cfg.vlm.layers, cfg.crossings), groups(cfg.deep.depth, cfg.crossings))
    h = y = None
    held = []
    for number, (of_vlm, of_deep) in enumerate(cuts):
        own = _group(params["vlm"]["layers"], *of_vlm)
        if caches is None:
            args = (own, g, cfg.vlm.layer, at, mask)
            g = layers.run_layers(*args, remat=cfg.vlm.remat, segments=segments)
        else:
            cache = _part(caches[0], *of_vlm)
            g, seen = layers.run_layers_cached(own, g, cfg.vlm.layer, at, mask, cache)
        y = qwen.final_norm(params["vlm"], g, cfg.vlm)
        if number == 0:
            h = pretzel.deep_input(params, y, u, is_image, cfg, skips=skips)
        elif skips:
            h = h + linear(_of(params["skip"]["into_deep"], number - 1), y).astype(h.dtype)
        own = {"layers": _group(params["deep"]["layers"], *of_deep)}
        cache = None if caches is None else _part(caches[1], *of_deep)
        h = flow.stack(own, h, deep_at, mask, cfg.deep, cache, heat, segments)
        if caches is not None:
            h, drawn = h
            held.append((seen, drawn))
        if skips and number + 1 < cfg.crossings:
            back = layers.rms_norm(params["deep"]["final_norm"], h) if cfg.flow.final_norm else h
            g = g + linear(_of(params["skip"]["into_vlm"], number), back).astype(g.dtype)
    return y, h, None if caches is None else tuple(map(_joined, zip(*held)))


def _group(stack: Any, first: int, end: int) -> Any:
    """Some layers of a stack, stacked or (see `layers.unstack`) not."""
    if isinstance(stack, tuple):
        return stack[first:end]
    return jax.tree.map(lambda w: w[first:end], stack)


def _of(stacked: Tree, number: int) -> Tree:
    return jax.tree.map(lambda w: w[number], stacked)


def _part(cache: KVCache, first: int, end: int) -> KVCache:
    return KVCache(cache.keys[first:end], cache.values[first:end], cache.length)


def _joined(parts: Any) -> KVCache:
    keys, values = (sum((getattr(p, n) for p in parts), ()) for n in ("keys", "values"))
    return KVCache(keys, values, parts[0].length)
