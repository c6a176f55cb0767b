"""Eight virtual CPU devices for every test; a test that wants float64 asks for `x64`."""

import os
import pathlib

import jax
import pytest

# Tests are many small programs: compiling takes most of the time. These two make it three times
# faster; later versions do not know the first and end where they are given it.
if jax.__version_info__ < (0, 11):
    faster = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {faster}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Float64 inside the test; caches of traced functions are keyed by this setting."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Compiled programs are mapped into memory piece by piece, and Linux ends a process that asks
    for more than 65,530 pieces: before that, those of the files that are done are let go."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
