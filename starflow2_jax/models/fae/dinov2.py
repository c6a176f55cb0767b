"""DINOv2 (arXiv 2304.07193): the vision transformer whose patch tokens the latent codec encodes.

Shapes: B batch, H x W pixels, T patches in raster order, R register tokens, N = 1 + R + T tokens in
the order class, registers, patches; C width, L layers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.models import layers
from starflow2_jax.models.layers import LayerConfig, linear
from starflow2_jax.models.patches import patchify
from starflow2_jax.params import ParamSpec, Tree, normal, ones

# Mean and standard deviation of red, green and blue in ImageNet, for pixels in [0, 1].
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """Sizes of a DINOv2, with registers (arXiv 2309.16588) or without."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int = 14
    side: int = 37  # rows (= columns) of the trained grid of position embeddings
    registers: int = 0  # number of register tokens
    gated: bool = False  # whether the MLP is a SwiGLU (of `activation`)
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    antialias: bool = False  # whether the interpolation to other grids antialiases
    compute_dtype: str | None = None  # dtype of matmuls; None is that of the parameters
    remat: str = "none"  # a name in `layers.REMAT`, for gradients with respect to the image

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"dinov2: width={self.width} is not a multiple of heads={self.heads}")
        if self.remat not in layers.REMAT:
            raise ValueError(f"dinov2: remat={self.remat!r} is not one of {tuple(layers.REMAT)}")
        self.layer  # noqa: B018  raises if the activation is invalid

    @property
    def layer(self) -> LayerConfig:
        """One layer, without its LayerScale."""
        return LayerConfig(
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm="layer_norm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
        )


def swiglu_width(width: int, ratio: float = 4) -> int:
    """Return the hidden channels of a SwiGLU as large as a plain MLP of this ratio."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


_SIZES = {
    "tiny": DinoConfig(width=128, layers=4, heads=4, mlp_width=512, patch=8, side=8),
    "small": DinoConfig(width=384, layers=12, heads=6, mlp_width=1536),
    "base": DinoConfig(width=768, layers=12, heads=12, mlp_width=3072),
    "large": DinoConfig(width=1024, layers=24, heads=16, mlp_width=4096),
    "giant": DinoConfig(
        width=1536, layers=40, heads=24, mlp_width=4096, gated=True, activation="silu"
    ),
}
PRESETS: dict[str, DinoConfig] = _SIZES | {
    f"{name}_registers": dataclasses.replace(size, registers=4, antialias=True)
    for name, size in _SIZES.items()
}


def preset(name: str, **changes: Any) -> DinoConfig:
    """Return a published size by name, `small` (ViT-S/14) to `giant` (ViT-g/14), or `tiny`."""
    if name not in PRESETS:
        raise ValueError(f"dinov2: preset {name!r} is not one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


@struct.dataclass
class DinoFeatures:
    """The tower's output, after its final norm."""

    patches: jax.Array  # [B, T, C]
    class_token: jax.Array  # [B, C]
    registers: jax.Array  # [B, R, C]
    # [L + 1, B, N, C], tokens before the first layer and after each, before the final norm
    hidden: jax.Array | None = None


def declare(cfg: DinoConfig) -> dict[str, Any]:
    """Declare every parameter except the mask token, which only DINOv2's own training needs."""
    width, inputs = cfg.width, 3 * cfg.patch**2
    tree = {
        "patch": layers.declare_linear(inputs, width, (None, "embed")),
        "class_token": ParamSpec((width,), ("embed",), normal(0.02)),
        "class_position": ParamSpec((width,), ("embed",), normal(0.02)),
        "position": ParamSpec((cfg.side**2, width), (None, "embed"), normal(0.02)),
        "layers": {
            **layers.declare(cfg.layer, cfg.layers),
            "attention_scale": ParamSpec((cfg.layers, width), ("layers", "embed"), ones),
            "mlp_scale": ParamSpec((cfg.layers, width), ("layers", "embed"), ones),
        },
        "final_norm": layers.declare_norm("layer_norm", (width,), ("embed",)),
    }
    if cfg.registers:
        tree["registers"] = ParamSpec((cfg.registers, width), (None, "embed"), normal(0.02))
    return tree


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' cubic convolution kernel with parameter a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(inputs: int, outputs: int, antialias: bool) -> np.ndarray:
    """Return the bicubic resampling of `inputs` samples to `outputs`, float64 [outputs, inputs].

    It follows PyTorch with half-pixel centers. Without antialiasing a = -0.75, and the edge is
    repeated beyond the image. With it a = -0.5, the kernel widens when the image shrinks, and it is
    truncated and renormalized at the edge (as in Pillow).
    """
    ratio = inputs / outputs
    centers = (np.arange(outputs) + 0.5) * ratio - 0.5
    if antialias:
        distance = np.arange(inputs)[None, :] - centers[:, None]
        weights = _cubic(distance / max(ratio, 1.0), -0.5)
        return weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((outputs, inputs))
    first = np.floor(centers).astype(int)
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, inputs - 1)
        np.add.at(matrix, (np.arange(outputs), column), _cubic(first + tap - centers, -0.75))
    return matrix


