"""The generator of shapes images: captions and metadata match the drawings."""

import json

import numpy as np
import pytest

from starflow2_jax.data import images, records
from starflow2_jax.shapes import generator


def scenes(count, seed=3):
    return [generator.example(seed, k) for k in range(count)]


@pytest.mark.fast
def test_a_record_depends_on_seed_and_index_alone():
    first_seven = [records.encode(r) for r in generator.make_records(1, 7, 32)]
    first_twenty = [records.encode(r) for r in generator.make_records(1, 20, 32)]
    other_seed = [records.encode(r) for r in generator.make_records(2, 7, 32)]
    assert first_seven == first_twenty[:7]
    assert not set(first_seven) & set(other_seed)
    solo = generator.make_records(1, 40, 32, tags=["colors"])
    assert len({record.imgs[0].data for record in solo}) == 40


def test_objects_stay_apart_and_inside():
    counts = set()
    for scene, tag, _ in scenes(300):
        counts.add(len(scene.objects))
        for k, a in enumerate(scene.objects):
            radius = generator.SIZES[a.size]
            assert radius < min(a.x, a.y) and max(a.x, a.y) < 1 - radius
            for b in scene.objects[:k]:
                assert np.hypot(a.x - b.x, a.y - b.y) > radius + generator.SIZES[b.size]
                if tag != "counting":
                    assert a.shape != b.shape
    assert counts == {1, 2, 3, 4}


def test_every_shape_color_size_background_and_relation_occurs():
    examples = scenes(900)
    objects = [o for scene, _, _ in examples for o in scene.objects]
    assert {o.shape for o in objects} == set(generator.SHAPES)
    assert {o.color for o in objects} == set(generator.COLORS)
    assert {o.size for o in objects} == set(generator.SIZES)
    assert {scene.background for scene, _, _ in examples} == set(generator.BACKGROUNDS)
    assert {wording for _, _, wording in examples} == set(range(generator.WORDINGS))
    positions = [scene.objects for scene, tag, _ in examples if tag == "position"]
    assert {generator.relation(a, b) for a, b in positions} == set(generator.RELATIONS)


@pytest.mark.fast
@pytest.mark.parametrize("pixels", [32, 64])
def test_pixels_show_the_scene(pixels):
    """The middle of each solid object has its color, and objects cover the expected area."""
    solid = {"circle", "square", "diamond", "star", "cross", "heart", "triangle"}
    for scene, _, _ in scenes(120):
        image = generator.draw(scene, pixels)
        assert image.shape == (pixels, pixels, 3) and image.dtype == np.uint8
        for item in scene.objects:
            if item.shape in solid:
                middle = image[int(item.y * pixels), int(item.x * pixels)].astype(int)
                assert np.abs(middle - generator.COLORS[item.color]).max() < 40
        background = np.array(generator.BACKGROUNDS[scene.background])
        covered = (np.abs(image.astype(int) - background).max(-1) > 30).mean()
        bound = sum(np.pi * generator.SIZES[o.size] ** 2 for o in scene.objects)
        assert 0.15 * bound < covered < 1.05 * bound


def test_a_ring_is_hollow():
    scene = generator.Scene("white", 0.0, (generator.Object("ring", "red", "large", 0.5, 0.5),))
    image = generator.draw(scene, 64)
    assert (image[32, 32] > 240).all()
    assert tuple(image[32, 32 + 10]) == generator.COLORS["red"]


def test_drawings_of_different_shapes_differ():
    drawings = [
        generator.draw(
            generator.Scene("white", 0.0, (generator.Object(s, "blue", "small", 0.5, 0.5),)), 32
        )
        for s in generator.SHAPES
    ]
    for k, a in enumerate(drawings):
        for b in drawings[:k]:
            assert (np.abs(a.astype(int) - b).max(-1) > 60).sum() >= 6


