"""TarFlow and STARFlow: stacks of autoregressive affine blocks with an exact log-determinant.

Axes: B batch, T tokens of an image in raster order, D token channels, C width, L text tokens,
E text channels, N positions of a block's input sequence (L + T, or T), A position coordinates.

A block predicts (scale, mean) of every token from the tokens before it and maps z = (x - mean) /
scale. Blocks are numbered from the data; the last one is the deep block, next to the noise.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import layers, rope
from starflow2_jax.models.layers import KVCache, LayerConfig, at_least_float32, linear
from starflow2_jax.params import ParamSpec, Tree, normal, zeros

INVERSE_SOFTPLUS_OF_1 = 0.541324854612918


@dataclass(frozen=True)
class FlowConfig:
    """Every option of the two published families (paper.md 3.2-3.3).

    Attributes:
        side: rows (= columns) of the training grid; RoPE and learned positions refer to it.
        channels: D, channels of one token.
        width, deep_width: C of the blocks and, where it differs, of the deep block.
        layers: layers of each block from the data to the noise; 0 is an identity block.
        start: what stands before the first token. `token`: a trained vector. `shift`: nothing, the
            first token passes unchanged. `prefix`: the last text position predicts the first token,
            in every block with text (the others have a start token).
        order: `R2L` or `L2R`, the parity of the blocks that read the tokens in reverse.
        positions: `rope` or `learned`.
        scale: `softplus` or `exp` of the first half of the head.
        soft_clip: c of c tanh(v / c) on the head; 0 is none.
        classes: number of classes, 0 for none; text_channels, text_length: E and L, 0 for none.
        text_blocks: `deep` or `all`.
        bias: whether attention and MLP linears have one.
        compute_dtype: dtype of matmuls; None is that of the parameters.
        remat: a name in `layers.REMAT`; attention: one in `attention.KERNELS`.
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
        """T of the training grid."""
        return self.side**2

    def block(self, index: int) -> "BlockConfig":
        """What block `index` is; negative numbers count from the deep block."""
        index %= len(self.layers)
        deep = index == len(self.layers) - 1
        text = bool(self.text_channels) and (deep or self.text_blocks == "all")
        width = self.deep_width or self.width if deep else self.width
        # An explicit head count holds for every block but a deep one of another width.
        own = deep and width != self.width and self.heads is None
        heads = width // self.head_dim if own or self.heads is None else self.heads
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
    """One block of a flow: the flow's options and what is this block's own."""

    flow: FlowConfig
    depth: int
    reverse: bool
    text: bool
    start: str
    layer: LayerConfig


def starflow_3b(**changes: Any) -> FlowConfig:
    """The released text-to-image model: 3,858,281,544 parameters."""
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
    """A flow with the options of TarFlow: no start token, learned positions, exponential scale."""
    return FlowConfig(
        side, channels, width, layers, start="shift", positions="learned", scale="exp", **changes
    )


def declare(cfg: FlowConfig) -> dict[str, Any]:
    """Every weight of the flow. Identity blocks have none, as in the published files."""
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


def check_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of T tokens, square by default.

    Raises:
        ValueError: the grid does not hold T tokens.
    """
    side = round(tokens**0.5)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        raise ValueError(f"grid: {rows} x {columns} does not hold {tokens} tokens")
    return rows, columns


def block_positions(block: BlockConfig, grid: tuple[int, int], length: int) -> Any:
    """RoPE coordinates float64 [N, A] of a block's input sequence with `length` text tokens."""
    plane = rope.plane(grid, block.flow.side)
    if not block.flow.text_length:
        return plane
    if block.start == "prefix":
        return rope.next_item(plane, length)
    return rope.after_text(plane, length if block.text else 0, block.flow.side)


