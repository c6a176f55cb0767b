"""Records of every kind from the shapes world: captions, questions, edits, reasoning in pictures.

    task      user                        assistant
    caption   picture, request            description
    question  picture, question           one or two words
    dialog    picture, several questions  one or two words to each
    quiz      picture, request            questions, which are given, and one or two words to each
    edit      picture, instruction        picture
    reason    picture, request            picture (zoomed or edited), one or two words
    multi     two or three pictures, ...  one word
    text      statement and question      a few words
    t2i       caption                     picture (`shapes.make_records`)

What the user says and shows is context, what the assistant does is learnt (of a quiz, answers).
Every request comes in three wordings. A record is drawn again until it fits what is withheld
(`shapes_withheld`).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.data.records import Img, Record, Text
from starflow2_jax.shapes import generator, holdout, scenes as shapes_scenes
from starflow2_jax.shapes.generator import NUMBERS, Object, Scene, pick, plural
from starflow2_jax.shapes.scenes import Zoom, facts, name, the
from starflow2_jax.shapes.wordings import TERSE, request

EDITS = ("recolor", "add", "remove", "move", "replace")
QUESTIONS = ("color", "shape", "size", "count", "exists", "relation", "is_relation", "background")
REASONS = ("zoom", "count_after_removal", "count_after_edit")
MULTI = ("same_shape", "which_shows", "which_has_most", "total")
TEXTS = ("turn_around", "count_left", "color_of")
DIALOGS = ("distinct", "groups")
_HARD = ("exists", "relation", "is_relation")  # asked three times as often
_DIALOG, _QUIZ = 8, 13  # questions, fewer where one comes twice
_ORDINALS = ("first", "second", "third")


@dataclasses.dataclass(frozen=True)
class Given:
    """Words in the assistant's turn that are not learnt."""

    words: str


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record before it is drawn. `said`: what is spoken of beside the `scenes`; `more`: further
    words of user and assistant in turn."""

    tag: str
    user: tuple[str | Scene, ...]
    assistant: tuple[str | Given | Scene | Zoom, ...]
    scenes: tuple[Scene, ...]
    said: tuple[Object | holdout.Combination, ...] = ()
    geneval: dict[str, object] | None = None
    more: tuple[tuple[str, str], ...] = ()


def caption(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Any scene -> its description."""
    scene = generator.scene(rng, tag)
    said, absent = _told(rng, scene, int(rng.integers(generator.WORDINGS)))
    linked = None
    if len({item.shape for item in scene.objects}) == 2 and generator.relation(*scene.objects):
        linked = (scene.objects[0], generator.relation(*scene.objects), scene.objects[1])
    told = facts(scene, said, linked=linked)
    asks = request("caption", wording)
    return Draft(tag, (scene, asks), (said,), (scene,), absent, told)


def _told(rng: np.random.Generator, scene: Scene, wording: int) -> tuple[str, tuple[Object, ...]]:
    """A description, and what it names that is not there.

    The last wording is a list of tags, each with the shape first and the number last. One of them
    has the colour of one object and the shape of another, and the number zero.

    Who writes a word right after what it hangs on learns to look it up there: a shape by its
    colour in the first wordings, in the tags a colour by its shape, and whether there is any.
    """
    said = shapes_scenes.describe(scene, wording, back=bool(rng.integers(2)))
    pairs = {(item.shape, item.color) for item in scene.objects}
    absent = sorted({(a, b) for a, _ in pairs for _, b in pairs} - pairs)
    if wording != 2 or not absent:
        return said, ()
    parts = said.split(", ")
    shape, color = absent[int(rng.integers(len(absent)))]
    parts.insert(int(rng.integers(1, len(parts) + 1)), f"{shape} {color} zero")
    return ", ".join(parts), (dataclasses.replace(scene.objects[0], shape=shape, color=color),)


