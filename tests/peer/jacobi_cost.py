"""Passes and milliseconds of Jacobi iteration against sequential sampling, in turn in one process.

    python tests/peer/jacobi_cost.py --model pretrained/starflow2_tiny --part shallow
    python tests/peer/jacobi_cost.py --model pretrained/starflow2_tiny --part deep
    python tests/peer/jacobi_cost.py --part steps

`shallow` inverts the shallow flow of drawn images. `deep` counts the passes that chunks of patches
would take in the decode loop: it solves drawn images again from their noise. `steps` times a decode
step of `tiny` that reads several patches, and a pass of `peer_starflow` over a chunk.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import bench
from starflow2_jax.inference import decode_loop, image_latents, inverse, session
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.models import starflow2
from starflow2_jax.models.backbone import BackboneInputs
from starflow2_jax.models.flow import Conditioning
from starflow2_jax.params import init as init_params
from starflow2_jax.runtime import allocator, cli

PROMPTS = ["a red circle", "a blue square above a green star", "two yellow triangles",
           "a purple heart left of a red square"] * 2  # fmt: skip
CHUNKS = (1, 2, 4, 8, 16)


def in_turn(runs, repeats):
    """Return the median and the lowest milliseconds of each function, after one run of each."""
    times = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name] += [1000 * (time.perf_counter() - start)] if turn else []
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def draw(path, temperature):
    """Return the model, its session before the images, and their latents and u."""
    from starflow2_jax.inference import generate, load, options, prompts

    model = load.load(path)
    settings = options.GenerateOptions(images=1, max_tokens=0, image_temperature=temperature)
    results = generate.generate(model, PROMPTS, options=settings)
    x = np.stack([row[-1].latent for row in results.rows])
    u, _ = image_latents.shallow_forward(model.params, x, model.model_config)
    rows = [prompts.parse_prompt(prompt, "prompt") for prompt in PROMPTS]
    start = generate._start_session(model, len(rows), settings)
    start = session.extend(model, start, rows, [u[:0]] * len(rows), model.model_config.num_patches)
    state = generate._reset_counters(model, start.state, settings, False)
    begun, _ = decode_loop.decode_chunk(
        start.params, state, start.keys, generate._sampling_params(start, settings), 1,
        cfg=model.model_config, special=model.special_tokens,
    )  # fmt: skip
    return model, dataclasses.replace(start, state=begun), x, u


def shallow(path, batches, repeats, temperature):
    """Print passes, error and time of the inverse of the shallow flow."""
    model, _, x, u = draw(path, temperature)
    cfg = model.model_config.flow
    cfg = dataclasses.replace(cfg, layers=(*cfg.layers[:-1], 0))
    params = inverse.prepare_params({"blocks": model.params["shallow"]})
    text = Conditioning(text=jnp.zeros((1, 1, cfg.text_channels)))
    methods = {"sequential": None, "published 16, 1e-3": Jacobi()}
    for block in (4, 8, 16, 32, cfg.tokens):
        for tolerance in (1e-2, 1e-4) if block in (8, cfg.tokens) else (1e-2,):
            methods[f"chunk {block}, tolerance {tolerance:g}"] = Jacobi(block, tolerance=tolerance)
    for batch in batches:
        runs = {
            name: lambda method=method, batch=batch: inverse.inverse(
                params, u[:batch], cfg, text, jacobi=method
            )
            for name, method in methods.items()
        }
        results = {name: run() for name, run in runs.items()}
        for name, (median, lowest) in in_turn(runs, repeats).items():
            back, info = results[name]
            print(
                f"batch {batch}, {name}: passes {info['passes'].tolist()[:-1]}, error "
                f"{np.abs(back - x[:batch]).max():.0e}, {median:.1f} ms ({lowest:.1f})"
            )


def image_inputs(cfg, state, token, u):
    """Return the items that predict the patches u [B, N, D] of the images that rows begin."""
    rows, count = u.shape[:2]
    row, column = jnp.divmod(jnp.arange(count), cfg.flow.side)
    tile = lambda a: jnp.broadcast_to(a, (rows, count))
    start = state.next_vlm_position[:, None]
    places = jnp.stack([tile(start), start + row, start + column], -1)
    predicted = jnp.stack([tile(row), tile(column), tile(state.flow_index[:, None])], -1)
    return BackboneInputs(
        ids=tile(token),
        latents=jnp.pad(u[:, :-1], ((0, 0), (1, 0), (0, 0))),
        adapter_input=None,
        is_image=tile(jnp.arange(count) > 0),
        positions=jnp.concatenate([state.vlm_position[:, None], places[:, :-1]], 1),
        next_positions=predicted,
        item_positions=jnp.concatenate([state.flow_position[:, None], predicted[:, :-1]], 1),
    )


def deep(path, temperature):
    """Print the passes of sliding chunks over the patches of drawn images, by row."""
    model, start, _, u = draw(path, temperature)
    cfg, state = model.model_config, start.state
    is_real = jnp.ones(u.shape[:2], bool)

    @jax.jit
    def predict(params, u):
        inputs = image_inputs(cfg, state, model.special_tokens.vision_start, u)
        caches = (params, state.caches, state.valid)
        h = decode_loop.forward_cached(*caches, inputs, is_real, cfg)[1]
        scale, mean = starflow2.image_head(params, h, cfg)
        return temperature * scale, mean

    scale, mean = predict(start.params, u)
    noise = (u - mean) / scale
    for size in (*CHUNKS[1:], cfg.num_patches):
        for tolerance in (1e-2, 1e-3, 1e-5):
            y, done = np.zeros_like(u), np.zeros(len(u), int)
            passes = np.zeros(len(u), int)
            while (done < cfg.num_patches).any():
                scale, mean = predict(start.params, y)
                new = np.asarray(mean + scale * noise)
                for b in np.flatnonzero(done < cfg.num_patches):
                    chunk, later = slice(done[b], done[b] + size), slice(done[b] + size, None)
                    change = np.abs(new[b, chunk] - y[b, chunk]).max(-1)
                    y[b, chunk] = new[b, chunk]
                    y[b, later] = y[b, chunk][-1]  # later patches start as the last one
                    done[b] += min(np.cumprod(change <= tolerance).sum() + 1, len(change))
                    passes[b] += 1
            print(
                f"chunk {size}, tolerance {tolerance:g}: passes {passes.mean():.1f} "
                f"({passes.min()} to {passes.max()}), error {np.abs(y - u).max():.0e}"
            )


def steps(batches, repeats):
    """Print the time of a decode step of `tiny`, and of a pass of `peer_starflow`, by patches."""
    cfg = starflow2.tiny()
    tree = {n: t for n, t in starflow2.declare(cfg).items() if n != "shallow"}
    make = jax.jit(lambda key: decode_loop.prepare_params(init_params(key, tree)))
    params, count, read = make(jax.random.key(0)), 16, 96

    def loop(params, caches, valid, u):
        def body(i, carry):
            caches = tuple(c.replace(length=jnp.int32(read)) for c in carry[0])
            places = jnp.full((*u.shape[:2], 3), i)
            is_image = jnp.ones(u.shape[:2], bool)
            items = BackboneInputs(
                jnp.zeros(u.shape[:2], int), carry[1], None, is_image, places, places, places
            )
            _, h, caches, _ = decode_loop.forward_cached(
                params, caches, valid, items, is_image, cfg
            )
            scale, mean = starflow2.image_head(params, h, cfg)
            return caches, mean + 0.1 * scale * u

        return jax.lax.fori_loop(0, count, body, (caches, u))

    flow_cfg, trained = bench.preset("peer_starflow")
    trained = inverse.prepare_params(trained)
    compiled = jax.jit(loop)
    for batch in batches:
        z, conditioning = bench.preset_inputs(flow_cfg, batch)
        runs, passes = {}, {}
        for size in CHUNKS:
            state = decode_loop.empty_state(params, cfg, batch, 192, has_null_branch=False)
            valid = state.valid.at[:, :read].set(True)
            u = jnp.zeros((batch, size, cfg.flow.channels))
            args = (params, state.caches, valid, u)
            runs["tiny step", size] = lambda args=args: compiled(*args)
            passes["tiny step", size] = count
        for size in (1, 8, 16, 64):
            jacobi = Jacobi(size, 0.0, 1) if size > 1 else None
            run = lambda jacobi=jacobi, z=z, c=conditioning: inverse.inverse(
                trained, z, flow_cfg, c, jacobi=jacobi
            )
            runs["peer_starflow pass", size] = run
            passes["peer_starflow pass", size] = int(run()[1]["passes"].sum())
        for (name, size), (median, lowest) in in_turn(runs, repeats).items():
            n = passes[name, size]
            print(f"batch {batch}, {name}, {size} patches: {median / n:.3f} ms ({lowest / n:.3f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("shallow", "deep", "steps"), required=True)
    parser.add_argument("--model", default="starflow2_jax/pretrained/starflow2_tiny")
    parser.add_argument("--temperature", type=float, default=0.2, help="image temperature")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    allocator.keep_freed_memory()
    cli.use_compilation_cache()
    if args.part == "shallow":
        shallow(args.model, args.batches, args.repeats, args.temperature)
    elif args.part == "deep":
        deep(args.model, args.temperature)
    else:
        steps(args.batches, args.repeats)


if __name__ == "__main__":
    main()
