"""Real runs of several processes: equal to one process, moved, stopped, killed and refused."""

import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from helpers import interleaved_dataset, object_store
from helpers.paths import ROOT
from helpers.training_runs import RUNNER, environment, run_config, state_of

from starflow2_jax import config
from starflow2_jax.checkpoints import digest, orbax, steps as step_folders
from starflow2_jax.models import starflow2
from starflow2_jax.training.logging import run_log

LAUNCHER = ROOT / "launch" / "multi_process.sh"
# Processes, devices.
SHAPES = {"2x4": (2, 8), "1x8": (1, 8), "4x2": (4, 8), "1x1": (1, 1), "2x1": (2, 2)}
# No grids and evaluations but where they are what is tested: each is a program to compile.
QUIET = {"sample.every": 0, "evaluate.every": 0, "layout": "fsdp", "mesh": "fsdp=-1"}
# Tests share few cores with others: a process that waits for one is not lost.
PATIENT = dict.fromkeys(("rendezvous_timeout", "initialization", "heartbeat", "shutdown"), 200)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from starflow2_jax.data import records
    from starflow2_jax.shapes import generator

    path = tmp_path_factory.mktemp("data") / "shapes"
    rows = generator.make_records(0, 40, 8, tags=("single_object",), label="color")
    records.write(path, rows, classes=generator.classes("color"))
    return path


def _dotted(changes):
    flat_changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {**QUIET, "distributed": PATIENT, **flat_changes}


@pytest.fixture(scope="module")
def make(data):
    """changes -> configuration of a small TarFlow."""
    return lambda **changes: run_config(data, **_dotted(changes))


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """changes -> configuration of `tiny` stage 3, or of another model's, on packed rows of every
    kind of task, beside a VLM drawn from the seed.
    """
    folder = tmp_path_factory.mktemp("rows")
    path, tokenizer = interleaved_dataset.make(
        folder, 64, tasks=("t2i", "caption", "question", "edit")
    )
    latents = interleaved_dataset.make_latents(path, folder / "latents", 8, 16)
    experiment = runpy.run_path(str(ROOT / "experiments" / "stage3_joint.py"))["get_config"]

    def build(model=None, **changes):
        cfg = experiment("tiny")
        if model is not None:
            cfg.model.update(starflow2.options(model))
        for group in (cfg.data, cfg.eval_data):
            group.mixture, group.path, group.latents, group.threads = (), path, latents, 1
        cfg.vlm.path, cfg.fae.path, cfg.text.tokenizer, cfg.init["from"] = "", "", tokenizer, ""
        cfg.train.batch_size, cfg.optim.warmup, cfg.log.every = 8, 2, 1
        cfg.evaluate.rows, cfg.evaluate.batch_size = 8, 8
        cfg.checkpoint.every, cfg.checkpoint.keep = 2, 9
        flat_changes = _dotted(changes)
        cfg.distributed.update(flat_changes.pop("distributed"))
        cfg.update_from_flattened_dict(flat_changes)
        config.check(cfg)
        return config.to_dict(cfg)

    return build


@pytest.fixture(scope="module")
def unbroken(make, tmp_path_factory):
    """Six steps of one process: the run, and the folder of its notes."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(make(train__steps=6), folder / "run", "1x8", notes=folder / "notes"))
    return folder / "run", folder / "notes"


@pytest.fixture
def experiment(request):
    """`make` or `joint`, by the name that a test is parametrized with."""
    return request.getfixturevalue(request.param)


def start(cfg, workdir, shape="2x4", what="", notes="", log_folder=None, **environ):
    """Processes that train, started by the launcher."""
    processes, devices = SHAPES[shape]
    log_folder = pathlib.Path(log_folder or workdir)
    log_folder.parent.mkdir(parents=True, exist_ok=True)
    file = log_folder.with_suffix(".json")
    file.write_text(json.dumps(cfg))
    command = ["bash", str(LAUNCHER), str(processes), "--cpu", str(devices)]
    command += ["--logs", str(log_folder.with_suffix(".logs"))]
    command += [sys.executable, str(RUNNER), str(file), str(workdir), what]
    if notes:
        notes.mkdir(exist_ok=True, parents=True)
        command.append(str(notes))
    return subprocess.Popen(
        command,
        env={**environment(), "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process, expected=0, timeout=900):
    output = process.communicate(timeout=timeout)[0].decode()
    assert process.returncode == expected, output[-4000:]
    return output


def losses(workdir):
    return {row["step"]: row["loss"] for row in run_log.read_rows(workdir) if "loss" in row}


def ids_of(notes):
    """Example ids by step, the processes' rows one after the other."""
    steps = {}
    for file in sorted(notes.glob("ids_*.jsonl")):
        for line in file.read_text().splitlines():
            number, ids = json.loads(line)
            steps.setdefault(number, {})[file.name] = ids
    return {n: [id for name in sorted(parts) for id in parts[name]] for n, parts in steps.items()}


