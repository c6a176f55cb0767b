"""Records of every task of the shapes world: what is said is what is drawn, answers are true."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict

import pytest
from absl import flags

from starflow2_jax import prepare
from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Img, Text
from starflow2_jax.shapes import detector, generator, holdout, tasks
from starflow2_jax.shapes.wordings import TERSE, WORDINGS

TAGS = {
    "caption": generator.TAGS,
    "question": tasks.QUESTIONS,
    "edit": tasks.EDITS,
    "reason": tasks.REASONS,
    "multi": tasks.MULTI,
    "text": tasks.TEXTS,
}
COLOR, SHAPE, SIZE = (
    "|".join(words) for words in (generator.COLORS, generator.SHAPES, generator.SIZES)
)
PAIR = re.compile(rf"({COLOR}) ({SHAPE})\b")


def some(task, count, seed=0, withheld="none", pixels=16):
    return tasks.make_records(seed, count, pixels, tasks=[task], withheld=withheld)


def scenes(record):
    found = []
    for raw in json.loads(record.meta["scenes"]):
        raw["objects"] = tuple(generator.Object(**item) for item in raw["objects"])
        found.append(generator.Scene(**raw))
    return found


def said(record):
    """Request and answers."""
    words = [s.s for s in record.segs if isinstance(s, Text)]
    return words[0], words[1:]


def pictures(record):
    return [images.decode(blob.data, record.id) for blob in record.imgs]


def kinds(scene):
    return Counter((item.color, item.shape) for item in scene.objects)


def test_record_depends_on_seed_and_number_alone():
    few = [records.encode(r) for r in tasks.make_records(1, 24, 16)]
    many = [records.encode(r) for r in tasks.make_records(1, 50, 16)]
    other = [records.encode(r) for r in tasks.make_records(2, 24, 16)]
    assert few == many[:24] and not set(few) & set(other)
    assert len({records.decode(data, "x").id for data in many}) == 50
    # The other tasks of a mixture change nothing of a task.
    alone = [records.encode(r) for r in some("edit", 3, seed=1)]
    assert alone == few[2::9]
    assert records.decode(few[11], "x").id == "shapes-edit-1-00000001"


def test_pictures_for_captions_stay_as_they_were():
    """Ids, words, roles and metadata; the digest was taken before there were other tasks."""
    digest = hashlib.sha256()
    mixed = tasks.make_records(3, 60, 16, tasks=["t2i"])
    for record, alone in zip(mixed, generator.make_records(3, 60, 16), strict=True):
        assert record == alone
        told = (record.id, record.src, record.segs, sorted(record.meta.items()))
        digest.update(repr(told).encode())
    expected = "71bd6171c5ac55379186069904bbc96f91c0b937772c0435cc74743a11c75c22"
    assert digest.hexdigest() == expected


def patterns(key):
    """Expressions that the wordings of a request match."""
    return [re.sub(r"\\\{\w+\\\}", ".+", re.escape(form)) for form in WORDINGS[key]]


@pytest.mark.parametrize("task", TAGS)
def test_form(task):
    """Schema, roles, loss, turn-taking tags, wordings, and pictures that show the scenes."""
    tags, requests = Counter(), defaultdict(set)
    for record in some(task, 20 * len(TAGS[task])):
        records.check(record, record.id, pixels=True)
        tags[record.meta["tag"]] += 1
        roles = [segment.role for segment in record.segs]
        assert roles == sorted(roles, reverse=True) and set(roles) == {"user", "assistant"}
        assert all(s.loss == (s.role == "assistant") for s in record.segs)
        assert [s.i for s in record.segs if isinstance(s, Img)] == list(range(len(record.imgs)))
        for scene, picture in zip(scenes(record), pictures(record)):
            if record.meta["tag"] != "zoom" or scene != scenes(record)[0]:
                assert (generator.draw(scene, 16) == picture).all()
        request, answers = said(record)
        key = "caption" if task == "caption" else record.meta["tag"]
        forms = enumerate(patterns(key))
        fits = [(len(form), k) for k, form in forms if re.fullmatch(form, request)]
        requests[key].add(max(fits)[1])
        assert all(answer and answer == answer.strip() for answer in answers)
        assert len(answers) == (task != "edit")
    assert tags == dict.fromkeys(TAGS[task], 20)
    assert all(found == {0, 1, 2} for found in requests.values()), requests


def test_three_wordings_of_everything():
    assert set(WORDINGS) == {"caption", "quiz"}.union(*(TAGS[t] for t in TAGS if t != "caption"))
    assert set(TERSE) == set(tasks.QUESTIONS)
    for forms in WORDINGS.values():
        assert len(set(forms)) == generator.WORDINGS == 3
        assert len({frozenset(re.findall(r"\{(\w+)\}", f.lower())) for f in forms}) == 1


def test_captions_name_everything():
    for record in some("caption", 120):
        (scene,), (_, (answer,)) = scenes(record), said(record)
        assert f"{scene.background} background" in answer
        rest = answer.replace(scene.background, "plain")
        told, zero = Counter(), []
        tags = re.findall(rf"(\w+) ({COLOR}) (?:\w+ )?({'|'.join(generator.NUMBERS)})\b", rest)
        named = re.findall(rf"(\w+) \w+ ({COLOR}) (\w+)", rest)
        for number, color, noun in [(n, c, s) for s, c, n in tags] if tags else named:
            if number == "zero":
                zero.append((color, noun))
                continue
            shape = noun if noun in generator.SHAPES else re.sub("(?<=s)es$|s$", "", noun)
            told[color, shape] += 1 if number == "a" else generator.NUMBERS.index(number)
        assert told == kinds(scene) and not set(zero) & set(told)
        assert all({c for c, _ in told} >= {c} and {n for _, n in told} >= {n} for c, n in zero)
        facts = json.loads(record.meta["geneval"])
        assert facts["prompt"] == answer
        for entry in facts["include"]:
            if "position" in entry:
                a, b = (next(o for o in scene.objects if o.shape == e["class"]) for e in
                        (entry, facts["include"][entry["position"][1]]))  # fmt: skip
                assert entry["position"][0] == generator.relation(a, b)


def oracle(tag, request, objects, scene):
    """The answer, read from the words of the request and the scene alone."""
    colors = re.findall(rf"\b({COLOR})\b", request)
    named = re.findall(rf"\b({SHAPE})(?:s|es)?\b", request)
    whole = [
        next((o for o in objects if (o.color, o.shape) == pair), None)
        for pair in PAIR.findall(request)
    ]
    match = [o for o in objects if o.shape in named or (not named and o.color in colors)]
    if tag in ("color", "shape", "size"):
        (item,) = [w for w in whole if w] or match
        return getattr(item, tag)
    if tag == "count":
        return generator.NUMBERS[len(match)]
    if tag == "exists":
        return "yes" if whole[0] else "no"
    if tag == "background":
        return scene.background
    if "relation" in tag and len(whole) == 1:  # a terse one means the other of two objects
        whole.append(objects[1 - objects.index(whole[0])])
    if tag == "relation":
        a, b = reversed(whole) if request.startswith("Seen from") else whole
        return generator.relation(a, b)
    assert tag == "is_relation"
    return "yes" if generator.relation(*whole) in request else "no"


def test_questions_are_answered_right():
    answers = defaultdict(Counter)
    for record in some("question", 400):
        (scene,), (request, (answer,)) = scenes(record), said(record)
        tag = record.meta["tag"]
        assert answer == oracle(tag, request, scene.objects, scene), (request, scene)
        answers[tag][answer] += 1
    for tag, least in (("color", 8), ("shape", 8), ("size", 3), ("count", 5), ("relation", 4)):
        assert len(answers[tag]) == least, answers[tag]
    for tag in ("exists", "is_relation"):
        assert min(answers[tag]["yes"], answers[tag]["no"]) > 12
    assert max(answers["count"].values()) < 0.6 * answers["count"].total()


def kind_of(words):
    """Of which kind a question is."""
    terse = [tag for tag, form in TERSE.items() if words.split()[0] == form.split()[0]]
    fits = [(len(form.replace(".+", "")), tag) for tag in tasks.QUESTIONS
            for form in patterns(tag) if re.fullmatch(form, words)]  # fmt: skip
    return max(fits)[1] if fits else terse[0]


@pytest.mark.parametrize("task", ["dialog", "quiz"])
def test_several_questions_of_one_picture(task):
    """Of a dialog each is the user's turn; a quiz is one turn, of which answers are learnt."""
    counts, kinds_ = Counter(), Counter()
    for record in some(task, 80):
        records.check(record, record.id, pixels=True)
        (scene,), (shown, *turns) = scenes(record), record.segs
        assert isinstance(shown, Img) and not shown.loss and len(record.imgs) == 1
        if task == "quiz":
            assert turns.pop(0).s in WORDINGS["quiz"]
        asked, answered = turns[::2], turns[1::2]
        assert len({s.s for s in asked}) == len(asked) == len(answered)
        for number, (question, answer) in enumerate(zip(asked, answered)):
            role = "user" if task == "dialog" else "assistant"
            assert (question.role, question.loss) == (role, False)
            assert (answer.role, answer.loss) == ("assistant", True)
            words, told = question.s, answer.s
            if task == "quiz":
                assert words.startswith("\n") == (number > 0) and told.startswith(" ")
                words, told = words.strip(), told[1:]
            tag = kind_of(words)
            assert told == oracle(tag, words, scene.objects, scene), (question, scene)
            kinds_[tag] += 1
        counts[record.meta["tag"], len(asked) > 1] += 1
    assert set(kinds_) == set(tasks.QUESTIONS)
    assert all(counts[tag, True] > 20 for tag in tasks.DIALOGS), counts


