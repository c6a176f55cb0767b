"""The notebook of the tour is its page, and its cells run one after the other."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers.markdown import blocks
from helpers.paths import ROOT

PAGE, NOTEBOOK = ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.ipynb"
# Sizes that do not matter to what is tested.
SMALLER = {"train.steps=20": "train.steps=2", "checkpoint.every=20": "checkpoint.every=2",
           "--n 256": "--n 48", "log.every=5": "log.every=1 --config.train.batch_size=4",
           "n=4,": "n=1,", "[question] * 4": "[question]"}  # fmt: skip
# Runs the cells of a notebook, as Jupyter would, and shows the value of each last expression.
RUNNER = """
import ast, json, subprocess, sys
names = {}
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        continue
    if source.startswith("%%bash"):
        subprocess.run(["bash", "-e", "-c", source.partition("\\n")[2]], check=True)
        continue
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body.append(last)
    exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        print(f"cell {number}: {type(value).__name__}")
"""


def cells():
    return [
        (c["cell_type"], "".join(c["source"])) for c in json.loads(NOTEBOOK.read_text())["cells"]
    ]


def test_the_notebook_is_its_page():
    code = [text for kind, text in cells() if kind == "code"]
    prefix = {"python": "", "bash": "%%bash\n"}
    assert code == [prefix[b.language] + b.text.rstrip("\n") for b in blocks(PAGE)]
    texts = [text for kind, text in cells() if kind == "markdown"]
    prose = re.sub(r"^---\n.*?^---\n", "", PAGE.read_text(), flags=re.S | re.M)
    prose = re.sub(r"^```.*?^```$", "", prose, flags=re.S | re.M)
    assert "\n".join(texts).split() == prose.split(), "run `python docs/make_notebook.py`"
    stored = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in stored)


def test_the_script_writes_the_notebook():
    pytest.importorskip("jupytext", reason="needs the extra docs")
    code = "import make_notebook as m, nbformat; print(nbformat.writes(m.notebook()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == json.loads(NOTEBOOK.read_text())


@pytest.mark.slow
def test_the_cells_run(tmp_path):
    text = NOTEBOOK.read_text()
    for old, new in SMALLER.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "tour.ipynb").write_text(text)
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    # A link to an interpreter would not be in its virtual environment.
    script.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, "tour.ipynb"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    kinds = re.findall(r"cell \d+: (\w+)", result.stdout)
    assert kinds == ["Image", "list", "list", "Image", "Image"]
    # Seven numbers of nats: one drawing, three answers, three captions.
    assert len(re.findall(r"-?\d+\.\d+ nats", result.stdout)) == 7
