"""The shapes suite: every task of the synthetic benchmark, for one STARFlow2.

The modules of this folder measure generation, understanding, editing and reasoning. Likelihood is
that of the same records, and text is the VLM's skill without images, before and after training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.evaluation import ask, codec, interleaved_likelihood
from starflow2_jax.evaluation.shapes import accuracy, editing, reasoning, text_to_image, vqa
from starflow2_jax.evaluation.shapes.cases import TAGS, Case, Sample
from starflow2_jax.evaluation.shapes.text_to_image import ReconstructFn
from starflow2_jax.inference import vlm
from starflow2_jax.inference.model import Model, adapter_is_trained, flow_is_trained
from starflow2_jax.inference.vlm import VLM

# The tasks whose cases a section answers; `likelihood` scores those of all tasks.
TASKS = {
    "generation": ("t2i",),
    "understanding": ("question",),
    "editing": ("edit",),
    "reasoning": ("reason", "reason_free"),
    "text": ("text",),
}
SECTIONS = ("generation", "understanding", "editing", "reasoning", "likelihood", "text")
# Each `measure` returns `accuracy.compare`, `ceilings` or `references` as from
# `accuracy.split_by_holdout`, and the samples, which `answer_cases` returns alone.
SCORED_SECTIONS = {
    "generation": text_to_image,
    "understanding": vqa,
    "editing": editing,
    "reasoning": reasoning,
}
# Tokens that an answer may have beyond the longest reference text.
_EXTRA_TOKENS = 4
_LIKELIHOOD_BATCH_SIZE = 32


def tasks_of(sections: Sequence[str]) -> list[str]:
    """Return the tasks whose cases sections need."""
    if "likelihood" in sections:
        return list(TAGS)
    return [task for name in sections for task in TASKS[name]]


def make_answer_fn(model: Model, cases: Sequence[Case], **options: Any) -> ask.AnswerFn:
    """Return `ask.make_answer_fn` with room for the longest reference text of the cases."""
    lengths = [len(model.tokenizer.encode(case.reference_text)) for case in cases]
    return ask.make_answer_fn(model, max_tokens=max(lengths, default=0) + _EXTRA_TOKENS, **options)


def make_reconstruct_fn(model: Model, seed: int = 0) -> ReconstructFn:
    """Return a function that encodes and decodes images, with the noise of the model's training."""
    noise = model.cfg["noise"]
    sigma = noise["sigma"] if noise["kind"] == "gaussian" else 0.0

    def reconstruct(images: np.ndarray) -> np.ndarray:
        return codec.reconstruct(model.codec, images, sigma, seed)[2]

    return reconstruct


def unsupported_sections(model: Model) -> dict[str, str]:
    """Return the sections that a checkpoint cannot be measured on, each with the reason."""
    reasons = {}
    if model.codec is None:
        reason = "the model has no codec; name its folder with --fae"
        reasons |= dict.fromkeys(("generation", "understanding", "editing", "reasoning"), reason)
    if not adapter_is_trained(model):
        reason = "the adapter is still zero (stage 1?), so the VLM cannot see images"
        reasons |= dict.fromkeys(("understanding", "reasoning"), reason)
    if not flow_is_trained(model):
        reason = "the flow's output layers are still zero (stage 2?), so it cannot generate images"
        reasons |= dict.fromkeys(("generation", "editing", "reasoning"), reason)
    return reasons


def load_reference_vlms(
    model: Model, pixels: int, text_only: str | None
) -> tuple[dict[str, VLM], dict[str, str]]:
    """Load the VLMs that answers are compared with, and the reasons why one is missing, by name.

    `vlm_baseline` is the model's frozen VLM with its own tower, and `text_only_baseline` the one
    that was trained without images, if its folder is named.
    """
    references, reasons = {}, {}
    path = model.cfg["vlm"]["path"]
    try:
        if not path:
            raise ValueError("vlm.path is empty: the VLM has random weights and no vision tower")
        baseline = vlm.load(str(model_folder.locate(path)))
        size = baseline.cfg["image"]["pixels"]
        if size != pixels:
            raise ValueError(f"{path} reads images of {size} pixels, the model of {pixels}")
        references["vlm_baseline"] = baseline
    except (ValueError, FileNotFoundError) as error:
        reasons["vlm_baseline"] = str(error)
    if text_only:
        references["text_only_baseline"] = vlm.load(text_only)
    return references, reasons