def test_edits_do_what_they_say_and_nothing_else():
    changes = Counter()
    for record in some("edit", 75, pixels=64):
        source, target = scenes(record)
        request, tag = said(record)[0], record.meta["tag"]
        assert (source.background, source.ramp) == (target.background, target.ramp)
        gone, new = (
            (set(source.objects) - set(target.objects)),
            (set(target.objects) - set(source.objects)),
        )
        changes[tag, len(gone), len(new)] += 1
        for item in gone:
            assert f"{item.color} {item.shape}" in request
        for item, old in itertools.product(new, gone):
            same = {k for k in ("shape", "color", "size", "x", "y")
                    if getattr(item, k) == getattr(old, k)}  # fmt: skip
            assert {"recolor": {"shape", "size", "x", "y"}, "replace": {"size", "x", "y"},
                    "move": {"shape", "color", "size"}}[tag] == same  # fmt: skip
        if tag in ("add", "move"):
            (item,) = new
            anchor = PAIR.findall(request)[1]
            (anchor,) = [o for o in target.objects if (o.color, o.shape) == anchor]
            assert generator.relation(item, anchor) in request
        before, after = pictures(record)
        facts = json.loads(record.meta["geneval"])
        assert detector.judge(after, facts).correct
        assert not detector.judge(before, facts).correct, (tag, source, target)
    assert changes == {
        ("recolor", 1, 1): 15, ("add", 0, 1): 15, ("remove", 1, 0): 15, ("move", 1, 1): 15,
        ("replace", 1, 1): 15,
    }  # fmt: skip


