"""The stages' program: exact sums on every mesh, frozen parts untouched, one stage from another."""

import dataclasses
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pretzel_batch
from helpers.paths import EXPERIMENTS
from helpers.pretzel_training import ROWS, STAGES, batch_of, experiment

from starflow2_jax import config, mesh
from starflow2_jax.checkpoints import model_folder, orbax
from starflow2_jax.checkpoints.convert import qwen as qwen_weights
from starflow2_jax.data import chat_layout
from starflow2_jax.models import qwen, qwen_vision, starflow2
from starflow2_jax.models.ablations import mot
from starflow2_jax.params import (
    count as count_params,
    flatten,
    init as init_params,
    split as split_params,
)
from starflow2_jax.training import init_from, preprocess
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry, starflow2 as starflow2_step


def begin(cfg, devices=None):
    grid = mesh.make_mesh(cfg["mesh"], jax.devices()[:1] if devices is None else devices)
    with jax.set_mesh(grid):
        program = registry.build(cfg, grid)
        return grid, program, *program.init(jax.random.key(cfg["seed"]))


def run(cfg, steps=3, devices=None):
    """(losses, state, last metrics, state at first on the host, frozen before and after)."""
    # Three steps: heads are zero at initialization, so W_vlm sees no gradient before the second.
    grid, program, state, frozen = begin(cfg, devices)
    host = lambda tree: jax.tree.map(np.array, tree)
    first, still, losses = host(state), host(frozen), []
    with jax.set_mesh(grid):
        for i in range(steps):
            batch = to_device(program, batch_of(seed=i))
            state, metrics = program.step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state, metrics, first, (still, host(frozen))


@pytest.fixture(scope="module")
def stage1():
    return run(experiment(1))


@pytest.fixture(scope="module")
def stage2():
    return run(experiment(2))


@pytest.fixture(scope="module")
def stage3():
    return run(experiment())


def check_moved(first, final, trains):
    for name in starflow2.SUBTREES:
        for part in ("params", "ema"):
            old, new = (getattr(state, part)[name] for state in (first, final))
            same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old, new)))]
            assert all(same) == (name not in trains), (name, part)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_changes_its_subtrees_alone(stage, request):
    losses, state, metrics, first, (before, final) = request.getfixturevalue(f"stage{stage}")
    assert np.isfinite(losses).all() and sorted(state.params) == sorted(starflow2.SUBTREES)
    check_moved(first, state, STAGES[stage])
    jax.tree.map(np.testing.assert_array_equal, before, final)
    moments = flatten({"mu": state.opt_state[1][0].mu})
    assert {name.split("/")[1] for name in moments} == set(STAGES[stage])
    figures = interleaved.finalize_metrics({n: float(v) for n, v in metrics.items()})
    assert ("nats_per_dim" in figures) == (stage == 1)
    assert ("text_nats" in figures) == (stage == 2)


@pytest.mark.fast
def test_the_joint_stage_changes_everything_but_the_vlm(stage3):
    _, state, metrics, first, (before, final) = stage3
    check_moved(first, state, STAGES[3])
    jax.tree.map(np.testing.assert_array_equal, before, final)
    figures = interleaved.finalize_metrics({n: float(v) for n, v in metrics.items()})
    target = {"nats_per_dim", "log_det/0", "log_det/1", "log_det/2", "text_nats", "text_accuracy"}
    assert target <= set(figures) and 0 < figures["skip_vlm"] < 1 and 0 < figures["skip_deep"] < 1
    # The whole of the loss, from what is logged of it.
    nats = figures["nats_per_dim"] - HALF_LOG_2_PI
    squares = sum(float(metrics[f"latent/{i}"]) for i in range(3)) / float(metrics["count"])
    expected = nats + 1e-4 * squares + figures["text_nats"]
    np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "trains", [pytest.param(STAGES[1], marks=pytest.mark.slow), ("vlm", *STAGES[1])]
)
def test_a_mixture_of_transformers_changes_what_it_trains_alone(trains):
    cfg = experiment(3)
    pretzel, vision_start = pretzel_batch.model(), pretzel_batch.TOKENIZER.vision_start
    vlm = dataclasses.replace(pretzel.vlm, vision_start_token=vision_start)
    pretzel = dataclasses.replace(pretzel, vlm=vlm)
    cfg["model"] = starflow2.options(mot.matching(pretzel, 24))
    cfg["train"]["trainable"] = list(trains)
    losses, state, metrics, first, (before, final) = run(cfg)
    assert np.isfinite(losses).all() and sorted(state.params) == sorted(trains)
    for name in trains:
        pairs = zip(*(jax.tree.leaves(s.params[name]) for s in (first, state)))
        assert not all(np.array_equal(a, b) for a, b in pairs), name
    assert bool(before) == ("vlm" not in trains)
    jax.tree.map(np.testing.assert_array_equal, before, final)
    figures = interleaved.finalize_metrics({n: float(v) for n, v in metrics.items()})
    assert {"nats_per_dim", "text_nats"} <= set(figures) and "skip_vlm" not in figures


