"""What of the shapes world training never shows, so that evaluation can tell seen from unseen.

One eighth of the (colour, shape) pairs, and one eighth of the combinations of two pairs and the
relation between them. Every colour and every shape is still seen, in seven of eight pairs.
"""

from collections.abc import Callable, Iterable

from starflow2_jax.shapes import generator
from starflow2_jax.shapes.generator import Object, Scene

CHOICES = ("none", "leave_out", "only")
PAIRS = (
    ("red", "square"),
    ("orange", "star"),
    ("yellow", "heart"),
    ("green", "diamond"),
    ("blue", "triangle"),
    ("purple", "circle"),
    ("pink", "cross"),
    ("brown", "ring"),
)
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Combination = tuple[Object, str, Object]


def pair(item: Object) -> bool:
    """Whether the (colour, shape) of an object is withheld."""
    return (item.color, item.shape) in PAIRS


def combination(first: Object, relation: str, second: Object) -> bool:
    """Whether two pairs are withheld in this relation; the same seen from either object.

    Every two shapes, and every two colours, occur in every relation.
    """
    if relation in ("right of", "below"):
        first, relation, second = second, _INVERSE[relation], first
    colors, kinds = list(generator.COLORS), list(generator.SHAPES)
    number = colors.index(first.color) + 3 * kinds.index(first.shape)
    number += 5 * colors.index(second.color) + 7 * kinds.index(second.shape)
    return (number + 4 * (relation == "above")) % 8 == 0


def found(scenes: Iterable[Scene], said: Iterable[Object | Combination] = ()) -> str:
    """What is withheld of scenes, and of objects and combinations that are only spoken of.

    Returns "pair", "combination", or "none"; a pair comes first.
    """
    scenes, said = list(scenes), list(said)
    objects = [item for scene in scenes for item in scene.objects]
    together = [
        (a, generator.relation(a, b), b)
        for scene in scenes
        for k, b in enumerate(scene.objects)
        for a in scene.objects[:k]
    ]
    for thing in said:
        if isinstance(thing, Object):
            objects.append(thing)
        else:
            objects += [thing[0], thing[2]]
            together.append(thing)
    if any(pair(item) for item in objects):
        return "pair"
    if any(relation and combination(a, relation, b) for a, relation, b in together):
        return "combination"
    return "none"


def keep(choice: str, what: str) -> bool:
    """Whether `--withheld choice` takes something in which `found` saw `what`."""
    if choice not in CHOICES:
        raise ValueError(f"--withheld {choice}: expected one of {', '.join(CHOICES)}")
    return choice == "none" or (choice == "only") == (what != "none")


def scenes(choice: str) -> Callable[[Scene], bool]:
    """Whether `--withheld choice` takes a scene; ValueError for an unknown choice."""
    keep(choice, "none")
    return lambda scene: keep(choice, found([scene]))
