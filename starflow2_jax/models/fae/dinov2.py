"""DINOv2: the vision transformer whose patch tokens the latent codec encodes.

Axes: B batch, H x W pixels, T patches in raster order, R register tokens, N = 1 + R + T tokens in
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
from starflow2_jax.params import ParamSpec, Tree, normal, ones, zeros

# Mean and standard deviation of red, green and blue in ImageNet, of pixels between 0 and 1.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """A DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588) or without.

    Attributes:
        side: rows (= columns) of the grid of trained position embeddings; other grids are
            interpolated from it, with `antialias` or without.
        gated: SwiGLU (of `activation`) in place of the plain MLP.
        registers: number of register tokens.
        compute_dtype: dtype of matmuls; None is that of the parameters.
        remat: a name in `layers.REMAT`, for gradients with respect to the image.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int = 14
    side: int = 37
    registers: int = 0
    gated: bool = False
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    antialias: bool = False
    compute_dtype: str | None = None
    remat: str = "none"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"dinov2: width={self.width} is not a multiple of heads={self.heads}")
        if self.remat not in layers.REMAT:
            raise ValueError(f"dinov2: remat={self.remat!r} is not one of {tuple(layers.REMAT)}")
        # Also refuses an unknown activation.
        self.layer  # noqa: B018

    @property
    def layer(self) -> LayerConfig:
        """Its layers, LayerScale apart."""
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
    """Hidden channels of a SwiGLU with about the parameters of a plain MLP of this ratio."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


_SWIGLU = {"gated": True, "activation": "silu"}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "mlp_width": 512, "patch": 8, "side": 8},
    "small": {"width": 384, "layers": 12, "heads": 6, "mlp_width": 1536},
    "base": {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072},
    "large": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
    "giant": {"width": 1536, "layers": 40, "heads": 24, "mlp_width": 4096, **_SWIGLU},
}
_REGISTERS = {"registers": 4, "antialias": True}
PRESETS: dict[str, Config] = {
    **{name: Config(**size) for name, size in _SIZES.items()},
    **{f"{name}_registers": Config(**size, **_REGISTERS) for name, size in _SIZES.items()},
}


def preset(name: str, **changes: Any) -> Config:
    """A published size by name, `small` (ViT-S/14) to `giant` (ViT-g/14), or `tiny`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"dinov2: preset {name!r} is not one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


@struct.dataclass
class Features:
    """What the tower says of an image, after its final norm.

    Attributes:
        patches: [B, T, C]; class_token: [B, C]; registers: [B, R, C].
        hidden: [L + 1, B, N, C], the tokens before the first layer and after each, without the
            final norm; None unless asked for.
    """

    patches: jax.Array
    class_token: jax.Array
    registers: jax.Array
    hidden: jax.Array | None = None


def declare(cfg: Config) -> dict[str, Any]:
    """Every weight. The mask token of the published files serves their training only."""
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
        "final_norm": {
            "weight": ParamSpec((width,), ("embed",), ones),
            "bias": ParamSpec((width,), ("embed",), zeros),
        },
    }
    if cfg.registers:
        tree["registers"] = ParamSpec((cfg.registers, width), (None, "embed"), normal(0.02))
    return tree


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(inputs: int, outputs: int, antialias: bool) -> np.ndarray:
    """Bicubic resampling of `inputs` samples to `outputs`, float64 [outputs, inputs].

    PyTorch's rules, half-pixel centres: without antialiasing a = -0.75 and samples beyond the edge
    repeat it; with it a = -0.5, the kernel widens where the result is smaller, and is cut and
    normalised at the edge (as Pillow's).
    """
    ratio = inputs / outputs
    centres = (np.arange(outputs) + 0.5) * ratio - 0.5
    if antialias:
        wide = max(ratio, 1.0)
        distance = np.arange(inputs)[None, :] - centres[:, None]
        weights = _cubic(distance / wide, -0.5)
        return weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((outputs, inputs))
    first = np.floor(centres).astype(int)
    for tap in range(-1, 3):
        where = np.clip(first + tap, 0, inputs - 1)
        np.add.at(matrix, (np.arange(outputs), where), _cubic(first + tap - centres, -0.75))
    return matrix


