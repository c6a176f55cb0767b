"""KRIS-Bench: what the judge is asked by category, and the scores of its replies."""

import json

import pytest
from helpers import fake_judge
from helpers.fake_judge import pictures, save, score, texts

from starflow2_jax.evaluation.judges import kris

pytestmark = pytest.mark.fast

ITEMS = {
    "color_change/1": {"ori_img": "1.jpg"},
    "anomaly_correction/1": {"ori_img": "1.jpg"},
    "viewpoint_change/2": {"ori_img": "2.jpg", "gt_img": "2_gt.jpg"},
    "temporal_prediction/1": {"ori_img": ["1-4.jpg", "1-1.jpg", "1-3.jpg"]},
    "physics/3": {"ori_img": "3.png", "explain_en": "It {falls}."},
    "abstract_reasoning/5": {"ori_img": "5.png", "explain_en": "Seven."},
    "multi-element_composition/6": {"ori_img": ["6-1.jpg", "6-2.jpg"]},
}


@pytest.fixture
def tree(tmp_path):
    """Return a folder with items of KRIS-Bench, a tree of edits, and a checkout of BAGEL."""
    rows = []
    for number, (name, row) in enumerate(ITEMS.items()):
        category, key = name.split("/")
        rows.append({"type": category, "id": key, "ins_en": f"edit {name}", **row})
        sources = row["ori_img"] if isinstance(row["ori_img"], list) else [row["ori_img"]]
        for source in (*sources, *filter(None, [row.get("gt_img")])):
            save(tmp_path / "sources" / category / source, 2)
        save(tmp_path / "tree" / f"{name}.png", number)
    (tmp_path / "items.json").write_text(json.dumps(rows))
    path = tmp_path / "official" / kris.PROMPTS
    path.parent.mkdir(parents=True)
    fields = "{{x}} {instruct}|{explanation}"
    lines = [
        f'{name} = "{name} " "{fields if "dual" in name else "{{x}} {instruct}"}"'
        for name in kris.PROMPT_NAMES
    ]
    path.write_text("\n".join([*lines, "raise SystemExit"]))
    return tmp_path


def test_categories_are_asked_in_their_own_ways(tree):
    def answer(body):
        name = texts(body)[0].split()[0]
        if name == "prompt_dual_evaluation":
            return 200, '{"instruction_score": 4, "instruction_reasoning": 1. no JSON\n' \
                        ' "knowledge_score": 2, "knowledge_reasoning": 1. the ball'  # fmt: skip
        if name == "prompt_quality":
            return 200, "5/5"
        key = "consistency_score" if "consist" in name else "instruction_score"
        return 200, f'1. Detect.\n```json\n{{"{key}": 3, "reasoning": "2 of 5"}}\n```'

    with fake_judge.serve(answer) as (url, requests):
        result = score("kris", tree, url)
    assert len(requests) == 3 * len(ITEMS) and result["scored"] == len(ITEMS)
    assert all(body["max_tokens"] == 1000 and "temperature" not in body for body in requests)
    labels = {}
    for body in requests:
        prompt, *rest = texts(body)
        assert len(pictures(body)) == len(rest) and {kind for kind, _ in pictures(body)} == {
            "image/jpeg"
        }
        labels.setdefault(prompt, []).append(rest)
    both = [kris.ORIGINAL, kris.EDITED]
    assert labels["prompt_consist {x} edit physics/3"] == [both]
    assert labels["prompt_dual_evaluation {x} edit physics/3|It {falls}."] == [both]
    assert labels["prompt_instruction_following {x} edit anomaly_correction/1"] == [both]
    assert labels["prompt_view_instruction_following {x} edit viewpoint_change/2"] == [
        [*both, kris.TRUTH]
    ]
    frames = [f"Frame {n} ({'Generated' if n == 2 else 'Reference'}):" for n in (1, 2, 3, 4)]
    for name in ("consist", "instruction"):
        assert labels[f"prompt_{name}_temporal {{x}} edit temporal_prediction/1"] == [frames]
        parts = ["Reference Image 1:", "Reference Image 2:", "Predicted Image:"]
        assert labels[f"prompt_{name}_multi {{x}} edit multi-element_composition/6"] == [parts]
    quality = [row[0] for row in labels["prompt_quality {{x}} {instruct}"]]
    assert quality.count(kris.ORIGINAL) == 2 and quality.count(kris.TO_EVALUATE) == 2

    assert result["scores"]["physics/3"] == {"VC": 50, "VQ": 100, "IF": 75, "KP": 25, "judged": 4,
                                             "sum": 250}  # fmt: skip
    assert result["overall"]["Attribute Perception"] == pytest.approx(200 / 3)
    # The mean is over single scores: items with knowledge have four, others three.
    assert result["overall"]["Procedural Knowledge"] == pytest.approx((250 + 200) / 7)
    assert result["overall"]["all"] == pytest.approx((2 * 250 + 5 * 200) / (2 * 4 + 5 * 3))
    assert result["judge"]["published_with"] == "gpt-4o-2024-11-20"


def test_a_folder_of_annotations_is_the_same(tree):
    rows = json.loads((tree / "items.json").read_text())
    for row in rows:
        path = tree / "bench" / row["type"] / "annotation.json"
        path.parent.mkdir(parents=True)
        fields = {key: value for key, value in row.items() if key not in ("type", "id")}
        path.write_text(json.dumps({row["id"]: fields}))
    items = kris.PROTOCOL.items([tree / "bench"])
    assert sorted(items, key=kris.PROTOCOL.name) == sorted(rows, key=kris.PROTOCOL.name)
    (tree / "items.json").write_text('[{"type": "object_count", "id": "1"}]')
    with pytest.raises(ValueError, match=r"unknown categories: \['object_count'\]"):
        kris.PROTOCOL.items([tree / "items.json"])


@pytest.mark.parametrize(
    ("names", "reply", "expected"),
    [
        (["quality_score"], '{"quality_score": 4, "reasoning": "x"}', [4]),
        (["quality_score"], '{"quality_score": "2"}', [2]),
        (["quality_score"], "**Quality Score**: **5**", [5]),
        (["quality_score"], 'reasoning: 1. Detect\n"quality_score": 3,', [3]),
        (["quality_score"], "3 out of 5", [3]),
        (["quality_score"], "4", [4]),
        (["quality_score"], "1. Detect: nothing to say", None),
        (["quality_score"], '{"quality_score": 7}', None),
        (["quality_score"], "quality_score: 1.5", None),
        (["quality_score"], "consistency_score: 4", None),
        (["instruction_score", "knowledge_score"], "instruction_score: 4", None),
        (["instruction_score", "knowledge_score"], '{"instruction_score": 4}', None),
        (
            ["instruction_score", "knowledge_score"],
            "Instruction Score: 4\nKnowledge Score: 1",
            [4, 1],
        ),
    ],
)
def test_replies_are_read_or_counted_as_unreadable(names, reply, expected):
    assert kris._parse(names, reply) == expected
