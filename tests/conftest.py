"""Eight virtual CPU devices for every test; a test that wants float64 asks for `x64`."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_threefry_partitionable", True)
# Tests are many small programs: compiling takes most of the time.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Float64 inside the test; caches of traced functions are keyed by this setting."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
