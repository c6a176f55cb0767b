"""What a model of pictures and words is asked of the shapes world, and what would be right.

A case is a record of `shapes.generator` or `shapes.tasks` taken apart: what the user says and
shows, the words and the picture that should follow, and the facts by which a picture is judged.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record, Text
from starflow2_jax.evaluation import codec
from starflow2_jax.shapes import generator, holdout, tasks as shapes_tasks
from starflow2_jax.shapes.generator import Scene

# The tasks, and of each the tags that its score is a mean of.
TAGS = {
    "t2i": generator.TAGS,
    "question": shapes_tasks.QUESTIONS,
    "edit": shapes_tasks.EDITS,
    "reason": shapes_tasks.REASONS,
    "text": shapes_tasks.TEXTS,
}
# Tags whose captions name colour and shape: the only ones that can ask for a withheld pair.
NAMED = ("colors", "color_attr")
# Seeds of what is drawn here begin behind those that datasets are made with.
FIRST_SEED = 1_000_000


@dataclass(frozen=True, eq=False)
class Case:
    """One thing asked.

    Attributes:
        withheld: what of it training has not shown (`shapes_withheld.found`), "none" if it has.
        given: what the user says and shows, in order; pictures uint8 [H, W, 3].
        words: of the right answer, "" where a picture alone is asked for.
        picture: the right one, uint8 [H, W, 3], or None; facts: GenEval metadata of it, if any.
        scenes: what the record's pictures show, in order, but for zoomed ones.
    """

    id: str
    task: str
    tag: str
    withheld: str
    record: Record
    given: tuple[str | np.ndarray, ...]
    words: str
    picture: np.ndarray | None
    facts: Mapping[str, Any] | None
    scenes: tuple[Scene, ...]

    @property
    def asks(self) -> str:
        """What the user says."""
        return " ".join(part for part in self.given if isinstance(part, str))

    @property
    def seen(self) -> bool:
        """Whether training has shown all of it, in other pictures."""
        return self.withheld == "none"


class Sample(NamedTuple):
    """What a model made of a case: `pictures` to show (given, drawn, wanted), what it `says`,
    whether that is `right` and if not `why`, and the nats of the picture or the words."""

    case: Case
    pictures: tuple[np.ndarray, ...]
    says: str
    right: bool
    why: str
    log_likelihood: float | None


def from_record(record: Record, where: str, mark: str = "") -> Case | None:
    """The case of a record, None where it is of no task in `TAGS`; `mark` is put behind its id.

    Raises:
        DatasetError: an image that cannot be decoded; names `where` and the record.
    """
    meta = record.meta
    task = str(meta.get("task", "t2i" if "geneval" in meta else ""))
    tag = str(meta.get("tag", ""))
    if tag not in TAGS.get(task, ()):
        return None
    shown = lambda i: images.decode(record.imgs[i].data, f"{where} (id {record.id!r}), image {i}")
    given, words, picture = [], [], None
    for segment in record.segs:
        is_text = isinstance(segment, Text)
        if not segment.loss:
            given.append(segment.s if is_text else shown(segment.i))
        elif is_text:
            words.append(segment.s)
        else:
            picture = shown(segment.i)
    scenes = tuple(codec.scenes(meta))
    facts = json.loads(str(meta["geneval"])) if "geneval" in meta and picture is not None else None
    withheld = str(meta.get("withheld", "none"))
    if task == "t2i" and "withheld" not in meta:
        withheld = _named(scenes[0], tag) if scenes else "none"
    if tag == "zoom" and scenes:
        # Of a zoomed picture the facts are not those of the scene.
        facts = {"include": [{"class": words[-1], "color": scenes[0].objects[0].color}]}
    about = (record, tuple(given), " ".join(words), picture, facts, scenes)
    return Case(record.id + mark, task, tag, withheld, *about)


def _named(scene: Scene, tag: str) -> str:
    """What is withheld of the pairs that a caption of this tag names."""
    return holdout.withheld_kind((), scene.objects if tag in NAMED else ())


def read(folders: Iterable[str], *, n: int | None = None) -> list[Case]:
    """The cases of dataset folders, of each tag at most the first `n`, seen and withheld apart.

    Raises:
        DatasetError: a damaged folder or record, or folders without any case.
    """
    folders, counts, found = list(folders), {}, []
    for folder in folders:
        dataset = records.read(folder)
        for index, record in enumerate(dataset):
            case = from_record(record, dataset.location(index))
            if case is None:
                continue
            kind = (case.task, case.tag, case.seen)
            counts[kind] = counts.get(kind, 0) + 1
            if n is None or counts[kind] <= n:
                found.append(case)
    if not found:
        raise DatasetError(
            f"{', '.join(folders)}: no record of the shapes world with a task of {', '.join(TAGS)}"
        )
    return found


def drawn(seed: int, n: int, pixels: int, tasks: Sequence[str] = tuple(TAGS)) -> list[Case]:
    """Cases drawn from the shapes world: of each tag `n` seen ones and half as many withheld.

    Of captions only those that name a colour and a shape can ask for a withheld pair.
    """
    found = []
    for task in tasks:
        for part, mark, count in (("leave_out", "", n), ("only", "-withheld", -(-n // 2))):
            made = _made(task, FIRST_SEED + seed, count, pixels, part)
            cases = (from_record(record, f"drawn {task}", mark) for record in made)
            found += [case for case in cases if case is not None]
    return found


def _made(task: str, seed: int, count: int, pixels: int, part: str) -> Iterator[Record]:
    tags: Sequence[str] = TAGS[task]
    if task == "t2i" and part == "only":
        keep = lambda scene: _named(scene, NAMED[0]) == "pair"
        return generator.make_records(seed, count * len(NAMED), pixels, tags=NAMED, keep=keep)
    if task == "t2i":
        keep = holdout.scene_filter(part)
        return generator.make_records(seed, count * len(tags), pixels, keep=keep)
    if task == "text" and part == "only":
        tags = [tag for tag in tags if tag != "count_left"]  # it names no pair
    own = {"tasks": [task], "withheld": part}
    return shapes_tasks.make_records(seed, count * len(tags), pixels, **own)


def blank(case: Case) -> Case:
    """The case with grey pictures in place of the user's: what words alone can tell."""
    grey = lambda part: part if isinstance(part, str) else np.full_like(part, 128)
    return dataclasses.replace(case, given=tuple(map(grey, case.given)))


def shown_another(case: Case, other: Case) -> Case:
    """The case with the pictures that the user of another case of its task shows."""
    pictures = iter([part for part in other.given if not isinstance(part, str)])
    given = tuple(p if isinstance(p, str) else next(pictures) for p in case.given)
    return dataclasses.replace(case, given=given)
