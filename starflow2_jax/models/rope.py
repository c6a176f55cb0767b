"""Rotary positions of image and text tokens: coordinates (row, column, third) to rotation tables.

Axes: N positions, A = 2 or 3 coordinates, D head channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

THIRD_AXIS_PAIRS = 8
BASE = 10000.0


def angles(positions: Any, head_dim: int) -> Any:
    """Angles [..., N, D/2] of positions [..., N, A].

    Rows and columns share the pairs evenly; a third coordinate takes eight pairs of its own
    (paper.md 3.3). Numpy positions give float64 angles.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    pairs = head_dim // 2
    third = THIRD_AXIS_PAIRS if positions.shape[-1] == 3 else 0
    plane = BASE ** (-2 * np.arange((pairs - third) // 2) / (pairs - third))
    parts = [positions[..., axis, None] * plane for axis in range(2)]
    if third:
        parts.append(positions[..., 2, None] * BASE ** (-np.arange(third) / third))
    return xp.concatenate(parts, -1)


def tables(angles: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of angles. Those of numpy are evaluated in float64 and cast once."""
    xp = np if isinstance(angles, np.ndarray) else jnp
    return jnp.asarray(xp.cos(angles), dtype), jnp.asarray(xp.sin(angles), dtype)


def plane(grid: tuple[int, int], side: int) -> np.ndarray:
    """(row, column) float64 [T, 2] of a grid in raster order, in units of the training grid's side.

    Rounded to float32 on the way, as the published models were trained: 3 / sqrt(32) * 8 is a
    number that float32 does not hold, and weights have learnt the rounded one.
    """
    rows, columns = grid
    mean = np.float32((rows * columns) ** 0.5)
    steps = [np.arange(n, dtype=np.float32) / mean * np.float32(side) for n in (rows, columns)]
    return np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 2).astype(np.float64)


def after_text(plane: np.ndarray, length: int, side: int) -> np.ndarray:
    """STARFlow's coordinates [length + T, 3]: text has only a third one, scaled to `side`.

    In float32 on the way, as in `plane`.
    """
    text, image = np.zeros((length, 3)), np.pad(plane, ((0, 0), (0, 1)))
    text[:, 2] = np.arange(length, dtype=np.float32) / np.float32(max(length, 1)) * np.float32(side)
    return np.concatenate([text, image])


def next_item(plane: np.ndarray, length: int) -> np.ndarray:
    """Coordinates [length + T - 1, 3] where every input carries those of the item it predicts.

    The third coordinate counts text tokens and whole images alike, unscaled (design.md 4).
    """
    text, image = np.zeros((length, 3)), np.pad(plane, ((0, 0), (0, 1)))
    text[:, 2] = np.arange(length)
    image[:, 2] = length
    return np.concatenate([text, image])[1:]
