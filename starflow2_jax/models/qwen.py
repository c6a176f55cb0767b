"""Qwen2.5-VL: a causal language model with multimodal rotary positions; its tower is `qwen_vision`.

Axes: B batch, T positions, S cache positions, C width, V vocabulary, D head channels, N patches.
Positions are (time, row, column) triples; text advances all three together.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models import layers, qwen_vision, rope
from starflow2_jax.models.layers import KVCache, LayerConfig, at_least_float32
from starflow2_jax.models.qwen_vision import Plan, VisionConfig
from starflow2_jax.params import ParamSpec, Tree, normal, ones

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class QwenConfig:
    """Shape and options, as a checkpoint's config.json tells them.

    Attributes:
        sections: how many of the D / 2 channel pairs turn by time, row and column.
        tied: whether the head is the embedding.
        vision: the tower, None for a model of text alone.
        compute_dtype: dtype of matmuls; None is that of the parameters.
        remat: a name in `layers.REMAT`; attention: one in `attention.KERNELS`.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vision: VisionConfig | None = None
    sections: tuple[int, int, int] = (16, 24, 24)
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    image_token: int = 151655
    video_token: int = 151656
    vision_start_token: int = 151652
    vision_end_token: int = 151653
    compute_dtype: str | None = None
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "sections", tuple(self.sections))
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} is not a multiple of 2 heads={self.heads}")
        if len(self.sections) != 3 or 2 * sum(self.sections) != self.head_dim:
            raise ValueError(
                f"sections={self.sections} must be three numbers that sum to half of the "
                f"{self.head_dim} head channels"
            )
        self.layer  # noqa: B018  raises where the sizes or the activation are wrong
        if self.remat not in layers.REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {tuple(layers.REMAT)}")
        if self.vision is not None and self.vision.out_width != self.width:
            raise ValueError(f"vision out_width={self.vision.out_width} is not width={self.width}")

    @property
    def head_dim(self) -> int:
        """D."""
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


def _published(vision_mlp: int, sizes: dict[str, Any], changes: dict[str, Any]) -> QwenConfig:
    vision = VisionConfig(
        depth=32,
        width=1280,
        heads=16,
        mlp_width=vision_mlp,
        out_width=sizes["width"],
        full_layers=(7, 15, 23, 31),
    )
    return dataclasses.replace(QwenConfig(vision=vision, **sizes), **changes)


def qwen2_5_vl_3b(**changes: Any) -> QwenConfig:
    """The published 3B model: 3,754,622,976 parameters, head and embedding one."""
    sizes = {"vocab": 151936, "width": 2048, "layers": 36, "heads": 16, "kv_heads": 2}
    return _published(3420, {**sizes, "mlp_width": 11008, "tied": True}, changes)


