"""How fast a run goes: steps, tokens and FLOPs a second, and the share of what the devices can do.

MFU (model FLOPs utilisation) counts the FLOPs of the model itself, not those of rematerialisation.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 peak of one device, as the makers state it, by a part of `device_kind`.
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
    """Counts time from `start` on, less the pauses."""

    began: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    paused: float = 0.0


def start(clock: Clock, step: int) -> None:
    """Begins to count, best once the first step with its compilation is done."""
    clock.began = clock.last = (step, time.perf_counter())
    clock.paused = 0.0


@contextlib.contextmanager
def pause(clock: Clock, after: Any = None) -> Iterator[None]:
    """Time spent inside (sampling, evaluating, saving) is not counted by `rates`.

    Args:
      after: arrays of the step in flight, waited for before the pause begins: or else that step
        would run inside it, and the next rate would be too high.
    """
    jax.block_until_ready(after)
    began = time.perf_counter()
    try:
        yield
    finally:
        clock.paused += time.perf_counter() - began


def rates(
    clock: Clock, step: int, *, tokens: int, flops: float = 0.0, peak: float = 0.0
) -> dict[str, float]:
    """Speed since the last call or `start`; empty where neither was before.

    Args:
      tokens, flops: of one step over the global batch; peak: FLOP/s of all devices together.

    Returns:
      `seconds_per_step`, `tokens_per_second` and, where given, `flops_per_second` and `mfu`.
    """
    if clock.last is None:
        start(clock, step)
    if step <= clock.last[0]:
        return {}
    now = time.perf_counter()
    seconds = max(now - clock.last[1] - clock.paused, 1e-9) / (step - clock.last[0])
    clock.last, clock.paused = (step, now), 0.0
    speed = {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
    if flops:
        speed["flops_per_second"] = flops / seconds
    if flops and peak:
        speed["mfu"] = flops / seconds / peak
    return speed


def seconds_left(clock: Clock, step: int, steps: int) -> float | None:
    """Until `steps` at the pace so far, its pauses included; None before any step was counted."""
    if clock.began is None or step <= clock.began[0]:
        return None
    return (time.perf_counter() - clock.began[1]) / (step - clock.began[0]) * (steps - step)


def peak_flops() -> float:
    """FLOP/s of all devices together: the stated bfloat16 peak, or for other kinds (a CPU) the
    float32 matmul rate measured here, in about a second.
    """
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if kind in device.device_kind:
            return peak * jax.device_count()
    # Several CPU devices of a process share its cores.
    count = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return count * _matmul_rate()


def _matmul_rate(size: int = 1024, repeats: int = 8) -> float:
    """Best measured float32 rate of one device, FLOP/s."""
    a = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
