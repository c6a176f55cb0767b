"""Convert a user's LPIPS or VGG16 file to the tree of `models.fae.perceptual`.

Two styles of names are read: those of the `lpips` package (`net.slice1.0.weight`,
`lin0.model.1.weight`) and of torchvision's VGG16 (`features.0.weight`), whose channels all have
weight one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow2_jax.checkpoints.tensor_files import compare, open_source, raise_problems
from starflow2_jax.models.fae.perceptual import DEPTHS, LPIPSConfig, declare
from starflow2_jax.params import flatten, unflatten

# Index of every convolution among torchvision's layers, which also count ReLUs and poolings.
_INDEX = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# The classifier, the constants that scale colors, and second names of the channel weights.
_UNUSED = re.compile(r"classifier\..*|scaling_layer\.(shift|scale)|lins\..*")


def load(
    mapping_or_path: Mapping[str, Any] | str | Path, dtype: Any = jnp.float32
) -> tuple[LPIPSConfig, dict[str, Any]]:
    """Load the perceptual distance from arrays by name, or from a path for `open_source`."""
    source = open_source(mapping_or_path)
    is_lpips = any(name.startswith("net.slice") for name in source)
    names = {}
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            layer = f"net.slice{i + 1}.{_INDEX[i][j]}" if is_lpips else f"features.{_INDEX[i][j]}"
            names |= {f"stages/{i}/{j}/{k}": f"{layer}.{k}" for k in ("weight", "bias")}
        if is_lpips:
            second = f"lins.{i}.model.1.weight"
            first = f"lin{i}.model.1.weight"
            names[f"channels/{i}"] = second if first not in source and second in source else first
    expected = set(names.values())
    source = {n: t for n, t in source.items() if n in expected or not _UNUSED.fullmatch(n)}
    summary = "the tensors are not LPIPS or VGG16 of torchvision"
    if missing := [name for name in names.values() if name not in source]:
        unexpected = [name for name in source if name not in expected]
        raise_problems(summary, {"missing": missing, "unexpected": unexpected})
    last = [names[f"stages/{i}/{depth - 1}/bias"] for i, depth in enumerate(DEPTHS)]
    cfg = LPIPSConfig(tuple(source[name].shape[0] for name in last))
    declared = flatten(declare(cfg))
    shapes = {name: _public_shape(declared[leaf].shape, leaf) for leaf, name in names.items()}
    raise_problems(summary, compare(source, shapes))
    leaves = {leaf: np.ones(spec.shape) for leaf, spec in declared.items() if leaf not in names}
    for leaf, name in names.items():
        array = source[name].read()
        array = array.transpose(2, 3, 1, 0) if leaf.endswith("/weight") else array.reshape(-1)
        leaves[leaf] = array
    return cfg, unflatten({leaf: jnp.asarray(array, dtype) for leaf, array in leaves.items()})


def _public_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
    if leaf.startswith("channels/"):
        return (1, *shape, 1, 1)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