def resize(x: jax.Array, size: tuple[int, int], antialias: bool) -> jax.Array:
    """Resample [..., H, W, c] bicubically to [..., *size, c], in at least float32."""
    x = layers.at_least_float32(x)
    matrices = zip(x.shape[-3:-1], size)
    rows, columns = (jnp.asarray(resize_matrix(i, o, antialias), x.dtype) for i, o in matrices)
    return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)


def preprocess(image: jax.Array, side: int | None = None) -> jax.Array:
    """Scale pixels [B, H, W, 3] in [-1, 1] for the tower, after resizing to `side` x `side`.

    FAE resizes images of 256 pixels to 224, which are 16 x 16 patches of 14 pixels.
    """
    if side is not None and image.shape[1:3] != (side, side):
        image = jnp.clip(resize(image, (side, side), antialias=True), -1, 1)
    image = (image + 1) / 2
    return (image - jnp.asarray(PIXEL_MEAN, image.dtype)) / jnp.asarray(PIXEL_STD, image.dtype)


def positions(params: Tree, grid: tuple[int, int], cfg: DinoConfig) -> jax.Array:
    """Return the position embeddings [T, C] of a grid (rows, columns), interpolated if needed."""
    table = params["position"]
    if grid == (cfg.side, cfg.side):
        return table
    table = resize(table.reshape(cfg.side, cfg.side, cfg.width), grid, cfg.antialias)
    return table.reshape(-1, cfg.width)


def embed(params: Tree, image: jax.Array, cfg: DinoConfig) -> jax.Array:
    """Return the tokens [B, N, C] before the first layer; image as in `forward`."""
    batch_size, height, width = image.shape[:3]
    dtype = jnp.dtype(cfg.compute_dtype or params["patch"]["weight"].dtype)
    patches = linear(params["patch"], patchify(image.astype(dtype), cfg.patch, "channel_first"))
    grid = (height // cfg.patch, width // cfg.patch)
    patches = patches + positions(params, grid, cfg).astype(dtype)
    first = [(params["class_token"] + params["class_position"])[None]]
    if cfg.registers:
        first.append(params["registers"])
    first = jnp.concatenate(first).astype(dtype)
    return jnp.concatenate([jnp.broadcast_to(first, (batch_size, *first.shape)), patches], 1)


def _fold_layer_scale(layer: Tree) -> dict[str, Any]:
    """Return one layer's parameters with LayerScale in its projections: (x W + b) s."""
    out = {key: w * layer["attention_scale"] for key, w in layer["out"].items()}
    down = {key: w * layer["mlp_scale"] for key, w in layer["mlp_down"].items()}
    return {**layer, "out": out, "mlp_down": down}


def forward(
    params: Tree, image: jax.Array, cfg: DinoConfig, *, hidden: bool = False
) -> DinoFeatures:
    """Apply the tower to images [B, H, W, 3] of `preprocess`, sides multiples of the patch.

    `hidden` requests the tokens before and after every layer.
    """

    def body(h, layer):
        layer = _fold_layer_scale(layer)
        h, _ = layers.decoder_layer(layer, h, cfg.layer, None, layers.ATTEND_ALL)
        return h, h if hidden else None

    if layers.REMAT[cfg.remat] is not None:
        body = jax.checkpoint(body, policy=layers.REMAT[cfg.remat], prevent_cse=False)
    start = embed(params, image, cfg)
    h, states = jax.lax.scan(body, start, params["layers"])
    out = layers.layer_norm(params["final_norm"], h, cfg.norm_eps)
    num_special = 1 + cfg.registers
    return DinoFeatures(
        patches=out[:, num_special:],
        class_token=out[:, 0],
        registers=out[:, 1:num_special],
        hidden=jnp.concatenate([start[None], states]) if hidden else None,
    )
