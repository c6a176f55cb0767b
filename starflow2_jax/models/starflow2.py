"""STARFlow2, the Pretzel: a frozen VLM and a deep flow over one causal sequence of text and images.

Axes: B rows, T positions, M image places of a row, N patches of an image, D latent channels,
V width of the VLM, C width of the flow, I = B M images. A position holds an item: a text token or
a patch. Everything predicts the *next* item.

    x --shallow flow, each image alone--> u                                       (paper.md 1.3)
    token embedding, or adapter(u)  --VLM-->  y
    W_txt y, or W_in (u + W_vlm y)  --deep flow-->  h
    h --> next patch: Gaussian(mean, scale)        y + W_D h --> next token: the VLM's head

The same functions serve whole rows and, with caches, one item at a time.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import flow, layers, qwen
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.layers import KVCache, at_least_float32, linear
from starflow2_jax.params import ParamSpec, Tree, normal, zeros

# What every checkpoint holds, trained in its stage or not (design.md 7).
SUBTREES = ("adapter", "shallow", "deep", "skip")


@dataclass(frozen=True)
class Config:
    """The two streams and what joins them.

    Attributes:
        vlm: the language model; its tower is not used.
        flow: the shallow blocks and, last, the deep block, which is of start `prefix` and in raster
            order as the VLM is (see `flow_config`).
        adapter: `mlp` (two linears with a GELU between) or `linear`, from D to V.
        adapter_width: hidden channels of the MLP, 0 for V.
        adapter_std: of the last layer's first weights; 0 makes the adapter zero at birth.
        skips: which of `vlm` (W_vlm) and `deep` (W_D) there are.
        skip_into: where W_vlm y is added: to `latent` channels before W_in, or to the `width` after
            it (paper.md 10).
        crossings: into how many groups both stacks are cut (see
            `models.ablations.crossings`); 1 is the paper's Pretzel.
    """

    vlm: qwen.Config
    flow: FlowConfig
    adapter: str = "mlp"
    adapter_width: int = 0
    adapter_std: float = 0.0
    skips: tuple[str, ...] = ("vlm", "deep")
    skip_into: str = "latent"
    crossings: int = 1

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
            raise ValueError(
                f"model.flow.text_channels={self.flow.text_channels} is not the VLM's width "
                f"{self.vlm.width}"
            )
        if self.flow.start != "prefix" or self.flow.text_blocks != "deep" or self.flow.classes:
            raise ValueError(
                "model.flow: expected start='prefix', text_blocks='deep' and classes=0, got "
                f"{self.flow.start!r}, {self.flow.text_blocks!r}, {self.flow.classes}"
            )
        if self.flow.positions != "rope":
            raise ValueError("model.flow.positions must be 'rope': a row holds several images")
        if self.deep.reverse:
            raise ValueError(
                f"model.flow.order={self.flow.order!r} with {len(self.flow.layers)} blocks reads "
                "the deep block backwards; the VLM reads forwards"
            )
        if self.deep.depth == 0:
            raise ValueError("model.flow.layers: the deep block has no layers")
        most = min(self.vlm.layers, self.deep.depth)
        if not 1 <= self.crossings <= most:
            raise ValueError(f"model.crossings={self.crossings} must be from 1 to {most} groups")
        if self.crossings > 1 and set(self.skips) != {"vlm", "deep"}:
            raise ValueError(f"model.crossings={self.crossings} needs both skips: {self.skips}")

    @property
    def deep(self) -> flow.BlockConfig:
        """The deep block."""
        return self.flow.block(-1)

    @property
    def patches(self) -> int:
        """N."""
        return self.flow.tokens


def flow_defaults(vlm_width: int, blocks: int) -> dict[str, Any]:
    """Fields of a `FlowConfig` behind a VLM but for its sizes: STARFlow's released options."""
    return {
        "start": "prefix",
        # By either parity, the deep block of this many reads in raster order (paper.md 3.1).
        "order": "R2L" if blocks % 2 else "L2R",
        "soft_clip": 4.0,
        "final_norm": True,
        "text_channels": vlm_width,
        # Rows are of any length; what matters is that positions have a third coordinate.
        "text_length": 1,
    }