def test_reasoning_goes_through_a_picture():
    answers = defaultdict(Counter)
    for record in some("reason", 90, pixels=64):
        kinds_ = [type(s) for s in record.segs if s.role == "assistant"]
        assert kinds_ == [Img, Text]
        request, (answer,) = said(record)
        tag, (source, helpful) = record.meta["tag"], pictures(record)
        answers[tag][answer] += 1
        found = detector.detect(helpful)
        color = re.findall(rf"({COLOR}) objects?", request)
        if tag == "zoom":
            assert (answer, color[0]) in [(item.shape, item.color) for item in found]
            (item,) = [o for o in scenes(record)[0].objects if o.color == color[0]]
            (near,) = [f for f in found if (f.shape, f.color) == (item.shape, item.color)]
            (far,) = [f for f in detector.detect(source) if f.color == item.color]
            assert near.box[3] - near.box[1] == pytest.approx(
                2 * (far.box[3] - far.box[1]), abs=0.1
            )
            continue
        assert detector.judge(helpful, json.loads(record.meta["geneval"])).correct
        if tag == "count_after_removal":
            assert len(found) == len(detector.detect(source)) - 1
        else:
            color = color or re.findall(rf"be ({COLOR})\?", request)
            found = [item for item in found if item.color == color[0]]
        assert answer == generator.NUMBERS[len(found)]
    assert len(answers["zoom"]) == 8 and len(answers["count_after_removal"]) == 3
    assert len(answers["count_after_edit"]) >= 3