def test_several_crossings_train_beside_a_frozen_vlm():
    cfg = experiment(3)
    cfg["model"] = starflow2.options(pretzel_batch.model(crossings=2))
    losses, state, _, first, (before, final) = run(cfg)
    assert np.isfinite(losses).all()
    check_moved(first, state, STAGES[3])
    assert all(np.any(state.params["skip"][name]["weight"]) for name in ("into_deep", "into_vlm"))
    jax.tree.map(np.testing.assert_array_equal, before, final)


def test_microbatches_equal_the_whole_batch(stage3):
    losses = run(experiment(**{"train.microbatches": 4}))[0]
    np.testing.assert_allclose(losses, stage3[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "frozen, sizes", [("tp", "data=2,fsdp=2,tensor=2"), ("", "data=2,fsdp=2,context=2")]
)
def test_eight_devices_equal_one(stage3, frozen, sizes):
    cfg = experiment(layout="fsdp_tp" if frozen else "fsdp", mesh=sizes, frozen_layout=frozen)
    losses, state, *_ = run(cfg, devices=jax.devices())
    np.testing.assert_allclose(losses, stage3[0], rtol=1e-5, atol=1e-5)
    up = state.params["deep"]["layers"]["mlp_up"]["weight"]
    assert up.addressable_shards[0].data.size * (4 if frozen else 2) == up.size


@pytest.mark.parametrize("positions", [23, pytest.param(8, marks=pytest.mark.slow)])  # too few: 8
def test_a_vlm_at_fewer_positions_trains_the_same_on_eight_devices(stage1, positions):
    sizes = "data=2,fsdp=2,tensor=2"
    changes = {"layout": "fsdp_tp", "mesh": sizes, "text.vlm_positions": positions}
    losses = run(experiment(1, **changes), devices=jax.devices()[:8])[0]
    np.testing.assert_allclose(losses, stage1[0], rtol=1e-5, atol=1e-5)


def test_a_part_that_is_empty_contributes_nothing():
    cfg = pretzel_batch.model()
    params = pretzel_batch.random_params(cfg)
    stage = interleaved.Stage(True, True)
    text = pretzel_batch.batch([[pretzel_batch.TEXT], [pretzel_batch.TEXT]], length=40, places=3)
    images = pretzel_batch.batch([[pretzel_batch.T2I], [pretzel_batch.EDIT]], length=40, places=3)
    images["target"] &= images["image"] >= 0

    @jax.jit
    def loss(params, batch):
        terms = interleaved.loss_terms(params, batch, batch["latent_mean"], cfg, stage)
        metrics_of_rows = interleaved.row_metrics(terms, batch, stage)
        totals = jax.tree.map(jnp.sum, interleaved.target_counts(batch, stage))
        row_losses = interleaved.per_example_loss(
            metrics_of_rows, totals, text_weight=1.0, latent_penalty=0.0
        )
        return row_losses.sum(), jax.tree.map(jnp.sum, metrics_of_rows)

    grads = {}
    for name, batch in (("text", text), ("images", images)):
        (value, metrics_of_rows), grads[name] = jax.value_and_grad(loss, has_aux=True)(
            params, batch
        )
        figures = interleaved.finalize_metrics({n: float(v) for n, v in metrics_of_rows.items()})
        assert ("nats_per_dim" in figures) == (name == "images")
        assert ("text_nats" in figures) == (name == "text") and np.isfinite(float(value))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads[name]))
    assert not any(np.any(g) for g in jax.tree.leaves(grads["text"]["shallow"]))
    assert any(np.any(g) for g in jax.tree.leaves(grads["images"]["shallow"]))


