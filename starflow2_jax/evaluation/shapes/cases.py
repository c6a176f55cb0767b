"""Evaluation cases from the synthetic shapes benchmark: prompt, reference answer, reference image.

A case is a record of `shapes.generator` or `shapes.tasks`, split into what the user provides, what
the assistant should answer, and the facts that a generated image is checked against.
"""

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record, Text
from starflow2_jax.evaluation import codec
from starflow2_jax.runtime import json_text
from starflow2_jax.shapes import generator, holdout, tasks as shapes_tasks
from starflow2_jax.shapes.generator import Scene

# The tags of each task; the score of a task is the mean over its tags.
TAGS = {
    "t2i": generator.TAGS,
    "question": shapes_tasks.QUESTIONS,
    "edit": shapes_tasks.EDITS,
    "reason": shapes_tasks.REASONS,
    "reason_free": shapes_tasks.FREE_REASONS,
    "text": shapes_tasks.TEXTS,
}
# Only captions with these tags name color and shape, so only they can name a held-out pair.
PAIR_TAGS = ("colors", "color_attr")
# Seeds of evaluation cases; those of datasets are smaller.
FIRST_SEED = 1_000_000


@dataclass(frozen=True, eq=False)
class Case:
    """One evaluation case."""

    id: str
    task: str
    tag: str
    holdout: str  # what of it was excluded from training, as from `holdout.withheld_kind`
    record: Record
    prompt: tuple[str | np.ndarray, ...]  # texts and images uint8 [H, W, 3] of the user, in order
    reference_text: str  # text of the correct answer, "" if that is an image alone
    reference_image: np.ndarray | None  # image of the correct answer, uint8 [H, W, 3], or None
    # GenEval metadata that a generated image is checked against, or None
    facts: Mapping[str, Any] | None
    scenes: tuple[Scene, ...]  # scenes of the record's images, in order, except for zoomed ones

    @property
    def prompt_text(self) -> str:
        """The text of the prompt."""
        return " ".join(part for part in self.prompt if isinstance(part, str))

    @property
    def prompt_images(self) -> list[np.ndarray]:
        """The images of the prompt."""
        return [part for part in self.prompt if not isinstance(part, str)]

    @property
    def is_held_out(self) -> bool:
        """True if training has not shown all attribute pairs and combinations of the case."""
        return self.holdout != "none"


class Sample(NamedTuple):
    """A model's answer to a case."""

    case: Case
    images: tuple[np.ndarray, ...]  # source, generated and reference image, as far as they exist
    text: str
    correct: bool
    reason: str  # why the answer is not correct
    log_likelihood: float | None  # in nats, of the generated image or else of the text
    # Verdicts that `correct` rests on or is compared with, None where one does not apply
    measures: Mapping[str, bool | None] = types.MappingProxyType({})


def from_record(record: Record, location: str, id_suffix: str = "") -> Case | None:
    """Return the case of the record at `location`, None if it belongs to no task in `TAGS`."""
    meta = record.meta
    task = str(meta.get("task", "t2i" if "geneval" in meta else ""))
    tag = str(meta.get("tag", ""))
    if tag not in TAGS.get(task, ()):
        return None

    def decode(i: int) -> np.ndarray:
        return images.decode(record.imgs[i].data, f"{location} (id {record.id!r}), image {i}")

    prompt, reference_texts, reference_image = [], [], None
    for segment in record.segs:
        is_text = isinstance(segment, Text)
        if not segment.loss:
            prompt.append(segment.s if is_text else decode(segment.i))
        elif is_text:
            reference_texts.append(segment.s)
        else:
            reference_image = decode(segment.i)
    scenes = tuple(codec.parse_scenes(meta, f"record {record.id!r}"))
    facts = None
    if "geneval" in meta and reference_image is not None:
        facts = json_text.decode(str(meta["geneval"]), f"record {record.id!r}: meta.geneval")
    kind = str(meta.get("withheld", "none"))
    if task == "t2i" and "withheld" not in meta:
        kind = _caption_holdout(scenes[0], tag) if scenes else "none"
    if tag == "zoom" and scenes:
        # The zoomed image shows one object, so the facts of the scene do not apply to it.
        color = scenes[0].objects[0].color
        facts = {"include": [{"class": reference_texts[-1], "color": color}]}
    return Case(
        id=record.id + id_suffix,
        task=task,
        tag=tag,
        holdout=kind,
        record=record,
        prompt=tuple(prompt),
        reference_text=" ".join(reference_texts),
        reference_image=reference_image,
        facts=facts,
        scenes=scenes,
    )


