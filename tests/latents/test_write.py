"""Latents encoded offline equal online ones, survive kills, and come from one encoder only."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.tiny_fae import make_run

from starflow2_jax.data import array_store, image_batches, images, manifest, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.latents import codec, write, write_beam
from starflow2_jax.models.fae import codec as fae, teacher
from starflow2_jax.models.patches import scale_pixels
from starflow2_jax.runtime import folder_lock
from starflow2_jax.shapes import generator, tasks

SHARDS, ROWS = 4, 21


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(workdir of a codec, dataset folder)."""
    root = tmp_path_factory.mktemp("latents")
    rows = list(generator.make_records(0, ROWS, 16, tags=("single_object",)))
    size = sum(len(records.encode(row)) for row in rows)
    dataset = records.write(root / "data", rows, shard_bytes=size // SHARDS)
    assert len(dataset.shards) == SHARDS, dataset.shards
    return make_run(root / "run", 0), str(root / "data")


@pytest.fixture(scope="module")
def complete(parts, tmp_path_factory):
    """The folder of the dataset's latents, made by one job."""
    out = tmp_path_factory.mktemp("complete") / "out"
    counts = write.write(out, parts[1], *codec.open_encoder(parts[0]))
    assert counts == {"shards": SHARDS, "made": SHARDS, "kept": 0, "missing": 0}
    return out


def contents(folder):
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def test_latents_of_another_codec_or_dataset_are_removed_and_no_others(parts, complete, tmp_path):
    encode, encoder = codec.open_encoder(parts[0])
    assert not write.remove_stale(tmp_path / "none", parts[1], encoder)
    before = contents(complete)
    assert not write.remove_stale(complete, parts[1], encoder) and contents(complete) == before
    other = {**encoder, "sha256": "0" * 64}
    for job in ((0, 1), (0, 2)):  # finished, and with shards missing
        write.write(tmp_path / "out", parts[1], encode, encoder, shard=job)
        assert not write.remove_stale(tmp_path / "out", parts[1], encoder)
        assert write.remove_stale(tmp_path / "out", parts[1], other)
        assert not (tmp_path / "out").exists()
    # A dataset of records, and its folder of other arrays, are never removed.
    with pytest.raises(DatasetError, match="expected one of arrays"):
        write.remove_stale(parts[1], parts[1], other)
    assert records.read(parts[1])


@pytest.mark.fast
def test_offline_equals_online_bit_for_bit(parts, complete):
    """The rows and the size of the online batch do not matter."""
    opened, dataset = codec.load(parts[0]), records.read(parts[1])
    pixels = np.stack([records.target_image(r, "") for r in dataset])
    stored = array_store.read(complete, dataset.manifest)
    rows = [stored[i][1] for i in range(ROWS)]
    draw = np.random.default_rng(0)
    for size in (1, 5, 8, 19):
        chosen = draw.permutation(ROWS)[:size]
        mean, log_variance = codec.encode(opened, pixels[chosen])
        for k, i in enumerate(chosen):
            np.testing.assert_array_equal(mean[k], rows[i]["latent_mean"][0])
            np.testing.assert_array_equal(log_variance[k], rows[i]["latent_logvar"][0])
    # They are the normalized posterior of the codec.
    scaled = scale_pixels(pixels)
    x = teacher.features(opened.params["teacher"], scaled, opened.teacher)
    raw, _ = fae.posterior(opened.params, x, opened.model)
    np.testing.assert_allclose(
        np.concatenate([r["latent_mean"] for r in rows]), (raw - 0.25) / 0.5, atol=1e-5
    )


def test_all_images_of_a_record_in_order_or_none(parts, tmp_path):
    opened = codec.load(parts[0])
    rows = list(tasks.make_records(0, 12, 16, tasks=("text", "edit", "multi", "caption")))
    dataset = records.write(tmp_path / "data", rows)
    write.write(tmp_path / "out", tmp_path / "data", *codec.open_encoder(parts[0]))
    stored = array_store.read(tmp_path / "out", dataset)
    assert stored.spec["latent_mean"]["shape"] == [-1, 4, 4]
    for (id, arrays), record in zip((stored[i] for i in range(12)), rows):
        count = len(record.imgs)
        assert id == record.id and arrays["latent_mean"].shape == (count, 4, 4)
        if count:
            pixels = np.stack([images.decode(blob.data, "") for blob in record.imgs])
            np.testing.assert_array_equal(codec.encode(opened, pixels)[0], arrays["latent_mean"])
    assert {len(record.imgs) for record in rows} >= {0, 1, 2}
    # A flow reads the latents of the one target image, and refuses a record without one.
    edits = [record for record in rows if record.meta["task"] == "edit"]
    records.write(tmp_path / "edits", edits)
    write.write(tmp_path / "latents_of_edits", tmp_path / "edits", *codec.open_encoder(parts[0]))
    options = {
        "latents": str(tmp_path / "latents_of_edits"),
        "path": str(tmp_path / "edits"),
        "threads": 0,
    }
    batch = next(image_batches.eval_batches(options, batch_size=len(edits)))
    targets = np.stack([records.target_image(record, "") for record in edits])
    np.testing.assert_array_equal(batch["latent_mean"], codec.encode(opened, targets)[0])
    options = {"latents": str(tmp_path / "out"), "path": str(tmp_path / "data"), "threads": 0}
    with pytest.raises(DatasetError, match=r"shapes-text.*expected one image with loss=True"):
        next(image_batches.eval_batches(options, batch_size=1))


def test_the_pipeline_reads_stored_latents(parts, complete):
    options = {"path": parts[1], "latents": str(complete), "threads": 0}
    batch = next(image_batches.batches(options, batch_size=4))
    assert batch["latent_mean"].shape == batch["latent_logvar"].shape == (4, 4, 4)
    assert (
        image_batches.describe(options)["features"][0]["fae"]["sha256"]
        == codec.load(parts[0]).sha256
    )


@pytest.mark.fast
def test_jobs_share_the_shards(parts, complete, tmp_path):
    encoder = codec.open_encoder(parts[0])
    out = tmp_path / "out"
    first = write.write(out, parts[1], *encoder, shard=(1, 2))
    assert first == {"shards": SHARDS, "made": 2, "kept": 0, "missing": 2}
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        manifest.load(out, kind="arrays")
    last = write.write(out, parts[1], *encoder, shard=(0, 2))
    assert last["missing"] == 0 and contents(out) == contents(complete)
    again = write.write(out, parts[1], *encoder, shard=(0, 2))
    assert again == {"shards": SHARDS, "made": 0, "kept": 2, "missing": 0}


def test_another_encoder_is_refused(parts, complete, tmp_path):
    other = codec.open_encoder(make_run(tmp_path / "run", 1))
    before = contents(complete)
    with pytest.raises(DatasetError, match=r"latents of the encoder .*, expected those of"):
        write.write(complete, parts[1], *other)
    out = tmp_path / "part"
    write.write(out, parts[1], *codec.open_encoder(parts[0]), shard=(0, 2))
    with pytest.raises(DatasetError, match="latents of the encoder"):
        write.write(out, parts[1], *other, shard=(1, 2))
    note = out / write.JOB_FILE
    fingerprint = json.loads(note.read_text())["dataset"]
    note.write_text(note.read_text().replace(fingerprint, "0" * 64))
    with pytest.raises(
        DatasetError, match=f"{note.name}: latents of another dataset .sha256 0{{64}}"
    ):
        write.write(out, parts[1], *codec.open_encoder(parts[0]), shard=(1, 2))
    assert contents(complete) == before
    records.write(tmp_path / "data", generator.make_records(9, 4, 16, tags=("single_object",)))
    with pytest.raises(DatasetError, match=r"/dataset\.json: latents of another dataset"):
        write.write(complete, tmp_path / "data", *codec.open_encoder(parts[0]))
    with pytest.raises(DatasetError, match="a dataset of records, expected one of arrays"):
        write.write(parts[1], parts[1], *other)
    with pytest.raises(DatasetError, match="holds other things"):
        write.write(parts[0], parts[1], *other)
    for wrong in ("2/2", "1", "a/b"):
        with pytest.raises(DatasetError, match="--shard"):
            write.parse_shard(wrong)


# -------------------------------------------------------------------------------------- killed jobs

# A job that encodes without a model, so that it starts at once, and kills itself at the N-th event.
# Events come before and after a row is written, a file is renamed or a shard is counted.
JOB = """
import os, signal, sys
import numpy as np
from starflow2_jax.data import array_store
from starflow2_jax.latents import write
out, data, last_event = sys.argv[1], sys.argv[2], int(sys.argv[3])
events = 0
def event():
    global events
    events += 1
    if events == last_event:
        os.kill(os.getpid(), signal.SIGKILL)
def around(function):
    def run(*args):
        event()
        result = function(*args)
        event()
        return result
    return run
array_store.encode = around(array_store.encode)
write.atomic.os.replace = around(os.replace)
write.shards.check_count = around(write.shards.check_count)
def encode(pixels):
    mean = pixels[:, :2, :2].reshape(len(pixels), 4, 3).astype(np.float32)
    return mean, mean - 1
write.write(out, data, encode, {"sha256": "0" * 64, "pixels": 16, "shape": [4, 3]})
print(events)
"""


def run_job(out, data, last_event=0):
    """Run `JOB`, which kills itself at event `last_event`, or never if that is 0."""
    command = [sys.executable, "-c", JOB, str(out), data, str(last_event)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": "."}
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A dataset of records with none, one, and several images."""
    folder = tmp_path_factory.mktemp("several") / "data"
    rows = list(tasks.make_records(0, ROWS, 16, tasks=("text", "edit", "multi", "caption")))
    size = sum(len(records.encode(row)) for row in rows)
    manifest = records.write(folder, rows, shard_bytes=size // SHARDS)
    assert len(manifest.shards) > 2 and {len(row.imgs) for row in rows} >= {0, 1, 2}
    return str(folder)


def kill_and_finish(data, tmp_path, last_event, expected):
    out = tmp_path / f"out{last_event}"
    assert run_job(out, data, last_event).returncode == -signal.SIGKILL
    times_before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    finished = run_job(out, data)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert contents(out) == expected
    times_after = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert times_before.items() <= times_after.items()


def test_killed_between_shards_and_started_again(several, tmp_path):
    plain = run_job(tmp_path / "complete", several)
    assert plain.returncode == 0, plain.stderr[-2000:]
    kill_and_finish(several, tmp_path, int(plain.stdout) // 2, contents(tmp_path / "complete"))
    dataset = records.read(several)
    stored = array_store.read(tmp_path / "complete", dataset.manifest)
    for i in range(ROWS):
        assert stored[i][1]["latent_mean"].shape == (len(dataset[i].imgs), 4, 3)


def test_damaged_shards_are_made_again_or_named(several, tmp_path):
    """Shards that an earlier job left are checked before the manifest has their sha256."""
    expected = run_job(tmp_path / "complete", several)
    assert expected.returncode == 0
    expected = contents(tmp_path / "complete")
    dataset, encoder = records.read(several), {"sha256": "0" * 64, "pixels": 16, "shape": [4, 3]}
    count = len(dataset.manifest.shards)

    def encode(pixels):
        mean = pixels[:, :2, :2].reshape(len(pixels), 4, 3).astype(np.float32)
        return mean, mean - 1

    draw = np.random.default_rng(0)
    for has_digests in (True, False):
        out = tmp_path / f"out_{has_digests}"
        write.write(out, several, encode, encoder, shard=(0, count))
        shard = out / write.shard_name(0, count)
        for damage in range(6):
            data = bytearray(shard.read_bytes())
            data[draw.integers(len(data))] ^= 1 << damage
            shard.write_bytes(data if damage else data[: len(data) // 2])
            if not has_digests:  # as an earlier version left it
                (out / f".{shard.name}.sha256").unlink(missing_ok=True)
            counts = write.write(out, several, encode, encoder, shard=(0, count))
            is_undamaged = shard.read_bytes() == expected[shard.name]
            # Without digests, damage is found where a record cannot be read.
            assert is_undamaged or not has_digests
            assert counts["made"] == 1 or not has_digests
            shard.write_bytes(expected[shard.name])
    out = tmp_path / "out_True"
    write.make_shard(out, dataset, 0, encode, encoder)
    for job in range(1, count - 1):
        write.write(out, several, encode, encoder, shard=(job, count))
    # Damaged between its job and the job that ends the dataset.
    shard.write_bytes(b"")
    (out / shard.name).write_bytes(expected[shard.name][:-1])
    with pytest.raises(DatasetError, match=rf"{shard.name}: sha256 is .* same command makes it"):
        write.write(out, several, encode, encoder, shard=(count - 1, count))
    write.write(out, several, encode, encoder)
    assert contents(out) == expected


def test_one_job_makes_a_shard(parts, tmp_path):
    with folder_lock.lock(tmp_path / "out", "makes shard 0/2", ".job-0-of-2.lock"):
        encode, encoder = codec.open_encoder(parts[0])
        with pytest.raises(RuntimeError, match=r"another process makes shard 0/2 here"):
            write.write(tmp_path / "out", parts[1], encode, encoder, shard=(0, 2))
        write.write(tmp_path / "out", parts[1], encode, encoder, shard=(1, 2))


@pytest.mark.slow
def test_killed_at_ten_random_points(several, tmp_path):
    events = int(run_job(tmp_path / "complete", several).stdout)
    expected = contents(tmp_path / "complete")
    draw = np.random.default_rng(0)
    # The last event is after the manifest and before the removal of temporary files.
    for last_event in (*draw.choice(np.arange(1, events), 9, replace=False), events):
        kill_and_finish(several, tmp_path, int(last_event), expected)


IN_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


@pytest.mark.parametrize(
    "options", [[], pytest.param(IN_PROCESSES, marks=pytest.mark.slow)], ids=["thread", "processes"]
)
def test_beam_makes_the_same(parts, complete, tmp_path, options, monkeypatch):
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    # Bits depend on how XLA compiles; a worker has to compile as this process does (conftest.py).
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    out = tmp_path / "out"
    write.write(out, parts[1], *codec.open_encoder(parts[0]), shard=(3, 4))
    # "DirectRunner" would download a program first.
    runner = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    options = [runner, *options]
    counts = write_beam.write(out, parts[1], codec.open_encoder, parts[0], options=options)
    assert counts == {"shards": SHARDS, "made": SHARDS - 1, "kept": 1, "missing": 0}
    assert contents(out) == contents(complete)


def test_a_model_folder_has_the_same_fingerprint(parts, tmp_path):
    opened = codec.load(parts[0])
    codec.export(opened, tmp_path / "model")
    again = codec.load(str(tmp_path / "model"))
    assert again.sha256 == opened.sha256 and again.teacher == opened.teacher
    image = np.zeros((1, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(codec.encode(again, image)[0], codec.encode(opened, image)[0])
