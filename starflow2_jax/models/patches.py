"""Conversion of pixels to numbers and to tokens, and back.

Shapes: B batch, H x W pixels, c colors, p patch side, T = H W / p^2 tokens in raster order,
D = c p^2 channels of a token.
"""

import jax
import jax.numpy as jnp

LAYOUTS = ("channel_first", "channel_last")


def scale_pixels(image: jax.Array) -> jax.Array:
    """Scale uint8 0 ... 255 to float32 -1 ... 1."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_pixels(x: jax.Array, noise: str) -> jax.Array:
    """Round data values to uint8: the inverse of scaling and of noise of a kind.

    Uniform noise has values (pixel + U[0, 1)) / 128 - 1, all other data lie in -1 ... 1.
    """
    levels = jnp.floor((x + 1) * 128) if noise == "uniform" else jnp.round((x + 1) * 127.5)
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def patchify(image: jax.Array, patch: int, layout: str) -> jax.Array:
    """Cut images [B, H, W, c] into tokens [B, T, D].

    The layout of a token's channels is (c, row, column) for `channel_first`, as in TarFlow, or
    (row, column, c) for `channel_last`, as in STARFlow.
    """
    batch_size, height, width, colors = image.shape
    _check(height, width, patch, layout)
    x = image.reshape(batch_size, height // patch, patch, width // patch, patch, colors)
    order = (0, 1, 3, 5, 2, 4) if layout == "channel_first" else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(batch_size, -1, patch * patch * colors)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch: int, layout: str) -> jax.Array:
    """Invert `patchify`: tokens [B, T, D] of a (rows, columns) grid to images [B, H, W, c]."""
    batch_size, _, channels = tokens.shape
    rows, columns = grid
    _check(rows * patch, columns * patch, patch, layout)
    colors = channels // patch**2
    token_shape = (colors, patch, patch) if layout == "channel_first" else (patch, patch, colors)
    x = tokens.reshape(batch_size, rows, columns, *token_shape)
    order = (0, 1, 4, 2, 5, 3) if layout == "channel_first" else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(batch_size, rows * patch, columns * patch, colors)


def _check(height, width, patch, layout):
    if layout not in LAYOUTS:
        raise ValueError(f"image.channel_order={layout!r} is not one of {LAYOUTS}")
    if height % patch or width % patch:
        raise ValueError(f"image: {height} x {width} pixels are not divisible by patch={patch}")
