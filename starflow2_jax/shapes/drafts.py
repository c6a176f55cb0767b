"""Records of the shapes benchmark before their images are drawn."""

import dataclasses

from starflow2_jax.data.records import Text
from starflow2_jax.shapes import generator, holdout
from starflow2_jax.shapes.generator import Object, Scene
from starflow2_jax.shapes.scenes import Zoom

Mentions = tuple[Object | holdout.Combination, ...]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record before its images are drawn."""

    tag: str  # variant of the task
    user: tuple[str | Scene, ...]
    assistant: tuple[str | Text | Scene | Zoom, ...]  # a Text is not a target
    scenes: tuple[Scene, ...]  # of the images, in order
    mentioned: Mentions = ()  # objects and combinations that only the text mentions
    geneval: dict[str, object] | None = None  # what the last image must and must not show
    more: tuple[tuple[str, str], ...] = ()  # further turns of user and assistant


def absent_values(scene: Scene, key: str) -> list[str]:
    """Return the shapes or colors that no object of the scene has."""
    taken = {getattr(item, key) for item in scene.objects}
    return [x for x in (generator.SHAPES if key == "shape" else generator.COLORS) if x not in taken]


def replace_object(scene: Scene, old: Object, new: Object | None) -> Scene:
    """Return the scene with `new` in place of `old`, or without it."""
    objects = [new if item is old else item for item in scene.objects]
    return dataclasses.replace(scene, objects=tuple(item for item in objects if item is not None))