@pytest.mark.fast
@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-0.5, 0.0, "left of"),
        (0.5, 0.1, "right of"),
        (0.0, -0.5, "above"),
        (-0.1, 0.5, "below"),
        (0.4, 0.4, None),
        (0.1, 0.0, None),
    ],
)
def test_a_relation_is_clear_or_none(dx, dy, expected):
    a = generator.Object("circle", "red", "small", 0.5 + dx, 0.5 + dy)
    b = generator.Object("square", "red", "small", 0.5, 0.5)
    assert generator.relation(a, b) == expected


def test_captions_and_metadata_of_every_tag():
    red = generator.Object("circle", "red", "small", 0.2, 0.5)
    orange = generator.Object("star", "orange", "small", 0.8, 0.5)
    one, two = generator.Scene("white", 0, (red,)), generator.Scene("black", 0, (red, orange))
    three = generator.Scene("cream", 0, (red, red, red))
    captions = {
        "single_object": (one, "a photo of a circle", "a circle on a white background"),
        "colors": (one, "a photo of a red circle", "a red circle on a white background"),
        "two_object": (two, "a photo of a circle and a star", None),
        "position": (two, "a photo of a circle left of a star", None),
        "color_attr": (two, "a photo of a red circle and an orange star", None),
        "counting": (three, "a photo of three circles", "three circles on a cream background"),
    }
    assert set(captions) == set(generator.TAGS)
    for tag, (scene, prompt, with_background) in captions.items():
        assert generator.caption(scene, tag) == prompt
        if with_background:
            assert generator.caption(scene, tag, 1) == with_background
    assert generator.caption(three, "counting", 2) == "there are three circles in the picture"
    assert generator.caption(one, "single_object", 2) == "there is a circle in the picture"
    assert generator.caption(generator.Scene("white", 0, (red,) * 2), "counting").endswith(
        "two circles"
    )
    crosses = generator.Scene(
        "white", 0, (generator.Object("cross", "red", "small", 0.2, 0.5),) * 2
    )
    assert generator.caption(crosses, "counting") == "a photo of two crosses"

    assert generator.geneval_facts(two, "position") == {
        "tag": "position",
        "include": [
            {"class": "star", "count": 1},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a circle left of a star",
    }
    assert generator.geneval_facts(three, "counting")["include"] == [
        {"class": "circle", "count": 3}
    ]
    assert generator.geneval_facts(three, "counting")["exclude"] == [
        {"class": "circle", "count": 4}
    ]
    assert generator.geneval_facts(two, "color_attr")["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "star", "count": 1, "color": "orange"},
    ]
    assert "color" not in generator.geneval_facts(one, "single_object")["include"][0]
    with pytest.raises(ValueError, match="unknown tag"):
        generator.caption(one, "texture")


def test_a_record_contains_the_scene_of_its_image():
    for record in generator.make_records(0, 12, 32):
        raw = json.loads(record.meta["scene"])
        raw["objects"] = tuple(generator.Object(**o) for o in raw["objects"])
        scene = generator.Scene(**raw)
        assert (generator.draw(scene, 32) == images.decode(record.imgs[0].data, "x")).all()
        meta = json.loads(record.meta["geneval"])
        assert meta == generator.geneval_facts(scene, record.meta["tag"])


def test_labels_name_the_class_of_a_scene():
    solo = ["single_object", "counting", "colors"]
    for kind in generator.LABELS:
        names = generator.classes(kind)
        for record in generator.make_records(0, 9, 32, tags=solo, label=kind):
            item = json.loads(record.meta["scene"])["objects"][0]
            name = names[record.meta["label"]]
            expected = {
                "shape": item["shape"],
                "color": item["color"],
                "pair": f"{item['color']} {item['shape']}",
                "tag": record.meta["tag"],
            }
            assert name == expected[kind]
    with pytest.raises(ValueError, match="two_object shows two"):
        list(generator.make_records(0, 3, 32, label="shape"))
    with pytest.raises(ValueError, match="unknown label"):
        generator.classes("texture")
