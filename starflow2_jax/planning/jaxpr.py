"""What a program asks for, read from its trace: nothing is compiled.

Shapes in a trace are those of the global batch, whatever the mesh.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def inner(equation: Any) -> Iterator[tuple[Any, float]]:
    """Traces inside an equation, and how often each is run; a loop of unknown length once."""
    name, params = equation.primitive.name, equation.params
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = params["mesh"].size
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each, times


def flops(trace: Any) -> float:
    """Of all matrix products and convolutions of a trace; kernels (pallas) are not counted."""
    trace = getattr(trace, "jaxpr", trace)
    total = 0.0
    for equation in trace.eqns:
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
            total += max((flops(each) for each, _ in inner(equation)), default=0.0)
        elif name != "pallas_call":
            total += sum(times * flops(each) for each, times in inner(equation))
    return total


def kept(trace: Any, rows: int, ways: int) -> float:
    """An estimate of the activations, bytes on a device, that the backward pass waits for.

    They are what the loops over layers hand out stacked, which a trace knows exactly, of arrays
    that a batch of `rows` cut into `ways` divides; the rest (outside of loops, inside one layer's
    backward pass) is left to the compiler. Loops that run backwards hand out gradients instead.

    Args:
        trace: of a training step; rows: of the batch or, with microbatches, of one of them.
    """
    trace = getattr(trace, "jaxpr", trace)
    total = 0.0
    for equation in trace.eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
            for out, one in zip(equation.outvars, body.outvars):
                shape = out.aval.shape
                # A carry is as the body gives it; what is stacked has the loop's axis in front.
                stacked = len(shape) > len(one.aval.shape)
                if stacked and any(size and size % rows == 0 for size in shape[1:]):
                    total += math.prod(shape) * _itemsize(out.aval.dtype) / ways
        total += sum(kept(each, rows, ways) for each, _ in inner(equation))
    return total


def _itemsize(dtype: Any) -> int:
    return 0 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize
