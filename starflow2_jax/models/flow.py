"""TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276): autoregressive affine flows.

A block predicts the scale and mean of every token from the tokens before it:

    z_t = (x_t - mean(x_<t)) / scale(x_<t),    log_det = -sum_t log scale(x_<t)

Blocks are numbered from the data; the last one is the deep block, next to the noise.

Shapes: B batch, T tokens of an image in raster order, D token channels, C width, L text tokens,
E text channels, N positions of a block's input sequence (L + T, or T), A position coordinates.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.models import layers, rope
from starflow2_jax.models.layers import KVCache, LayerConfig, at_least_float32, linear
from starflow2_jax.params import ParamSpec, Tree, normal, zeros

INVERSE_SOFTPLUS_OF_1 = 0.541324854612918


@dataclass(frozen=True)
class FlowConfig:
    """Every option of the two published families.

    Attributes:
        side: rows (= columns) of the training grid; RoPE and learned positions refer to it.
        channels: D, channels of one token.
        width, deep_width: C of the blocks and, if it differs, of the deep block.
        layers: number of layers of each block from the data to the noise; 0 is an identity block.
        start: what the first token is predicted from. `token`: a trained start vector. `shift`: the
            first token passes unchanged. `prefix`: the last text position, in every block with
            text (blocks without text have a start vector).
        order: `R2L` or `L2R`, the parity of the blocks that read the tokens in reverse.
        positions: `rope` or `learned`.
        scale: `softplus` or `exp` of the first half of the head's output.
        soft_clip: c of c tanh(v / c) on the head's output; 0 disables it.
        classes: number of classes, 0 for none.
        text_channels, text_length: E and L, 0 for none.
        text_blocks: blocks that read the text, `deep` or `all`.
        bias: whether the linears of attention and MLP have a bias.
        compute_dtype: dtype of matmuls; None is that of the parameters.
        remat: a name in `layers.REMAT`.
        attention: a name in `attention.KERNELS`.
    """

    side: int
    channels: int
    width: int
    layers: tuple[int, ...]
    deep_width: int | None = None
    head_dim: int = 64
    heads: int | None = None
    kv_heads: int | None = None
    start: str = "token"
    order: str = "R2L"
    positions: str = "rope"
    rope_pairs: str = "interleaved"
    scale: str = "softplus"
    soft_clip: float = 0.0
    final_norm: bool = False
    classes: int = 0
    text_channels: int = 0
    text_length: int = 0
    text_blocks: str = "deep"
    norm: str = "layer_norm"
    bias: bool = True
    qk_norm: bool = False
    post_norm: bool = False
    gated_mlp: bool = False
    mlp_ratio: int = 4
    compute_dtype: str | None = None
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        for field, allowed in (
            ("start", ("token", "shift", "prefix")),
            ("order", ("R2L", "L2R")),
            ("positions", ("rope", "learned")),
            ("scale", ("softplus", "exp")),
            ("text_blocks", ("deep", "all")),
            ("norm", ("layer_norm", "rms_norm")),
            ("remat", tuple(layers.REMAT)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field}={getattr(self, field)!r} is not one of {allowed}")
        if self.start == "prefix" and not self.text_channels:
            raise ValueError("model.start='prefix' needs text: model.text_channels is 0")
        if bool(self.text_channels) != bool(self.text_length):
            raise ValueError("model.text_channels and model.text_length are both 0 or both set")
        pairs = (rope.THIRD_AXIS_PAIRS if self.text_length else 0) + 2
        if self.positions == "rope" and self.head_dim // 2 < pairs:
            raise ValueError(
                f"model.head_dim={self.head_dim} leaves no RoPE pairs for rows and columns; "
                f"at least {2 * pairs} is needed"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens T of the training grid."""
        return self.side**2

    def block(self, index: int) -> "BlockConfig":
        """Return the config of block `index`; negative numbers count from the deep block."""
        index %= len(self.layers)
        deep = index == len(self.layers) - 1
        text = bool(self.text_channels) and (deep or self.text_blocks == "all")
        width = self.deep_width or self.width if deep else self.width
        heads = width // self.head_dim if self.heads is None else self.heads
        norm_kind = "layer_norm" if self.norm == "layer_norm" else "rms_norm_offset"
        return BlockConfig(
            flow=self,
            depth=self.layers[index],
            # The deep block of L2R reads in raster order if the number of blocks is even.
            reverse=bool(index % 2) if self.order == "R2L" else index % 2 == 0,
            text=text,
            start="token" if self.start == "prefix" and not text else self.start,
            layer=LayerConfig(
                width=width,
                heads=heads,
                kv_heads=self.kv_heads or heads,
                head_dim=self.head_dim,
                mlp_width=self.mlp_ratio * width,
                norm=norm_kind,
                norm_eps=1e-5 if self.norm == "layer_norm" else 1e-6,
                activation="gelu_tanh" if self.gated_mlp else "gelu",
                gated=self.gated_mlp,
                qkv_bias=self.bias,
                out_bias=self.bias,
                mlp_bias=self.bias,
                qk_norm=self.qk_norm,
                post_norm=self.post_norm,
                rope_pairs=self.rope_pairs,
                attention=self.attention,
            ),
        )


@dataclass(frozen=True)
class BlockConfig:
    """One block: the options of its flow, and those that differ between blocks."""

    flow: FlowConfig
    depth: int
    reverse: bool
    text: bool
    start: str
    layer: LayerConfig


@struct.dataclass
class Conditioning:
    """The inputs of a flow besides its tokens.

    Attributes:
        text: features [B or 1, L, E], zeros at padding.
        labels: int32 [B]; -1 and None are the null class.
        grid: (rows, columns) of the image, square by default.
        positions: RoPE coordinates [N, A] of the deep block's inputs, by default those of
            `block_positions`.
    """

    text: Any = None
    labels: Any = None
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    positions: Any = None


def starflow_3b(**changes: Any) -> FlowConfig:
    """Return the released text-to-image STARFlow: 3,858,281,544 parameters."""
    return dataclasses.replace(
        FlowConfig(
            side=32,
            channels=4,
            width=3072,
            layers=(2, 2, 2, 2, 2, 24),
            order="L2R",
            soft_clip=4.0,
            final_norm=True,
            text_channels=2048,
            text_length=128,
        ),
        **changes,
    )


def tarflow(side: int, channels: int, width: int, layers: tuple[int, ...], **changes: Any):
    """Return TarFlow's options: no start token, learned positions, exponential scale."""
    return FlowConfig(
        side, channels, width, layers, start="shift", positions="learned", scale="exp", **changes
    )


def declare(cfg: FlowConfig) -> dict[str, Any]:
    """Declare every parameter. Identity blocks have none, as in the published files."""
    blocks = {
        str(i): _declare_block(cfg.block(i)) for i, depth in enumerate(cfg.layers) if depth > 0
    }
    return {"blocks": blocks}


def _declare_block(block: BlockConfig) -> dict[str, Any]:
    cfg, width = block.flow, block.layer.width

    def project(inputs, axis):
        return {
            "weight": ParamSpec((inputs, width), (axis, "embed")),
            "bias": ParamSpec((width,), ("embed",), zeros),
        }

    tree = {
        "proj_in": project(cfg.channels, None),
        "layers": layers.declare(block.layer, block.depth),
        "proj_out": {
            "weight": ParamSpec((width, 2 * cfg.channels), ("embed", None), zeros),
            "bias": ParamSpec((2 * cfg.channels,), (None,), zeros),
        },
    }
    if block.start == "token":
        tree["start"] = ParamSpec((cfg.channels,), (None,), normal(1.0))
    if cfg.positions == "learned":
        tree["position"] = ParamSpec((cfg.tokens, width), (None, "embed"), normal(1e-2))
    if cfg.classes:
        tree["class_embed"] = ParamSpec((cfg.classes, width), (None, "embed"), normal(1e-2))
    if block.text:
        tree["proj_text"] = project(cfg.text_channels, "text")
    if cfg.final_norm:
        tree["final_norm"] = {"weight": ParamSpec((width,), ("embed",), zeros)}
    return tree


def resolve_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return (rows, columns) of T tokens, square by default.

    Raises:
        ValueError: a grid of another number of tokens.
    """
    side = round(tokens**0.5)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        raise ValueError(f"grid: {rows} x {columns} does not hold {tokens} tokens")
    return rows, columns


def block_positions(block: BlockConfig, grid: tuple[int, int], text_length: int) -> Any:
    """Return RoPE coordinates float64 [N, A] of a block's inputs behind `text_length` tokens."""
    plane = rope.plane(grid, block.flow.side)
    if not block.flow.text_length:
        return plane
    if block.start == "prefix":
        return rope.next_item(plane, text_length)
    return rope.after_text(plane, text_length if block.text else 0, block.flow.side)


