"""Judging of trees by a fake judge: what is asked, kept and counted, and what the scores are.

The files that stand for a benchmark's checkout have the real names and forms, and texts of ours.
"""

import hashlib
import json
import math
import re

import pyarrow as pa
import pytest
from absl import flags
from helpers import fake_judge
from helpers.fake_judge import pictures, save, score, texts
from pyarrow import parquet

from starflow2_jax import evaluate
from starflow2_jax.evaluation.judges import official, rise, run
from starflow2_jax.evaluation.judges.client import KEY_VARIABLE, JudgeError
from starflow2_jax.evaluation.judges.protocols import PROTOCOLS

pytestmark = pytest.mark.fast

WISE_SOURCE = '''
def build_evaluation_messages(prompt_data: dict, image_base64: str) -> list:
    raise SystemExit("this file must not run")
    return [
        {"role": "system", "content": [{"type": "text", "text": "You judge."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f"""Rules {{0, 1}}.
PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}"
"""},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
        ]},
    ]
'''


@pytest.fixture
def wise(tmp_path):
    """Six prompts of WISE, their images, and a checkout."""
    items = [
        {"Prompt": f"a {i}", "Explanation": f"an {i}!", "Subcategory": "x", "prompt_id": i}
        for i in (1, 2, 401, 560, 701, 950)
    ]
    (tmp_path / "items.json").write_text(json.dumps(items))
    for item in items:
        save(tmp_path / "tree" / f"{item['prompt_id']}.png", item["prompt_id"] % 256)
    for name in ("WISE_legacy/gpt_eval.py", "vllm_eval.py"):
        (tmp_path / "official" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "official" / name).write_text(WISE_SOURCE)
    return tmp_path


def test_wise_is_scored_by_category_and_replies_are_kept(wise, monkeypatch):
    replies = {"a 1": "Consistency: 2\nRealism: 1\nAesthetic Quality: 0", "a 2": "2\n2\n2\n",
               "a 401": "**Consistency**: 1\n**Realism**: 0\n**Aesthetic Quality**: 2"}  # fmt: skip

    def answer(body):
        prompt = re.search(r'PROMPT: "(.*)"', texts(body)[1])[1]
        return 200, replies.get(prompt, "I cannot say.")

    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with fake_judge.serve(answer) as (url, requests):
        result = score("wise", wise, url)
        # Three are read at once; the three others are asked three times, as the official file does.
        assert len(requests) == 3 + 3 * 3
        body = requests[0]
        assert body["path"] == "/v1/chat/completions" and body["key"] == "Bearer secret"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("fake", 0.0, 2000)
        assert [m["role"] for m in body["messages"]] == ["system", "user"]
        assert texts(body)[0] == "You judge." and texts(body)[1].startswith("Rules {0, 1}.\nPROMPT")
        assert [kind for kind, _ in pictures(body)] == ["image/png"]
        assert score("wise", wise, url) == result and len(requests) == 12  # nothing is asked twice
    assert (result["items"], result["scored"]) == (6, 3)
    assert {row["item"] for row in result["unparsable"]["items"]} == {"560", "701", "950"}
    assert result["scores"]["1"]["score"] == pytest.approx((1.4 + 0.2) / 2)
    culture = (0.8 + (1.4 + 0.4 + 0.2) / 2) / 2
    assert result["groups"]["culture"]["score"] == pytest.approx(culture)
    assert result["overall"] == {}  # some categories have no scored item
    lines = (wise / "out" / "replies.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 12 and {row["item"] for row in rows} == {"1", "2", "401", "560", "701",
                                                                "950"}  # fmt: skip
    assert "secret" not in "".join(lines) + json.dumps(result)
    assert "3 with replies that cannot be read" in run.summary_lines(result)[0]


