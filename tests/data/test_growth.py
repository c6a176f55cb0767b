"""Costs grow with the number of records, and no faster: lines and bytes are counted, not time."""

import pathlib

import numpy as np
import pytest
from helpers.operations import count_lines, peak_bytes

from starflow2_jax.benchmarking import data_rows
from starflow2_jax.data import packed_batches, packing, records, statistics
from starflow2_jax.data.mixture_packing import MixtureRows
from starflow2_jax.data.packing import PackingSpec
from starflow2_jax.importers import captioned
from starflow2_jax.importers.tally import Tally

pytestmark = pytest.mark.fast

SMALL, FACTOR = 300, 4
SPEC = PackingSpec(256, 16, 4)


def write(folder, count):
    """Write `count` captioned JPEGs, a shard for every 20 of them."""
    blobs = [records.image_blob(data, "image") for data in data_rows.jpegs(16, 4)]
    rows = (
        records.text_to_image(f"{k}", "made", caption, blobs[k % 4])
        for k, caption in enumerate(data_rows.captions(count))
    )
    return records.write(folder, rows, shard_bytes=20 * len(blobs[0].data))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return two dataset folders, the second `FACTOR` times as large, and the lines of writing."""
    lines = []
    for name, count in (("small", SMALL), ("large", FACTOR * SMALL)):
        folder = tmp_path_factory.mktemp(name) / "data"
        lines.append((str(folder), count_lines(lambda f=folder, n=count: write(f, n))))
    return lines


def options(folder, over):
    return data_rows.row_options(
        folder, packing=SPEC, packing_over=over, grid_side=4, pixels=16, threads=0
    )


def first_batch(folder, over, step=0):
    return next(packed_batches.batches(options(folder, over), batch_size=4, start_step=step))


def locations(folder):
    dataset = records.read(folder)
    return [dataset.location(index) for index in range(len(dataset))]


WORK = {
    "statistics": lambda folder: statistics.describe(records.read(folder)),
    "plan": lambda folder: packing.load_or_make_plan(folder, data_rows.TOKENIZER, SPEC, seed=9),
    "describe": lambda folder: packed_batches.describe(options(folder, "mixture")),
    "first batch": lambda folder: first_batch(folder, "dataset"),
    "first batch of a mixture": lambda folder: first_batch(folder, "mixture"),
    "location": locations,
    "validate": lambda folder: list(records.validate(folder)),
}


def test_writing_grows_with_the_records(folders):
    (_, small), (_, large) = folders
    assert large < 1.1 * FACTOR * small and small > SMALL


@pytest.mark.parametrize("work", WORK)
def test_reading_grows_with_the_records(folders, work):
    for folder, _ in folders:
        first_batch(folder, "dataset")  # makes the plan
    small, large = (count_lines(lambda f=folder: WORK[work](f)) for folder, _ in folders)
    assert 0 < large < 1.1 * FACTOR * small + 200


def test_a_plan_of_a_million_records_is_small():
    rng = np.random.default_rng(0)
    count = 4_000
    lengths, images = rng.integers(20, 500, count), rng.integers(0, 2, count)
    small, large = (
        peak_bytes(lambda n=n: packing.pack(lengths[:n], images[:n], PackingSpec(1536, 256, 4)))
        for n in (count // FACTOR, count)
    )
    assert large < 1.1 * FACTOR * small
    assert large / count < 300  # 300 MB for a million


def test_resuming_packs_nothing_again():
    sizes = np.stack([np.random.default_rng(0).integers(200, 500, 9_000), np.ones(9_000)], -1)
    rows = MixtureRows([sizes.astype(np.int32)], [1.0], PackingSpec(1536, 256, 4))
    lines = [count_lines(lambda row=row: rows[row]) for row in (10_000, 20_000, 40_000, 40_001)]
    assert lines[2] < 2.2 * lines[1] and lines[3] < 50
    # Some 4 records share a row; to pack them took twice as many lines.
    assert lines[2] / 20_000 < 35


def test_images_without_captions_list_their_folder_once(tmp_path, monkeypatch):
    for k, data in enumerate(data_rows.jpegs(16, 1) * 60):
        (tmp_path / f"{k:03d}.jpg").write_bytes(data)
        (tmp_path / f"{k:03d}.caption").write_text("a cat")
    listed, iterdir = [], pathlib.Path.iterdir
    monkeypatch.setattr(pathlib.Path, "iterdir", lambda p: listed.append(p) or iterdir(p))
    tally = Tally(missing_captions=60)
    assert not list(captioned.folder(tmp_path, tally)) and tally.budgets["missing_captions"] == 60
    assert len(listed) == 1 and "000.caption" in tally.first["caption missing"]
