"""Draw the pictures of a benchmark with a STARFlow2, and describe the protocol for its stamp."""

from collections.abc import Mapping, Sequence
from typing import Any

from starflow2_jax.evaluation.benchmarks import tree
from starflow2_jax.evaluation.benchmarks.items import Item
from starflow2_jax.evaluation.benchmarks.tree import DrawFn, Picture, Tree
from starflow2_jax.inference import output, resize
from starflow2_jax.inference.generate import generate_many
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part, parse_prompt

SEEDS = "candidate c of sample k of prompt i: fold_in(key(seed), (i * samples + k) * best_of + c)"


def make_draw_fn(model: Model, options: GenerateOptions, *, policy: str, system: str) -> DrawFn:
    """Return a function that draws the samples of a group of items in one batch.

    Args:
        policy: what happens to source images of another size, see `inference.resize`.
        system: text of the system's turn before every prompt; "" for none.
    """
    side = model.codec.model.pixels if model.codec is not None else 0

    def draw(group: Sequence[Item], numbers: Sequence[int]) -> list[list[Picture]]:
        pairs = [read_prompt(item, side, policy, system) for item in group]
        rows = [parts for parts, _ in pairs]
        max_rows = len(rows) * options.copies
        answers = generate_many(model, rows, options, max_rows, numbers)
        return [
            [
                _picture(parts, fits, f"prompt {item.name!r}, sample {k}")
                for k, parts in enumerate(samples)
            ]
            for item, (_, fits), samples in zip(group, pairs, answers)
        ]

    return draw


def read_prompt(
    item: Item, side: int, policy: str, system: str
) -> tuple[list[Part], list[resize.Fit]]:
    """Return the prompt of an item, its images first, and how those were brought to `side`."""
    location = f"prompt {item.name!r}"
    images = [image if not callable(image) else image() for image in item.images]
    parts = parse_prompt([*images, item.prompt], location)
    if system:
        parts = [Part("text", "system", system), *parts]
    return resize.fit_parts(parts, side, policy, location) if side else (parts, [])


def _picture(parts: Sequence[Part], fits: Sequence[resize.Fit], location: str) -> Picture:
    """Return the picture of an answer with its likelihoods and the text before it.

    Raises:
        ValueError: The answer has no picture; names the prompt.
    """
    number = next((i for i, part in enumerate(parts) if part.kind == "image"), None)
    if number is None or parts[number].image is None:
        texts = " ".join(part.text for part in parts if part.kind == "text")
        reason = (
            f"the answer is {texts[:80]!r}"
            if number is None
            else "the model has no codec; give one with --fae"
        )
        raise ValueError(f"{location}: the model gave no image: {reason}")
    note: dict[str, Any] = output.part_scores(parts[number])
    if number:
        note["thinking"] = "".join(part.text for part in parts[:number])
    if fits:
        note["resized"] = [fit.to_json() for fit in fits]
    return Picture(resize.restore_image(parts[number].image, fits), note)


def run(
    model: Model,
    options: GenerateOptions,
    benchmark: Tree,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> int:
    """Write what a benchmark's tree lacks, and return the number of files that were written.

    Args:
        options: those of one answer; they ask for one image and, to think, for text.
        settings: further entries of `settings.json`; `resize` and `system` are those of
            `make_draw_fn`.
    """
    protocol = {**tree.describe(benchmark), **describe_protocol(model, options), **settings}
    stamp = tree.start(benchmark.out, protocol, overwrite=overwrite)
    draw = make_draw_fn(model, options, policy=settings["resize"], system=settings["system"])
    return tree.write(benchmark, stamp, draw, overwrite=overwrite)


def describe_protocol(model: Model, options: GenerateOptions) -> dict[str, Any]:
    """Return everything about the model and its sampling that moves a score, for the stamp."""
    values = output.options_dict(options)
    del values["n"]
    text_options = {name: values.pop(name) for name in _TEXT_OPTIONS}
    return {
        "thinking": text_options if options.max_tokens else False,
        "seed": values.pop("seed"),
        "seeds": SEEDS,
        "side": model.codec.model.pixels if model.codec is not None else None,
        "sampling": values,
        **_describe_model(model),
    }


_TEXT_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "stop")


def _describe_model(model: Model) -> dict[str, Any]:
    """Return the weights, number formats, machine and versions that a picture depends on."""
    import jax

    from starflow2_jax.checkpoints.convert import teacher
    from starflow2_jax.evaluation import result_files
    from starflow2_jax.training.logging import run_log

    source: Mapping[str, Any] = result_files.describe_model(model.source)
    vlm = model.cfg["vlm"]["path"]
    environment = run_log.environment()
    return {
        "model": {
            "sha256": source["sha256"],
            "step": source["step"],
            "vlm": teacher.identity(vlm) if vlm else None,
            "codec": model.codec.sha256 if model.codec is not None else None,
        },
        "dtype": {
            "compute": str(model.cfg["compute_dtype"]),
            "frozen": str(model.cfg["frozen_dtype"]),
        },
        "device": f"{jax.default_backend()}: {environment['devices']}",
        "versions": environment["versions"],
    }
