"""Attribute pairs and combinations that are withheld from training, to measure generalization.

These are one eighth of the (color, shape) pairs, and one eighth of the combinations of two pairs
and the relation between them. Training still shows every color and every shape, in seven of eight
pairs.
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


def is_withheld_pair(item: Object) -> bool:
    """Return whether the (color, shape) of an object is withheld."""
    return (item.color, item.shape) in PAIRS


def is_withheld_combination(first: Object, relation: str, second: Object) -> bool:
    """Return whether two pairs are withheld in this relation, seen from either object.

    Training shows every two shapes, and every two colors, in every relation.
    """
    if relation in ("right of", "below"):
        first, relation, second = second, _INVERSE[relation], first
    colors, shapes = list(generator.COLORS), list(generator.SHAPES)
    number = colors.index(first.color) + 3 * shapes.index(first.shape)
    number += 5 * colors.index(second.color) + 7 * shapes.index(second.shape)
    return (number + 4 * (relation == "above")) % 8 == 0


def withheld_kind(scenes: Iterable[Scene], mentioned: Iterable[Object | Combination] = ()) -> str:
    """Return the kind of withheld content that occurs: "pair", else "combination", else "none".

    `mentioned` are objects and combinations that occur only in the text.
    """
    scenes = list(scenes)
    objects = [item for scene in scenes for item in scene.objects]
    combinations = [
        (a, generator.relation(a, b), b)
        for scene in scenes
        for k, b in enumerate(scene.objects)
        for a in scene.objects[:k]
    ]
    for mention in mentioned:
        if isinstance(mention, Object):
            objects.append(mention)
        else:
            objects += [mention[0], mention[2]]
            combinations.append(mention)
    if any(is_withheld_pair(item) for item in objects):
        return "pair"
    if any(rel and is_withheld_combination(a, rel, b) for a, rel, b in combinations):
        return "combination"
    return "none"


def is_included(choice: str, kind: str) -> bool:
    """Return whether `--withheld choice` includes a record of this `withheld_kind`."""
    if choice not in CHOICES:
        raise ValueError(f"--withheld {choice}: expected one of {', '.join(CHOICES)}")
    return choice == "none" or (choice == "only") == (kind != "none")


def scene_filter(choice: str) -> Callable[[Scene], bool]:
    """Return the predicate of scenes that `--withheld choice` includes; ValueError if unknown."""
    is_included(choice, "none")
    return lambda scene: is_included(choice, withheld_kind([scene]))
