"""Vision tower of Qwen2.5-VL: patches of images of any size to features of the language model.

Axes: N patches of all images, P values of a patch, C width, U = merge^2 patches that become one
feature, W windows, F frames (an image is one frame), D head channels.

Patches come as the public image processor cuts them: image after image, merge x merge blocks in
raster order, raster order within a block. Inside the tower the blocks are ordered by window.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.models import layers, rope
from starflow2_jax.models.layers import LayerConfig, linear
from starflow2_jax.params import ParamSpec, Tree, flatten, ones, unflatten

# Of the published image processor: a picture of 16,384 features.
MAX_PIXELS = 16384 * 28 * 28
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-6
EVERYTHING = np.ones((1, 1), bool)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the tower.

    Attributes:
        out_width: width of the language model.
        patch, frames: pixels on a side and frames in depth of a patch.
        merge: M, features are made of M x M patches; window: side of an attention window, pixels.
        full_layers: the layers that look beyond their window.
        remat: a name in `layers.REMAT`.
    """

    depth: int
    width: int
    heads: int
    mlp_width: int
    out_width: int
    full_layers: tuple[int, ...]
    patch: int = 14
    frames: int = 2
    channels: int = 3
    merge: int = 2
    window: int = 112
    activation: str = "silu"
    compute_dtype: str | None = None
    remat: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "full_layers", tuple(self.full_layers))
        if self.width % (4 * self.heads):
            raise ValueError(f"vision width={self.width} is not a multiple of 4 heads={self.heads}")
        if self.window < self.patch * self.merge:
            raise ValueError(f"vision window={self.window} is smaller than {self.merge} patches")
        self.layer  # noqa: B018  raises where the activation is wrong

    @property
    def patch_values(self) -> int:
        """P."""
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
    """Every weight of the tower; the patch embedding, a convolution in the files, is [P, C]."""
    merged = cfg.merge**2 * cfg.width
    # 3420 hidden channels are not a multiple of 8, so no layout cuts them.
    stack = {
        name: ParamSpec(w.shape, tuple(None if a == "mlp" else a for a in w.axes), w.init)
        for name, w in flatten(layers.declare(cfg.layer, cfg.depth)).items()
    }
    return {
        "patch": {"weight": ParamSpec((cfg.patch_values, cfg.width), (None, "embed"))},
        "layers": unflatten(stack),
        "merger": {
            "norm": {"weight": ParamSpec((cfg.width,), ("embed",), ones)},
            "up": layers.declare_linear(merged, merged, ("embed", "mlp")),
            "down": layers.declare_linear(merged, cfg.out_width, ("mlp", "embed")),
        },
    }


# ------------------------------------------------------------------------------------------ images


