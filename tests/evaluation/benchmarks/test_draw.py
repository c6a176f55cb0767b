"""Benchmarks drawn by a tiny model through the command: shards, gaps, thinking, and the stamp."""

import json

import pytest
from absl import flags
from helpers import benchmark_files, kills
from helpers.starflow2_folders import PIXELS
from PIL import Image

from starflow2_jax import generate as command
from starflow2_jax.evaluation.benchmarks import draw
from starflow2_jax.inference import output
from starflow2_jax.inference.prompts import Part

ROWS = ("--batch_size", 4)  # Six prompts are a group of four, and one of two that is padded.


def run_command(*args):
    values = flags.FlagValues()
    command.define(values)
    values(["generate", *map(str, args)])
    command.main([], values)


@pytest.fixture(scope="module")
def edits(parts, tmp_path_factory):
    """The arguments that draw ImgEdit's prompts, and the folder of a complete tree."""
    root = tmp_path_factory.mktemp("edits")
    prompts = benchmark_files.make(root / "prompts")["imgedit"]
    args = ("--model", parts[1], "--bench", "imgedit", "--prompts", *prompts, *ROWS)
    args = (*args, "--resize", "pad", "--seed", 3)
    run_command(*args, "--out", root / "tree")
    return args, root / "tree"


def test_edits_have_the_shape_of_their_sources_and_a_stamp(edits):
    settings = json.loads((edits[1] / "settings.json").read_text())
    with Image.open(edits[1] / "103.png") as image:
        assert image.size == (PIXELS, PIXELS // 2)  # as the source, which is twice as wide as high
        note = json.loads(image.text[output.PNG_KEY])
    assert note["item"] == "103" and note["resized"][0]["source"] == [6, 12]
    assert settings["resize"] == "pad" and settings["side"] == PIXELS and settings["seed"] == 3
    assert settings["benchmark"] == "imgedit" and settings["thinking"] is False
    assert settings["samples"] == 1 and settings["rewriting"] == "none"
    assert all(len(settings["model"][name]) == 64 for name in ("sha256", "vlm", "codec"))
    assert settings["device"].startswith("cpu") and "jax" in settings["versions"]


def test_shards_and_filled_gaps_have_the_bytes_of_one_run(edits, tmp_path, capsys):
    args, complete = edits
    for shard in ("1/2", "0/2"):
        run_command(*args, "--out", tmp_path, "--shard", shard)
    assert kills.contents(tmp_path) == kills.contents(complete)
    for name in ("101.png", "105.png"):
        (tmp_path / name).unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(*args, "--out", tmp_path, "--check")
    printed = capsys.readouterr().out
    assert exit_info.value.code == 1 and "missing: 101.png (prompt 101)" in printed
    run_command(*args, "--out", tmp_path)
    assert "2 files in" in capsys.readouterr().out
    assert kills.contents(tmp_path) == kills.contents(complete)
    with pytest.raises(SystemExit) as exit_info:
        run_command(*args, "--out", tmp_path, "--check")
    assert exit_info.value.code == 0
    with pytest.raises(ValueError, match=r"seed is 3 in the tree, 4 in this command"):
        run_command(*args, "--seed", 4, "--out", tmp_path)


def test_the_model_may_think_before_it_draws(edits, tmp_path):
    args = (*edits[0], "--think", "--max_tokens", 5, "--system", "think first")
    run_command(*args, "--out", tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["thinking"]["max_tokens"] == 5 and settings["system"] == "think first"
    texts = []
    for n in range(6):
        with Image.open(tmp_path / f"10{n}.png") as image:
            texts.append(json.loads(image.text[output.PNG_KEY]).get("thinking", ""))
    assert any(texts)


def test_an_answer_without_a_picture_is_an_error_that_names_the_prompt():
    with pytest.raises(ValueError, match=r"sample 0: the model gave no image: .* 'no'"):
        draw._picture([Part("text", text="no")], [], "prompt 'a', sample 0")
    with pytest.raises(ValueError, match="the model has no codec; give one with --fae"):
        draw._picture([Part("image")], [], "prompt 'a', sample 0")


def test_flags_of_other_prompts_are_refused(tmp_path):
    args = ("--bench", "wise", "--out", tmp_path)
    with pytest.raises(ValueError, match="--prompts is needed to draw a benchmark"):
        run_command(*args)
    with pytest.raises(ValueError, match="--prompt: --bench draws the prompts of --prompts alone"):
        run_command(*args, "--prompts", "a.json", "--prompt", "a cat")
    with pytest.raises(ValueError, match="--bench is needed"):
        run_command("--check", "--out", tmp_path)
    with pytest.raises(ValueError, match="--think is for --bench, and for --prompt with --out"):
        run_command("--prompt", "a", "--think")
