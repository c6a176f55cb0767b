"""Latents encoded during training equal those of `prepare latents`, and so do the runs."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_flow
from helpers.commands import run_command
from helpers.tiny_fae import make_run
from helpers.training_runs import finish, rows_of, start

from starflow2_jax import config, mesh, params
from starflow2_jax.checkpoints import orbax
from starflow2_jax.data import array_store, image_batches, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.options import image_batch_options
from starflow2_jax.latents import batch_encoder, codec, write
from starflow2_jax.shapes import generator, tasks
from starflow2_jax.training.tasks import flow as flow_task

COUNT = 21


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(workdir of a codec, dataset folder, its latents)."""
    root = tmp_path_factory.mktemp("online")
    run, data, out = make_run(root / "run", 0), str(root / "data"), str(root / "latents")
    records.write(data, generator.make_records(0, COUNT, 16, tags=("single_object",)))
    write.write(out, data, *codec.open_encoder(run))
    return run, data, out


def experiment(parts, offline=False, **changes):
    """Return a flow of 2 x 2 latents of 4 channels, read from disk or encoded."""
    run, data, out = parts
    cfg = config.default()
    cfg.model.update(side=2, channels=4, width=16, layers=(1, 1), head_dim=8)
    cfg.model.update(start="shift", positions="learned", scale="exp")
    cfg.train.batch_size, cfg.train.steps = 8, 6
    cfg.log.every, cfg.sample.every = 1, 0
    cfg.checkpoint.every, cfg.evaluate.every = 3, 2
    for group in (cfg.data, cfg.eval_data):
        group.path, group.threads = data, 1
        group.latents = out if offline else ""
    cfg.fae.path = "" if offline else run
    cfg.update_from_flattened_dict(changes)
    config.check(cfg)
    return config.to_dict(cfg)


def test_online_equals_offline_bit_for_bit(parts):
    """The batch size and a mesh of eight devices do not matter."""
    cfg = experiment(parts)
    model = flow_task.model_config(cfg)
    opened = batch_encoder.open(cfg, model)
    options = batch_encoder.options(image_batch_options(cfg, model, "data"), opened)
    stored = {**options, "latents": parts[2]}
    with jax.set_mesh(mesh.make_mesh("data=2,fsdp=4")):
        for size in (5, 8):
            online = batch_encoder.encoded(image_batches.batches(options, batch_size=size), opened)
            offline = batch_encoder.encoded(image_batches.batches(stored, batch_size=size), opened)
            for _ in range(4):
                batch, stored_batch = next(online), next(offline)
                assert set(batch) == set(stored_batch) and batch["id"] == stored_batch["id"]
                for name in ("latent_mean", "latent_logvar"):
                    assert batch[name].dtype == stored_batch[name].dtype == np.float32
                    np.testing.assert_array_equal(batch[name], stored_batch[name])


def test_rows_of_several_images(parts, tmp_path):
    """Slots without a patch stay zero, as with stored latents."""
    rows = list(tasks.make_records(0, 4, 16, tasks=("edit", "multi", "text", "caption")))
    dataset = records.write(tmp_path / "data", rows)
    write.write(tmp_path / "out", tmp_path / "data", *codec.open_encoder(parts[0]))
    stored, opened = array_store.read(tmp_path / "out", dataset), codec.load(parts[0])
    batch = {
        "images": np.zeros((4, 3, 16, 16, 3), np.uint8),
        "image": np.full((4, 20), -1, np.int32),
        "id": [record.id for record in rows],
    }
    expected = np.zeros((4, 3, 4, 4), np.float32)
    for row, record in enumerate(rows):
        for k, blob in enumerate(record.imgs):
            batch["images"][row, k] = records.images.decode(blob.data, "")
            batch["image"][row, 5 * k : 5 * k + 4] = 4 * k + np.arange(4)
            expected[row, k] = stored[row][1]["latent_mean"][k]
    batch["images"][2] = 99  # no patch is of this image
    encoded = batch_encoder.encode(batch, opened)
    assert set(encoded) == {"image", "id", "latent_mean", "latent_logvar"}
    np.testing.assert_array_equal(encoded["latent_mean"], expected)
    assert not encoded["latent_logvar"][2].any()
    alone = {name: array[2:3] for name, array in batch.items()}
    assert batch_encoder.encode(alone, opened)["latent_mean"].shape == (1, 3, 4, 4)


