"""A trained flow loads, draws images, reports likelihoods, and denoises its samples."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import starflow2_jax
from starflow2_jax import config, params
from starflow2_jax.checkpoints import model_folder, orbax
from starflow2_jax.inference import denoise
from starflow2_jax.inference.flow_sampler import (
    FlowModel,
    FlowSampling,
    generate,
    likelihood,
    load_flow,
)
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import flow
from starflow2_jax.models.patches import unpatchify
from starflow2_jax.training.tasks import flow as flow_task, registry

ROOT = Path(starflow2_jax.__file__).parent
SIDE, PATCH = 4, 2
TARFLOW = {"start": "shift", "positions": "learned", "scale": "exp"}
STARFLOW = {"head_dim": 20, "heads": 1, "text_length": 6, "text_channels": 5, "final_norm": True}


def experiment(**changes):
    """Return the configuration of a flow of 2 x 2 pixel tokens, with changes."""
    cfg = config.default()
    cfg.model = {"side": 2, "channels": 12, "width": 16, "layers": (1, 1), "head_dim": 8}
    cfg.image.update(pixels=SIDE, patch=PATCH)
    cfg.noise.sigma = 0.1
    for name, value in changes.items():
        cfg[name].update(value)
    return config.to_dict(cfg)


def model_of(cfg, spread=0.1, seed=0, **fields):
    """Return a flow whose output layers are random of size `spread`; 0 is the identity."""
    model_config = flow_task.model_config(cfg)
    rng, arrays = np.random.default_rng(seed), {}
    for name, spec in params.flatten(flow_task.declare(cfg, model_config)).items():
        size = spread if "proj_out" in name else 0.3
        arrays[name] = jnp.asarray(size * rng.standard_normal(spec.shape).astype(np.float32))
    return FlowModel(cfg, model_config, params.unflatten(arrays), **fields)


def labeled_model():
    return model_of(experiment(model={**TARFLOW, "classes": 3}), classes=("cat", "dog", "owl"))


def token_model():
    return model_of(experiment(model=STARFLOW, text={"vocabulary": 257}))


def feature_model():
    """Return a flow of latents [4, 12] that reads text features, with those of an empty prompt."""
    cfg = experiment(model=STARFLOW, image={"pixels": 0})
    return model_of(cfg, null_text=[[0.5, -1.0, 2.0, 0.1, 0.3]])


def noise_of(seed, count):
    key = jax.random.key(seed)
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), (4, 12)) for i in range(count)])


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=tolerance
    )


# ------------------------------------------------------------------------------------- drawing


@pytest.mark.fast
def test_an_identity_flow_draws_the_noise_of_seed_and_number():
    cfg = experiment(model=TARFLOW)
    model = model_of(cfg, 0.0)
    images = generate(model, 3, sampling=FlowSampling(denoise=False, seed=7, batch=2))
    assert images.dtype == np.uint8 and images.shape == (3, SIDE, SIDE, 3)
    values = unpatchify(jnp.asarray(noise_of(7, 3)), (2, 2), PATCH, "channel_first")
    np.testing.assert_array_equal(images, np.clip(np.round((values + 1) * 127.5), 0, 255))
    # Tweedie: the density is N(0, 1), so every value shrinks by 1 - sigma^2.
    cleaned = generate(model, 3, sampling=FlowSampling(seed=7))
    expected = np.clip(np.round((values * (1 - 0.1**2) + 1) * 127.5), 0, 255)
    np.testing.assert_array_equal(cleaned, expected)
    # Uniform noise is never taken away, and pixels are floor(128 (x + 1)) under its protocol.
    changes = {"noise": {"kind": "uniform"}, "image": {"channel_order": "channel_last"}}
    uniform = dataclasses.replace(model, cfg=experiment(model=TARFLOW, **changes))
    values = unpatchify(jnp.asarray(noise_of(7, 3)), (2, 2), PATCH, "channel_last")
    expected = np.clip(np.floor((values + 1) * 128), 0, 255)
    np.testing.assert_array_equal(generate(uniform, 3, sampling=FlowSampling(seed=7)), expected)


@pytest.mark.fast
def test_a_sample_depends_on_seed_and_number_not_on_the_batch():
    model = feature_model()
    text = np.random.default_rng(0).standard_normal((5, 6, 5)).astype(np.float32)
    options = {"guidance": 1.5, "seed": 3, "denoise": False}
    draw = lambda count, **changes: generate(
        model, count, text=text[:count], sampling=FlowSampling(**{**options, **changes})
    )
    samples = draw(5)
    assert samples.shape == (5, 4, 12) and samples.dtype == np.float32
    close(draw(5, batch=2), samples)
    close(draw(2, batch=2), samples[:2])
    close(draw(5, jacobi=Jacobi(4, 0.0, 4)), samples)
    assert np.abs(draw(5, seed=4) - samples).min((1, 2)).max() > 1e-4
    assert np.abs(draw(5, guidance=0.0) - samples).max() > 1e-3
    assert np.abs(draw(5, guidance_temperature=0.5) - samples).max() > 1e-5


def test_samples_have_the_models_likelihood():
    """Check log p(x) = log N(z) - log |dx/dz|: the z of each sample is known."""
    model = feature_model()
    text = np.random.default_rng(0).standard_normal((3, 6, 5)).astype(np.float32)
    x = generate(model, 3, text=text, sampling=FlowSampling(denoise=False, seed=1))
    z, log_det = flow.forward(
        model.params["flow"], x, model.model_config, flow.Conditioning(text=text)
    )
    close(z, noise_of(1, 3))
    gaussian = (-0.5 * noise_of(1, 3) ** 2 - 0.5 * np.log(2 * np.pi)).sum((1, 2))
    close(likelihood(model, x, text=text), gaussian + np.asarray(log_det))
    assert np.abs(likelihood(model, x, text=text[::-1]) - likelihood(model, x, text=text)).max() > 0


def test_conditions_change_samples_and_likelihoods():
    model = labeled_model()
    sampling = FlowSampling(seed=2, batch=4)
    x = np.random.default_rng(1).standard_normal((4, 4, 12)).astype(np.float32)
    plain, first = (generate(model, 4, labels=n, sampling=sampling) for n in (None, [0] * 4))
    assert (plain != first).any()
    np.testing.assert_array_equal(generate(model, 4, labels=[-1] * 4, sampling=sampling), plain)
    np.testing.assert_array_equal(generate(model, 4, labels=[0, -1, 0, 1], sampling=sampling)[0],
                                  first[0])  # fmt: skip
    close(likelihood(model, x, labels=[-1] * 4), likelihood(model, x))
    assert np.abs(likelihood(model, x, labels=[1] * 4) - likelihood(model, x)).max() > 1e-3

    model = token_model()
    plain = likelihood(model, x)
    close(likelihood(model, x, prompts=[""] * 4), plain)
    captioned = likelihood(model, x, prompts=["red", "red", "blue", ""])
    assert abs(captioned[3] - plain[3]) < 1e-4 and np.abs(captioned[:3] - plain[:3]).min() > 1e-4
    assert generate(model, 2, prompts=["a", "bc"]).shape == (2, SIDE, SIDE, 3)


def test_no_text_is_the_text_of_an_empty_prompt():
    model = feature_model()
    empty = np.zeros((2, 6, 5), np.float32)
    empty[:, 0] = model.null_text[0]
    x = np.random.default_rng(1).standard_normal((2, 4, 12)).astype(np.float32)
    close(likelihood(model, x), likelihood(model, x, text=empty))
    assert np.abs(likelihood(model, x, text=0 * empty) - likelihood(model, x)).max() > 1e-3
    # Guided towards what it has anyway, nothing changes.
    close(generate(model, 2, sampling=FlowSampling(guidance=3.0)), generate(model, 2), 1e-4)
    too_long = dataclasses.replace(model, null_text=np.zeros((7, 5)))
    with pytest.raises(ValueError, match=r"null text: features \[7, 5\] do not fit \[6, 5\]"):
        generate(too_long, 1)


@pytest.mark.fast
@pytest.mark.parametrize(
    "make_model, conditions, message",
    [
        (labeled_model, {"labels": [0, 3]}, "labels: 3 is not below the 3 classes"),
        (labeled_model, {"labels": [0]}, "labels: expected 2, got 1"),
        (labeled_model, {"prompts": ["a", "b"]}, "prompts: this model does not take them"),
        (labeled_model, {"text": np.zeros((2, 6, 5))}, "text: this model does not take them"),
        (token_model, {"labels": [0, 1]}, "labels: this model does not take them"),
        (token_model, {"text": np.zeros((2, 6, 5))}, "text: this model does not take them"),
        (token_model, {"prompts": ["a"]}, "prompts: expected 2, got 1"),
        (token_model, {"prompts": ["a", "too long"]}, "prompt 1: the text has 8 bytes"),
        (feature_model, {"prompts": ["a", "b"]}, "prompts: this model does not take them"),
        (feature_model, {"text": np.zeros((3, 6, 5))}, "text: expected 2, got 3"),
        (
            feature_model,
            {"text": np.zeros((2, 6, 4))},
            r"text: expected \[B, L, 5\], got \[\d+, 6, 4\]",
        ),
    ],
)
def test_wrong_conditions_are_named(make_model, conditions, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        generate(model, 2, **conditions)
    with pytest.raises(ValueError, match=message):
        likelihood(model, np.zeros((2, 4, 12), np.float32), **conditions)


def test_tokens_of_another_width_and_unknown_rules_are_named():
    with pytest.raises(ValueError, match=r"tokens: expected \[B, T, 12\], got \[2, 4, 11\]"):
        likelihood(labeled_model(), np.zeros((2, 4, 11), np.float32))
    with pytest.raises(ValueError, match=r"guidance.rule='sum' is not one of"):
        generate(labeled_model(), 1, sampling=FlowSampling(guidance=1.0, rule="sum"))


def test_models_and_sampling_need_no_data_stack():
    """Check it for machines that have jax, flax, optax and numpy only."""
    folders = ("models", "models/fae", "models/ablations", "inference")
    rooms = [ROOT / folder for folder in folders]
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for room in rooms
        for file in room.glob("[!_]*.py")
    ]
    names += ["params", "mesh", "training.losses.flow", "training.optimizer", "training.program"]
    assert "inference.inverse" in names and "models.flow" in names
    blocked = ["msgspec", "grain", "array_record", "orbax", "PIL", "ml_collections", "safetensors",
               "transformers", "torch", "tensorflow"]  # fmt: skip
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    code += "\n".join(f"import starflow2_jax.{name}" for name in names)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------- clean-up


def test_the_score_step_is_the_posterior_mean_of_a_gaussian():
    cfg = flow.FlowConfig(side=2, channels=3, width=8, layers=(1,), head_dim=8, scale="exp")
    flow_params = params.init(jax.random.key(0), flow.declare(cfg))
    scale, mean, sigma = np.array([0.8, 1.0, 1.5]), np.array([0.5, -1.0, 2.0]), 0.5
    flow_params["blocks"]["0"]["proj_out"]["bias"] = jnp.asarray([*np.log(scale), *mean])
    rng = np.random.default_rng(0)
    clean = mean + np.sqrt(scale**2 - sigma**2) * rng.standard_normal((500, 4, 3))
    noisy = clean + sigma * rng.standard_normal(clean.shape)
    step_to = denoise.score_step(flow_params, jnp.asarray(noisy, jnp.float32), cfg, sigma)
    close(step_to, noisy - sigma**2 * (noisy - mean) / scale**2, 1e-5)
    error = lambda x: np.square(np.asarray(x) - clean).mean((0, 1))
    # What is left is the posterior's variance, sigma^2 (1 - sigma^2 / scale^2).
    remaining = sigma**2 * (1 - sigma**2 / scale**2)
    np.testing.assert_allclose(error(step_to), remaining, rtol=0.1)
    assert (error(step_to) < error(noisy)).all()


# -------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Make a run of two checkpoints whose averaged weights differ from the raw ones."""
    workdir, models = tmp_path_factory.mktemp("run"), {}
    writer = orbax.open(workdir)
    for number in (1, 2):
        models[number] = dataclasses.replace(
            model_of(labeled_model().cfg, seed=number), classes=("cat", "dog", "owl")
        )
        raw = jax.tree.map(lambda a: a + 1, models[number].params)
        state = {"step": jnp.int32(number), "params": raw, "ema": models[number].params}
        meta = {
            "config": models[number].cfg, "classes": ["cat", "dog", "owl"], "null_text": None,
            "step": number,
        }  # fmt: skip
        orbax.save(writer, number, state, meta)
    orbax.close(writer)
    return workdir, models