def apply_layers(
    params: Tree,
    h: jax.Array,
    block: BlockConfig,
    positions: Any,
    mask: jax.Array | None = None,
    *,
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
    temperature: Any = 1.0,
) -> tuple[jax.Array, KVCache | None]:
    """Apply a block's causal layers to h [B, N, C].

    Args:
        params: one block's parameters; with a cache, its `layers` unstacked (`layers.unstack`).
        positions: RoPE coordinates [N, A] or [B, N, A] of the new inputs, ignored without RoPE.
        mask, segments: as in `attention.grouped_query_attention`; None is causal.
        temperature: of the attention.

    Returns:
        h [B, N, C], and the extended cache, None without one.
    """
    cfg = block.flow
    tables = None
    if cfg.positions == "rope":
        dtype = jnp.promote_types(h.dtype, jnp.float32)
        tables = rope.tables(rope.angles(positions, cfg.head_dim), dtype)
    return layers.apply_layers(
        params["layers"],
        h,
        block.layer,
        tables,
        mask,
        temperature=temperature,
        remat=cfg.remat,
        segments=segments,
        cache=cache,
    )


def head(params: Tree, h: jax.Array, block: BlockConfig) -> tuple[jax.Array, jax.Array]:
    """Return (scale, mean) [..., D] in at least float32 from the layers' output h [..., C]."""
    cfg = block.flow
    if cfg.final_norm:
        h = layers.rms_norm(params["final_norm"], h)
    out = at_least_float32(linear(params["proj_out"], h))
    if cfg.soft_clip:
        out = cfg.soft_clip * jnp.tanh(out / cfg.soft_clip)
    raw_scale, mean = jnp.split(out, 2, -1)
    if cfg.scale == "exp":
        return jnp.exp(raw_scale), mean
    return jax.nn.softplus(raw_scale + INVERSE_SOFTPLUS_OF_1), mean


def compute_dtype(params: Tree, cfg: FlowConfig) -> Any:
    """Return the dtype in which the layers run."""
    return jnp.dtype(cfg.compute_dtype or params["proj_in"]["weight"].dtype)


def embed_tokens(params: Tree, x: jax.Array, block: BlockConfig) -> jax.Array:
    """Project tokens [B, n, D] to the layers' width C, in the compute dtype."""
    return linear(params["proj_in"], x.astype(compute_dtype(params, block.flow)))


def embed_class(params: Tree, labels: jax.Array | None, block: BlockConfig) -> jax.Array | float:
    """Embed labels int32 [B] as [B, 1, C]; -1 and None are the null class, the mean of all."""
    if not block.flow.classes:
        return 0.0
    table = params["class_embed"]
    dtype = compute_dtype(params, block.flow)
    null = table.mean(0)
    if labels is None:
        return null.astype(dtype)[None, None]
    embedding = jnp.where(labels[:, None] < 0, null, table[jnp.maximum(labels, 0)])
    return embedding.astype(dtype)[:, None]


def embed_positions(params: Tree, block: BlockConfig) -> jax.Array | float:
    """Return the learned positions [T, C] in the order of the block, 0.0 with RoPE."""
    if block.flow.positions == "rope":
        return 0.0
    table = params["position"].astype(compute_dtype(params, block.flow))
    return table[::-1] if block.reverse else table


def embed_text(params: Tree, text: jax.Array, batch_size: int, block: BlockConfig) -> jax.Array:
    """Project text features [B or 1, L, E] to [B, L, C]."""
    h = linear(params["proj_text"], text.astype(compute_dtype(params, block.flow)))
    return jnp.broadcast_to(h, (batch_size, *h.shape[1:]))


