"""FLOPs and saved activations of a program, read from its jaxpr without compiling it.

Shapes in a jaxpr are those of the global batch, on any mesh.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def sub_jaxprs(equation: Any) -> Iterator[tuple[Any, float]]:
    """Yield the jaxprs inside an equation and how often they run (unknown loops once)."""
    name, params = equation.primitive.name, equation.params
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = params["mesh"].size
    for value in params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(candidate, "jaxpr", candidate)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr, times


def count_flops(jaxpr: Any) -> float:
    """Return the FLOPs of all matrix products and convolutions; Pallas kernels do not count."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)
        elif name == "conv_general_dilated":
            rhs, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(out) * math.prod(rhs) / rhs[features]
        elif name == "cond":
            total += max((count_flops(branch) for branch, _ in sub_jaxprs(equation)), default=0.0)
        elif name != "pallas_call":
            total += sum(times * count_flops(body) for body, times in sub_jaxprs(equation))
    return total


def saved_activation_bytes(jaxpr: Any, rows: int, shards: int) -> float:
    """Estimate the bytes per device of activations saved for the backward pass.

    Counted are the stacked outputs of the loops over layers, which a jaxpr knows exactly, with a
    dimension that is a multiple of `rows`. Activations outside loops and inside the backward pass
    of one layer are left to the compiler. Reversed loops return gradients and do not count.
    `rows` are those of one microbatch, and `shards` is the number of shards of the batch.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
            for out, body_out in zip(equation.outvars, body.outvars):
                shape = out.aval.shape
                # A carry has the shape of the body's output; a stacked output has one more axis.
                is_stacked = len(shape) > len(body_out.aval.shape)
                if is_stacked and any(size and size % rows == 0 for size in shape[1:]):
                    total += math.prod(shape) * _itemsize(out.aval.dtype) / shards
        for body, _ in sub_jaxprs(equation):
            total += saved_activation_bytes(body, rows, shards)
    return total


def _itemsize(dtype: Any) -> int:
    return 0 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize
