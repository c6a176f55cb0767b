"""Real training processes: stopped, killed, resumed, moved to other meshes, and refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.paths import EXPERIMENTS
from helpers.training_runs import environment, finish, rows_of, run_config, start, state_of

from starflow2_jax import train
from starflow2_jax.checkpoints import digest, steps
from starflow2_jax.data import records
from starflow2_jax.evaluation.report import run_report
from starflow2_jax.runtime import folder_lock
from starflow2_jax.shapes import generator
from starflow2_jax.training.logging import run_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    rows = generator.make_records(0, 40, 8, tags=("single_object",), label="color")
    records.write(path, rows, classes=generator.classes("color"))
    return path


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    cfg = run_config(data)
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    output = finish(start(cfg, workdir))
    assert (workdir / "report.html").exists() and "done" in output
    return cfg, workdir


def assert_equal_runs(one, other, cfg):
    jax.tree.map(np.testing.assert_array_equal, state_of(one, 6, cfg), state_of(other, 6, cfg))
    assert rows_of(one) == rows_of(other)


def test_rows_and_checkpoints_of_a_run(unbroken):
    cfg, workdir = unbroken
    rows = rows_of(workdir)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if "eval/nats_per_dim" in r] == [3, 6]
    saved = [(s.step, s.status) for s in steps.steps(workdir)]
    assert saved == [(2, "sealed"), (4, "sealed"), (6, "sealed")]
    assert run_log.read_config(workdir) == cfg


KILLS = ["after:2", "writing:4", "before:4", "after:4", "writing:6"]


@pytest.mark.parametrize(
    "kill", [k if k == "writing:4" else pytest.param(k, marks=pytest.mark.slow) for k in KILLS]
)
def test_killed_and_resumed_equals_unbroken_bit_for_bit(unbroken, tmp_path, kill):
    cfg, unbroken_run = unbroken
    workdir = tmp_path / "run"
    finish(start(cfg, workdir, kill), expected=-signal.SIGKILL)
    newest = steps.latest(workdir)
    assert newest in ((2, 4) if kill == "writing:4" else (2, 4, 6))
    output = finish(start(cfg, workdir))
    if newest != 6:
        assert f"resumed {workdir} at step {newest}" in output
    assert_equal_runs(unbroken_run, workdir, cfg)


@pytest.mark.slow
def test_resume_on_other_meshes(unbroken, tmp_path):
    cfg, unbroken_run = unbroken
    workdir = tmp_path / "run"
    cfg = {**cfg, "sample": {**cfg["sample"], "every": 0}}  # samples need a program of their own
    for devices, event in ((8, "after:2"), (4, "after:4")):
        fsdp = {**cfg, "layout": "fsdp", "mesh": f"fsdp={devices}"}
        finish(start(fsdp, workdir, event, devices=devices), expected=-signal.SIGKILL)
    assert "resumed" in finish(start({**cfg, "layout": "dp", "mesh": "data=1"}, workdir))
    resumed_rows, expected_rows = rows_of(workdir), rows_of(unbroken_run)
    assert [r["step"] for r in resumed_rows] == [r["step"] for r in expected_rows]
    for a, b in zip(resumed_rows, expected_rows):
        name = "loss" if "loss" in a else "eval/nats_per_dim"
        assert abs(a[name] - b[name]) <= 1e-5, (a["step"], a[name], b[name])


def test_sigterm_saves_and_the_same_command_resumes(data, tmp_path):
    long = {"train.steps": 1_000_000, "checkpoint.every": 500_000}
    cfg = run_config(data, **long, **{"sample.every": 0, "evaluate.every": 0})
    workdir = tmp_path / "run"
    stopped = []
    for _ in range(2):
        process = start(cfg, workdir)
        deadline = time.time() + 200
        last_stop = stopped[-1] if stopped else 0
        while not any(row["step"] > last_stop for row in run_log.read_rows(workdir)):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output = finish(process)
        stopped.append(steps.latest(workdir))
        assert f"stopped by a signal at step {stopped[-1]}" in output
    assert f"resumed {workdir} at step {stopped[0]}" in output
    assert stopped[1] > stopped[0] > 0


def test_finished_workdir_says_so(unbroken, tmp_path, capsys):
    cfg, workdir = unbroken
    shutil.copytree(workdir, tmp_path / "run")
    # Killed between the commit of its last step and the digests of it.
    (tmp_path / "run" / "checkpoints" / "6" / digest.SIDECAR).unlink()
    train.train(cfg, str(tmp_path / "run"))
    assert "is finished: step 6 of 6" in capsys.readouterr().out
    assert {entry.status for entry in steps.steps(tmp_path / "run")} == {"sealed"}


def test_another_configuration_is_refused_with_the_differing_keys(unbroken):
    cfg, workdir = unbroken
    before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
    other = {**cfg, "optim": {**cfg["optim"], "lr": 0.5}, "log": {**cfg["log"], "every": 2}}
    with pytest.raises(ValueError, match=r"another configuration:\n  optim.lr: 0.001 -> 0.5\n"):
        train.train(other, str(workdir))
    assert sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*")) == before


def test_changed_data_are_refused_and_moved_data_are_not(unbroken, data, tmp_path, capsys):
    cfg, workdir = unbroken
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    moved_cfg = {**cfg, "data": {**cfg["data"], "path": str(moved)}}
    train.train(moved_cfg, str(workdir))
    assert "finished" in capsys.readouterr().out
    shutil.rmtree(moved)
    rows = generator.make_records(9, 40, 8, tags=("single_object",), label="color")
    records.write(moved, rows, classes=generator.classes("color"))
    with pytest.raises(ValueError, match=r"data.path"):
        train.train(moved_cfg, str(workdir))
    # The same folder with other data in it.
    shutil.copytree(workdir, tmp_path / "run")
    run_log.save_config(tmp_path / "run", moved_cfg)
    with pytest.raises(ValueError, match="the data have changed since step 6: fingerprints"):
        train.train(moved_cfg, str(tmp_path / "run"))


def test_records_are_compared_with_the_checkpoint(unbroken, tmp_path):
    cfg, workdir = unbroken
    shutil.copytree(workdir, tmp_path / "run")
    run = tmp_path / "run"
    metrics, other = run / run_log.METRICS, {**cfg, "optim": {**cfg["optim"], "lr": 0.5}}
    text = metrics.read_text()
    metrics.write_text(text.replace('"loss": ', '"loss": 1', 1))
    for function in (lambda: train.train(cfg, str(run)), lambda: run_report.write(run)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: its first \d+ bytes"):
            function()
    metrics.write_text(text)
    (run / run_log.CONFIG).unlink()
    with pytest.raises(ValueError, match=r"another configuration:\n  optim.lr: 0.001 -> 0.5\n"):
        train.train(other, str(run))
    (run / run_log.RUN).unlink()  # it names the configuration's sha256
    run_log.save_config(run, other)
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of the newest"):
        train.train(other, str(run))
    # Descriptions are checked before Orbax reads them.
    for name in ("ema/_METADATA", "params/_sharding", "step/manifest.ocdbt"):
        file = run / "checkpoints" / "6" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        damaged = rf"step 6 is damaged: \S+/checkpoints/6/{name}: sha256.*newest good step: 4"
        with pytest.raises(ValueError, match=damaged):
            train.train(cfg, str(run))
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def test_one_process_trains_in_a_folder(unbroken):
    cfg, workdir = unbroken
    with (
        folder_lock.lock(workdir, "trains"),
        pytest.raises(RuntimeError, match=r"run: another process trains here \(process \d+"),
    ):
        train.train(cfg, str(workdir))


def test_of_two_processes_that_start_at_once_one_trains(data, tmp_path):
    long = {"train.steps": 1_000_000, "checkpoint.every": 500_000}
    cfg = run_config(data, **long, **{"sample.every": 0, "evaluate.every": 0})
    workdir = tmp_path / "run"
    processes = [start(cfg, workdir), start(cfg, workdir)]
    deadline = time.time() + 200
    while all(process.poll() is None for process in processes):
        assert time.time() < deadline
        time.sleep(0.1)
    processes.sort(key=lambda process: process.poll() is None)
    refused, trained = processes
    message = rf"run: another process trains here \(process {trained.pid} on \S+\); end it first"
    assert re.search(message, finish(refused, expected=1))
    while not run_log.read_rows(workdir):
        assert trained.poll() is None and time.time() < deadline
        time.sleep(0.1)
    trained.send_signal(signal.SIGTERM)
    assert "stopped by a signal at step" in finish(trained)


def test_a_step_that_is_not_finite_stops_with_ids_and_a_dump(data, tmp_path):
    cfg = run_config(data, **{"optim.lr": 1e9, "optim.clip": 0.0, "optim.warmup": 0})
    output = finish(start(cfg, tmp_path / "run"), expected=1)
    assert "is not finite; the batch (ids " in output
    dumps = list((tmp_path / "run" / "nonfinite").glob("*.npz"))
    assert len(dumps) == 1
    arrays = np.load(dumps[0])
    assert arrays["image"].shape == (16, 8, 8, 3)
    assert len(json.loads(dumps[0].with_suffix(".json").read_text())["ids"]) == 16


def test_warm_start_takes_the_averaged_weights(unbroken, tmp_path):
    cfg, source = unbroken
    cfg = {**cfg, "init": {**cfg["init"], "from": str(source), "ema": True}}
    cfg = {**cfg, "optim": {**cfg["optim"], "lr": 0.0, "final_lr": 0.0}}
    finish(start(cfg, tmp_path / "run", "after:2"), expected=-signal.SIGKILL)
    started, averaged = state_of(tmp_path / "run", 2, cfg), state_of(source, 6, cfg)
    jax.tree.map(np.testing.assert_array_equal, started.params, averaged.ema)


@pytest.mark.fast
def test_dry_run_compiles_and_writes_nothing(tmp_path):
    experiment_file = EXPERIMENTS / "tarflow_pixels.py"
    flags = [
        f"--config={experiment_file}:tiny", "--dry_run", "--config.model.width=64",
        "--config.model.layers=(1,1)", "--config.train.batch_size=8", "--layout=fsdp",
        "--mesh=fsdp=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "starflow2_jax.train", *flags]
    done = subprocess.run(
        command, env=environment(2), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "layout fsdp over fsdp=2" in done.stdout and "per device: arguments" in done.stdout
    assert list(tmp_path.iterdir()) == []
