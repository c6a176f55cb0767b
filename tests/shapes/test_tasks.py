"""Records of every shapes task: texts match the images, and answers are correct."""

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
from starflow2_jax.shapes import detector, generator, holdout, reasoning, tasks
from starflow2_jax.shapes.wordings import TERSE, WORDINGS

TAGS = {
    "caption": generator.TAGS,
    "question": tasks.QUESTIONS,
    "edit": tasks.EDITS,
    "reason": tasks.REASONS,
    "multi": tasks.MULTI,
    "text": tasks.TEXTS,
    "copy": tasks.COPIES,
}
COLOR, SHAPE, SIZE = (
    "|".join(words) for words in (generator.COLORS, generator.SHAPES, generator.SIZES)
)
PAIR = re.compile(rf"({COLOR}) ({SHAPE})\b")


def task_records(task, count, seed=0, withheld="none", pixels=16):
    return tasks.make_records(seed, count, pixels, tasks=[task], withheld=withheld)


def scenes(record):
    record_scenes = []
    for raw in json.loads(record.meta["scenes"]):
        raw["objects"] = tuple(generator.Object(**item) for item in raw["objects"])
        record_scenes.append(generator.Scene(**raw))
    return record_scenes


def request_and_answers(record):
    """Return the request and the answers of a record."""
    texts = [s.s for s in record.segs if isinstance(s, Text)]
    return texts[0], texts[1:]


def decoded_images(record):
    return [images.decode(blob.data, record.id) for blob in record.imgs]


def kinds(scene):
    return Counter((item.color, item.shape) for item in scene.objects)


def test_a_record_depends_on_seed_and_number_alone():
    first_24 = [records.encode(r) for r in tasks.make_records(1, 24, 16)]
    first_50 = [records.encode(r) for r in tasks.make_records(1, 50, 16)]
    other_seed = [records.encode(r) for r in tasks.make_records(2, 24, 16)]
    assert first_24 == first_50[:24] and not set(first_24) & set(other_seed)
    assert len({records.decode(data, "x").id for data in first_50}) == 50
    # A task is the same without the other tasks of a mixture.
    alone = [records.encode(r) for r in task_records("edit", 3, seed=1)]
    assert alone == first_24[2::10]
    assert records.decode(first_24[12], "x").id == "shapes-edit-1-00000001"


def test_text_to_image_records_never_change():
    """Ids, texts, roles and metadata equal those of the first version, which had no other tasks."""
    digest = hashlib.sha256()
    mixed = tasks.make_records(3, 60, 16, tasks=["t2i"])
    for record, alone in zip(mixed, generator.make_records(3, 60, 16), strict=True):
        assert record == alone
        content = (record.id, record.src, record.segs, sorted(record.meta.items()))
        digest.update(repr(content).encode())
    expected = "71bd6171c5ac55379186069904bbc96f91c0b937772c0435cc74743a11c75c22"
    assert digest.hexdigest() == expected


def patterns(key):
    """Return regular expressions that the wordings of a request match."""
    return [re.sub(r"\\\{\w+\\\}", ".+", re.escape(form)) for form in WORDINGS[key]]


@pytest.mark.fast
@pytest.mark.parametrize("task", TAGS)
def test_records_of_a_task_are_well_formed(task):
    """Check schema, roles, loss, tags in turn, wordings, and images that show the scenes."""
    tags, requests = Counter(), defaultdict(set)
    for record in task_records(task, 20 * len(TAGS[task])):
        records.check(record, record.id, pixels=True)
        tags[record.meta["tag"]] += 1
        roles = [segment.role for segment in record.segs]
        assert roles == sorted(roles, reverse=True) and set(roles) == {"user", "assistant"}
        assert all(s.loss == (s.role == "assistant") for s in record.segs)
        assert [s.i for s in record.segs if isinstance(s, Img)] == list(range(len(record.imgs)))
        for scene, image in zip(scenes(record), decoded_images(record)):
            if record.meta["tag"] != "zoom" or scene != scenes(record)[0]:
                assert (generator.draw(scene, 16) == image).all()
        request, answers = request_and_answers(record)
        key = "caption" if task == "caption" else record.meta["tag"]
        forms = enumerate(patterns(key))
        fits = [(len(form), k) for k, form in forms if re.fullmatch(form, request)]
        requests[key].add(max(fits)[1])
        assert all(answer and answer == answer.strip() for answer in answers)
        assert len(answers) == (task not in ("edit", "copy"))
    assert tags == dict.fromkeys(TAGS[task], 20)
    assert all(wordings == {0, 1, 2} for wordings in requests.values()), requests


