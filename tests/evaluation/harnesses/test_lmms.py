"""lmms-eval's own command line with the plugin, next to this package's evaluation.

`bash launch/test.sh --lmms` runs it. Without an interpreter in `STARFLOW2_LMMS_PYTHON` it installs
lmms-eval into an environment of its own, which takes minutes and the network.
"""

import subprocess

import pytest
from helpers import lmms_task

pytestmark = pytest.mark.lmms

MODEL = "pretrained/starflow2_tiny"
RESOLVE = """
from lmms_eval.models import get_model, get_model_manifest
manifest = get_model_manifest("starflow2")
assert manifest.model_id == "starflow2_jax", manifest
simple, chat = (get_model("starflow2_jax", force_simple=value) for value in (True, False))
assert simple.is_simple and not chat.is_simple and simple.loglikelihood
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return lmms_task.install(tmp_path_factory.mktemp("lmms") / "venv")


def test_the_plugin_resolves(python):
    # lmms-eval only warns of a plugin that it cannot import.
    subprocess.run([python, "-c", RESOLVE], check=True)


def test_answers_are_those_of_this_package(python, tmp_path):
    rows = lmms_task.write(tmp_path, python, pixels=64)
    questions, choices = lmms_task.QUESTIONS, lmms_task.CHOICES
    chat = lmms_task.run(tmp_path, python, MODEL, [questions])
    simple = lmms_task.run(tmp_path, python, MODEL, [questions, choices], "--force_simple")
    print(chat[2][-1500:], simple[2][-2500:], sep="\n")  # the tables of the results
    answers = [sample["filtered_resps"] for sample in chat[1][questions]]
    assert answers == [sample["filtered_resps"] for sample in simple[1][questions]]

    data = str(tmp_path / "records")
    shapes = lmms_task.evaluate(
        "shapes", "--model", MODEL, "--only", "understanding", "--data", data,
        "--out", str(tmp_path / "shapes.json"),
    )  # fmt: skip
    expected = {row["id"]: row["answer"] for row in shapes["samples"]["understanding"]}
    assert answers == [expected[row.id] for row in rows]
    correct = sum(row["correct"] for row in shapes["samples"]["understanding"])
    figures = chat[0]["results"][questions]
    assert figures["exact_match,none"] == pytest.approx(correct / len(rows))
    understanding = lmms_task.evaluate(
        "understanding", "--model", MODEL, "--data", data, "--out", str(tmp_path / "vqa.json")
    )
    assert understanding["kinds"]["all"]["correct"] == pytest.approx(correct / len(rows), abs=1e-4)
    # The likeliest choice is the answer of greedy decoding wherever that is one of the choices.
    scores = simple[0]["results"][choices]["acc,none"]
    assert scores >= figures["exact_match,none"] > 0.5
