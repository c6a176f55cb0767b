"""Generate images and text with a trained STARFlow2, or images with a TarFlow or STARFlow.

python -m starflow2_jax.generate --prompt 'a red circle above a blue square' --out images/
python -m starflow2_jax.generate --model runs/stage3 --prompt 'a red circle' --n 4 --guidance 3 --out images/
python -m starflow2_jax.generate --model runs/stage3 --image in.png --prompt 'make the circle blue' --out edited/
python -m starflow2_jax.generate --model runs/stage3 --chat chat.json --temperature 0.7 --out answer/
python -m starflow2_jax.generate --model runs/stage3 --bench geneval --prompts evaluation_metadata.jsonl --out geneval/
python -m starflow2_jax.generate --model runs/tiny --label 'red circle' --n 8 --guidance 1 --out images/

Without --model, the small STARFlow2 that ships with the package is used; it knows colored shapes.
A STARFlow2 answers in free form with text, images, or both; for prompts without images it generates
one image each. Without --out it writes text only. A chat file is a JSON list of {role, content:
[{type: text, text} or {type: image, image: path}]}; a batch file has one such list per line.

In Python: inference.load.load(path).generate([[Path("photo.png"), "what is it?"]], images=0).
"""  # noqa: E501

import functools
import io
import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from starflow2_jax.mesh import make_mesh
from starflow2_jax.runtime import allocator, atomic, cli, interrupts

if TYPE_CHECKING:
    from starflow2_jax.inference.api import STARFlow2
    from starflow2_jax.inference.flow_sampler import FlowModel
    from starflow2_jax.inference.options import GenerateOptions

SHIPPED = "pretrained/starflow2_tiny"