def predict_gaussian(
    params: Tree, x: jax.Array, block: BlockConfig, conditioning: Conditioning
) -> tuple[jax.Array, jax.Array]:
    """Return (scale, mean) [B, T, D] of every token, predicted from the tokens before it.

    Args:
        params: one block's parameters.
        x: tokens [B, T, D] in the order of the block.
        conditioning: with a grid; its `positions` are those of this block.
    """
    cfg, batch_size = block.flow, x.shape[0]
    inputs = x
    if block.start == "token":
        start = jnp.broadcast_to(params["start"].astype(x.dtype), (batch_size, 1, cfg.channels))
        inputs = jnp.concatenate([start, x[:, :-1]], 1)
    elif block.start == "prefix":
        inputs = x[:, :-1]
    h = embed_tokens(params, inputs, block) + embed_class(params, conditioning.labels, block)
    learned = embed_positions(params, block)
    h = h + (learned if isinstance(learned, float) else learned[: inputs.shape[1]])
    text_length = 0
    if block.text:
        text_length = conditioning.text.shape[1]
        h = jnp.concatenate([embed_text(params, conditioning.text, batch_size, block), h], 1)
    positions = conditioning.positions
    if positions is None:
        positions = block_positions(block, conditioning.grid, text_length)
    h, _ = apply_layers(params, h, block, positions)
    first = text_length - 1 if block.start == "prefix" else text_length
    scale, mean = head(params, h[:, first:], block)
    if block.start == "shift":
        mean = jnp.pad(mean[:, :-1], ((0, 0), (1, 0), (0, 0)))
        scale = jnp.pad(scale[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=1.0)
    return scale, mean


def block_forward(
    params: Tree, x: jax.Array, block: BlockConfig, conditioning: Conditioning
) -> tuple[jax.Array, jax.Array]:
    """Apply one block in the normalizing direction.

    Args:
        x: tokens [B, T, D] in raster order; the other arguments are those of `predict_gaussian`.

    Returns:
        z [B, T, D] in raster order, and its log_det [B].
    """
    x = x[:, ::-1] if block.reverse else x
    scale, mean = predict_gaussian(params, x, block, conditioning)
    z = (at_least_float32(x) - mean) / scale
    log_det = -jnp.log(scale).sum((1, 2))
    return (z[:, ::-1] if block.reverse else z), log_det


def forward_blocks(
    params: Tree, x: jax.Array, cfg: FlowConfig, conditioning: Conditioning | None = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Compute `forward` and return the result of every block.

    Returns:
        The tokens [B, T, D] before each block and after the last (raster order), and the log_det
        [B] of each block.
    """
    conditioning = check_inputs(cfg, x.shape, conditioning)
    outputs, log_dets = [at_least_float32(x)], []
    for i, depth in enumerate(cfg.layers):
        if depth == 0:
            outputs.append(outputs[-1])
            log_dets.append(jnp.zeros(x.shape[0], outputs[-1].dtype))
            continue
        is_deep = i == len(cfg.layers) - 1
        block_conditioning = conditioning if is_deep else conditioning.replace(positions=None)
        block_params = params["blocks"][str(i)]
        z, log_det = block_forward(block_params, outputs[-1], cfg.block(i), block_conditioning)
        outputs.append(z)
        log_dets.append(log_det)
    return outputs, log_dets


def forward(
    params: Tree, x: jax.Array, cfg: FlowConfig, conditioning: Conditioning | None = None
) -> tuple[jax.Array, jax.Array]:
    """Map data to noise.

    Args:
        x: tokens [B, T, D] in raster order.

    Returns:
        z [B, T, D] and log_det [B], a sum over tokens and channels in nats; at least float32.

    Raises:
        ValueError: text or labels that the model has no use for, missing text, or a wrong shape.
    """
    outputs, log_dets = forward_blocks(params, x, cfg, conditioning)
    return outputs[-1], sum(log_dets)


def check_inputs(
    cfg: FlowConfig, shape: tuple[int, ...], conditioning: Conditioning | None
) -> Conditioning:
    """Check tokens of `shape` and their conditioning; return the latter with its grid filled in.

    Raises:
        ValueError: as `forward`.
    """
    conditioning = conditioning or Conditioning()
    text = conditioning.text
    if len(shape) != 3 or shape[-1] != cfg.channels:
        raise ValueError(f"tokens: expected [B, T, {cfg.channels}], got {list(shape)}")
    if cfg.positions == "learned" and shape[1] != cfg.tokens:
        raise ValueError(f"tokens: learned positions need T={cfg.tokens}, got {shape[1]}")
    if (text is not None) != bool(cfg.text_channels):
        raise ValueError("text: " + ("is missing" if cfg.text_channels else "the model has none"))
    if text is not None and text.shape[-1] != cfg.text_channels:
        raise ValueError(f"text: expected [B, L, {cfg.text_channels}], got {list(text.shape)}")
    if conditioning.labels is not None and not cfg.classes:
        raise ValueError("labels: the model has no classes")
    return conditioning.replace(grid=resolve_grid(shape[1], conditioning.grid))
