"""The detector: it accepts drawings of the facts and rejects near misses, with one difference."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from starflow2_jax.shapes import detector, generator, scenes
from starflow2_jax.shapes.detector import DetectedObject

# Changes that the GenEval metadata of a tag can detect; the facts of all objects detect the rest.
DETECTED_BY_TAG = {tag: {"shape"} for tag in generator.TAGS}
DETECTED_BY_TAG["counting"].add("count")
DETECTED_BY_TAG["position"].add("relation")
DETECTED_BY_TAG["colors"].add("color")
DETECTED_BY_TAG["color_attr"].add("color")


def near_misses(scene, tag, rng):
    """Yield the kind of a change, and the scene with that one change."""
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
        relation = pick(
            rng, [r for r in generator.RELATIONS if r != generator.relation(*scene.objects)]
        )
        kind = (first.shape, first.color, first.size)
        moved = scenes.place_in_relation(rng, rest, kind, relation, rest[0])
        if moved is not None:
            yield "relation", dataclasses.replace(scene, objects=(moved, *rest))
    else:
        added = generator.place_object(rng, scene.objects, first.shape, first.color, "small")
        if added is not None:
            yield "count", dataclasses.replace(scene, objects=(*scene.objects, added))
        if rest:
            yield "count", dataclasses.replace(scene, objects=rest)


def cases(count, seed):
    """Yield (kind of case, scene to draw, facts, true if the facts hold)."""
    for index in range(count):
        scene, tag, _ = generator.example(seed, index)
        tag_facts, all_facts = generator.geneval_facts(scene, tag), scenes.scene_facts(scene, "")
        yield f"match {tag}", scene, tag_facts, True
        yield "match of all objects", scene, all_facts, True
        for kind, changed in near_misses(scene, tag, np.random.default_rng((seed, index))):
            yield kind, changed, tag_facts if kind in DETECTED_BY_TAG[tag] else all_facts, False


def accuracy(count, pixels, sigma, seed=0):
    """Count the judged cases and the wrong verdicts on `count` scenes and their near misses."""
    noise = np.random.default_rng(seed)
    judged, wrong = Counter(), Counter()
    for kind, scene, facts, holds in cases(count, seed):
        image = generator.draw(scene, pixels) / 127.5 - 1
        image += sigma * noise.standard_normal(image.shape)
        judged[kind] += 1
        wrong[kind] += detector.judge(image, facts).correct != holds
    assert {"color", "shape", "count", "relation", "match counting"} <= set(judged)
    return judged, wrong


@pytest.mark.fast
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_verdicts_are_correct(sigma):
    judged, wrong = accuracy(60, 64, sigma)
    assert judged.total() > 200 and not wrong.total(), wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "sigma"), [(64, 0.0), (64, 0.1), (32, 0.0), (32, 0.1), (128, 0.1)]
)
def test_verdicts_are_correct_on_many_scenes(pixels, sigma):
    """Verdicts are correct on matches and on near misses separately."""
    judged, wrong = accuracy(600 if pixels == 128 else 1500, pixels, sigma, seed=1)
    for matching in (True, False):
        total = sum(n for kind, n in judged.items() if kind.startswith("match") == matching)
        num_wrong = sum(n for kind, n in wrong.items() if kind.startswith("match") == matching)
        right = total - num_wrong
        print(f"{pixels} pixels, sigma {sigma}, matching {matching}: {right} of {total} right")
        assert 1 - num_wrong / total >= 0.999, wrong


@pytest.mark.fast
@pytest.mark.parametrize("pixels", [32, 48, 64, 96, 128])
def test_every_object_is_detected(pixels):
    objects = (
        generator.Object("ring", "orange", "small", 0.25, 0.25),
        generator.Object("heart", "blue", "medium", 0.7, 0.3),
        generator.Object("star", "pink", "large", 0.35, 0.7),
    )
    image = generator.draw(generator.Scene("light gray", 8.0, objects), pixels)
    detections = detector.detect(image)
    assert [(f.shape, f.color) for f in detections] == [(o.shape, o.color) for o in objects]
    for f, o in zip(detections, objects):
        assert abs(f.x - o.x) < 0.02 and abs(f.y - o.y) < 0.02
        assert f.box[0] < f.x < f.box[2] <= o.x + generator.SIZES[o.size] + 1 / pixels
    assert detector.detect(image / 127.5 - 1) == detections


def test_other_shapes_and_colors_have_no_name():
    rng = np.random.default_rng(0)
    for level in (0, 128, 255):
        blank = np.full((64, 64, 3), level, np.uint8)
        assert detector.detect(blank) == []
        noisy = blank / 127.5 - 1 + 0.1 * rng.standard_normal(blank.shape)
        assert detector.detect(noisy) == []
    image = np.full((64, 64, 3), 250, np.uint8)
    image[20:30, 4:60] = generator.COLORS["red"]  # a bar
    image[40:56, 20:36] = 90  # a gray square
    bar, square = detector.detect(image)
    assert (bar.shape, bar.color) == ("other", "red")
    assert (square.shape, square.color) == ("square", "other")


def test_connected_components_follow_bends():
    flags = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0]], bool)
    labels, count = detector._connected_components(flags)
    assert count == 4 and (labels > 0).tolist() == flags.tolist()
    assert labels[0, 0] == labels[0, 2] == labels[2, 1]
    assert len({labels[0, 0], labels[0, 4], labels[2, 4], labels[3, 3]}) == 4


def detected(shape, color, x, y):
    return DetectedObject(shape, color, x, y, (x - 0.1, y - 0.1, x + 0.1, y + 0.1))


CIRCLE, STAR = detected("circle", "red", 0.2, 0.5), detected("star", "blue", 0.8, 0.55)


@pytest.mark.parametrize(
    ("objects", "facts", "reason"),
    [
        ([CIRCLE, STAR], {"include": [{"class": "circle", "count": 1}]}, ""),
        ([STAR], {"include": [{"class": "circle"}]}, "expected circle >= 1, found 0"),
        ([CIRCLE], {"include": [{"class": "circle", "color": "blue"}]}, "blue circle >= 1"),
        ([CIRCLE], {"include": [{"class": "circle", "count": 2}]}, "circle >= 2, found 1"),
        ([CIRCLE] * 3, {"exclude": [{"class": "circle", "count": 3}]}, "circle < 3, found 3"),
        ([CIRCLE], {"exclude": [{"class": "circle", "count": 1, "color": "blue"}]}, ""),
    ],
)
def test_a_verdict_gives_the_first_fact_that_fails(objects, facts, reason):
    verdict = detector.check_facts(objects, facts)
    assert verdict.correct == (reason == "") and reason in verdict.reason


@pytest.mark.fast
def test_positions_are_checked():
    def include(relation, index=0):
        return {"include": [{"class": "star"}, {"class": "circle", "position": [relation, index]}]}

    assert detector.check_facts([CIRCLE, STAR], include("left of")).correct
    verdict = detector.check_facts([CIRCLE, STAR], include("above"))
    assert verdict == (False, "expected circle above star, found left of")
    with pytest.raises(ValueError, match="position"):
        detector.check_facts([CIRCLE, STAR], include("near"))
    with pytest.raises(ValueError, match="position"):
        detector.check_facts([CIRCLE, STAR], include("above", 2))


def test_wrong_facts_and_pixels_are_named():
    with pytest.raises(ValueError, match="class 'knife'"):
        detector.check_facts([CIRCLE], {"include": [{"class": "knife", "count": 1}]})
    with pytest.raises(ValueError, match="neither"):
        detector.check_facts([CIRCLE], {"prompt": "a circle"})
    for pixels in (np.zeros((64, 64), np.uint8), np.zeros((8, 64, 3)), np.zeros((64, 64, 3), int)):
        with pytest.raises(ValueError, match="expected pixels"):
            detector.detect(pixels)
    with pytest.raises(ValueError, match="finite"):
        detector.detect(np.full((64, 64, 3), np.nan))
