"""Records of all tasks of the shapes benchmark: captions, questions, edits, visual reasoning.

    task      user                        assistant
    caption   image, request              description
    question  image, question             one or two words
    dialog    image, several questions    one or two words to each
    quiz      image, request              questions (no targets), and one or two words to each
    edit      image, instruction          image
    copy      image, request              the same image
    reason    image, request              image (zoomed or edited), one or two words
    reason_*  image, request              without the image, or with a choice (`shapes.reasoning`)
    multi     two or three images, ...    one word
    text      statement and question      a few words
    t2i       caption                     image (`generator.make_records`)

The user's turns are context, and the assistant's turns are targets (of a quiz, only the answers).
Every request comes in three wordings. A record is sampled again until the choice of `withheld`
(`holdout`) includes it.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.data.records import Img, Record, Text
from starflow2_jax.shapes import generator, holdout
from starflow2_jax.shapes.drafts import Draft, Mentions, absent_values, replace_object
from starflow2_jax.shapes.generator import NUMBERS, Object, Scene, pick, plural
from starflow2_jax.shapes.reasoning import (
    FREE_REASONS,
    REASONS,
    reason,
    reason_direct,
    reason_free,
)
from starflow2_jax.shapes.scenes import (
    Zoom,
    definite,
    describe,
    distinct_scene,
    grouped_scene,
    indefinite,
    place_in_relation,
    scene_facts,
)
from starflow2_jax.shapes.wordings import TERSE, request

EDITS = ("recolor", "add", "remove", "move", "replace")
QUESTIONS = ("color", "shape", "size", "count", "exists", "relation", "is_relation", "background")
MULTI = ("same_shape", "which_shows", "which_has_most", "total")
TEXTS = ("turn_around", "count_left", "color_of")
COPIES = ("keep", "repeat")
DIALOGS = ("distinct", "groups")
_HARD = ("exists", "relation", "is_relation")  # three times as frequent
_DIALOG_QUESTIONS, _QUIZ_QUESTIONS = 8, 13  # fewer if a question is repeated
_ORDINALS = ("first", "second", "third")


def caption(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft a scene of any kind -> its description."""
    scene = generator.random_scene(rng, tag)
    description, absent = _describe(rng, scene, int(rng.integers(generator.WORDINGS)))
    relation = None
    if len({item.shape for item in scene.objects}) == 2 and generator.relation(*scene.objects):
        relation = (scene.objects[0], generator.relation(*scene.objects), scene.objects[1])
    facts = scene_facts(scene, description, relation=relation)
    prompt = request("caption", wording)
    return Draft(tag, (scene, prompt), (description,), (scene,), absent, facts)


def _describe(
    rng: np.random.Generator, scene: Scene, wording: int
) -> tuple[str, tuple[Object, ...]]:
    """Return a description, and the objects in it that the scene does not show."""
    # The last wording is a list of tags, one of which has the color of one object, the shape of
    # another, and the number zero. The order matters, since a model learns to look up a word right
    # after the word it depends on: a shape after its color in the first wordings, in the tags a
    # color after its shape.
    description = describe(scene, wording, reverse=bool(rng.integers(2)))
    pairs = {(item.shape, item.color) for item in scene.objects}
    absent = sorted({(a, b) for a, _ in pairs for _, b in pairs} - pairs)
    if wording != 2 or not absent:
        return description, ()
    parts = description.split(", ")
    shape, color = absent[int(rng.integers(len(absent)))]
    parts.insert(int(rng.integers(1, len(parts) + 1)), f"{shape} {color} zero")
    return ", ".join(parts), (dataclasses.replace(scene.objects[0], shape=shape, color=color),)


