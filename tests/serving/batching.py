"""Compare continuous with static batching, and caches with a length for each row with shared ones.

python tests/serving/batching.py [--model DIR] [--requests 48] [--rows 8]

Half of the requests are images, with and without guidance, and half are texts of at most 128
tokens. Static batching admits a batch once all rows of the last one have ended. It prints tables in
Markdown.
"""

import argparse
import time

import jax
import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.load import load
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.row_items import layout_conversation
from starflow2_jax.inference.row_pool import RowOptions, RowPool
from starflow2_jax.inference.sampling import SamplingParams
from starflow2_jax.serving import settings as server_settings

PROMPTS = ("a red circle", "a blue square above a green triangle", "what can you draw?")
CHUNK = 16


def requests_of(count):
    """Return (prompt, options of its row) of requests."""
    rng, result = np.random.default_rng(0), []
    for i in range(count):
        key = np.asarray(jax.random.key_data(jax.random.key(i)))
        image = {"max_tokens": 0, "max_images": 1, "images_required": 1, "begins_image": True}
        text = {"max_tokens": int(2 ** rng.uniform(2, 7)), "temperature": 1.5}
        options = ({**image, "guidance": 2.0}, text, image, text)[i % 4]
        result.append((PROMPTS[i % len(PROMPTS)], RowOptions(key, **options)))
    return result


def run(model, pool, requests, *, is_static):
    """Answer all requests; return the seconds, those of all cores, sampled items and steps."""
    waiting, rows, sampled, steps, is_closed = list(requests), set(), 0, 0, False
    start, cpu_start = time.perf_counter(), time.process_time()
    while waiting or rows:
        while waiting and not (is_static and is_closed):
            prompt, options = waiting[0]
            needed = 2 if options.guidance else 1
            if pool.num_free < needed:
                break
            parts = [Part("text", "user", prompt)]
            items = layout_conversation(model, parts, [])
            null = None
            if options.guidance:
                null_items = layout_conversation(model, parts, [], "text")
                null = null_items, pool.read(null_items)[0]
            rows.add(pool.admit(items, pool.read(items)[0], options, 1, null))
            waiting.pop(0)
        is_closed = True
        items = pool.run_chunk(CHUNK, until_row_ends=bool(waiting) and not is_static)
        steps += max(map(len, items.values()))
        sampled += sum(map(len, items.values()))
        for row in [row for row in rows if pool.mode(row) >= decode_loop.ENDED]:
            pool.release(row)
            rows.remove(row)
        is_closed = bool(rows)
    return time.perf_counter() - start, time.process_time() - cpu_start, sampled, steps


def step_seconds(model, rows, slots, *, per_row, steps=48):
    """Return the seconds of a core for a step in which all rows sample text."""
    params, cfg = model.decode_params, model.model_config
    state = decode_loop.empty_state(params, cfg, rows, slots, has_null_branch=False)
    lengths = np.full(rows, 8, np.int32) if per_row else np.int32(8)
    caches = tuple(cache.replace(length=lengths) for cache in state.caches)
    state = state.replace(caches=caches, tokens_left=np.full(rows, 1 << 20, np.int32))
    # Arrays that are donated must differ.
    state = jax.tree.map(lambda a: jax.numpy.array(a, copy=True), state)
    keys = jax.random.split(jax.random.key(0), rows)
    sampling = SamplingParams(1.0, 0, 1.0, 1.0, None)
    banned = (*model.special_tokens.turn_ends, model.special_tokens.vision_start)
    special = model.special_tokens._replace(
        turn_ends=(-7,), banned=(*model.special_tokens.banned, *banned)
    )
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        state, output = decode_loop.decode_chunk(
            params, state, keys, sampling, np.int32(steps), cfg=cfg, special=special
        )
        jax.block_until_ready(output)
        best = min(best, (time.process_time() - start) / steps)
    return best


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pretrained/starflow2_tiny")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    model = load(args.model)
    length = server_settings.default_lengths(model.model_config.num_patches)[0]
    slots = server_settings.slots(length)
    pool = RowPool(model, args.rows, slots)
    run(model, pool, requests_of(8), is_static=False)  # compiles
    print("| batching | seconds | items/s | items per second of a core | steps |")
    print("|---|---|---|---|---|")
    for is_static in (True, False):
        requests = requests_of(args.requests)
        seconds, cpu, sampled, steps = run(model, pool, requests, is_static=is_static)
        name = "static" if is_static else "continuous"
        rates = f"{sampled / seconds:.0f} | {sampled / cpu:.0f}"
        print(f"| {name} | {seconds:.1f} | {rates} | {steps} |", flush=True)
    print("\n| rows | slots | core ms/step, shared length | core ms/step, length per row |")
    print("|---|---|---|---|")
    for rows in sorted({2, args.rows}):
        shared, per_row = (
            1000 * step_seconds(model, rows, slots, per_row=per_row) for per_row in (False, True)
        )
        print(f"| {rows} | {slots} | {shared:.2f} | {per_row:.2f} |", flush=True)


if __name__ == "__main__":
    main()
