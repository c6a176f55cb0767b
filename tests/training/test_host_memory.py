"""Host memory that starting, saving and restoring take in addition to a host's arrays."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from helpers.paths import ROOT

from starflow2_jax import config, mesh
from starflow2_jax.checkpoints import orbax
from starflow2_jax.training.tasks import registry

# Saves or restores a state of random numbers on eight devices; prints bytes as JSON.
MEASURE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from starflow2_jax.mesh import make_mesh
from starflow2_jax.checkpoints import orbax

what, path, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
orbax.MAX_READ_BYTES = int(sys.argv[4])
where = jax.NamedSharding(make_mesh("fsdp=8"), jax.P("fsdp"))
array = jax.ShapeDtypeStruct((rows, 4096), np.float32, sharding=where)
wanted = {part: {str(i): array for i in range(12)} for part in ("params", "ema")}

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def measured(run):
    '''Peak above what was there before.'''
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    run()
    return memory("VmHWM") - before

def buffers():
    '''Bytes on the devices, each buffer once.'''
    shards = [s.data for a in jax.live_arrays() for s in a.addressable_shards]
    return sum({s.unsafe_buffer_pointer(): s.nbytes for s in shards}.values())

@jax.jit
def draw(number):
    bits = jax.lax.broadcasted_iota(jnp.uint32, (rows, 4096), 0) * jnp.uint32(4096) + number
    bits = (bits + jax.lax.broadcasted_iota(jnp.uint32, (rows, 4096), 1)) * jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(2246822519)
    return jax.lax.with_sharding_constraint(bits.astype(jnp.float32), where)

told = {"arrays": sum(a.size * 4 for a in jax.tree.leaves(wanted))}
if what == "save":
    state = {p: {n: draw(jnp.uint32(int(n))) for n in tree} for p, tree in wanted.items()}
    jax.block_until_ready(state)
    writer, told["devices_before"] = orbax.open(path), buffers()
    def run():
        orbax.save(writer, 1, state, {})
        told["devices"] = buffers()
        orbax.close(writer)
    told["peak"] = measured(run)
else:
    found = []
    run = lambda: found.append(jax.block_until_ready(orbax.restore(path, 1, wanted)[0]))
    told["peak"] = measured(run)
    told["same"] = bool(jnp.array_equal(found[0]["ema"]["7"], draw(jnp.uint32(7))))
print(json.dumps(told))
"""


def measure(what, path, rows, at_once):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, what, str(path), str(rows), str(at_once)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(path, rows, extra_bytes, at_once=orbax.MAX_READ_BYTES):
    try:
        saved = measure("save", path, rows, at_once)
        restored = measure("restore", path, rows, at_once)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    print(saved, restored)
    assert saved["devices"] == saved["devices_before"] == saved["arrays"]
    # One host copy at most, and what is compressed at the time.
    assert saved["peak"] <= saved["arrays"] + extra_bytes
    assert restored["same"] and restored["peak"] <= restored["arrays"] + extra_bytes


def test_saving_and_restoring_half_a_gigabyte(tmp_path):
    # A limit as much smaller as the arrays are; without any the peak is 346 MiB above them.
    check(tmp_path / "run", 1360, 260 << 20, 48 << 20)


@pytest.mark.slow
def test_saving_and_restoring_six_gigabytes(tmp_path):
    free = pathlib.Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    if int(free) < 18 << 20:
        pytest.skip("18 GiB of free memory are needed: the state, its host copy, and temporaries")
    check(tmp_path / "run", 16384, 2 * 10**9)


def initial(changes, layout, sizes):
    """Return the bytes of the state on all devices and of the temporaries of its creation."""
    cfg = config.default()
    cfg.model.update(
        {"side": 16, "channels": 64, "head_dim": 64, "start": "shift", "positions": "learned"}
    )
    cfg.model.update(changes)
    cfg.train.batch_size, cfg.layout, cfg.mesh = 8, layout, sizes
    device_mesh = mesh.make_mesh(sizes, jax.devices())
    program = registry.build(config.to_dict(cfg), device_mesh)
    with jax.set_mesh(device_mesh):
        compiled = jax.jit(program.init).lower(jax.random.key(0)).compile()
    analysis = compiled.memory_analysis()
    return 8 * analysis.output_size_in_bytes, 8 * analysis.temp_size_in_bytes


def test_a_state_is_born_sharded():
    """Initialize a state with its EMA on eight devices of one host."""
    sizes = {"width": 512, "layers": (2, 2)}
    replicated_bytes, _ = initial(sizes, "dp", "data=8")
    sharded_bytes, extra_bytes = initial(sizes, "fsdp", "fsdp=8")
    assert sharded_bytes < 1.3 * replicated_bytes / 8
    assert extra_bytes < 2 * 10**9


@pytest.mark.slow
def test_a_state_of_fifty_gigabytes_is_born_within_two_more_a_device():
    """Each device has memory of its own: 1.1 GB of temporaries, of the largest stacked weight."""
    sharded_bytes, extra_bytes = initial({"width": 3072, "layers": (2, 24)}, "fsdp", "fsdp=8")
    print(sharded_bytes, extra_bytes)
    assert sharded_bytes > 40e9
    assert extra_bytes / 8 < 2 * 10**9
