"""Rotary position embeddings of image and text tokens: from coordinates to rotation tables.

Coordinates are (row, column) or (row, column, third). Shapes: N positions, A = 2 or 3 coordinates,
D channels of a head, T tokens of an image.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

THIRD_AXIS_PAIRS = 8
BASE = 10000.0


class Positions(NamedTuple):
    """Coordinates of the inputs of a block, [N, A] or [B, N, A]."""

    queries: Any  # those that the queries carry
    keys: Any = None  # those that the keys carry; None: the same


class QueryKeyTables(NamedTuple):
    """Rotation tables (cos, sin) of queries and keys at different positions."""

    queries: tuple[jax.Array, jax.Array]
    keys: tuple[jax.Array, jax.Array]


def angles(positions: Any, head_dim: int, grid_side: int | None = None) -> Any:
    """Return angles [..., N, D/2] of positions [..., N, A] (STARFlow, arXiv 2506.06276).

    A third coordinate has eight channel pairs with frequencies 10000^(-i / 8). Rows and columns
    share the other 2 n pairs evenly, with frequencies 10000^(-i / n), or with a `grid_side` those
    of `grid_frequencies`. Numpy positions give float64.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    pairs = head_dim // 2
    third = THIRD_AXIS_PAIRS if positions.shape[-1] == 3 else 0
    if grid_side is None:
        plane = BASE ** (-2 * np.arange((pairs - third) // 2) / (pairs - third))
    else:
        plane = grid_frequencies((pairs - third) // 2, grid_side)
    parts = [positions[..., axis, None] * plane for axis in range(2)]
    if third:
        parts.append(positions[..., 2, None] * BASE ** (-np.arange(third) / third))
    return xp.concatenate(parts, -1)


def grid_frequencies(count: int, side: int) -> np.ndarray:
    """Return pi / side times 1, ..., n: frequencies that resolve the places of a grid.

    With more pairs than rows they are pi / n times 1, ..., n, since those above pi are no others on
    the grid. The lowest is unique over all distances in the grid, up to side - 1.
    """
    return np.pi / max(side, count) * np.arange(1, count + 1)


def tables(angles: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return (cos, sin) of angles; numpy angles are evaluated in float64 and cast once."""
    xp = np if isinstance(angles, np.ndarray) else jnp
    return jnp.asarray(xp.cos(angles), dtype), jnp.asarray(xp.sin(angles), dtype)


def plane(grid: tuple[int, int], side: int) -> np.ndarray:
    """Return (row, column) float64 [T, 2] of a grid in raster order, scaled to the training grid.

    Intermediate values are rounded to float32, as the published models were trained: 3 / sqrt(32) *
    8 is no float32 number, and the weights have learned the rounded one.
    """
    rows, columns = grid
    mean = np.float32((rows * columns) ** 0.5)
    steps = [np.arange(n, dtype=np.float32) / mean * np.float32(side) for n in (rows, columns)]
    return np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 2).astype(np.float64)


def predecessors(plane: np.ndarray, side: int) -> np.ndarray:
    """Return coordinates [T, 2] of the tokens before each of a grid's, `plane` [T, 2].

    The start token, before the first one, stands a step to the left of the grid.
    """
    step = side / len(plane) ** 0.5
    return np.concatenate([[[0.0, -step]], plane[:-1]])


def successors(plane: np.ndarray, side: int) -> np.ndarray:
    """Return coordinates [T, 2] of the tokens after each of a grid's, `plane` [T, 2].

    The last token, which predicts none, has those of the place to its right.
    """
    step = side / len(plane) ** 0.5
    return np.concatenate([plane[1:], plane[-1:] + np.array([0.0, step])])


def after_text(plane: np.ndarray, length: int, side: int) -> np.ndarray:
    """Return STARFlow's coordinates [length + T, 3]: text has only a third one, scaled to `side`.

    Intermediate values are float32, as in `plane`.
    """
    text, image = np.zeros((length, 3)), np.pad(plane, ((0, 0), (0, 1)))
    text[:, 2] = np.arange(length, dtype=np.float32) / np.float32(max(length, 1)) * np.float32(side)
    return np.concatenate([text, image])


def counted(plane: np.ndarray, length: int) -> np.ndarray:
    """Return coordinates [length + T, 3] of text and the tokens of an image after it.

    The third coordinate counts text tokens and whole images alike, unscaled (see docs/method.md).
    """
    text, image = np.zeros((length, 3)), np.pad(plane, ((0, 0), (0, 1)))
    text[:, 2] = np.arange(length)
    image[:, 2] = length
    return np.concatenate([text, image])