def run(
    cases: Sequence[Case],
    answer_fn: ask.AnswerFn,
    *,
    only: Sequence[str] = SECTIONS,
    not_run: Mapping[str, str] | None = None,
    model: Model | None = None,
    references: Mapping[str, VLM] | None = None,
    reconstruct_fn: ReconstructFn | None = None,
    seed: int = 0,
    on_section: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Measure the sections `only` of the suite, except `not_run` (with their reasons).

    Likelihoods are skipped without a `model`. `on_section` is called before each section runs.
    The results are the JSON of the suite, and the samples by section.
    """
    skipped = dict(not_run or {})
    sections: dict[str, Any] = {}
    samples: dict[str, list[Sample]] = {}
    for name in only:
        subset = [case for case in cases if case.task in TASKS.get(name, [case.task])]
        if not subset:
            skipped.setdefault(name, f"no cases of task {' or '.join(TASKS.get(name, ()))}")
        if name not in SCORED_SECTIONS and model is None:
            skipped.setdefault(name, "there is no model to score with")
        if name == "likelihood" and model is not None and model.codec is None:
            subset = [case for case in subset if case.task == "text"]
        if name in skipped or not subset:
            continue
        on_section(name)
        if name == "likelihood":
            sections[name] = _measure_likelihood(model, subset, seed)
        elif name == "text":
            sections[name] = interleaved_likelihood.measure_text_skill(
                model, [case.record for case in subset], batch_size=_LIKELIHOOD_BATCH_SIZE
            )
        elif name in ("generation", "editing"):
            measure = SCORED_SECTIONS[name].measure
            sections[name], samples[name] = measure(subset, answer_fn, reconstruct_fn)
        else:
            sections[name], samples[name] = SCORED_SECTIONS[name].measure(subset, answer_fn)
        if name == "understanding":
            sections[name]["references"] = _measure_references(subset, references or {})
    counts = {task: sum(case.task == task for case in cases) for task in TAGS}
    result = {
        "sections": sections,
        "not_run": {name: skipped[name] for name in only if name in skipped},
        "cases": {task: count for task, count in counts.items() if count},
        "protocol": protocol(),
    }
    return result, samples


def _measure_likelihood(model: Model, cases: Sequence[Case], seed: int) -> dict[str, Any]:
    """Return `interleaved_likelihood.measure_records` by task, for `seen` and `held_out` cases."""
    figures: dict[str, Any] = {}
    for task in dict.fromkeys(case.task for case in cases):
        parts = {
            name: [c.record for c in cases if c.task == task and c.is_held_out == held_out]
            for name, held_out in (("seen", False), ("held_out", True))
        }
        # The smaller part is filled up to the batch size of the larger, so both share one program.
        batch_size = min(_LIKELIHOOD_BATCH_SIZE, max(map(len, parts.values())))
        figures[task] = {
            name: interleaved_likelihood.measure_records(
                model, records, batch_size=batch_size, seed=seed
            )
            for name, records in parts.items()
            if records
        }
    return figures


def _measure_references(cases: Sequence[Case], references: Mapping[str, VLM]) -> dict[str, Any]:
    tables = {}
    for name, reference in references.items():
        correct = vqa.vlm_is_correct(reference, cases)
        tables[name] = accuracy.split_by_holdout(cases, correct)
        if name == "vlm_baseline":
            correct = vqa.vlm_is_correct(reference, cases, blank=True)
            tables[f"{name}_blank_image"] = accuracy.split_by_holdout(cases, correct)
    return tables


def protocol() -> dict[str, Any]:
    """Describe what the figures mean."""
    return {
        "accuracy": accuracy.PROTOCOL,
        "others": f"a case is compared with at most {accuracy.MAX_OTHERS} other cases of its tag",
        "text": "correct if equal word for word; greedy decoding",
        "detector": "shapes/detector, by rules; facts as GenEval metadata",
        "editing": " ".join((editing.__doc__ or "").split("\n\n", 1)[1].split()),
        "max_shift": editing.MAX_SHIFT,
        "reasoning": " ".join((reasoning.__doc__ or "").split("\n\n", 1)[1].split()),
        "likelihood": interleaved_likelihood.PROTOCOL,
        "comparisons": {
            name: {
                **section.BASELINES,
                **getattr(section, "CEILINGS", {}),
                **getattr(section, "REFERENCES", {}),
            }
            for name, section in SCORED_SECTIONS.items()
        },
    }
