"""The judge of the shapes world: right on what was drawn, and on what differs in one thing."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from starflow2_jax.shapes import detector, generator, scenes
from starflow2_jax.shapes.detector import DetectedObject

# What GenEval's metadata of a tag can tell; the rest is held against the facts of all objects.
TOLD = {tag: {"shape"} for tag in generator.TAGS}
TOLD["counting"].add("count")
TOLD["position"].add("relation")
TOLD["colors"].add("color")
TOLD["color_attr"].add("color")


def near_misses(scene, tag, rng):
    """Yields what was changed, and the scene with that one change."""
    pick, first = generator.pick, scene.objects[0]
    rest = scene.objects[1:]

    def with_first(**change):
        return dataclasses.replace(scene, objects=(dataclasses.replace(first, **change), *rest))

    taken = {item.shape for item in scene.objects}
    yield "color", with_first(color=pick(rng, [c for c in generator.COLORS if c != first.color]))
    yield "shape", with_first(shape=pick(rng, [s for s in generator.SHAPES if s not in taken]))
    if tag == "color_attr":
        a, b = scene.objects
        swapped = (dataclasses.replace(a, color=b.color), dataclasses.replace(b, color=a.color))
        yield "color", dataclasses.replace(scene, objects=swapped)
    if tag == "position":
        wanted = pick(
            rng, [r for r in generator.RELATIONS if r != generator.relation(*scene.objects)]
        )
        kind = (first.shape, first.color, first.size)
        moved = scenes.place_in_relation(rng, rest, kind, wanted, rest[0])
        if moved is not None:
            yield "relation", dataclasses.replace(scene, objects=(moved, *rest))
    else:
        more = generator.place_object(rng, scene.objects, first.shape, first.color, "small")
        if more is not None:
            yield "count", dataclasses.replace(scene, objects=(*scene.objects, more))
        if rest:
            yield "count", dataclasses.replace(scene, objects=rest)


def cases(count, seed):
    """(what, scene to draw, facts, whether they hold)."""
    for index in range(count):
        scene, tag, _ = generator.example(seed, index)
        plain, whole = generator.geneval_facts(scene, tag), scenes.scene_facts(scene, "")
        yield f"match {tag}", scene, plain, True
        yield "match of all objects", scene, whole, True
        for what, other in near_misses(scene, tag, np.random.default_rng((seed, index))):
            yield what, other, plain if what in TOLD[tag] else whole, False


def accuracy(count, pixels, sigma, seed=0):
    """Verdicts on `count` scenes and their near-misses: numbers judged, and judged wrong."""
    noise = np.random.default_rng(seed)
    judged, wrong = Counter(), Counter()
    for what, scene, facts, holds in cases(count, seed):
        picture = generator.draw(scene, pixels) / 127.5 - 1
        picture += sigma * noise.standard_normal(picture.shape)
        judged[what] += 1
        wrong[what] += detector.judge(picture, facts).correct != holds
    assert {"color", "shape", "count", "relation", "match counting"} <= set(judged)
    return judged, wrong


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_judge_is_right(sigma):
    judged, wrong = accuracy(60, 64, sigma)
    assert judged.total() > 200 and not wrong.total(), wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "sigma"), [(64, 0.0), (64, 0.1), (32, 0.0), (32, 0.1), (128, 0.1)]
)
def test_judge_is_right_in_full(pixels, sigma):
    """On matches and on near-misses alike, not only together."""
    judged, wrong = accuracy(600 if pixels == 128 else 1500, pixels, sigma, seed=1)
    for matching in (True, False):
        all_ = sum(n for what, n in judged.items() if what.startswith("match") == matching)
        bad = sum(n for what, n in wrong.items() if what.startswith("match") == matching)
        print(f"{pixels} pixels, sigma {sigma}, matching {matching}: {all_ - bad} of {all_} right")
        assert 1 - bad / all_ >= 0.999, wrong


@pytest.mark.parametrize("pixels", [32, 48, 64, 96, 128])
def test_finds_what_is_there(pixels):
    objects = (
        generator.Object("ring", "orange", "small", 0.25, 0.25),
        generator.Object("heart", "blue", "medium", 0.7, 0.3),
        generator.Object("star", "pink", "large", 0.35, 0.7),
    )
    picture = generator.draw(generator.Scene("light gray", 8.0, objects), pixels)
    found = detector.detect(picture)
    assert [(f.shape, f.color) for f in found] == [(o.shape, o.color) for o in objects]
    for f, o in zip(found, objects):
        assert abs(f.x - o.x) < 0.02 and abs(f.y - o.y) < 0.02
        assert f.box[0] < f.x < f.box[2] <= o.x + generator.SIZES[o.size] + 1 / pixels
    assert detector.detect(picture / 127.5 - 1) == found


def test_nothing_but_the_world_has_a_name():
    rng = np.random.default_rng(0)
    for level in (0, 128, 255):
        blank = np.full((64, 64, 3), level, np.uint8)
        assert detector.detect(blank) == []
        noisy = blank / 127.5 - 1 + 0.1 * rng.standard_normal(blank.shape)
        assert detector.detect(noisy) == []
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[20:30, 4:60] = generator.COLORS["red"]  # a bar
    picture[40:56, 20:36] = 90  # a gray square
    bar, square = detector.detect(picture)
    assert (bar.shape, bar.color) == ("other", "red")
    assert (square.shape, square.color) == ("square", "other")


def test_components_follow_bends():
    flags = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0]], bool)
    labels, count = detector._connected_components(flags)
    assert count == 4 and (labels > 0).tolist() == flags.tolist()
    assert labels[0, 0] == labels[0, 2] == labels[2, 1]
    assert len({labels[0, 0], labels[0, 4], labels[2, 4], labels[3, 3]}) == 4


def at(shape, color, x, y):
    return DetectedObject(shape, color, x, y, (x - 0.1, y - 0.1, x + 0.1, y + 0.1))


CIRCLE, STAR = at("circle", "red", 0.2, 0.5), at("star", "blue", 0.8, 0.55)


@pytest.mark.parametrize(
    ("found", "facts", "reason"),
    [
        ([CIRCLE, STAR], {"include": [{"class": "circle", "count": 1}]}, ""),
        ([STAR], {"include": [{"class": "circle"}]}, "expected circle >= 1, found 0"),
        ([CIRCLE], {"include": [{"class": "circle", "color": "blue"}]}, "blue circle >= 1"),
        ([CIRCLE], {"include": [{"class": "circle", "count": 2}]}, "circle >= 2, found 1"),
        ([CIRCLE] * 3, {"exclude": [{"class": "circle", "count": 3}]}, "circle < 3, found 3"),
        ([CIRCLE], {"exclude": [{"class": "circle", "count": 1, "color": "blue"}]}, ""),
    ],
)
def test_verdict(found, facts, reason):
    verdict = detector.check_facts(found, facts)
    assert verdict.correct == (reason == "") and reason in verdict.reason


def test_positions():
    def include(relation, index=0):
        return {"include": [{"class": "star"}, {"class": "circle", "position": [relation, index]}]}

    assert detector.check_facts([CIRCLE, STAR], include("left of")).correct
    told = detector.check_facts([CIRCLE, STAR], include("above"))
    assert told == (False, "expected circle above star, found left of")
    with pytest.raises(ValueError, match="position"):
        detector.check_facts([CIRCLE, STAR], include("near"))
    with pytest.raises(ValueError, match="position"):
        detector.check_facts([CIRCLE, STAR], include("above", 2))


def test_bad_input():
    with pytest.raises(ValueError, match="class 'knife'"):
        detector.check_facts([CIRCLE], {"include": [{"class": "knife", "count": 1}]})
    with pytest.raises(ValueError, match="neither"):
        detector.check_facts([CIRCLE], {"prompt": "a circle"})
    for pixels in (np.zeros((64, 64), np.uint8), np.zeros((8, 64, 3)), np.zeros((64, 64, 3), int)):
        with pytest.raises(ValueError, match="expected pixels"):
            detector.detect(pixels)
    with pytest.raises(ValueError, match="finite"):
        detector.detect(np.full((64, 64, 3), np.nan))
