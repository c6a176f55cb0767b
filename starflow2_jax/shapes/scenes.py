"""Scenes of several kinds of objects, with their descriptions and GenEval metadata."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from starflow2_jax.shapes import generator
from starflow2_jax.shapes.generator import Object, Scene, pick, plural

_ZOOM = 2  # scale of `Zoom`


@dataclasses.dataclass(frozen=True)
class Zoom:
    """An enlarged part of a scene, centered on one of its objects."""

    scene: Scene
    item: Object

    def draw(self, pixels: int) -> np.ndarray:
        """Draw the part, which shows the complete object: uint8 [pixels, pixels, 3]."""
        enlarged = generator.draw(self.scene, _ZOOM * pixels)
        left, top = (
            min(max(round(_ZOOM * pixels * center - pixels / 2), 0), (_ZOOM - 1) * pixels)
            for center in (self.item.x, self.item.y)
        )
        return enlarged[top : top + pixels, left : left + pixels]


def distinct_scene(rng: np.random.Generator, count: int, clear_relation: bool = True) -> Scene:
    """Sample a scene of objects that all differ both in shape and in color.

    With `clear_relation`, exactly two objects have a relation that cannot be disputed.
    """
    shapes = rng.permutation(list(generator.SHAPES))[:count].tolist()
    colors = rng.permutation(list(generator.COLORS))[:count].tolist()
    while True:
        scene = _random_scene(rng, list(zip(shapes, colors)))
        if count != 2 or not clear_relation or generator.relation(*scene.objects) is not None:
            return scene


def grouped_scene(rng: np.random.Generator) -> Scene:
    """Sample one to four objects of one kind; the last may have another shape and color."""
    shapes, colors = (
        rng.permutation(list(x))[:2].tolist() for x in (generator.SHAPES, generator.COLORS)
    )
    count = int(rng.integers(1, 5))
    differing = int(rng.integers(2)) if count > 1 else 0
    kinds = list(zip(shapes, colors))
    return _random_scene(rng, [kinds[0]] * (count - differing) + [kinds[1]] * differing)


def place_in_relation(
    rng: np.random.Generator,
    objects: Sequence[Object],
    kind: tuple[str, str, str],
    relation: str,
    anchor: Object,
) -> Object | None:
    """Return a new object (shape, color, size) in a relation to `anchor`, or None without room."""
    for _ in range(20):
        placed = generator.place_object(rng, objects, *kind)
        if placed is not None and generator.relation(placed, anchor) == relation:
            return placed
    return None


def describe(scene: Scene, wording: int = 0, *, reverse: bool = False) -> str:
    """Describe a scene: background, objects and, between two objects, their relation.

    Wording 2 is a list of tags. With `reverse`, begin with the last object.
    """
    if wording not in range(generator.WORDINGS):
        raise ValueError(f"wording {wording}, expected 0 to {generator.WORDINGS - 1}")
    objects = _in_order(scene)[:: -1 if reverse else 1]
    kinds = Counter((item.size, item.color, item.shape) for item in objects)
    parts = []
    for (size, color, shape), count in kinds.items():
        noun = plural(shape) if count > 1 else shape
        number = "a" if count == 1 and wording != 2 else generator.NUMBERS[count]
        words = (noun, color, size, number) if wording == 2 else (number, size, color, noun)
        parts.append(" ".join(words))
    relation = generator.relation(*objects) if len(objects) == 2 else None
    if relation and len(parts) == 2:
        phrase = f"{parts[0]} {relation} {parts[1]}"
    elif wording == 2:
        phrase = ", ".join(parts)
    else:
        phrase = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    if wording == 0:
        return f"{phrase} on a {scene.background} background"
    if wording == 1:
        return f"on a {scene.background} background: {phrase}"
    return f"{scene.background} background, {phrase}"


def scene_facts(
    scene: Scene,
    prompt: str,
    *,
    removed: Sequence[Object] = (),
    relation: tuple[Object, str, Object] | None = None,
) -> dict[str, object]:
    """Return GenEval metadata that ask for exactly the objects of a scene.

    The kinds of `removed` objects must not be more frequent than in `scene`; `relation` is that of
    two of the objects.
    """
    kinds = Counter((item.shape, item.color) for item in scene.objects)
    include: list[dict[str, object]] = [
        {"class": shape, "count": count, "color": color} for (shape, color), count in kinds.items()
    ]
    if relation is not None:
        first, name, second = relation
        order = list(kinds)
        index = order.index((second.shape, second.color))
        include[order.index((first.shape, first.color))]["position"] = [name, index]
    kinds.update(dict.fromkeys(((item.shape, item.color) for item in removed), 0))
    exclude = [
        {"class": shape, "count": count + 1, "color": color}
        for (shape, color), count in kinds.items()
    ]
    return {"tag": "scene", "include": include, "exclude": exclude, "prompt": prompt}


def indefinite(item: Object) -> str:
    """Return "a red circle"."""
    return generator.with_article(f"{item.color} {item.shape}")


def definite(item: Object) -> str:
    """Return "the red circle"."""
    return f"the {item.color} {item.shape}"


def _in_order(scene: Scene) -> list[Object]:
    """Return the objects from left to right or, of two in a column, from top to bottom."""
    is_column = len(scene.objects) == 2 and generator.relation(*scene.objects) in ("above", "below")
    return sorted(scene.objects, key=lambda item: item.y if is_column else item.x)


def _random_scene(rng: np.random.Generator, kinds: Sequence[tuple[str, str]]) -> Scene:
    sizes = list(generator.SIZES) if len(kinds) < 3 else ["small", "medium"]
    while True:
        objects: list[Object] = []
        for shape, color in kinds:
            placed = generator.place_object(rng, objects, shape, color, pick(rng, sizes))
            if placed is None:
                break
            objects.append(placed)
        if len(objects) == len(kinds):
            background = pick(rng, list(generator.BACKGROUNDS))
            return Scene(background, round(float(rng.uniform(-12, 12)), 2), tuple(objects))
