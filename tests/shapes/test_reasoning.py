"""Reasoning through images: free choices, direct answers, balanced counts."""

import dataclasses
import json
import re
from collections import Counter, defaultdict

import pytest
from absl import flags

from starflow2_jax import prepare
from starflow2_jax.data import images, records
from starflow2_jax.data.records import Img, Text
from starflow2_jax.shapes import detector, generator, holdout, reasoning, tasks

pytestmark = pytest.mark.fast

NUM_DRAFTS = 2000
NUM_ANSWERS = {
    "free_side": 4,
    "free_color": 8,
    "free_shape": 8,
    "zoom": 8,
    "count_after_removal": 3,
    "count_after_edit": 4,
}


def drafts(task, count, withheld="none", balance_answers=False, seed=0):
    for index in range(count):
        yield tasks.make_draft(seed, index, task, withheld, generator.TAGS, balance_answers)


def free_draft(tag):
    number = reasoning.FREE_REASONS.index(tag)
    draft = tasks.make_draft(3, number, "reason_free", "none", generator.TAGS)
    assert draft.tag == tag
    return draft


def read(draft, scene, pixels=64):
    objects = detector.detect(generator.draw(scene, pixels))
    return reasoning.read_answer(draft.tag, objects, draft.scenes)


def test_a_record_depends_on_seed_and_number_alone():
    names = ["reason_free", "reason_direct"]
    for balance in (False, True):
        options = {"tasks": names, "withheld": "leave_out", "balance_answers": balance}
        first, longer = (
            [records.encode(r) for r in tasks.make_records(1, n, 16, **options)] for n in (8, 12)
        )
        assert first == longer[:8] and len(set(longer)) == 12
    alone = tasks.make_records(1, 4, 16, tasks=names[:1], withheld="leave_out")
    assert [records.encode(r) for r in alone] == first[::2]  # free choices are no counts


def test_free_records_are_read_off_the_reference_alone():
    answers, wordings = defaultdict(set), defaultdict(set)
    for record in tasks.make_records(0, 45, 32, tasks=["reason_free"], withheld="leave_out"):
        records.check(record, record.id, pixels=True)
        tag = record.meta["tag"]
        assert [type(s) for s in record.segs] == [Img, Text, Img, Text]
        assert [s.loss for s in record.segs] == [False, False, True, True]
        source, target = (
            detector.detect(images.decode(blob.data, record.id)) for blob in record.imgs
        )
        scenes = [
            generator.Scene(**s | {"objects": tuple(generator.Object(**o) for o in s["objects"])})
            for s in json.loads(record.meta["scenes"])
        ]
        answer = record.segs[-1].s
        assert reasoning.read_answer(tag, target, scenes) == answer
        assert reasoning.read_answer(tag, source, scenes) is None
        assert detector.check_facts(target, json.loads(record.meta["geneval"])).correct
        assert record.meta["withheld"] == holdout.withheld_kind(scenes) == "none"
        answers[tag].add(answer)
        wordings[tag].add(record.segs[1].s.split()[0])
    assert all(len(answers[tag]) >= 3 for tag in reasoning.FREE_REASONS)
    assert all(len(wordings[tag]) == 3 for tag in reasoning.FREE_REASONS)


@pytest.mark.parametrize(
    "relation, dx, dy",
    [("left of", -0.3, 0.05), ("right of", 0.3, 0.1), ("above", 0.1, -0.3), ("below", 0.0, 0.3)],
)
def test_a_side_is_that_of_the_drawn_object(relation, dx, dy):
    draft = free_draft("free_side")
    new, anchor = draft.scenes[1].objects[:2]
    item = dataclasses.replace(new, x=anchor.x + dx, y=anchor.y + dy)
    scene = dataclasses.replace(draft.scenes[1], objects=(item, anchor))
    assert read(draft, scene) == relation


def test_an_image_without_a_clear_choice_has_no_answer():
    draft = free_draft("free_side")
    scene = draft.scenes[1]
    new, anchor = scene.objects[:2]
    oblique = dataclasses.replace(new, x=anchor.x + 0.25, y=anchor.y + 0.22)
    twin = dataclasses.replace(new, x=anchor.x - 0.3, y=anchor.y)
    opposite = dataclasses.replace(new, x=anchor.x + 0.3, y=anchor.y)
    other = next(c for c in generator.COLORS if c not in (new.color, anchor.color))
    recolored = dataclasses.replace(new, color=other)
    for objects in ((oblique, anchor), (twin, opposite, anchor), (new,), (recolored, anchor)):
        assert read(draft, dataclasses.replace(scene, objects=objects)) is None
    for tag, key in (("free_color", "color"), ("free_shape", "shape")):
        draft = free_draft(tag)
        source, target = draft.scenes
        item = target.objects[0]
        assert read(draft, target) == getattr(item, key)
        assert read(draft, source) is None
        gone = dataclasses.replace(target, objects=target.objects[1:])
        assert read(draft, gone) is None
        value = next(v for v in (generator.COLORS if key == "color" else generator.SHAPES)
                     if v not in (getattr(item, key), getattr(source.objects[0], key)))  # fmt: skip
        again = dataclasses.replace(item, **{key: value})
        assert read(draft, dataclasses.replace(target, objects=(again,))) == value


