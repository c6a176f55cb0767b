"""The command `evaluate images`: of a folder of images, and of a flow of latents and its codec."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags

from starflow2_jax import evaluate
from starflow2_jax.data import records
from starflow2_jax.evaluation.image_metrics import adm_npz, samples
from starflow2_jax.inference import flow_sampler
from starflow2_jax.inference.flow_sampler import FlowModel
from starflow2_jax.shapes import generator

pytestmark = pytest.mark.fast


def run_command(*words):
    values = flags.FlagValues()
    evaluate.define(values)
    values(["evaluate", *map(str, words)])
    evaluate.main("images", [], values)


@pytest.fixture
def data(tmp_path):
    records.write(tmp_path / "data", generator.make_records(3, 6, 32))
    return tmp_path / "data"


def test_images_of_a_file_are_written_with_the_real_ones(data, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    adm_npz.write(tmp_path / "drawn.npz", [images], 5)
    out = tmp_path / "images.json"
    run_command("--images", tmp_path / "drawn.npz", "--data", data, "--rows", 4, "--out", out)
    result = json.loads(out.read_text())
    assert result["metrics"] == {"images": 5, "real_images": 4}
    assert set(result["not_run"]) == {"frechet_distance, precision, recall", "clip_score"}
    assert "name them with --inception" in capsys.readouterr().out
    np.testing.assert_array_equal(adm_npz.read(tmp_path / "images_generated.npz"), images)
    assert adm_npz.read(tmp_path / "images_real.npz").shape == (4, 16, 16, 3)
    with pytest.raises(FileExistsError):
        run_command("--images", tmp_path / "drawn.npz", "--data", data, "--out", out)
    with pytest.raises(ValueError, match="one of --model and --images is needed"):
        run_command("--data", data)


def test_a_flow_draws_an_image_for_every_caption(data, monkeypatch):
    cfg = {
        "image": {"pixels": 16},
        "text": {"vocabulary": 256},
        "fae": {"path": ""},
        "sample": {"guidance": 2.0, "guidance_rule": "product", "denoise": True},
    }
    model = FlowModel(cfg, SimpleNamespace(text_channels=8, classes=0), {})
    calls = []

    def generate(model, count, *, prompts, labels, sampling):
        calls.append((prompts, labels, sampling))
        return np.zeros((count, 16, 16, 3), np.uint8)

    monkeypatch.setattr(flow_sampler, "generate", generate)
    images, real, options = samples.draw(model, str(data), rows=3, seed=5, guidance=1.0)
    assert images.shape == real.images.shape == (3, 16, 16, 3)
    prompts, labels, sampling = calls[0]
    assert prompts == real.captions and labels is None
    assert (sampling.guidance, sampling.seed, sampling.denoise) == (1.0, 5, True)
    assert options["guidance"] == 1.0
    classes = FlowModel(cfg, SimpleNamespace(text_channels=0, classes=4), {})
    with pytest.raises(ValueError, match="draws from classes"):
        samples.draw(classes, str(data))
    latents = FlowModel({**cfg, "image": {"pixels": 0}}, model.model_config, {})
    with pytest.raises(ValueError, match="--fae is needed"):
        samples.draw(latents, str(data))
