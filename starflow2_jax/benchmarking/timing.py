"""What `bench` measures with: a run's milliseconds and memory, and what the machine can do.

Only jax and the standard library: it runs on a bare machine.
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


def timed(run: Callable[[], Any], repeats: int, warm_up: int = WARM_UP) -> Result:
    """Milliseconds of `run`, whose result is waited for, and memory while it ran.

    Returns:
        `ms` (median), `ms_min`, `ms_max`, `repeats`; `cores_elsewhere`, mean number of cores that
        other processes kept busy, and `peak_mb`, None where the system does not tell.
    """
    for _ in range(warm_up):
        jax.block_until_ready(run())
    _forget_peak()
    took, began, busy, own = [], time.perf_counter(), _busy_seconds(), time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(1000 * (time.perf_counter() - start))
    elsewhere = None
    if busy is not None:
        others = _busy_seconds() - busy - (time.process_time() - own)
        elsewhere = round(max(others, 0.0) / (time.perf_counter() - began), 2)
    return {
        "ms": statistics.median(took),
        "ms_min": min(took),
        "ms_max": max(took),
        "repeats": repeats,
        "cores_elsewhere": elsewhere,
        "peak_mb": _peak_mb(),
    }


def _busy_seconds() -> float | None:
    """Seconds of all cores spent on anything so far, time taken by the hypervisor included."""
    if not os.access("/proc/stat", os.R_OK):
        return None
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, soft, steal = (int(n) for n in fields[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _forget_peak() -> None:
    """Start the kernel's record of this process's peak memory anew, where there is one."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float | None:
    """Peak memory of the device, or on a CPU of the process, since `_forget_peak`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return status_mb("VmHWM") if peak is None else peak / 2**20


def status_mb(name: str) -> float | None:
    """A line of the kernel's account of this process: VmRSS is resident now, VmHWM at most."""
    if not os.access("/proc/self/status", os.R_OK):
        return None
    rows = Path("/proc/self/status").read_text().splitlines()
    return next((int(row.split()[1]) / 1024 for row in rows if row.startswith(name)), None)


def compiled(function: Any, *args: Any) -> tuple[Callable, float]:
    """A jitted `function` compiled for `args`, and the seconds that took."""
    start = time.perf_counter()
    ready = function.lower(*args).compile()
    return ready, time.perf_counter() - start


def machine(repeats: int = 9, side: int = 2048, pairs: int = 20) -> Result:
    """What the default device can do: the rates beside which the other rows are set.

    Args:
        side: of the square matrices that are multiplied; pairs: of a 512 x 2048 and a 2048 x 512
            float32 matrix (8 MiB together) that are copied, added up, and multiplied with a vector
            in turn, as a decode step does. 20 of them exceed the caches of a CPU.
    """
    rates: Result = {}
    for dtype in ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        ms = timed(partial(jax.jit(jnp.matmul), a, a), repeats)["ms"]
        rates[f"matmul_{dtype}_gflops"] = 2 * side**3 / ms / 1e6
    whole = jnp.ones((pairs * 1024, 2048))
    held = [whole + 0]
    double = jax.jit(lambda w: w * 2, donate_argnums=0)

    def scale():
        # In place: a new array would be timed with the kernel's work of providing its pages.
        held[0] = double(held[0])
        return held[0]

    def decode(h, *pairs):
        for up, down in pairs:
            h = jnp.tanh(h @ up) @ down
        return h

    pair = lambda i: (jnp.full((512, 2048), 1e-3 * i), jnp.full((2048, 512), 1e-3 * i))
    for name, moved, run in (
        ("copy", 2 * whole.nbytes, scale),
        ("sum", whole.nbytes, partial(jax.jit(jnp.sum), whole)),
        (
            "matvec",
            whole.nbytes,
            partial(jax.jit(decode), jnp.ones((1, 512)), *map(pair, range(pairs))),
        ),
    ):
        rates[f"{name}_gb_per_s"] = moved / timed(run, repeats)["ms"] / 1e6
    return {**about(), **rates}


def about() -> Result:
    """The machine and the versions that a row was measured with."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def shares(ms: float, rates: Result, work: float, moved: float = 0.0) -> Result:
    """What `ms` for `work` FLOPs and `moved` bytes means, beside the rates of `machine`.

    Returns:
        `gflop`, `gflops` (a second) and its share of the float32 matmul rate; where bytes are given
        `bound_ms`, the time that reading them takes at the best bandwidth, and its share.
    """
    gflops = work / ms / 1e6
    found = {"gflop": work / 1e9, "gflops": gflops}
    found["share_of_matmul_rate"] = gflops / rates["matmul_float32_gflops"]
    if moved:
        best = max(rate for name, rate in rates.items() if name.endswith("gb_per_s"))
        found |= {"gb": moved / 1e9, "gb_per_s": moved / ms / 1e6, "machine_gb_per_s": best}
        found |= {"bound_ms": moved / best / 1e6, "share_of_bound": moved / best / 1e6 / ms}
    return found