def test_every_request_has_three_wordings():
    assert set(WORDINGS) == {"caption", "quiz", *reasoning.FREE_REASONS}.union(
        *(TAGS[t] for t in TAGS if t != "caption")
    )
    assert set(TERSE) == set(tasks.QUESTIONS)
    for forms in WORDINGS.values():
        assert len(set(forms)) == generator.WORDINGS == 3
        assert len({frozenset(re.findall(r"\{(\w+)\}", f.lower())) for f in forms}) == 1


def test_captions_describe_every_object():
    for record in task_records("caption", 120):
        (scene,), (_, (answer,)) = scenes(record), request_and_answers(record)
        assert f"{scene.background} background" in answer
        rest = answer.replace(scene.background, "plain")
        counts, zero = Counter(), []
        tags = re.findall(rf"(\w+) ({COLOR}) (?:\w+ )?({'|'.join(generator.NUMBERS)})\b", rest)
        phrases = re.findall(rf"(\w+) \w+ ({COLOR}) (\w+)", rest)
        for number, color, noun in [(n, c, s) for s, c, n in tags] if tags else phrases:
            if number == "zero":
                zero.append((color, noun))
                continue
            shape = noun if noun in generator.SHAPES else re.sub("(?<=s)es$|s$", "", noun)
            counts[color, shape] += 1 if number == "a" else generator.NUMBERS.index(number)
        assert counts == kinds(scene) and not set(zero) & set(counts)
        assert all({c for c, _ in counts} >= {c} and {n for _, n in counts} >= {n} for c, n in zero)
        facts = json.loads(record.meta["geneval"])
        assert facts["prompt"] == answer
        for entry in facts["include"]:
            if "position" in entry:
                a, b = (next(o for o in scene.objects if o.shape == e["class"]) for e in
                        (entry, facts["include"][entry["position"][1]]))  # fmt: skip
                assert entry["position"][0] == generator.relation(a, b)


def oracle(tag, request, objects, scene):
    """Return the answer, from the words of the request and the scene alone."""
    colors = re.findall(rf"\b({COLOR})\b", request)
    shapes = re.findall(rf"\b({SHAPE})(?:s|es)?\b", request)
    mentioned = [
        next((o for o in objects if (o.color, o.shape) == pair), None)
        for pair in PAIR.findall(request)
    ]
    match = [o for o in objects if o.shape in shapes or (not shapes and o.color in colors)]
    if tag in ("color", "shape", "size"):
        (item,) = [w for w in mentioned if w] or match
        return getattr(item, tag)
    if tag == "count":
        return generator.NUMBERS[len(match)]
    if tag == "exists":
        return "yes" if mentioned[0] else "no"
    if tag == "background":
        return scene.background
    if "relation" in tag and len(mentioned) == 1:  # a terse request means the other object
        mentioned.append(objects[1 - objects.index(mentioned[0])])
    if tag == "relation":
        a, b = reversed(mentioned) if request.startswith("Seen from") else mentioned
        return generator.relation(a, b)
    assert tag == "is_relation"
    return "yes" if generator.relation(*mentioned) in request else "no"


@pytest.mark.fast
def test_questions_are_answered_correctly():
    answers = defaultdict(Counter)
    for record in task_records("question", 400):
        (scene,), (request, (answer,)) = scenes(record), request_and_answers(record)
        tag = record.meta["tag"]
        assert answer == oracle(tag, request, scene.objects, scene), (request, scene)
        answers[tag][answer] += 1
    for tag, num_answers in (
        ("color", 8),
        ("shape", 8),
        ("size", 3),
        ("count", 5),
        ("relation", 4),
    ):
        assert len(answers[tag]) == num_answers, answers[tag]
    for tag in ("exists", "is_relation"):
        assert min(answers[tag]["yes"], answers[tag]["no"]) > 12
    assert max(answers["count"].values()) < 0.6 * answers["count"].total()


def kind_of(words):
    """Return the kind of a question."""
    terse = [tag for tag, form in TERSE.items() if words.split()[0] == form.split()[0]]
    fits = [(len(form.replace(".+", "")), tag) for tag in tasks.QUESTIONS
            for form in patterns(tag) if re.fullmatch(form, words)]  # fmt: skip
    return max(fits)[1] if fits else terse[0]


@pytest.mark.parametrize("task", ["dialog", "quiz"])
def test_dialogs_and_quizzes_ask_several_questions_about_one_image(task):
    """A dialog asks in the user's turns; a quiz is one turn, in which only answers are targets."""
    counts, kinds_seen = Counter(), Counter()
    for record in task_records(task, 80):
        records.check(record, record.id, pixels=True)
        (scene,), (image, *turns) = scenes(record), record.segs
        assert isinstance(image, Img) and not image.loss and len(record.imgs) == 1
        if task == "quiz":
            assert turns.pop(0).s in WORDINGS["quiz"]
        questions, answers = turns[::2], turns[1::2]
        assert len({s.s for s in questions}) == len(questions) == len(answers)
        for number, (question, answer) in enumerate(zip(questions, answers)):
            role = "user" if task == "dialog" else "assistant"
            assert (question.role, question.loss) == (role, False)
            assert (answer.role, answer.loss) == ("assistant", True)
            words, reply = question.s, answer.s
            if task == "quiz":
                assert words.startswith("\n") == (number > 0) and reply.startswith(" ")
                words, reply = words.strip(), reply[1:]
            tag = kind_of(words)
            assert reply == oracle(tag, words, scene.objects, scene), (question, scene)
            kinds_seen[tag] += 1
        counts[record.meta["tag"], len(questions) > 1] += 1
    assert set(kinds_seen) == set(tasks.QUESTIONS)
    assert all(counts[tag, True] > 20 for tag in tasks.DIALOGS), counts


@pytest.mark.fast
def test_edits_change_what_they_say_and_nothing_else():
    changes = Counter()
    for record in task_records("edit", 75, pixels=64):
        source, target = scenes(record)
        request, tag = request_and_answers(record)[0], record.meta["tag"]
        assert (source.background, source.ramp) == (target.background, target.ramp)
        removed, new = (
            (set(source.objects) - set(target.objects)),
            (set(target.objects) - set(source.objects)),
        )
        changes[tag, len(removed), len(new)] += 1
        for item in removed:
            assert f"{item.color} {item.shape}" in request
        for item, old in itertools.product(new, removed):
            equal_keys = {k for k in ("shape", "color", "size", "x", "y")
                    if getattr(item, k) == getattr(old, k)}  # fmt: skip
            assert {"recolor": {"shape", "size", "x", "y"}, "replace": {"size", "x", "y"},
                    "move": {"shape", "color", "size"}}[tag] == equal_keys  # fmt: skip
        if tag in ("add", "move"):
            (item,) = new
            anchor = PAIR.findall(request)[1]
            (anchor,) = [o for o in target.objects if (o.color, o.shape) == anchor]
            assert generator.relation(item, anchor) in request
        source_image, target_image = decoded_images(record)
        facts = json.loads(record.meta["geneval"])
        assert detector.judge(target_image, facts).correct
        assert not detector.judge(source_image, facts).correct, (tag, source, target)
    assert changes == {
        ("recolor", 1, 1): 15, ("add", 0, 1): 15, ("remove", 1, 0): 15, ("move", 1, 1): 15,
        ("replace", 1, 1): 15,
    }  # fmt: skip


