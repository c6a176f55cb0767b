"""Timing of a compiled function, and the rates of the machine to compare it with.

This file needs only jax and the standard library, so that it runs on a bare machine.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

WARM_UP = 3
Result = dict[str, Any]


def measure(run: Callable[[], Any], repeats: int, warm_up: int = WARM_UP) -> Result:
    """Return the time and the peak memory of `run`, which includes waiting for its result.

    Returns:
        `ms` (median), `ms_min`, `ms_max`, `repeats`; `cores_elsewhere`, the mean number of cores
        used by other processes, and `peak_mb`. The last two are None on systems without /proc.
    """
    for _ in range(warm_up):
        jax.block_until_ready(run())
    reset_peak()
    times_ms: list[float] = []
    start_time, busy_before, cpu_before = time.perf_counter(), _busy_seconds(), time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times_ms.append(1000 * (time.perf_counter() - start))
    cores_elsewhere = None
    if busy_before is not None:
        other_seconds = _busy_seconds() - busy_before - (time.process_time() - cpu_before)
        cores_elsewhere = max(other_seconds, 0.0) / (time.perf_counter() - start_time)
        cores_elsewhere = round(cores_elsewhere, 2)
    return {
        "ms": statistics.median(times_ms),
        "ms_min": min(times_ms),
        "ms_max": max(times_ms),
        "repeats": repeats,
        "cores_elsewhere": cores_elsewhere,
        "peak_mb": _peak_mb(),
    }


def _busy_seconds() -> float | None:
    """Return the busy seconds of all cores since boot, including those of the hypervisor."""
    if not os.access("/proc/stat", os.R_OK):
        return None
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, soft, steal = (int(n) for n in fields[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def reset_peak() -> None:
    """Reset the kernel's record of this process's peak memory, if there is one."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float | None:
    """Return the peak memory of the device, or on a CPU of the process since `reset_peak`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return status_mb("VmHWM") if peak is None else peak / 2**20


def status_mb(name: str) -> float | None:
    """Return a memory figure of this process in MiB: VmRSS is current, VmHWM the peak."""
    if not os.access("/proc/self/status", os.R_OK):
        return None
    rows = Path("/proc/self/status").read_text().splitlines()
    return next((int(row.split()[1]) / 1024 for row in rows if row.startswith(name)), None)


def compile_timed(function: Any, *args: Any) -> tuple[Callable, float]:
    """Return a jitted function compiled for `args`, and the seconds of compiling it."""
    start = time.perf_counter()
    executable = function.lower(*args).compile()
    return executable, time.perf_counter() - start


def machine_rates(repeats: int = 9, side: int = 2048, pairs: int = 20) -> Result:
    """Return the matmul rates and memory bandwidths of the default device.

    Bandwidths are measured with `pairs` of a 512 x 2048 and a 2048 x 512 float32 matrix (8 MiB
    together), which are copied, summed, and multiplied with a vector one after another, as a decode
    step does. 20 pairs exceed the caches of a CPU.
    """
    rates: Result = {}
    for dtype in ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        ms = measure(partial(jax.jit(jnp.matmul), a, a), repeats)["ms"]
        rates[f"matmul_{dtype}_gflops"] = 2 * side**3 / ms / 1e6
    weights = jnp.ones((pairs * 1024, 2048))
    buffer = [weights + 0]
    double = jax.jit(lambda w: w * 2, donate_argnums=0)

    def scale():
        # In place: a new array would add the kernel's time to provide its pages.
        buffer[0] = double(buffer[0])
        return buffer[0]

    def decode(h, *pairs):
        for up, down in pairs:
            h = jnp.tanh(h @ up) @ down
        return h

    def make_pair(i):
        return jnp.full((512, 2048), 1e-3 * i), jnp.full((2048, 512), 1e-3 * i)

    matvec = partial(jax.jit(decode), jnp.ones((1, 512)), *map(make_pair, range(pairs)))
    for name, num_bytes, run in (
        ("copy", 2 * weights.nbytes, scale),
        ("sum", weights.nbytes, partial(jax.jit(jnp.sum), weights)),
        ("matvec", weights.nbytes, matvec),
    ):
        rates[f"{name}_gb_per_s"] = num_bytes / measure(run, repeats)["ms"] / 1e6
    return {**describe_machine(), **rates}


def describe_machine() -> Result:
    """Return the device, the number of cores, and the versions of Python and jax."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def utilization(ms: float, rates: Result, flops: float, num_bytes: float = 0.0) -> Result:
    """Return the rates of a run of `ms` as shares of those of `machine_rates`.

    Returns:
        `gflop`, `gflops` (per second) and its share of the float32 matmul rate, or of the run's own
        rate if that is higher: the machine was busy when it was measured. With `num_bytes` also
        `bound_ms`, the time to read them at the best bandwidth, and its share of `ms`.
    """
    gflops = flops / ms / 1e6
    row = {"gflop": flops / 1e9, "gflops": gflops}
    best_gflops = max(rates["matmul_float32_gflops"], gflops)
    row |= {"machine_gflops": best_gflops, "share_of_matmul_rate": gflops / best_gflops}
    if num_bytes:
        best = max(rate for name, rate in rates.items() if name.endswith("gb_per_s"))
        bound_ms = num_bytes / best / 1e6
        row |= {"gb": num_bytes / 1e9, "gb_per_s": num_bytes / ms / 1e6, "machine_gb_per_s": best}
        row |= {"bound_ms": bound_ms, "share_of_bound": bound_ms / ms}
    return row