def check_size(height: int, width: int, cfg: VisionConfig, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ValueError where the tower cannot cut an image into whole blocks, or it is too large.

    Args:
        height, width: in pixels, after any resizing.
    """
    block = cfg.patch * cfg.merge
    if height < block or width < block or height % block or width % block:
        raise ValueError(
            f"image: {height} x {width} pixels; the vision tower needs multiples of {block}"
        )
    if height * width > max_pixels:
        raise ValueError(f"image: {height} x {width} pixels are more than the {max_pixels} allowed")


def normalise(image: Any) -> Any:
    """uint8 [..., 3] to float32 with the published mean and standard deviation of each channel."""
    xp = np if isinstance(image, np.ndarray) else jnp
    return (image.astype("float32") / 255 - xp.asarray(MEAN, "float32")) / xp.asarray(
        STD, "float32"
    )


def patchify(image: Any, cfg: VisionConfig, max_pixels: int = MAX_PIXELS) -> Any:
    """Patches [..., N, P] of normalised images [..., H, W, channels] (numpy or jax).

    A still image is repeated along time to fill a patch's frames.

    Raises:
        ValueError: as `check_size`.
    """
    *batch, height, width, channels = image.shape
    check_size(height, width, cfg, max_pixels)
    m, p, n = cfg.merge, cfg.patch, len(batch)
    x = image.reshape(*batch, height // (m * p), m, p, width // (m * p), m, p, channels)
    order = (0, 3, 1, 4, 6, 2, 5)
    x = x.transpose(*range(n), *(n + axis for axis in order))[..., None, :, :]
    x = x.repeat(cfg.frames, axis=-3)
    return x.reshape(*batch, -1, cfg.patch_values)


def raster(patches: Any, grid: tuple[int, int], cfg: VisionConfig) -> Any:
    """Patch states [rows * columns, C] of one image, in the processor's order, as [rows, columns,
    C]."""
    rows, columns = grid
    m = cfg.merge
    x = patches.reshape(rows // m, columns // m, m, m, patches.shape[-1])
    return x.swapaxes(1, 2).reshape(rows, columns, -1)


# -------------------------------------------------------------------------------------- attention


@struct.dataclass
class Groups:
    """Sets of patches that see each other.

    Attributes:
        index: int32 [groups, longest], which patch, -1 where a group is shorter.
        at: int32 [N], where every patch lies in the flattened index.
    """

    index: Any
    at: Any


@struct.dataclass
class Plan:
    """How the tower walks over images of given sizes; a function of the sizes alone.

    Attributes:
        order: int32 [N / U], blocks in order of window; restore: its inverse.
        angles: float32 [N, D / 2] of the patches in order of window.
        windows, frames: the groups of the windowed and of the full layers.
    """

    order: Any
    restore: Any
    angles: Any
    windows: Groups
    frames: Groups


def _groups(sizes: np.ndarray) -> Groups:
    """Consecutive groups of `sizes` patches."""
    ends = np.cumsum(sizes)
    index = (ends - sizes)[:, None] + np.arange(sizes.max())
    inside = np.arange(sizes.max()) < sizes[:, None]
    index = np.where(inside, index, -1).astype(np.int32)
    return Groups(index=index, at=np.flatnonzero(inside).astype(np.int32))


def plan(grids: Any, cfg: VisionConfig) -> Plan:
    """The plan of images (or clips) with `grids` of (frames, rows, columns) patches, [images, 3].

    Raises:
        ValueError: no images, or rows or columns that are not a multiple of the merge size.
    """
    grids = np.asarray(grids)
    if grids.ndim != 2 or grids.shape[1] != 3 or not len(grids) or (grids < 1).any():
        raise ValueError(f"grids: expected [images, 3] of positive numbers, got {grids.tolist()}")
    if (grids[:, 1:] % cfg.merge).any():
        raise ValueError(
            f"grids: rows and columns must be multiples of {cfg.merge}, got {grids.tolist()}"
        )
    side = cfg.window // cfg.merge // cfg.patch
    order, places, windows, frames, first = [], [], [], [], 0
    for t, rows, columns in grids.tolist():
        high, wide = rows // cfg.merge, columns // cfg.merge
        block = np.arange(t * high * wide).reshape(t, high, wide)
        frame, row, column = np.indices(block.shape)
        across = -(-wide // side)
        window = (frame * -(-high // side) + row // side) * across + column // side
        by_window = np.argsort(window.ravel(), kind="stable")
        order.append(first + by_window)
        windows.append(np.bincount(window.ravel()))
        frames += [rows * columns] * t
        inner = np.indices((cfg.merge, cfg.merge)).reshape(2, -1).T
        corner = cfg.merge * np.stack([row.ravel(), column.ravel()], -1)[by_window]
        places.append((corner[:, None] + inner).reshape(-1, 2))
        first += block.size
    order = np.concatenate(order)
    angles = rope.angles(np.concatenate(places).astype(np.float64), cfg.width // cfg.heads)
    return Plan(
        order=order.astype(np.int32),
        restore=np.argsort(order).astype(np.int32),
        angles=angles.astype(np.float32),
        windows=_groups(np.concatenate(windows) * cfg.merge**2),
        frames=_groups(np.asarray(frames)),
    )


def _is_even(groups: Groups) -> bool:
    """Whether groups known at trace time are equally long, so that a reshape makes them."""
    known = isinstance(groups.index, np.ndarray)
    return known and np.array_equal(groups.index.ravel(), np.arange(groups.index.size))


def _layers(params: Tree, patches: jax.Array, at: Plan, cfg: VisionConfig, every: bool) -> Any:
    """States [N, C] in order of window after the last layer, or [depth + 1, N, C] of every one."""
    if patches.shape != (cfg.merge**2 * len(at.order), cfg.patch_values):
        raise ValueError(
            f"patches: expected [{cfg.merge**2 * len(at.order)}, {cfg.patch_values}] by the plan, "
            f"got {list(patches.shape)}"
        )
    dtype = jnp.dtype(cfg.compute_dtype or params["patch"]["weight"].dtype)
    # Ordered before the first weight, so that no gradient is scattered back through the order.
    blocks = patches.reshape(len(at.order), -1, cfg.patch_values)[at.order]
    h = linear(params["patch"], blocks.reshape(patches.shape).astype(dtype))
    wide = jnp.promote_types(dtype, jnp.float32)

    def attend(groups):
        even = _is_even(groups)
        inside = groups.index >= 0
        angles = jnp.asarray(at.angles)[jnp.maximum(groups.index, 0)]
        tables = rope.tables(angles, wide)

        def run(h, layer):
            if even:
                x = h.reshape(*groups.index.shape, cfg.width)
                return layers.decoder_layer(layer, x, cfg.layer, tables, EVERYTHING)[0].reshape(
                    h.shape
                )
            x = h[jnp.maximum(groups.index, 0)]
            x, _ = layers.decoder_layer(layer, x, cfg.layer, tables, inside[:, None])
            return x.reshape(-1, cfg.width)[groups.at]

        return run

    near, far = attend(at.windows), attend(at.frames)

    def body(h, layer_and_kind):
        layer, full = layer_and_kind
        h = jax.lax.cond(full, far, near, h, layer)
        return h, h if every else None

    if layers.REMAT[cfg.remat] is not None:
        body = jax.checkpoint(body, policy=layers.REMAT[cfg.remat], prevent_cse=False)
    full = np.isin(np.arange(cfg.depth), cfg.full_layers)
    last, states = jax.lax.scan(body, h, (params["layers"], full))
    return jnp.concatenate([h[None], states]) if every else last


def patch_states(params: Tree, patches: jax.Array, at: Plan, cfg: VisionConfig) -> jax.Array:
    """States [N, C] of every patch after the last layer, in the order of `patches` [N, P]."""
    h = _layers(params, patches, at, cfg, every=False)
    return h.reshape(len(at.order), -1, cfg.width)[at.restore].reshape(h.shape)


def hidden_states(params: Tree, patches: jax.Array, at: Plan, cfg: VisionConfig) -> jax.Array:
    """[depth + 1, N, C]: what every layer is given and the last one gives, in order of window."""
    return _layers(params, patches, at, cfg, every=True)


def encode(params: Tree, patches: jax.Array, at: Plan, cfg: VisionConfig) -> jax.Array:
    """Features [N / U, out_width], image after image, each in raster order.

    Args:
        patches: [N, P] as `patchify` or the public processor cuts them; at: `plan` of their grids.

    Raises:
        ValueError: as many patches as the plan says were not given.
    """
    h = _layers(params, patches, at, cfg, every=False)
    merger = params["merger"]
    h = layers.rms_norm(merger["norm"], h, EPS, offset=False)
    h = linear(merger["up"], h.reshape(len(at.order), -1))
    return linear(merger["down"], jax.nn.gelu(h, approximate=False))[at.restore]


def encode_images(params: Tree, images: jax.Array, cfg: VisionConfig) -> jax.Array:
    """Features [B, N / U, out_width] of equally large images [B, H, W, 3], normalised.

    Raises:
        ValueError: as `check_size`.
    """
    patches = patchify(images, cfg)
    grid = [[1, *(n // cfg.patch for n in images.shape[1:3])]]
    at = plan(grid * len(images), cfg)
    found = encode(params, patches.reshape(-1, cfg.patch_values), at, cfg)
    return found.reshape(len(images), -1, cfg.out_width)
