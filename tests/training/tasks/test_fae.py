"""The trainings of the latent codec: equal on every mesh, resumed bit for bit, teacher frozen."""

import importlib.util
import signal

import jax
import numpy as np
import pytest
from helpers.paths import EXPERIMENTS
from helpers.tiny_fae import ROWS, batch_of, experiment, pixel_experiment, run, run_config
from helpers.training_runs import finish, rows_of, start

from starflow2_jax import config, mesh, params
from starflow2_jax.checkpoints import orbax
from starflow2_jax.checkpoints.convert import teacher as teacher_weights
from starflow2_jax.data import records
from starflow2_jax.latents import codec
from starflow2_jax.models.fae import codec as fae, teacher as teachers
from starflow2_jax.models.fae.config import model_config
from starflow2_jax.models.patches import scale_pixels
from starflow2_jax.shapes import generator
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry


@pytest.fixture(scope="module")
def one_device():
    return run(experiment())


@pytest.mark.parametrize(
    "layout, sizes",
    [("fsdp", "data=2,fsdp=4"), pytest.param("dp", "data=8", marks=pytest.mark.slow)],
)
def test_eight_devices_equal_one(one_device, layout, sizes):
    losses, state, _ = run(experiment(layout=layout, mesh=sizes), devices=jax.devices())
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    np.testing.assert_allclose(
        state.ema["latent"]["std"], one_device[1].ema["latent"]["std"], rtol=1e-4
    )


@pytest.mark.fast
def test_microbatches_equal_the_whole_batch(one_device):
    losses, state, _ = run(experiment(**{"train.microbatches": 4}))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    mean = one_device[1].params["latent"]["mean"]
    np.testing.assert_allclose(state.params["latent"]["mean"], mean, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("dinov2", marks=pytest.mark.slow), "qwen"])
def test_learns_a_batch_and_leaves_the_teacher_alone(kind):
    fast = {"train.ema": 0.9, "fae.statistics_decay": 0.8, "image.flip": False}
    cfg = experiment(**{"train.steps": 60, "teacher.kind": kind, **fast})
    grid = mesh.make_mesh("data=1", jax.devices()[:1])
    program = registry.build(cfg, grid, dry_run=True)
    state, frozen = program.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, frozen)
    assert set(frozen) == {"teacher"} == set(program.task.declared) - set(state.params)
    # Two moments of each trained weight, and no more than a few counters.
    moment_count = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    expected_count = 2 * sum(params.count(state.params[n]) for n in ("encoder", "feature_decoder"))
    assert expected_count <= moment_count <= expected_count + 4
    batch, losses = to_device(program, batch_of()), []
    for _ in range(60):
        state, metrics = program.step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))
    assert np.mean(losses[-5:]) < 0.6 * losses[0], losses[::10]
    # The averaged weights' own statistics: their latents have unit variance.
    image = scale_pixels(batch_of()["image"])
    teacher = teacher_weights.teacher_config(cfg, program.task.model_config)
    x = teachers.features(frozen["teacher"], image, teacher)
    sums = fae.moments(*fae.encode(state.ema, x, program.task.model_config))
    np.testing.assert_allclose(sums["square"] / sums["count"], 1, atol=0.1)
    np.testing.assert_allclose(sums["sum"] / sums["count"], 0, atol=0.1)


RECONSTRUCTED = {"fae.train_on_decoded_features": True, "teacher.kind": "qwen"}


@pytest.mark.parametrize("changes", [{}, pytest.param(RECONSTRUCTED, marks=pytest.mark.slow)])
def test_pixels_learn_a_batch_and_leave_the_rest_alone(changes):
    cfg = pixel_experiment(**{"train.steps": 40, "optim.lr": 3e-3, **changes})
    grid = mesh.make_mesh("data=1", jax.devices()[:1])
    program = registry.build(cfg, grid, dry_run=True)
    state, frozen = program.init(jax.random.key(0))
    frozen_parts = {"encoder", "feature_decoder", "latent", "teacher"}
    assert set(frozen) == frozen_parts and set(state.opt_state) == {"decoder", "discriminator"}
    before = jax.tree.map(np.asarray, (frozen, state.params))
    batch, rows = to_device(program, batch_of()), []
    for _ in range(40):
        state, metrics = program.step(state, frozen, batch)
        rows.append(program.task.finalize_metrics(jax.device_get(metrics)))
        if len(rows) == 2:  # not judged before its start
            host_params = jax.tree.map(np.asarray, state.params)
            for name in ("discriminator", "lecam"):
                jax.tree.map(np.testing.assert_array_equal, host_params[name], before[1][name])
    jax.tree.map(np.testing.assert_array_equal, before[0], jax.tree.map(np.asarray, frozen))
    assert rows[-1]["l2"] < 0.8 * rows[0]["l2"] and rows[-1]["psnr"] > rows[0]["psnr"]
    assert np.ptp([row["discriminator_hinge"] for row in rows[2:]]) > 0
    assert float(state.params["lecam"]["real"]) != 0
    assert program.reconstruct(state.ema, frozen, batch).shape == (ROWS, 16, 16, 3)


