"""Map between the tensors of a published state dict and our parameter tree, in both directions.

Published models have linears (out, in), one tensor per layer, and sometimes several matrices in the
rows of one tensor. Our tree has linears (in, out), layers stacked on the leading axis, and every
matrix apart. A table of `Piece`s says which rows of which tensor form which leaf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from starflow2_jax.checkpoints.tensor_files import Index, StoredTensor, compare, raise_problems
from starflow2_jax.params import Tree, flatten, unflatten


@dataclass(frozen=True)
class Piece:
    """Rows of a published tensor that form one leaf of our tree, or one layer of it."""

    name: str  # name of the published tensor
    shape: tuple[int, ...]  # shape of these rows in the published tensor
    first_row: int  # index of the first of these rows
    leaf: str  # name of our leaf
    layer: int | None  # index on the leaf's leading axis; None for a leaf that is not stacked
    transposed: bool  # true if the leaf is the transpose (in, out) of the rows (out, in)


def published_shapes(pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every published tensor, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        rows = max(shapes.get(piece.name, (0,))[0], piece.first_row + piece.shape[0])
        shapes[piece.name] = (rows, *piece.shape[1:])
    return shapes


def read_rows(source: Mapping[str, StoredTensor], piece: Piece) -> np.ndarray:
    """Read a piece as it is stored. A piece that is transposed in our tree becomes a matrix."""
    rows = source[piece.name].read((slice(piece.first_row, piece.first_row + piece.shape[0]),))
    return rows.reshape(len(rows), -1) if piece.transposed else rows


def to_tree(
    pieces: Sequence[Piece], source: Mapping[str, StoredTensor], declared: Tree
) -> dict[str, Any]:
    """Return our tree of a checked state dict, as tensors that are assembled when read.

    The pieces of a stacked leaf are in order of layer.
    """
    by_leaf: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_leaf.setdefault(piece.leaf, []).append(piece)

    def read_piece(piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
        rows = read_rows(source, piece)
        return rows.T if piece.transposed else rows.reshape(shape)

    def lazy_leaf(leaf: str, shape: tuple[int, ...]) -> StoredTensor:
        first, dtype = by_leaf[leaf][0], source[by_leaf[leaf][0].name].dtype

        def read(index: Index = ()) -> np.ndarray:
            if first.layer is None:
                array = read_piece(first, shape)
                return array[index] if index else array
            layers, *inner = (*index, *(slice(None),) * (len(shape) - len(index)))
            sizes = [len(range(*s.indices(n))) for s, n in zip((layers, *inner), shape)]
            stack = np.empty(sizes, dtype)
            for target, piece in zip(stack, by_leaf[leaf][layers]):
                target[...] = read_piece(piece, shape[1:])[tuple(inner)]
            return stack

        return StoredTensor(shape, dtype, source[first.name].location, read)

    return unflatten({leaf: lazy_leaf(leaf, w.shape) for leaf, w in flatten(declared).items()})


def to_published(pieces: Sequence[Piece], params: Tree, declared: Tree) -> dict[str, StoredTensor]:
    """Return the published tensors of our tree, assembled when they are read."""
    leaves = flatten(params)
    shapes = {leaf: spec.shape for leaf, spec in flatten(declared).items()}
    raise_problems("not the parameters of the configuration", compare(leaves, shapes))
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)

    def lazy_tensor(name: str, shape: tuple[int, ...]) -> StoredTensor:
        ordered = sorted(by_name[name], key=lambda piece: piece.first_row)

        def read(index: Index = ()) -> np.ndarray:
            rows = [_published_rows(leaves[piece.leaf], piece) for piece in ordered]
            array = rows[0] if len(rows) == 1 else np.concatenate(rows)
            return array[index] if index else array

        return StoredTensor(shape, np.dtype(leaves[ordered[0].leaf].dtype), "the tree", read)

    return {name: lazy_tensor(name, shape) for name, shape in published_shapes(pieces).items()}


def _published_rows(leaf: Any, piece: Piece) -> np.ndarray:
    if not isinstance(leaf, StoredTensor):
        array = np.asarray(leaf if piece.layer is None else leaf[piece.layer])
    elif piece.layer is None:
        array = leaf.read()
    else:
        array = leaf.read((slice(piece.layer, piece.layer + 1),))[0]
    array = array.T if piece.transposed else array
    return np.ascontiguousarray(array).reshape(piece.shape)
