"""The checkpoints and folders that codec trainings start from; LPIPS and bfloat16."""

import jax
import numpy as np
import pytest
from helpers.tiny_fae import batch_of, dataset, experiment, pixel_experiment, run, run_config
from helpers.training_runs import finish, start
from safetensors.numpy import save_file

from starflow2_jax import mesh, params
from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.convert import lpips, teacher as teacher_weights
from starflow2_jax.latents import codec as codecs
from starflow2_jax.models.fae import codec as fae, perceptual
from starflow2_jax.models.patches import scale_pixels
from starflow2_jax.training import init_from
from starflow2_jax.training.program import build_program, to_device
from starflow2_jax.training.tasks import fae as fae_step


@pytest.fixture(scope="module")
def folder(codec, tmp_path_factory):
    """A codec with a pixel decoder, as an exported model folder."""
    path = tmp_path_factory.mktemp("codec") / "model"
    codecs.export(codec, str(path))
    return str(path)


def built(cfg, codec=None):
    grid = mesh.make_mesh(cfg["mesh"], jax.devices()[:1])
    if cfg["task"] == "fae_features":
        task = fae_step.make_features_task(cfg)
    else:
        task = fae_step.make_pixels_task(cfg, codec)
    program = build_program(cfg, grid, task)
    return program, *program.init(jax.random.key(5))


def same(actual, expected):
    actual, expected = params.flatten(actual), params.flatten(expected)
    assert set(actual) == set(expected)
    for name, array in actual.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), name)


def test_pixels_from_an_exported_folder(codec, folder):
    """`init.fae` gives what is frozen, `init.from` the decoder; the discriminator is new."""
    cfg = pixel_experiment(**{"init.fae": folder, "init.from": folder})
    program, state, frozen = built(cfg, codecs.load(folder))
    same(frozen, {name: codec.params[name] for name in frozen})
    assert program.task.frozen_identity() == {"fae": codec.sha256}
    initial = jax.tree.map(np.asarray, state.params)
    begun = init_from.init_from_checkpoint(program, state, cfg["init"]["from"])
    for tree in (begun.params, begun.ema):
        same(tree["pixel_decoder"], codec.params["pixel_decoder"])
        same(tree["discriminator"], initial["discriminator"])
    batch = to_device(program, batch_of())
    _, metrics = program.step(begun, frozen, batch)
    assert np.isfinite(float(metrics["loss"]))


def test_features_from_an_exported_folder(codec, folder):
    program, state, _ = built(experiment(**{"teacher.kind": "qwen"}))
    begun = init_from.init_from_checkpoint(program, state, folder)
    same(begun.params, {name: codec.params[name] for name in begun.params})
    same(begun.ema, begun.params)


def test_a_run_from_an_exported_folder(codec, folder, tmp_path):
    still = {"init.fae": folder, "init.from": folder, "optim.lr": 0.0, "optim.final_lr": 0.0}
    data = dataset(tmp_path / "data", 24)
    cfg = run_config(data, pixel_experiment, **still, **{"train.steps": 2})
    finish(start(cfg, tmp_path / "run"))
    trained = codecs.load(str(tmp_path / "run"))
    same(trained.params["pixel_decoder"], codec.params["pixel_decoder"])
    assert trained.sha256 == codec.sha256


def test_folders_that_do_not_fit(codec, folder, tmp_path):
    program, state, _ = built(pixel_experiment(**{"model.pixel_width": 32}))
    with pytest.raises(ValueError, match=r"pixel_decoder/\S+ is \[.*16.*\], expected \[.*32.*\]"):
        init_from.init_from_checkpoint(program, state, folder)
    with pytest.raises(ValueError, match=r"model and init\.fae differ: encoder/"):
        built(pixel_experiment(**{"model.latent": 8}), codec)
    first = {name: tree for name, tree in codec.params.items() if name != "pixel_decoder"}
    cfg = {**codec.cfg, "task": "fae_features"}
    new_codec = codecs.Codec(cfg, codec.model, codec.teacher, first, codec.sha256)
    codecs.export(new_codec, str(tmp_path / "first"))
    program, state, _ = built(pixel_experiment())
    with pytest.raises(ValueError, match="expected pixel_decoder too"):
        init_from.init_from_checkpoint(program, state, str(tmp_path / "first"))
    model_folder.write_folder(tmp_path / "flow", {"flow": np.zeros(1)}, {"task": "flow"})
    with pytest.raises(ValueError, match="task='flow', expected a latent codec"):
        codecs.load(str(tmp_path / "flow"))
    damaged = tmp_path / "damaged"
    codecs.export(codec, str(damaged))
    file = damaged / model_folder.TENSOR_FILE
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        codecs.load(str(damaged))


