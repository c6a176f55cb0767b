"""Answers of a model on the page of the suite: source, instruction, result and verdict."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from starflow2_jax.evaluation.report import html
from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.training.logging import image_grid

# Examples of each tag, of what training has shown and of held-out cases.
MAX_SEEN, MAX_HELD_OUT = 2, 1
_MEASURES = {"changed": "change made", "preserved": "rest kept"}


def choose(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Return random samples of every tag, correct or not, in the order of the tags."""
    groups: dict[tuple[str, bool], list[Sample]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(samples)):
        case = samples[i].case
        group = groups[case.tag, case.is_held_out]
        if len(group) < (MAX_HELD_OUT if case.is_held_out else MAX_SEEN):
            group.append(samples[i])
    tags = dict.fromkeys(sample.case.tag for sample in samples)
    return [s for tag in tags for held_out in (False, True) for s in groups[tag, held_out]]


def section(samples: Sequence[Sample], seed: int = 0) -> str:
    """Return examples under a line that says how they were chosen; empty without any."""
    selected = choose(samples, seed)
    if not selected:
        return ""
    correct = sum(sample.correct for sample in selected)
    note = (
        f"{len(selected)} of {len(samples)} answers, chosen at random from every tag whether right "
        f"or wrong; {correct} of these are right."
    )
    return f'<p>{note}</p><div class="examples">{"".join(map(example, selected))}</div>'


def example(sample: Sample) -> str:
    """Return the example of a sample."""
    case = sample.case
    sources = [(image, "source") for image in case.prompt_images]
    results = [(image, "result") for image in sample.images[len(sources) : len(sources) + 1]]
    # A caption allows many images, so its reference would look like the only right one.
    if results and case.task != "t2i" and case.reference_image is not None:
        label = "one that is right" if case.task == "reason_free" else "expected"
        results.append((case.reference_image, label))
    texts = [f"“{case.prompt_text}”"]
    if case.reference_text and case.task != "t2i":
        texts.append(f"Its answer: {sample.text or '(none)'}")
    pictures = [(image_grid.png(image), label) for image, label in (*sources, *results)]
    tag = case.tag.replace("_", " ") + (", held out of training" if case.is_held_out else "")
    texts.append(f"({tag})")
    return html.example(pictures, texts, _verdict(sample), sample.correct)


def _verdict(sample: Sample) -> str:
    """Return whether an answer is right, how far an edit is, and why it is wrong."""
    parts = ["✓ right" if sample.correct else "✗ wrong"]
    parts += [
        f"{label}: {'yes' if sample.measures[name] else 'no'}"
        for name, label in _MEASURES.items()
        if sample.measures.get(name) is not None
    ]
    return "; ".join([*parts, *([sample.reason] if sample.reason else [])])
