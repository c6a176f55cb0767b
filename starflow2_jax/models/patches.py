"""Pixels to numbers and to tokens, and back.

Axes: B batch, H x W pixels, c colour channels, p patch side, T = H W / p^2 tokens in raster order,
D = c p^2 token channels.
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
    """[B, H, W, c] to tokens [B, T, D].

    Args:
        layout: order inside a token, (c, row, column) `channel_first` as TarFlow or (row, column,
            c) `channel_last` as STARFlow.

    Raises:
        ValueError: an image that the patch size does not divide, or an unknown layout.
    """
    batch, height, width, colours = image.shape
    _check(height, width, patch, layout)
    x = image.reshape(batch, height // patch, patch, width // patch, patch, colours)
    order = (0, 1, 3, 5, 2, 4) if layout == "channel_first" else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(batch, -1, patch * patch * colours)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch: int, layout: str) -> jax.Array:
    """Tokens [B, T, D] of a (rows, columns) grid to [B, H, W, c]: the inverse of `patchify`."""
    batch, _, channels = tokens.shape
    rows, columns = grid
    _check(rows * patch, columns * patch, patch, layout)
    colours = channels // patch**2
    inside = (colours, patch, patch) if layout == "channel_first" else (patch, patch, colours)
    x = tokens.reshape(batch, rows, columns, *inside)
    order = (0, 1, 4, 2, 5, 3) if layout == "channel_first" else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(batch, rows * patch, columns * patch, colours)


def _check(height, width, patch, layout):
    if layout not in LAYOUTS:
        raise ValueError(f"image.channel_order={layout!r} is not one of {LAYOUTS}")
    if height % patch or width % patch:
        raise ValueError(f"image: {height} x {width} pixels are not divisible by patch={patch}")