def test_online_and_offline_runs_are_equal_and_resume_each_other(parts, tmp_path):
    both, stored_run = tmp_path / "both", tmp_path / "stored"
    finish(start(experiment(parts, offline=True), stored_run))
    finish(start(experiment(parts), both, "after:3"), expected=-signal.SIGKILL)
    sha256 = codec.load(parts[0]).sha256
    assert orbax.read_meta(both)["frozen"] == {"fae": sha256}
    assert "resumed" in finish(start(experiment(parts, offline=True), both))
    assert rows_of(both) == rows_of(stored_run)
    assert [r["step"] for r in rows_of(both) if "eval/nats_per_dim" in r] == [2, 4, 6]
    assert orbax.read_meta(both)["frozen"] == {"fae": sha256}
    # Another encoder is not what the flow was trained on.
    moved = experiment((make_run(tmp_path / "other", 1), *parts[1:]))
    with pytest.raises(AssertionError, match=r"holds another configuration[\s\S]*data\.latents"):
        finish(start(moved, both))


def save_flow(workdir, parts, **changes):
    """Save a run of a flow of these latents, untrained."""
    cfg = experiment(parts, **changes)
    initial = params.init(jax.random.key(1), flow_task.declare(cfg, flow_task.model_config(cfg)))
    writer = orbax.open(workdir)
    meta = {"config": cfg, "classes": None, "step": 1, "null_text": None}
    meta["frozen"] = {"fae": codec.load(parts[0]).sha256}
    orbax.save(writer, 1, {"step": jnp.int32(1), "params": initial, "ema": initial}, meta)
    orbax.close(writer)
    return str(workdir)


def test_likelihoods_of_images_are_those_of_their_latents(parts, tmp_path, capsys):
    run, data, stored = parts
    flow = save_flow(tmp_path / "flow", parts)

    def measure(model, **options):
        options |= {"model": model, "json": True, "overwrite": True}
        return json.loads(run_command(capsys, "likelihood", **options))

    expected = measure(flow, data=data, latents=stored, fit=data, fit_latents=stored)
    for model, options in (
        (flow, {"fit": data}),
        (save_flow(tmp_path / "stored_flow", parts, offline=True), {"data": data, "fae": run}),
    ):
        result = measure(model, **options)
        assert result["data"]["rows"] == COUNT
        assert result["nats_per_dim"] == expected["nats_per_dim"]
        assert result["parts"] == expected["parts"]
        (encoder,), (expected_encoder,) = (
            [row["fae"]["sha256"] for row in r["data"]["features"]] for r in (result, expected)
        )
        assert encoder == expected_encoder
        if "fit" in options:
            baseline, expected_baseline = (
                r["baselines"]["gaussian_per_dimension"]["nats_per_dim"] for r in (result, expected)
            )
            assert baseline == expected_baseline
    with pytest.raises(ValueError, match="--latents or --fae is needed: the model reads latents"):
        measure(tmp_path / "stored_flow", data=data)
    with pytest.raises(ValueError, match="--fit_latents or --fae is needed"):
        measure(tmp_path / "stored_flow", fit=data)
    moved = make_run(tmp_path / "other", 1)
    with pytest.raises(
        ValueError, match=r"latents of the encoder .*, but the flow was trained on "
    ):
        measure(flow, data=data, fae=moved)
    with pytest.raises(DatasetError, match=r"--data: latents of the encoder .*, expected those of"):
        measure(flow, data=data, latents=stored, fae=moved)
    with pytest.raises(ValueError, match="task='fae_features', expected a flow or"):
        measure(run, data=data)


def test_another_shape_or_encoder_is_refused(parts, tmp_path):
    def opened(**changes):
        cfg = experiment(parts, **changes)
        return batch_encoder.open(cfg, flow_task.model_config(cfg))

    with pytest.raises(ValueError, match=r"reads 4 x 8 latents.* gives 4 x 4"):
        opened(**{"model.channels": 8})
    with pytest.raises(FileNotFoundError, match="no committed checkpoint"):
        opened(**{"fae.path": str(tmp_path / "nowhere")})
    pixels = tiny_flow.experiment(**{"fae.path": parts[0]})
    with pytest.raises(ValueError, match="reads pixels"):
        batch_encoder.open(pixels, flow_task.model_config(pixels))
    assert batch_encoder.open(experiment(parts, offline=True), None) is None
    # Stored latents must come from the codec of fae.path.
    other = codec.load(make_run(tmp_path / "other", 1))
    cfg = experiment(parts, offline=True)
    about = image_batches.describe(image_batch_options(cfg, flow_task.model_config(cfg), "data"))
    assert batch_encoder.describe(about, codec.load(parts[0]), "data.latents") == about
    with pytest.raises(DatasetError, match=r"data\.latents: latents of the encoder"):
        batch_encoder.describe(about, other, "data.latents")
    mixed = {"mixture": ({"path": parts[1], "latents": parts[2]}, {"path": parts[1]})}
    with pytest.raises(ValueError, match=r"data\.mixture: .* all of them or none"):
        batch_encoder.options({**mixed, "pixels": 0}, other)