def flow_config(vlm_width: int, **sizes: Any) -> FlowConfig:
    """A flow behind a VLM: `flow_defaults` and its side, channels, width and layers at least."""
    return FlowConfig(**{**flow_defaults(vlm_width, len(sizes["layers"])), **sizes})


def tiny(**changes: Any) -> Config:
    """For a CPU: 64-pixel images as 8x8x16 latents; 2.2 M parameters beside a VLM of 0.9 M."""
    vlm = qwen.Config(
        vocab=640,
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        mlp_width=384,
        # Columns turn slowest: so many pairs that their first still tells eight columns apart, and
        # the last ones, which hardly turn, match words with what is seen.
        sections=(1, 3, 12),
        rope_base=1e4,
        tied=True,
        image_token=5,
        video_token=6,
        vision_start_token=3,
        vision_end_token=4,
    )
    sizes = {"side": 8, "channels": 16, "width": 160, "head_dim": 32, "layers": (1, 1, 5)}
    return dataclasses.replace(Config(vlm, flow_config(vlm.width, **sizes)), **changes)


def small(**changes: Any) -> Config:
    """For a few accelerators: Qwen2.5-VL-3B and a flow of 0.2 B on the paper's latents."""
    vlm = qwen.qwen2_5_vl_3b(vision=None)
    sizes = {"side": 16, "channels": 32, "width": 1024, "layers": (2, 2, 12)}
    return dataclasses.replace(Config(vlm, flow_config(vlm.width, **sizes)), **changes)


def paper(**changes: Any) -> Config:
    """Qwen2.5-VL-7B; 2 shallow blocks of 4 layers, 24 deep ones, width 3072, 48 heads of 64.

    The flow's 32 layers hold 3,625,156,608 parameters; stage 1 trains 3,637,073,152, stage 3
    3,661,164,800 (paper.md 1.2).
    """
    vlm = qwen.qwen2_5_vl_7b(vision=None)
    sizes = {"side": 16, "channels": 32, "width": 3072, "layers": (4, 4, 24)}
    return dataclasses.replace(Config(vlm, flow_config(vlm.width, **sizes)), **changes)


PRESETS: dict[str, Callable[..., Config]] = {"tiny": tiny, "small": small, "paper": paper}