def assert_restored(notes, workdir, number, cfg):
    """Check that the restored shards cover the saved state and equal it bit for bit."""
    saved = jax.tree.leaves(state_of(workdir, number, cfg))
    covered = [np.zeros(leaf.shape, bool) for leaf in saved]
    files = list(notes.glob(f"restored_{number}_*.npz"))
    assert files
    for file in files:
        for name, part in np.load(file).items():
            index, location = name.split(" ", 1)
            location = tuple(slice(*ends) for ends in json.loads(location))
            assert part.tobytes() == saved[int(index)][location].tobytes(), name
            covered[int(index)][location] = True
    assert all(c.all() for c in covered)


def assert_same_run(moved, unbroken_run, notes, whole_notes, steps, tolerance=1e-5):
    actual, reference = losses(moved), losses(unbroken_run)
    assert list(actual) == list(reference) == list(range(1, steps + 1))
    for number, loss in actual.items():
        assert abs(loss - reference[number]) <= tolerance, (number, loss, reference[number])
    expected_ids = ids_of(whole_notes)
    for number, ids in ids_of(notes).items():
        assert ids == expected_ids[number], number


def test_two_processes_killed_and_moved_to_one_lose_nothing(make, unbroken, tmp_path):
    """One of two is killed after step 4; the other ends with a message; one process goes on."""
    cfg, run = make(train__steps=6), tmp_path / "moved" / "run"
    output = finish(start(cfg, run, "2x4", "1@before:4", tmp_path / "a"), expected=137)
    assert "process 1 (" in output and "exited without an error (killed" in output
    assert output.splitlines()[-1].startswith(
        "error: the first of 2 processes to end: process 1: ended by signal 9"
    )
    ended = [(run.with_suffix(".logs") / f"process_{i}.reason").stat().st_mtime for i in (0, 1)]
    assert 0 < ended[0] - ended[1] < 60
    newest = step_folders.latest(run)
    assert newest == 2 and not any(r.problems for r in orbax.verify(run, newest))
    output = finish(start(cfg, run, "1x8", notes=tmp_path / "b"))
    assert f"resumed {run} at step 2" in output
    assert_restored(tmp_path / "b", run, 2, cfg)
    unbroken_run, whole_notes = unbroken
    assert_same_run(run, unbroken_run, tmp_path / "b", whole_notes, 6)
    assert_same_run(run, unbroken_run, tmp_path / "a", whole_notes, 6)


@pytest.mark.slow
def test_sigterm_on_one_process_saves_once_and_ends_all(make, tmp_path):
    """And its grids are drawn where the layout cuts what is drawn over the processes."""
    over = {"layout": "tp", "mesh": "data=2,tensor=4", "sample__every": 1}
    cfg = make(train__steps=1_000_000, checkpoint__every=500_000, **over)
    run = tmp_path / "run"
    process = start(cfg, run)
    deadline = time.time() + 600
    while not run_log.read_rows(run):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    children = subprocess.check_output(["pgrep", "-f", f"{RUNNER} {tmp_path}/run.json"]).split()
    pids = [p for p in map(int, children) if _environment(p).get("JAX_PROCESS_ID") == "1"]
    victim = next(p for p in pids if "python" in os.readlink(f"/proc/{p}/exe"))
    os.kill(victim, signal.SIGTERM)
    output = finish(process, timeout=300)
    steps = step_folders.steps(run)
    assert [entry.status for entry in steps] == ["sealed"]
    assert output.count(f"stopped by a signal at step {steps[0].step}, saved") == 2
    assert max(losses(run)) == steps[0].step
    assert (run / "samples" / "00000001.png").exists()


def _environment(pid):
    text = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(entry.partition("=")[::2] for entry in text.split("\0"))


