"""The program that draws a batch of images, lowered for a mesh.

`lower` is the one place that knows what is generated; another model's decoding is added there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow2_jax import mesh as meshes
from starflow2_jax import params as weights
from starflow2_jax.generation.guidance import Guidance
from starflow2_jax.generation.inverse import inverse
from starflow2_jax.models import flow
from starflow2_jax.planning.memory import per_device
from starflow2_jax.training.step import model_config


@dataclass(frozen=True)
class Decoding:
    """A lowered program, its arguments' bytes on each device, and the tokens it draws."""

    lowered: jax.stages.Lowered
    declared: Mapping[str, int]
    tokens: int


def lower(cfg: Mapping[str, Any], mesh: Mesh, rows: int) -> Decoding:
    """Sequential sampling of `rows` images with the experiment's guidance.

    Weights are float32, as `generation.model.load` reads them; the batch is cut over data and fsdp.

    Raises:
        ValueError: a task whose decoding is not planned, rows that the mesh does not divide, or a
            layout that does not fit a weight.
    """
    if cfg["task"] != "flow":
        raise ValueError(f"plan --what generate: task={cfg['task']!r} is not planned, only 'flow'")
    meshes.check_batch(rows, mesh, "--batch")
    return _flow(cfg, mesh, rows)


def _flow(cfg, mesh, rows):
    model = model_config(cfg)
    params = weights.abstract(flow.declare(model), mesh, cfg["layout"])
    over = meshes.batch_sharding(mesh)
    of = lambda shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=over)
    given = {"z": of((model.tokens, model.channels), jnp.float32)}
    if model.text_channels:
        given["text"] = of((model.text_length, model.text_channels), jnp.float32)
    if model.classes:
        given["labels"] = of((), jnp.int32)
    weight = cfg["sample"]["guidance"]
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def draw(params, given, weight_of_guidance):
        guided = None
        if weight:
            on = "all" if model.text_channels else "unconditional"
            rule = cfg["sample"]["rule"]
            guided = Guidance(weight_of_guidance, rule=rule, temperature_on=on)
        given = dict(given)
        return inverse(params, given.pop("z"), model, guidance=guided, **given)[0]

    with jax.set_mesh(mesh):
        lowered = jax.jit(draw, out_shardings=over).lower(params, given, number)
    held = {"params": per_device(params), "batch": per_device((given, number))}
    return Decoding(lowered, held, rows * model.tokens)