def stack(
    params: Tree,
    h: jax.Array,
    positions: Any,
    mask: jax.Array | None,
    block: BlockConfig,
    cache: KVCache | None = None,
    temperature: Any = 1.0,
    segments: jax.Array | None = None,
) -> Any:
    """A block's causal layers over h [B, N, C].

    Args:
        params: one block's weights; with a cache its `layers` must be unstacked (layers.unstack).
        positions: RoPE coordinates [N, A] or [B, N, A] of the new inputs, ignored without RoPE.
        mask, segments: as in `layers.attention`; None is causal. Segments without a cache.

    Returns:
        h [B, N, C], or (h, cache) where a cache was given.
    """
    cfg = block.flow
    tables = None
    if cfg.positions == "rope":
        wide = jnp.promote_types(h.dtype, jnp.float32)
        tables = rope.tables(rope.angles(positions, cfg.head_dim), wide)
    if cache is None:
        args = (block.layer, tables, mask, temperature, cfg.remat)
        return layers.run_layers(params["layers"], h, *args, segments)
    args = (block.layer, tables, mask, cache, temperature)
    return layers.run_layers_cached(params["layers"], h, *args)


def head(params: Tree, h: jax.Array, block: BlockConfig) -> tuple[jax.Array, jax.Array]:
    """(scale, mean), each [..., D] in at least float32, from the layers' output h [..., C]."""
    cfg = block.flow
    if cfg.final_norm:
        h = layers.rms_norm(params["final_norm"], h)
    out = at_least_float32(linear(params["proj_out"], h))
    if cfg.soft_clip:
        out = cfg.soft_clip * jnp.tanh(out / cfg.soft_clip)
    raw, mean = jnp.split(out, 2, -1)
    if cfg.scale == "exp":
        return jnp.exp(raw), mean
    return jax.nn.softplus(raw + INVERSE_SOFTPLUS_OF_1), mean


def compute_dtype(params: Tree, cfg: FlowConfig) -> Any:
    """The dtype in which the layers run."""
    return jnp.dtype(cfg.compute_dtype or params["proj_in"]["weight"].dtype)


def embed_tokens(params: Tree, x: jax.Array, block: BlockConfig) -> jax.Array:
    """Tokens [B, n, D] to the layers' width, in the compute dtype."""
    return linear(params["proj_in"], x.astype(compute_dtype(params, block.flow)))


def embed_class(params: Tree, labels: jax.Array | None, block: BlockConfig) -> jax.Array | float:
    """[B, 1, C] of labels int32 [B]; -1 and None are the null class, the mean of all classes."""
    if not block.flow.classes:
        return 0.0
    table = params["class_embed"]
    dtype = compute_dtype(params, block.flow)
    null = table.mean(0)
    if labels is None:
        return null.astype(dtype)[None, None]
    chosen = jnp.where(labels[:, None] < 0, null, table[jnp.maximum(labels, 0)])
    return chosen.astype(dtype)[:, None]


def embed_positions(params: Tree, block: BlockConfig) -> jax.Array | float:
    """Learned positions [T, C] in the block's own order, 0.0 with RoPE."""
    if block.flow.positions == "rope":
        return 0.0
    table = params["position"].astype(compute_dtype(params, block.flow))
    return table[::-1] if block.reverse else table


def embed_text(params: Tree, text: jax.Array, batch: int, block: BlockConfig) -> jax.Array:
    """Text features [B or 1, L, E] to [B, L, C]."""
    h = linear(params["proj_text"], text.astype(compute_dtype(params, block.flow)))
    return jnp.broadcast_to(h, (batch, *h.shape[1:]))