def question(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft image and question -> one or two words."""
    if tag == "count":
        scene = grouped_scene(rng)
    else:
        scene = distinct_scene(rng, 2 if "relation" in tag else int(rng.integers(1, 5)))
    prompt, answer, mentioned = _ask(rng, scene, wording, tag)
    return Draft(tag, (scene, prompt), (answer,), (scene,), mentioned, scene_facts(scene, prompt))


def dialog(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft image and several questions, each with its answer in a turn of its own."""
    scene, answers, mentioned = _ask_several(rng, tag, _DIALOG_QUESTIONS, terse=0.0)
    (prompt, answer), *more = answers.items()
    facts = scene_facts(scene, prompt)
    return Draft(tag, (scene, prompt), (answer,), (scene,), mentioned, facts, tuple(more))


def quiz(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft image -> questions and answers in one turn, half of them terse, to train more a row."""
    scene, answers, mentioned = _ask_several(rng, tag, _QUIZ_QUESTIONS, terse=0.5)
    turn: list[str | Text] = []
    for prompt, answer in answers.items():
        start = "\n" if turn else ""
        turn += [Text(f"{start}{prompt}", False, "assistant"), f" {answer}"]
    prompt = request("quiz", wording)
    facts = scene_facts(scene, prompt)
    return Draft(tag, (scene, prompt), tuple(turn), (scene,), mentioned, facts)


def _ask_several(
    rng: np.random.Generator, tag: str, number: int, *, terse: float
) -> tuple[Scene, dict[str, str], Mentions]:
    """Return a scene, the answers to up to `number` questions, and the objects they mention."""
    if tag == "distinct":
        # Most scenes have two objects, since only those have questions about their relation.
        count = int(rng.choice([1, 2, 2, 2, 2, 3, 4]))
        scene = distinct_scene(rng, count)
        tags = [t for t in (*QUESTIONS, *_HARD, *_HARD) if count == 2 or "relation" not in t]
    else:
        scene, tags, number = grouped_scene(rng), ["count", "background"], number // 2
    answers: dict[str, str] = {}
    all_mentioned: list[Object | holdout.Combination] = []
    for _ in range(number):
        shuffled = [scene.objects[k] for k in rng.permutation(len(scene.objects))]
        shuffled_scene = dataclasses.replace(scene, objects=tuple(shuffled))
        wording = int(rng.integers(generator.WORDINGS))
        is_terse, key = bool(rng.random() < terse), pick(rng, tags)
        prompt, answer, mentioned = _ask(rng, shuffled_scene, wording, key, terse=is_terse)
        answers[prompt] = answer
        all_mentioned += mentioned
    return scene, answers, tuple(all_mentioned)


def _ask(
    rng: np.random.Generator, scene: Scene, wording: int, tag: str, *, terse: bool = False
) -> tuple[str, str, Mentions]:
    """Return a question, its answer, and the objects that it mentions."""
    mentioned: Mentions = ()
    if tag == "count":
        key = pick(rng, ("shape", "color"))
        value = getattr(scene.objects[0], key)
        if rng.random() < 0.15:  # sometimes ask for absent objects
            value = pick(rng, absent_values(scene, key))
        count = sum(getattr(item, key) == value for item in scene.objects)
        things = plural(value) if key == "shape" else f"{value} objects"
        words, answer = {"things": things}, NUMBERS[count]
    else:
        a, b = scene.objects[0], scene.objects[-1]
        words = {"shape": a.shape, "color": a.color, "a": definite(a), "b": definite(b)}
        if tag == "exists":
            # An absent object has the color of one object and the shape of another, if possible.
            exists = bool(rng.integers(2))
            shape = b.shape if a != b else pick(rng, absent_values(scene, "shape"))
            item = a if exists else dataclasses.replace(a, shape=shape)
            words, answer = {"new": indefinite(item)}, "yes" if exists else "no"
            mentioned = (item,)
        elif "relation" in tag:
            answer = relation = generator.relation(a, b)
            if tag == "is_relation":
                if rng.integers(2):
                    relation = pick(rng, [r for r in generator.RELATIONS if r != answer])
                words["relation"] = relation
                answer = "yes" if relation == answer else "no"
            mentioned = ((a, relation, b),)
        else:
            answer = scene.background if tag == "background" else getattr(a, tag)
    if not terse:
        return request(tag, wording, **words), answer, mentioned
    short = {key: re.sub("^(an?|the) ", "", word) for key, word in words.items()}
    return TERSE[tag].format(**short), answer, mentioned


def edit(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft image and instruction -> the edited image, with everything else unchanged."""
    min_count = 2 if tag in ("remove", "move") else 1
    scene = distinct_scene(rng, int(rng.integers(min_count, 4)), clear_relation=False)
    a, b = scene.objects[0], scene.objects[-1]
    words = {"a": definite(a), "b": definite(b)}
    required_relation = None
    if tag == "remove":
        target = replace_object(scene, a, None)
    elif tag in ("recolor", "replace"):
        keys = ("color",) if tag == "recolor" else ("shape", "color")
        new = dataclasses.replace(a, **{key: pick(rng, absent_values(scene, key)) for key in keys})
        words |= {"color": new.color, "new": indefinite(new)}
        target = replace_object(scene, a, new)
    else:
        relation = pick(rng, generator.RELATIONS)
        if tag == "move":
            kind, rest = (a.shape, a.color, a.size), scene.objects[1:]
        else:
            kind = tuple(pick(rng, absent_values(scene, key)) for key in ("shape", "color"))
            kind, rest = (*kind, pick(rng, ("small", "medium"))), scene.objects
        new = place_in_relation(rng, rest, kind, relation, b)
        # Before a move, the two have another clear relation, so that an unchanged image is wrong.
        if new is None or (tag == "move" and generator.relation(a, b) in (relation, None)):
            return edit(rng, wording, tag)
        words |= {"new": f"a {new.size} {new.color} {new.shape}", "relation": relation}
        target = dataclasses.replace(scene, objects=(new, *rest))
        required_relation = (new, relation, b)
    prompt = request(tag, wording, **words)
    facts = scene_facts(target, prompt, removed=scene.objects, relation=required_relation)
    return Draft(tag, (scene, prompt), (target,), (scene, target), geneval=facts)


def copy(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft image and request -> the same image: an edit that changes nothing."""
    scene = distinct_scene(rng, int(rng.integers(1, 5)), clear_relation=False)
    prompt = request(tag, wording)
    facts = scene_facts(scene, prompt)
    return Draft(tag, (scene, prompt), (scene,), (scene, scene), geneval=facts)


def multi(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft two or three images and a question about all of them -> one word."""
    number = int(rng.integers(2, 4))
    if tag == "same_shape":
        scenes = [distinct_scene(rng, 1) for _ in range(number)]
        items = [scene.objects[0] for scene in scenes]
        if rng.integers(2):
            items = [dataclasses.replace(item, shape=items[0].shape) for item in items]
            scenes = [replace_object(s, s.objects[0], item) for s, item in zip(scenes, items)]
        is_same = len({item.shape for item in items}) == 1
        prompt, answer = request(tag, wording), "yes" if is_same else "no"
    elif tag == "which_shows":
        scenes = [distinct_scene(rng, int(rng.integers(1, 4))) for _ in range(number)]
        which = int(rng.integers(number))
        a = scenes[which].objects[0]
        kind = (a.shape, a.color)
        if any(kind == (o.shape, o.color) for s in scenes if s != scenes[which] for o in s.objects):
            return multi(rng, wording, tag)
        prompt, answer = request(tag, wording, a=indefinite(a)), _ORDINALS[which]
    else:
        counts = rng.integers(1, 5 if tag == "which_has_most" else 4, number).tolist()
        is_tied = counts.count(max(counts)) > 1
        if is_tied if tag == "which_has_most" else sum(counts) >= len(NUMBERS):
            return multi(rng, wording, tag)
        scenes = [distinct_scene(rng, count) for count in counts]
        prompt, answer = request(tag, wording), NUMBERS[min(sum(counts), len(NUMBERS) - 1)]
        if tag == "which_has_most":
            answer = _ORDINALS[int(np.argmax(counts))]
    return Draft(tag, (*scenes, prompt), (answer,), tuple(scenes))


def text(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft a statement and a question -> a few words, without an image."""
    if tag == "count_left":
        n = int(rng.integers(2, 6))
        m = int(rng.integers(1, n + 1))
        things = plural(pick(rng, generator.SHAPES))
        words = {"n": NUMBERS[n], "N": NUMBERS[n].capitalize(), "m": NUMBERS[m], "things": things}
        prompt = request(tag, wording, **words, vanish="vanishes" if m == 1 else "vanish")
        return Draft(tag, (prompt,), (NUMBERS[n - m],), ())
    scene = distinct_scene(rng, 2)
    a, b = scene.objects
    fact = f"{indefinite(a)} is {generator.relation(a, b)} {indefinite(b)}".capitalize()
    if tag == "turn_around":
        prompt = request(tag, wording, Fact=fact, b=definite(b))
        answer = f"{generator.relation(b, a)} {definite(a)}"
    else:
        item = (a, b)[int(rng.integers(2))]
        prompt, answer = request(tag, wording, Fact=fact, shape=item.shape), item.color
    return Draft(tag, (prompt,), (answer,), (scene,))


_Maker = tuple[Callable[[np.random.Generator, int, str], Draft], Sequence[str]]
_MAKERS: dict[str, _Maker] = {
    "caption": (caption, generator.TAGS),
    "question": (question, QUESTIONS),
    "edit": (edit, EDITS),
    "reason": (reason, REASONS),
    "multi": (multi, MULTI),
    "text": (text, TEXTS),
    "dialog": (dialog, DIALOGS),
    "quiz": (quiz, ("distinct", *DIALOGS)),
    "copy": (copy, COPIES),
    "reason_free": (reason_free, FREE_REASONS),
    "reason_direct": (reason_direct, REASONS),
}
# Of images with one object; captions have the tags that the caller names, and text has no images.
_SINGLE_OBJECT_MAKERS: dict[str, _Maker] = {
    **_MAKERS,
    "question": (question, ("color", "shape", "size", "exists", "background")),
    "edit": (edit, ("recolor", "replace")),
    "reason": (functools.partial(reason, min_objects=1), ("zoom",)),
    "multi": (multi, ("same_shape", "which_shows")),
    "dialog": (dialog, ("distinct",)),
    "quiz": (quiz, ("distinct",)),
    "reason_free": (reason_free, ("free_color", "free_shape")),
    "reason_direct": (functools.partial(reason_direct, min_objects=1), ("zoom",)),
}
TASKS = ("caption", "question", "edit", "reason", "multi", "text", "t2i", "dialog", "quiz", "copy")
# Do not reorder: the number of a task is part of its seed.
ALL_TASKS = (*TASKS, "reason_free", "reason_direct")
# The answers that `balance_answers` makes equally frequent. Without it, "two" is twice as frequent
# as most others.
_ANSWERS = {
    "count": NUMBERS[:5],
    "total": NUMBERS[2:],
    "count_after_removal": NUMBERS[1:4],
    "count_after_edit": NUMBERS[1:5],
}


def make_draft(
    seed: int,
    index: int,
    task: str,
    withheld: str,
    tags: Sequence[str],
    balance_answers: bool = False,
) -> Draft:
    """Return draft `index` of a task other than t2i; `tags` are those of captions.

    If all `tags` show one object, every image does. With `balance_answers`, the counts that a tag
    asks for take turns.
    """
    is_single = task != "text" and set(tags) <= set(generator.SINGLE_OBJECT_TAGS)
    make, task_tags = (_SINGLE_OBJECT_MAKERS if is_single else _MAKERS)[task]
    tags = tags if task == "caption" else task_tags
    rng = np.random.default_rng(np.random.SeedSequence((seed, index, 1 + ALL_TASKS.index(task))))
    # A count has no scene and names no pair, so it can never contain a withheld one.
    tags = [tag for tag in tags if withheld != "only" or tag != "count_left"]
    tag, wording = tags[index % len(tags)], int(rng.integers(generator.WORDINGS))
    answers = _ANSWERS.get(tag) if balance_answers else None
    answer = answers[index // len(tags) % len(answers)] if answers else None
    while True:
        candidate = make(rng, wording, tag)
        if is_single and any(len(scene.objects) > 1 for scene in candidate.scenes):
            continue
        if answer and candidate.assistant[-1] != answer:
            continue
        kind = holdout.withheld_kind(candidate.scenes, candidate.mentioned)
        if holdout.is_included(withheld, kind):
            return candidate


def make_records(
    seed: int,
    count: int,
    pixels: int,
    *,
    tasks: Sequence[str] = TASKS,
    tags: Sequence[str] = generator.TAGS,
    withheld: str = "none",
    label: str | None = None,
    balance_answers: bool = False,
) -> Iterator[Record]:
    """Yield records 0 to count - 1 of `seed`, tasks in turn; record i does not depend on `count`.

    `meta` contains `task`, `tag` (variant of the task), `withheld` (`holdout.withheld_kind`), and
    as JSON `scenes`, in the order of the images (a zoomed one has none), and `geneval`, what the
    last scene must and must not show, except for multi and text. `tags` are those of caption and
    t2i; if they are all of one object, the images of the other tasks show one object too. `label`
    and the `meta` of t2i are those of `generator.make_records`. For `balance_answers` see
    `make_draft`.
    """
    unknown = [task for task in tasks if task not in ALL_TASKS]
    if unknown or not tasks:
        raise ValueError(f"--tasks: unknown {unknown}, expected some of {', '.join(ALL_TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks {','.join(tasks)}: a task is named twice")
    # t2i records are numbered separately, so that they are the same without other tasks.
    keep = holdout.scene_filter(withheld)
    t2i_records = generator.make_records(seed, count, pixels, tags=tags, label=label, keep=keep)
    for index in range(count):
        task = tasks[index % len(tasks)]
        if task == "t2i":
            yield next(t2i_records)
        else:
            number = index // len(tasks)
            id = f"shapes-{task}-{seed}-{number:08d}"
            draft = make_draft(seed, number, task, withheld, tags, balance_answers)
            yield _draw_record(draft, task, id, seed, pixels)


def _draw_record(draft: Draft, task: str, id: str, seed: int, pixels: int) -> Record:
    segments: list[Text | Img] = []
    blobs = []
    parts = [("user", part) for part in draft.user]
    parts += [("assistant", part) for part in draft.assistant]
    for prompt, answer in draft.more:
        parts += [("user", prompt), ("assistant", answer)]
    for role, part in parts:
        loss = role == "assistant"
        if isinstance(part, Text):
            segments.append(part)
        elif isinstance(part, str):
            segments.append(Text(part, loss, role))
        else:
            image = part.draw(pixels) if isinstance(part, Zoom) else generator.draw(part, pixels)
            segments.append(Img(len(blobs), loss, role))
            blobs.append(records.image_blob(images.encode_png(image), id))
    meta = {
        "task": task,
        "tag": draft.tag,
        "withheld": holdout.withheld_kind(draft.scenes, draft.mentioned),
        "scenes": json.dumps([dataclasses.asdict(scene) for scene in draft.scenes]),
    }
    if draft.geneval is not None:
        meta["geneval"] = json.dumps(draft.geneval)
    return Record(1, id, f"shapes:{seed}", segments, blobs, meta)