def question(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Picture and question -> one or two words."""
    if tag == "count":
        scene = shapes_scenes.groups(rng)
    else:
        scene = shapes_scenes.distinct(rng, 2 if "relation" in tag else int(rng.integers(1, 5)))
    asks, answer, said = _ask(rng, scene, wording, tag)
    return Draft(tag, (scene, asks), (answer,), (scene,), said, facts(scene, asks))


def dialog(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Picture and several questions, each with its answer; the second scene kind has groups."""
    scene, asked, said = _several(rng, tag, _DIALOG, terse=0.0)
    (asks, answer), *more = asked.items()
    return Draft(tag, (scene, asks), (answer,), (scene,), said, facts(scene, asks), tuple(more))


def quiz(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """The same, all in one turn, half of it in as few words as it takes: a row teaches more."""
    scene, asked, said = _several(rng, tag, _QUIZ, terse=0.5)
    turn: list[str | Given] = []
    for line, (asks, answer) in enumerate(asked.items()):
        turn += [Given(f"{chr(10) if line else ''}{asks}"), f" {answer}"]
    asks = request("quiz", wording)
    return Draft(tag, (scene, asks), tuple(turn), (scene,), said, facts(scene, asks))


def _several(
    rng: np.random.Generator, tag: str, number: int, *, terse: float
) -> tuple[Scene, dict[str, str], tuple[Object | holdout.Combination, ...]]:
    """A scene, up to `number` questions with their answers, a share of them `terse`, and what is
    spoken of."""
    if tag == "distinct":
        # Most of them show two objects: of more it is not asked how two lie to one another.
        count = int(rng.choice([1, 2, 2, 2, 2, 3, 4]))
        scene = shapes_scenes.distinct(rng, count)
        tags = [t for t in (*QUESTIONS, *_HARD, *_HARD) if count == 2 or "relation" not in t]
    else:
        scene, tags, number = shapes_scenes.groups(rng), ["count", "background"], number // 2
    asked: dict[str, str] = {}
    said: list[Object | holdout.Combination] = []
    for _ in range(number):
        mixed = [scene.objects[k] for k in rng.permutation(len(scene.objects))]
        turned = dataclasses.replace(scene, objects=tuple(mixed))
        wording = int(rng.integers(generator.WORDINGS))
        short = bool(rng.random() < terse)
        asks, answer, spoken = _ask(rng, turned, wording, pick(rng, tags), terse=short)
        asked[asks] = answer
        said += spoken
    return scene, asked, tuple(said)


def _ask(
    rng: np.random.Generator, scene: Scene, wording: int, tag: str, *, terse: bool = False
) -> tuple[str, str, tuple[Object | holdout.Combination, ...]]:
    """Question, answer, and what is spoken of; the objects differ, but for a count."""
    said: tuple[Object | holdout.Combination, ...] = ()
    if tag == "count":
        a = scene.objects[0]
        key = pick(rng, ("shape", "color"))
        value = getattr(a, key)
        if rng.random() < 0.15:  # sometimes of something that is not there
            value = pick(rng, _others(scene, key))
        count = sum(getattr(item, key) == value for item in scene.objects)
        things = plural(value) if key == "shape" else f"{value} objects"
        words, answer = {"things": things}, NUMBERS[count]
    else:
        a, b = scene.objects[0], scene.objects[-1]
        words = {"shape": a.shape, "color": a.color, "a": the(a), "b": the(b)}
        if tag == "exists":
            # What is not there has the colour of one object and the shape of another, if it can.
            yes = bool(rng.integers(2))
            shape = b.shape if a != b else pick(rng, _others(scene, "shape"))
            asked = a if yes else dataclasses.replace(a, shape=shape)
            words, answer, said = {"new": name(asked)}, "yes" if yes else "no", (asked,)
        elif "relation" in tag:
            true = generator.relation(a, b)
            answer, asked = true, true
            if tag == "is_relation":
                if rng.integers(2):
                    asked = pick(rng, [r for r in generator.RELATIONS if r != true])
                words, answer = words | {"relation": asked}, "yes" if asked == true else "no"
            said = ((a, asked, b),)
        else:
            answer = scene.background if tag == "background" else getattr(a, tag)
    if not terse:
        return request(tag, wording, **words), answer, said
    short = {key: re.sub("^(an?|the) ", "", word) for key, word in words.items()}
    return TERSE[tag].format(**short), answer, said


def edit(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Picture and instruction -> the picture changed, all else as it was."""
    least = 2 if tag in ("remove", "move") else 1
    scene = shapes_scenes.distinct(rng, int(rng.integers(least, 4)), apart=False)
    a, b = scene.objects[0], scene.objects[-1]
    words = {"a": the(a), "b": the(b)}
    linked = None
    if tag == "recolor":
        new = dataclasses.replace(a, color=pick(rng, _others(scene, "color")))
        words["color"], target = new.color, _swap(scene, a, new)
    elif tag == "remove":
        target = _swap(scene, a, None)
    elif tag == "replace":
        kind = {key: pick(rng, _others(scene, key)) for key in ("shape", "color")}
        new = dataclasses.replace(a, **kind)
        words["new"], target = name(new), _swap(scene, a, new)
    else:
        relation = pick(rng, generator.RELATIONS)
        if tag == "move":
            kind, rest = (a.shape, a.color, a.size), scene.objects[1:]
        else:
            kind = tuple(pick(rng, _others(scene, key)) for key in ("shape", "color"))
            kind, rest = (*kind, pick(rng, ("small", "medium"))), scene.objects
        new = shapes_scenes.place_so(rng, rest, kind, relation, b)
        # Before a move the two stand clearly otherwise, so that leaving them there is an error.
        if new is None or (tag == "move" and generator.relation(a, b) in (relation, None)):
            return edit(rng, wording, tag)
        words |= {"new": f"a {new.size} {new.color} {new.shape}",
                  "relation": relation}  # fmt: skip
        target = dataclasses.replace(scene, objects=(new, *rest))
        linked = (new, relation, b)
    asks = request(tag, wording, **words)
    told = facts(target, asks, gone=scene.objects, linked=linked)
    return Draft(tag, (scene, asks), (target,), (scene, target), geneval=told)


def reason(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Picture and request -> a picture that helps, then the answer."""
    scene = shapes_scenes.distinct(rng, int(rng.integers(2, 5)), apart=False)
    a = scene.objects[0]
    if tag == "zoom":
        asks = request(tag, wording, color=a.color)
        steps = (Zoom(scene, a), a.shape)
        return Draft(tag, (scene, asks), steps, (scene,), geneval=facts(scene, asks))
    if tag == "count_after_removal":
        asks, target = request(tag, wording, a=the(a)), _swap(scene, a, None)
        count = len(target.objects)
    else:
        color = scene.objects[-1].color if rng.integers(4) else pick(rng, _others(scene, "color"))
        for item in scene.objects[1:-1]:
            if rng.integers(2):
                scene = _swap(scene, item, dataclasses.replace(item, color=color))
        asks = request(tag, wording, a=the(a), color=color)
        target = _swap(scene, a, dataclasses.replace(a, color=color))
        count = sum(item.color == color for item in target.objects)
    told = facts(target, asks, gone=scene.objects)
    return Draft(tag, (scene, asks), (target, NUMBERS[count]), (scene, target), geneval=told)


def multi(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Two or three pictures and a question across them -> one word."""
    number = int(rng.integers(2, 4))
    if tag == "same_shape":
        scenes = [shapes_scenes.distinct(rng, 1) for _ in range(number)]
        if rng.integers(2):
            shape = scenes[0].objects[0].shape
            scenes = [_swap(s, s.objects[0], dataclasses.replace(s.objects[0], shape=shape))
                      for s in scenes]  # fmt: skip
        same = len({scene.objects[0].shape for scene in scenes}) == 1
        asks, answer = request(tag, wording), "yes" if same else "no"
    elif tag == "which_shows":
        scenes = [shapes_scenes.distinct(rng, int(rng.integers(1, 4))) for _ in range(number)]
        which = int(rng.integers(number))
        a = scenes[which].objects[0]
        kind = (a.shape, a.color)
        if any(kind == (o.shape, o.color) for s in scenes if s != scenes[which] for o in s.objects):
            return multi(rng, wording, tag)
        asks, answer = request(tag, wording, a=name(a)), _ORDINALS[which]
    else:
        counts = rng.integers(1, 5 if tag == "which_has_most" else 4, number).tolist()
        tied = counts.count(max(counts)) > 1
        if tied if tag == "which_has_most" else sum(counts) >= len(NUMBERS):
            return multi(rng, wording, tag)
        scenes = [shapes_scenes.distinct(rng, count) for count in counts]
        asks, answer = request(tag, wording), NUMBERS[min(sum(counts), len(NUMBERS) - 1)]
        if tag == "which_has_most":
            answer = _ORDINALS[int(np.argmax(counts))]
    return Draft(tag, (*scenes, asks), (answer,), tuple(scenes))


def text(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """A statement and a question -> a few words; the scene stays undrawn."""
    if tag == "count_left":
        n = int(rng.integers(2, 6))
        m = int(rng.integers(1, n + 1))
        things = plural(pick(rng, generator.SHAPES))
        words = {"n": NUMBERS[n], "N": NUMBERS[n].capitalize(), "m": NUMBERS[m], "things": things}
        asks = request(tag, wording, **words, vanish="vanishes" if m == 1 else "vanish")
        return Draft(tag, (asks,), (NUMBERS[n - m],), ())
    scene = shapes_scenes.distinct(rng, 2)
    a, b = scene.objects
    relation = generator.relation(a, b)
    fact = f"{name(a)} is {relation} {name(b)}".capitalize()
    if tag == "turn_around":
        asks, answer = (
            request(tag, wording, Fact=fact, b=the(b)),
            f"{generator.relation(b, a)} {the(a)}",
        )
    else:
        asked = (a, b)[int(rng.integers(2))]
        asks, answer = request(tag, wording, Fact=fact, shape=asked.shape), asked.color
    return Draft(tag, (asks,), (answer,), (scene,))


_MAKE: dict[str, tuple[Callable[[np.random.Generator, int, str], Draft], Sequence[str]]] = {
    "caption": (caption, generator.TAGS),
    "question": (question, QUESTIONS),
    "edit": (edit, EDITS),
    "reason": (reason, REASONS),
    "multi": (multi, MULTI),
    "text": (text, TEXTS),
    "dialog": (dialog, DIALOGS),
    "quiz": (quiz, ("distinct", *DIALOGS)),
}
# In this order: the number of a task is part of its seed.
TASKS = ("caption", "question", "edit", "reason", "multi", "text", "t2i", "dialog", "quiz")


def draft(
    seed: int,
    index: int,
    task: str,
    withheld: str = "none",
    tags: Sequence[str] = generator.TAGS,
) -> Draft:
    """Number `index` of a task, `withheld` being left out, alone wanted, or neither.

    `tags` are those of captions.
    """
    make, own = _MAKE[task]
    tags = tags if task == "caption" else own
    rng = np.random.default_rng(np.random.SeedSequence((seed, index, 1 + TASKS.index(task))))
    # A text that no scene stands behind names no pair, so that it cannot show an unseen one.
    tags = [tag for tag in tags if withheld != "only" or tag != "count_left"]
    tag, wording = tags[index % len(tags)], int(rng.integers(generator.WORDINGS))
    while True:
        made = make(rng, wording, tag)
        if holdout.keep(withheld, holdout.found(made.scenes, made.said)):
            return made


def make_records(
    seed: int,
    count: int,
    pixels: int,
    *,
    tasks: Sequence[str] = TASKS,
    tags: Sequence[str] = generator.TAGS,
    withheld: str = "none",
) -> Iterator[Record]:
    """Records 0 to count - 1 of `seed`, tasks in turn; record i does not depend on `count`.

    `meta` holds `task`, `tag` (which of the task), `withheld` (what unseen it holds: pair,
    combination or none), and as JSON `scenes`, in the order of the pictures (a zoomed one has
    none), and `geneval`, what the last scene must and must not show; multi and text have no
    `geneval`. `tags` are those of t2i, whose `meta` is that of `shapes.make_records`.

    Raises:
      ValueError: an unknown task or choice.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"--tasks: unknown {unknown}, expected some of {', '.join(TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks {','.join(tasks)}: a task is named twice")
    # Ids of t2i count on its own, as they do without the other tasks.
    pictures = generator.make_records(seed, count, pixels, tags=tags, keep=holdout.scenes(withheld))
    for index in range(count):
        task = tasks[index % len(tasks)]
        if task == "t2i":
            yield next(pictures)
        else:
            number = index // len(tasks)
            made = draft(seed, number, task, withheld, tags)
            yield _record(made, task, f"shapes-{task}-{seed}-{number:08d}", seed, pixels)


def _record(made: Draft, task: str, id: str, seed: int, pixels: int) -> Record:
    segments: list[Text | Img] = []
    blobs = []
    turns = [("user", made.user), ("assistant", made.assistant)]
    for asks, answer in made.more:
        turns += [("user", (asks,)), ("assistant", (answer,))]
    for role, parts in turns:
        for part in parts:
            loss = role == "assistant" and not isinstance(part, Given)
            if isinstance(part, str | Given):
                words = part.words if isinstance(part, Given) else part
                segments.append(Text(words, loss, role))
                continue
            drawn = part.draw(pixels) if isinstance(part, Zoom) else generator.draw(part, pixels)
            segments.append(Img(len(blobs), loss, role))
            blobs.append(records.image_blob(images.encode_png(drawn), id))
    meta = {
        "task": task,
        "tag": made.tag,
        "withheld": holdout.found(made.scenes, made.said),
        "scenes": json.dumps([dataclasses.asdict(scene) for scene in made.scenes]),
    }
    if made.geneval is not None:
        meta["geneval"] = json.dumps(made.geneval)
    return Record(1, id, f"shapes:{seed}", segments, blobs, meta)


def _others(scene: Scene, key: str) -> list[str]:
    """Shapes or colours that no object of the scene has."""
    taken = {getattr(item, key) for item in scene.objects}
    return [x for x in (generator.SHAPES if key == "shape" else generator.COLORS) if x not in taken]


def _swap(scene: Scene, old: Object, new: Object | None) -> Scene:
    objects = [new if item is old else item for item in scene.objects]
    return dataclasses.replace(scene, objects=tuple(item for item in objects if item is not None))
