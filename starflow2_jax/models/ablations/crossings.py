"""The Pretzel with several crossings (ablation): both stacks are cut into groups that run in turn.

    VLM group 1 -> deep group 1 -> VLM group 2 -> deep group 2 -> ... -> heads

The first crossing is the paper's: W_txt y at text, W_in (u + W_vlm y) at patches. Every later one
adds a projection, initially zero, of one stream's states, after its final norm, to the other's.

Shapes: B rows, T positions, V width of the VLM, C width of the flow, G groups.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models import backbone, flow, layers, qwen, starflow2
from starflow2_jax.models.backbone import BackboneInputs, BackboneOutputs
from starflow2_jax.models.layers import KVCache, linear
from starflow2_jax.models.starflow2 import PretzelConfig
from starflow2_jax.params import ParamSpec, Tree, zeros


@dataclass(frozen=True)
class CrossingsConfig(PretzelConfig):
    """A Pretzel whose stacks are cut into `crossings` groups; one group is the paper's model."""

    crossings: int = 1

    kind = "crossings"

    def __post_init__(self):
        super().__post_init__()
        limit = min(self.vlm.layers, self.deep.depth)
        if not 1 <= self.crossings <= limit:
            raise ValueError(f"model.crossings={self.crossings} must be from 1 to {limit} groups")
        if self.crossings > 1 and set(self.skips) != {"vlm", "deep"}:
            raise ValueError(f"model.crossings={self.crossings} needs both skips: {self.skips}")

    def declare(self) -> dict[str, Any]:
        """Declare the Pretzel's parameters, and in `skip` the later crossings."""
        tree = starflow2.declare(self)
        if self.crossings > 1:
            count, vlm_width, width = self.crossings - 1, self.vlm.width, self.deep.layer.width
            axes = ("layers", "embed", "text")
            into_deep = ParamSpec((count, vlm_width, width), axes, zeros)
            into_vlm = ParamSpec((count, width, vlm_width), axes, zeros)
            tree["skip"] |= {"into_deep": {"weight": into_deep}, "into_vlm": {"weight": into_vlm}}
        return tree

    def forward(self, params: Tree, inputs: BackboneInputs, **options: Any) -> BackboneOutputs:
        """Apply both streams; one group, or the VLM alone, is the Pretzel's forward."""
        if self.crossings == 1 or not options.get("with_flow", True):
            return starflow2.forward(params, inputs, self, **options)
        options.pop("with_flow", None)
        return forward(params, inputs, self, **options)


def layer_groups(num_layers: int, count: int) -> list[tuple[int, int]]:
    """Return (first, end) layers of each of `count` groups of a stack, the larger groups first."""
    groups = np.array_split(np.arange(num_layers), count)
    return [(int(group[0]), int(group[-1]) + 1) for group in groups]


def forward(
    params: Tree,
    inputs: BackboneInputs,
    cfg: CrossingsConfig,
    *,
    caches: tuple[KVCache, ...] | None = None,
    with_skips: bool = True,
) -> BackboneOutputs:
    """Apply the groups of both streams in turn; arguments as in `BackboneConfig.forward`."""
    g = starflow2.vlm_inputs(params, inputs, cfg)
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    tables = qwen.rope_tables(inputs.positions, cfg.vlm, dtype)
    vlm_groups = layer_groups(cfg.vlm.layers, cfg.crossings)
    deep_groups = layer_groups(cfg.deep.depth, cfg.crossings)
    h = y = None
    vlm_caches, flow_caches = [], []
    for number, (vlm_group, deep_group) in enumerate(zip(vlm_groups, deep_groups)):
        g, vlm_cache = layers.apply_layers(
            _select_layers(params["vlm"]["layers"], *vlm_group),
            g,
            cfg.vlm.layer,
            tables,
            inputs.mask,
            remat=cfg.vlm.remat,
            segments=inputs.segments,
            cache=_select_cache(caches[0], *vlm_group) if caches else None,
        )
        y = qwen.final_norm(params["vlm"], g, cfg.vlm)
        if number == 0:
            h, _ = starflow2.flow_inputs(params, y, inputs, cfg, with_skips=with_skips)
        elif with_skips:
            h = h + linear(_select(params["skip"]["into_deep"], number - 1), y).astype(h.dtype)
        h, flow_cache = flow.apply_layers(
            {"layers": _select_layers(params["deep"]["layers"], *deep_group)},
            h,
            cfg.deep,
            backbone.flow_positions(inputs, cfg.flow),
            inputs.mask,
            segments=inputs.segments,
            cache=_select_cache(caches[1], *deep_group) if caches else None,
        )
        if with_skips and number + 1 < cfg.crossings:
            states = layers.rms_norm(params["deep"]["final_norm"], h) if cfg.flow.final_norm else h
            g = g + linear(_select(params["skip"]["into_vlm"], number), states).astype(g.dtype)
        vlm_caches.append(vlm_cache)
        flow_caches.append(flow_cache)
    caches = (_join_caches(vlm_caches), _join_caches(flow_caches)) if caches else None
    return BackboneOutputs(y, h, caches=caches)


def _select_layers(stack: Any, first: int, end: int) -> Any:
    """Return some layers of a stack, stacked or (see `layers.unstack`) not."""
    if isinstance(stack, tuple):
        return stack[first:end]
    return jax.tree.map(lambda w: w[first:end], stack)


def _select(stacked: Tree, number: int) -> Tree:
    return jax.tree.map(lambda w: w[number], stacked)


def _select_cache(cache: KVCache, first: int, end: int) -> KVCache:
    return KVCache(cache.keys[first:end], cache.values[first:end], cache.length)


def _join_caches(caches: list[KVCache]) -> KVCache:
    keys = sum((cache.keys for cache in caches), ())
    values = sum((cache.values for cache in caches), ())
    return KVCache(keys, values, caches[0].length)
