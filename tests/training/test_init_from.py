"""The start of a run: invalid configurations write nothing; weights come from a run or a folder."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.tiny_flow import experiment

from starflow2_jax import mesh, params, train
from starflow2_jax.checkpoints import model_folder, orbax
from starflow2_jax.data import records
from starflow2_jax.shapes import generator
from starflow2_jax.training import init_from
from starflow2_jax.training.run_data import RunData
from starflow2_jax.training.tasks import registry


def dataset(path, label="color", count=20):
    rows = generator.make_records(0, count, 8, tags=("single_object",), label=label)
    records.write(path, rows, classes=generator.classes(label))
    return str(path)


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "colors")


def with_data(path, labels=True, **changes):
    cfg = experiment(**{"model.classes": 8, "data.path": path, "data.labels": labels, **changes})
    cfg["eval_data"] |= {"threads": 1}
    cfg["data"] |= {"threads": 1}
    return cfg


@pytest.mark.fast
def test_classes_that_are_not_those_of_the_model_are_refused(colors, tmp_path):
    workdir = tmp_path / "run"
    shape = dataset(tmp_path / "shapes", "shape")
    for cfg, words in (
        (with_data(colors, **{"model.classes": 5}), "model.classes=5, but data gives 8 classes"),
        (with_data(colors, labels=False), "model.classes=8, but data gives 0 classes"),
        (with_data(colors, **{"eval_data.path": colors}), "=8, but eval_data gives 0 classes"),
        (with_data(colors, **{"eval_data.path": shape, "eval_data.labels": True}),
         "config: the classes of eval_data are not those of data"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            train.train(cfg, str(workdir))
    assert not workdir.exists()


def test_a_run_without_data_or_of_a_bad_configuration_writes_nothing(colors, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    workdir = tmp_path / "run"
    cfg = with_data(colors)
    for other, words in (
        (with_data(""), "config: data.path or data.mixture is needed"),
        (with_data(str(tmp_path / "nowhere")), "nowhere"),
        ({**cfg, "sede": 1}, "config: unknown key 'sede'; did you mean 'seed'?"),
        ({**cfg, "mesh": "data=3"}, "needs 3 devices, 8 are there"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            train.train(other, str(workdir))
    assert not workdir.exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A program, and a run of it whose averaged weights are twice the raw ones."""
    grid = mesh.make_mesh("fsdp=8")
    program = registry.build(experiment(layout="fsdp", mesh="fsdp=8"), grid)
    with jax.set_mesh(grid):
        state, _ = program.init(jax.random.key(1))
    state = state.replace(ema=jax.tree.map(lambda a: 2 * a, state.params))
    workdir = tmp_path_factory.mktemp("source") / "run"
    writer = orbax.open(workdir)
    orbax.save(writer, 3, state, {})
    orbax.close(writer)
    return program, state, workdir


def same(actual, expected, factor=1):
    actual, expected = params.flatten(actual), params.flatten(expected)
    assert list(actual) == list(expected)
    for name, array in actual.items():
        np.testing.assert_array_equal(np.asarray(array), factor * np.asarray(expected[name]))


@pytest.mark.parametrize("kind", ["run", "step", "raw", "folder"])
def test_weights_of_another_run_or_folder(source, tmp_path, kind):
    program, state, path = source
    factor = 1 if kind in ("raw", "folder") else 2
    if kind == "step":
        path = path / "checkpoints" / "3"
    elif kind == "folder":
        path = tmp_path / "folder"
        model_folder.write_folder(path, state.params, program.cfg)
    with jax.set_mesh(program.mesh):
        fresh, _ = program.init(jax.random.key(2))
    begun = init_from.init_from_checkpoint(program, fresh, str(path), ema=kind != "raw")
    same(begun.params, state.params, factor)
    same(begun.ema, state.params, factor)
    assert int(begun.step) == 0
    # Where the step wants them, and not one array twice: the step donates both.
    for name, leaf in params.flatten(begun.params).items():
        spec = params.flatten(program.abstract_state.params)[name]
        assert leaf.sharding == spec.sharding and leaf.dtype == spec.dtype
        assert leaf is not params.flatten(begun.ema)[name]


def test_weights_of_another_model_are_listed(source, tmp_path):
    program, state, path = source
    cfg = experiment(**{"model.classes": 0, "model.width": 32})
    other = registry.build(cfg, mesh.make_mesh("data=8"))
    model_folder.write_folder(tmp_path / "folder", state.params, program.cfg)
    with pytest.raises(ValueError, match="is the checkpoint of another model") as error:
        init_from.init_from_checkpoint(other, None, str(path))
    assert "2 unexpected: ema.flow.blocks.0.class_embed, ema.flow" in str(error.value)
    assert "proj_in.weight is float32[48, 64], expected float32[48, 32]" in str(error.value)
    with pytest.raises(ValueError, match="class_embed"):
        init_from.init_from_checkpoint(other, state, str(tmp_path / "folder"))
    with pytest.raises(FileNotFoundError, match="no committed checkpoint in"):
        init_from.init_from_checkpoint(other, None, str(tmp_path / "nowhere"))


def test_evaluation_in_training_fits_its_batch_to_the_mesh(colors):
    """10 rows at a time do not divide over 8 devices; the figures are those of one device."""
    rows = {}
    for name, devices in (("one", 1), ("eight", 8)):
        cfg = with_data(colors, **{"evaluate.batch_size": 10, "evaluate.rows": 13})
        cfg["eval_data"] = cfg["data"]
        grid = mesh.make_mesh("data=-1", jax.devices()[:devices])
        program = registry.build(cfg, grid)
        with jax.set_mesh(grid):
            state, frozen = program.init(jax.random.key(0))
            state = dataclasses.replace(state, ema=jax.tree.map(lambda a: a + 0.01, state.ema))
            data = RunData(program.task, None, {})
            rows[name] = train.evaluate(program, state.ema, frozen, data)
    assert set(rows["one"]) == set(rows["eight"]) and "nats_per_dim" in rows["one"]
    for name, value in rows["one"].items():
        assert rows["eight"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
