"""Likelihoods against closed forms, the invariance to padding and mesh, and the command."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import run_command

from starflow2_jax import config, params
from starflow2_jax.checkpoints import orbax
from starflow2_jax.data import image_batches, records
from starflow2_jax.data.manifest import Importer
from starflow2_jax.data.options import image_batch_options
from starflow2_jax.evaluation import likelihood
from starflow2_jax.inference.flow_sampler import FlowModel
from starflow2_jax.mesh import make_mesh, replicated
from starflow2_jax.shapes import generator
from starflow2_jax.training import preprocess
from starflow2_jax.training.tasks import flow as flow_task, registry

SIDE = 8


def experiment(**changes):
    cfg = config.default()
    cfg.model = {
        "side": SIDE // 2,
        "channels": 12,
        "width": 16,
        "layers": (1, 1),
        "head_dim": 8,
        "start": "shift",
        "positions": "learned",
        "scale": "exp",
    }
    cfg.image.update(pixels=SIDE, patch=2)
    cfg.train.batch_size = 8
    cfg.evaluate.batch_size = 4
    cfg.update_from_flattened_dict(changes)
    return cfg


def model_of(cfg, scale=0.0):
    """Return a flow whose output layers are zero (z = x), or random with deviation `scale`."""
    flow = flow_task.model_config(cfg)
    declared = flow_task.declare(cfg, flow)
    leaves = params.flatten(params.init(jax.random.key(1), declared))
    for i, name in enumerate(leaves):
        if "proj_out" in name:
            noise = jax.random.normal(jax.random.key(i), leaves[name].shape)
            leaves[name] = leaves[name] + scale * noise
    return FlowModel(cfg, flow, params.unflatten(leaves))


def random_images(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)


def batches(images, size, **extra):
    """Yield full batches with a mask; the last batch is padded."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
        mask = (np.arange(size) < len(part)).astype(np.float32)
        yield {"image": filled, "mask": mask, "row": start + np.arange(size), **extra}


def noisy_tokens(cfg, images):
    """Return the tokens that are measured, float64."""
    keys = preprocess.row_keys(cfg.seed + 1, 0, np.arange(len(images)))
    return np.asarray(
        preprocess.tokens({"image": jnp.asarray(images)}, keys, cfg, False), np.float64
    )