def resize(x: jax.Array, size: tuple[int, int], antialias: bool) -> jax.Array:
    """Bicubic resampling of [..., H, W, c] to [..., *size, c], in at least float32."""
    x = layers.at_least_float32(x)
    matrices = zip(x.shape[-3:-1], size)
    rows, columns = (jnp.asarray(resize_matrix(i, o, antialias), x.dtype) for i, o in matrices)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, x, precision=exact)


def preprocess(image: jax.Array, side: int | None = None) -> jax.Array:
    """Pixels in [-1, 1] to the tower's scale, [B, H, W, 3], resized to `side` x `side` if given.

    A 256-pixel image gives 16 x 16 tokens of 14 pixels at side 224 (paper.md 2.1).
    """
    if side is not None and image.shape[1:3] != (side, side):
        image = jnp.clip(resize(image, (side, side), antialias=True), -1, 1)
    image = (image + 1) / 2
    return (image - jnp.asarray(PIXEL_MEAN, image.dtype)) / jnp.asarray(PIXEL_STD, image.dtype)


def positions(params: Tree, grid: tuple[int, int], cfg: Config) -> jax.Array:
    """Position embeddings [T, C] of a grid (rows, columns), interpolated where it is not the
    trained one."""
    table = params["position"]
    if grid == (cfg.side, cfg.side):
        return table
    table = resize(table.reshape(cfg.side, cfg.side, cfg.width), grid, cfg.antialias)
    return table.reshape(-1, cfg.width)


def embed(params: Tree, image: jax.Array, cfg: Config) -> jax.Array:
    """Tokens [B, N, C] before the first layer; image as in `forward`."""
    batch, height, width = image.shape[:3]
    dtype = jnp.dtype(cfg.compute_dtype or params["patch"]["weight"].dtype)
    patches = linear(params["patch"], patchify(image.astype(dtype), cfg.patch, "channel_first"))
    grid = (height // cfg.patch, width // cfg.patch)
    patches = patches + positions(params, grid, cfg).astype(dtype)
    first = [(params["class_token"] + params["class_position"])[None]]
    if cfg.registers:
        first.append(params["registers"])
    first = jnp.concatenate(first).astype(dtype)
    return jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape)), patches], 1)


def _fold(layer: Tree) -> dict[str, Any]:
    """One layer's weights with LayerScale in the projections before it: (x W + b) s."""
    rest = {k: v for k, v in layer.items() if k not in ("attention_scale", "mlp_scale")}
    scale = lambda weights, by: {k: w * layer[by] for k, w in weights.items()}
    out, down = scale(rest["out"], "attention_scale"), scale(rest["mlp_down"], "mlp_scale")
    return {**rest, "out": out, "mlp_down": down}


def forward(params: Tree, image: jax.Array, cfg: Config, *, hidden: bool = False) -> Features:
    """The tower over images.

    Args:
        image: [B, H, W, 3] on the tower's scale (see `preprocess`), sides divisible by the patch.
        hidden: also return the tokens before and after every layer.

    Raises:
        ValueError: sides that the patch does not divide.
    """
    everything = np.ones((1, 1), bool)

    def body(h, layer):
        h = layers.decoder_layer(_fold(layer), h, cfg.layer, None, everything)[0]
        return h, h if hidden else None

    if layers.REMAT[cfg.remat] is not None:
        body = jax.checkpoint(body, policy=layers.REMAT[cfg.remat], prevent_cse=False)
    start = embed(params, image, cfg)
    h, states = jax.lax.scan(body, start, params["layers"])
    out = layers.layer_norm(params["final_norm"], h, cfg.norm_eps)
    before = 1 + cfg.registers
    return Features(
        patches=out[:, before:],
        class_token=out[:, 0],
        registers=out[:, 1:before],
        hidden=jnp.concatenate([start[None], states]) if hidden else None,
    )
