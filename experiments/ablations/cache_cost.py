"""The time of an answer behind drawn images: from the one cache, and by reading everything again.

A model that shares no cache between the streams has to encode what it has drawn, and to read the
whole conversation again, before it can go on.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from starflow2_jax.inference.prompts import Part

PROMPT, QUESTION = "a red circle", "What color is the circle?"


def measure(
    model: Any, *, images: int = 3, max_tokens: int = 4, repeats: int = 5
) -> dict[str, float]:
    """Return `cache_speedup`: how many times longer the answer takes without the cache.

    Args:
        model: a STARFlow2 with a codec.
        images: drawn in front of the question.
    """
    results = model.generate([PROMPT], images=images, max_tokens=0)
    pixels = [Part("image", "assistant", image=part.image) for part in results[0]]

    def from_cache():
        model.generate([QUESTION], continue_from=results, images=0, max_tokens=max_tokens)

    def again():
        model.generate([[PROMPT, *pixels, QUESTION]], images=0, max_tokens=max_tokens)

    return {"cache_speedup": _median_seconds(again, repeats) / _median_seconds(from_cache, repeats)}


def _median_seconds(run: Callable[[], None], repeats: int) -> float:
    run()  # compiles
    times = []
    for _ in range(repeats):
        start_time = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_time)
    return statistics.median(times)
