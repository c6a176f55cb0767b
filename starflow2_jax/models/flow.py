"""TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276): autoregressive affine flows.

A block predicts the scale and mean of every token from the tokens before it:

    z_t = (x_t - mean(x_<t)) / scale(x_<t),    log_det = -sum_t log scale(x_<t)

Blocks are numbered from the data; the last one is the deep block, next to the noise.

Shapes: B batch, T tokens of an image in raster order, D token channels, C width, L text tokens,
E text channels, N positions of a block's input sequence (L + T, or T), A position coordinates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.models import layers, rope
from starflow2_jax.models.flow_config import BlockConfig, FlowConfig
from starflow2_jax.models.layers import KVCache, at_least_float32, linear
from starflow2_jax.params import ParamSpec, Tree, normal, zeros

# log(e - 1): an untrained head, whose output is 0, gives softplus(0 + log(e - 1)) = scale 1.
INVERSE_SOFTPLUS_OF_1 = 0.541324854612918


@struct.dataclass
class Conditioning:
    """The inputs of a flow besides its tokens."""

    text: Any = None  #: features [B or 1, L, E], zeros at padding
    labels: Any = None  #: int32 [B]; -1 and None are the null class
    #: (rows, columns) of the image, square by default
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    #: RoPE coordinates of the deep block's inputs, `rope.Positions` of [N, A], by default those of
    #: `block_positions`
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


def tarflow(
    side: int, channels: int, width: int, layers: tuple[int, ...], **changes: Any
) -> FlowConfig:
    """Return the config of a TarFlow: no start token, learned positions, exponential scale."""
    return FlowConfig(
        side, channels, width, layers, start="shift", positions="learned", scale="exp", **changes
    )


def declare(cfg: FlowConfig) -> dict[str, Any]:
    """Declare every parameter. Identity blocks have none, as in the published files."""
    indices = [i for i, depth in enumerate(cfg.layers) if depth > 0]
    return {"blocks": {str(i): _declare_block(cfg.block(i)) for i in indices}}


def _declare_block(block: BlockConfig) -> dict[str, Any]:
    cfg, width = block.flow, block.layer.width
    tree: dict[str, Any] = {
        "proj_in": layers.declare_linear(cfg.channels, width, (None, "embed")),
        "layers": layers.declare(block.layer, block.depth),
        "proj_out": layers.declare_linear(width, 2 * cfg.channels, ("embed", None), zeros),
    }
    if block.start == "token":
        tree["start"] = ParamSpec((cfg.channels,), (None,), normal(1.0))
    if cfg.positions == "learned":
        tree["position"] = ParamSpec((cfg.tokens, width), (None, "embed"), normal(1e-2))
    if cfg.classes:
        tree["class_embed"] = ParamSpec((cfg.classes, width), (None, "embed"), normal(1e-2))
    if block.text:
        tree["proj_text"] = layers.declare_linear(cfg.text_channels, width, ("text", "embed"))
    if cfg.final_norm:
        tree["final_norm"] = layers.declare_norm("rms_norm_offset", (width,), ("embed",))
    return tree


def resolve_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return (rows, columns) of T tokens, square by default."""
    side = round(tokens**0.5)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        raise ValueError(f"grid: {rows} x {columns} does not hold {tokens} tokens")
    return rows, columns


def block_positions(block: BlockConfig, grid: tuple[int, int], text_length: int) -> rope.Positions:
    """Return RoPE coordinates float64 [N, A] of a block's inputs after `text_length` tokens.

    Places are those of the input sequence: a reversed block does not reverse them.
    """
    cfg, side = block.flow, block.flow.side
    plane = rope.plane(grid, side)
    if block.start == "prefix":
        items = rope.counted(plane, text_length)
        return rope.Positions(items[1:], items[:-1] if cfg.key_positions == "own" else None)

    def with_text(plane):
        if not cfg.text_length:
            return plane
        return rope.after_text(plane, text_length if block.text else 0, side)

    if cfg.key_positions == "next":
        return rope.Positions(with_text(plane))
    # Input t is token t - 1 behind a start token, and token t without one.
    if block.start == "token":
        return rope.Positions(with_text(plane), with_text(rope.predecessors(plane, side)))
    return rope.Positions(with_text(rope.successors(plane, side)), with_text(plane))


def rope_tables(block: BlockConfig, positions: rope.Positions | None, dtype: Any) -> Any:
    """Return the rotation tables that `layers.project_qkv` reads, None without RoPE."""
    cfg = block.flow
    if cfg.positions != "rope":
        return None
    if positions is None:
        raise ValueError("positions: a flow with RoPE needs them")
    if cfg.key_positions == "own" and positions.keys is None:
        raise ValueError("positions: model.flow.key_positions='own' needs those of the keys")
    grid_side = cfg.side if cfg.rope_frequencies == "grid" else None

    def tables(coordinates):
        return rope.tables(rope.angles(coordinates, cfg.head_dim, grid_side), dtype)

    if positions.keys is None:
        return tables(positions.queries)
    return rope.QueryKeyTables(tables(positions.queries), tables(positions.keys))