def preset(name: str, **changes: Any) -> Config:
    """A preset by its name, with changes.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"starflow2: preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name](**changes)


def options(cfg: Config) -> dict[str, Any]:
    """An experiment's `model` group; what follows from the VLM and the number of blocks is left
    out, so that either can be changed alone."""
    group = dataclasses.asdict(cfg)
    for name in ("order", "text_channels", "text_length", "compute_dtype"):
        del group["flow"][name]
    del group["vlm"]["vision"], group["vlm"]["compute_dtype"]
    # What the paper does not have is not among the settings of its stages.
    if cfg.crossings == 1:
        del group["crossings"]
    return group


def declare(cfg: Config) -> dict[str, Any]:
    """Every weight, in the subtrees `vlm`, `adapter`, `shallow`, `deep`, `skip`."""
    blocks = flow.declare(cfg.flow)["blocks"]
    deep = blocks.pop(str(len(cfg.flow.layers) - 1))
    vlm, latent, width = cfg.vlm.width, cfg.flow.channels, cfg.deep.layer.width
    last = normal(cfg.adapter_std) if cfg.adapter_std else zeros
    hidden = cfg.adapter_width or vlm
    adapter: dict[str, Any] = {}
    if cfg.adapter == "mlp":
        adapter["up"] = {
            "weight": ParamSpec((latent, hidden), (None, "mlp")),
            "bias": ParamSpec((hidden,), ("mlp",), zeros),
        }
    inputs, axis = (hidden, "mlp") if adapter else (latent, None)
    adapter["down"] = {
        "weight": ParamSpec((inputs, vlm), (axis, "embed"), last),
        "bias": ParamSpec((vlm,), ("embed",), zeros),
    }
    into, axis = (latent, None) if cfg.skip_into == "latent" else (width, "text")
    skip = {
        "vlm": {"weight": ParamSpec((vlm, into), ("embed", axis), zeros)},
        "deep": {"weight": ParamSpec((width, vlm), ("embed", "text"), zeros)},
    }
    tree = {"vlm": qwen.declare(cfg.vlm), "adapter": adapter, "shallow": blocks, "deep": deep}
    kept: dict[str, Any] = {name: skip[name] for name in cfg.skips}
    if cfg.crossings > 1:
        more, axes = cfg.crossings - 1, ("layers", "embed", "text")
        kept["into_deep"] = {"weight": ParamSpec((more, vlm, width), axes, zeros)}
        kept["into_vlm"] = {"weight": ParamSpec((more, width, vlm), axes, zeros)}
    return {**tree, "skip": kept} if kept else tree


def flow_params(params: Tree) -> dict[str, Any]:
    """`shallow` and `deep` as the one flow that `models/flow.py` runs."""
    blocks = dict(params["shallow"])
    return {"blocks": {**blocks, str(len(blocks)): params["deep"]}}


# ---------------------------------------------------------------------------------- shallow flow


def shallow(params: Tree, x: jax.Array, cfg: Config) -> tuple[list[jax.Array], list[jax.Array]]:
    """The shallow blocks over images x [I, N, D], each alone.

    Returns:
        tokens [I, N, D] before each block and after the last, which is u, in raster order; the
        log_det [I] of each block in nats; both in at least float32.
    """
    grid = flow.check_grid(x.shape[1], None)
    outputs, log_dets = [at_least_float32(x)], []
    for i in range(len(cfg.flow.layers) - 1):
        block = cfg.flow.block(i)
        if block.depth == 0:
            outputs.append(outputs[-1])
            log_dets.append(jnp.zeros(x.shape[0], outputs[-1].dtype))
            continue
        args = (outputs[-1], block, None, None, grid)
        u, log_det = flow.block_forward(params["shallow"][str(i)], *args)
        outputs.append(u)
        log_dets.append(log_det)
    return outputs, log_dets


def place(u: jax.Array, image: jax.Array) -> jax.Array:
    """u [B, M, N, D] at the positions of its patches: [B, T, D], zeros at text.

    Args:
        image: int [B, T], m N + n of the patch that stands there, -1 for text.
    """
    flat = u.reshape(u.shape[0], -1, u.shape[-1])
    picked = jnp.take_along_axis(flat, jnp.maximum(image, 0)[..., None], 1)
    return jnp.where(image[..., None] >= 0, picked, 0)


# ------------------------------------------------------------------------------------ two streams


def deep_positions(positions: jax.Array, cfg: Config, grid: tuple[int, int] | None = None) -> Any:
    """(row, column, k) of items to predict, with rows and columns in units of the training grid.

    Args:
        positions: int [B, T, 3]; grid: (rows, columns) of the images, by default the training
            grid's, on which they are left as they are.
    """
    side = cfg.flow.side
    rows, columns = grid or (side, side)
    if rows * columns == side * side:
        return positions
    unit = side / (rows * columns) ** 0.5
    return positions * jnp.asarray([unit, unit, 1.0])


def adapt(params: Tree, u: jax.Array, cfg: Config) -> jax.Array:
    """The adapter: u [..., D] to the VLM's input [..., V], in the VLM's compute dtype."""
    h = u.astype(qwen.compute_dtype(params["vlm"], cfg.vlm))
    if cfg.adapter == "mlp":
        h = jax.nn.gelu(linear(params["adapter"]["up"], h), approximate=False)
    return linear(params["adapter"]["down"], h)


def vlm_input(
    params: Tree, text: jax.Array, u: jax.Array | None, is_image: jax.Array, cfg: Config
) -> jax.Array:
    """What the VLM reads [B, T, V].

    Args:
        text: token embeddings [B, T, V] (`qwen.embed`); u: [B, T, D] as `place` gives it, or None
            while there is no adapter, when patches are zeros; is_image: bool [B, T].
    """
    seen = 0 if u is None else adapt(params, u, cfg)
    return jnp.where(is_image[..., None], seen, text).astype(text.dtype)


def vlm_states(
    params: Tree,
    h: jax.Array,
    positions: Any,
    mask: jax.Array | None,
    cfg: Config,
    cache: KVCache | None = None,
    segments: jax.Array | None = None,
) -> Any:
    """y [B, T, V] after the VLM's final norm, or (y, cache); as `qwen.run`."""
    return qwen.run(params["vlm"], h, positions, mask, cfg.vlm, cache, segments)


