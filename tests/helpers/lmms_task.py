"""A task of lmms-eval with a dozen questions of the shapes benchmark, in local files alone."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.paths import ROOT
from starflow2_jax.data import records
from starflow2_jax.data.records import Record, Text
from starflow2_jax.shapes import tasks as shapes_tasks

# An interpreter that has lmms-eval and this package already.
PYTHON_VARIABLE = "STARFLOW2_LMMS_PYTHON"
# What lmms-eval 0.7.3 imports; its own requirements name 45 packages more.
PACKAGES = (
    "torch==2.13.0", "transformers>=5.0,<6", "accelerate", "datasets", "evaluate",
    "huggingface_hub", "sacrebleu", "loguru", "tenacity", "pytz", "pyyaml", "jinja2", "pandas",
    "pydantic", "aiohttp", "dill", "requests", "tqdm", "packaging", "pillow", "numpy",
    "pytablewriter", "filelock>=3.16,<4",  # 4 has no _api, which lmms-eval 0.7.3 patches
)  # fmt: skip
QUESTIONS, CHOICES = "starflow2_shapes_questions", "starflow2_shapes_choices"
_UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]
"""
_YAML = """
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
task: {task}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{rest}
"""
_REST = {
    QUESTIONS: """
generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    CHOICES: """
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
_BUILD = """
import json, sys
import datasets
rows = json.load(open(sys.argv[1]))
data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
datasets.DatasetDict({"test": data}).save_to_disk(sys.argv[2])
"""


def install(folder: Path) -> str:
    """Return an interpreter with lmms-eval and this package, in an environment of its own."""
    if python := os.environ.get(PYTHON_VARIABLE):
        return python
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", "lmms-eval==0.7.3"], check=True)
    subprocess.run([*pip, str(ROOT)], check=True)
    return python


def write(folder: Path, python: str, pixels: int, count: int = 12) -> list[Record]:
    """Write dataset, tasks and records (in `folder/records`) of questions; return the records."""
    rows = list(shapes_tasks.make_records(7, count, pixels, tasks=["question"]))
    records.write(folder / "records", rows)
    answers = sorted({_texts(row)[1] for row in rows})
    documents = []
    for i, row in enumerate(rows):
        image = folder / "images" / f"{i}.png"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(row.imgs[0].data)
        question, answer = _texts(row)
        documents.append({"image": str(image), "question": question, "answer": answer,
                          "choices": answers, "number": answers.index(answer)})  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(documents))
    command = [python, "-c", _BUILD, str(folder / "rows.json"), str(folder / "data")]
    subprocess.run(command, check=True)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(_UTILS)
    for task, output_type, target in (
        (QUESTIONS, "generate_until", "{{answer}}"),
        (CHOICES, "multiple_choice", "number"),
    ):
        text = _YAML.format(data=folder / "data", task=task, output_type=output_type,
                            target=target, rest=_REST[task])  # fmt: skip
        (tasks / f"{task}.yaml").write_text(text)
    return rows


def run(
    folder: Path, python: str, model: str, tasks: Sequence[str], *flags: str
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], str]:
    """Run lmms-eval's own command line; return its results, its samples by task, and its output."""
    out = folder / f"out{len([*folder.iterdir()])}"
    command = [
        *(python, "-m", "lmms_eval", "--model", "starflow2_jax"),
        *("--model_args", f"pretrained={model}", "--tasks", ",".join(tasks)),
        *("--include_path", str(folder / "tasks"), "--batch_size", "12"),
        *("--output_path", str(out), "--log_samples", *flags),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=folder)
    # lmms-eval may end with status 0 after an error.
    is_complete = not result.returncode and any(out.rglob("*_results.json"))
    assert is_complete, result.stdout[-2000:] + result.stderr[-6000:]
    results = json.loads(next(out.rglob("*_results.json")).read_text())
    samples = {}
    for task in tasks:
        lines = next(out.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        samples[task] = sorted(map(json.loads, lines), key=lambda row: row["doc_id"])
    return results, samples, result.stdout


def evaluate(*words: str) -> dict[str, Any]:
    """Return the JSON of a command of this package."""
    command = [sys.executable, "-m", "starflow2_jax.evaluate", *words, "--json"]
    return json.loads(subprocess.run(command, check=True, text=True, capture_output=True).stdout)


def _texts(record: Record) -> tuple[str, str]:
    question, answer = (segment.s for segment in record.segs if isinstance(segment, Text))
    return question, answer