def test_reasoning_goes_through_an_image():
    answers = defaultdict(Counter)
    for record in task_records("reason", 90, pixels=64):
        kinds_seen = [type(s) for s in record.segs if s.role == "assistant"]
        assert kinds_seen == [Img, Text]
        request, (answer,) = request_and_answers(record)
        tag, (source, helpful) = record.meta["tag"], decoded_images(record)
        answers[tag][answer] += 1
        detections = detector.detect(helpful)
        color = re.findall(rf"({COLOR}) objects?", request)
        if tag == "zoom":
            assert (answer, color[0]) in [(item.shape, item.color) for item in detections]
            (item,) = [o for o in scenes(record)[0].objects if o.color == color[0]]
            (zoomed,) = [f for f in detections if (f.shape, f.color) == (item.shape, item.color)]
            (original,) = [f for f in detector.detect(source) if f.color == item.color]
            assert zoomed.box[3] - zoomed.box[1] == pytest.approx(
                2 * (original.box[3] - original.box[1]), abs=0.1
            )
            continue
        assert detector.judge(helpful, json.loads(record.meta["geneval"])).correct
        if tag == "count_after_removal":
            assert len(detections) == len(detector.detect(source)) - 1
        else:
            color = color or re.findall(rf"be ({COLOR})\?", request)
            detections = [item for item in detections if item.color == color[0]]
        assert answer == generator.NUMBERS[len(detections)]
    assert len(answers["zoom"]) == 8 and len(answers["count_after_removal"]) == 3
    assert len(answers["count_after_edit"]) >= 3


def test_questions_across_images_have_one_answer():
    answers = defaultdict(Counter)
    for record in task_records("multi", 120):
        record_scenes, (request, (answer,)) = scenes(record), request_and_answers(record)
        assert len(record_scenes) == len(record.imgs) in (2, 3)
        tag, counts = record.meta["tag"], [len(scene.objects) for scene in record_scenes]
        answers[tag][answer] += 1
        if tag == "same_shape":
            assert answer == (
                "yes" if len({s.objects[0].shape for s in record_scenes}) == 1 else "no"
            )
        elif tag == "total":
            assert answer == generator.NUMBERS[sum(counts)]
        else:
            fits = [PAIR.findall(request)[0] in kinds(scene) for scene in record_scenes] if (
                tag == "which_shows") else [count == max(counts) for count in counts]  # fmt: skip
            assert sum(fits) == 1 and answer == ("first", "second", "third")[fits.index(True)]
    assert {tag: len(counter) for tag, counter in answers.items()} == {
        "same_shape": 2, "which_shows": 3, "which_has_most": 3, "total": 4,
    }  # fmt: skip


def test_text_records_need_no_image():
    for record in task_records("text", 90):
        assert not record.imgs
        request, (answer,) = request_and_answers(record)
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
            shape = re.findall(rf"({SHAPE})\W?(?: have\?)?$", request)[0]
            assert answer == {a.shape: a.color, b.shape: b.color}[shape]


def test_an_eighth_of_pairs_and_combinations_is_withheld():
    assert len(set(holdout.PAIRS)) == len(generator.COLORS) * len(generator.SHAPES) // 8
    assert {color for color, _ in holdout.PAIRS} == set(generator.COLORS)
    assert {shape for _, shape in holdout.PAIRS} == set(generator.SHAPES)
    objects = [
        generator.Object(shape, color, "small", 0.5, 0.5)
        for shape, color in itertools.product(generator.SHAPES, generator.COLORS)
    ]
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    num_withheld, included = 0, set()
    for a, b in itertools.product(objects, repeat=2):
        for relation in generator.RELATIONS:
            withheld = holdout.is_withheld_combination(a, relation, b)
            assert withheld == holdout.is_withheld_combination(b, back[relation], a)
            num_withheld += withheld
            if not withheld:
                included |= {(a.shape, relation, b.shape), (a.color, relation, b.color)}
    assert num_withheld == 64 * 64 * 4 // 8
    assert len(included) == 2 * 8 * 4 * 8