def check_same(loaded, expected):
    assert loaded.model_config == expected.model_config and loaded.classes == expected.classes
    actual, reference = params.flatten(loaded.params), params.flatten(expected.params)
    assert list(actual) == list(reference)
    for name, array in actual.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(reference[name]), err_msg=name)


def test_load_a_run_and_a_step_of_it(saved):
    workdir, models = saved
    check_same(load_flow(str(workdir)), models[2])
    loaded = load_flow(str(workdir / "checkpoints" / "1"))
    check_same(loaded, models[1])
    assert json.loads(loaded.source) == {"workdir": str(workdir), "step": 1}
    images = generate(loaded, 3, labels=[0, 1, 2])
    np.testing.assert_array_equal(images, generate(models[1], 3, labels=[0, 1, 2]))


def test_load_a_run_with_a_frozen_subtree(tmp_path):
    """Check that a subtree in no checkpoint is drawn from the seed again."""
    cfg = config.to_dict(config.default())
    cfg["model"] = {"side": 2, "channels": 12, "width": 64, "layers": [1, 1]}
    cfg["model"] |= {"text_channels": 8, "text_length": 4}
    cfg["image"].update(pixels=4, patch=2)
    cfg["text"]["vocabulary"], cfg["seed"] = 257, 5
    mesh = make_mesh("data=-1")
    with jax.set_mesh(mesh):
        state, frozen = registry.build(cfg, mesh).init(jax.random.key(cfg["seed"]))
    writer = orbax.open(tmp_path)
    meta = {"config": cfg, "classes": None, "null_text": None, "step": 1}
    orbax.save(writer, 1, {"step": state.step, "params": state.params, "ema": state.ema}, meta)
    orbax.close(writer)
    for device_mesh in (None, make_mesh("fsdp=-1")):
        loaded = load_flow(str(tmp_path), device_mesh, "fsdp")
        np.testing.assert_array_equal(loaded.params["text"]["embed"], frozen["text"]["embed"])
    assert generate(loaded, 1, prompts=["red"]).shape == (1, 4, 4, 3)


