"""The program that generates a batch of images, lowered for a mesh.

`lower` chooses the program by the task; the decoding of another model is added there. The rows of
the decode loop are those of the batch, followed by those of the unconditional branch.
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
from starflow2_jax.mesh import batch_sharding, cache_sharding, check_batch, replicated
from starflow2_jax.models import flow
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.params import abstract as abstract_params
from starflow2_jax.planning.memory import bytes_per_device
from starflow2_jax.training.tasks import flow as flow_task, registry, starflow2


@dataclass(frozen=True)
class LoweredDecoding:
    """A lowered program."""

    lowered: jax.stages.Lowered  # the program
    declared: Mapping[str, int]  # bytes of its arguments per device, by purpose
    tokens: int  # number of tokens that it generates
    # trip count of a loop whose length depends on the sampled values, None for no such loop
    steps: int | None = None


def lower(cfg: Mapping[str, Any], device_mesh: Mesh, rows: int) -> LoweredDecoding:
    """Lower the sequential sampling of `rows` images with the experiment's guidance.

    The program of STARFlow2 is the decode loop over the patches of one image per row, after a
    prompt that fills the row. Weights are float32, those of a VLM in `frozen_dtype`.
    """
    programs = {"flow": _lower_flow, "starflow2": _lower_starflow2}
    task = registry.kind(cfg)
    if task not in programs:
        raise ValueError(
            f"plan --what generate: task={task!r} is not planned, only {' and '.join(programs)}"
        )
    check_batch(rows, device_mesh, "--batch")
    return programs[task](cfg, device_mesh, rows)


def _lower_flow(cfg, device_mesh, rows):
    model = flow_task.model_config(cfg)
    params = abstract_params(flow.declare(model), device_mesh, cfg["layout"])
    sharding = batch_sharding(device_mesh)

    def rows_of(shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    z = rows_of((model.tokens, model.channels), jnp.float32)
    conditioning = Conditioning()
    if model.text_channels:
        text = rows_of((model.text_length, model.text_channels), jnp.float32)
        conditioning = conditioning.replace(text=text)
    if model.classes:
        conditioning = conditioning.replace(labels=rows_of((), jnp.int32))
    weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(device_mesh))

    def sample(params, z, conditioning, weight):
        guidance = None
        if cfg["sample"]["guidance"]:
            guidance = Guidance(
                weight,
                rule=cfg["sample"]["guidance_rule"],
                temperature_on="all" if model.text_channels else "unconditional",
            )
        return inverse(params, z, model, conditioning, guidance=guidance)[0]

    with jax.set_mesh(device_mesh):
        jitted = jax.jit(sample, out_shardings=sharding)
        lowered = jitted.lower(params, z, conditioning, weight)
    declared = {
        "params": bytes_per_device(params),
        "batch": bytes_per_device((z, conditioning, weight)),
    }
    return LoweredDecoding(lowered, declared, rows * model.tokens)


def _lower_starflow2(cfg, device_mesh, rows):
    """Lower the decode loop over one image per row; both heads of the loop count."""
    model, layout = starflow2.model_config(cfg), cfg["layout"]
    if model.kind == "mot":
        raise ValueError("plan --what generate: model.kind='mot' is not planned, only 'pretzel'")
    tree = {n: t for n, t in model.declare().items() if n != "shallow"}
    frozen = {"vlm": tree.pop("vlm")}
    params = abstract_params(tree, device_mesh, layout)
    params |= abstract_params(frozen, device_mesh, layout, jnp.dtype(cfg["frozen_dtype"]))
    weight, step = cfg["sample"]["guidance"], session.CACHE_STEP
    slots = -(-cfg["text"]["length"] // step) * step
    rule = cfg["sample"]["guidance_rule"]
    guidance = Guidance(weight, rule=rule, temperature_on="all") if weight else None
    sampling = SamplingParams(1.0, 0, 1.0, 1.0, guidance)
    with jax.set_mesh(device_mesh):
        prepared = _unstack_layers(params)
        state = jax.eval_shape(
            lambda params: decode_loop.empty_state(
                params, model, rows, slots, has_null_branch=bool(weight)
            ),
            prepared,
        )

        def place(a):
            sharding = cache_sharding(a.shape, device_mesh)
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

        caches = decode_loop.map_caches(place, state.caches)
        state = jax.tree.map(lambda a: _shard(a, device_mesh), state.replace(caches=None))
        steps = _shard(jax.ShapeDtypeStruct((), jnp.int32), device_mesh)
        state = state.replace(caches=tuple(c.replace(length=steps) for c in caches))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(device_mesh))
        special = SpecialTokens(
            model.vlm.vision_start_token, model.vlm.vision_end_token, (), (), model.vlm.vocab
        )
        lowered = decode_loop.decode_chunk.lower(
            prepared, state, keys, sampling, steps, cfg=model, special=special
        )
    declared = {"params": bytes_per_device(prepared), "cache": bytes_per_device(state.caches)}
    declared["batch"] = bytes_per_device(state.replace(caches=None))
    return LoweredDecoding(lowered, declared, rows * model.num_patches, model.num_patches)


def _unstack_layers(params):
    """Split stacked layers of ShapeDtypeStructs; a layer keeps the sharding of its stack."""

    def layer(stacked):
        shape, spec = stacked.shape[1:], PartitionSpec(*stacked.sharding.spec[1:])
        sharding = NamedSharding(stacked.sharding.mesh, spec)
        return jax.ShapeDtypeStruct(shape, stacked.dtype, sharding=sharding)

    def unstack(tree):
        depth = jax.tree.leaves(tree["layers"])[0].shape[0]
        return {**tree, "layers": (jax.tree.map(layer, tree["layers"]),) * depth}

    return {**params, "vlm": unstack(params["vlm"]), "deep": unstack(params["deep"])}


def _shard(a, device_mesh):
    """Shard rows over the batch axes."""
    sharding = batch_sharding(device_mesh) if a.shape else replicated(device_mesh)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
