"""Packing: nothing lost or split, every row fits, equal on every host, written once."""

import json
import pathlib

import grain
import numpy as np
import pytest
from absl import flags

from starflow2_jax import prepare
from starflow2_jax.data import packing, records, shapes
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.packing import Measure
from starflow2_jax.data.records import Img, Record, Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    records.write(path, shapes.make_records(3, 40, 32))
    return str(path)


def run(capsys, *words):
    values = flags.FlagValues()
    prepare.define(values)
    values(["prepare", *map(str, words), "--json"])
    prepare.main("index", [], values)
    return json.loads(capsys.readouterr().out)


def test_every_record_is_in_one_row_that_holds_it():
    lengths = np.random.default_rng(0).integers(1, 900, 3000)
    plan = packing.pack(lengths, 1000, seed=1)
    np.testing.assert_array_equal(np.sort(plan.items), np.arange(3000))
    sums = [plan.lengths[plan[k]].sum() for k in range(len(plan))]
    assert max(sums) <= 1000 and min(len(plan[k]) for k in range(len(plan))) >= 1
    assert plan.waste == pytest.approx(1 - sum(sums) / (1000 * len(plan)))
    assert plan.waste < 0.1
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_plan_depends_on_the_seed_alone():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    same, again, other = (packing.pack(lengths, 100, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(same.items, again.items)
    assert not np.array_equal(same.items, other.items)


def test_a_record_longer_than_a_row_is_named():
    with pytest.raises(DatasetError, match=r"record 1 takes 11 positions, a row has 10 \(2 rec"):
        packing.pack([3, 11, 12], 10)


def test_length_counts_text_images_delimiters_and_turns():
    segments = [Text("ab", False, "user"), Img(0, False, "user"), Text("c", True, "assistant")]
    record = Record(1, "x", "", segments)
    assert packing.length(record, Measure("bytes", 16, 3), len) == 2 + (16 + 2) + 1 + 2 * 3


def test_the_index_is_written_once_and_read_after(folder, capsys):
    words = ("--data", folder, "--row_length", 200, "--image_tokens", 64)
    first = run(capsys, *words)
    file = pathlib.Path(first["out"])
    before = file.read_bytes()
    assert run(capsys, *words) == first and file.read_bytes() == before
    assert first["records"] == 40 and 0 < first["waste"] < 1
    assert run(capsys, *words, "--seed", 1)["out"] != first["out"]
    with pytest.raises(DatasetError, match="a row has 60"):
        run(capsys, "--data", folder, "--row_length", 60)
    with pytest.raises(DatasetError, match="nowhere: no tokenizer in this folder"):
        run(capsys, *words, "--tokenizer", "nowhere")
    # Half a file, then that of another order.
    for spoil in (before[: len(before) // 2], None):
        if spoil is None:
            with np.load(file) as held:
                arrays = dict(held)
            np.savez(file, **{**arrays, "items": arrays["items"] * 0})
        else:
            file.write_bytes(spoil)
            with pytest.raises(DatasetError, match="damaged packing plan"):
                run(capsys, *words)
            file.write_bytes(before)
    with pytest.raises(DatasetError, match="not a plan of these 40 records"):
        run(capsys, *words)


def test_rows_are_a_grain_dataset_that_hosts_share(folder):
    _, plan = packing.index(folder, Measure("bytes", 32), 150, seed=4)
    dataset = records.read(folder)
    rows = packing.rows(dataset, plan)
    assert isinstance(rows, grain.MapDataset) and len(rows) == len(plan)
    ids = [[record.id for record in rows[k]] for k in range(len(rows))]
    assert sorted(name for row in ids for name in row) == sorted(record.id for record in dataset)
    for hosts in (1, 2, 4):
        shared = [rows.shuffle(seed=7)[host::hosts] for host in range(hosts)]
        found = [shared[k % hosts][k // hosts] for k in range(len(rows))]
        order = [record.id for row in found for record in row]
        if hosts == 1:
            first = order
        assert order == first