def predict(
    params: Tree,
    x: jax.Array,
    block: BlockConfig,
    text: jax.Array | None,
    labels: jax.Array | None,
    grid: tuple[int, int],
    at: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """(scale, mean) [B, T, D] of every token given those before it.

    Args:
        x: tokens [B, T, D] in the block's own order; at: RoPE coordinates of its inputs, by default
            `block_positions`.
    """
    cfg, batch = block.flow, x.shape[0]
    inputs = x
    if block.start == "token":
        start = jnp.broadcast_to(params["start"].astype(x.dtype), (batch, 1, cfg.channels))
        inputs = jnp.concatenate([start, x[:, :-1]], 1)
    elif block.start == "prefix":
        inputs = x[:, :-1]
    h = embed_tokens(params, inputs, block) + embed_class(params, labels, block)
    learned = embed_positions(params, block)
    h = h + (learned if isinstance(learned, float) else learned[: inputs.shape[1]])
    length = 0
    if block.text:
        length = text.shape[1]
        h = jnp.concatenate([embed_text(params, text, batch, block), h], 1)
    at = block_positions(block, grid, length) if at is None else at
    h = stack(params, h, at, None, block)
    first = length - 1 if block.start == "prefix" else length
    scale, mean = head(params, h[:, first:], block)
    if block.start == "shift":
        mean = jnp.pad(mean[:, :-1], ((0, 0), (1, 0), (0, 0)))
        scale = jnp.pad(scale[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=1.0)
    return scale, mean


def block_forward(
    params: Tree, x: jax.Array, block: BlockConfig, *given: Any
) -> tuple[jax.Array, jax.Array]:
    """One block in the normalising direction: x [B, T, D] to z [B, T, D] and its log_det [B].

    Tokens are in raster order; `given` are the conditions of `predict`.
    """
    x = x[:, ::-1] if block.reverse else x
    scale, mean = predict(params, x, block, *given)
    z = (at_least_float32(x) - mean) / scale
    log_det = -jnp.log(scale).sum((1, 2))
    return (z[:, ::-1] if block.reverse else z), log_det


def forward_blocks(
    params: Tree,
    x: jax.Array,
    cfg: FlowConfig,
    *,
    text: jax.Array | None = None,
    labels: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
    positions: Any = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """`forward`, with what every block gives.

    Returns:
        tokens [B, T, D] before each block and after the last (raster order), log_det [B] of each.
    """
    check_inputs(cfg, x.shape, text, labels)
    grid = check_grid(x.shape[1], grid)
    outputs, log_dets = [at_least_float32(x)], []
    for i, depth in enumerate(cfg.layers):
        if depth == 0:
            outputs.append(outputs[-1])
            log_dets.append(jnp.zeros(x.shape[0], outputs[-1].dtype))
            continue
        at = positions if i == len(cfg.layers) - 1 else None
        args = (outputs[-1], cfg.block(i), text, labels, grid, at)
        z, log_det = block_forward(params["blocks"][str(i)], *args)
        outputs.append(z)
        log_dets.append(log_det)
    return outputs, log_dets


def forward(
    params: Tree,
    x: jax.Array,
    cfg: FlowConfig,
    *,
    text: jax.Array | None = None,
    labels: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
    positions: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Data to noise.

    Args:
        x: tokens [B, T, D] in raster order; text: features [B or 1, L, E], padding zeroed;
        labels: int32 [B], -1 the null class; grid: (rows, columns), square by default;
        positions: RoPE coordinates [N, A] of the deep block's inputs, by default those of
            `block_positions`.

    Returns:
        z [B, T, D] and log_det [B], a sum over tokens and channels in nats; at least float32.

    Raises:
        ValueError: text or labels where the model has none, text missing, or shapes that differ.
    """
    outputs, log_dets = forward_blocks(
        params, x, cfg, text=text, labels=labels, grid=grid, positions=positions
    )
    return outputs[-1], sum(log_dets)


def check_inputs(cfg: FlowConfig, shape: tuple, text: Any, labels: Any) -> None:
    """Raises ValueError where tokens, text or labels are not what the model takes."""
    if len(shape) != 3 or shape[-1] != cfg.channels:
        raise ValueError(f"tokens: expected [B, T, {cfg.channels}], got {list(shape)}")
    if cfg.positions == "learned" and shape[1] != cfg.tokens:
        raise ValueError(f"tokens: learned positions need T={cfg.tokens}, got {shape[1]}")
    if (text is not None) != bool(cfg.text_channels):
        raise ValueError("text: " + ("is missing" if cfg.text_channels else "the model has none"))
    if text is not None and text.shape[-1] != cfg.text_channels:
        raise ValueError(f"text: expected [B, L, {cfg.text_channels}], got {list(text.shape)}")
    if labels is not None and not cfg.classes:
        raise ValueError("labels: the model has no classes")