def test_questions_across_pictures():
    answers = defaultdict(Counter)
    for record in some("multi", 120):
        shown, (request, (answer,)) = scenes(record), said(record)
        assert len(shown) == len(record.imgs) in (2, 3)
        tag, counts = record.meta["tag"], [len(scene.objects) for scene in shown]
        answers[tag][answer] += 1
        if tag == "same_shape":
            assert answer == ("yes" if len({s.objects[0].shape for s in shown}) == 1 else "no")
        elif tag == "total":
            assert answer == generator.NUMBERS[sum(counts)]
        else:
            fits = [PAIR.findall(request)[0] in kinds(scene) for scene in shown] if (
                tag == "which_shows") else [count == max(counts) for count in counts]  # fmt: skip
            assert sum(fits) == 1 and answer == ("first", "second", "third")[fits.index(True)]
    assert {tag: len(found) for tag, found in answers.items()} == {
        "same_shape": 2, "which_shows": 3, "which_has_most": 3, "total": 4,
    }  # fmt: skip


def test_text_alone():
    for record in some("text", 90):
        assert not record.imgs
        request, (answer,) = said(record)
        if record.meta["tag"] == "count_left":
            n, m = (generator.NUMBERS.index(w) for w in re.findall(r"\w+", request.lower())
                    if w in generator.NUMBERS)  # fmt: skip
            assert answer == generator.NUMBERS[n - m]
            continue
        (scene,) = scenes(record)
        a, b = scene.objects
        fact = f"{a.color} {a.shape} is {generator.relation(a, b)} a {b.color} {b.shape}"
        assert fact in request.replace(" an ", " a ")
        if record.meta["tag"] == "turn_around":
            assert answer == f"{generator.relation(b, a)} the {a.color} {a.shape}"
        else:
            asked = re.findall(rf"({SHAPE})\W?(?: have\?)?$", request)[0]
            assert answer == {a.shape: a.color, b.shape: b.color}[asked]


def test_list_of_what_is_withheld():
    assert len(set(holdout.PAIRS)) == len(generator.COLORS) * len(generator.SHAPES) // 8
    assert {color for color, _ in holdout.PAIRS} == set(generator.COLORS)
    assert {shape for _, shape in holdout.PAIRS} == set(generator.SHAPES)
    things = [
        generator.Object(shape, color, "small", 0.5, 0.5)
        for shape, color in itertools.product(generator.SHAPES, generator.COLORS)
    ]
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    out, seen = 0, set()
    for a, b in itertools.product(things, repeat=2):
        for relation in generator.RELATIONS:
            withheld = holdout.is_withheld_combination(a, relation, b)
            assert withheld == holdout.is_withheld_combination(b, back[relation], a)
            out += withheld
            if not withheld:
                seen |= {(a.shape, relation, b.shape), (a.color, relation, b.color)}
    assert out == 64 * 64 * 4 // 8
    assert len(seen) == 2 * 8 * 4 * 8