def test_processes_of_different_configurations_are_refused(make, tmp_path):
    """Before anything is compiled or written."""
    cfg, other = make(), make(optim__lr=0.5)
    (tmp_path / "other.json").write_text(json.dumps(other))
    script = tmp_path / "run.sh"
    script.write_text(
        f"[ $JAX_PROCESS_ID = 1 ] && config={tmp_path}/other.json || config={tmp_path}/run.json\n"
        f"exec {sys.executable} {RUNNER} $config {tmp_path}/run\n"
    )
    (tmp_path / "run.json").write_text(json.dumps(cfg))
    command = ["bash", str(LAUNCHER), "2", "--cpu", "2", "--logs", str(tmp_path / "logs")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [*command, "bash", str(script)],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stderr
    # Of processor time: nothing here waits.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    assert "differ in the configuration: optim.lr: 0.001 and 0.5" in done.stderr.splitlines()[-1]
    for process in range(2):
        reason = (tmp_path / "logs" / f"process_{process}.reason").read_text()
        assert "differ in the configuration: optim.lr: 0.001 and 0.5" in reason
    assert "compiled" not in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mesh": "data=3"}, "mesh: {'data': 3, .*} needs 3 devices, 2 are there"),
        ({"train__batch_size": 5, "mesh": "data=2"}, "train.batch_size=5 is not divisible by"),
        ({}, "the checkpoint of step 4 is copied in part: "),
    ],
    ids=["mesh", "batch", "half a checkpoint"],
)
def test_bad_input_ends_every_process_with_the_same_words(make, tmp_path, changes, words):
    """Before anything is compiled; within a minute, of processor time since others work here."""
    run = tmp_path / "run"
    if not changes:
        (run / "checkpoints" / "4").mkdir(parents=True)
        (run / "checkpoints" / "4" / digest.SIDECAR).write_text("")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    log_folder = tmp_path / "beside"
    process = start(make(**changes), run, "2x1", log_folder=log_folder)
    output = finish(process, expected=1)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    for index in range(2):
        reason = (tmp_path / "beside.logs" / f"process_{index}.reason").read_text()
        assert re.search(words, reason), reason
    assert "compiled in" not in output


# -------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["make", "joint"], indirect=True)
def test_a_chain_of_shapes_equals_the_unbroken_run(experiment, tmp_path):
    cfg = experiment(train__steps=20, checkpoint__every=20)
    unbroken_run, run = tmp_path / "whole" / "run", tmp_path / "chain" / "run"
    finish(start(cfg, unbroken_run, "2x4", notes=tmp_path / "w"))
    stops = {"2x4": 5, "1x8": 10, "4x2": 15, "1x1": 20}
    before = None
    for shape, stop in stops.items():
        output = finish(start(cfg, run, shape, f"stop:{stop}", tmp_path / shape))
        assert step_folders.latest(run) == stop
        if before:
            assert f"resumed {run} at step {before}" in output
            assert_restored(tmp_path / shape, run, before, cfg)
        assert set(range((before or 0) + 1, stop + 1)) <= set(ids_of(tmp_path / shape))
        before = stop
    for shape in stops:
        assert_same_run(run, unbroken_run, tmp_path / shape, tmp_path / "w", 20)


@pytest.mark.slow
def test_resumed_on_the_same_mesh_is_bit_identical(make, tmp_path):
    cfg = make(train__steps=8, checkpoint__every=4)
    finish(start(cfg, tmp_path / "whole", "2x4"))
    for what in ("stop:3", "stop:6", ""):
        finish(start(cfg, tmp_path / "run", "2x4", what))
    actual, reference = (state_of(tmp_path / name, 8, cfg) for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, actual, reference)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


LAYOUTS = {
    "dp": "data=8", "fsdp": "fsdp=8", "tp": "data=2,tensor=4", "fsdp_tp": "data=2,fsdp=2,tensor=2",
    # A slice is a process where there are several.
    "hybrid": {"1x8": "data=2,fsdp=4", "2x4": "data=2,fsdp=4", "4x2": "data=4,fsdp=2"},
}  # fmt: skip


def compare_processes(build, folder, layout, steps, shapes, step_changes):
    """The same losses and evaluations of every number of processes as of one."""
    rows, sizes = {}, LAYOUTS[layout]
    for shape in ("1x8", *shapes):
        over = sizes if isinstance(sizes, str) else sizes[shape]
        cfg = build(train__steps=steps, layout=layout, mesh=over, **step_changes)
        finish(start(cfg, folder / shape, shape))
        rows[shape] = [
            (row["step"], row.get("loss", row.get("eval/nats_per_dim")))
            for row in run_log.read_rows(folder / shape)
        ]
    assert len(rows["1x8"]) >= steps and rows["1x8"][-1][1] != rows["1x8"][0][1]
    for shape in shapes:
        for (number, actual), (same, reference) in zip(rows[shape], rows["1x8"], strict=True):
            assert number == same and abs(actual - reference) <= 1e-5, (
                shape,
                number,
                actual,
                reference,
            )