@pytest.mark.fast
def test_identity_flow_has_the_bits_of_a_standard_normal():
    cfg = experiment(**{"noise.kind": "uniform"})
    images = random_images(7)
    nll, _ = likelihood.per_image(model_of(cfg), batches(images, 4))
    figures = likelihood.summarize(nll, cfg)
    x = noisy_tokens(cfg, images)
    # Dequantization keeps every value inside its own interval of width 1/128.
    channels = x.reshape(7, 4, 4, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(images.shape)
    np.testing.assert_array_equal(np.floor((channels + 1) * 128), images)
    expected = (0.5 * x**2 + 0.5 * np.log(2 * np.pi)).mean((1, 2))
    np.testing.assert_allclose(nll, expected, rtol=1e-6)
    # P(value) = density of (value + U)/128 - 1, times the width 1/128.
    bits = -np.log2(np.exp(-expected) / 128)
    assert figures["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-6)
    half = 1.96 * bits.std(ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(
        figures["bits_per_dim_95"], [bits.mean() - half, bits.mean() + half], rtol=1e-5
    )
    assert figures["not_comparable"] == "" and figures["rows"] == 7


def test_the_reason_why_bits_are_not_comparable_is_named():
    nll = np.array([1.0, 2.0])
    for kind, phrase in (("gaussian", "gaussian noise (sigma 0.05)"), ("none", "without noise")):
        figures = likelihood.summarize(nll, experiment(**{"noise.kind": kind}))
        assert figures["bits_per_dim"] is None and figures["bits_per_dim_95"] is None
        assert figures["not_comparable"].startswith("not comparable") and figures["rows"] == 2
        assert phrase in figures["not_comparable"]
    figures = likelihood.summarize(nll, experiment(**{"image.pixels": 0, "noise.kind": "uniform"}))
    assert "density of latents" in figures["not_comparable"]
    assert likelihood.summarize(nll[:1], experiment())["nats_per_dim_95"] is None


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_padding_batch_size_and_mesh_do_not_change_the_likelihood(kind):
    cfg = experiment(**{"noise.kind": kind})
    model, images = model_of(cfg, 0.05), random_images(11)
    expected, means = likelihood.per_image(model, batches(images, 11))
    assert expected.std() > 0
    for size in (4, 16):
        nll, parts = likelihood.per_image(model, batches(images, size))
        np.testing.assert_allclose(nll, expected, rtol=2e-6)
        assert parts == pytest.approx(means, rel=1e-5, abs=1e-6)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    on_mesh = jax.device_put(model.params, replicated(mesh))
    nll, _ = likelihood.per_image(
        FlowModel(cfg, model.model_config, on_mesh), batches(images, 16), mesh
    )
    np.testing.assert_allclose(nll, expected, rtol=2e-6)


def test_limit_masks_all_but_the_first_rows():
    cfg = experiment()
    model, images = model_of(cfg, 0.05), random_images(11)
    expected, _ = likelihood.per_image(model, batches(images, 4))
    for rows in (1, 4, 6, 99):
        limited = list(likelihood.limit(batches(images, 4), rows, 4))
        assert len(limited) == min(-(-rows // 4), 3)
        assert sum(batch["mask"].sum() for batch in limited) == min(rows, 11)
        if rows != 6:
            continue
        nll, _ = likelihood.per_image(model, limited)
        np.testing.assert_allclose(nll, expected[:rows], rtol=1e-6)


def test_the_training_program_reports_the_same_likelihood():
    cfg = experiment()
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    program, model, images = registry.build(cfg, mesh), model_of(cfg, 0.05), random_images(11)
    metrics = likelihood.evaluate(program, model.params, {}, batches(images, 4))
    nll, parts = likelihood.per_image(model, batches(images, 4))
    assert metrics["nats_per_dim"] == pytest.approx(nll.mean(), rel=1e-6)
    assert metrics == pytest.approx(parts, rel=1e-5, abs=1e-6)


def test_bad_rows_are_named():
    cfg = experiment()
    with pytest.raises(ValueError, match="there are no rows to evaluate"):
        likelihood.per_image(model_of(cfg), [])
    with pytest.raises(ValueError, match=r"reads 'image', but the data provide only \['mask'\]"):
        likelihood.per_image(model_of(cfg), [{"mask": np.ones(4)}])
    broken = model_of(cfg)
    weight = broken.params["flow"]["blocks"]["0"]["proj_out"]
    weight["bias"] = weight["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="row 0 of the data has a likelihood that is not finite"):
        likelihood.per_image(broken, batches(random_images(5), 4))


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_gaussian_baseline_is_the_closed_form(kind):
    cfg = experiment(**{"noise.kind": kind, "noise.sigma": 0.5})
    center = np.random.default_rng(3).integers(40, 200, (1, SIDE, SIDE, 3))
    spread = np.random.default_rng(4).integers(5, 40, (1, SIDE, SIDE, 3))

    def draw(seed, rows):
        normal = np.random.default_rng(seed).standard_normal((rows, SIDE, SIDE, 3))
        return np.clip(center + spread * normal, 0, 255).astype(np.uint8)

    fit, test = draw(1, 900), draw(2, 301)
    nats = likelihood.gaussian_baseline(batches(fit, 256), batches(test, 64), cfg)
    # Expected value over the noise, from the moments of the clean data.
    if kind == "gaussian":
        fit_values, test_values, noise_variance = fit / 127.5 - 1, test / 127.5 - 1, 0.5**2
    else:
        fit_values, test_values = (fit + 0.5) / 128 - 1, (test + 0.5) / 128 - 1
        noise_variance = 1 / 12 / 128**2
    mean, variance = fit_values.mean(0), fit_values.var(0) + noise_variance
    square = (test_values - mean) ** 2 + noise_variance
    expected = 0.5 * np.log(2 * np.pi * variance) + 0.5 * square / variance
    assert nats == pytest.approx(expected.mean(), abs=4e-3)
    # Partial batches give the same figure.
    unbatched = likelihood.gaussian_baseline(batches(fit, 900), batches(test, 301), cfg)
    assert nats == pytest.approx(unbatched, rel=1e-9)
    # The exact figure for the noise that was drawn.
    keys = preprocess.row_keys(cfg.seed, 0, np.arange(900))
    x = np.asarray(preprocess.tokens({"image": jnp.asarray(fit)}, keys, cfg, False), np.float64)
    y = noisy_tokens(cfg, test)
    exact = 0.5 * np.log(2 * np.pi * x.var(0)) + 0.5 * (y - x.mean(0)) ** 2 / x.var(0)
    # The noise is float32 and drawn here by another program, so its last bit may differ.
    assert nats == pytest.approx(exact.mean(), rel=1e-7)


@pytest.mark.fast
def test_gaussian_baseline_refuses_constant_dimensions_and_no_rows():
    cfg = experiment(**{"noise.kind": "none"})
    constant = np.repeat(random_images(1), 5, 0)
    with pytest.raises(ValueError, match="192 of 192 dimensions do not vary over the 5 rows"):
        likelihood.gaussian_baseline(batches(constant, 5), batches(constant, 5), cfg)
    with pytest.raises(ValueError, match="no rows to fit"):
        likelihood.gaussian_baseline([], batches(constant, 5), cfg)
    with pytest.raises(ValueError, match="no rows to evaluate"):
        likelihood.gaussian_baseline(batches(random_images(5), 5), [], cfg)


def dataset(path, seed, count):
    rows = generator.make_records(seed, count, SIDE, tags=("single_object",), label="color")
    records.write(
        path,
        rows,
        importer=Importer("shapes", "1", {"seed": seed}),
        classes=generator.classes("color"),
    )
    return str(path)


@pytest.fixture
def trained(tmp_path):
    """Return a workdir with a checkpoint of a class-conditional flow, and two datasets."""
    test, train = dataset(tmp_path / "test", 1, 21), dataset(tmp_path / "train", 2, 64)
    classes = len(generator.classes("color"))
    cfg = experiment(**{"noise.kind": "uniform", "eval_data.path": test, "eval_data.labels": True})
    cfg.model.classes = classes
    workdir, model = tmp_path / "run", model_of(cfg, 0.05)
    writer = orbax.open(workdir)
    state = {"step": jnp.int32(30), "params": model.params, "ema": model.params}
    meta = {
        "config": config.to_dict(cfg),
        "classes": generator.classes("color"),
        "step": 30,
        "null_text": None,
    }
    orbax.save(writer, 30, state, meta)
    orbax.close(writer)
    return {"model": model, "workdir": workdir, "train": train, "test": test}


def test_the_command_measures_a_run_and_stamps_the_protocol(trained, capsys):
    workdir, model = trained["workdir"], trained["model"]
    # Eight devices: batches of 4 are raised to 8.
    printed = run_command(capsys, "likelihood", model=workdir, fit=trained["train"])
    path = workdir / "evaluation" / "likelihood_00000030_test.json"
    result = json.loads(path.read_text())
    options = image_batch_options(model.cfg, model.model_config)
    nll, _ = likelihood.per_image(model, image_batches.eval_batches(options, batch_size=21))
    assert result["nats_per_dim"] == pytest.approx(nll.mean(), rel=1e-6)
    bits = result["bits_per_dim"]
    assert bits == pytest.approx((nll.mean() + np.log(128)) / np.log(2), rel=1e-6)
    assert f"bits/dim   {bits:.4f}" in printed and str(path) in printed
    sums = (workdir / "checkpoints" / "30" / "SHA256SUMS").read_bytes()
    assert result["model"]["sha256"] == hashlib.sha256(sums).hexdigest()
    assert result["data"]["rows"] == 21 and result["data"]["skipped"] == 0
    assert len(result["data"]["fingerprints"][0]) == 64
    assert result["protocol"]["noise"] == {"kind": "uniform"}
    assert result["protocol"]["conditions"] == ["label"]
    assert "8 x cpu" in result["devices"] and result["versions"]["jax"] == jax.__version__
    baseline = result["baselines"]["gaussian_per_dimension"]
    assert baseline["bits_per_dim"] == pytest.approx(
        likelihood.bits_per_dim(baseline["nats_per_dim"])
    )
    assert baseline["fingerprints"] != result["data"]["fingerprints"]


def test_the_command_overwrites_nothing_and_takes_the_first_rows(trained, capsys, tmp_path):
    kwargs = {
        "model": trained["workdir"],
        "data": trained["test"],
        "rows": 5,
        "out": tmp_path / "a",
    }
    result = json.loads(run_command(capsys, "likelihood", json=True, **kwargs))
    assert result["data"]["rows"] == 5
    with pytest.raises(FileExistsError, match="exists already; --overwrite replaces it"):
        run_command(capsys, "likelihood", **{**kwargs, "rows": 7})
    assert json.loads((tmp_path / "a").read_text())["rows"] == 5
    run_command(capsys, "likelihood", overwrite=True, **{**kwargs, "rows": 7})
    assert json.loads((tmp_path / "a").read_text())["rows"] == 7
    with pytest.raises(ValueError, match="--model is needed"):
        run_command(capsys, "likelihood")
    with pytest.raises(FileNotFoundError, match="no committed checkpoint"):
        run_command(capsys, "likelihood", model=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"--batch_size=12 is not divisible by data x fsdp"):
        run_command(capsys, "likelihood", **kwargs, overwrite=True, batch_size=12)
