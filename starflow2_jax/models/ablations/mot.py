"""A mixture of transformers (ablation): the alternative to the Pretzel, with a flow as its expert.

As in BAGEL (arXiv 2505.14683, section 2), every layer has two sets of parameters and one attention
over the whole row: the VLM's parameters, frozen or trained, for text, the expert's for images. The
expert predicts u, patch by patch, behind shallow blocks like the Pretzel's. The text reads images
through the expert's keys and values; there is no adapter and no skip.

Three choices avoid a handicap. The expert's width may differ from the VLM's (attention only needs
equal heads), so that both models train equally many parameters. The expert also reads
`<|vision_start|>`, which predicts the first patch, as a vector of its own (BAGEL's predicts a patch
at that patch). Each input of the expert carries the position of the patch it predicts.

Shapes: B rows, T positions, D latent channels, N patches, V width of the VLM, C of the expert.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from starflow2_jax.models import backbone, flow, layers, qwen, starflow2
from starflow2_jax.models.backbone import BackboneInputs, BackboneOutputs
from starflow2_jax.models.flow import BlockConfig, FlowConfig
from starflow2_jax.models.layers import KVCache, LayerConfig, linear
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.starflow2 import PretzelConfig
from starflow2_jax.params import ParamSpec, Tree, normal, zeros

# Widths of the expert at which as many parameters are trained as in the Pretzel of that name.
WIDTHS = {"tiny": 232, "small": 400, "paper": 2240}


@dataclass(frozen=True)
class MoTConfig:
    """The VLM, the shallow flow, and the sizes of the expert."""

    vlm: QwenConfig
    # The Pretzel's shallow blocks and, for its deep block, which the expert replaces, no layers
    flow: FlowConfig
    width: int  # C of the expert, which has the VLM's heads and number of layers
    mlp_width: int  # hidden channels of the expert's MLPs

    kind = "mot"
    # The text reads images through the expert, so every subtree serves both.
    image_subtrees = text_subtrees = frozenset({"vlm", "shallow", "deep"})
    skips = ()

    def __post_init__(self):
        object.__setattr__(self, "vlm", dataclasses.replace(self.vlm, vision=None))
        if self.flow.layers[-1]:
            raise ValueError(f"model.flow.layers={self.flow.layers}: the last number must be 0")
        if self.flow.positions != "rope" or self.flow.classes:
            raise ValueError("model.flow: expected positions='rope' and classes=0")

    @property
    def layer(self) -> LayerConfig:
        """One layer of the expert."""
        return dataclasses.replace(self.vlm.layer, width=self.width, mlp_width=self.mlp_width)

    @property
    def deep(self) -> BlockConfig:
        """Options of the expert's head."""
        return self.flow.block(-1)

    @property
    def num_patches(self) -> int:
        """Number of patches N of an image."""
        return self.flow.tokens

    @property
    def stacks(self) -> tuple[tuple[LayerConfig, int], ...]:
        """The one stack: keys and values of both sets of parameters share a cache."""
        return ((self.vlm.layer, self.vlm.layers),)

    def declare(self) -> dict[str, Any]:
        """Declare every parameter (see the function `declare`)."""
        return declare(self)

    def forward(self, params: Tree, inputs: BackboneInputs, **options: Any) -> BackboneOutputs:
        """Apply the mixture (see the function `forward`), always with its flow; it has no skips."""
        options = {n: v for n, v in options.items() if n not in ("with_flow", "with_skips")}
        return forward(params, inputs, self, **options)


def matching(cfg: PretzelConfig, width: int) -> MoTConfig:
    """Return the mixture with a Pretzel's VLM and shallow blocks, and an expert of `width`.

    The expert's MLPs are wider than `width` by the VLM's factor, in steps of eight.
    """
    shallow = dataclasses.replace(cfg.flow, layers=(*cfg.flow.layers[:-1], 0))
    mlp_width = 8 * round(width * cfg.vlm.mlp_width / cfg.vlm.width / 8)
    return MoTConfig(cfg.vlm, shallow, width, mlp_width)


def preset(name: str) -> MoTConfig:
    """Return the mixture that matches the Pretzel of that name."""
    return matching(starflow2.preset(name), WIDTHS[name])


def declare(cfg: MoTConfig) -> dict[str, Any]:
    """Declare every parameter, in the subtrees `vlm`, `shallow`, and `deep`, the expert."""
    channels, width = cfg.flow.channels, cfg.width
    expert: dict[str, Any] = {
        "proj_in": layers.declare_linear(channels, width, (None, "embed")),
        "start": ParamSpec((width,), ("embed",), normal(1.0)),
        "place": ParamSpec((cfg.num_patches, width), (None, "embed"), normal(1e-2)),
        "layers": layers.declare(cfg.layer, cfg.vlm.layers),
        "proj_out": layers.declare_linear(width, 2 * channels, ("embed", None), zeros),
    }
    if cfg.flow.final_norm:
        expert["final_norm"] = layers.declare_norm("rms_norm_offset", (width,), ("embed",))
    shallow = flow.declare(cfg.flow)["blocks"]
    return {"vlm": qwen.declare(cfg.vlm), "shallow": shallow, "deep": expert}


def forward(
    params: Tree,
    inputs: BackboneInputs,
    cfg: MoTConfig,
    *,
    caches: tuple[KVCache, ...] | None = None,
) -> BackboneOutputs:
    """Apply the mixture to interleaved rows; arguments as in `BackboneConfig.forward`.

    The VLM states are meaningful at text, the flow states at `<|vision_start|>` and patches.
    """
    expert, is_image = params["deep"], inputs.is_image
    g = backbone.text_embeddings(params, inputs, cfg.vlm)
    by_expert = ((inputs.ids == cfg.vlm.vision_start_token) & ~is_image) | is_image
    h = linear(expert["proj_in"], inputs.latents.astype(g.dtype))
    h = jnp.where(is_image[..., None], h, expert["start"].astype(h.dtype))
    next_patch = inputs.next_positions[..., 0] * cfg.flow.side + inputs.next_positions[..., 1]
    h = h + expert["place"].astype(h.dtype)[next_patch]
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    tables = qwen.rope_tables(inputs.positions, cfg.vlm, dtype)

    def layer(states, layer_params, layer_cache):
        (g, h), (vlm_params, expert_params) = states, layer_params
        vlm_qkv = layers.project_qkv(vlm_params, g, cfg.vlm.layer, tables)
        expert_qkv = layers.project_qkv(expert_params, h, cfg.layer, tables)
        select = by_expert[:, None, :, None]
        q, k, v = (jnp.where(select, e, t) for t, e in zip(vlm_qkv, expert_qkv))
        attended, keys_values = layers.self_attention(
            (q, k, v),
            cfg.vlm.layer,
            inputs.mask,
            layer_cache=layer_cache,
            segments=inputs.segments,
        )
        g = layers.add_attention_and_mlp(vlm_params, g, attended, cfg.vlm.layer)
        h = layers.add_attention_and_mlp(expert_params, h, attended, cfg.layer)
        return (g, h), keys_values

    stacks = (params["vlm"]["layers"], expert["layers"])
    cache = caches[0] if caches else None
    pairs = zip(*stacks) if caches else stacks
    specs = (layers.declare(cfg.vlm.layer, 1), layers.declare(cfg.layer, 1))
    (g, h), cache = layers.run_layers(layer, (g, h), pairs, cfg.vlm.remat, cache, specs)
    y = qwen.final_norm(params["vlm"], g, cfg.vlm)
    return BackboneOutputs(y, h, caches=None if cache is None else (cache,))
