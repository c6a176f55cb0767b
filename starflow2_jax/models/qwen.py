"""Qwen2.5-VL (arXiv 2502.13923): a causal language model with multimodal rotary positions.

Its vision tower is `qwen_vision`. Positions are (time, row, column); text advances all three.

Shapes: B batch, T positions, S cache positions, C width, V vocabulary, D channels of a head, N
patches of P values of all images, M features of all images.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.mesh import gather_weight
from starflow2_jax.models import layers, qwen_vision, rope
from starflow2_jax.models.layers import KVCache, LayerConfig, at_least_float32
from starflow2_jax.models.qwen_vision import VisionConfig, VisionPlan
from starflow2_jax.params import ParamSpec, Tree, normal

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class QwenConfig:
    """Shape and options, as in a checkpoint's config.json."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vision: VisionConfig | None = None  # the vision tower, None for a model of text alone
    # Number of the D / 2 channel pairs that rotate by time, row and column
    sections: tuple[int, int, int] = (16, 24, 24)
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False  # whether the head shares the embedding's weights
    image_token: int = 151655
    video_token: int = 151656
    vision_start_token: int = 151652
    vision_end_token: int = 151653
    compute_dtype: str | None = None  # dtype of matmuls; None is that of the parameters
    remat: str = "none"  # a name in `layers.REMAT`
    attention: str = "auto"  # a name in `attention.KERNELS`

    def __post_init__(self):
        object.__setattr__(self, "sections", tuple(self.sections))
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} is not a multiple of 2 heads={self.heads}")
        if len(self.sections) != 3 or 2 * sum(self.sections) != self.head_dim:
            raise ValueError(
                f"sections={self.sections} must be three numbers that sum to half of the "
                f"{self.head_dim} head channels"
            )
        if self.rope_base <= 1:
            raise ValueError(f"rope_base={self.rope_base} must be above 1")
        self.layer  # noqa: B018  raises if the sizes or the activation are invalid
        if self.remat not in layers.REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {tuple(layers.REMAT)}")
        if self.vision is not None and self.vision.out_width != self.width:
            raise ValueError(f"vision out_width={self.vision.out_width} is not width={self.width}")

    @property
    def head_dim(self) -> int:
        """Channels D of a head."""
        return self.width // self.heads

    @property
    def layer(self) -> LayerConfig:
        """One layer of the language model."""
        return LayerConfig(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            norm="rms_norm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=True,
            out_bias=False,
            mlp_bias=False,
            rope_pairs="half",
            attention=self.attention,
        )


def _vision_tower(out_width: int) -> VisionConfig:
    return VisionConfig(
        depth=32,
        width=1280,
        heads=16,
        mlp_width=3420,
        out_width=out_width,
        full_layers=(7, 15, 23, 31),
    )


def qwen2_5_vl_3b(**changes: Any) -> QwenConfig:
    """Return the published 3B model: 3,754,622,976 parameters, the head tied to the embedding."""
    cfg = QwenConfig(
        vocab=151936,
        width=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        mlp_width=11008,
        tied=True,
        vision=_vision_tower(2048),
    )
    return dataclasses.replace(cfg, **changes)


def qwen2_5_vl_7b(**changes: Any) -> QwenConfig:
    """Return the published 7B model: 8,292,166,656 parameters, 676,550,144 in its tower."""
    cfg = QwenConfig(
        vocab=152064,
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        mlp_width=18944,
        vision=_vision_tower(3584),
    )
    return dataclasses.replace(cfg, **changes)


def declare(cfg: QwenConfig) -> dict[str, Any]:
    """Declare `embed`, `layers`, `final_norm`, `head` unless tied, and `vision` with a tower."""
    tree = {
        "embed": {"weight": ParamSpec((cfg.vocab, cfg.width), ("vocab", "embed"), normal(0.02))},
        "layers": layers.declare(cfg.layer, cfg.layers),
        "final_norm": layers.declare_norm("rms_norm", (cfg.width,), ("embed",)),
    }
    if not cfg.tied:
        shape = (cfg.width, cfg.vocab)
        tree["head"] = {"weight": ParamSpec(shape, ("embed", "vocab"), normal(0.02))}
    if cfg.vision is not None:
        tree["vision"] = qwen_vision.declare(cfg.vision)
    return tree