def test_noise_belongs_to_row_step_and_place():
    cfg, batch = experiment(), batch_of()
    keys = preprocess.row_keys(0, 3, jnp.arange(ROWS))
    all_rows = interleaved.sample_latents(batch, keys, cfg)
    one = {name: a[2:3] for name, a in batch.items()}
    np.testing.assert_array_equal(interleaved.sample_latents(one, keys[2:3], cfg)[0], all_rows[2])
    noise = np.asarray(all_rows) - batch["latent_mean"]
    assert np.unique(noise).size == noise.size and 0.25 < noise.std() < 0.35
    later = interleaved.sample_latents(batch, preprocess.row_keys(0, 4, jnp.arange(ROWS)), cfg)
    assert not np.any(np.asarray(later) == np.asarray(all_rows))


def test_images_that_are_only_read_have_a_noise_of_their_own():
    batch = pretzel_batch.batch([[pretzel_batch.REASON], [pretzel_batch.I2T, pretzel_batch.T2I]])
    cfg, keys = experiment(), preprocess.row_keys(0, 3, jnp.arange(2))
    mean, old = batch["latent_mean"], np.asarray(interleaved.sample_latents(batch, keys, cfg))
    is_context = np.array([[True, False, False, False], [True, False, False, False]])
    is_target = np.array([[False, True, False, False], [False, True, False, False]])
    np.testing.assert_array_equal(interleaved.target_images(batch)[0], is_target)
    for sigma in (None, 0.3, 0.1, 0.0):
        noise = {**cfg["noise"], "context_sigma": sigma}
        x = np.asarray(interleaved.sample_latents(batch, keys, {**cfg, "noise": noise}))
        np.testing.assert_array_equal(x[is_target], old[is_target])
        share = 1 if sigma is None else sigma / 0.3
        expected = mean + share * (old - mean)
        np.testing.assert_allclose(x[is_context], expected[is_context], atol=1e-6)
        assert np.array_equal(x, old) == (sigma in (None, 0.3))
    # A configuration of before the key existed.
    stored = {**cfg, "noise": {n: v for n, v in cfg["noise"].items() if n != "context_sigma"}}
    x = interleaved.sample_latents(batch, keys, config.upgrade(stored))
    np.testing.assert_array_equal(x, old)


def test_clean_copies_are_the_targets_without_their_noise():
    cfg, keys = experiment(), preprocess.row_keys(0, 3, jnp.arange(2))
    reason = tuple(chat_layout.insert_copies(pretzel_batch.REASON)[0])
    batch = pretzel_batch.batch([[reason], [pretzel_batch.T2I, reason]], length=96)
    is_target, is_copy = map(np.asarray, interleaved.target_images(batch))
    assert is_target.tolist() == [[False, True, False, False], [True, False, True, False]]
    assert is_copy.tolist() == [[False, False, True, False], [False, False, False, True]]
    # A wide posterior, which both share.
    mean = np.where(
        is_copy[..., None, None], np.roll(batch["latent_mean"], 1, 1), batch["latent_mean"]
    )
    batch |= {"latent_mean": mean, "latent_logvar": np.full_like(mean, 0.5)}
    clean = {**cfg, "noise": {**cfg["noise"], "context_sigma": 0.0}}
    x = np.asarray(interleaved.sample_latents(batch, keys, clean))
    old = np.asarray(interleaved.sample_latents(batch, keys, cfg))
    np.testing.assert_array_equal(x[is_target], old[is_target])
    silent = {**cfg, "noise": {**cfg["noise"], "kind": "none"}}
    sample = np.asarray(interleaved.sample_latents(batch, keys, silent))
    np.testing.assert_array_equal(x[is_copy], sample[np.roll(is_copy, -1, 1)])
    stage = interleaved.Stage(True, True)  # The copies are no targets; the choice to read one is.
    plain = pretzel_batch.batch([[pretzel_batch.REASON], [pretzel_batch.T2I, pretzel_batch.REASON]])
    counts, old_counts = (interleaved.target_counts(b, stage) for b in (batch, plain))
    np.testing.assert_array_equal(counts["dims"], old_counts["dims"])
    np.testing.assert_array_equal(counts["tokens"], old_counts["tokens"] + 1)


