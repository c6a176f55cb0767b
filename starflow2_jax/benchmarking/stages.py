"""A training step and a decoding of STARFlow2 at any preset's size, with random weights.

`bench` runs them on machines that have only jax, flax, optax and numpy: they need no data, no
tokenizer and no files. Rows are full of images with a few text tokens between them, as the
experiment of the stage packs them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import config
from starflow2_jax.benchmarking import breakdown
from starflow2_jax.benchmarking.timing import Result, measure, utilization
from starflow2_jax.inference import decode_loop, session
from starflow2_jax.inference.sampling import SamplingParams, SpecialTokens
from starflow2_jax.mesh import host_rows, make_mesh
from starflow2_jax.models import starflow2
from starflow2_jax.models.starflow2 import PretzelConfig
from starflow2_jax.params import count as count_params, init as init_params
from starflow2_jax.training.logging import throughput
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry

# Trainable subtrees of a stage and the sizes of its rows, as in experiments/stage*.py.
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"trainable": ("shallow", "deep"), "length": 1536, "images": 4, "max_targets": 0},
    "stage3": {
        "trainable": ("adapter", "shallow", "deep", "skip"),
        "length": 2048,
        "images": 6,
        "max_targets": 1024,
    },
}
# The rows of the tiny preset, whose images have 64 patches.
TINY: dict[str, dict[str, Any]] = {
    "stage1": {"length": 256, "images": 3, "max_targets": 0},
    "stage3": {"length": 256, "images": 3, "max_targets": 0},
}
GIB = 2**30
# Tokens of the prompt in the cache, and text tokens to sample.
PROMPT_TOKENS, TEXT_TOKENS = 128, 64


def experiment(stage: str, size: str, rows: int, dtype: str) -> dict[str, Any]:
    """Return the configuration of a stage; `dtype` is that of matmuls and of the frozen VLM."""
    cfg = config.plain()
    settings = {**STAGES[stage], **(TINY[stage] if size == "tiny" else {})}
    cfg["task"], cfg["name"] = "starflow2", f"{stage}_{size}"
    cfg["model"] = starflow2.options(starflow2.preset(size))
    remat = "none" if size == "tiny" else "full"
    cfg["model"]["flow"]["remat"] = cfg["model"]["vlm"]["remat"] = remat
    cfg["compute_dtype"] = cfg["frozen_dtype"] = dtype
    cfg["train"]["trainable"], cfg["train"]["batch_size"] = settings["trainable"], rows
    for key in ("length", "images", "max_targets"):
        cfg["text"][key] = settings[key]
    cfg["noise"]["sigma"] = 0.3
    config.check(cfg)
    return cfg


def rows_of_images(cfg: dict[str, Any], model: PretzelConfig, count: int) -> dict[str, np.ndarray]:
    """Return a host batch of `count` equal rows, full of images with text tokens before each.

    A row is one segment. Every image is a target, and up to `text.max_targets` text tokens.
    """
    length, images, patches = cfg["text"]["length"], cfg["text"]["images"], model.num_patches
    side, rng = model.flow.side, np.random.default_rng(0)
    period = length // images
    image = np.full(length, -1, np.int32)
    flow = np.zeros((length, 3), np.int32)
    for m in range(images):
        first = m * period + period - patches - 1
        image[first : first + patches] = m * patches + np.arange(patches)
        flow[first : first + patches, 0] = np.arange(patches) // side
        flow[first : first + patches, 1] = np.arange(patches) % side
    flow[:, 2] = np.cumsum(image < 0)
    is_target = np.ones(length, bool)
    limit = cfg["text"]["max_targets"]
    if limit:
        is_target[np.flatnonzero(image < 0)[limit:]] = False
    row = {
        "ids": rng.integers(8, model.vlm.vocab // 2, length, np.int32),
        "segments": np.ones(length, np.int32),
        "image": image,
        "target": is_target,
        "positions": np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, 1),
        "flow_positions": flow,
    }
    batch = {name: np.repeat(a[None], count, 0) for name, a in row.items()}
    shape = (count, images, patches, model.flow.channels)
    batch["latent_mean"] = rng.standard_normal(shape, np.float32)
    return batch | {"latent_logvar": np.full(shape, -5.0, np.float32)}


def train(
    stage: str, size: str, rows: int, dtype: str, repeats: int, with_parts: bool = False
) -> Result:
    """Time the training step of a stage on the default devices, in layout `fsdp`.

    The row has the entries of `timing.measure`, `tokens_per_s`, `mfu` of the devices' bfloat16
    peak, and `needs_gib`, the memory of the compiled step per device; `with_parts` also those of
    `breakdown.parts`.
    """
    peak = throughput.peak_flops()
    device_mesh = make_mesh("fsdp=-1")
    cfg = experiment(stage, size, rows, dtype) | {"layout": "fsdp", "mesh": "fsdp=-1"}
    program = registry.build(cfg, device_mesh)
    start_time = time.perf_counter()
    executable = program.lower_step().compile()
    seconds = time.perf_counter() - start_time
    needs = _device_bytes(executable)
    _check_memory(needs, rows)
    with jax.set_mesh(device_mesh):
        state, frozen = program.init(jax.random.key(0))
        batch = rows_of_images(cfg, program.task.model_config, len(host_rows(rows, device_mesh)))
        current, batch = [state], to_device(program, batch)
        del state

        def run():
            current[0], metrics = executable(current[0], frozen, batch)
            return metrics

        row = {"row": f"train {stage} {size}", "batch": rows, "dtype": dtype}
        row |= {"compile_s": seconds, "needs_gib": needs / GIB, **measure(run, repeats)}
        row["loss"] = float(run()["loss"])
        if with_parts:
            row |= breakdown.parts(program, current[0], frozen, batch, repeats)
    work = program.task.step_cost()
    row["tokens_per_s"] = 1000 * work["tokens"] / row["ms"]
    row["model_tflop"] = work["flops"] / 1e12
    rate = 1000 * work["flops"] / row["ms"]
    return row | {"mfu": rate / throughput.attained_peak(peak, rate)}


def _device_bytes(executable: Any) -> float:
    """Return the bytes per device of a compiled program's arguments, outputs and temporaries."""
    stats = executable.memory_analysis()
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return total - stats.alias_size_in_bytes