def test_the_versions_of_wise_differ(wise):
    with fake_judge.serve(lambda body: (200, "<think>Score: 0</think>\nScore: 1")) as (url, sent):
        result = score("wise_verified", wise, url)
    assert sent[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert result["scored"] == 6 and set(result["groups"]) == {"culture", "time", "space",
                                                               "biology", "chemistry"}  # fmt: skip
    groups = {name: {"score": 0.5} for name in (*result["groups"], "physics")}
    assert PROTOCOLS["wise_verified"].summarize(groups)["overall"] == pytest.approx(0.5)
    assert PROTOCOLS["wise"].summarize(groups)["overall"] == pytest.approx(0.5)
    assert PROTOCOLS["wise"].groups({"prompt_id": 560}) == ("time",)
    assert PROTOCOLS["wise_verified"].groups({"prompt_id": 560}) == ("space",)


def test_an_incomplete_tree_is_not_judged(wise):
    (wise / "tree" / "2.png").unlink()
    (wise / "tree" / "401.png").write_bytes((wise / "tree" / "401.png").read_bytes()[:40])
    with (
        fake_judge.serve(lambda body: (200, "Score: 1")) as (url, requests),
        pytest.raises(run.IncompleteTree) as error,
    ):
        score("wise", wise, url)
    assert not requests and len(error.value.problems) == 2
    assert re.search(r"missing: .*2\.png\n.*damaged: .*401\.png", str(error.value))


def test_a_tree_of_other_prompts_is_refused(wise):
    def write_stamp(sha256):
        settings = {"benchmark": "wise", "prompts": {"sha256": sha256, "count": 6}}
        (wise / "tree" / "settings.json").write_text(json.dumps(settings))

    with fake_judge.serve(lambda body: (200, "2\n2\n2")) as (url, requests):
        write_stamp("0" * 64)
        with pytest.raises(ValueError, match="drawn from other prompts: expected sha256 000"):
            score("wise", wise, url)
        assert not requests
        write_stamp(hashlib.sha256((wise / "items.json").read_bytes()).hexdigest())
        result = score("wise", wise, url)
    assert result["tree"]["stamp"]["benchmark"] == "wise" and result["scored"] == 6


def test_failures_are_retried_and_final_ones_keep_the_replies(wise):
    counts = {}

    def answer(body):
        prompt = texts(body)[1]
        counts[prompt] = counts.get(prompt, 0) + 1
        return (429 if counts[prompt] < 3 else 200), "Score: 1"

    with fake_judge.serve(answer) as (url, _):
        assert score("wise_verified", wise, url)["scored"] == 6
    with fake_judge.serve(lambda body: (401, "no")) as (url, requests):
        with pytest.raises(JudgeError, match=r"401"):
            score("wise", wise, url, out="other")
        assert len(requests) <= 3  # no second try, and the waiting items are not asked
    with pytest.raises(JudgeError):
        score("wise", wise, "http://127.0.0.1:9/v1", out="third")
    # A line that a killed process did not finish is asked again.
    path = wise / "out" / "replies.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    with fake_judge.serve(lambda body: (200, "Score: 0")) as (url, requests):
        result = score("wise_verified", wise, url)
    assert len(requests) == 1
    assert sorted(row["score"] for row in result["scores"].values()) == [0, 1, 1, 1, 1, 1]


def test_gedit_scores_semantics_and_quality(tmp_path):
    items = [
        {"key": str(i), "instruction": f"edit {i}", "instruction_language": "en" if i < 4 else "cn",
         "task_type": "color_alter" if i % 2 else "ps_human", "Intersection_exist": i < 2}
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "items.json").write_text(json.dumps(items))
    for item in items:
        folder = tmp_path / "tree/fullset" / item["task_type"] / item["instruction_language"]
        save(folder / f"{item['key']}_SRCIMG.png", 10, (12, 8))
        save(folder / f"{item['key']}.png", 20, (6, 6))
    table = pa.Table.from_pylist([{**row, "input_image": b"x"} for row in items])
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "0.parquet")
    assert PROTOCOLS["gedit"].items([tmp_path / "data"]) == items
    names = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule",
             "_prompts_0shot_tie_rule_SC", "_prompts_0shot_rule_PQ")  # fmt: skip
    path = tmp_path / "official/GEdit-Bench/viescore/vie_prompts.py"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(f'{n} = """{n} <instruction>"""' for n in names))

    def answer(body):
        if "_tie_rule_SC edit" in texts(body)[0]:
            return 200, '{"score": [9, 4],\n "reasoning": "He said "yes""}'
        return 200, "[1, 9]" if len(requests) % 2 else '```json\n{"score": 1}\n```'

    with fake_judge.serve(answer) as (url, requests):
        result = score("gedit", tmp_path, url)
    both = next(body for body in requests if len(pictures(body)) == 2)
    assert [kind for kind, _ in pictures(both)] == ["image/jpeg"] * 2
    assert [image.size for _, image in pictures(both)] == [(12, 8)] * 2  # the edit is scaled
    assert "temperature" not in both and both["max_tokens"] == 1400
    assert texts(both)[0].startswith("_context_no_delimit edit ")
    expected = {"G_SC": 4.0, "G_PQ": 1.0, "G_O": math.sqrt(4)}
    assert all(row == expected for row in result["scores"].values())
    assert result["overall"]["fullset/en G_O"] == result["overall"]["fullset/cn G_O"] == 2
    assert result["groups"]["intersection/en/ps_human"]["count"] == 1
    assert "intersection/cn G_O" not in result["overall"]


@pytest.mark.parametrize(
    ("bench", "reply", "expected"),
    [
        ("gedit", "no idea", None),
        ("gedit", '{"score": [11, 2]}', None),
        ("gedit", "7", [7]),
        ("imgedit", "Brief reasoning: fine.\nPrompt Compliance: 4\nVisual Naturalness: 2", [4, 2]),
        ("imgedit", "four", None),
        ("rise", "Because.\n\n**Final Score:** **4**", [4]),
        ("rise", "Final Score\n... **Final Scores**: 1, 0", [1, 0]),
        ("rise", "no score", None),
        ("wise", "Consistency: 2\nRealism: 3", None),
        ("wise_verified", "score: 2", None),
        ("wise_verified", "1", [1]),
    ],
)
def test_replies_are_read_or_counted_as_unreadable(bench, reply, expected):
    assert PROTOCOLS[bench].parse(reply) == expected