def test_evaluation_counts_unmasked_rows_and_depends_on_row_ids_alone():
    grid, program, state, frozen = begin(experiment())
    batch, mask = batch_of(), np.ones(ROWS, np.float32)
    with jax.set_mesh(grid):
        read = lambda order, mask: jax.device_get(
            program.evaluate(
                state.ema, frozen, {n: a[order] for n, a in batch.items()}, np.arange(ROWS)[order],
                mask,
            )
        )  # fmt: skip
        all_rows = read(np.arange(ROWS), mask)
        turned = read(np.arange(ROWS)[::-1], mask)
        half = read(np.arange(ROWS), mask * (np.arange(ROWS) < 4))
        rest = read(np.arange(ROWS), mask * (np.arange(ROWS) >= 4))
    for name, value in all_rows.items():
        np.testing.assert_allclose(turned[name], value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(half[name] + rest[name], value, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- from stage to stage


def save(workdir, state, frozen=None):
    writer = orbax.open(workdir)
    orbax.save(writer, 1, state, {"step": 1, "frozen": frozen or {}, "data": None})
    orbax.close(writer)


def test_a_stage_starts_from_the_one_before(stage1, tmp_path):
    _, before, *_ = stage1
    save(tmp_path / "stage1", before)
    _, program, fresh, _ = begin(experiment(2))
    for ema in (True, False):
        path = str(tmp_path / "stage1")
        begun = init_from.init_from_checkpoint(program, fresh, path, ema=ema)
        target = before.ema if ema else before.params
        jax.tree.map(np.testing.assert_array_equal, begun.params, target)
        jax.tree.map(np.testing.assert_array_equal, begun.ema, target)
        assert int(begun.step) == 0
    assert not any(np.any(m) for m in jax.tree.leaves(begun.opt_state[1][0].mu))


def test_a_stage_starts_from_a_model_folder(stage3, tmp_path):
    _, before, *_ = stage3
    subtrees = {name: before.ema[name] for name in starflow2.SUBTREES}
    _, program, fresh, _ = begin(experiment(3))
    for name, frozen in (("own", {}), ("other", {"vlm": "0" * 64})):
        model_folder.write_folder(
            tmp_path / name, subtrees, {"task": "starflow2", "frozen": frozen}
        )
    begun = init_from.init_from_checkpoint(program, fresh, str(tmp_path / "own"))
    jax.tree.map(np.testing.assert_array_equal, begun.params, before.ema)
    jax.tree.map(np.testing.assert_array_equal, begun.ema, before.ema)
    with pytest.raises(ValueError, match=r"init\.from=.*other' was trained with another VLM"):
        init_from.init_from_checkpoint(program, fresh, str(tmp_path / "other"))


@pytest.mark.parametrize("kind", ["missing", "other", "vlm", "fae"])
def test_a_stage_refuses_what_is_not_its_own(tmp_path, kind):
    _, program, state, _ = begin(experiment(2))
    if kind == "missing":
        save(tmp_path, state.replace(ema={n: t for n, t in state.ema.items() if n != "skip"}))
        words = r"2 missing: ema\.skip\.deep\.weight, ema\.skip\.vlm\.weight"
    elif kind == "other":
        deep = {**state.ema["deep"], "start": jnp.zeros(3)}
        skip = {"vlm": {"weight": jnp.zeros((3, 3))}, "deep": state.ema["skip"]["deep"]}
        save(tmp_path, state.replace(ema={**state.ema, "deep": deep, "skip": skip}))
        words = r"unexpected: ema\.deep\.start.*of another shape.*ema\.skip\.vlm\.weight"
    elif kind == "vlm":
        save(tmp_path, state, {"vlm": "0" * 64})
        words = "trained with another VLM: its sha256 is 000"
    else:
        save(tmp_path, state, {"fae": "0" * 64})
        words = "trained on latents of another codec: its sha256 is 000"
    with pytest.raises(ValueError, match=words):
        init_from.init_from_checkpoint(program, state, str(tmp_path))


# -------------------------------------------------------------------------------------- frozen VLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VLM with a tower, as published."""
    vision = qwen_vision.VisionConfig(
        depth=1, width=16, heads=2, mlp_width=16, out_width=32, full_layers=(0,), patch=4, window=16
    )
    cfg = dataclasses.replace(pretzel_batch.model(tied=True).vlm, vision=vision, compute_dtype=None)
    params = init_params(jax.random.key(7), qwen.declare(cfg))
    path = tmp_path_factory.mktemp("vlm") / "folder"
    qwen_weights.export(params, cfg, path)
    return path, params


def test_the_vlm_is_read_from_its_folder(folder):
    path, params = folder
    options = {**starflow2.options(pretzel_batch.model(tied=True)), "vlm": {"remat": "full"}}
    cfg = experiment(1, **{"vlm.path": str(path), "frozen_dtype": "bfloat16"})
    cfg["model"] = options
    _, program, state, frozen = begin(cfg)
    assert "vlm" not in state.params and "vision" not in frozen["vlm"]
    read = flatten(frozen["vlm"])
    for name, array in flatten({n: t for n, t in params.items() if n != "vision"}).items():
        np.testing.assert_array_equal(read[name], array.astype(jnp.bfloat16))
    assert program.task.model_config.vlm.remat == "full"
    assert len(program.task.frozen_identity()["vlm"]) == 64
    assert jax.tree.map(lambda a: a.shape, frozen) == jax.tree.map(
        lambda a: a.shape, program.abstract_frozen
    )
    cfg["model"] = {**options, "vlm": {"width": 64}}
    with pytest.raises(ValueError, match=r"model\.vlm\.width=64, but .* has 32"):
        starflow2_step.model_config(cfg)


def test_a_vlm_that_is_trained_is_in_the_state(folder):
    cfg = experiment(3, **{"train.trainable": ("vlm", *STAGES[3])})
    cfg["vlm"]["path"] = str(folder[0])
    cfg["model"] = starflow2.options(pretzel_batch.model(tied=True))
    _, program, state, frozen = begin(cfg)
    assert frozen == {} and program.abstract_frozen == {}
    table = folder[1]["embed"]["weight"]
    np.testing.assert_array_equal(state.params["vlm"]["embed"]["weight"], table)
    assert state.opt_state[1][0].mu["vlm"]["embed"]["weight"].shape == table.shape


# ------------------------------------------------------------------------------------------- sizes


def lower(stage, layout, sizes):
    """The step at the paper's size, lowered, and how many parameters it trains."""
    file = EXPERIMENTS / f"{('stage1_t2i', 'stage2_i2t', 'stage3_joint')[stage - 1]}.py"
    cfg = runpy.run_path(str(file))["get_config"]("paper")
    cfg.layout, cfg.mesh, cfg.train.batch_size = layout, sizes, 8
    config.check(cfg)
    program = registry.build(config.to_dict(cfg), mesh.make_mesh(sizes))
    trained = split_params(program.task.declared, tuple(cfg.train.trainable))[0]
    return program.lower_step().as_text(), count_params(trained)


def check_lowered(stage, layout, sizes):
    text, trained = lower(stage, layout, sizes)
    assert trained == {1: 3_637_073_152, 2: 12_966_912, 3: 3_661_164_800}[stage]
    assert "sharding" in text


@pytest.mark.parametrize("stage", [3])
def test_paper_lowers(stage):
    check_lowered(stage, "fsdp_tp", "fsdp=2,tensor=4")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "layout, sizes",
    [
        ("dp", "data=8"),
        ("fsdp", "fsdp=8"),
        ("tp", "data=2,tensor=4"),
        ("fsdp_tp", "fsdp=2,tensor=4"),
        ("hybrid", "data=2,fsdp=4"),
    ],
)
def test_paper_lowers_in_every_layout(stage, layout, sizes):
    check_lowered(stage, layout, sizes)


def test_every_layout_is_tried():
    marks = test_paper_lowers_in_every_layout.pytestmark
    (tried,) = [m.args[1] for m in marks if m.name == "parametrize" and m.args[0][:6] == "layout"]
    assert {layout for layout, _ in tried} == set(mesh.LAYOUTS)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text.length": 16}, r"text\.length=16 has no room for 3 images of 4 patches"),
        ({"text.length": 5, "text.images": 0}, "no room for 1 images"),
        ({"train.trainable": ("adapter", "flow")}, "no subtree 'flow'"),
        ({"train.trainable": ()}, "train.trainable is empty"),
        ({"model.flow.wide": 3}, r"unknown key 'model\.flow\.wide'"),
        ({"model.vlm.wide": 3}, r"unknown key 'model\.vlm\.wide'"),
        ({"model.kind": "moe"}, r"model\.kind='moe' is not one of pretzel, crossings, mot"),
        ({"model.skipping": 3}, r"unknown key 'model\.skipping'"),
        ({"vlm.path": "/nowhere"}, "nowhere"),
    ],
)
def test_a_bad_experiment_is_one_clear_error(changes, words):
    cfg = experiment()
    for name, value in changes.items():
        group = cfg
        *path, last = name.split(".")
        for part in path:
            group = group[part]
        group[last] = value
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        registry.build(cfg, mesh.make_mesh("data=1", jax.devices()[:1]))
