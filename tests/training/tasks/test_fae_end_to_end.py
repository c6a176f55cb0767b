"""The training of the whole latent codec on pixels through latent noise."""

import importlib.util

import jax
import numpy as np
import pytest
from helpers.paths import EXPERIMENTS
from helpers.tiny_fae import ROWS, batch_of, end_to_end_experiment, run, run_config
from helpers.training_runs import finish, rows_of, start

from starflow2_jax import config, mesh, params
from starflow2_jax.checkpoints.convert import teacher as teacher_weights
from starflow2_jax.data import records
from starflow2_jax.latents import codec
from starflow2_jax.models.fae import codec as fae, losses, teacher as teachers
from starflow2_jax.models.patches import scale_pixels
from starflow2_jax.shapes import generator
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry

FROZEN_TOWER = ("encoder", "feature_decoder", "pixel_decoder", "latent")


def test_learns_a_batch_and_its_latents_have_unit_variance():
    cfg = end_to_end_experiment(**{"train.steps": 60, "fae.statistics_decay": 0.8})
    program = registry.build(cfg, mesh.make_mesh("data=1", jax.devices()[:1]), dry_run=True)
    state, frozen = program.init(jax.random.key(0))
    assert not frozen
    batch, rows = to_device(program, batch_of()), []
    for _ in range(60):
        state, metrics = program.step(state, frozen, batch)
        rows.append(program.task.finalize_metrics(jax.device_get(metrics)))
    assert rows[-1]["l2"] < 0.8 * rows[0]["l2"] and rows[-1]["psnr"] > rows[0]["psnr"]
    image = scale_pixels(batch_of()["image"])
    teacher = teacher_weights.teacher_config(cfg, program.task.model_config)
    x = teachers.features(state.ema["teacher"], image, teacher)
    sums = fae.moments(*fae.encode(state.ema, x, program.task.model_config))
    np.testing.assert_allclose(sums["square"] / sums["count"], 1, atol=0.15)
    np.testing.assert_allclose(sums["sum"] / sums["count"], 0, atol=0.15)
    assert program.reconstruct(state.ema, frozen, batch).shape == (ROWS, 16, 16, 3)


def test_a_frozen_tower_does_not_change():
    cfg = end_to_end_experiment(**{"train.trainable": FROZEN_TOWER})
    _, state, frozen = run(cfg)
    assert set(frozen) == {"teacher"} and "teacher" not in state.params
    first = registry.build(cfg, mesh.make_mesh("data=1", jax.devices()[:1]), dry_run=True)
    before = first.init(jax.random.key(cfg["seed"]))[1]
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


@pytest.mark.slow
def test_eight_devices_equal_one():
    alone = run(end_to_end_experiment())[0]
    spread = run(end_to_end_experiment(layout="fsdp", mesh="data=2,fsdp=4"), devices=jax.devices())
    np.testing.assert_allclose(spread[0], alone, rtol=1e-4)


@pytest.mark.fast
def test_larger_latents_do_not_drown_the_noise():
    """Latents a hundred times larger, scaled back by the decoder, reconstruct as before."""
    cfg = end_to_end_experiment(**{"fae.beta": 0.0})
    program = registry.build(cfg, mesh.make_mesh("data=1", jax.devices()[:1]), dry_run=True)
    batch = to_device(program, batch_of())

    def l2(scale):
        state, frozen = program.init(jax.random.key(0))
        head = state.params["encoder"]["head"]
        mean_size = head["bias"].shape[0] // 2
        # The posterior's variance, the second half of the head, is set to almost zero.
        weight = (head["weight"] * scale).at[:, mean_size:].set(0)
        bias = (head["bias"] * scale).at[mean_size:].set(-30.0)
        proj_in = state.params["feature_decoder"]["proj_in"]
        proj_in = {**proj_in, "weight": proj_in["weight"] / scale}
        encoder = {**state.params["encoder"], "head": {"weight": weight, "bias": bias}}
        decoder = {**state.params["feature_decoder"], "proj_in": proj_in}
        changed = {**state.params, "encoder": encoder, "feature_decoder": decoder}
        return float(program.step(state.replace(params=changed), frozen, batch)[1]["l2"])

    np.testing.assert_allclose(l2(100.0), l2(1.0), rtol=1e-3)


def test_trained_resumed_exported_and_tuned(tmp_path):
    data = tmp_path / "shapes"
    records.write(data, generator.make_records(0, 24, 16, tags=("single_object",)))
    workdir = tmp_path / "run"
    sampling = {"sample.every": 3, "sample.count": 4}
    finish(start(run_config(data, end_to_end_experiment, **sampling), workdir, "after:4"), -9)
    assert "resumed" in finish(start(run_config(data, end_to_end_experiment, **sampling), workdir))
    assert (workdir / "samples" / "00000003.png").exists()
    assert "eval/psnr" in rows_of(workdir)[-1]
    trained = codec.load(str(workdir))
    mean, _ = codec.encode(trained, batch_of()["image"])
    images = codec.decode(trained, mean)
    codec.export(trained, tmp_path / "model")
    again = codec.load(str(tmp_path / "model"))
    assert again.sha256 == trained.sha256
    np.testing.assert_array_equal(codec.decode(again, mean), images)
    # A training that starts from a codec starts from its values.
    tuning = {"init.fae": str(tmp_path / "model"), "train.trainable": FROZEN_TOWER}
    still = {"optim.lr": 0.0, "optim.final_lr": 0.0, "train.steps": 2, "train.ema": 0.0}
    cfg = run_config(data, end_to_end_experiment, **tuning, **still)
    finish(start(cfg, tmp_path / "tuned"))
    tuned = codec.load(str(tmp_path / "tuned"))
    for name in ("encoder", "pixel_decoder", "teacher"):
        jax.tree.map(np.testing.assert_array_equal, tuned.params[name], trained.params[name])


@pytest.mark.fast
def test_the_gradient_error_sees_edges_and_no_shift_of_color():
    image = np.zeros((1, 4, 4, 3), np.float32)
    edge = image.copy()
    edge[:, :, 2:] = 1
    assert float(losses.gradient_error(image + 0.5, image)[0]) == 0
    # One of three differences in each row has an error of 1, and none in the columns.
    np.testing.assert_allclose(losses.gradient_error(edge, image), [1 / 3 / 2], rtol=1e-6)


def test_the_experiment_is_complete():
    spec = importlib.util.spec_from_file_location("fae", EXPERIMENTS / "fae_end_to_end.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = config.to_dict(module.get_config())
    config.check(cfg)
    task = registry.make_task(cfg)
    size = sum(params.count(task.declared[name]) for name in task.declared)
    assert 2 * size <= 25_000_000
