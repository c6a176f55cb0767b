"""The vision tower of Qwen2.5-VL: patches of images of any size to features of the language model.

Patches are in the published processor's order: image after image, blocks of merge x merge patches
in raster order, raster order within a block. Inside the tower blocks are in order of window.

Shapes: N patches of all images, P values of a patch, C width, U = merge^2 patches of one feature, D
channels of a head. An image is one frame, a clip has several.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.models import layers, rope
from starflow2_jax.models.layers import LayerConfig, linear
from starflow2_jax.params import ParamSpec, Tree, flatten, unflatten

# Limit of the published image processor: an image of 16,384 features.
MAX_PIXELS = 16384 * 28 * 28
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the tower."""

    depth: int
    width: int
    heads: int
    mlp_width: int
    out_width: int  # width of the language model
    full_layers: tuple[int, ...]  # indices of the layers that attend to the whole image
    patch: int = 14  # pixels on a side and frames in depth of a patch
    frames: int = 2
    channels: int = 3
    merge: int = 2  # a feature is made of merge x merge patches
    window: int = 112  # side of an attention window in pixels
    activation: str = "silu"
    compute_dtype: str | None = None
    remat: str = "none"  # a name in `layers.REMAT`

    def __post_init__(self):
        object.__setattr__(self, "full_layers", tuple(self.full_layers))
        if self.width % (4 * self.heads):
            raise ValueError(f"vision width={self.width} is not a multiple of 4 heads={self.heads}")
        if self.window < self.patch * self.merge:
            raise ValueError(f"vision window={self.window} is smaller than {self.merge} patches")
        self.layer  # noqa: B018  raises if the activation is invalid
        if self.remat not in layers.REMAT:
            raise ValueError(f"vision remat={self.remat!r} is not one of {tuple(layers.REMAT)}")

    @property
    def patch_values(self) -> int:
        """Number of values P of a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def layer(self) -> LayerConfig:
        """One layer of the tower."""
        return LayerConfig(
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm="rms_norm",
            norm_eps=EPS,
            activation=self.activation,
            gated=True,
            rope_pairs="half",
        )


def declare(cfg: VisionConfig) -> dict[str, Any]:
    """Declare every parameter; the patch embedding, a convolution in the files, is [P, C]."""
    merged = cfg.merge**2 * cfg.width
    # 3420 hidden channels are not a multiple of 8, so no layout shards them.
    stack = {
        name: ParamSpec(w.shape, tuple(None if a == "mlp" else a for a in w.axes), w.init)
        for name, w in flatten(layers.declare(cfg.layer, cfg.depth)).items()
    }
    return {
        "patch": {"weight": ParamSpec((cfg.patch_values, cfg.width), (None, "embed"))},
        "layers": unflatten(stack),
        "merger": {
            "norm": layers.declare_norm("rms_norm", (cfg.width,), ("embed",)),
            "up": layers.declare_linear(merged, merged, ("embed", "mlp")),
            "down": layers.declare_linear(merged, cfg.out_width, ("mlp", "embed")),
        },
    }


def check_size(height: int, width: int, cfg: VisionConfig, max_pixels: int = MAX_PIXELS) -> None:
    """Check that the tower can read an image of this size in pixels."""
    block = cfg.patch * cfg.merge
    if height < block or width < block or height % block or width % block:
        raise ValueError(
            f"image: {height} x {width} pixels; the vision tower needs multiples of {block}"
        )
    if height * width > max_pixels:
        raise ValueError(f"image: {height} x {width} pixels are more than the {max_pixels} allowed")


def normalize(image: Any) -> Any:
    """Normalize uint8 [..., 3] by the published mean and standard deviation; float32."""
    xp = np if isinstance(image, np.ndarray) else jnp
    mean, std = xp.asarray(MEAN, "float32"), xp.asarray(STD, "float32")
    return (image.astype("float32") / 255 - mean) / std


def patchify(image: Any, cfg: VisionConfig, max_pixels: int = MAX_PIXELS) -> Any:
    """Return patches [..., N, P] of normalized images [..., H, W, channels], numpy or jax.

    A still image is repeated along time to fill a patch's frames.
    """
    *batch, height, width, channels = image.shape
    check_size(height, width, cfg, max_pixels)
    m, p, n = cfg.merge, cfg.patch, len(batch)
    x = image.reshape(*batch, height // (m * p), m, p, width // (m * p), m, p, channels)
    order = (0, 3, 1, 4, 6, 2, 5)
    x = x.transpose(*range(n), *(n + axis for axis in order))[..., None, :, :]
    x = x.repeat(cfg.frames, axis=-3)
    return x.reshape(*batch, -1, cfg.patch_values)


@struct.dataclass
class AttentionGroups:
    """Sets of patches that attend to each other."""

    index: Any  # int32 [groups, longest], the patches of each group, -1 behind a shorter group
    flat_index: Any  # int32 [N], the place of every patch in the flattened index


@struct.dataclass
class VisionPlan:
    """The order and grouping of the patches of images, a function of their sizes alone."""

    order: Any  # int32 [N / U], blocks in order of window, and the inverse
    restore: Any
    angles: Any  # float32 [N, D / 2], RoPE angles of the patches in order of window
    windows: AttentionGroups  # the groups of the windowed and of the full layers
    frames: AttentionGroups


def _consecutive_groups(sizes: np.ndarray) -> AttentionGroups:
    ends = np.cumsum(sizes)
    index = (ends - sizes)[:, None] + np.arange(sizes.max())
    inside = np.arange(sizes.max()) < sizes[:, None]
    index = np.where(inside, index, -1).astype(np.int32)
    return AttentionGroups(index=index, flat_index=np.flatnonzero(inside).astype(np.int32))


def plan(grids: Any, cfg: VisionConfig) -> VisionPlan:
    """Return the plan of images or clips by their grids [images, 3]: (frames, rows, columns)."""
    grids = np.asarray(grids)
    if grids.ndim != 2 or grids.shape[1] != 3 or not len(grids) or (grids < 1).any():
        raise ValueError(f"grids: expected [images, 3] of positive numbers, got {grids.tolist()}")
    if (grids[:, 1:] % cfg.merge).any():
        raise ValueError(
            f"grids: rows and columns must be multiples of {cfg.merge}, got {grids.tolist()}"
        )
    window_side = cfg.window // cfg.merge // cfg.patch
    order, coordinates, windows, frames, first = [], [], [], [], 0
    for num_frames, rows, columns in grids.tolist():
        block_rows, block_columns = rows // cfg.merge, columns // cfg.merge
        frame, row, column = np.indices((num_frames, block_rows, block_columns))
        window_rows = -(-block_rows // window_side)
        window_columns = -(-block_columns // window_side)
        window = frame * window_rows + row // window_side
        window = (window * window_columns + column // window_side).ravel()
        by_window = np.argsort(window, kind="stable")
        order.append(first + by_window)
        windows.append(np.bincount(window))
        frames += [rows * columns] * num_frames
        in_block = np.indices((cfg.merge, cfg.merge)).reshape(2, -1).T
        corner = cfg.merge * np.stack([row.ravel(), column.ravel()], -1)[by_window]
        coordinates.append((corner[:, None] + in_block).reshape(-1, 2))
        first += frame.size
    order = np.concatenate(order)
    coordinates = np.concatenate(coordinates).astype(np.float64)
    return VisionPlan(
        order=order.astype(np.int32),
        restore=np.argsort(order).astype(np.int32),
        angles=rope.angles(coordinates, cfg.width // cfg.heads).astype(np.float32),
        windows=_consecutive_groups(np.concatenate(windows) * cfg.merge**2),
        frames=_consecutive_groups(np.asarray(frames)),
    )


def apply_layers(
    params: Tree, patches: jax.Array, plan: VisionPlan, cfg: VisionConfig
) -> jax.Array:
    """Return the states [N, C] of patches [N, P] after the last layer, in order of window."""
    expected = (cfg.merge**2 * len(plan.order), cfg.patch_values)
    if patches.shape != expected:
        raise ValueError(
            f"patches: expected {list(expected)} by the plan, got {list(patches.shape)}"
        )
    dtype = jnp.dtype(cfg.compute_dtype or params["patch"]["weight"].dtype)
    # Reordered before the first weight, so that no gradient is scattered back through the order.
    blocks = patches.reshape(len(plan.order), -1, cfg.patch_values)[plan.order]
    h = linear(params["patch"], blocks.reshape(patches.shape).astype(dtype))
    table_dtype = jnp.promote_types(dtype, jnp.float32)

    def attend_within(groups):
        index = groups.index
        # Groups that are known at trace time and equally long need no more than a reshape.
        known = isinstance(index, np.ndarray)
        equally_long = known and np.array_equal(index.ravel(), np.arange(index.size))
        angles = jnp.asarray(plan.angles)[jnp.maximum(index, 0)]
        tables = rope.tables(angles, table_dtype)

        def layer(h, layer_params):
            if equally_long:
                x = h.reshape(*index.shape, cfg.width)
                x, _ = layers.decoder_layer(layer_params, x, cfg.layer, tables, layers.ATTEND_ALL)
                return x.reshape(h.shape)
            x, mask = h[jnp.maximum(index, 0)], index[:, None] >= 0
            x, _ = layers.decoder_layer(layer_params, x, cfg.layer, tables, mask)
            return x.reshape(-1, cfg.width)[groups.flat_index]

        return layer

    windowed_layer, full_layer = attend_within(plan.windows), attend_within(plan.frames)

    def body(h, layer):
        layer_params, is_full = layer
        return jax.lax.cond(is_full, full_layer, windowed_layer, h, layer_params), None

    if layers.REMAT[cfg.remat] is not None:
        body = jax.checkpoint(body, policy=layers.REMAT[cfg.remat], prevent_cse=False)
    is_full = np.isin(np.arange(cfg.depth), cfg.full_layers)
    return jax.lax.scan(body, h, (params["layers"], is_full))[0]


def encode(params: Tree, patches: jax.Array, plan: VisionPlan, cfg: VisionConfig) -> jax.Array:
    """Return features [N / U, out_width] of patches [N, P], image after image in raster order."""
    h = apply_layers(params, patches, plan, cfg)
    merger = params["merger"]
    h = layers.rms_norm(merger["norm"], h, EPS, offset=False)
    h = linear(merger["up"], h.reshape(len(plan.order), -1))
    return linear(merger["down"], jax.nn.gelu(h, approximate=False))[plan.restore]


def encode_images(params: Tree, images: jax.Array, cfg: VisionConfig) -> jax.Array:
    """Return features [B, N / U, out_width] of normalized images [B, H, W, 3]."""
    patches = patchify(images, cfg)
    grids = [[1, *(n // cfg.patch for n in images.shape[1:3])]] * len(images)
    features = encode(params, patches.reshape(-1, cfg.patch_values), plan(grids, cfg), cfg)
    return features.reshape(len(images), -1, cfg.out_width)
