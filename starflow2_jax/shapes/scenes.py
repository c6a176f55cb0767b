"""Scenes of several kinds of objects, how they are spoken of, and what must be seen of them."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from starflow2_jax.shapes import generator
from starflow2_jax.shapes.generator import Object, Scene, pick, plural

_ZOOM = 2


@dataclasses.dataclass(frozen=True)
class Zoom:
    """The part of a scene around one of its objects, at twice the size."""

    scene: Scene
    item: Object

    def draw(self, pixels: int) -> np.ndarray:
        """uint8 [pixels, pixels, 3]; the whole object is in it."""
        whole = generator.draw(self.scene, _ZOOM * pixels)
        left, top = (
            min(max(round(_ZOOM * pixels * at - pixels / 2), 0), (_ZOOM - 1) * pixels)
            for at in (self.item.x, self.item.y)
        )
        return whole[top : top + pixels, left : left + pixels]


def distinct(rng: np.random.Generator, count: int, apart: bool = True) -> Scene:
    """Objects that differ both in shape and in colour from one another.

    Two of them stand clearly beside or above one another, where `apart`.
    """
    kinds = rng.permutation(list(generator.SHAPES))[:count].tolist()
    colors = rng.permutation(list(generator.COLORS))[:count].tolist()
    while True:
        made = _scene(rng, list(zip(kinds, colors)))
        if count != 2 or not apart or generator.relation(*made.objects) is not None:
            return made


def groups(rng: np.random.Generator) -> Scene:
    """One to four objects of one shape and colour, the last perhaps of another shape and colour."""
    shape, color = (
        rng.permutation(list(x))[:2].tolist() for x in (generator.SHAPES, generator.COLORS)
    )
    count = int(rng.integers(1, 5))
    other = int(rng.integers(2)) if count > 1 else 0
    kinds = list(zip(shape, color))
    return _scene(rng, [kinds[0]] * (count - other) + [kinds[1]] * other)


def place_so(
    rng: np.random.Generator,
    others: Sequence[Object],
    kind: tuple[str, str, str],
    relation: str,
    anchor: Object,
) -> Object | None:
    """An object (shape, colour, size) in a relation to `anchor`, or None where it finds no room."""
    for _ in range(20):
        placed = generator.place(rng, others, *kind)
        if placed is not None and generator.relation(placed, anchor) == relation:
            return placed
    return None


def describe(scene: Scene, wording: int = 0, *, back: bool = False) -> str:
    """Everything in a scene but places and, of more than two objects, relations.

    Args:
      back: begin with the last object.
    """
    if wording not in range(generator.WORDINGS):
        raise ValueError(f"wording {wording}, expected 0 to {generator.WORDINGS - 1}")
    objects = _in_order(scene)[:: -1 if back else 1]
    kinds = Counter((item.size, item.color, item.shape) for item in objects)
    parts = []
    for (size, color, shape), count in kinds.items():
        if wording == 2:
            parts.append(f"{plural(shape) if count > 1 else shape} {color} {size}")
            parts[-1] += f" {generator.NUMBERS[count]}"
        elif count == 1:
            parts.append(f"a {size} {color} {shape}")
        else:
            parts.append(f"{generator.NUMBERS[count]} {size} {color} {plural(shape)}")
    relation = generator.relation(*objects) if len(objects) == 2 else None
    if relation and len(parts) == 2:
        said = f"{parts[0]} {relation} {parts[1]}"
    elif wording == 2:
        said = ", ".join(parts)
    else:
        said = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    if wording == 0:
        return f"{said} on a {scene.background} background"
    if wording == 1:
        return f"on a {scene.background} background: {said}"
    return f"{scene.background} background, {said}"


def facts(
    scene: Scene,
    prompt: str,
    *,
    gone: Sequence[Object] = (),
    linked: tuple[Object, str, Object] | None = None,
) -> dict[str, object]:
    """GenEval metadata of a whole scene: each kind of object in its number, and no more of it.

    Args:
      scene: what must be seen.
      prompt: as the metadata give it.
      gone: objects whose kinds must not be seen more often than in `scene`.
      linked: two of the objects and their relation.
    """
    kinds = Counter((item.shape, item.color) for item in scene.objects)
    include: list[dict[str, object]] = [
        {"class": shape, "count": count, "color": color} for (shape, color), count in kinds.items()
    ]
    if linked is not None:
        first, relation, second = linked
        order = list(kinds)
        index = order.index((second.shape, second.color))
        include[order.index((first.shape, first.color))]["position"] = [relation, index]
    kinds.update(dict.fromkeys(((item.shape, item.color) for item in gone), 0))
    exclude = [
        {"class": shape, "count": count + 1, "color": color}
        for (shape, color), count in kinds.items()
    ]
    return {"tag": "scene", "include": include, "exclude": exclude, "prompt": prompt}


def name(item: Object) -> str:
    """ "a red circle" """
    return generator.with_article(f"{item.color} {item.shape}")


def the(item: Object) -> str:
    """ "the red circle" """
    return f"the {item.color} {item.shape}"


def _in_order(scene: Scene) -> list[Object]:
    """Objects from left to right or, of two above one another, from top to bottom."""
    upright = len(scene.objects) == 2 and generator.relation(*scene.objects) in ("above", "below")
    return sorted(scene.objects, key=lambda item: item.y if upright else item.x)


def _scene(rng: np.random.Generator, kinds: Sequence[tuple[str, str]]) -> Scene:
    sizes = list(generator.SIZES) if len(kinds) < 3 else ["small", "medium"]
    while True:
        objects: list[Object] = []
        for shape, color in kinds:
            placed = generator.place(rng, objects, shape, color, pick(rng, sizes))
            if placed is None:
                break
            objects.append(placed)
        if len(objects) == len(kinds):
            background = pick(rng, list(generator.BACKGROUNDS))
            return Scene(background, round(float(rng.uniform(-12, 12)), 2), tuple(objects))
