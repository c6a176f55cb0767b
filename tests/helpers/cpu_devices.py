"""JAX on eight virtual CPU devices, with programs that compile quickly."""

import os

import jax


def configure():
    """Configure JAX for tests; call it before anything runs on a device."""
    # Tests are many small programs, and compiling them takes most of the time. These two flags
    # make it three times faster. Later versions do not know the first and exit when they see it.
    if jax.__version_info__ < (0, 11):
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_threefry_partitionable", True)
    jax.config.update("jax_disable_most_optimizations", True)