def part_positions(
    parts: Sequence[int | Grid], merge: int = 1, start: int = 0
) -> tuple[np.ndarray, int]:
    """Return positions int32 [T, 3] of consecutive parts, and the position that comes next.

    All tokens of an image share one time; their rows and columns count from that time. The next
    position is one behind the image's longer side.

    Args:
        parts: numbers of text tokens, or (frames, rows, columns) of images in patches.
        merge: side of the square of patches that forms one token.
    """
    positions = []
    for part in parts:
        if isinstance(part, (int, np.integer)):
            positions.append(np.repeat(np.arange(start, start + part)[:, None], 3, 1))
            start += int(part)
            continue
        frames, rows, columns = part[0], part[1] // merge, part[2] // merge
        positions.append(start + np.indices((frames, rows, columns)).reshape(3, -1).T)
        start += max(rows, columns)
    return np.concatenate(positions).astype(np.int32), start


def rope_indices(
    ids: Any, cfg: QwenConfig, grids: Any = (), valid: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions int32 [B, T, 3] of token rows, and the next position [B] of each row.

    It counts as the published code does; padding gets 0. It runs on the host.

    Args:
        ids: int [B, T].
        grids: (frames, rows, columns) in patches of every image [images, 3], row after row.
        valid: bool [B, T], False at padding.
    """
    ids = np.asarray(ids)
    valid = np.ones(ids.shape, bool) if valid is None else np.asarray(valid, bool)
    remaining = [tuple(map(int, grid)) for grid in np.asarray(grids).reshape(-1, 3)]
    total, merge = len(remaining), cfg.vision.merge if cfg.vision else 1
    positions = np.zeros((*ids.shape, 3), np.int32)
    next_positions = np.zeros(len(ids), np.int32)
    for row, (tokens, row_valid) in enumerate(zip(ids, valid)):
        tokens = tokens[row_valid]
        if (tokens == cfg.video_token).any():
            raise ValueError(f"row {row}: video tokens; only text and images are supported")
        is_image, parts, index = tokens == cfg.image_token, [], 0
        while index < len(tokens):
            if is_image[index]:
                if not remaining:
                    raise ValueError(f"row {row}: image tokens beyond the {total} images given")
                frames, rows, columns = remaining.pop(0)
                count = frames * (rows // merge) * (columns // merge)
                run_length = is_image[index : index + count].sum()
                if run_length != count:
                    raise ValueError(
                        f"row {row}: image {total - len(remaining) - 1} of {frames} x {rows} x "
                        f"{columns} patches needs {count} image tokens in a row, got {run_length}"
                    )
                parts.append((frames, rows, columns))
            else:
                image_starts = np.flatnonzero(is_image[index:])
                count = int(image_starts[0]) if len(image_starts) else len(tokens) - index
                parts.append(count)
            index += count
        if parts:
            positions[row, row_valid], next_positions[row] = part_positions(parts, merge)
    if remaining:
        raise ValueError(f"{len(remaining)} of {total} images have no image tokens")
    return positions, next_positions


def rope_tables(positions: Any, cfg: QwenConfig, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return RoPE cos and sin [..., T, D / 2] of positions [..., T, 3]."""
    # The published models were trained with frequencies rounded to float32.
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    power = np.float32(np.float64(cfg.rope_base) ** exponent.astype(np.float64))
    frequency = (np.float32(1) / power).astype(np.dtype(dtype))
    axis = np.repeat(np.arange(3), cfg.sections)
    return rope.tables(jnp.asarray(positions)[..., axis].astype(dtype) * frequency, dtype)


def compute_dtype(params: Tree, cfg: QwenConfig) -> Any:
    """Return the dtype in which the layers run."""
    return jnp.dtype(cfg.compute_dtype or params["embed"]["weight"].dtype)


def embed(params: Tree, ids: jax.Array, cfg: QwenConfig) -> jax.Array:
    """Embed ids int [B, T] as [B, T, C], in the compute dtype."""
    return params["embed"]["weight"][ids].astype(compute_dtype(params, cfg))


def scatter_image_features(
    h: jax.Array, ids: jax.Array, features: jax.Array, cfg: QwenConfig
) -> jax.Array:
    """Replace the image tokens of h [B, T, C] by features [M, C], in their order.

    `rope_indices` checks on the host that their numbers are equal.
    """
    is_image = ids == cfg.image_token
    index = jnp.cumsum(is_image.ravel()).reshape(is_image.shape) - 1
    at_tokens = features.astype(h.dtype)[jnp.clip(index, 0, len(features) - 1)]
    return jnp.where(is_image[..., None], at_tokens, h)


def scatter_row_features(h: jax.Array, image: jax.Array, features: jax.Array) -> jax.Array:
    """Replace positions of h [B, T, C] by features [B, P, C]; image int [B, T], -1 at text."""
    at_tokens = jnp.take_along_axis(features, jnp.maximum(image, 0)[..., None], 1)
    return jnp.where(image[..., None] >= 0, at_tokens.astype(h.dtype), h)


def embed_multimodal(
    params: Tree,
    ids: jax.Array,
    cfg: QwenConfig,
    patches: jax.Array | None,
    plan: VisionPlan | None,
) -> jax.Array:
    """Embed ids [B, T] with the images of patches [N, P] in place; None without images."""
    h = embed(params, ids, cfg)
    if patches is None:
        return h
    features = qwen_vision.encode(params["vision"], patches, plan, cfg.vision)
    return scatter_image_features(h, ids, features, cfg)


def apply_layers(
    params: Tree,
    h: jax.Array,
    cfg: QwenConfig,
    positions: Any = None,
    mask: jax.Array | None = None,
    *,
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Apply the layers and the final norm to embeddings h [B, T, C].

    Args:
        params: with a cache, its `layers` unstacked (`layers.unstack`).
        positions: int [B, T, 3] or [T, 3]; None counts from 0.
        mask, segments: as in `attention.grouped_query_attention`, the mask over the S positions of
            a cache if there is one. Both None is causal, without a cache only.

    Returns:
        states [B, T, C], and the extended cache, None without one.
    """
    if positions is None:
        positions = np.repeat(np.arange(h.shape[1])[:, None], 3, 1)
    h, cache = layers.apply_layers(
        params["layers"],
        h,
        cfg.layer,
        rope_tables(positions, cfg, jnp.promote_types(h.dtype, jnp.float32)),
        mask,
        remat=cfg.remat,
        segments=segments,
        cache=cache,
    )
    return final_norm(params, h, cfg), cache


def empty_cache(cfg: QwenConfig, batch_size: int, size: int, dtype: Any) -> KVCache:
    """Return a cache of `size` positions, none of them filled."""
    return layers.empty_cache(cfg.layer, cfg.layers, batch_size, size, dtype)


def final_norm(params: Tree, h: jax.Array, cfg: QwenConfig) -> jax.Array:
    """Apply the norm before the head."""
    return layers.rms_norm(params["final_norm"], h, cfg.norm_eps, offset=False)


def gather_head(params: Tree, cfg: QwenConfig) -> Tree:
    """Return params with the head's weight as `mesh.gather_weight` does, for many `logits`."""
    name, axes = ("embed", ("vocab", "embed")) if cfg.tied else ("head", ("embed", "vocab"))
    return {**params, name: {**params[name], "weight": gather_weight(params[name]["weight"], axes)}}


def logits(params: Tree, states: jax.Array, cfg: QwenConfig) -> jax.Array:
    """Return logits [..., V] in at least float32 of states [..., C] that `apply_layers` returns."""
    if cfg.tied:
        return at_least_float32(states @ params["embed"]["weight"].astype(states.dtype).T)
    return at_least_float32(layers.linear(params["head"], states))


def forward(
    params: Tree,
    ids: jax.Array,
    cfg: QwenConfig,
    *,
    patches: jax.Array | None = None,
    plan: VisionPlan | None = None,
    positions: Any = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Return logits [B, T, V] of token rows, int ids [B, T], with or without images.

    Args:
        patches, plan: [N, P] of all images, row after row, and `qwen_vision.plan` of their grids.
        positions, mask: as in `apply_layers`; with images, the positions are of `rope_indices`.
    """
    h = embed_multimodal(params, ids, cfg, patches, plan)
    states, _ = apply_layers(params, h, cfg, positions, mask)
    return logits(params, states, cfg)