@pytest.mark.fast
@pytest.mark.parametrize("task", tasks.TASKS)
def test_withheld_content_never_occurs_unless_it_is_requested(task):
    def has_withheld(record):
        raw = record.meta.get("scenes") or f"[{record.meta['scene']}]"
        objects = [[generator.Object(**o) for o in scene["objects"]] for scene in json.loads(raw)]
        words = {pair for pair in PAIR.findall(records.text(record).lower())}
        # Tags give the shape first.
        words |= {(c, n) for n, c in re.findall(rf"\b({SHAPE}) ({COLOR}) ", records.text(record))}
        pairs = words | {(o.color, o.shape) for scene in objects for o in scene}
        if pairs & set(holdout.PAIRS):
            return True
        for a, b in (pair for scene in objects for pair in itertools.permutations(scene, 2)):
            if generator.relation(a, b) and holdout.is_withheld_combination(
                a, generator.relation(a, b), b
            ):
                return True
        relations = "|".join(generator.RELATIONS)
        pattern = rf"the ({COLOR}) ({SHAPE}) (?:lie |is )?({relations}) the ({COLOR}) ({SHAPE})"
        mentioned = re.findall(pattern, records.text(record))
        for c, n, relation in re.findall(
            rf"true ({COLOR}) ({SHAPE}) ({relations})", records.text(record)
        ):
            # A quiz means the other of two objects.
            (other,) = [o for o in objects[0] if (o.color, o.shape) != (c, n)]
            mentioned.append((c, n, relation, other.color, other.shape))
        for c, n, relation, d, m in mentioned:
            a, b = (
                generator.Object(shape, color, "small", 0.5, 0.5)
                for shape, color in ((n, c), (m, d))
            )
            if holdout.is_withheld_combination(a, relation, b):
                return True
        return False

    flags = [has_withheld(r) for r in task_records(task, 60, withheld="none", pixels=8)]
    assert 0 < sum(flags) < 60
    assert not any(has_withheld(r) for r in task_records(task, 120, withheld="leave_out", pixels=8))
    for record in task_records(task, 60, withheld="only", pixels=8):
        assert has_withheld(record) and record.meta.get("withheld") != "none"


def run(verb, *words):
    values = flags.FlagValues()
    prepare.define(values)
    values(["prepare", *map(str, words)])
    return getattr(prepare, verb)(values)


def test_imported_records_equal_generated_ones(tmp_path):
    words = ("--format", "shapes", "--pixels", 16, "--n", 14, "--seed", 4)
    all_tasks = ("--tasks", ",".join(tasks.TASKS), "--withheld", "leave_out")
    run("import_", *words, *all_tasks, "--out", tmp_path / "all")
    expected = tasks.make_records(4, 14, 16, withheld="leave_out")
    assert list(records.read(tmp_path / "all")) == list(expected)
    assert list(records.validate(tmp_path / "all")) == []
    assert run("import_", *words, *all_tasks, "--out", tmp_path / "all")["was"] == "complete"
    with pytest.raises(DatasetError, match="exists"):
        run("import_", *words, *all_tasks, "--withheld", "none", "--out", tmp_path / "all")

    run("import_", *words, "--out", tmp_path / "plain")
    plain = records.read(tmp_path / "plain")
    assert list(plain) == list(generator.make_records(4, 14, 16))
    assert set(plain.manifest.importer.options) == {"label", "seed", "n", "pixels", "tags"}
    only = ("--withheld", "only", "--tags", "colors", "--label", "pair")
    run("import_", *words, *only, "--out", tmp_path / "only")
    labels = {r.meta["label"] for r in records.read(tmp_path / "only")}
    names = generator.classes("pair")
    assert {names[k] for k in labels} <= {" ".join(pair) for pair in holdout.PAIRS}
    for wrong_flags, message in (
        (("--tasks", "caption,poem"), r"--tasks: unknown \['poem'\]"),
        (("--tasks", "caption,caption"), "named twice"),
        (("--tasks", "caption", "--label", "shape"), "only --tasks t2i has classes"),
    ):
        with pytest.raises(ValueError, match=message):
            run("import_", *words, *wrong_flags, "--out", tmp_path / "none")
    with pytest.raises(ValueError, match="--withheld some"):
        next(tasks.make_records(0, 1, 16, tasks=["text"], withheld="some"))
    assert sorted(os.listdir(tmp_path)) == ["all", "only", "plain"]
