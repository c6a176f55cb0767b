"""The speed of a run: steps, tokens and FLOPs per second, and the utilization of the devices.

MFU (model FLOPs utilization) counts the FLOPs of the model itself, without rematerialization.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 peak FLOP/s of one device, as its maker states it, by a part of `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


@dataclasses.dataclass
class Clock:
    """A clock that counts the time since `start` without the pauses."""

    first: tuple[int, float] | None = None  # (step, time) of the start
    last: tuple[int, float] | None = None  # (step, time) of the last call of `rates`
    paused: float = 0.0  # seconds of pauses since `last`
    peak: float = 0.0  # FLOP/s of all devices, if a step exceeded the rate measured first


def start(clock: Clock, step: int) -> None:
    """Start counting, ideally after the first step and its compilation."""
    clock.first = clock.last = (step, time.perf_counter())
    clock.paused = 0.0


@contextlib.contextmanager
def pause(clock: Clock, wait_for: Any = None) -> Iterator[None]:
    """Exclude the time inside (sampling, evaluating, saving) from `rates`.

    The pause begins when the arrays of the step in flight, `wait_for`, are ready: otherwise that
    step would run inside the pause, and the next rate would be too high.
    """
    jax.block_until_ready(wait_for)
    start_time = time.perf_counter()
    try:
        yield
    finally:
        clock.paused += time.perf_counter() - start_time


def rates(
    clock: Clock, step: int, *, tokens: int, flops: float = 0.0, peak: float = 0.0
) -> dict[str, float]:
    """Return the speed since the last call or `start`; empty if there was neither.

    Args:
        tokens, flops: of one step over the global batch; flops is 0 if they are not counted.
        peak: FLOP/s of all devices together, as `peak_flops` returns it.
    """
    if clock.last is None:
        start(clock, step)
    if step <= clock.last[0]:
        return {}
    time_now = time.perf_counter()
    seconds = max(time_now - clock.last[1] - clock.paused, 1e-9) / (step - clock.last[0])
    clock.last, clock.paused = (step, time_now), 0.0
    speed = {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
    if flops:
        speed["flops_per_second"] = flops / seconds
    if flops and peak:
        clock.peak = attained_peak(max(peak, clock.peak), flops / seconds)
        speed["mfu"] = flops / seconds / clock.peak
    return speed


def seconds_left(clock: Clock, step: int, steps: int) -> float | None:
    """Return the seconds until `steps` at the pace so far, pauses included; None at the start."""
    if clock.first is None or step <= clock.first[0]:
        return None
    return (time.perf_counter() - clock.first[1]) / (step - clock.first[0]) * (steps - step)


def peak_flops() -> float:
    """Return the FLOP/s of all devices: their stated bfloat16 peak, or else a measured rate."""
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if kind in device.device_kind:
            return peak * jax.device_count()
    # Several CPU devices of a process share its cores.
    count = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return count * _matmul_rate()


def attained_peak(peak: float, rate: float) -> float:
    """Return the FLOP/s to compare a run's `rate` with: on a CPU at least `rate` itself.

    Other programs may have used the cores when `peak_flops` measured them.
    """
    return max(peak, rate) if jax.devices()[0].platform == "cpu" else peak


def _matmul_rate(size: int = 1024, repeats: int = 8) -> float:
    """Measure the best float32 FLOP/s of one device."""
    a = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start_time = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start_time)
    return 2 * size**3 / best