# Flags that only one of the two kinds of model has.
_FLOW_ONLY = ("label",)
_STARFLOW2_ONLY = (
    *("image", "chat", "batch", "images", "max_tokens", "top_k", "top_p", "stop", "think"),
    *("best_of", "best_of_gain", "null", "image_temperature", "cache", "vlm", "fae", "resize"),
    *("bench", "prompts", "image_root", "rewrite", "shard", "check", "system", "batch_size"),
)
_MAX_SAMPLES = 1_000_000  # options.MAX_SAMPLES, which would import jax
# Flags that change neither images nor texts.
_NO_PART_OF_A_JOB = ("out", "overwrite", "json", "layout", "mesh", "vlm", "fae", "help")
_PROMPT_FLAGS = ("prompt", "chat", "batch")
_BENCH_FLAGS = ("prompts", "image_root", "rewrite", "shard", "check")


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    texts = functools.partial(flags.DEFINE_multi_string, flag_values=values)
    integer = functools.partial(cli.define_integer, flag_values=values)
    number = functools.partial(cli.define_number, flag_values=values)
    switch = functools.partial(flags.DEFINE_bool, flag_values=values)
    text("model", SHIPPED, "workdir, step folder, model folder, or hf://user/name")
    text("vlm", None, "folder of the VLM, if it has moved since training")
    text("fae", None, "folder of the codec, if it has moved since training")
    text("out", None, "folder for the images; must be empty")
    switch("overwrite", False, "replace files in --out")
    texts("prompt", [], "text of the user; may be repeated")
    texts("image", [], "image file shown before every prompt; may be repeated")
    text("chat", None, "JSON file of a chat to continue")
    text("batch", None, "file with one chat per line")
    text("bench", None, "public benchmark to draw: geneval, dpg, gedit, imgedit, rise, kris, wise "
         "or wise_verified")  # fmt: skip
    names = functools.partial(flags.DEFINE_list, flag_values=values)
    names("prompts", [], "--bench: its own file or folder of prompts")
    text("image_root", None, "--bench: folder of the source images (default: that of --prompts)")
    names("rewrite", [], "--bench: files like --prompts, whose texts are drawn instead")
    text("shard", "0/1", "--bench: i/n draws every n-th group of prompts from the i-th")
    switch("check", False, "--bench: list the missing and damaged files of --out, and draw nothing")
    text("system", "", "--prompt, --bench: text of the system's turn before every prompt")
    switch("think", False, "--prompt, --bench: the model may write text before it draws, at most "
           "--max_tokens")  # fmt: skip
    integer("batch_size", 16, "rows that are generated at a time", 1, _MAX_SAMPLES)
    texts("label", [], "class name, or else its number; may be repeated")
    integer("n", None, "samples per prompt (default: 4 for images, 1 for answers)", 1, _MAX_SAMPLES)
    integer("seed", 0, "seed of the noise", 0, 2**63 - 1)
    number("guidance", None, "guidance weight (default: the run's)")
    text("rule", None, "guidance rule (default: the run's)")
    flags.DEFINE_enum("null", "text", ("text", "all"), "unconditional input of guidance: omit the "
                      "user's text, or the images as well", flag_values=values)  # fmt: skip
    number(
        "temperature",
        None,
        "temperature of text tokens (default: 0, greedy), or of a flow's attention (default: 1)",
    )
    integer("top_k", 0, "sample from the k most likely tokens; 0 for all", 0)
    number("top_p", 1.0, "sample from the most likely tokens with this probability mass", 0, 1)
    texts("stop", [], "text that ends an answer; may be repeated")
    integer("max_tokens", 256, "maximum number of text tokens of an answer", 0)
    integer("images", None, "exact number of images in an answer", 0)
    number("image_temperature", None, "factor on the noise of images (default: the run's)")
    integer(
        "best_of", 1, "candidates per sample, of which the most likely is returned", 1, _MAX_SAMPLES
    )
    switch("best_of_gain", False, "rank candidates by what the prompt adds to the likelihood")
    integer("cache", None, "positions of the cache (default: as many as needed)")
    integer("jacobi", 0, "tokens of a Jacobi chunk; 0 samples sequentially", 0)
    number("threshold", 1e-3, "residual at which a Jacobi chunk has converged")
    number("tolerance", None, "largest change of a final token, with chunks that slide by rows")
    switch("denoise", None, "apply a score step after sampling (default: the run's)")
    text("layout", "dp", "name of the sharding layout of the weights")
    text("mesh", None, "device mesh such as fsdp=8 (default: one device)")
    flags.DEFINE_enum(
        "resize",
        "refuse",
        ("refuse", "pad", "center_crop"),  # resize.POLICIES, which would import PIL
        "images of prompts that do not have the model's size: refuse them, scale and pad them "
        "(edits get their shape back), or scale them and crop the center",
        flag_values=values,
    )
    switch("json", False, "print the result as JSON")


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Generate with the model and the prompts of the flags, and print what was written."""
    from starflow2_jax.inference import output
    from starflow2_jax.inference.api import STARFlow2

    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    if values.bench or any(values[name].present for name in _BENCH_FLAGS):
        _draw_benchmark(values)
        return
    out = epath.Path(values.out) if values.out else None
    if values.think and not (out is not None and _is_text_prompt(values)):
        raise ValueError(
            "--think is for --bench, and for --prompt with --out; elsewhere --max_tokens says how "
            "much text comes with the images"
        )
    job = _describe_job(values) if out is not None else {}
    if out is not None and (result := output.start_job(out, job, overwrite=values.overwrite)):
        print(json.dumps(result) if values.json else f"{out} is complete; --overwrite replaces it")
        return
    model = _load(values)
    is_starflow2 = isinstance(model, STARFlow2)
    for name in _FLOW_ONLY if is_starflow2 else _STARFLOW2_ONLY:
        if values[name].present and values[name].value != values[name].default:
            raise ValueError(f"--{name}: the model {values.model} does not take this flag")
    with interrupts.interrupt_flag() as interrupted:
        if is_starflow2:
            result = _generate_answers(model, out, values, interrupted)
        else:
            result = _generate_images(model, out, values)
    if interrupted.is_set():  # What there is has been written; the same command starts over.
        raise KeyboardInterrupt
    if out is not None:
        output.end_job(out, job, result)
    if values.json:
        print(json.dumps(result))


def _load(values: flags.FlagValues) -> "STARFlow2 | FlowModel":
    from starflow2_jax.inference.load import load

    device_mesh = make_mesh(values.mesh) if values.mesh else None
    return load(
        values.model, device_mesh, values.layout, vlm=values.vlm or "", fae=values.fae or ""
    )


def _describe_job(values: flags.FlagValues) -> dict[str, Any]:
    """Return all that the output depends on: the flags, the model, and the files that they name."""
    from starflow2_jax.checkpoints import digest
    from starflow2_jax.evaluation import result_files

    names = flags.FlagValues()
    define(names)
    options = {name: values[name].value for name in names if name not in _NO_PART_OF_A_JOB}
    files = [*values.image, *(values[name].value for name in ("chat", "batch"))]
    return {
        "options": options,
        "model": result_files.describe_model(values.model),
        "files": {file: digest.sha256_file(file) for file in files if file},
    }


# ------------------------------------------------------------------------------------- STARFlow2


def _generate_answers(
    model: "STARFlow2",
    out: epath.Path | None,
    values: flags.FlagValues,
    interrupted: threading.Event,
) -> dict[str, Any]:
    """Generate, save and print answers, which end early if the event is set; return the result."""
    from starflow2_jax.inference import output, resize, text_stream
    from starflow2_jax.inference.generate import generate_many

    prompts = _read_prompts(values)
    only_image = out is not None and _is_text_prompt(values)
    options = _answer_options(model, values, has_out=out is not None, only_image=only_image)
    start_time = time.perf_counter()
    settings = {"model": values.model, "source": model.source, **output.options_dict(options)}
    settings |= {"resize": values.resize, "think": values.think, "system": values.system}
    prompts, fits = resize.fit_prompts(model, prompts, values.resize)
    rows, is_single = [], len(prompts) * options.copies == 1
    shows_text = is_single and not options.image_limit and not values.json
    printer = text_stream.TextPrinter(model, options.stop) if shows_text else None

    def on_chunk(items):
        if printer:
            printer.show(items[0])
        return interrupted.is_set()

    answers = generate_many(model, prompts, options, values.batch_size, on_chunk=on_chunk)
    for i, samples in enumerate(answers):
        prompt = {"prompt": values.prompt[i]} if values.prompt else {}
        resized = [fit.to_json() for fit in fits[i]]
        for k, parts in enumerate(samples):
            note = {**settings, **prompt, **({"resized": resized} if resized else {})}
            name, parts = f"{i:05}_{k:02}", resize.restore_parts(parts, fits[i])
            if values.think and not interrupted.is_set():
                parts = parts[: [part.kind for part in parts].index("image") + 1]
            rows.append(output.save_row(out, name, parts, note))
            if not values.json:
                has_many = len(prompts) * len(samples) > 1
                title = f"--- prompt {i}, sample {k}" if has_many else ""
                _print_row(rows[-1], title, printer.text if printer else "")
    if out is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic.write_file(out / "results.jsonl", lines)
    seconds = time.perf_counter() - start_time
    if not values.json:
        count = sum(part["type"] == "image" for row in rows for part in row)
        print(f"{len(rows)} answers with {count} images in {seconds:.1f} s")
    return {"rows": rows, "seconds": seconds}


def _is_text_prompt(values: flags.FlagValues) -> bool:
    """Return True for texts alone, of which images are drawn."""
    return bool(values.prompt) and not values.image and values.images is None


def _read_prompts(values: flags.FlagValues) -> list[Any]:
    """Return the prompts of the one prompt flag that was set."""
    from starflow2_jax.inference import prompts

    sources = [name for name in _PROMPT_FLAGS if values[name].value]
    if len(sources) > 1 or not (sources or values.image):
        raise ValueError("give one of --prompt (with or without --image), --chat, --batch, --bench")
    if values.chat:
        return [prompts.read_chat(values.chat)]
    if values.batch:
        return list(prompts.read_batch(values.batch))
    images = [{"type": "image", "image": path} for path in values.image]
    rows = [[*images, text] for text in values.prompt] or [images]
    system = [prompts.Part("text", "system", values.system)] if values.system else []
    return [[*system, *row] for row in rows]


def _answer_options(
    model: "STARFlow2", values: flags.FlagValues, *, has_out: bool, only_image: bool
) -> "GenerateOptions":
    """Return the options of the flags; `only_image` asks for one image and, to think, text."""
    from starflow2_jax.inference.options import GenerateOptions, sampling_defaults

    if values.images and not has_out:
        raise ValueError("--images: --out is needed to save them")
    images = 1 if only_image else values.images if has_out else 0
    image_options = sampling_defaults(
        model.cfg["sample"],
        guidance=values.guidance,
        rule=values.rule or None,
        denoise=values.denoise,
        image_temperature=values.image_temperature,
    )
    if images == 0:
        # Text is sampled without guidance, so it needs no unconditional branch.
        image_options["guidance"] = min(image_options["guidance"], 0.0)
    return GenerateOptions(
        **image_options,
        n=values.n or (4 if only_image else 1),
        seed=values.seed,
        null=values.null,
        temperature=values.temperature or 0.0,
        top_k=values.top_k,
        top_p=values.top_p,
        stop=tuple(values.stop),
        max_tokens=values.max_tokens if values.think or not only_image else 0,
        images=images,
        best_of=values.best_of,
        best_of_gain=values.best_of_gain,
        cache=values.cache,
        jacobi=_jacobi(values),
    )


def _jacobi(values: flags.FlagValues) -> Any:
    from starflow2_jax.inference.inverse import Jacobi

    if values.tolerance is not None and not values.jacobi:
        raise ValueError("--tolerance needs --jacobi, the number of tokens of a sliding chunk")
    limits = {"threshold": values.threshold, "tolerance": values.tolerance}
    return Jacobi(values.jacobi, **limits) if values.jacobi else None


def _print_row(row: list[dict[str, Any]], title: str, printed: str) -> None:
    """Print the parts of a row, the first of which begins with text that has been printed."""
    if title:
        print(title)
    for part in row:
        suffix = " [cut off]" if part["truncated"] else ""
        text = part["text"] if part["type"] == "text" else f"[{part['image']}]"
        print(text[len(printed) :] + suffix)
        printed = ""


# ------------------------------------------------------------------------------------ benchmarks


def _draw_benchmark(values: flags.FlagValues) -> None:
    """Write the tree of a public benchmark, or list what it lacks and exit with status 1."""
    from starflow2_jax.evaluation.benchmarks import draw, tree

    for name in ("bench", "prompts", "out"):
        if not values[name].value:
            raise ValueError(f"--{name} is needed to draw a benchmark")
    for name in (*_PROMPT_FLAGS, *_FLOW_ONLY, "image", "images"):
        if values[name].value:
            raise ValueError(f"--{name}: --bench draws the prompts of --prompts alone")
    benchmark = tree.open_tree(
        values.out,
        values.bench,
        prompts=values.prompts,
        image_root=values.image_root,
        rewrite=values.rewrite,
        samples=values.n,
        shard=values.shard,
        max_rows=values.batch_size // values.best_of,
    )
    if values.check:
        faults, count = tree.check(benchmark)
        result = {"files": count, "faults": [fault._asdict() for fault in faults]}
        lines = [f"{fault.reason}: {fault.path} (prompt {fault.item})" for fault in faults]
        lines.append(f"{count - len(faults)} of {count} files are complete: {values.out}")
        print(json.dumps(result) if values.json else "\n".join(lines))
        sys.exit(1 if faults else 0)
    start_time = time.perf_counter()
    model = _load(values)
    if not hasattr(model, "codec"):
        raise ValueError(f"--bench: the model {values.model} does not take this flag")
    values.n = benchmark.samples
    options = _answer_options(model, values, has_out=True, only_image=True)
    names = ("system", "resize", "batch_size", "layout", "mesh")
    settings = {name: values[name].value for name in names}
    count = draw.run(model, options, benchmark, overwrite=values.overwrite, **settings)
    seconds = time.perf_counter() - start_time
    result = {"written": count, "out": values.out, "seconds": seconds}
    print(json.dumps(result) if values.json else f"{count} files in {seconds:.1f} s: {values.out}")


# ------------------------------------------------------------------------------- flows of images


def _generate_images(
    model: "FlowModel", out: epath.Path | None, values: flags.FlagValues
) -> dict[str, Any]:
    """Generate and save images; return the result for --json."""
    import numpy as np

    from starflow2_jax.inference import flow_sampler, output
    from starflow2_jax.training.logging import image_grid

    if out is None:
        raise ValueError("--out is needed")
    if values.prompt and values.label:
        raise ValueError("--prompt and --label: give one of them")
    n, conditions = values.n or 4, values.prompt or values.label or [""]
    captions = [caption for caption in conditions for _ in range(n)]
    labels = (
        [flow_sampler.class_number(label, model.classes) for label in captions]
        if values.label
        else None
    )
    sampling = _flow_sampling(model, len(captions), values)
    start_time = time.perf_counter()
    images = flow_sampler.generate(
        model,
        len(captions),
        prompts=captions if values.prompt else None,
        labels=labels,
        sampling=sampling,
    )
    seconds = time.perf_counter() - start_time
    if images.dtype != np.uint8:
        buffer = io.BytesIO()
        np.save(buffer, images)
        paths = [out / "latents.npy"]
        atomic.write_file(paths[0], buffer.getbuffer())
    else:
        settings = {
            "model": str(values.model),
            "source": model.source,
            "seed": values.seed,
            "guidance": sampling.guidance,
            "rule": sampling.rule,
            "temperature": sampling.temperature,
            "jacobi": values.jacobi,
            "threshold": values.threshold,
            "tolerance": values.tolerance,
            "denoise": sampling.denoise,
        }
        paths = [out / f"{i:05d}.png" for i in range(len(images))]
        for i, path in enumerate(paths):
            metadata = {**settings, "caption": captions[i], "index": i}
            output.save_png(path, images[i], metadata)
        paths.append(out / "grid.png")
        image_grid.save_grid(paths[-1], images, captions if any(captions) else None)
    if not values.json:
        print(f"{len(paths)} files in {seconds:.1f} s: {paths[-1]}")
    return {"written": [str(path) for path in paths], "seconds": seconds}


def _flow_sampling(model: "FlowModel", count: int, values: flags.FlagValues) -> Any:
    """Return the sampling options of the flags; the defaults are the run's."""
    from starflow2_jax.inference.flow_sampler import FlowSampling

    sample = model.cfg["sample"]
    guidance = sample["guidance"] if values.guidance is None else values.guidance
    temperature = 1.0 if values.temperature is None else values.temperature
    for name, value, minimum in (("guidance", guidance, 0.0), ("temperature", temperature, 1e-3)):
        if not value >= minimum:
            raise ValueError(f"--{name}={value}: expected at least {minimum:g}")
    return FlowSampling(
        guidance=guidance,
        rule=values.rule or sample["guidance_rule"],
        temperature=temperature,
        jacobi=_jacobi(values),
        denoise=sample["denoise"] if values.denoise is None else values.denoise,
        seed=values.seed,
        batch=min(16, count),
    )


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.use_compilation_cache()
    cli.run(main)
