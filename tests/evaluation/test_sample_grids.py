"""Sample grids of STARFlow2's stages: prompts from the data, and the same images on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.starflow2_folders import PIXELS

from starflow2_jax import params
from starflow2_jax.data import images, records
from starflow2_jax.evaluation import ask, sample_grids
from starflow2_jax.inference import load
from starflow2_jax.latents import batch_encoder, codec
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import starflow2
from starflow2_jax.shapes import tasks
from starflow2_jax.training.tasks import starflow2 as starflow2_task

TASKS = ("t2i", "caption", "edit", "reason", "text", "question")
STAGES = {
    1: ("shallow", "deep"),
    2: ("adapter",),
    3: ("adapter", "shallow", "deep", "skip"),
}


@pytest.fixture(scope="module")
def model(parts):
    return load.load(parts[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "all"
    records.write(path, tasks.make_records(3, 18, PIXELS, tasks=TASKS))
    return str(path)


def experiment(model, data, stage, **sample):
    """Return the configuration of a stage, and the options of its data."""
    cfg = {**model.cfg, "train": {**model.cfg["train"], "trainable": STAGES[stage]}}
    cfg["sample"] = {**cfg["sample"], "count": 3, "denoise": False, **sample}
    cfg["eval_data"] = {**cfg["eval_data"], "path": data}
    return cfg, starflow2_task.data_options(cfg, model.model_config)


def test_a_stage_shows_what_it_trains(model, data):
    for stage, kinds in ((1, ["samples"]), (2, ["answers"]), (3, list(sample_grids.KINDS))):
        cfg, options = experiment(model, data, stage)
        prompts = sample_grids.read_prompts(cfg, options, PIXELS)
        assert list(prompts) == kinds
        assert [len(prompts[kind]) for kind in kinds] == [3, 3, 2, 2][: len(kinds)]
    for kind, num_images in zip(sample_grids.KINDS, (0, 1, 1, 1)):
        for prompt in prompts[kind]:
            assert sum(part.kind == "image" for part in prompt.parts) == num_images
            assert (prompt.image is not None) == bool(num_images)
            assert prompt.caption == prompt.parts[-1].text and prompt.caption
            assert {part.role for part in prompt.parts} == {"user"}
    first = next(r for r in records.read(data) if r.meta.get("task") == "edit")
    np.testing.assert_array_equal(
        prompts["edits"][0].image, images.decode(first.imgs[0].data, "the first edit")
    )
    cfg, options = experiment(model, data, 1, prompts=["a red circle", "a star"])
    prompts = sample_grids.read_prompts(cfg, options, PIXELS)["samples"]
    assert [p.caption for p in prompts] == ["a red circle", "a star", "a red circle"]


def test_prompts_can_come_from_all_over_the_data(model, data):
    cfg, options = experiment(model, data, 1, spread=True, count=2)
    captions = [r.segs[0].s for r in records.read(data) if "task" not in r.meta]
    assert len(captions) == 3
    prompts = sample_grids.read_prompts(cfg, options, PIXELS)["samples"]
    assert [prompt.caption for prompt in prompts] == [captions[0], captions[2]]
    assert sample_grids._evenly(1000, 4) == [125, 375, 625, 875]
    assert sample_grids._evenly(3, 8) == [0, 1, 2] and sample_grids._evenly(0, 8) == []


def test_grids_contain_prompts_and_answers(model, data):
    cfg, options = experiment(model, data, 3)
    stage_model = dataclasses.replace(model, cfg=cfg)
    prompts = sample_grids.read_prompts(cfg, options, PIXELS)
    grids = {grid.name: grid for grid in sample_grids.draw_grids(stage_model, prompts)}
    assert list(grids) == list(sample_grids.KINDS)
    for kind, count in zip(sample_grids.KINDS, (3, 3, 4, 4)):
        grid = grids[kind]
        assert grid.images.shape == (count, PIXELS, PIXELS, 3) and len(grid.captions) == count
    assert grids["samples"].captions == [prompt.caption for prompt in prompts["samples"]]
    answer_fn = ask.make_answer_fn(stage_model, max_tokens=sample_grids.MAX_TOKENS)
    answers = answer_fn([prompt.parts for prompt in prompts["answers"]], "text")
    for prompt, answer, caption in zip(prompts["answers"], answers, grids["answers"].captions):
        assert caption == f"{prompt.caption} > {ask.answer_text(answer)}"
    for kind in ("edits", "reasons"):
        for i, prompt in enumerate(prompts[kind]):
            np.testing.assert_array_equal(grids[kind].images[2 * i], prompt.image)
            assert (grids[kind].images[2 * i + 1] != prompt.image).any()
            assert grids[kind].captions[2 * i] == prompt.caption
    assert grids["edits"].captions[1] == ">"


def test_sharded_weights_draw_the_same_grids(model, data):
    cfg, options = experiment(model, data, 1)
    device_mesh = make_mesh("data=4,fsdp=2")
    inputs = sample_grids.prepare(cfg, model.model_config, options, model.codec, device_mesh)
    shardings = params.shardings(starflow2.declare(model.model_config), device_mesh, "fsdp")
    sharded = jax.device_put(dict(model.params), shardings)
    assert any(not a.is_fully_replicated for a in jax.tree.leaves(sharded))
    with jax.set_mesh(device_mesh):
        (grid,) = sample_grids.draw_from_params(inputs, sharded)
    stage_model = dataclasses.replace(model, cfg=cfg)
    (expected,) = sample_grids.draw_grids(stage_model, inputs.prompts)
    np.testing.assert_array_equal(grid.images, expected.images)
    assert grid.captions == expected.captions


def test_the_reason_why_no_grid_is_drawn_is_named(model, data, tmp_path):
    cfg, options = experiment(model, data, 3)
    device_mesh = make_mesh("data=1", jax.devices()[:1])

    def prepare(options, codec):
        return sample_grids.prepare(cfg, model.model_config, options, codec, device_mesh)

    assert "neither fae.path nor the metadata" in prepare(options, None)
    encoder_params = {n: t for n, t in model.codec.params.items() if n != "pixel_decoder"}
    encoder_only = dataclasses.replace(model.codec, params=encoder_params)
    assert prepare(options, encoder_only) == "the codec has no pixel decoder"
    records.write(tmp_path / "text", tasks.make_records(0, 4, PIXELS, tasks=("text",)))
    text_only = dataclasses.replace(options, path=str(tmp_path / "text"))
    assert "records is a prompt for what this stage trains" in prepare(text_only, model.codec)


def test_stored_latents_lead_to_their_codec_and_no_other(parts, model):
    fae = codec.open_encoder(str(parts[0] / "fae"))[1]

    def decoder(**changes):
        return batch_encoder.decoder({"features": [{"fae": {**fae, **changes}}]}, None)

    assert decoder().sha256 == model.codec.sha256
    assert decoder(sha256="0") is None
    assert decoder(path="nowhere") is None
    assert batch_encoder.decoder({"features": []}, model.codec) is model.codec
