"""A run's records: rows that outlive a kill, trackers, the progress line, pictures."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from starflow2_jax import config
from starflow2_jax.runtime import atomic
from starflow2_jax.training.logging import image_grid, run_log, throughput, trackers

pytestmark = pytest.mark.fast


def settings(*trackers):
    cfg = config.default()
    cfg.log.trackers = trackers
    return cfg


def test_rows_are_appended_and_read_back(tmp_path):
    first = run_log.open(tmp_path, settings())
    run_log.write_row(first, 1, {"loss": jnp.float32(1.5), "finite": np.bool_(True)})
    run_log.write_row(first, 2, {"loss": float("nan"), "eval/nats_per_dim": jnp.bfloat16(2)})
    run_log.close(first)
    run_log.close(first)
    second = run_log.open(tmp_path, settings(), step=2)
    run_log.write_row(second, 3, {"loss": 1})
    run_log.close(second)
    assert run_log.read_rows(tmp_path) == [
        {"step": 1, "loss": 1.5, "finite": 1},
        {"step": 2, "loss": None, "eval/nats_per_dim": 2.0},
        {"step": 3, "loss": 1},
    ]
    run = json.loads((tmp_path / "run.json").read_text())
    assert [start["step"] for start in run["starts"]] == [0, 2]
    assert run["starts"][0]["versions"]["jax"]
    assert run["starts"][0]["command"] == run_log.command_line()


def test_a_value_that_is_not_one_number_is_named(tmp_path):
    records = run_log.open(tmp_path, settings())
    with pytest.raises(ValueError, match=r"log: loss is float32\[2\], expected one number"):
        run_log.write_row(records, 1, {"loss": jnp.ones(2)})
    with pytest.raises(ValueError, match="log: note is"):
        run_log.write_row(records, 1, {"note": "text"})
    assert run_log.read_rows(tmp_path) == []


def test_cut_keeps_rows_up_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) + "\n" for step in (1, 2, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    assert [row["step"] for row in run_log.read_rows(tmp_path)] == [1, 2, 2, 3, 4]
    run_log.truncate(tmp_path, 2)
    assert path.read_text() == "".join(lines[:3])
    # Opening at a restored step cuts by itself, and leaves nothing else behind.
    run_log.close(run_log.open(tmp_path, settings(), step=1))
    assert path.read_text() == lines[0]
    names = ["config.json", "metrics.jsonl", "run.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_flipped_bit_in_any_record_is_named(tmp_path):
    log = run_log.open(tmp_path, settings())
    for step in (1, 2, 3):
        run_log.write_row(log, step, {"loss": 0.1 * step})
    recorded = {"step": 3, "metrics": run_log.record(log)}
    run_log.write_row(log, 4, {"loss": 0.4})
    run_log.close(log)
    run_log.check_metrics(tmp_path, recorded)
    # Cut to the rows of the checkpoint, as on resuming, and written by another process.
    run_log.truncate(tmp_path, 3)
    run_log.check_metrics(tmp_path, recorded)
    log = run_log.open(tmp_path, settings(), step=3)
    assert run_log.record(log) == recorded["metrics"]
    run_log.close(log)
    run_log.check_metrics(tmp_path, {"step": 3})  # a checkpoint of an earlier version
    draw = np.random.default_rng(0)
    for name in (run_log.METRICS, run_log.CONFIG, run_log.RUN):
        path = tmp_path / name
        stored = path.read_bytes()
        intact = (run_log.read_config(tmp_path), run_log.read_run(tmp_path))
        for index in draw.integers(0, len(stored), 40):
            path.write_bytes(
                stored[:index] + bytes([stored[index] ^ (1 << index % 8)]) + stored[index + 1 :]
            )
            try:
                run_log.check_metrics(tmp_path, recorded)
                read = (run_log.read_config(tmp_path), run_log.read_run(tmp_path))
            except ValueError as error:
                assert f"{tmp_path / name}" in str(error)
                continue
            # White space of run.json, or the name of the digest itself.
            assert name == run_log.RUN and read[0] == intact[0]
            assert {k: read[1][k] for k in ("id", "starts")} == {
                k: intact[1][k] for k in ("id", "starts")
            }
        path.write_bytes(stored)
    (tmp_path / run_log.METRICS).unlink()
    run_log.check_metrics(tmp_path, recorded)  # only warns, see the log
    (tmp_path / run_log.METRICS).write_text('{"step": 4, "loss": 1.0}\n')
    run_log.check_metrics(tmp_path, recorded)


def test_a_config_of_either_of_two_starts_is_accepted(tmp_path):
    run_log.close(run_log.open(tmp_path, settings()))
    first = (tmp_path / run_log.CONFIG).read_bytes()
    cfg = settings()
    cfg.log.every = 77
    run_log.close(run_log.open(tmp_path, cfg))
    # A process may be killed between the two files.
    (tmp_path / run_log.CONFIG).write_bytes(first)
    assert run_log.read_config(tmp_path)["log"]["every"] != 77
    run_log.save_config(tmp_path, cfg)
    assert run_log.read_config(tmp_path)["log"]["every"] == 77
    run = json.loads((tmp_path / run_log.RUN).read_text())
    del run["sha256"], run["config_sha256"]  # a run of an earlier version
    (tmp_path / run_log.RUN).write_text(json.dumps(run))
    assert len(run_log.read_run(tmp_path)["starts"]) == 2
    for text in ('{"id": 1}', "[]", "", '{"id": "x", "starts": [{}]}', "\ufffd\x00"):
        (tmp_path / run_log.RUN).write_text(text)
        with pytest.raises(ValueError, match=r"run\.json"):
            run_log.read_run(tmp_path)


def test_opening_drops_a_half_written_line_before_it_appends(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    records = run_log.open(tmp_path, settings(), step=7)
    run_log.write_row(records, 8, {"loss": 2.0})
    run_log.close(records)
    assert run_log.read_rows(tmp_path) == [{"step": 7, "loss": 1.0}, {"step": 8, "loss": 2.0}]


def test_a_damaged_line_is_an_error_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is .*not json"):
        run_log.open(tmp_path, settings(), step=2)
    assert path.read_text() == '{"step": 1}\nnot json\n{"step": 2}\n'
    assert not (tmp_path / "run.json").exists()


WRITER = """
import sys
from starflow2_jax import config
from starflow2_jax.training.logging import run_log
records = run_log.open(sys.argv[1], config.default())
step = 0
while True:
    step += 1
    run_log.write_row(records, step, {"loss": step / 3, "grad_norm": 1 / step})