def apply_layers(
    params: Tree,
    h: jax.Array,
    block: BlockConfig,
    positions: rope.Positions,
    mask: Any = None,
    *,
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
    temperature: Any = 1.0,
) -> tuple[jax.Array, KVCache | None]:
    """Apply a block's causal layers to h [B, N, C].

    Args:
        params: one block's parameters; with a cache, their `layers` unstacked (`layers.unstack`).
        positions: RoPE coordinates [N, A] or [B, N, A] of the new inputs, ignored without RoPE.
        mask, segments, temperature: as in `attention.grouped_query_attention`.

    Returns:
        h [B, N, C], and the extended cache (None without one).
    """
    cfg = block.flow
    return layers.apply_layers(
        params["layers"],
        h,
        block.layer,
        rope_tables(block, positions, jnp.promote_types(h.dtype, jnp.float32)),
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


def embed_class(params: Tree, labels: jax.Array | None, block: BlockConfig) -> Any:
    """Embed labels int32 [B] as [B or 1, 1, C]; -1 and None give the mean. 0.0 without classes."""
    if not block.flow.classes:
        return 0.0
    table = params["class_embed"]
    dtype = compute_dtype(params, block.flow)
    null = table.mean(0)
    if labels is None:
        return null.astype(dtype)[None, None]
    embedding = jnp.where(labels[:, None] < 0, null, table[jnp.maximum(labels, 0)])
    return embedding.astype(dtype)[:, None]


def embed_positions(params: Tree, block: BlockConfig) -> Any:
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
        x: tokens [B, T, D] in the order of the block.
        conditioning: see `Conditioning`; its `positions` are those of this block.
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
        grid = resolve_grid(x.shape[1], conditioning.grid)
        positions = block_positions(block, grid, text_length)
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
    """Apply one block to x [B, T, D]; return z [B, T, D], both in raster order, and log_det [B]."""
    x = x[:, ::-1] if block.reverse else x
    scale, mean = predict_gaussian(params, x, block, conditioning)
    z = (at_least_float32(x) - mean) / scale
    log_det = -jnp.log(scale).sum((1, 2))
    return (z[:, ::-1] if block.reverse else z), log_det


def apply_blocks(
    params: Tree, x: jax.Array, cfg: FlowConfig, num_blocks: int, conditioning: Conditioning
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Apply the first `num_blocks` blocks to tokens x [B, T, D] in raster order.

    Args:
        params: parameters of each block, by its number.
        conditioning: as `check_inputs` returns it.

    Returns:
        The tokens [B, T, D] before each block and after the last (raster order), and the log_det
        [B] of each block; in at least float32.
    """
    outputs, log_dets = [at_least_float32(x)], []
    for i in range(num_blocks):
        z, block = outputs[-1], cfg.block(i)
        log_det = jnp.zeros(x.shape[0], z.dtype)
        if block.depth:
            is_deep = i == len(cfg.layers) - 1
            inputs = conditioning if is_deep else dataclasses.replace(conditioning, positions=None)
            z, log_det = block_forward(params[str(i)], z, block, inputs)
        outputs.append(z)
        log_dets.append(log_det)
    return outputs, log_dets


def forward_blocks(
    params: Tree, x: jax.Array, cfg: FlowConfig, conditioning: Conditioning | None = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Apply all blocks as `forward` does; return the results of each, as in `apply_blocks`."""
    conditioning = check_inputs(cfg, x.shape, conditioning)
    return apply_blocks(params["blocks"], x, cfg, len(cfg.layers), conditioning)


def forward(
    params: Tree, x: jax.Array, cfg: FlowConfig, conditioning: Conditioning | None = None
) -> tuple[jax.Array, jax.Array]:
    """Map data, tokens x [B, T, D] in raster order, to noise.

    Returns:
        z [B, T, D] and log_det [B], a sum over tokens and channels in nats; at least float32.
    """
    outputs, log_dets = forward_blocks(params, x, cfg, conditioning)
    return outputs[-1], sum(log_dets[1:], log_dets[0])


def check_inputs(
    cfg: FlowConfig, shape: tuple[int, ...], conditioning: Conditioning | None
) -> Conditioning:
    """Check the shape of tokens and their conditioning; return it with its grid filled in."""
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
    return dataclasses.replace(conditioning, grid=resolve_grid(shape[1], conditioning.grid))
