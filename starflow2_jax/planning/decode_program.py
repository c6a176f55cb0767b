"""The program that draws a batch of images, lowered for a mesh.

`lower` is the one place that knows what is generated; another model's decoding is added there.
R are the rows of the decode loop: those asked for, and behind them the unconditional branch's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow2_jax.inference import decode_loop, session
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import inverse
from starflow2_jax.inference.sampling import SamplingParams, SpecialTokens
from starflow2_jax.mesh import ACTIVATIONS, batch_sharding, check_batch
from starflow2_jax.models import flow
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.params import abstract as abstract_params
from starflow2_jax.planning.memory import per_device
from starflow2_jax.training.program import model_config
from starflow2_jax.training.tasks import starflow2


@dataclass(frozen=True)
class Decoding:
    """A lowered program, its arguments' bytes on each device, the tokens it draws, and how often
    its loop runs where that depends on what is drawn.
    """

    lowered: jax.stages.Lowered
    declared: Mapping[str, int]
    tokens: int
    steps: int = 1


def lower(cfg: Mapping[str, Any], mesh: Mesh, rows: int) -> Decoding:
    """Sequential sampling of `rows` images with the experiment's guidance; of STARFlow2 the decode
    loop over an image's patches, behind a prompt as long as a row has room for.

    Weights are float32 as `generation.model.load` reads them, a VLM's in `frozen_dtype`; the batch
    is cut over data and fsdp.

    Raises:
        ValueError: a task whose decoding is not planned, rows that the mesh does not divide, or a
            layout that does not fit a weight.
    """
    own = {"flow": _flow, "starflow2": _starflow2}
    if cfg["task"] not in own:
        raise ValueError(
            f"plan --what generate: task={cfg['task']!r} is not planned, only {' and '.join(own)}"
        )
    check_batch(rows, mesh, "--batch")
    return own[cfg["task"]](cfg, mesh, rows)


def _flow(cfg, mesh, rows):
    model = model_config(cfg)
    params = abstract_params(flow.declare(model), mesh, cfg["layout"])
    over = batch_sharding(mesh)
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
            rule = cfg["sample"]["guidance_rule"]
            guided = Guidance(weight_of_guidance, rule=rule, temperature_on=on)
        given = dict(given)
        z = given.pop("z")
        return inverse(params, z, model, Conditioning(**given), guidance=guided)[0]

    with jax.set_mesh(mesh):
        lowered = jax.jit(draw, out_shardings=over).lower(params, given, number)
    held = {"params": per_device(params), "batch": per_device((given, number))}
    return Decoding(lowered, held, rows * model.tokens)


def _starflow2(cfg, mesh, rows):
    """The patches of one image a row; of the loop's two heads both count."""
    model, layout = starflow2.model_config(cfg), cfg["layout"]
    if model.kind == "mot":
        raise ValueError("plan --what generate: model.kind='mot' is not planned, only 'pretzel'")
    tree = {n: t for n, t in model.declare().items() if n != "shallow"}
    frozen = {"vlm": tree.pop("vlm")}
    params = abstract_params(tree, mesh, layout)
    params |= abstract_params(frozen, mesh, layout, jnp.dtype(cfg["frozen_dtype"]))
    weight, step = cfg["sample"]["guidance"], session.CACHE_STEP
    slots = -(-cfg["text"]["length"] // step) * step
    rule = cfg["sample"]["guidance_rule"]
    guided = Guidance(weight, rule=rule, temperature_on="all") if weight else None
    sampling = SamplingParams(1.0, 0, 1.0, 1.0, guided)
    with jax.set_mesh(mesh):
        prepared = _unstacked(params)
        state = jax.eval_shape(
            lambda params: decode_loop.empty_state(
                params, model, rows, slots, has_null_branch=bool(weight)
            ),
            prepared,
        )
        state = jax.tree.map(lambda a: _placed(a, mesh), state)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(mesh))
        special = SpecialTokens(
            model.vlm.vision_start_token, model.vlm.vision_end_token, (), (), model.vlm.vocab
        )
        steps = _placed(jax.ShapeDtypeStruct((), jnp.int32), mesh)
        lowered = decode_loop.decode_chunk.lower(
            prepared, state, keys, sampling, steps, cfg=model, special=special
        )
    held = {"params": per_device(prepared), "cache": per_device(state.caches)}
    held["batch"] = per_device(state.replace(caches=None))
    return Decoding(lowered, held, rows * model.patches, model.patches)


def _unstacked(params):
    """`streams.unstack` of ShapeDtypeStructs: a layer lies where its part of the stack does."""

    def layer(stacked):
        shape, spec = stacked.shape[1:], PartitionSpec(*stacked.sharding.spec[1:])
        where = NamedSharding(stacked.sharding.mesh, spec)
        return jax.ShapeDtypeStruct(shape, stacked.dtype, sharding=where)

    def apart(tree):
        depth = jax.tree.leaves(tree["layers"])[0].shape[0]
        return {**tree, "layers": (jax.tree.map(layer, tree["layers"]),) * depth}

    return {**params, "vlm": apart(params["vlm"]), "deep": apart(params["deep"])}


def _placed(a, mesh):
    """Rows over the batch's axes, heads of a cache over tensor where they divide."""
    spec = [ACTIVATIONS["batch"]] if a.shape else []
    if len(a.shape) == 4 and a.shape[1] % mesh.shape["tensor"] == 0:
        spec.append("tensor")
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
