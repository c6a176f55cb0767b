"""The Pretzel of STARFlow2 (arXiv 2605.08029, section 3.1): a frozen VLM, a flow, and two skips.

The VLM and the flow read one causal sequence of text tokens and image patches, and both predict the
*next* item:

    u = shallow flow(x), each image by itself
    y = VLM(text: token embedding; patch: adapter(u))
    h = deep flow(text: W_txt y; patch: W_in (u + W_vlm y))
    next patch: Gaussian(mean(h), scale(h));   next token: softmax(VLM's head(y + W_D h))

`forward` serves whole rows and, with caches, one item at a time.

Shapes: B rows, T positions, at most M images per row, N patches of an image, D latent channels, V
width of the VLM, C width of the flow, I images.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import backbone, flow, layers, qwen
from starflow2_jax.models.backbone import BackboneConfig, BackboneInputs, BackboneOutputs
from starflow2_jax.models.flow import BlockConfig, Conditioning, FlowConfig
from starflow2_jax.models.layers import KVCache, LayerConfig, at_least_float32, linear
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.params import ParamSpec, Tree, normal, zeros

# The subtrees that every checkpoint contains, whether or not the stage trains them.
SUBTREES = ("adapter", "shallow", "deep", "skip")
# Positions of the presets' flows: with them a flow learns to copy soonest (docs/method.md).
POSITIONS: dict[str, Any] = {"rope_frequencies": "grid", "key_positions": "own"}


@dataclass(frozen=True)
class PretzelConfig:
    """The two streams and the connections between them."""

    vlm: QwenConfig  #: the language model, without its vision tower
    #: The shallow blocks and, last, the deep block, with `start="prefix"`, in raster order
    flow: FlowConfig
    adapter: str = "mlp"  #: `mlp` (two linears with a GELU between them) or `linear`, from D to V
    adapter_width: int = 0  #: hidden channels of the MLP, 0 for V
    #: Standard deviation of the last layer's initial weights; 0 starts the adapter at zero
    adapter_std: float = 0.0
    #: The skip connections in use, among `vlm` (W_vlm) and `deep` (W_D)
    skips: tuple[str, ...] = ("vlm", "deep")
    #: Where W_vlm y is added: to the `latent` channels before W_in (paper) or at `width` after it
    skip_into: str = "latent"

    kind = "pretzel"
    # The adapter and the VLM serve the text, the flows serve the images, the skips serve both.
    image_subtrees = frozenset({"shallow", "deep", "skip"})
    text_subtrees = frozenset({"adapter", "skip", "vlm"})

    def __post_init__(self):
        object.__setattr__(self, "skips", tuple(self.skips))
        object.__setattr__(self, "vlm", dataclasses.replace(self.vlm, vision=None))
        for field, allowed in (("adapter", ("mlp", "linear")), ("skip_into", ("latent", "width"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field}={getattr(self, field)!r} is not one of {allowed}")
        unknown = [name for name in self.skips if name not in ("vlm", "deep")]
        if unknown:
            raise ValueError(f"model.skips: {unknown[0]!r} is not one of ('vlm', 'deep')")
        if self.flow.text_channels != self.vlm.width:
            channels, width = self.flow.text_channels, self.vlm.width
            raise ValueError(f"model.flow.text_channels={channels} is not the VLM's width {width}")
        if self.flow.start != "prefix" or self.flow.text_blocks != "deep" or self.flow.classes:
            raise ValueError(
                "model.flow: expected start='prefix', text_blocks='deep' and classes=0, got "
                f"{self.flow.start!r}, {self.flow.text_blocks!r}, {self.flow.classes}"
            )
        if self.flow.positions != "rope":
            raise ValueError("model.flow.positions must be 'rope': a row contains several images")
        if self.deep.reverse:
            raise ValueError(
                f"model.flow.order={self.flow.order!r} with {len(self.flow.layers)} blocks reads "
                "the deep block backwards, but the VLM reads forwards"
            )
        if self.deep.depth == 0:
            raise ValueError("model.flow.layers: the deep block has no layers")

    @property
    def deep(self) -> BlockConfig:
        """The deep block."""
        return self.flow.block(-1)

    @property
    def num_patches(self) -> int:
        """Number of patches N of an image."""
        return self.flow.tokens

    @property
    def stacks(self) -> tuple[tuple[LayerConfig, int], ...]:
        """(layer config, number of layers) of the VLM and of the deep flow."""
        return (self.vlm.layer, self.vlm.layers), (self.deep.layer, self.deep.depth)

    def declare(self) -> dict[str, Any]:
        """Declare every parameter (see the function `declare`)."""
        return declare(self)

    def forward(self, params: Tree, inputs: BackboneInputs, **options: Any) -> BackboneOutputs:
        """Apply both streams (see the function `forward`)."""
        return forward(params, inputs, self, **options)


def flow_defaults(vlm_width: int, num_blocks: int) -> dict[str, Any]:
    """Return the options, without sizes, of a flow behind a VLM: the released STARFlow's."""
    return {
        "start": "prefix",
        # Whether the number of blocks is odd or even, the deep block reads in raster order.
        "order": "R2L" if num_blocks % 2 else "L2R",
        "soft_clip": 4.0,
        "final_norm": True,
        "text_channels": vlm_width,
        # Rows are of any length; any value but 0 gives positions a third coordinate.
        "text_length": 1,
    }


def flow_config(vlm_width: int, **sizes: Any) -> FlowConfig:
    """Return a flow behind a VLM; `sizes` must give side, channels, width and layers."""
    return FlowConfig(**{**flow_defaults(vlm_width, len(sizes["layers"])), **sizes})


def tiny(**changes: Any) -> PretzelConfig:
    """Return a model for a CPU: 64-pixel images as 8x8x16 latents; 3.2 M + 0.9 M parameters."""
    vlm = QwenConfig(
        vocab=640,
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        mlp_width=384,
        # Columns rotate slowest. They have so many pairs that the first still separates eight
        # columns, while the last, which hardly rotate, match text with image content.
        sections=(1, 3, 12),
        rope_base=1e4,
        tied=True,
        image_token=5,
        video_token=6,
        vision_start_token=3,
        vision_end_token=4,
    )
    flow_cfg = flow_config(
        vlm.width, side=8, channels=16, width=192, head_dim=32, layers=(1, 1, 5), **POSITIONS
    )
    return dataclasses.replace(PretzelConfig(vlm, flow_cfg), **changes)


def small(**changes: Any) -> PretzelConfig:
    """Return a model for a few accelerators: Qwen2.5-VL-3B and a flow of 0.2 B parameters."""
    vlm = qwen.qwen2_5_vl_3b(vision=None)
    flow_cfg = flow_config(
        vlm.width, side=16, channels=32, width=1024, layers=(2, 2, 12), **POSITIONS
    )
    return dataclasses.replace(PretzelConfig(vlm, flow_cfg), **changes)


def paper(**changes: Any) -> PretzelConfig:
    """Return the paper's model (arXiv 2605.08029, section 4).

    Qwen2.5-VL-7B; 2 shallow blocks of 4 layers, 24 deep layers, width 3072, 48 heads of 64. The
    flow's 32 layers have 3,625,156,608 parameters; stage 1 trains 3,637,073,152, stage 3
    3,661,164,800.
    """
    vlm = qwen.qwen2_5_vl_7b(vision=None)
    flow_cfg = flow_config(
        vlm.width, side=16, channels=32, width=3072, layers=(4, 4, 24), **POSITIONS
    )
    return dataclasses.replace(PretzelConfig(vlm, flow_cfg), **changes)


PRESETS: dict[str, Callable[..., PretzelConfig]] = {"tiny": tiny, "small": small, "paper": paper}


def preset(name: str, **changes: Any) -> PretzelConfig:
    """Return a preset by its name, with changes."""
    if name not in PRESETS:
        raise ValueError(f"starflow2: preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name](**changes)


def options(cfg: BackboneConfig) -> dict[str, Any]:
    """Return a model's config as the `model` group of an experiment.

    Fields that follow from the VLM and the number of blocks are left out, so that both can change.
    """
    group = dataclasses.asdict(cfg)  # type: ignore[call-overload]
    for name in ("order", "text_channels", "text_length", "compute_dtype"):
        del group["flow"][name]
    del group["vlm"]["vision"], group["vlm"]["compute_dtype"]
    return group if cfg.kind == "pretzel" else {"kind": cfg.kind, **group}


def declare(cfg: PretzelConfig) -> dict[str, Any]:
    """Declare every parameter, in the subtrees `vlm`, `adapter`, `shallow`, `deep`, `skip`."""
    blocks = flow.declare(cfg.flow)["blocks"]
    deep = blocks.pop(str(len(cfg.flow.layers) - 1))
    tree = {"vlm": qwen.declare(cfg.vlm), "adapter": _declare_adapter(cfg)}
    tree |= {"shallow": blocks, "deep": deep}
    skip = _declare_skips(cfg)
    return {**tree, "skip": skip} if skip else tree


def _declare_adapter(cfg: PretzelConfig) -> dict[str, Any]:
    vlm_width, channels = cfg.vlm.width, cfg.flow.channels
    init = normal(cfg.adapter_std) if cfg.adapter_std else zeros
    if cfg.adapter == "linear":
        return {"down": layers.declare_linear(channels, vlm_width, (None, "embed"), init)}
    hidden = cfg.adapter_width or vlm_width
    return {
        "up": layers.declare_linear(channels, hidden, (None, "mlp")),
        "down": layers.declare_linear(hidden, vlm_width, ("mlp", "embed"), init),
    }


def _declare_skips(cfg: PretzelConfig) -> dict[str, Any]:
    vlm_width, width = cfg.vlm.width, cfg.deep.layer.width
    into, axis = (cfg.flow.channels, None) if cfg.skip_into == "latent" else (width, "text")
    skips = {
        "vlm": {"weight": ParamSpec((vlm_width, into), ("embed", axis), zeros)},
        "deep": {"weight": ParamSpec((width, vlm_width), ("embed", "text"), zeros)},
    }
    return {name: skips[name] for name in cfg.skips}


def shallow_forward(
    params: Tree, x: jax.Array, cfg: BackboneConfig
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Apply the shallow blocks to latents x [I, N, D] of images, in at least float32.

    Returns:
        The tokens [I, N, D] before each block and after the last, which is u, in raster order; the
        log_det [I] of each block in nats.
    """
    num_shallow = len(cfg.flow.layers) - 1
    return flow.apply_blocks(params["shallow"], x, cfg.flow, num_shallow, Conditioning())


def latents_at_positions(u: jax.Array, image: jax.Array) -> jax.Array:
    """Return the latents [B, T, D] of u [B, M, N, D] at every position, zeros at text.

    `image` int [B, T] is m N + n for patch n of image m, -1 for text.
    """
    patches = u.reshape(u.shape[0], -1, u.shape[-1])
    latents = jnp.take_along_axis(patches, jnp.maximum(image, 0)[..., None], 1)
    return jnp.where(image[..., None] >= 0, latents, 0)


def forward(
    params: Tree,
    inputs: BackboneInputs,
    cfg: PretzelConfig,
    *,
    caches: tuple[KVCache, ...] | None = None,
    with_flow: bool = True,
    with_skips: bool = True,
    vlm_states: jax.Array | None = None,
) -> BackboneOutputs:
    """Apply the VLM and then the deep flow to rows; arguments as in `BackboneConfig.forward`.

    The heads on the returned states are `image_head` and `text_states` with `text_logits`.

    Args:
        vlm_states: y [B, T, V], to apply the deep flow alone, without caches.
    """
    vlm_cache, flow_cache = caches or (None, None)
    y = vlm_states
    if y is None:
        y, vlm_cache = _apply_vlm(params, inputs, cfg, vlm_cache)
    h = ratio = None
    if with_flow:
        h, ratio = flow_inputs(params, y, inputs, cfg, with_skips=with_skips)
        h, flow_cache = flow.apply_layers(
            params["deep"],
            h,
            cfg.deep,
            backbone.flow_positions(inputs, cfg.flow),
            inputs.mask,
            segments=inputs.segments,
            cache=flow_cache,
        )
    caches = None if vlm_cache is None or flow_cache is None else (vlm_cache, flow_cache)
    return BackboneOutputs(y, h, vlm_skip_ratio=ratio, caches=caches)


def _apply_vlm(params, inputs, cfg, cache=None):
    """Return the VLM's states [B, T, V], and the extended cache."""
    return qwen.apply_layers(
        params["vlm"],
        vlm_inputs(params, inputs, cfg),
        cfg.vlm,
        inputs.positions,
        inputs.mask,
        segments=inputs.segments,
        cache=cache,
    )


def vlm_states_at(
    params: Tree, inputs: BackboneInputs, cfg: PretzelConfig, is_read: jax.Array, size: int
) -> jax.Array:
    """Return the VLM's states [B, T, V] of packed rows where they are read; any values elsewhere.

    The VLM is applied to `size` positions of each row. If a row reads more of them, it is applied
    to all positions of the batch.

    Args:
        inputs: with segments, without `text_embeddings`.
        is_read: bool [B, T], the first positions of each segment, so that none sees another one.
    """

    def gathered() -> jax.Array:
        index = jnp.argsort(~is_read, axis=1, stable=True)[:, :size]

        def at_index(a):
            return jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), 1)

        adapter_input = inputs.adapter_input
        fewer_inputs = dataclasses.replace(
            inputs,
            ids=at_index(inputs.ids),
            latents=None,
            adapter_input=None if adapter_input is None else at_index(adapter_input),
            is_image=at_index(inputs.is_image),
            positions=at_index(inputs.positions),
            next_positions=None,
            segments=jnp.where(at_index(is_read), at_index(inputs.segments), 0),
        )
        y, _ = _apply_vlm(params, fewer_inputs, cfg)
        place = jnp.clip(jnp.cumsum(is_read, 1) - 1, 0, size - 1)
        return jnp.where(is_read[..., None], jnp.take_along_axis(y, place[..., None], 1), 0)

    def complete() -> jax.Array:
        return _apply_vlm(params, inputs, cfg)[0]

    if size >= is_read.shape[1]:
        return complete()
    return jax.lax.cond((is_read.sum(1) > size).any(), complete, gathered)


