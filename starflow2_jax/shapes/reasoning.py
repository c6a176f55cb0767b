"""Questions that are answered through an image: about an edit, a zoom, or a free choice.

    task           assistant                              tags
    reason         the image, then the answer             `REASONS`
    reason_direct  the answer to such a question at once  `REASONS`
    reason_free    the image, then the answer             `FREE_REASONS`

The answer to a question of `reason` follows from the source image and the request. A request of
`reason_free` leaves a choice ("Add a small red circle next to the green star. Where is the red
circle relative to the green star?"), so its answer follows from the assistant's own image alone:
`read_answer` reads it off the objects that the detector finds there. Source and request are chosen
before the answer, and allow every answer alike, so nobody can tell it from them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from starflow2_jax.shapes import generator
from starflow2_jax.shapes.detector import OTHER, DetectedObject
from starflow2_jax.shapes.drafts import Draft, Mentions, absent_values, replace_object
from starflow2_jax.shapes.generator import NUMBERS, SIZES, Object, Scene, pick
from starflow2_jax.shapes.scenes import Zoom, definite, distinct_scene, scene_facts
from starflow2_jax.shapes.wordings import request

REASONS = ("zoom", "count_after_removal", "count_after_edit")
FREE_REASONS = ("free_side", "free_color", "free_shape")

_MAX_OBLIQUITY = 0.75  # ratio of the offsets along the axes; drawings have 0.5 or less
_GAP = 0.05  # minimum between two objects of a free choice, so that the detector separates them
_ROOM = 0.02  # of the object in the middle, so that another fits on each of its sides


def reason(rng: np.random.Generator, wording: int, tag: str, min_objects: int = 2) -> Draft:
    """Draft image and request -> an intermediate image, then the answer."""
    scene = distinct_scene(rng, int(rng.integers(min_objects, 5)), clear_relation=False)
    a = scene.objects[0]
    if tag == "zoom":
        prompt = request(tag, wording, color=a.color)
        steps = (Zoom(scene, a), a.shape)
        return Draft(tag, (scene, prompt), steps, (scene,), geneval=scene_facts(scene, prompt))
    if tag == "count_after_removal":
        prompt, target = request(tag, wording, a=definite(a)), replace_object(scene, a, None)
        count = len(target.objects)
    else:
        color = (
            scene.objects[-1].color if rng.integers(4) else pick(rng, absent_values(scene, "color"))
        )
        for item in scene.objects[1:-1]:
            if rng.integers(2):
                scene = replace_object(scene, item, dataclasses.replace(item, color=color))
        prompt = request(tag, wording, a=definite(a), color=color)
        target = replace_object(scene, a, dataclasses.replace(a, color=color))
        count = sum(item.color == color for item in target.objects)
    facts = scene_facts(target, prompt, removed=scene.objects)
    return Draft(tag, (scene, prompt), (target, NUMBERS[count]), (scene, target), geneval=facts)


def reason_direct(rng: np.random.Generator, wording: int, tag: str, min_objects: int = 2) -> Draft:
    """Draft image and a request of `reason` -> the answer at once."""
    draft = reason(rng, wording, tag, min_objects)
    # The image that is not drawn must show nothing withheld either.
    imagined = tuple(item for scene in draft.scenes[1:] for item in scene.objects)
    return dataclasses.replace(
        draft,
        assistant=draft.assistant[-1:],
        scenes=draft.scenes[:1],
        mentioned=imagined,
        geneval=None,
    )


def reason_free(rng: np.random.Generator, wording: int, tag: str) -> Draft:
    """Draft image and request with a choice -> an image with one choice, then the answer to it.

    The first object of the last scene is the one that the request is about.
    """
    if tag == "free_side":
        return _free_side(rng, wording)
    key = tag.removeprefix("free_")
    scene = distinct_scene(rng, int(rng.integers(1, 4)), clear_relation=False)
    while not _has_gaps(scene.objects):
        scene = distinct_scene(rng, len(scene.objects), clear_relation=False)
    a = scene.objects[0]
    new = dataclasses.replace(a, **{key: pick(rng, absent_values(scene, key))})
    target = replace_object(scene, a, new)
    prompt = request(tag, wording, a=definite(a), shape=a.shape, color=a.color)
    facts = scene_facts(target, prompt, removed=[a])
    # Any color or shape will do. Facts need a shape, so only `read_answer` can check a free one.
    if tag == "free_color":
        facts["include"][0] = {"class": a.shape, "count": 1}
        facts["exclude"][0] = {"class": a.shape, "count": 2}
    else:
        del facts["include"][0], facts["exclude"][0]
    answer = getattr(new, key)
    return Draft(tag, (scene, prompt), (target, answer), (scene, target), geneval=facts)


def _free_side(rng: np.random.Generator, wording: int) -> Draft:
    """Draft the addition of an object on any side of another, which has room on all of them."""
    while True:
        kinds = distinct_scene(rng, int(rng.integers(1, 4)), clear_relation=False)
        x, y = np.round(0.5 + rng.uniform(-_ROOM, _ROOM, 2), 4).tolist()
        b = dataclasses.replace(kinds.objects[0], size="small", x=x, y=y)
        objects: list[Object | None] = [b]
        for item in kinds.objects[1:]:
            placed = generator.place_object(rng, objects, item.shape, item.color, item.size)
            objects.append(placed)
            if placed is None:
                break
        if None in objects or not _has_gaps(objects):
            continue
        scene = dataclasses.replace(kinds, objects=tuple(objects))
        shape, color = (pick(rng, absent_values(scene, key)) for key in ("shape", "color"))
        choices = [
            _place_on_side(rng, scene.objects, (shape, color), relation, b)
            for relation in generator.RELATIONS
        ]
        if None not in choices:
            break
    answer = int(rng.integers(len(choices)))
    new = choices[answer]
    words = {"new": f"a small {color} {shape}", "a": definite(new), "b": definite(b)}
    prompt = request("free_side", wording, **words)
    target = dataclasses.replace(scene, objects=(new, *scene.objects))
    # All choices count as mentioned: were only the one chosen tested for withheld combinations,
    # the request would make some answers more probable than others.
    mentioned: Mentions = tuple(
        (item, relation, other)
        for item in choices
        for other in scene.objects
        if (relation := generator.relation(item, other))
    )
    facts = scene_facts(target, prompt)
    turns = ((scene, prompt), (target, generator.RELATIONS[answer]))
    return Draft("free_side", *turns, (scene, target), mentioned, facts)


def _has_gaps(objects: Sequence[Object]) -> bool:
    return all(generator.is_clear(a, objects[:k], _GAP) for k, a in enumerate(objects))


def _place_on_side(
    rng: np.random.Generator,
    objects: Sequence[Object],
    kind: tuple[str, str],
    relation: str,
    anchor: Object,
) -> Object | None:
    """Return a small object of a shape and color in a relation to `anchor`, or None for no room."""
    sign = -1 if relation in ("left of", "above") else 1
    for _ in range(20):
        along = rng.uniform(SIZES["small"] + SIZES[anchor.size], 0.5 - SIZES["small"])
        offset = np.array([sign * along, rng.uniform(-0.5, 0.5) * along])
        if relation in ("above", "below"):
            offset = offset[::-1]
        x, y = np.round([offset[0] + anchor.x, offset[1] + anchor.y], 4).tolist()
        item = Object(*kind, "small", x, y)
        if (
            generator.is_inside(item)
            and generator.is_clear(item, objects, _GAP)
            and generator.relation(item, anchor) == relation
        ):
            return item
    return None


def read_answer(tag: str, objects: Sequence[DetectedObject], scenes: Sequence[Scene]) -> str | None:
    """Return the answer to a `reason_free` question that a drawn image gives.

    Args:
        tag: One of `FREE_REASONS`.
        objects: The objects of the drawn image, from `detector.detect`.
        scenes: The scenes of the record: source and reference.

    Returns:
        The answer, or None if an object of the question is missing or found twice, if the choice is
        no choice (the old color, a shape that is none), or if the side could be disputed.
    """
    source, target = scenes[0], scenes[-1]
    item = target.objects[0]
    if tag == "free_side":
        pair = [_only(objects, shape=o.shape, color=o.color) for o in target.objects[:2]]
        if None in pair:
            return None
        dx, dy = pair[0].x - pair[1].x, pair[0].y - pair[1].y
        if min(abs(dx), abs(dy)) > _MAX_OBLIQUITY * max(abs(dx), abs(dy)):
            return None
        if abs(dx) > abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"
    key, other_key = ("color", "shape") if tag == "free_color" else ("shape", "color")
    detected = _only(objects, **{other_key: getattr(item, other_key)})
    answer = detected and getattr(detected, key)
    return None if answer in (OTHER, getattr(source.objects[0], key)) else answer


def _only(objects: Sequence[DetectedObject], **values: str) -> DetectedObject | None:
    """Return the object with these values, None if there is no such object or several."""
    matches = [
        item
        for item in objects
        if all(getattr(item, key) == value for key, value in values.items())
    ]
    return matches[0] if len(matches) == 1 else None
