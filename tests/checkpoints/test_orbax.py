"""Checkpoints restore bit-identically on any mesh, and damage is never restored silently."""

import dataclasses
import logging
import os
import random
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from helpers.checkpoint_states import (
    META,
    State,
    abstract,
    bits,
    flip,
    make_state,
    mesh_of,
    run,
    statuses,
)

from starflow2_jax.checkpoints import digest, orbax, steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three sealed steps, written once; tests that break something copy it."""
    workdir = tmp_path_factory.mktemp("saved")
    run(workdir, [1, 2, 3])
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def warnings_of(caplog):
    return " ".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.fast
@pytest.mark.parametrize("devices", [8, 4, 1])
@pytest.mark.parametrize("inside_mesh", [False, True])
def test_restore_on_another_mesh_is_bit_identical(saved, devices, inside_mesh):
    state = make_state(3)
    target = abstract(state, devices)
    if inside_mesh:
        with jax.set_mesh(mesh_of(devices)):
            restored, meta = orbax.restore(saved, None, target)
    else:
        restored, meta = orbax.restore(saved, None, target)
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert isinstance(restored, State) and int(restored.step) == 3
    jax.tree.map(
        lambda leaf, want: leaf.sharding == want.sharding or pytest.fail(), restored, target
    )
    assert meta == META == orbax.read_meta(saved, 3)


def test_save_inside_a_mesh_and_donate_at_once(tmp_path):
    state = make_state(5)
    expected = bits(state)
    writer = orbax.open(tmp_path)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    with jax.set_mesh(mesh_of(8)):
        orbax.save(writer, 5, state, META)
        target = abstract(state)
        for _ in range(3):
            state = overwrite(state)
    jax.block_until_ready(state)
    orbax.close(writer)
    restored, _ = orbax.restore(tmp_path, 5, target)
    assert bits(restored) == expected
    again = jax.tree.map(lambda x: x, restored)
    jax.block_until_ready(overwrite(again))
    assert bits(orbax.restore(tmp_path, 5, target)[0]) == expected


def test_partial_restore_reads_no_optimizer(workdir):
    shutil.rmtree(workdir / "checkpoints" / "3" / "opt_state")
    state = make_state(3)
    target = {"ema": abstract(state, 1).ema}
    parts, meta = orbax.restore(workdir, 3, target, only=("ema",))
    assert set(parts) == {"ema"} and bits(parts["ema"]) == bits(state.ema) and meta == META
    parts, _ = orbax.restore(workdir, 3, abstract(state, 4), only=("params", "ema"))
    assert set(parts) == {"params", "ema"} and bits(parts["params"]) == bits(state.params)
    with pytest.raises(ValueError, match="emma"):
        orbax.restore(workdir, 3, target, only=("emma",))
    with pytest.raises(ValueError, match=r"opt_state/.*missing"):
        orbax.restore(workdir, 3, abstract(state, 1))


def test_parts_may_lack_arrays_and_shardings(tmp_path):
    state = dataclasses.replace(make_state(1, devices=1), ema=None, opt_state=(optax.EmptyState(),))
    writer = orbax.open(tmp_path)
    orbax.save(writer, 1, state, {})
    orbax.close(writer)
    target = jax.eval_shape(lambda: state)
    restored, meta = orbax.restore(tmp_path, None, target)
    assert bits(restored) == bits(state) and restored.opt_state == (optax.EmptyState(),)
    assert restored.ema is None and meta == {}


# --------------------------------------------------------------------------------- another model


def test_another_model_lists_everything_together(saved):
    target = abstract(make_state(3, width=4))
    blocks = target.params["blocks"]
    blocks["2"] = {"start": jax.ShapeDtypeStruct((3,), jnp.float32)}
    del blocks["0"]["start"]
    target = dataclasses.replace(target, step=jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(ValueError) as error:
        orbax.restore(saved, 3, target)
    message = str(error.value)
    assert "1 missing: params.blocks.2.start" in message
    assert "1 unexpected: params.blocks.0.start" in message
    assert "params.blocks.0.query.weight is float32[16, 8], expected float32[16, 4]" in message
    assert "opt_state.1.0.mu.blocks.0.query.weight is float32[16, 8]" in message
    assert "step is int32[], expected float32[]" in message
    assert str(saved) in message


def test_save_refuses_what_restore_could_not_return(tmp_path, saved):
    writer = orbax.open(tmp_path)
    with pytest.raises(TypeError, match=r"params\.rate is a float"):
        orbax.save(writer, 1, {"params": {"rate": 0.1}}, META)
    with pytest.raises(TypeError, match="JSON"):
        orbax.save(writer, 1, make_state(1), {"x": np.float32(1)})
    orbax.save(writer, 1, make_state(1), META)
    orbax.wait(writer)
    with pytest.raises(ValueError, match="committed checkpoint already"):
        orbax.save(writer, 1, make_state(2), META)
    orbax.close(writer)
    assert steps.steps(tmp_path)[0].status == "sealed" and len(steps.steps(tmp_path)) == 1
    with pytest.raises(ValueError, match="keep=0"):
        orbax.open(tmp_path, keep=0)


# ---------------------------------------------------------------------------------------- damage


def flip_and_restore(workdir, path, position, target):
    flip(path, position)
    with pytest.raises(ValueError) as error:
        orbax.restore(workdir, None, target)
    flip(path, position)
    assert str(path) in str(error.value) and "newest good step: 2" in str(error.value)


def test_a_flipped_bit_in_any_file_is_noticed(workdir):
    target, rng = abstract(make_state(3)), random.Random(0)
    files = [p for p in (workdir / "checkpoints" / "3").rglob("*") if p.is_file()]
    assert len(files) > 20
    for path in files:
        if path.stat().st_size:
            flip_and_restore(workdir, path, rng.randrange(8 * path.stat().st_size), target)
    assert bits(orbax.restore(workdir, None, target)[0]) == bits(make_state(3))


@pytest.mark.slow
def test_flipped_bits_at_many_positions_are_noticed(workdir):
    target, rng = abstract(make_state(3)), random.Random(1)
    files = [p for p in (workdir / "checkpoints" / "3").rglob("*") if p.is_file()]
    for path in files:
        for _ in range(20 if path.stat().st_size else 0):
            flip_and_restore(workdir, path, rng.randrange(8 * path.stat().st_size), target)


@pytest.mark.fast
def test_a_damaged_description_of_the_arrays_is_named(workdir, capfd):
    """Orbax would name `_METADATA`, or no file, with the tracebacks of its own threads."""
    for part in ("params", "opt_state"):
        (file,) = (workdir / "checkpoints" / "3" / part / "d").iterdir()
        intact = file.read_bytes()
        for number in range(4):
            flip(file, 8 * len(intact) * number // 4 + 5)
            reads = (
                lambda: orbax.show(workdir),
                lambda: orbax.read_meta(workdir),
                lambda: orbax.restore(workdir, None, {"ema": {}}, only=("ema",)),
            )
            for read in reads:
                with pytest.raises(ValueError, match=f"{file.name}: sha256.*newest good step: 2"):
                    read()
            file.write_bytes(intact)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.fast
def test_newest_good_step_skips_damaged_ones(workdir):
    flip(workdir / "checkpoints" / "3" / "params" / "_METADATA", 100)
    flip(workdir / "checkpoints" / "2" / digest.SIDECAR, 100)
    with pytest.raises(ValueError, match="newest good step: 1"):
        orbax.restore(workdir, None, abstract(make_state(3)))
    reports = {report.step: report for report in orbax.verify(workdir)}
    assert not reports[1].problems
    assert "SHA256SUMS is damaged" in reports[2].problems[0]
    assert reports[3].problems[0].startswith("params/_METADATA")
    flip(workdir / "checkpoints" / "1" / "commit_success.txt", 9)
    with pytest.raises(ValueError, match="no other step with good digests"):
        orbax.restore(workdir, 3, abstract(make_state(3)))


@pytest.mark.fast
def test_intact_files_that_cannot_be_read_are_no_good_step(tmp_path):
    run(tmp_path / "a[1]", [1])
    (report,) = orbax.verify(tmp_path / "a[1]")
    assert report.status == "sealed" and "taken for a pattern" in report.problems[0]


@pytest.mark.fast
def test_truncated_and_missing_files_are_noticed(workdir):
    data = next((workdir / "checkpoints/3/params/d").iterdir())
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(ValueError, match=data.name):
        orbax.restore(workdir, None, abstract(make_state(3)))
    data.unlink()
    with pytest.raises(ValueError, match=f"{data.name}: missing"):
        orbax.restore(workdir, None, abstract(make_state(3)))


def test_a_step_without_a_commit_file_is_skipped(workdir, caplog):
    (workdir / "checkpoints" / "3" / "commit_success.txt").unlink()
    assert steps.latest(workdir) == 2
    assert statuses(workdir) == {1: "sealed", 2: "sealed", 3: "leftover"}
    target = abstract(make_state(3))
    with caplog.at_level(logging.WARNING):
        restored, _ = orbax.restore(workdir, None, target)
    assert int(restored.step) == 2
    assert "[3]" in warnings_of(caplog) and "commit_success.txt" in warnings_of(caplog)
    with pytest.raises(FileNotFoundError, match=r"step 3 has no commit_success.txt.*\[1, 2\]"):
        orbax.restore(workdir, 3, target)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9.*\[1, 2\]"):
        orbax.restore(workdir, 9, target)
    assert "commit_success.txt" in orbax.verify(workdir)[2].problems[0]
    # The same step saved again takes the leftover's place.
    run(workdir, [3])
    assert bits(orbax.restore(workdir, None, target)[0]) == bits(make_state(3))


def test_training_does_not_skip_a_step_that_is_copied_in_part(workdir):
    steps.check_copied(workdir)
    (workdir / "checkpoints" / "3" / "commit_success.txt").unlink()
    words = r"step 3 is copied in part: .*no commit_success.txt.*\(step 2 is whole\)"
    with pytest.raises(ValueError, match=words):
        steps.check_copied(workdir)
    # As a save leaves it that was killed.
    (workdir / "checkpoints" / "3" / digest.SIDECAR).unlink()
    steps.check_copied(workdir)


def test_a_run_without_checkpoints_is_reported(tmp_path):
    assert steps.steps(tmp_path) == [] and steps.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no committed checkpoint"):
        orbax.restore(tmp_path, None, {})


def half_delete(folder, keep):
    """Delete every other file of a step, except those in `keep`, as an interrupted `rm -r`."""
    for path in sorted(Path(folder).rglob("*"))[::2]:
        if path.is_file() and path.name not in keep:
            path.unlink()


def test_a_half_deleted_step_is_not_restored(workdir, caplog):
    target = abstract(make_state(3))
    half_delete(workdir / "checkpoints" / "3", {"commit_success.txt", digest.SIDECAR})
    with pytest.raises(ValueError, match=r"damaged: .*missing.*newest good step: 2"):
        orbax.restore(workdir, None, target)
    (workdir / "checkpoints" / "3" / digest.SIDECAR).unlink()
    with pytest.raises(ValueError, match=r"3.* cannot be read"):
        orbax.restore(workdir, None, target)
    assert orbax.verify(workdir, 3, seal=True)[0].problems
    assert statuses(workdir)[3] == "unsealed"


# ------------------------------------------------------------------------------------------ seals


def test_unsealed_step_restores_with_a_warning_and_can_be_sealed(workdir, caplog):
    sidecar = workdir / "checkpoints" / "3" / digest.SIDECAR
    before = sidecar.read_text()
    sidecar.unlink()
    assert statuses(workdir)[3] == "unsealed"
    with caplog.at_level(logging.WARNING):
        restored, _ = orbax.restore(workdir, None, abstract(make_state(3)))
    assert bits(restored) == bits(make_state(3)) and "--seal" in warnings_of(caplog)
    assert [(r.step, r.status) for r in orbax.verify(workdir)][2] == (3, "unsealed")
    assert not sidecar.exists()
    report = orbax.verify(workdir, 3, seal=True)[0]
    assert report.status == "sealed" and not report.problems and sidecar.read_text() == before
    assert not any(report.problems for report in orbax.verify(workdir))


def test_a_step_that_lacks_its_digests_alone_is_sealed(workdir):
    sidecar = workdir / "checkpoints" / "3" / digest.SIDECAR
    before = sidecar.read_text()
    for is_restored in (False, True):
        sidecar.unlink()
        orbax.seal(workdir, 3, is_restored=is_restored)
        assert sidecar.read_text() == before and statuses(workdir)[3] == "sealed"
    flip(workdir / "checkpoints" / "3" / "step" / "_METADATA", 9)
    orbax.seal(workdir, 3)  # of the damaged file, it does not write another digest
    assert sidecar.read_text() == before


def test_sealing_reads_every_array(workdir):
    folder = workdir / "checkpoints" / "3"
    (folder / digest.SIDECAR).unlink()
    data = next((folder / "params" / "d").iterdir())
    os.truncate(data, data.stat().st_size // 2)
    report = orbax.verify(workdir, 3, seal=True)[0]
    assert "cannot be read" in report.problems[0] and report.status == "unsealed"
    with pytest.raises(ValueError, match="cannot be read"):
        orbax.seal(workdir, 3)
    assert statuses(workdir)[3] == "unsealed"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no coreutils")
def test_sidecar_is_read_by_sha256sum(workdir):
    folder = workdir / "checkpoints" / "3"
    check = ["sha256sum", "--check", "--quiet", digest.SIDECAR]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    flip(folder / "params" / "_METADATA", 3)
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_show_lists_every_array(saved):
    rows = {row.name: row for row in orbax.show(saved, 3)}
    weight = rows["opt_state.1.0.mu.blocks.0.query.weight"]
    assert weight[1:] == ((16, 8), "float32", 512)
    assert rows["params.blocks.0.start"][1:] == ((8,), "bfloat16", 16)
    assert rows["step"][1:] == ((), "int32", 4)
    assert len(rows) == len(jax.tree.leaves(make_state(3)))


# -------------------------------------------------------------------------------------- retention


@pytest.mark.fast
def test_retention_keeps_the_newest_and_the_pinned_steps(tmp_path):
    folder = run(tmp_path, [1, 2, 3, 4, 5, 6, 7], keep=2, keep_every=3)
    assert sorted(int(p.name) for p in folder.iterdir()) == [3, 6, 7]
    run(tmp_path, [9], keep=1)
    assert list(statuses(tmp_path)) == [9]
    # An older step saved on purpose stays, and does not push out the newest.
    run(tmp_path, [8], keep=1)
    assert list(statuses(tmp_path)) == [8, 9]


def test_leftovers_are_removed_once_a_newer_step_is_committed(workdir):
    for step in (1, 3):
        (workdir / "checkpoints" / str(step) / "commit_success.txt").unlink()
    run(workdir, [2 + 2], keep=3)
    assert statuses(workdir) == {2: "sealed", 4: "sealed"}
    (workdir / "checkpoints" / "4" / "commit_success.txt").unlink()
    run(workdir, [3])
    assert statuses(workdir) == {2: "sealed", 3: "sealed", 4: "leftover"}


def test_an_interrupted_removal_leaves_no_listed_step(workdir, monkeypatch, caplog):
    def cut_short(path, *args, **kwargs):
        half_delete(path, {"commit_success.txt", digest.SIDECAR})
        raise OSError("Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path("/")), "rmtree", cut_short)
        with caplog.at_level(logging.WARNING):
            run(workdir, [4], keep=3)
    assert "Device or resource busy" in warnings_of(caplog)
    assert statuses(workdir) == {1: "leftover", 2: "sealed", 3: "sealed", 4: "sealed"}
    run(workdir, [5], keep=3)
    assert list(statuses(workdir)) == [3, 4, 5]


def test_unwritable_digests_are_reported(tmp_path, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(digest, "write", full)
        writer = orbax.open(tmp_path)
        orbax.save(writer, 1, make_state(1), META)
        with pytest.raises(
            RuntimeError, match=r"step 1 is committed, but.*disk is full.*no earlier"
        ):
            orbax.save(writer, 2, make_state(2), META)
    assert statuses(tmp_path) == {1: "unsealed"}
    orbax.save(writer, 2, make_state(2), META)
    orbax.close(writer)
    assert statuses(tmp_path) == {1: "unsealed", 2: "sealed"}


def test_a_flipped_bit_in_meta_is_noticed(workdir):
    path = workdir / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    flip(path, 8 * path.read_bytes().index(b"0.0001") + 3)
    with pytest.raises(ValueError, match=r"_CHECKPOINT_METADATA: sha256.*newest good step: 2"):
        orbax.read_meta(workdir)
    assert orbax.read_meta(workdir, 2) == META


def test_locate_splits_the_path_of_a_step(workdir):
    assert steps.locate(workdir) == (workdir, None)
    assert steps.locate(str(workdir / "checkpoints" / "2") + "/") == (workdir, 2)
