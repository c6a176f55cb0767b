"""Tests of the README's five commands on a user's own images."""

import runpy
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.markdown import blocks
from helpers.paths import ROOT
from helpers.starflow2_folders import PIXELS
from helpers.training_runs import environment
from PIL import Image

from starflow2_jax.checkpoints import model_folder, orbax
from starflow2_jax.data import images
from starflow2_jax.inference import load
from starflow2_jax.training.logging import run_log

SMALL = {
    "train": [
        *("--config.train.steps=2", "--config.train.batch_size=2", "--config.checkpoint.every=2"),
        *("--config.text.length=96", "--config.text.images=2", "--config.sample.count=2"),
        *("--config.sample.every=2", "--config.log.every=1", "--config.train.ema=0.5"),
    ],
    "generate": ["--n=1"],
}


def commands():
    """Return the arguments of python in each of the README's five commands."""
    (block,) = [
        block.lines() for block in blocks(ROOT / "README.md") if "finetune.py" in block.text
    ]
    lines = [shlex.split(line) for line in block]
    assert len(lines) == 5
    return [line[1:] for line in lines]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A model folder that holds everything."""
    path = tmp_path_factory.mktemp("model") / "whole"
    load.export(parts[1], str(path))
    return path


def test_a_model_is_finetuned_on_images_with_captions(folder, tmp_path):
    source = tmp_path / "my_images"
    source.mkdir()
    for i, color in enumerate(("red", "blue", "green", "white")):
        # Of another size than the codec's.
        pixels = np.full((24, 20, 3), 60 * i, np.uint8)
        (source / f"{i}.png").write_bytes(images.encode_png(pixels))
        (source / f"{i}.txt").write_text(f"a {color} circle")
    for words in commands():
        verb = words[1].removeprefix("starflow2_jax.")
        words = [
            f"{ROOT}/{w}:{folder}" if w == "experiments/finetune.py" else w for w in words
        ] + SMALL.get(verb, [])
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (verb, done.stderr[-2000:])
        assert verb != "train" or f"started from the weights of {folder}" in done.stdout
    run = tmp_path / "runs" / "my_run"
    # It reads with the folder's VLM and draws with its codec, and has moved from its weights.
    meta, exported_config = orbax.read_meta(run), model_folder.read_config(folder)
    assert meta["frozen"] == exported_config["frozen"]
    cfg = run_log.read_config(run)
    assert cfg["vlm"]["path"] == str(folder / "vlm") and cfg["fae"]["path"] == str(folder / "fae")
    assert (
        cfg["noise"] == {**exported_config["noise"], "context_sigma": 0.0}
        and cfg["model"]["flow"] == exported_config["model"]["flow"]
    )
    before, tuned = load.load(str(folder)), load.load(str(run))
    for name in ("adapter", "shallow", "deep", "skip"):
        expected, actual = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(m.params[name])])
                        for m in (before, tuned))  # fmt: skip
        assert 0 < np.abs(expected - actual).max() < 0.1, name
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["00000002.png"] and (tmp_path / "sheet.png").exists()
    assert "samples, step 2" in (run / "report.html").read_text()
    (grid,) = (tmp_path / "samples").glob("*.png")
    with Image.open(grid) as image:
        assert image.size == (PIXELS, PIXELS)


def test_the_shipped_model_is_the_default():
    module = runpy.run_path(str(ROOT / "experiments" / "finetune.py"))
    assert module["get_config"].__defaults__ == ("pretrained/starflow2_tiny",)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module["get_config"](str(ROOT / "nowhere"))
