"""The synthetic shapes benchmark: colored shapes on plain backgrounds, with exact captions.

Images and captions follow from a seed. The `Scene` describes an image completely, so generation can
be judged without another model. Captions come in three wordings; the facts behind them have
GenEval's metadata format (https://github.com/djghosh13/geneval).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from starflow2_jax.data import images, records

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLORS = {
    "red": (220, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (35, 150, 60),
    "blue": (40, 80, 225),
    "purple": (130, 50, 175),
    "pink": (250, 140, 195),
    "brown": (140, 82, 35),
}
# Radius of the circle around the shape, in image sides: diameters of 8, 11 and 15 pixels at 32.
SIZES = {"small": 0.13, "medium": 0.175, "large": 0.23}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "light gray": (200, 200, 200),
    "dark gray": (65, 65, 65),
    "black": (15, 15, 15),
    "pale blue": (200, 220, 238),
    "cream": (238, 228, 208),
}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SINGLE_OBJECT_TAGS = ("single_object", "colors")
WORDINGS = 3
LABELS = ("shape", "color", "pair", "tag")

_MARGIN = 0.03  # minimum gap between two objects, and between an object and the border
_SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Object:
    """A colored shape; its center is (x, y), in image sides from the top left, y pointing down."""

    shape: str
    color: str
    size: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image's content; `ramp` brightens the background downwards, in levels at the border."""

    background: str
    ramp: float
    objects: tuple[Object, ...]


def draw(scene: Scene, pixels: int) -> np.ndarray:
    """Draw a scene, antialiased: uint8 [pixels, pixels, 3]."""
    side = pixels * _SUPERSAMPLE
    ramp = np.linspace(-scene.ramp, scene.ramp, side)[:, None, None]
    background = np.asarray(BACKGROUNDS[scene.background], np.float64) + ramp
    canvas = np.broadcast_to(background.clip(0, 255).round().astype(np.uint8), (side, side, 3))
    image = Image.fromarray(np.ascontiguousarray(canvas))
    for item in scene.objects:
        center, radius = (item.x * side, item.y * side), SIZES[item.size] * side
        image.paste(COLORS[item.color], mask=mask(item.shape, image.size, center, radius))
    return np.asarray(image.resize((pixels, pixels), Image.Resampling.BOX))


def mask(
    shape: str, size: tuple[int, int], center: tuple[float, float], radius: float
) -> Image.Image:
    """Draw a shape as 255 on 0, not antialiased; `size` is (width, height), all in pixels."""
    image = Image.new("L", size, 0)
    pen = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        pen.circle(center, 0.9 * radius, fill=255)
        if shape == "ring":
            pen.circle(center, 0.45 * radius, fill=0)
    else:
        x, y = center
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _OUTLINES[shape]], fill=255)
    return image


def random_scene(rng: np.random.Generator, tag: str) -> Scene:
    """Sample a scene that fits a GenEval `tag`.

    It has one object, for counting two to four of one kind, or two of different shapes; those of
    color_attr also differ in color, and those of position are in a clear relation.
    """
    if tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}, expected one of {', '.join(TAGS)}")
    shapes, colors = list(SHAPES), list(COLORS)
    while True:
        if tag in SINGLE_OBJECT_TAGS:
            kinds = [(pick(rng, shapes), pick(rng, colors))]
        elif tag == "counting":
            kinds = [(pick(rng, shapes), pick(rng, colors))] * int(rng.integers(2, 5))
        else:
            first, second = rng.choice(len(shapes), 2, replace=False)
            hues = rng.choice(len(colors), 2, replace=tag != "color_attr")
            kinds = [(shapes[first], colors[hues[0]]), (shapes[second], colors[hues[1]])]
        # Four large objects hardly fit.
        sizes = list(SIZES) if len(kinds) < 3 else ["small", "medium"]
        common_size = pick(rng, sizes)
        objects: list[Object] = []
        for shape, color in kinds:
            size = common_size if tag == "counting" else pick(rng, sizes)
            placed = place_object(rng, objects, shape, color, size)
            if placed is None:
                break
            objects.append(placed)
        background, ramp = pick(rng, list(BACKGROUNDS)), round(float(rng.uniform(-12, 12)), 2)
        if len(objects) == len(kinds) and (tag != "position" or relation(*objects)):
            return Scene(background, ramp, tuple(objects))


def place_object(
    rng: np.random.Generator, objects: Sequence[Object], shape: str, color: str, size: str
) -> Object | None:
    """Return an object clear of the others and of the border, or None if 50 tries find no room."""
    radius = SIZES[size]
    for _ in range(50):
        x, y = np.round(rng.uniform(radius + _MARGIN, 1 - radius - _MARGIN, 2), 4).tolist()
        item = Object(shape, color, size, x, y)
        if is_clear(item, objects):
            return item
    return None


def is_clear(item: Object, objects: Sequence[Object], gap: float = _MARGIN) -> bool:
    """Return whether an object has a gap, in image sides, to all others."""
    return all(
        math.hypot(item.x - other.x, item.y - other.y) >= SIZES[item.size] + SIZES[other.size] + gap
        for other in objects
    )


def is_inside(item: Object) -> bool:
    """Return whether an object has a gap to the border."""
    return max(abs(item.x - 0.5), abs(item.y - 0.5)) <= 0.5 - SIZES[item.size] - _MARGIN