"""


def test_rows_outlive_kill_9(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=env)
    path, deadline = tmp_path / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (path.exists() and path.stat().st_size > 10_000):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [row["step"] for row in run_log.read_rows(tmp_path)]
    assert len(steps) > 100 and steps == list(range(1, len(steps) + 1))


def test_config_is_saved_and_differs_by_key(tmp_path):
    cfg = settings()
    assert run_log.read_config(tmp_path) is None
    run_log.save_config(tmp_path, cfg)
    saved = run_log.read_config(tmp_path)
    assert config.differences(saved, cfg) == []
    cfg.optim.lr = 0.5
    assert config.differences(saved, cfg) == ["optim.lr: 0.0001 -> 0.5"]


def test_dump_keeps_the_batch(tmp_path):
    batch = {"image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "id": ["a", "b"]}
    path = run_log.dump_batch(tmp_path, 12, batch, ["a", "b"], {"loss": jnp.nan, "finite": False})
    with np.load(path) as saved:
        np.testing.assert_array_equal(saved["image"], batch["image"])
        assert saved.files == ["image"]
    about = json.loads(path.with_suffix(".json").read_text())
    assert about == {"step": 12, "ids": ["a", "b"], "metrics": {"loss": "nan", "finite": "0"}}


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.jax, "process_index", lambda: 1)
    records = run_log.open(tmp_path, settings("tensorboard"))
    run_log.write_row(records, 1, {"loss": 1.0})
    run_log.print_progress(records, 1, 2, {"loss": 1.0})
    assert run_log.write_samples(records, 1, np.zeros((1, 4, 4, 3), np.uint8)) is None
    run_log.upload(records)
    run_log.close(records)
    run_log.save_config(tmp_path, settings())
    assert list(tmp_path.iterdir()) == []


def test_a_remote_workdir_is_uploaded_at_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 9}\n')
    records = run_log.open(tmp_path, settings(), step=1)
    run_log.write_row(records, 2, {"loss": 1.0})
    assert [row["step"] for row in run_log.read_rows(tmp_path)] == [1]
    run_log.upload(records)
    assert [row["step"] for row in run_log.read_rows(tmp_path)] == [1, 2]
    run_log.write_row(records, 3, {"loss": 1.0})
    run_log.close(records)
    assert [row["step"] for row in run_log.read_rows(tmp_path)] == [1, 2, 3]


def test_tensorboard_gets_figures_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    records = run_log.open(tmp_path, settings("tensorboard"))
    run_log.write_row(records, 3, {"loss": 1.25})
    run_log.write_samples(records, 3, np.zeros((2, 8, 8, 3), np.uint8))
    run_log.close(records)
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    values_by_tag = {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        values_by_tag |= {value.tag: (event.step, value) for value in event.summary.value}
    assert values_by_tag["loss"][0] == 3 and values_by_tag["loss"][1].simple_value == 1.25
    assert values_by_tag["samples"][1].image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_figures_pictures_and_one_run_id(tmp_path, monkeypatch, name):
    """A stand-in for the package: what matters here is how it is called."""
    calls, opened = [], []
    run = types.SimpleNamespace(
        log=lambda values, step=None: calls.append((step, values)),
        define_metric=lambda *args, **kwargs: None,
        finish=lambda: calls.append("finish"),
    )

    def init(**options):
        opened.append(options)
        return run

    package = types.SimpleNamespace(init=init, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, name, package)
    for step in (0, 3):
        records = run_log.open(tmp_path / "my_run", settings(name), step=step)
        run_log.write_row(records, step + 1, {"loss": 1.25})
        run_log.write_samples(records, step + 1, np.zeros((1, 64, 64, 3), np.uint8))
        run_log.close(records)
    steps = [values.get("step", step) for step, values in (c for c in calls if c != "finish")]
    assert steps == [1, 1, 4, 4] and calls.count("finish") == 2
    assert calls[0][1]["loss"] == 1.25 and calls[1][1]["samples"] == (72, 72, 3)
    identity = "id" if name == "wandb" else "name"
    assert opened[0][identity] == opened[1][identity] and opened[0]["resume"] == "allow"
    assert opened[0]["config"]["optim"]["lr"] == 1e-4


def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"names 'wandb'.*pip install 'starflow2_jax\[wandb\]'"):
        run_log.open(tmp_path, settings("wandb"))
    with pytest.raises(ValueError, match=r"names 'tensorbord'.*did you mean 'tensorboard'"):
        run_log.open(tmp_path, settings("tensorbord"))
    assert list(tmp_path.iterdir()) == []


def test_rates_leave_out_pauses(monkeypatch):
    clock_time = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock_time[0])
    clock = throughput.Clock()
    assert throughput.rates(clock, 1, tokens=64) == {}
    clock_time[0] += 4
    waited = []
    monkeypatch.setattr(throughput.jax, "block_until_ready", waited.append)
    with throughput.pause(clock, wait_for="metrics"):
        assert waited == ["metrics"]
        clock_time[0] += 50
    speed = throughput.rates(clock, 3, tokens=64, flops=1e9, peak=2e9)
    expected = {"seconds_per_step": 2, "tokens_per_second": 32, "flops_per_second": 5e8}
    assert speed == {**expected, "mfu": 0.25}
    clock_time[0] += 3
    assert throughput.rates(clock, 4, tokens=64)["seconds_per_step"] == 3
    clock_time[0] += 1
    # On a CPU, a step faster than the rate measured at the start shows that it was too low.
    assert throughput.rates(clock, 5, tokens=64, flops=4e9, peak=2e9)["mfu"] == 1
    clock_time[0] += 2
    assert throughput.rates(clock, 6, tokens=64, flops=4e9, peak=2e9)["mfu"] == 0.5
    assert throughput.rates(clock, 6, tokens=64) == {}
    # What is left will have pauses too: 60 s for 5 steps.
    assert throughput.seconds_left(clock, 6, 10) == pytest.approx(4 * 12)


def test_peak_of_this_machine_is_measured():
    assert 1e8 < throughput.peak_flops() < 1e14


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_plain_lines_in_a_file_and_one_line_on_a_terminal(tmp_path, monkeypatch):
    values = {"loss": 1.5, "nats_per_dim": 2.25, "tokens_per_second": 12345.6, "mfu": 0.416}
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stdout", stream)
        records = run_log.open(tmp_path, settings())
        run_log.print_progress(records, 50, 200, values)
        run_log.print_progress(records, 51, 200, {"loss": float("nan")})
        run_log.print_line(records, "saved")
        run_log.close(records)
        text = stream.getvalue()
        line = "step 50/200 (25%)  loss 1.5000  nats/dim 2.2500  12.3k tokens/s  MFU 42%"
        last = "step 51/200 (26%)  loss nan"
        if stream.isatty():
            assert text == f"\r\x1b[2K{line}\r\x1b[2K{last}\nsaved\n"
        else:
            assert text == f"{line}\n{last}\nsaved\n"


def test_grid_places_every_image(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [99, 0, 99]], np.uint8)
    images = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3))
    log_path = tmp_path / "grid.png"
    image_grid.save_grid(log_path, images, ["a red square", *["x"] * 4])
    sheet = np.asarray(Image.open(log_path))
    for colour in colours:
        assert (sheet == colour).all(-1).sum() >= 64**2
    # Three columns, in reading order, captions in black below.
    assert (sheet[20, 20] == colours[0]).all()
    assert (sheet[20, sheet.shape[1] // 2] == colours[1]).all()
    assert (sheet[-60, 20] == colours[3]).all()
    assert (sheet.sum(-1) < 100).any()
    assert image_grid.grid(images, columns=5).shape == (72, 5 * 68 + 4, 3)


def test_grid_refuses_what_is_not_images():
    with pytest.raises(ValueError, match=r"grid: float64\[1, 4, 4, 3\], expected uint8"):
        image_grid.grid(np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="grid: 2 captions for 1 images"):
        image_grid.grid(np.zeros((1, 4, 4, 3), np.uint8), ["a", "b"])
    assert math.isfinite(image_grid.grid(np.zeros((1, 256, 300, 3), np.uint8)).mean())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 99_999])
def test_damaged_files_of_a_run_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        run_log.read_config(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        run_log.read_run(tmp_path)
    with pytest.raises(ValueError, match=r"run\.json"):
        run_log.open(tmp_path, settings())


def test_a_tracker_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    class UsageError(Exception):
        pass

    def fail(**_):
        raise UsageError("No API key configured.\nUse wandb login")

    wandb = types.SimpleNamespace(init=fail, api=types.SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="run `wandb login`"):
        trackers.check(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check(["wandb"])
    with pytest.raises(ValueError, match="wandb cannot be opened: No API key configured"):
        run_log.open(tmp_path, settings("wandb"))