@pytest.mark.slow
def test_pixels_on_eight_devices_equal_one():
    alone = run(pixel_experiment())[0]
    on_eight_devices = run(pixel_experiment(layout="dp", mesh="data=8"), devices=jax.devices())[0]
    np.testing.assert_allclose(on_eight_devices, alone, rtol=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher.pixels": 32}, "model.side=2, but the teacher"),
        ({"teacher.pixels": 20}, "teacher.pixels=20 is not a multiple of 8"),
        ({"image.pixels": 32}, "image.pixels=32 is not model.side=2"),
        ({"train.trainable": ("encoder",)}, r"this task trains exactly \['encoder'"),
        ({"teacher.path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_configurations(change, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        registry.make_task(experiment(**change))


# ------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    records.write(path, generator.make_records(0, 24, 16, tags=("single_object",)))
    return path


def state_of(workdir, cfg):
    program = registry.build(cfg, mesh.make_mesh("data=1", jax.devices()[:1]), dry_run=True)
    state, _ = orbax.restore(workdir, 6, program.abstract_state)
    return jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def features_run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("features") / "run"
    finish(start(run_config(data), workdir))
    return workdir


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken_bit_for_bit(data, tmp_path, features_run):
    cfg = run_config(data)
    unbroken_run, broken = features_run, tmp_path / "broken"
    finish(start(cfg, broken, "after:4"), expected=-signal.SIGKILL)
    assert "resumed" in finish(start(cfg, broken))
    jax.tree.map(np.testing.assert_array_equal, state_of(unbroken_run, cfg), state_of(broken, cfg))
    assert rows_of(unbroken_run) == rows_of(broken)
    rows = rows_of(unbroken_run)
    assert [r["step"] for r in rows if "eval/relative_error" in r] == [3, 6]
    assert {"loss", "relative_error", "mean_square", "kl", "grad_norm"} <= set(rows[0])
    assert orbax.read_meta(unbroken_run)["frozen"] == {}


@pytest.mark.slow
def test_pixels_after_features(data, tmp_path, features_run):
    first = codec.load(str(features_run))
    changes = {"init.fae": str(features_run), "sample.every": 2, "sample.count": 4}
    workdir = tmp_path / "pixels"
    finish(start(run_config(data, pixel_experiment, **changes, **{"train.steps": 2}), workdir))
    assert (workdir / "samples" / "00000002.png").exists()
    assert "eval/psnr" in rows_of(workdir)[-1]
    both = codec.load(str(workdir))
    assert both.sha256 == first.sha256 == orbax.read_meta(workdir)["frozen"]["fae"]
    mean, _ = codec.encode(both, batch_of()["image"])
    assert codec.decode(both, mean).shape == (ROWS, 16, 16, 3)
    with pytest.raises(ValueError, match="no pixel decoder"):
        codec.decode(first, mean)
    codec.export(both, tmp_path / "model")
    again = codec.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(codec.decode(again, mean), codec.decode(both, mean))


@pytest.mark.slow
def test_pixels_resumed_then_on_reconstructed_features(data, tmp_path, features_run):
    cfg = run_config(data, pixel_experiment, **{"init.fae": str(features_run)})
    unbroken_run, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(cfg, unbroken_run))
    finish(start(cfg, broken, "after:4"), expected=-signal.SIGKILL)
    assert "resumed" in finish(start(cfg, broken))
    assert rows_of(broken) == rows_of(unbroken_run)
    one, other = (codec.load(str(workdir)).params for workdir in (unbroken_run, broken))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    # The next training takes the codec from a folder, and the decoder from the run.
    codec.export(codec.load(str(features_run)), tmp_path / "model")
    then = {"init.fae": str(tmp_path / "model"), "init.from": str(unbroken_run), "optim.lr": 0.0}
    then |= {"fae.train_on_decoded_features": True, "optim.final_lr": 0.0, "train.steps": 2}
    finish(start(run_config(data, pixel_experiment, **then), tmp_path / "then"))
    host_params = codec.load(str(tmp_path / "then")).params["pixel_decoder"]
    jax.tree.map(np.testing.assert_array_equal, host_params, one["pixel_decoder"])


@pytest.mark.parametrize("name", ["fae_features", "fae_pixels"])
def test_experiments_declare_the_stated_sizes(name):
    file = EXPERIMENTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny, paper = (config.to_dict(module.get_config(v)) for v in ("tiny", "paper"))
    for cfg in (tiny, paper):
        config.check(cfg)
    assert registry.make_task(tiny, dry_run=True).model_config.pixels == 64
    declared = fae.declare(model_config(paper))
    assert params.count(declared["encoder"]) == 38_166_592
    assert params.count(declared["feature_decoder"]) == 170_428_416
    assert params.count(declared["pixel_decoder"]) == 305_360_896