def qwen2_5_vl_7b(**changes: Any) -> QwenConfig:
    """The published 7B model: 8,292,166,656 parameters, 676,550,144 of them the tower's."""
    sizes = {"vocab": 152064, "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4}
    return _published(3420, {**sizes, "mlp_width": 18944}, changes)


def qwen2_5_vl_32b(**changes: Any) -> QwenConfig:
    """The published 32B model."""
    sizes = {"vocab": 152064, "width": 5120, "layers": 64, "heads": 40, "kv_heads": 8}
    return _published(3456, {**sizes, "mlp_width": 27648}, changes)


def qwen2_5_vl_72b(**changes: Any) -> QwenConfig:
    """The published 72B model."""
    sizes = {"vocab": 152064, "width": 8192, "layers": 80, "heads": 64, "kv_heads": 8}
    return _published(3456, {**sizes, "mlp_width": 29568}, changes)


def declare(cfg: QwenConfig) -> dict[str, Any]:
    """Every weight: `embed`, `layers`, `final_norm`, `head` unless tied, `vision` with a tower."""
    tree = {
        "embed": {"weight": ParamSpec((cfg.vocab, cfg.width), ("vocab", "embed"), normal(0.02))},
        "layers": layers.declare(cfg.layer, cfg.layers),
        "final_norm": {"weight": ParamSpec((cfg.width,), ("embed",), ones)},
    }
    if not cfg.tied:
        shape = (cfg.width, cfg.vocab)
        tree["head"] = {"weight": ParamSpec(shape, ("embed", "vocab"), normal(0.02))}
    if cfg.vision is not None:
        tree["vision"] = qwen_vision.declare(cfg.vision)
    return tree


# --------------------------------------------------------------------------------------- positions


def part_positions(
    parts: Sequence[int | Grid], merge: int = 1, start: int = 0
) -> tuple[np.ndarray, int]:
    """Positions int32 [T, 3] of consecutive parts, and the position that follows them.

    A part is a number of text tokens, or the (frames, rows, columns) of an image, cut by `merge`.
    An image's tokens share their time with nothing else and count rows and columns from there; what
    follows starts after its longer side.
    """
    found = []
    for part in parts:
        if isinstance(part, (int, np.integer)):
            found.append(np.repeat(np.arange(start, start + part)[:, None], 3, 1))
            start += int(part)
            continue
        t, rows, columns = part[0], part[1] // merge, part[2] // merge
        found.append(start + np.indices((t, rows, columns)).reshape(3, -1).T)
        start += max(rows, columns)
    return np.concatenate(found).astype(np.int32), start


def rope_indices(
    ids: Any, cfg: QwenConfig, grids: Any = (), valid: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions int32 [B, T, 3] of token rows, and the position [B] of the token after each row.

    As the public code counts them; padding gets 0. Runs on the host.

    Args:
        ids: int [B, T]; grids: (frames, rows, columns) in patches of every image, [images, 3], row
            after row; valid: bool [B, T], False on padding.

    Raises:
        ValueError: image tokens and grids that do not belong together, or video tokens.
    """
    ids = np.asarray(ids)
    valid = np.ones(ids.shape, bool) if valid is None else np.asarray(valid, bool)
    left = [tuple(map(int, grid)) for grid in np.asarray(grids).reshape(-1, 3)]
    total, merge = len(left), cfg.vision.merge if cfg.vision else 1
    positions, following = np.zeros((*ids.shape, 3), np.int32), np.zeros(len(ids), np.int32)
    for row, (tokens, keep) in enumerate(zip(ids, valid)):
        tokens = tokens[keep]
        if (tokens == cfg.video_token).any():
            raise ValueError(f"row {row}: video tokens; only text and images are supported")
        is_image, parts, at = tokens == cfg.image_token, [], 0
        while at < len(tokens):
            if is_image[at]:
                if not left:
                    raise ValueError(f"row {row}: image tokens beyond the {total} images given")
                t, rows, columns = left.pop(0)
                count = t * (rows // merge) * (columns // merge)
                held = is_image[at : at + count].sum()
                if held != count:
                    raise ValueError(
                        f"row {row}: image {total - len(left) - 1} of {t} x {rows} x {columns} "
                        f"patches needs {count} image tokens in a row, {held} are there"
                    )
                parts.append((t, rows, columns))
            else:
                ends = np.flatnonzero(is_image[at:])
                count = int(ends[0]) if len(ends) else len(tokens) - at
                parts.append(count)
            at += count
        if parts:
            positions[row, keep], following[row] = part_positions(parts, merge)
    if left:
        raise ValueError(f"{len(left)} of {total} images have no image tokens")
    return positions, following


def causal_mask(valid: jax.Array) -> jax.Array:
    """[B, T, T]: each position sees the valid [B, T] ones up to itself."""
    length = valid.shape[1]
    return jnp.asarray(valid)[:, None, :] & np.tri(length, dtype=bool)


def rope_tables(positions: Any, cfg: QwenConfig, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., T, D / 2] of positions [..., T, 3]."""
    # Frequencies rounded to float32 as the published models were trained with them.
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    power = np.float32(np.float64(cfg.rope_base) ** exponent.astype(np.float64))
    frequency = (np.float32(1) / power).astype(np.dtype(dtype))
    axis = np.repeat(np.arange(3), cfg.sections)
    return rope.tables(jnp.asarray(positions)[..., axis].astype(dtype) * frequency, dtype)


# --------------------------------------------------------------------------------------- functions


def compute_dtype(params: Tree, cfg: QwenConfig) -> Any:
    """The dtype in which the layers run."""
    return jnp.dtype(cfg.compute_dtype or params["embed"]["weight"].dtype)


def embed(params: Tree, ids: jax.Array, cfg: QwenConfig) -> jax.Array:
    """Token embeddings [B, T, C] of ids int [B, T], in the compute dtype."""
    return params["embed"]["weight"][ids].astype(compute_dtype(params, cfg))


def merge_images(h: jax.Array, ids: jax.Array, features: jax.Array, cfg: QwenConfig) -> jax.Array:
    """h [B, T, C] with features [M, C] in place of the image tokens, in their order.

    `rope_indices` checks on the host that there are as many of one as of the other.
    """
    at = ids == cfg.image_token
    index = jnp.cumsum(at.ravel()).reshape(at.shape) - 1
    picked = features.astype(h.dtype)[jnp.clip(index, 0, len(features) - 1)]
    return jnp.where(at[..., None], picked, h)


def place_images(h: jax.Array, image: jax.Array, features: jax.Array) -> jax.Array:
    """h [B, T, C] with a row's features [B, P, C] where `image` int [B, T] names one; -1 none."""
    picked = jnp.take_along_axis(features, jnp.maximum(image, 0)[..., None], 1)
    return jnp.where(image[..., None] >= 0, picked.astype(h.dtype), h)


def embed_all(
    params: Tree, ids: jax.Array, cfg: QwenConfig, patches: jax.Array | None, at: Plan | None
) -> jax.Array:
    """`embed` of ids [B, T] with the images of patches [N, P] merged in; None without images."""
    h = embed(params, ids, cfg)
    if patches is None:
        return h
    features = qwen_vision.encode(params["vision"], patches, at, cfg.vision)
    return merge_images(h, ids, features, cfg)


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
    h, cache = layers.apply_layers(
        params["layers"],
        h,
        cfg.layer,
        _input_tables(h, positions, cfg),
        mask,
        remat=cfg.remat,
        segments=segments,
        cache=cache,
    )
    return final_norm(params, h, cfg), cache


def _input_tables(h: jax.Array, positions: Any, cfg: QwenConfig) -> tuple[jax.Array, jax.Array]:
    if positions is None:
        positions = np.repeat(np.arange(h.shape[1])[:, None], 3, 1)
    return rope_tables(positions, cfg, jnp.promote_types(h.dtype, jnp.float32))


def hidden_states(
    params: Tree, h: jax.Array, positions: Any, mask: jax.Array | None, cfg: QwenConfig
) -> jax.Array:
    """[layers + 1, B, T, C]: h, the states after each layer but the last, and the normed last."""
    at = _input_tables(h, positions, cfg)

    def body(h, layer):
        after = layers.decoder_layer(layer, h, cfg.layer, at, mask)[0]
        return after, h

    last, before = jax.lax.scan(body, h, params["layers"])
    return jnp.concatenate([before, final_norm(params, last, cfg)[None]])


def empty_cache(cfg: QwenConfig, batch: int, size: int, dtype: Any) -> KVCache:
    """A cache of `size` positions with none filled."""
    return layers.empty_cache(cfg.layer, cfg.layers, batch, size, dtype)


def final_norm(params: Tree, h: jax.Array, cfg: QwenConfig) -> jax.Array:
    """The norm before the head."""
    return layers.rms_norm(params["final_norm"], h, cfg.norm_eps, offset=False)


def logits(params: Tree, states: jax.Array, cfg: QwenConfig) -> jax.Array:
    """[..., V] in at least float32, of states [..., C] that `apply_layers` returns."""
    if cfg.tied:
        return at_least_float32(states @ params["embed"]["weight"].astype(states.dtype).T)
    return at_least_float32(layers.linear(params["head"], states))


def forward(
    params: Tree,
    ids: jax.Array,
    cfg: QwenConfig,
    *,
    patches: jax.Array | None = None,
    at: Plan | None = None,
    positions: Any = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, T, V] of token rows, with or without images.

    Args:
        ids: int [B, T]; patches: [N, P] of all images, row after row; at: `qwen_vision.plan` of
            their grids; positions: `rope_indices`, None for text alone; mask: None is causal.
    """
    h = embed_all(params, ids, cfg, patches, at)
    states, _ = apply_layers(params, h, cfg, positions, mask)
    return logits(params, states, cfg)
