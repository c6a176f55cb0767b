"""Small training states on a mesh, and helpers that save and compare them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from starflow2_jax.checkpoints import orbax, steps

META = {"config": {"width": 8, "rates": [1e-4, None]}, "jax": jax.__version__}


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict | None
    opt_state: optax.OptState


def mesh_of(devices):
    return jax.make_mesh(
        (devices, 1),
        ("fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )


def sharding(mesh, leaf):
    spec = ("fsdp",) if leaf.ndim and leaf.shape[0] % mesh.shape["fsdp"] == 0 else ()
    return jax.NamedSharding(mesh, jax.P(*spec))


def make_plain_state(step, width=8):
    """Return a state with odd values, bf16, scalars, optax namedtuples and empty dicts."""
    rng = np.random.default_rng(step)
    weight = rng.standard_normal((16, width)).astype(np.float32)
    weight[0, :4] = [np.nan, np.inf, -0.0, 1e-42]
    params = {
        "blocks": {
            "0": {"query": {"weight": weight}, "start": jnp.asarray(weight[1], jnp.bfloat16)},
            "1": {},
        }
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2, 10)),
    )
    opt_state = optimizer.init(params)
    opt_state = jax.tree.map(lambda x: x + jnp.ones_like(x) * step, opt_state)
    ema = jax.tree.map(lambda x: x * 0.5, params)
    return State(step=jnp.int32(step), params=params, ema=ema, opt_state=opt_state)


def make_state(step, devices=8, width=8):
    state, mesh = make_plain_state(step, width), mesh_of(devices)
    return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, jnp.asarray(x))), state)


def abstract(state, devices=8):
    mesh = mesh_of(devices)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, x)), state
    )


def bits(tree):
    return [
        (jax.tree_util.keystr(path), np.asarray(leaf).dtype, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def run(workdir, steps, keep=None, **options):
    writer = orbax.open(workdir, keep=keep, **options)
    for step in steps:
        orbax.save(writer, step, make_state(step), META)
    orbax.close(writer)
    return workdir / "checkpoints"


def statuses(workdir):
    return {entry.step: entry.status for entry in steps.steps(workdir)}


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << (position % 8)
    path.write_bytes(data)
