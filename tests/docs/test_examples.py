"""Tests that run the code blocks of README.md and docs/ which a CPU can run.

A block runs as it stands, in bash or python, in an empty folder. Only sizes are reduced: `python`
is a script that appends the flags in SMALLER to the commands that have them. Blocks that are marked
`<!-- skip-test: REASON -->` do not run. test_data_page.py and test_finetune.py run the blocks on a
user's own data, and test_tour.py those of the tour.
"""

import os
import subprocess
import sys

import pytest
from helpers.markdown import PAGES, blocks
from helpers.paths import ROOT

SMALLER = {
    "starflow2_jax.prepare import": "--n=48",
    "starflow2_jax.train --config": "--config.train.steps=2 --config.train.batch_size=8"
    " --config.sample.every=0 --config.evaluate.rows=8 --config.evaluate.batch_size=8",
    "starflow2_jax.evaluate likelihood": "--rows=8",
}
RUN_ELSEWHERE = ("experiments/finetune.py", "rows.jsonl")
# The blocks of this page share their variables; test_tour.py runs them.
TOUR = ROOT / "docs" / "tour.md"


def examples():
    """Return the blocks to run, equal ones once."""
    chosen = {}
    for page in PAGES:
        if page == TOUR:
            continue
        for block in blocks(page):
            elsewhere = any(text in block.text for text in RUN_ELSEWHERE)
            if block.language in ("bash", "python") and not block.skip and not elsewhere:
                chosen.setdefault(block.text, block)
    return list(chosen.values())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return the variables of the examples; their programs are compiled once, and quickly."""
    folder = tmp_path_factory.mktemp("bin")
    cases = "\n".join(
        f'  *"{command} "*) set -- "$@" {flags} ;;' for command, flags in SMALLER.items()
    )
    script = folder / "python"
    script.write_text(f'#!/bin/bash\ncase "$* " in\n{cases}\nesac\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def name_of(block):
    return f"{block.page.stem}: {block.text.splitlines()[0][:60]}"


@pytest.mark.parametrize("block", examples(), ids=name_of)
def test_the_block_runs(block, environment, tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    shell = {"bash": ["bash", "-e", "-o", "pipefail"], "python": ["python"]}[block.language]
    result = subprocess.run(
        [*shell, "-c", block.text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    if "--out images/" in block.text:
        assert len(list(tmp_path.glob("images/*.png"))) == 4
