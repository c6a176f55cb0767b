"""Rows over a mixture: shares of records, whole epochs, any row at once, the same for any hosts."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax.data import mixture_packing, packed_batches, packing, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.mixture_packing import MixtureRows
from starflow2_jax.data.packing import PackingSpec

pytestmark = pytest.mark.fast

SPEC = PackingSpec(100, 16, 3)


def sizes(count, length, images, seed=0):
    lengths = np.random.default_rng(seed).integers(length - 5, length + 5, count)
    return np.stack([lengths, np.full(count, images)], -1).astype(np.int32)


@pytest.fixture
def block(monkeypatch):
    monkeypatch.setattr(mixture_packing, "BLOCK_RECORDS", 64)


def mixture(seed=0, shuffle=True):
    datasets = [sizes(50, 30, 1), sizes(20, 60, 2), sizes(9, 12, 0)]
    return datasets, MixtureRows(datasets, [2.0, 1.0, 1.0], SPEC, seed=seed, shuffle=shuffle)


def take(rows, count):
    return [list(map(tuple, rows[k].tolist())) for k in range(count)]


def test_best_fit_fills_rows_and_keeps_every_item():
    rng = np.random.default_rng(0)
    lengths, images = rng.integers(1, 100, 3000), rng.integers(0, 3, 3000)
    rows = mixture_packing.best_fit(lengths.tolist(), images.tolist(), SPEC)
    assert sorted(itertools.chain(*rows)) == list(range(3000))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert max(images[row].sum() for row in rows) == 3
    assert len(rows) <= len(packing.pack(lengths, images, SPEC))
    # 40 fits next to 60 exactly, although the row of 50 was opened first.
    assert mixture_packing.best_fit([50, 60, 40], [0, 0, 0], SPEC) == [[0], [1, 2]]
    assert mixture_packing.best_fit([50, 60, 40], [0, 3, 1], SPEC) == [[0, 2], [1]]


def test_rows_are_counted_as_best_fit_makes_them():
    rng = np.random.default_rng(1)
    for trial in range(150):
        top, most = int(rng.integers(1, 101)), int(rng.integers(0, 4))
        lengths = rng.integers(trial % 2, top + 1, 200)  # 0 for an empty record
        images = rng.integers(0, most + 1, 200)
        if trial % 3:
            order = np.argsort(-lengths, kind="stable")
            lengths, images = lengths[order], images[order]
        expected = len(mixture_packing.best_fit(lengths.tolist(), images.tolist(), SPEC))
        assert mixture_packing.count_rows(lengths, images, SPEC) == expected


def test_a_run_resumes_from_stored_counts(block, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(mixture_packing, "_COUNTED_BLOCKS", 4)
    datasets, rows = mixture()
    row = 3 * mixture_packing.BLOCK_RECORDS
    expected = rows[row]
    opened = lambda: MixtureRows(datasets, [2.0, 1.0, 1.0], SPEC, folder=str(tmp_path))
    np.testing.assert_array_equal(opened()[row], expected)
    (file,) = tmp_path.glob("index-rows-*.npz")
    packed, pack = [], mixture_packing.best_fit
    with monkeypatch.context() as patch:
        patch.setattr(mixture_packing, "best_fit", lambda *a: packed.append(1) or pack(*a))
        patch.setattr(mixture_packing, "count_rows", None)
        np.testing.assert_array_equal(opened()[row], expected)
    assert len(rows._ends) > 5 >= len(packed)  # not the blocks before the row
    # Of another seed, of other records, damaged: counted again.
    other = MixtureRows(datasets, [2.0, 1.0, 1.0], SPEC, seed=1, folder=str(tmp_path))
    np.testing.assert_array_equal(other[row], mixture(seed=1)[1][row])
    file.write_bytes(file.read_bytes()[:-40])
    np.testing.assert_array_equal(opened()[row], expected)
    assert "damaged, the rows are counted again" in caplog.text


def test_rows_fit_weights_are_shares_of_records_and_epochs_are_whole(block):
    datasets, rows = mixture()
    taken = take(rows, 400)
    for row in taken:
        length, images = np.sum([datasets[number][index] for number, index in row], 0)
        assert length <= 100 and images <= 3
    # The rows of whole blocks: 32, 16 and 16 records of each.
    visits = Counter(itertools.chain(*taken[: rows._ends[4]]))
    shares = [sum(visits[number, k] for k in range(len(d))) for number, d in enumerate(datasets)]
    assert shares == [5 * 32, 5 * 16, 5 * 16]
    # 160 records are three epochs of 50 and ten more; 80 are four of 20.
    assert {visits[0, k] for k in range(50)} == {3, 4}
    assert {visits[1, k] for k in range(20)} == {4}
    # A row holds records of several datasets, and epochs differ.
    assert sum(len({number for number, _ in row}) > 1 for row in taken) > 200
    assert len(set(map(frozenset, taken))) > 250


def test_any_row_is_found_at_once_and_depends_on_the_seed_alone(block):
    taken = take(mixture()[1], 200)
    for start in (190, 3, 77):
        fresh = mixture()[1]
        assert [list(map(tuple, fresh[k].tolist())) for k in range(start, start + 10)] == taken[
            start : start + 10
        ]
    rows = mixture()[1]
    for k in (199, 0, 100, 5):  # backwards, past the cached blocks and epochs
        assert list(map(tuple, rows[k].tolist())) == taken[k]
    assert take(mixture(seed=1)[1], 200) != taken
    with pytest.raises(IndexError):
        rows[-1]


def test_without_shuffle_the_records_keep_their_order(block):
    _, rows = mixture(shuffle=False)
    first = [pair for row in take(rows, 60) for pair in row]
    assert {pair for pair in first if pair[0] == 1} == {(1, k) for k in range(20)}
    records_of_block = rows._block_records(0).tolist()
    assert [index for number, index in records_of_block if number == 0] == list(range(32))


def test_mixed_rows_leave_less_padding(block):
    datasets, rows = mixture()
    alone = [packing.pack(*d.T, SPEC).waste for d in datasets]
    padding, records_per_row = rows.fill()
    assert padding < 0.12 < 0.24 < alone[1] and records_per_row > 2


def test_a_record_larger_than_a_row_is_named():
    with pytest.raises(DatasetError, match=r"dataset 1 of the mixture, record 2: 101 positions"):
        MixtureRows([sizes(3, 9, 0), np.asarray([[1, 0], [2, 0], [101, 1]])], [1, 1], SPEC)


# ----------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    first, tokenizer = interleaved_dataset.make(folder / "a", 24, tasks=["t2i", "text"])
    second, _ = interleaved_dataset.make(folder / "b", 12, tasks=["edit"])
    entries = ({"path": first, "weight": 3.0}, {"path": second, "weight": 1.0})
    return packed_batches.PackedBatchOptions(
        tokenizer=tokenizer,
        packing=PackingSpec(200, 4, 4),
        packing_over="mixture",
        grid_side=2,
        mixture=entries,
        pixels=16,
        threads=2,
    )


def test_batches_mix_datasets_resume_and_do_not_depend_on_hosts(opts):
    def rows_of(batches):
        return [(id, ids.tobytes()) for b in batches for id, ids in zip(b["id"], b["ids"])]

    unbroken = list(itertools.islice(packed_batches.batches(opts, batch_size=4), 6))
    resumed = packed_batches.batches(opts, batch_size=4, start_step=3)
    for batch, again in zip(unbroken[3:], resumed):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
    shares = [
        next(packed_batches.batches(opts, batch_size=4, start_step=5, rows=rows))
        for rows in ([0, 1], [2], [3])
    ]
    assert rows_of(shares) == rows_of(unbroken[5:])
    first = {record.id for record in records.read(opts.mixture[0]["path"])}
    origin = [{id in first for id in ids.split()} for batch in unbroken for ids in batch["id"]]
    assert {True, False} in origin
    description = packed_batches.describe(opts)
    assert 0 < description["training_waste"] < 0.5 and description["records_per_row"] > 1


def test_processes_make_the_same_batches(opts):
    unbroken = itertools.islice(packed_batches.batches(opts, batch_size=4, start_step=2), 5)
    options = dataclasses.replace(opts, processes=2, threads=1)
    stream = packed_batches.batches(options, batch_size=4, start_step=2)
    for batch, expected in zip(stream, unbroken):
        assert batch["id"] == expected["id"] and batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])
    stream.close()
    with pytest.raises(DatasetError, match="does not exist"):
        packed_batches.batches(dataclasses.replace(options, path="none", mixture=()), batch_size=4)


def test_evaluation_is_that_of_rows_of_one_dataset(opts):
    alone = dataclasses.replace(opts, packing_over="dataset")
    for batch, expected in zip(
        packed_batches.eval_batches(opts, batch_size=4),
        packed_batches.eval_batches(alone, batch_size=4),
        strict=True,
    ):
        assert batch["id"] == expected["id"]
        np.testing.assert_array_equal(batch["ids"], expected["ids"])


def test_stored_latents_are_those_of_each_records_dataset(opts, tmp_path):
    entries = [
        {**entry, "latents": interleaved_dataset.make_latents(entry["path"], tmp_path / n, 2, 3)}
        for n, entry in zip("ab", opts.mixture)
    ]
    stored = dataclasses.replace(opts, mixture=tuple(entries))
    (images, latents) = (next(packed_batches.batches(o, batch_size=8)) for o in (opts, stored))
    used = images["images"].any((2, 3, 4))
    np.testing.assert_array_equal(latents["latent_mean"].any((2, 3)), used)
    for pixels, latent in zip(images["images"][used], latents["latent_mean"][used], strict=True):
        rng = np.random.default_rng(list(pixels.tobytes()[:512]))  # as in `make_latents`
        np.testing.assert_array_equal(latent, rng.standard_normal((4, 3)).astype(np.float32))
    with pytest.raises(ValueError, match="stored latents for all of them or none"):
        mixed = dataclasses.replace(opts, mixture=(entries[0], opts.mixture[1]))
        next(packed_batches.batches(mixed, batch_size=8))
