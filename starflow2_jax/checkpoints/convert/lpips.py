"""A user's LPIPS or VGG16 file to the tree of `models.fae.perceptual`.

Readable are the names of the `lpips` package (`net.slice1.0.weight`, `lin0.model.1.weight`) and of
torchvision's VGG16 (`features.0.weight`), whose channels all weigh one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow2_jax.checkpoints.tensor_files import open_source
from starflow2_jax.models.fae.perceptual import DEPTHS, LPIPSConfig, declare
from starflow2_jax.params import flatten, unflatten

# Index of every convolution among torchvision's layers: a convolution and its ReLU count, so does a
# pooling.
_INDEX = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# The classifier, the constants of the colour scale, and second names of the channel weights.
_DEAD = re.compile(r"classifier\..*|scaling_layer\.(shift|scale)|lins\..*")


def load(
    mapping_or_path: Mapping[str, Any] | str | Path, dtype: Any = jnp.float32
) -> tuple[LPIPSConfig, dict[str, Any]]:
    """Configuration and parameters of the perceptual distance.

    Args:
        mapping_or_path: arrays by name, or what `sources.open_source` reads.

    Raises:
        ValueError: neither of the two; missing, unexpected and misshapen names, listed together.
        FileNotFoundError, ImportError: as `open_source`.
    """
    source = open_source(mapping_or_path)
    full = any(name.startswith("net.slice") for name in source)
    names = {}
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            layer = f"net.slice{i + 1}.{_INDEX[i][j]}" if full else f"features.{_INDEX[i][j]}"
            names |= {f"stages/{i}/{j}/{k}": f"{layer}.{k}" for k in ("weight", "bias")}
        if full:
            second = f"lins.{i}.model.1.weight"
            first = f"lin{i}.model.1.weight"
            names[f"channels/{i}"] = second if first not in source and second in source else first
    missing = [name for name in names.values() if name not in source]
    held = set(names.values())
    odd = [name for name in source if name not in held and not _DEAD.fullmatch(name)]
    problems = {"missing": missing, "unexpected": odd}
    if not missing:
        last = [names[f"stages/{i}/{depth - 1}/bias"] for i, depth in enumerate(DEPTHS)]
        cfg = LPIPSConfig(tuple(source[name].shape[0] for name in last))
        tree = flatten(declare(cfg))
        expected = {name: _public_shape(tree[leaf].shape, leaf) for leaf, name in names.items()}
        problems["misshapen"] = [
            f"{name} is {list(source[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if source[name].shape != shape
        ]
    if any(problems.values()):
        text = "; ".join(f"{len(n)} {kind}: {', '.join(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"the tensors are not LPIPS or VGG16 of torchvision. {text}")
    leaves = {leaf: np.ones(weight.shape) for leaf, weight in tree.items() if leaf not in names}
    for leaf, name in names.items():
        array = source[name].read()
        array = array.transpose(2, 3, 1, 0) if leaf.endswith("/weight") else array.reshape(-1)
        leaves[leaf] = array
    return cfg, unflatten({leaf: jnp.asarray(array, dtype) for leaf, array in leaves.items()})


def _public_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
    if leaf.startswith("channels/"):
        return (1, *shape, 1, 1)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