# ---------------------------------------------------------------------------------------- variants


def lpips_file(path, widths=(3, 4, 5, 6, 7)):
    """Random VGG16 weights of few channels under the public names."""
    draw, tensors, channels = np.random.default_rng(0), {}, 3
    layers = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    for stage, width in zip(layers, widths):
        for number in stage:
            shape = (width, channels, 3, 3)
            scale = (9 * channels) ** -0.5
            tensors[f"features.{number}.weight"] = scale * draw.normal(size=shape)
            tensors[f"features.{number}.bias"] = 0.1 * draw.normal(size=width)
            channels = width
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, path)
    return str(path)


def test_lpips_within_a_step(tmp_path):
    file = lpips_file(tmp_path / "vgg.safetensors")
    cfg = pixel_experiment(**{"fae.lpips": file, "fae.perceptual": 5.0})
    program, state, frozen = built(cfg)
    before = jax.tree.map(np.asarray, frozen["lpips"])
    assert set(program.task.frozen_identity()) == {"lpips"}
    batch = to_device(program, batch_of())
    # Measured without noise, it is the distance of what is decoded.
    ids, mask = np.arange(8, dtype=np.int32), np.ones(8, np.float32)
    sums = program.evaluate(state.params, frozen, batch, ids, mask)
    image = scale_pixels(batch["image"])
    teacher = teacher_weights.teacher_config(cfg, program.task.model_config)
    x = fae_step.fae.teachers.features(frozen["teacher"], image, teacher)
    decoded = fae.decode_pixels({**frozen, **state.params}, x, program.task.model_config)
    expected = perceptual.lpips(lpips.load(file)[1], decoded, image)
    np.testing.assert_allclose(sums["perceptual"], expected.sum(), rtol=1e-4)
    decoder_before = jax.tree.map(np.asarray, state.params["pixel_decoder"])
    metrics = {}
    for _ in range(3):  # at the first, the rate is still zero
        state, metrics = program.step(state, frozen, batch)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["perceptual"]) > 0
    same(frozen["lpips"], before)
    trained = params.flatten(jax.tree.map(np.asarray, state.params["pixel_decoder"]))
    moved = [
        np.abs(array - params.flatten(decoder_before)[name]).max()
        for name, array in trained.items()
    ]
    assert max(moved) > 0


@pytest.mark.slow
def test_lpips_alone_teaches(tmp_path):
    alone = {"fae.l1": 0.0, "fae.l2": 0.0, "fae.gan": 0.0, "fae.perceptual": 1.0}
    file = lpips_file(tmp_path / "vgg.safetensors")
    cfg = pixel_experiment(**alone, **{"fae.lpips": file, "train.steps": 30, "optim.lr": 3e-3})
    losses, _, _ = run(cfg, 30, batches=[batch_of()] * 30)
    assert losses[-5:].mean() < 0.9 * losses[:2].mean(), losses


@pytest.mark.parametrize(
    "kind", [pytest.param(experiment, marks=pytest.mark.slow), pixel_experiment]
)
def test_bfloat16_steps_are_finite_and_near_float32(kind):
    cfg = kind(compute_dtype="bfloat16")
    losses, state, _ = run(cfg)
    assert np.isfinite(losses).all()
    # Masters stay in float32, and nothing that was trained is lost.
    for name, leaf in params.flatten(state.params).items():
        assert leaf.dtype == np.float32 and np.isfinite(np.asarray(leaf)).all(), name
    plain, _, _ = run(kind())
    # bfloat16 has eight bits; the losses are means over thousands of terms.
    np.testing.assert_allclose(losses, plain, rtol=0.03)
    assert (losses != plain).any()