def test_load_a_model_folder(saved, tmp_path):
    model = saved[1][2]
    cfg = {**model.cfg, "classes": list(model.classes)}
    model_folder.write_folder(tmp_path / "folder", model.params, cfg)
    loaded = load_flow(str(tmp_path / "folder"))
    check_same(loaded, model)
    assert loaded.source == str(tmp_path / "folder")
    np.testing.assert_array_equal(generate(loaded, 2), generate(model, 2))


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_load_onto_a_mesh(saved, tmp_path, kind):
    workdir, models = saved
    if kind == "folder":
        workdir = tmp_path / "folder"
        model_folder.write_folder(
            workdir, models[2].params, {**models[2].cfg, "classes": ["cat", "dog", "owl"]}
        )
    loaded = load_flow(str(workdir), make_mesh("fsdp=8"), "fsdp")
    check_same(loaded, models[2])
    up = loaded.params["flow"]["blocks"]["0"]["layers"]["mlp_up"]["weight"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(1, 2, 64)}
    x = np.random.default_rng(1).standard_normal((8, 4, 12)).astype(np.float32)
    close(likelihood(loaded, x), likelihood(models[2], x))


def test_missing_and_damaged_files_are_named(saved, tmp_path):
    workdir, models = saved
    with pytest.raises(FileNotFoundError, match="no committed checkpoint in"):
        load_flow(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint of step 9.*\[1, 2\]"):
        load_flow(str(workdir / "checkpoints" / "9"))
    with pytest.raises(ValueError, match="layout: 'zz' is not one of"):
        load_flow(str(workdir), make_mesh(), "zz")
    # A run whose own configuration names another model.
    writer = orbax.open(tmp_path / "other")
    cfg = {**models[1].cfg, "model": {**models[1].cfg["model"], "width": 24}}
    state = {"step": jnp.int32(1), "params": {}, "ema": models[1].params}
    meta = {"config": cfg, "classes": None, "null_text": None, "step": 1}
    orbax.save(writer, 1, state, meta)
    orbax.close(writer)
    with pytest.raises(ValueError, match=r"checkpoint of another model.*of another shape"):
        load_flow(str(tmp_path / "other"))
    model_folder.write_folder(tmp_path / "folder", models[1].params, cfg)
    with pytest.raises(ValueError, match="expected"):
        load_flow(str(tmp_path / "folder"))