def seen_skip(params: Tree, y: jax.Array, cfg: Config) -> jax.Array:
    """W_vlm y [B, T, D or C], what the VLM adds to the flow's patches."""
    return linear(params["skip"]["vlm"], y)


def deep_input(
    params: Tree,
    y: jax.Array,
    u: jax.Array,
    is_image: jax.Array,
    cfg: Config,
    *,
    skips: bool = True,
) -> jax.Array:
    """What the deep flow reads [B, T, C]: W_txt y at text, W_in (u + W_vlm y) at patches.

    Args:
        y: [B, T, V]; u: [B, T, D] as `place` gives it; is_image: bool [B, T].
        skips: False leaves W_vlm out, which is exact while it is zero.
    """
    deep, block = params["deep"], cfg.deep
    added = seen_skip(params, y, cfg) if skips and "vlm" in cfg.skips else None
    if added is not None and cfg.skip_into == "latent":
        u = u + added.astype(u.dtype)
    patches = flow.embed_tokens(deep, u, block)
    if added is not None and cfg.skip_into == "width":
        patches = patches + added.astype(patches.dtype)
    return jnp.where(is_image[..., None], patches, flow.embed_text(deep, y, len(y), block))


def deep_states(
    params: Tree,
    h: jax.Array,
    positions: Any,
    mask: jax.Array | None,
    cfg: Config,
    cache: KVCache | None = None,
    segments: jax.Array | None = None,
    heat: Any = 1.0,
) -> Any:
    """h [B, T, C] after the deep flow's layers, or (h, cache); as `flow.stack`.

    Args:
        h: `deep_input`; positions: `deep_positions` of the items to predict; heat: temperature of
            attention.
    """
    deep = params["deep"]
    return flow.stack(deep, h, positions, mask, cfg.deep, cache, heat, segments)


# ------------------------------------------------------------------------------------------ heads


def image_head(params: Tree, h: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """(scale, mean) [..., D] of the next patch's u, in at least float32, from h [..., C]."""
    return flow.head(params["deep"], h, cfg.deep)


def flow_skip(params: Tree, h: jax.Array, cfg: Config, *, into_flow: bool = True) -> jax.Array:
    """W_D h [..., V], what the flow adds to the VLM's states; its final norm comes first.

    Args:
        h: [..., C] of `deep_states`; into_flow: False lets no gradient past W_D.
    """
    if cfg.flow.final_norm:
        h = layers.rms_norm(params["deep"]["final_norm"], h)
    return linear(params["skip"]["deep"], h if into_flow else jax.lax.stop_gradient(h))


def text_states(
    params: Tree, y: jax.Array, h: jax.Array | None, cfg: Config, *, into_flow: bool = True
) -> jax.Array:
    """y + W_D h [..., V], which the VLM's head reads.

    Args:
        y: [..., V]; h: [..., C] of `deep_states`, or None where no flow is run, which is exact
            while W_D is zero; into_flow: as in `flow_skip`.
    """
    if h is None or "deep" not in cfg.skips:
        return y
    return y + flow_skip(params, h, cfg, into_flow=into_flow).astype(y.dtype)


def text_logits(params: Tree, states: jax.Array, cfg: Config) -> jax.Array:
    """Logits [..., vocabulary] of the next token in at least float32, from `text_states`."""
    return qwen.logits(params["vlm"], states, cfg.vlm)


# ---------------------------------------------------------------------------------------- caches


def unstack(params: Tree, cfg: Config) -> dict[str, Any]:
    """params with the layers of both streams unstacked, as their cached steps take them."""
    vlm, deep = params["vlm"], params["deep"]
    return {
        **params,
        "vlm": {**vlm, "layers": layers.unstack(vlm["layers"], cfg.vlm.layers)},
        "deep": {**deep, "layers": layers.unstack(deep["layers"], cfg.deep.depth)},
    }
