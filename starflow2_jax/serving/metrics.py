"""`/metrics`: counters and gauges in the text format of Prometheus."""

import time
from collections.abc import Mapping
from typing import Any

from starflow2_jax.serving.engine import Engine

_PREFIX = "starflow2_"
# Counts of the engine: the name of the metric, and its help.
_COUNTERS = {
    "tokens": ("tokens_total", "Text tokens and delimiters that were sampled"),
    "patches": ("patches_total", "Patches of images that were sampled"),
    "images": ("images_total", "Images that were decoded"),
    "answers": ("answers_total", "Answers that were completed"),
    "prompt_items": ("prompt_items_total", "Tokens and patches of prompts"),
    "cached_items": ("cached_items_total", "Those of them that a session had read"),
    "chunks": ("chunks_total", "Chunks of steps"),
    "seconds_sampling": ("sampling_seconds_total", "Seconds in chunks of steps"),
    "refused": ("queue_refusals_total", "Requests that found the queue full"),
    "rows_freed": ("rows_freed_total", "Rows of clients that left, or of late requests"),
}
_GAUGES = {
    "rows_used": "Rows that sample or wait for a copy",
    "rows": "Rows of all pools",
    "queue": "Requests that wait for a row",
    "sessions": "Conversations whose caches are kept",
    "images_stored": "Images whose latents are kept",
    "programs_compiled": "Compiled programs of the decode loop",
    "session_hits": "Requests that went on from a kept cache",
    "session_misses": "Requests that did not",
}


def text(engine: Engine, statuses: Mapping[int, int]) -> str:
    """Return all metrics; `statuses` are the numbers of replies by their status."""
    lines: list[str] = []

    def add(name: str, kind: str, description: str, samples: Mapping[str, Any]) -> None:
        lines.append(f"# HELP {_PREFIX}{name} {description}.")
        lines.append(f"# TYPE {_PREFIX}{name} {kind}")
        lines.extend(f"{_PREFIX}{name}{labels} {value}" for labels, value in samples.items())

    for key, (name, description) in _COUNTERS.items():
        add(name, "counter", description, {"": engine.counts[key]})
    for key, value in engine.gauges().items():
        add(key, "gauge", _GAUGES[key], {"": value})
    replies = {f'{{status="{status}"}}': count for status, count in sorted(statuses.items())}
    add("replies_total", "counter", "Replies by their HTTP status", replies)
    lines.append("# HELP process_cpu_seconds_total Seconds of all cores.")
    lines.append("# TYPE process_cpu_seconds_total counter")
    lines.append(f"process_cpu_seconds_total {time.process_time()}")
    return "\n".join(lines) + "\n"