def _caption_holdout(scene: Scene, tag: str) -> str:
    """Return the kind of holdout among the pairs that a caption with this tag names."""
    return holdout.withheld_kind((), scene.objects if tag in PAIR_TAGS else ())


def _has_held_out_pair(scene: Scene) -> bool:
    return _caption_holdout(scene, PAIR_TAGS[0]) == "pair"


def read(folders: Iterable[str], *, n: int | None = None) -> list[Case]:
    """Read the cases of dataset folders, of each tag at most `n` held-out and `n` other ones."""
    folders, counts, cases = list(folders), {}, []
    for folder in folders:
        dataset = records.read(folder)
        for index, record in enumerate(dataset):
            case = from_record(record, dataset.location(index))
            if case is None:
                continue
            group = (case.task, case.tag, case.is_held_out)
            counts[group] = counts.get(group, 0) + 1
            if n is None or counts[group] <= n:
                cases.append(case)
    if not cases:
        raise DatasetError(
            f"{', '.join(folders)}: no record of the shapes benchmark has one of the tasks "
            f"{', '.join(TAGS)}"
        )
    return cases


def generate(
    seed: int,
    n: int,
    pixels: int,
    tasks: Sequence[str] = tuple(TAGS),
    balance_answers: bool = False,
) -> list[Case]:
    """Generate for each tag `n` cases like those of training, and half as many held-out ones.

    For `balance_answers` see `shapes.tasks.make_draft`.
    """
    cases = []
    for task in tasks:
        for part, suffix, count in (("leave_out", "", n), ("only", "-withheld", -(-n // 2))):
            for record in _generate_records(
                task, FIRST_SEED + seed, count, pixels, part, balance_answers
            ):
                case = from_record(record, f"generated {task}", suffix)
                if case is not None:
                    cases.append(case)
    return cases


def _generate_records(
    task: str, seed: int, count: int, pixels: int, part: str, balance_answers: bool
) -> Iterator[Record]:
    """Generate `count` records for each tag of a task, as `--withheld part` selects them."""
    tags: Sequence[str] = TAGS[task]
    if task == "t2i":
        keep = holdout.scene_filter(part)
        if part == "only":
            tags, keep = PAIR_TAGS, _has_held_out_pair
        return generator.make_records(seed, count * len(tags), pixels, tags=tags, keep=keep)
    if task == "text" and part == "only":
        tags = [tag for tag in tags if tag != "count_left"]  # it names no pair
    return shapes_tasks.make_records(
        seed,
        count * len(tags),
        pixels,
        tasks=[task],
        withheld=part,
        balance_answers=balance_answers,
    )


def with_blank_images(case: Case) -> Case:
    """Return the case with gray images in its prompt, to measure what the text alone gives away."""
    prompt = [p if isinstance(p, str) else np.full_like(p, 128) for p in case.prompt]
    return dataclasses.replace(case, prompt=tuple(prompt))


def with_images_of(case: Case, other: Case) -> Case:
    """Return the case with the prompt images of another case of its task."""
    replacements = iter(other.prompt_images)
    prompt = [p if isinstance(p, str) else next(replacements) for p in case.prompt]
    return dataclasses.replace(case, prompt=tuple(prompt))
