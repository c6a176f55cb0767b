"""Sample grids of STARFlow2's stages: fixed prompts from the data, drawn alike on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.starflow2_folders import PIXELS

from starflow2_jax import params
from starflow2_jax.data import records
from starflow2_jax.evaluation import sample_grids
from starflow2_jax.evaluation.shapes import ask
from starflow2_jax.inference import load
from starflow2_jax.latents import batch_encoder, codec
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import starflow2
from starflow2_jax.shapes import tasks as shapes_tasks
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
    records.write(path, shapes_tasks.make_records(3, 18, PIXELS, tasks=TASKS))
    return str(path)


def experiment(model, data, stage, **sample):
    cfg = {**model.cfg, "train": {**model.cfg["train"], "trainable": STAGES[stage]}}
    cfg["sample"] = {**cfg["sample"], "count": 3, "denoise": False, **sample}
    cfg["eval_data"] = {**cfg["eval_data"], "path": data}
    return cfg, starflow2_task.data_options(cfg, model.model_config)


def test_a_stage_shows_what_it_learns(model, data):
    for stage, wanted in ((1, ["samples"]), (2, ["answers"]), (3, list(sample_grids.KINDS))):
        cfg, opts = experiment(model, data, stage)
        found = sample_grids.prompts(cfg, opts, PIXELS)
        assert list(found) == wanted
        assert [len(found[kind]) for kind in wanted] == [3, 3, 2, 2][: len(wanted)]
    for kind, pictures in zip(sample_grids.KINDS, (0, 1, 1, 1)):
        for prompt in found[kind]:
            assert sum(part.kind == "image" for part in prompt.parts) == pictures
            assert (prompt.shown is not None) == bool(pictures)
            assert prompt.said == prompt.parts[-1].text and prompt.said
            assert {part.role for part in prompt.parts} == {"user"}
    first = next(r for r in records.read(data) if r.meta.get("task") == "edit")
    shown = records.images.decode(first.imgs[0].data, "")
    np.testing.assert_array_equal(found["edits"][0].shown, shown)
    cfg, opts = experiment(model, data, 1, prompts=["a red circle", "a star"])
    texts = [p.said for p in sample_grids.prompts(cfg, opts, PIXELS)["samples"]]
    assert texts == ["a red circle", "a star", "a red circle"]


def test_grids_hold_pictures_and_what_was_said(model, data):
    cfg, opts = experiment(model, data, 3)
    own = dataclasses.replace(model, cfg=cfg)
    given = sample_grids.prompts(cfg, opts, PIXELS)
    grids = {grid.name: grid for grid in sample_grids.draw(own, given)}
    assert list(grids) == list(sample_grids.KINDS)
    for kind, count in zip(sample_grids.KINDS, (3, 3, 4, 4)):
        grid = grids[kind]
        assert grid.images.shape == (count, PIXELS, PIXELS, 3) and len(grid.captions) == count
    assert grids["samples"].captions == [prompt.said for prompt in given["samples"]]
    asked = [prompt.parts for prompt in given["answers"]]
    answers = ask.asker(own, max_tokens=sample_grids.WORDS)(asked, "words")
    for prompt, answer, caption in zip(given["answers"], answers, grids["answers"].captions):
        assert caption == f"{prompt.said} > {ask.said(answer)}"
    for kind in ("edits", "reasons"):
        for i, prompt in enumerate(given[kind]):
            np.testing.assert_array_equal(grids[kind].images[2 * i], prompt.shown)
            assert (grids[kind].images[2 * i + 1] != prompt.shown).any()
            assert grids[kind].captions[2 * i] == prompt.said
    assert grids["edits"].captions[1] == ">"


def test_weights_on_a_mesh_draw_the_same(model, data):
    cfg, opts = experiment(model, data, 1)
    mesh = make_mesh("data=4,fsdp=2")
    grids = sample_grids.prepare(cfg, model.model_config, opts, model.codec, mesh)
    where = params.shardings(starflow2.declare(model.model_config), mesh, "fsdp")
    spread = jax.device_put(dict(model.params), where)
    assert any(not a.is_fully_replicated for a in jax.tree.leaves(spread))
    with jax.set_mesh(mesh):
        (found,) = sample_grids.from_state(grids, spread)
    (wanted,) = sample_grids.draw(dataclasses.replace(model, cfg=cfg), grids.given)
    np.testing.assert_array_equal(found.images, wanted.images)
    assert found.captions == wanted.captions


def test_without_a_codec_nothing_is_drawn(parts, model, data, tmp_path):
    cfg, opts = experiment(model, data, 3)
    mesh = make_mesh("data=1", jax.devices()[:1])
    why = lambda opts, fae: sample_grids.prepare(cfg, model.model_config, opts, fae, mesh)
    assert "neither fae.path names a codec" in why(opts, None)
    blind = dataclasses.replace(
        model.codec, params={n: t for n, t in model.codec.params.items() if n != "pixel_decoder"}
    )
    assert why(opts, blind) == "the codec has no pixel decoder"
    records.write(tmp_path / "text", shapes_tasks.make_records(0, 4, PIXELS, tasks=("text",)))
    none = dataclasses.replace(opts, path=str(tmp_path / "text"))
    assert "records hold nothing that this stage can show" in why(none, model.codec)
    # Stored latents say where their codec was; another in its place is none.
    about = lambda path: {"features": [{"fae": codec.open_encoder(path)[1]}]}
    fae = str(parts[0] / "fae")
    assert batch_encoder.decoder(about(fae), None).sha256 == model.codec.sha256
    (row,) = about(fae)["features"]
    assert (
        batch_encoder.decoder({"features": [{"fae": {**row["fae"], "sha256": "0"}}]}, None) is None
    )
    assert (
        batch_encoder.decoder({"features": [{"fae": {**row["fae"], "path": "nowhere"}}]}, None)
        is None
    )
    assert batch_encoder.decoder({"features": []}, model.codec) is model.codec