def relation(first: Object, second: Object) -> str | None:
    """Return the relation of the first object to the second, or None if it could be disputed."""
    dx, dy = first.x - second.x, first.y - second.y
    min_distance = SIZES[first.size] + SIZES[second.size]
    if max(abs(dx), abs(dy)) < min_distance or min(abs(dx), abs(dy)) > 0.5 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(scene: Scene, tag: str, wording: int = 0) -> str:
    """Describe what `tag` is about, in one of `WORDINGS` wordings; 0 is GenEval's."""
    a, b = scene.objects[0], scene.objects[-1]
    first, second = with_article(a.shape), with_article(b.shape)
    colored = [with_article(f"{item.color} {item.shape}") for item in (a, b)]
    phrases = {
        "single_object": first,
        "two_object": f"{first} and {second}",
        "counting": f"{NUMBERS[len(scene.objects)]} {plural(a.shape)}",
        "colors": colored[0],
        "position": f"{first} {relation(a, b)} {second}",
        "color_attr": " and ".join(colored),
    }
    if tag not in phrases:
        raise ValueError(f"unknown tag {tag!r}, expected one of {', '.join(TAGS)}")
    verb = "are" if tag == "counting" else "is"
    wordings = (
        f"a photo of {phrases[tag]}",
        f"{phrases[tag]} on a {scene.background} background",
        f"there {verb} {phrases[tag]} in the picture",
    )
    if wording not in range(WORDINGS):
        raise ValueError(f"wording {wording}, expected 0 to {WORDINGS - 1}")
    return wordings[wording]


def geneval_facts(scene: Scene, tag: str) -> dict[str, object]:
    """Return the GenEval metadata of a scene: what an image must and must not show."""
    a, b = scene.objects[0], scene.objects[-1]
    first: dict[str, object] = {"class": a.shape, "count": 1}
    second: dict[str, object] = {"class": b.shape, "count": 1}
    meta: dict[str, object] = {"tag": tag, "include": [first]}
    if tag in ("colors", "color_attr"):
        first["color"], second["color"] = a.color, b.color
    if tag == "counting":
        first["count"] = len(scene.objects)
        meta["exclude"] = [{"class": a.shape, "count": len(scene.objects) + 1}]
    elif tag == "position":
        # The relation belongs to the second entry and points back to the first.
        meta["include"] = [second, {**first, "position": [relation(a, b), 0]}]
    elif tag in ("two_object", "color_attr"):
        meta["include"] = [first, second]
    meta["prompt"] = caption(scene, tag)
    return meta


def example(
    seed: int,
    index: int,
    tags: Sequence[str] = TAGS,
    keep: Callable[[Scene], bool] = lambda scene: True,
) -> tuple[Scene, str, int]:
    """Return the scene, tag and wording of example `index` of `seed`.

    Tags take turns, and may be named several times; scenes are sampled until `keep` accepts one.
    """
    tag = tags[index % len(tags)]
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    scene = random_scene(rng, tag)
    while not keep(scene):
        scene = random_scene(rng, tag)
    return scene, tag, int(rng.integers(WORDINGS))


def classes(label: str) -> list[str]:
    """Return the names of the classes of `--label shape|color|pair|tag`."""
    if label == "shape":
        return list(SHAPES)
    if label == "color":
        return list(COLORS)
    if label == "pair":
        return [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    if label == "tag":
        return list(TAGS)
    raise ValueError(f"unknown label {label!r}, expected one of {', '.join(LABELS)}")


def class_number(scene: Scene, tag: str, label: str) -> int:
    """Return the class number of a scene, whose objects are of one kind or `label` is "tag"."""
    if label == "tag":
        return TAGS.index(tag)
    kinds = {(item.color, item.shape) for item in scene.objects}
    if len(kinds) != 1:
        raise ValueError(
            f"--label {label} needs images of one kind of object, but {tag} shows two; "
            "use --tags single_object,colors,counting"
        )
    color, shape = kinds.pop()
    name = {"shape": shape, "color": color, "pair": f"{color} {shape}"}[label]
    return classes(label).index(name)


def make_records(
    seed: int,
    count: int,
    pixels: int,
    *,
    tags: Sequence[str] = TAGS,
    label: str | None = None,
    keep: Callable[[Scene], bool] = lambda scene: True,
) -> Iterator[records.Record]:
    """Yield text-to-image records 0 to count - 1 of `seed`; record i does not depend on `count`.

    `meta` contains `tag`, the GenEval metadata and the scene (both as JSON) and, with `label`, the
    class number.
    """
    for index in range(count):
        scene, tag, wording = example(seed, index, tags, keep)
        meta = {
            "tag": tag,
            "geneval": json.dumps(geneval_facts(scene, tag)),
            "scene": json.dumps(dataclasses.asdict(scene)),
        }
        if label is not None:
            meta["label"] = class_number(scene, tag, label)
        name = f"shapes-{seed}-{index:08d}"
        blob = records.image_blob(images.encode_png(draw(scene, pixels)), name)
        prompt = caption(scene, tag, wording)
        yield records.text_to_image(name, f"shapes:{seed}", prompt, blob, meta)


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """Choose one of `items` at random."""
    return items[int(rng.integers(len(items)))]


def with_article(noun: str) -> str:
    """Return the noun with its indefinite article: "a red circle", "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural: "circles", "crosses"."""
    return noun + ("es" if noun.endswith("s") else "s")


def _star_outline() -> list[tuple[float, float]]:
    corners = []
    for k in range(10):
        angle, radius = 2 * math.pi * (k / 10), 0.42 if k % 2 else 1.0
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def _heart_outline() -> list[tuple[float, float]]:
    points = []
    for t in np.linspace(0, 2 * math.pi, 60, endpoint=False):
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


# Outlines in units of the radius, x to the right and y down.
_OUTLINES = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": [(0.0, -0.9), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)],
    "star": _star_outline(),
    "cross": [  # a corner, turned four times
        (x * cos - y * sin, x * sin + y * cos)
        for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1))
        for x, y in ((0.28, -0.9), (0.28, -0.28), (0.9, -0.28))
    ],
    "heart": _heart_outline(),
}