@pytest.mark.parametrize("task", tasks.TASKS)
def test_withheld(task):
    def unseen(record):
        raw = record.meta.get("scenes") or f"[{record.meta['scene']}]"
        objects = [[generator.Object(**o) for o in scene["objects"]] for scene in json.loads(raw)]
        words = {pair for pair in PAIR.findall(records.text(record).lower())}
        # Tags name the shape first.
        words |= {(c, n) for n, c in re.findall(rf"\b({SHAPE}) ({COLOR}) ", records.text(record))}
        pairs = words | {(o.color, o.shape) for scene in objects for o in scene}
        if pairs & set(holdout.PAIRS):
            return True
        for a, b in (pair for scene in objects for pair in itertools.permutations(scene, 2)):
            if generator.relation(a, b) and holdout.is_withheld_combination(
                a, generator.relation(a, b), b
            ):
                return True
        of = "|".join(generator.RELATIONS)
        asked = rf"the ({COLOR}) ({SHAPE}) (?:lie |is )?({of}) the ({COLOR}) ({SHAPE})"
        spoken = re.findall(asked, records.text(record))
        for c, n, relation in re.findall(rf"true ({COLOR}) ({SHAPE}) ({of})", records.text(record)):
            # Of a quiz, which means the other of two objects.
            (other,) = [o for o in objects[0] if (o.color, o.shape) != (c, n)]
            spoken.append((c, n, relation, other.color, other.shape))
        for c, n, relation, d, m in spoken:
            a, b = (
                generator.Object(shape, color, "small", 0.5, 0.5)
                for shape, color in ((n, c), (m, d))
            )
            if holdout.is_withheld_combination(a, relation, b):
                return True
        return False

    held = [unseen(r) for r in some(task, 60, withheld="none", pixels=8)]
    assert 0 < sum(held) < 60
    assert not any(unseen(r) for r in some(task, 120, withheld="leave_out", pixels=8))
    for record in some(task, 60, withheld="only", pixels=8):
        assert unseen(record) and record.meta.get("withheld") != "none"


def run(verb, *words):
    values = flags.FlagValues()
    prepare.define(values)
    values(["prepare", *map(str, words)])
    return getattr(prepare, verb)(values)


def test_import(tmp_path):
    words = ("--format", "shapes", "--pixels", 16, "--n", 14, "--seed", 4)
    every = ("--tasks", ",".join(tasks.TASKS), "--withheld", "leave_out")
    run("import_", *words, *every, "--out", tmp_path / "all")
    expected = tasks.make_records(4, 14, 16, withheld="leave_out")
    assert list(records.read(tmp_path / "all")) == list(expected)
    assert list(records.validate(tmp_path / "all")) == []
    assert run("import_", *words, *every, "--out", tmp_path / "all")["was"] == "complete"
    with pytest.raises(DatasetError, match="exists"):
        run("import_", *words, *every, "--withheld", "none", "--out", tmp_path / "all")

    run("import_", *words, "--out", tmp_path / "plain")
    plain = records.read(tmp_path / "plain")
    assert list(plain) == list(generator.make_records(4, 14, 16))
    assert set(plain.manifest.importer.options) == {"label", "seed", "n", "pixels", "tags"}
    only = ("--withheld", "only", "--tags", "colors", "--label", "pair")
    run("import_", *words, *only, "--out", tmp_path / "only")
    shown = {r.meta["label"] for r in records.read(tmp_path / "only")}
    names = generator.classes("pair")
    assert {names[k] for k in shown} <= {" ".join(pair) for pair in holdout.PAIRS}
    for wrong, message in (
        (("--tasks", "caption,poem"), r"--tasks: unknown \['poem'\]"),
        (("--tasks", "caption,caption"), "named twice"),
        (("--tasks", "caption", "--label", "shape"), "only --tasks t2i has classes"),
    ):
        with pytest.raises(ValueError, match=message):
            run("import_", *words, *wrong, "--out", tmp_path / "none")
    with pytest.raises(ValueError, match="--withheld some"):
        next(tasks.make_records(0, 1, 16, tasks=["text"], withheld="some"))
    assert sorted(os.listdir(tmp_path)) == ["all", "only", "plain"]