def _check_memory(needs: float, rows: int) -> None:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if limit and needs > limit:
        raise ValueError(
            f"bench: the step needs {needs / GIB:.1f} GiB per device, which has "
            f"{limit / GIB:.1f}; use fewer rows than --batch={rows}, more devices, "
            f"--preset=stage1, or --size=small"
        )


def sample(stage: str, size: str, rows: int, dtype: str, repeats: int, rates: Result) -> Result:
    """Time the decode loop after a prompt: the patches of an image, then text tokens.

    The weights are stored in `dtype`. The bound is the time to read the weights and the cache at
    the machine's best bandwidth.

    Returns:
        `image_...` and `text_...`: milliseconds of one image and of `TEXT_TOKENS` tokens, tokens
        per second of all rows together, `bound_ms` and `share_of_bound`.
    """
    cfg = starflow2.preset(size)
    cfg = dataclasses.replace(
        cfg,
        vlm=dataclasses.replace(cfg.vlm, compute_dtype=dtype),
        flow=dataclasses.replace(cfg.flow, compute_dtype=dtype),
    )
    tree = {n: t for n, t in starflow2.declare(cfg).items() if n != "shallow"}

    @jax.jit
    def make_params(key):
        return decode_loop.prepare_params(init_params(key, tree, dtype))

    params = make_params(jax.random.key(0))
    length = PROMPT_TOKENS + cfg.num_patches + TEXT_TOKENS
    slots = -(-length // session.CACHE_STEP) * session.CACHE_STEP
    keys = jax.random.split(jax.random.key(1), rows)
    state = decode_loop.empty_state(params, cfg, rows, slots, has_null_branch=False)
    # The loop takes the arrays over, so each needs a buffer of its own.
    states = [jax.tree.map(jnp.copy, state)]
    del state
    valid = jnp.zeros((rows, slots), bool).at[:, :PROMPT_TOKENS].set(True)
    special = SpecialTokens(3, 4, (), (), cfg.vlm.vocab)
    sampling = SamplingParams(1.0, 0, 1.0, 1.0, None)
    full = lambda value: jnp.full(rows, value, jnp.int32)

    def draw(mode: int, steps: int) -> Callable[[], Any]:
        def run():
            # Start again after the prompt: what was sampled since is removed.
            caches = tuple(c.replace(length=jnp.int32(PROMPT_TOKENS)) for c in states[0].caches)
            state, log_probs = states[0], []
            state = state.replace(
                caches=caches,
                valid=jnp.copy(valid),
                mode=full(mode),
                patch=full(0),
                tokens_left=full(TEXT_TOKENS),
                images_left=full(0),
                token=full(3),
                is_image=jnp.zeros(rows, bool),
            )
            for first in range(0, steps, decode_loop.CHUNK):
                chunk_steps = jnp.int32(min(decode_loop.CHUNK, steps - first))
                state, output = decode_loop.decode_chunk(
                    params, state, keys, sampling, chunk_steps, cfg=cfg, special=special
                )
                log_probs.append(output.log_probs)
            states[0] = state
            return log_probs

        return run

    row: Result = {"row": f"sample {stage} {size}", "batch": rows, "dtype": dtype}
    row |= {"prompt": PROMPT_TOKENS, "slots": slots}
    num_bytes = step_bytes(cfg, rows, slots, jnp.dtype(dtype).itemsize)
    for name, mode, steps in (
        ("image", decode_loop.IMAGE, cfg.num_patches),
        ("text", decode_loop.TEXT, TEXT_TOKENS),
    ):
        run = draw(mode, steps)
        start_time = time.perf_counter()
        log_probs = np.concatenate(run(), 1)[:, :steps, 0]
        row[f"{name}_first_s"] = time.perf_counter() - start_time
        if not (log_probs != 0).all():
            raise RuntimeError(f"bench: some steps of {name} sampled nothing")
        timing = measure(run, repeats)
        timing |= {"tokens_per_s": 1000 * rows * steps / timing["ms"]}
        bound = utilization(timing["ms"], rates, 0.0, steps * num_bytes[name])
        timing |= {key: bound[key] for key in ("gb_per_s", "bound_ms", "share_of_bound")}
        row |= {f"{name}_{key}": value for key, value in timing.items() if key != "repeats"}
    return row | {"machine_gb_per_s": bound["machine_gb_per_s"]}


def step_bytes(cfg: PretzelConfig, rows: int, slots: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that a decoding step must read: every weight once, and the caches.

    A step of an image does not read the language-model head. No step reads the whole embedding
    table.
    """
    tree = starflow2.declare(cfg)
    vlm = {n: t for n, t in tree["vlm"].items() if n not in ("embed", "head")}
    weights = count_params(vlm) + count_params({n: tree[n] for n in ("adapter", "deep", "skip")})
    cache = 2 * rows * slots * cfg.vlm.kv_heads * cfg.vlm.layer.head_dim * cfg.vlm.layers
    deep = cfg.deep.layer
    cache += 2 * rows * slots * deep.kv_heads * deep.head_dim * cfg.deep.depth
    head = cfg.vlm.vocab * cfg.vlm.width
    return {"image": itemsize * (weights + cache), "text": itemsize * (weights + cache + head)}