def blind_guess(pairs):
    """Return the accuracy of guesses by one word of the request, and of the most frequent answer.

    The word is the one that tells most in the first half of the (request, answer) pairs; guesses
    are scored on the second half.
    """
    first, second = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    mode = Counter(answer for _, answer in pairs).most_common(1)[0][1] / len(pairs)
    by_word = defaultdict(Counter)
    for request, answer in first:
        for word in set(re.findall(r"\w+", request)):
            by_word[word][answer] += 1
    hits = 0
    for request, answer in second:
        counters = [by_word[w] for w in set(re.findall(r"\w+", request)) if w in by_word]
        best = max(counters, key=lambda c: c.most_common(1)[0][1] / c.total())
        hits += best.most_common(1)[0][0] == answer
    return max(mode, hits / len(second))


@pytest.mark.parametrize("task", ["reason_free", "reason"])
def test_a_guess_without_images_is_no_better_than_chance(task):
    pairs, is_left = defaultdict(list), defaultdict(list)
    for draft in drafts(task, NUM_DRAFTS, "leave_out", balance_answers=True):
        pairs[draft.tag].append((draft.user[1], draft.assistant[-1]))
        if draft.tag == "free_side":  # nor does the place of the object in the source tell
            b = draft.scenes[0].objects[0]
            is_left[b.x > 0.5].append(draft.assistant[-1] == "left of")
    guesses = {tag: round(blind_guess(group), 3) for tag, group in pairs.items()}
    for tag, guess in guesses.items():
        # Requests name a color or shape, whose withheld partner is never the answer.
        choices = NUM_ANSWERS[tag] - (NUM_ANSWERS[tag] == 8)
        if tag in ("free_color", "free_shape"):
            choices -= 1  # the old one
        assert guess < 1 / choices + 0.055, guesses
    for values in is_left.values():
        assert 0.19 < sum(values) / len(values) < 0.31, is_left


def test_counts_are_balanced_on_request_alone():
    for task, tag, answers in (
        ("reason", "count_after_removal", 3),
        ("reason", "count_after_edit", 4),
        ("reason_direct", "count_after_edit", 4),
        ("question", "count", 5),
        ("multi", "total", 4),
    ):
        for balance in (False, True):
            counts = Counter(d.assistant[-1] for d in drafts(task, 120, "none", balance)
                             if d.tag == tag)  # fmt: skip
            assert (max(counts.values()) - min(counts.values()) <= 1) == balance, (tag, counts)
            assert len(counts) == answers or not balance


def test_direct_answers_are_those_after_an_image():
    rows = list(tasks.make_records(2, 30, 32, tasks=["reason_direct"], withheld="leave_out"))
    for record in rows:
        records.check(record, record.id, pixels=True)
        assert [type(s) for s in record.segs] == [Img, Text, Text]
        assert [s.loss for s in record.segs] == [False, False, True]
        assert len(json.loads(record.meta["scenes"])) == 1 and "geneval" not in record.meta
        request, answer = (s.s for s in record.segs[1:])
        objects = detector.detect(images.decode(record.imgs[0].data, record.id))
        colors, pairs = (re.findall(rf"\b({'|'.join(v)})\b", request) for v in
                         (generator.COLORS, generator.SHAPES))  # fmt: skip
        if record.meta["tag"] == "zoom":
            assert (answer,) == tuple(o.shape for o in objects if o.color == colors[0])
            continue
        item = next(o for o in objects if (o.color, o.shape) == (colors[0], pairs[0]))
        rest = [o for o in objects if o is not item]
        if record.meta["tag"] == "count_after_edit":
            assert (colors[1], item.shape) not in holdout.PAIRS
            rest = [item, *(o for o in rest if o.color == colors[1])]
        assert answer == generator.NUMBERS[len(rest)]
    assert {r.meta["tag"] for r in rows} == set(reasoning.REASONS)
    assert {r.meta["task"] for r in rows} == {"reason_direct"}


@pytest.mark.parametrize("task", ["reason_free", "reason_direct"])
def test_worlds_of_single_objects_show_single_objects(task):
    tags = set()
    for record in tasks.make_records(2, 8, 8, tasks=[task], tags=["colors"], withheld="leave_out"):
        assert all(len(s["objects"]) == 1 for s in json.loads(record.meta["scenes"]))
        tags.add(record.meta["tag"])
    assert tags == ({"zoom"} if task == "reason_direct" else {"free_color", "free_shape"})


def test_import_balances_answers(tmp_path):
    values = flags.FlagValues()
    prepare.define(values)
    words = "prepare --format shapes --pixels 8 --n 6 --tasks reason,reason_free --balance_answers"
    values([*words.split(), "--out", str(tmp_path / "data")])
    prepare.import_(values)
    dataset = records.read(tmp_path / "data")
    options = {"tasks": ["reason", "reason_free"], "balance_answers": True}
    assert list(dataset) == list(tasks.make_records(0, 6, 8, **options))
    assert dataset.manifest.importer.options["balance_answers"] is True
    # Imports without the flag have the options of earlier versions.
    values.balance_answers = False
    importer = prepare.SOURCES["shapes"](values).importer
    assert "balance_answers" not in importer.options
