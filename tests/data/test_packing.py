"""Packing: nothing lost or split, every row fits, equal on every host, written once."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import grain
import numpy as np
import pytest
from absl import flags
from helpers import interleaved_dataset

from starflow2_jax import prepare
from starflow2_jax.data import chat_layout, packed_batches, packing, plan_files, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.packing import PackingSpec
from starflow2_jax.data.records import Img, Record, Text

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a dataset folder and a tokenizer folder."""
    return interleaved_dataset.make(
        tmp_path_factory.mktemp("packing"), 40, tasks=["t2i", "caption"]
    )


@pytest.fixture(scope="module")
def folder(folders):
    return folders[0]


def run(capsys, *argv):
    values = flags.FlagValues()
    prepare.define(values)
    values(["prepare", *map(str, argv), "--json"])
    prepare.main("index", [], values)
    return json.loads(capsys.readouterr().out)


def test_every_record_is_in_one_row_with_room_for_it():
    rng = np.random.default_rng(0)
    lengths, images = rng.integers(1, 900, 3000), rng.integers(0, 3, 3000)
    plan = packing.pack(lengths, images, PackingSpec(1000, 16, 2), seed=1)
    np.testing.assert_array_equal(np.sort(plan.items), np.arange(3000))
    row_lengths = [plan.lengths[plan[k]].sum() for k in range(len(plan))]
    assert max(row_lengths) <= 1000 and min(len(plan[k]) for k in range(len(plan))) >= 1
    assert max(plan.images[plan[k]].sum() for k in range(len(plan))) == 2
    assert plan.waste == pytest.approx(1 - sum(row_lengths) / (1000 * len(plan)))
    unlimited = packing.pack(lengths, images, PackingSpec(1000, 16), seed=1)
    assert unlimited.spec.image_slots == 55 and unlimited.waste < 0.1
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_plan_depends_on_the_seed_alone():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    plan = lambda seed: packing.pack(lengths, lengths * 0, PackingSpec(100, 16), seed)
    same, again, other = (plan(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(same.items, again.items)
    assert not np.array_equal(same.items, other.items)


def test_a_record_larger_than_a_row_is_named():
    with pytest.raises(DatasetError, match=r"record 1 takes 11 positions, a row has 10 \(2 rec"):
        packing.pack([3, 11, 12], [0, 0, 0], PackingSpec(10, 4))
    with pytest.raises(DatasetError, match=r"record 2 takes 3 images, a row has 2 \(1 rec"):
        packing.pack([3, 4, 5], [0, 1, 3], PackingSpec(10, 4, 2))


def test_a_plan_is_that_of_earlier_versions():
    rng = np.random.default_rng(7)
    lengths, images = rng.integers(1, 900, 20_000), rng.integers(0, 3, 20_000)
    digests = {
        PackingSpec(1000, 16, 2): "b85090edda5c170e",
        PackingSpec(850, 16): "9376337e43214a01",
        PackingSpec(5000, 16, 3): "29fdc0c649d91a01",
    }
    for spec, digest in digests.items():
        plan = packing.pack(lengths, images, spec, 3, leave_out=True)
        stored = plan.items.tobytes() + plan.ends.astype(np.int64).tobytes()
        assert hashlib.sha256(stored).hexdigest().startswith(digest)


def record_size(record, tokenizer, image_tokens, clean_copies=False):
    return tuple(packing.record_sizes([record], tokenizer, image_tokens, clean_copies)[0].tolist())


def test_record_sizes_match_the_chat_layout(folders):
    tokenizer = chat_layout.open_tokenizer(folders[1])
    segments = [
        Text("a red", False, "user"),
        Img(0, False, "user"),
        Text("ring", True, "assistant"),
    ]
    count = lambda text: len(tokenizer.encode(text))
    markup = sum(3 + count(role) for role in ("user", "assistant")) + 2 * count("\n")
    length = count("a red") + (16 + 2) + count("ring") + markup
    # Each turn: start, role, line end; end, line end.
    assert record_size(Record(1, "x", "", segments), tokenizer, 16) == (length, 1)
    # A target image that text follows is read again; the last one is not.
    assert record_size(Record(1, "x", "", segments), tokenizer, 16, True) == (length, 1)
    segments[1:2] = [Img(0, True, "user"), Img(0, True, "user")]
    record = Record(1, "x", "", segments)
    assert record_size(record, tokenizer, 16) == (length + 18, 2)
    assert record_size(record, tokenizer, 16, True) == (length + 3 * 18, 4)
    record = Record(1, "x", "", segments[:-1])
    without, with_copies = (record_size(record, tokenizer, 16, c) for c in (False, True))
    assert with_copies == (without[0] + 18, 3)
    # One by one, encoded together, and by a tokenizer that encodes only one by one.
    dataset = list(records.read(folders[0]))
    single = [record_size(r, tokenizer, 16, True) for r in dataset]
    slow = dataclasses.replace(tokenizer, encode_batch=None)
    for opened in (tokenizer, slow):
        np.testing.assert_array_equal(packing.record_sizes(dataset, opened, 16, True), single)
    parts = [chat_layout.message_parts(record, True)[0] for record in dataset]
    sequences = [chat_layout.apply_chat_template(p, tokenizer, 16) for p in parts]
    assert single == [(len(s.ids), len(chat_layout.image_slots(s))) for s in sequences]


def test_the_plan_is_written_once_and_then_read(folders, capsys):
    folder, tokenizer = folders
    argv = ("--data", folder, "--tokenizer", tokenizer, "--row_length", 200, "--image_tokens", 64)
    first = run(capsys, *argv)
    file = pathlib.Path(first["out"])
    content = file.read_bytes()
    assert run(capsys, *argv) == first and file.read_bytes() == content
    assert first["records"] == 40 and 0 < first["waste"] < 1
    assert run(capsys, *argv, "--seed", 1)["out"] != first["out"]
    assert run(capsys, *argv, "--clean_copies")["out"] != first["out"]
    with pytest.raises(DatasetError, match="a row has 60"):
        run(capsys, "--data", folder, "--tokenizer", tokenizer, "--row_length", 60)
    with pytest.raises(DatasetError, match="nowhere: no tokenizer in this folder"):
        run(capsys, *argv[:2], "--tokenizer", "nowhere")
    with pytest.raises(DatasetError, match="--tokenizer must be given"):
        run(capsys, "--data", folder)
    # Half a file, a newer version of the format, then the plan of another order.
    newer = content.replace(b"PK\1\2-\3-", b"PK\1\2-\3\xff")
    for damaged in (content[: len(content) // 2], newer, None):
        if damaged is None:
            with np.load(file) as arrays:
                arrays = dict(arrays)
            np.savez(file, **{**arrays, "items": arrays["items"] * 0})
        else:
            file.write_bytes(damaged)
            with pytest.raises(DatasetError, match="damaged packing plan"):
                run(capsys, *argv)
            file.write_bytes(content)
    with pytest.raises(DatasetError, match="not a plan of these 40 records"):
        run(capsys, *argv)


def test_hosts_share_the_rows_of_a_plan(folders):
    folder, tokenizer = folders
    _, plan = packing.load_or_make_plan(folder, tokenizer, PackingSpec(150, 32), seed=4)
    dataset = records.read(folder)
    rows = grain.MapDataset.range(len(plan)).map(lambda k: [dataset[int(i)] for i in plan[k]])
    assert isinstance(rows, grain.MapDataset) and len(rows) == len(plan)
    ids = [[record.id for record in rows[k]] for k in range(len(rows))]
    assert sorted(name for row in ids for name in row) == sorted(record.id for record in dataset)
    for hosts in (1, 2, 4):
        shared = [rows.shuffle(seed=7)[host::hosts] for host in range(hosts)]
        collected = [shared[k % hosts][k // hosts] for k in range(len(rows))]
        order = [record.id for row in collected for record in row]
        if hosts == 1:
            first = order
        assert order == first


def test_records_longer_than_a_row_have_a_budget(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "data", ignore=lambda *_: ["index-*.npz"])
    dataset, opened = records.read(folder), chat_layout.open_tokenizer(folders[1])
    lengths = np.sort([record_size(record, opened, 32)[0] for record in dataset])
    spec = PackingSpec(int(lengths[-4]), 32)
    too_long = int((lengths > spec.seq_len).sum())
    assert 0 < too_long < len(dataset)
    load = lambda skip: packing.load_or_make_plan(str(folder), folders[1], spec, skip_long=skip)[1]
    for _ in range(2):  # without a stored plan, and then with one
        with pytest.raises(DatasetError, match=r"\(id '.*data\.skip_long") as error:
            load(too_long - 1)
        assert f"({too_long} of {len(dataset)} records" in str(error.value)
        plan = load(too_long)
        assert plan.num_left_out == too_long and 0 <= plan.waste < 1
    with pytest.raises(DatasetError, match="no record is left"):
        packing.load_or_make_plan(str(folder), folders[1], PackingSpec(3, 32), skip_long=999)
    options = packed_batches.PackedBatchOptions(
        path=str(folder), pixels=32, tokenizer=str(folders[1]), packing=spec, grid_side=4,
        skip_long=too_long, resize="center_crop", packing_over="mixture", threads=0,
    )  # fmt: skip
    assert packed_batches.describe(options)["records_too_long"] == too_long
    long = {r.id for r in dataset if record_size(r, opened, 32)[0] > spec.seq_len}
    for over in ("mixture", "dataset"):
        batches = packed_batches.batches(
            dataclasses.replace(options, packing_over=over), batch_size=8
        )
        ids = [id for _ in range(9) for row in next(batches)["id"] for id in row.split("\n")]
        assert not long & set(ids) and len(set(ids)) > len(dataset) // 2
    rows = [
        row for batch in packed_batches.eval_batches(options, batch_size=8) for row in batch["id"]
    ]
    ids = [id for row in rows if row for id in row.split("\n")]
    assert sorted(ids) == sorted({record.id for record in dataset} - long)


def test_the_plan_of_a_read_only_folder_is_in_the_cache(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders[0], tmp_path / "data")
    for file in folder.glob("index-*.npz"):
        file.unlink()
    write_file = plan_files.atomic.write_file

    def refuse(file, *args):
        if not any(str(place) in file for place in writable):
            raise PermissionError(13, "Permission denied", file)
        write_file(file, *args)

    monkeypatch.setattr(plan_files.atomic, "write_file", refuse)
    monkeypatch.setattr(plan_files, "_CACHE", str(tmp_path / "cache"))
    load = lambda: packing.load_or_make_plan(str(folder), folders[1], PackingSpec(150, 32))
    writable = []
    for place in ("", "cache/plans", "cache/plans"):
        writable[:] = [tmp_path / place] if place and not writable else []
        file, plan = load()
        assert file.startswith(str(tmp_path / place) if place else "") and bool(file) == bool(place)
        assert len(plan.items) == len(plan.lengths)
    assert not list(folder.glob("index-*"))