def vlm_inputs(params: Tree, inputs: BackboneInputs, cfg: PretzelConfig) -> jax.Array:
    """Return the VLM's input [B, T, V]: token embeddings at text, adapter(u) at patches."""
    text = backbone.text_embeddings(params, inputs, cfg.vlm)
    patches = 0 if inputs.adapter_input is None else adapt(params, inputs.adapter_input, cfg)
    return jnp.where(inputs.is_image[..., None], patches, text).astype(text.dtype)


def adapt(params: Tree, u: jax.Array, cfg: PretzelConfig) -> jax.Array:
    """Map latents u [..., D] to the VLM's input [..., V], in the VLM's compute dtype."""
    h = u.astype(qwen.compute_dtype(params["vlm"], cfg.vlm))
    if cfg.adapter == "mlp":
        h = jax.nn.gelu(linear(params["adapter"]["up"], h), approximate=False)
    return linear(params["adapter"]["down"], h)


def flow_inputs(
    params: Tree, y: jax.Array, inputs: BackboneInputs, cfg: PretzelConfig, *, with_skips: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return the deep flow's input [B, T, C] from y [B, T, V], and the share of W_vlm y in it.

    The input is W_txt y at text and W_in (u + W_vlm y) at patches. The share [B, T] is None without
    a skip.
    """
    deep, u, ratio = params["deep"], inputs.latents, None
    skip = linear(params["skip"]["vlm"], y) if with_skips and "vlm" in cfg.skips else None
    if skip is not None and cfg.skip_into == "latent":
        ratio = skip_ratio(u, skip)
        u = u + skip.astype(u.dtype)
    patches = flow.embed_tokens(deep, u, cfg.deep)
    if skip is not None and cfg.skip_into == "width":
        ratio = skip_ratio(patches, skip)
        patches = patches + skip.astype(patches.dtype)
    text = flow.embed_text(deep, y, len(y), cfg.deep)
    return jnp.where(inputs.is_image[..., None], patches, text), ratio


def skip_ratio(base: jax.Array, skip: jax.Array) -> jax.Array:
    """Return `|skip| / (|base| + |skip|)` [...] of vectors [..., C], without a gradient."""

    def norm(a):
        return jnp.linalg.norm(at_least_float32(jax.lax.stop_gradient(a)), axis=-1)

    skip_norm, base_norm = norm(skip), norm(base)
    return skip_norm / jnp.maximum(skip_norm + base_norm, 1e-30)


def image_head(params: Tree, h: jax.Array, cfg: BackboneConfig) -> tuple[jax.Array, jax.Array]:
    """Return (scale, mean) [..., D] of the next patch's u in at least float32, from h [..., C]."""
    return flow.head(params["deep"], h, cfg.deep)


def flow_skip(
    params: Tree, h: jax.Array, cfg: BackboneConfig, *, into_flow: bool = True
) -> jax.Array:
    """Return W_D h [..., V] of flow states h [..., C], after the flow's final norm.

    `into_flow=False` stops the gradient at W_D.
    """
    if cfg.flow.final_norm:
        h = layers.rms_norm(params["deep"]["final_norm"], h)
    return linear(params["skip"]["deep"], h if into_flow else jax.lax.stop_gradient(h))


def flow_skip_ratio(
    params: Tree, y: jax.Array, h: jax.Array | None, cfg: BackboneConfig
) -> jax.Array | None:
    """Return the share [...] of W_D h in `text_states`, None without that skip."""
    if h is None or "deep" not in cfg.skips:
        return None
    return skip_ratio(y, flow_skip(params, h, cfg))


def text_states(
    params: Tree, y: jax.Array, h: jax.Array | None, cfg: BackboneConfig, *, into_flow: bool = True
) -> jax.Array:
    """Return y + W_D h, the input of the VLM's head, from states y [..., V] and h [..., C].

    `h` is None if the flow was left out, which is exact while W_D is zero.
    """
    if h is None or "deep" not in cfg.skips:
        return y
    return y + flow_skip(params, h, cfg, into_flow=into_flow).astype(y.dtype)


def text_logits(params: Tree, states: jax.Array, cfg: BackboneConfig) -> jax.Array:
    """Return the next token's logits [..., vocabulary] in at least float32, from `text_states`."""
    return qwen.logits(params["vlm"], states, cfg.vlm)