def test_imgedit_and_rise_are_scored(tmp_path):
    items = {"7": {"id": "animal/1.jpg", "prompt": "paint it", "edit_type": "adjust"}}
    (tmp_path / "items.json").write_text(json.dumps(items))
    save(tmp_path / "sources/animal/1.jpg", 9)
    save(tmp_path / "tree/7.png", 5)
    path = tmp_path / "official/Benchmark/Basic/prompts.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"adjust": "Do: <edit_prompt>."}))
    with fake_judge.serve(lambda body: (200, "A: 5\nB: 4\nC: 3")) as (url, requests):
        result = score("imgedit", tmp_path, url)
    assert texts(requests[0]) == ["Do: paint it."] and len(pictures(requests[0])) == 2
    assert result["overall"] == {"score": 4}

    item = {"index": "t_1", "category": "temporal_reasoning", "instruction": "grow {it}",
            "image": "a/1.png", "reference": "big"}  # fmt: skip
    free = {**item, "index": "t_2", "category": "spatial_reasoning", "consistency_free": 1}
    logic = {**item, "index": "l_1", "category": "logical_reasoning", "reference_img": "a/2.png"}
    (tmp_path / "items.json").write_text(json.dumps([item, free, logic]))
    for name in ("1", "2"):
        save(tmp_path / f"sources/a/{name}.png", 1, (1000, 500))
    save(tmp_path / "tree/images/temporal_reasoning/t_1.jpg", 1)
    save(tmp_path / "tree/images/spatial_reasoning/t_2.png", 2)
    save(tmp_path / "tree/images/logical_reasoning/l_1.png", 3)
    (tmp_path / "official/utils.py").write_text(
        "\n".join(f'{n} = """{n}|{{instruct}}|{{reference}}"""' for n in rise.PROMPT_NAMES)
    )

    def answer(body):
        name = texts(body)[0].split("|")[0]
        numbers = {"consist": 5, "reasoning": 1, "generation": 5, "logical_img": 1,
                   "logical_cons": 0}  # fmt: skip
        return 200, f"Final Score: {numbers.get(name.removeprefix('prompt_'), 3)}"

    with fake_judge.serve(answer) as (url, requests):
        result = score("rise", tmp_path, url, out="rise")
    assert any(texts(body) == ["prompt_reasoning|grow {it}|big"] for body in requests)
    assert all(max(image.size) <= 768 for body in requests for _, image in pictures(body))
    assert requests[0]["messages"][-1]["content"][-1]["image_url"]["detail"] == "high"
    # A reasoning of 1 halves the score; logic counts 0 and 1 as 1 and 5.
    assert result["scores"]["t_1"]["score"] == pytest.approx((1.5 + 0.5 + 1) / 2)
    assert result["scores"]["t_2"] == pytest.approx(
        {"reasoning": 3, "quality": 3, "score": 3, "accuracy": 0}
    )
    assert result["scores"]["l_1"]["score"] == pytest.approx(0.3 * 1 + 0.7 * 5)
    assert len(requests) == 3 + 2 + 2


def test_prompts_are_read_without_running_code(tmp_path):
    path = tmp_path / "prompts.py"
    path.write_text("raise SystemExit\na = 'A {x} {{y}}'\nb = a + a\n")
    assert official.read_constants(path, ["a"]) == {"a": "A {x} {{y}}"}
    assert official.fill("A {x} {{y}}", {"x": "{x}"}) == "A {x} {y}"
    with pytest.raises(ValueError, match=r"no text is assigned to b, c"):
        official.read_constants(path, ["a", "b", "c"])
    with pytest.raises(ValueError, match="there is no function f"):
        official.read_messages(path, "f")
    path.write_text("def f(")
    with pytest.raises(ValueError, match="not a Python file"):
        official.read_messages(path, "f")


def test_the_command_writes_scores(wise, capsys):
    def run_command(*words):
        values = flags.FlagValues()
        evaluate.define(values)
        values(["evaluate", *map(str, words)])
        evaluate.main("judge", [], values)

    with fake_judge.serve(lambda body: (200, "Score: 1")) as (url, _):
        files = ("--tree", wise / "tree", "--prompts", wise / "items.json", "--official",
                 wise / "official", "--out", wise / "scores")  # fmt: skip
        words = ("--bench", "wise_verified", "--judge", url, *files)
        run_command(*words)
        result = json.loads((wise / "scores/scores.json").read_text())
        assert result["judge"] == {"model": "Qwen3.5-35B-A3B", "published_with": "Qwen3.5-35B-A3B"}
        assert result["protocol"]["checked_against"] == "eb51174"
        assert "6 of 6 items scored" in capsys.readouterr().out
        with pytest.raises(FileExistsError):
            run_command(*words)
    with pytest.raises(ValueError, match="--judge and --out are needed"):
        run_command(*files)
