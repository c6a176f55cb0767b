"""A page of examples: pictures that a model draws, edits, answers and reasons about, with verdicts.

The examples follow from a seed and are not selected. The suite measures; this page is to look at.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from starflow2_jax.data import images, records
from starflow2_jax.evaluation import training_history
from starflow2_jax.evaluation.report import html
from starflow2_jax.evaluation.result_files import SHAPES_FILE, ResultFile
from starflow2_jax.evaluation.shapes import cases as cases_lib, suite
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.runtime import atomic
from starflow2_jax.shapes import generator
from starflow2_jax.shapes.generator import Object, Scene
from starflow2_jax.training.logging import image_grid

PAGE = "showcase.html"
PROMPT = "a red circle above a blue square"
# Examples of each tag; of `prompt`, drawings of `PROMPT`.
EXAMPLES = {"prompt": 4, "generation": 2, "editing": 2, "understanding": 1, "reasoning": 1}
TITLES = {
    "prompt": ("Drawn", "Four drawings of one prompt."),
    "generation": ("Drawn from captions", "Captions name shapes, numbers, colors and places."),
    "editing": ("Edited", "Left the source, right the result: the request must be met, and "
                "everything else must stay in its place."),
    "understanding": ("Answered", "Questions about an image."),
    "reasoning": ("Reasoned", "Left the source, right what the model draws before it answers."),
}  # fmt: skip
LABELS = {
    "prompt": "drawings of one prompt are right",
    "generation": "drawings from captions are right",
    "editing": "edits are right and keep the rest",
    "understanding": "answers are right",
    "reasoning": "answers after a drawing are right",
}
_CAPTIONS = {"editing": ("source", "result"), "reasoning": ("source", "drawn by the model")}


def section(name: str) -> str:
    """Return the section of the suite that examples belong to."""
    return "generation" if name == "prompt" else name


def make_cases(
    seed: int, pixels: int, sections: Sequence[str], n: int = 0
) -> dict[str, list[Case]]:
    """Return the cases of each kind of example that belongs to one of `sections`.

    Args:
        n: cases of each tag, 0 for those of `EXAMPLES`.
    """
    groups = {}
    for name, count in EXAMPLES.items():
        if section(name) not in sections:
            continue
        if name == "prompt":
            groups[name] = [prompt_case(pixels, k) for k in range(n or count)]
        else:
            tasks = suite.TASKS[name]
            group = cases_lib.generate(seed, n or count, pixels, tasks, balance_answers=True)
            groups[name] = [case for case in group if not case.is_held_out]
    return groups


def prompt_case(pixels: int, number: int = 0) -> Case:
    """Return the case of `PROMPT`, which says both colors and the relation of two objects."""
    circle = Object("circle", "red", "medium", 0.5, 0.27)
    square = Object("square", "blue", "medium", 0.5, 0.73)
    scene = Scene("white", 0.0, (circle, square))
    include = [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]},
    ]
    meta = {
        "tag": "position",
        "geneval": json.dumps({"tag": "position", "include": include, "prompt": PROMPT}),
        "scene": json.dumps(dataclasses.asdict(scene)),
    }
    name = f"prompt-{number}"
    blob = records.image_blob(images.encode_png(generator.draw(scene, pixels)), name)
    case = cases_lib.from_record(records.text_to_image(name, "prompt", PROMPT, blob, meta), name)
    assert case is not None  # its task and tag are those of a caption
    return case


def summary_lines(result: Mapping[str, Any], folder: str) -> list[str]:
    """Return how many examples are right, and the page's path, as lines of text."""
    lines = [f"{text} {LABELS[name]}" for name, text in _counts(result).items()]
    lines += [f"not run: {name}: {why}" for name, why in result["not_run"].items()]
    return [*lines, f"written    {folder}/{PAGE}"]


def write_folder(
    file: ResultFile,
    result: Mapping[str, Any],
    samples: Mapping[str, Sequence[Sample]],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Write result and page to the folder of a result; return the result with its stamp."""
    with atomic.folder(str(file.path), overwrite=overwrite) as temporary:
        stamped = dataclasses.replace(file, path=temporary / SHAPES_FILE)
        result, _ = stamped.write(dict(result))
        write(temporary / PAGE, result, samples)
    return result


def write(
    path: epath.PathLike, result: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]]
) -> None:
    """Write the page to `path`."""
    model = result.get("model", {}).get("path", "")
    below = (
        f"Examples from seed {result['options']['seed']}, none of them selected. A detector that "
        "works by rules judges the pictures; texts must be right word for word."
    )
    history = training_history.lines(result.get("training", []))
    body = [
        f"<h1>Examples of {html.escape(model)}</h1>",
        f'<p class="under">{html.escape(below)}</p>',
        f"<p>{html.escape(result['note'])}</p>" if result.get("note") else "",
        html.cards([(LABELS[name], text) for name, text in _counts(result).items()]),
        *_examples(samples),
        html.bullets("Not run", [f"{name}: {why}" for name, why in result["not_run"].items()]),
        html.bullets("Its training", history),
    ]
    atomic.write_file(path, html.page("Examples", body))


def _counts(result: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{correct} of {len(result['samples'][name])}"
        for name, correct in result["correct"].items()
    }


def _examples(samples: Mapping[str, Sequence[Sample]]) -> Iterator[str]:
    for name, group in samples.items():
        title, intro = TITLES[name]
        yield f"<h2>{html.escape(title)}</h2><p>{html.escape(intro)}</p>"
        yield f'<div class="examples">{"".join(_example(name, sample) for sample in group)}</div>'


def _example(name: str, sample: Sample) -> str:
    captions = _CAPTIONS.get(name, ("",))
    pictures = [
        (image_grid.png(pixels), caption) for pixels, caption in zip(sample.images, captions)
    ]
    texts = [sample.case.prompt_text]
    if name in ("understanding", "reasoning"):
        texts.append(f"Its answer: {sample.text or '(none)'}")
    verdict = "right" if sample.correct else f"wrong: {sample.reason}"
    return html.example(pictures, texts, verdict, sample.correct)