@pytest.mark.slow
def test_two_processes_train_the_joint_stage_as_one_does(joint, tmp_path):
    """With one layer of everything: each process compiles the step."""
    sizes = {"width": 64, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 96}
    vlm = dataclasses.replace(starflow2.tiny().vlm, **sizes)
    flow = starflow2.flow_config(64, side=8, channels=16, width=64, head_dim=32, layers=(1, 1))
    step_changes = {
        "evaluate__every": 3,
        "checkpoint__every": 3,
        "model": starflow2.PretzelConfig(vlm, flow),
    }
    compare_processes(joint, tmp_path, "fsdp_tp", 3, ("2x4",), step_changes)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["make", "joint"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_processes_equal_those_of_one(experiment, request, tmp_path, layout):
    """Evaluations included, and grids where there are some."""
    step_changes = {"evaluate__every": 10, "checkpoint__every": 20}
    pictures = "make" in request.node.callspec.params["experiment"]
    step_changes |= {"sample__every": 10} if pictures else {}
    compare_processes(experiment, tmp_path, layout, 20, ("2x4", "4x2"), step_changes)
    for shape in ("1x8", "2x4", "4x2") if pictures else ():
        assert (tmp_path / shape / "samples" / "00000020.png").exists()


@pytest.mark.parametrize(
    "stops",
    [{"1x8": 3, "1x1": 6}, pytest.param({"2x4": 3, "4x2": 4, "1x1": 6}, marks=pytest.mark.slow)],
    ids=len,
)
def test_a_chain_of_shapes_in_an_object_store(make, unbroken, tmp_path, monkeypatch, stops):
    """Objects cannot be renamed or appended to; `convert verify` finds every step sealed."""
    (tmp_path / "objects").mkdir()
    server, url = object_store.serve(tmp_path / "objects")
    store = {"OBJECT_STORE": str(tmp_path / "objects"), "TENSORSTORE_GCS_HTTP_URL": url}
    store["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    object_store.use()
    cfg, (unbroken_run, whole_notes) = make(train__steps=6), unbroken
    run, before = epath.Path("gs://bucket/runs/a"), None
    for shape, stop in stops.items():
        place = {"notes": tmp_path / shape, "beside": tmp_path / "beside" / shape}
        output = finish(start(cfg, run, shape, f"stop:{stop}", **place, **store))
        if before:
            assert f"resumed {run} at step {before}" in output
            assert_restored(tmp_path / shape, run, before, cfg)
        assert step_folders.latest(run) == stop
        before = stop
    for shape in stops:
        assert_same_run(run, unbroken_run, tmp_path / shape, whole_notes, 6)
    assert (run / "report.html").exists()
    reports = orbax.verify(run)
    assert [r.step for r in reports][-1] == 6
    assert all(r.status == "sealed" and not r.problems for r in reports)
    server.shutdown()


WHERE = ("data", "step", "before", "writing", "after")


@pytest.mark.slow
def test_killed_at_twenty_random_points(make, tmp_path):
    """Whichever process dies in whatever it does: the run goes on from its last commit."""
    cfg = make(train__steps=6, checkpoint__keep=9)
    finish(start(cfg, tmp_path / "whole", "2x4"))
    unbroken_run, rng = losses(tmp_path / "whole"), random.Random(0)
    for trial in range(20):
        run, location = tmp_path / f"run{trial}", WHERE[trial % len(WHERE)]
        kill_step = rng.choice(
            (2, 4, 6) if location in ("before", "writing", "after") else (2, 3, 4, 5)
        )
        what = f"{rng.choice('01')}@{location}:{kill_step}"
        output = start(cfg, run, "2x4", what).communicate(timeout=900)[0].decode()
        assert output.splitlines()[-1].startswith("error: the first of 2 processes to end"), output
        newest = step_folders.latest(run) or 0
        # A save waits for the commit of the one before.
        saved_step = {"before": kill_step - 2, "writing": kill_step - 2, "after": kill_step}.get(
            location, (kill_step - 1) // 2 * 2 - 2
        )
        assert newest >= saved_step, (what, newest)
        for entry in step_folders.committed(run):
            assert not any(r.problems for r in orbax.verify(run, entry.step)), what
        finish(start(cfg, run, "2x4"))
        assert losses(run) == unbroken_run, what
        jax.tree.map(
            np.testing.assert_array_equal,
            state_of(run, 6, cfg),
            state_of(tmp_path / "whole", 6, cfg),
        )
