"""Interleaved rows: every record whole, images where they belong, the same for any hosts."""

import dataclasses

import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax.data import chat_layout, images, packed_batches, records
from starflow2_jax.data.packing import PackingSpec

ROOM = PackingSpec(seq_len=288, image_tokens=4, max_images=4)  # the longest record takes some 220


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    data, held = interleaved_dataset.make(tmp_path_factory.mktemp("rows"))
    return packed_batches.PackedBatchOptions(
        tokenizer=held, packing=ROOM, grid_side=2, path=data, pixels=16, threads=0
    )


def records_of(batch, row, held):
    """What stands in each record of a row: words and image places."""
    found = []
    for number in range(1, batch["segments"][row].max() + 1):
        own = batch["segments"][row] == number
        text = own & (batch["image"][row] < 0)
        found.append((held.decode(batch["ids"][row][text]), batch["image"][row][own & ~text]))
    return found


def test_one_pass_holds_every_record_once_and_whole(opts):
    held, seen = chat_layout.open_tokenizer(opts.tokenizer), {}
    dataset = {record.id: record for record in records.read(opts.path)}
    for batch in packed_batches.eval_batches(opts, batch_size=4):
        for row, ids in enumerate(batch["id"]):
            if not batch["mask"][row]:
                continue
            laid = records_of(batch, row, held)
            assert len(laid) == len(ids.split(" "))
            place = 0
            for id, (words, slots) in zip(ids.split(" "), laid):
                record = dataset[id]
                for segment in record.segs:
                    if isinstance(segment, records.Text):
                        assert segment.s in words
                        continue
                    assert slots[:4].tolist() == [4 * place + n for n in range(4)]
                    shown = images.decode(record.imgs[segment.i].data, id)
                    np.testing.assert_array_equal(batch["images"][row, place], shown)
                    slots, place = slots[4:], place + 1
                assert id not in seen and not len(slots)
                seen[id] = True
            assert not batch["images"][row, place:].any()
    assert len(seen) == len(dataset)


def test_packing_does_not_change_a_record(opts):
    other_ = dataclasses.replace(opts, packing=dataclasses.replace(ROOM, max_images=3, seq_len=256))
    names = ("ids", "target", "positions", "flow_positions")

    def by_id(options):
        found = {}
        for batch in packed_batches.eval_batches(options, batch_size=2):
            for row, ids in enumerate(batch["id"]):
                for number, id in enumerate(ids.split(" ") if ids else ()):
                    own = batch["segments"][row] == number + 1
                    found[id] = [batch[name][row][own] for name in names]
        return found

    packed, other = by_id(opts), by_id(other_)
    assert packed.keys() == other.keys()
    for id, arrays in packed.items():
        for a, b in zip(arrays, other[id]):
            np.testing.assert_array_equal(a, b)


def test_hosts_share_the_rows_of_a_batch(opts):
    def take(hosts, step):
        given = {"batch_size": 4, "start_step": step}
        shares = np.arange(4).reshape(hosts, -1).tolist()
        parts = [next(packed_batches.batches(opts, **given, rows=mine)) for mine in shares]
        return [id for part in parts for id in part["id"]], np.concatenate(
            [part["ids"] for part in parts]
        )

    for step in (0, 7):
        ids, arrays = take(1, step)
        for hosts in (2, 4):
            found = take(hosts, step)
            assert found[0] == ids
            np.testing.assert_array_equal(found[1], arrays)
    assert take(1, 0)[0] != take(1, 7)[0]


def test_an_epoch_over_changing_numbers_of_hosts_loses_and_repeats_nothing(opts):
    total, seen = packed_batches.describe(opts)["rows"], []
    for step in range(-(-total // 4)):
        hosts = (1, 2, 4)[step % 3]
        for mine in np.arange(4).reshape(hosts, -1).tolist():
            found = next(packed_batches.batches(opts, batch_size=4, start_step=step, rows=mine))
            seen += found["id"]
    ids = " ".join(seen[:total]).split()
    assert sorted(ids) == sorted(record.id for record in records.read(opts.path))


def test_drops_belong_to_records_that_draw_and_depend_on_the_step_alone(opts):
    held = chat_layout.open_tokenizer(opts.tokenizer)
    every = dataclasses.replace(opts, drop_text=1.0)
    batch = next(packed_batches.batches(every, batch_size=16))
    same = next(packed_batches.batches(every, batch_size=16))
    np.testing.assert_array_equal(batch["ids"], same["ids"])
    dataset = {record.id: record for record in records.read(opts.path)}
    drawn = 0
    for row, ids in enumerate(batch["id"]):
        for id, (words, _) in zip(ids.split(" "), records_of(batch, row, held)):
            record = dataset[id]
            draws = any(isinstance(s, records.Img) and s.loss for s in record.segs)
            asked = [s.s for s in record.segs if isinstance(s, records.Text) and s.role == "user"]
            assert all((words_ in words) != draws for words_ in asked)
            drawn += draws
    assert drawn > 3
    nothing = dataclasses.replace(opts, drop_text=0.0, drop_all=1.0)
    shown = next(packed_batches.batches(nothing, batch_size=16))
    assert shown["images"].any((2, 3, 4)).sum() < batch["images"].any((2, 3, 4)).sum()


def test_blank_images_show_nothing(opts):
    blank = dataclasses.replace(opts, blank_images=True)
    batch = next(packed_batches.eval_batches(blank, batch_size=4))
    assert set(np.unique(batch["images"])) <= {0, 128} and (batch["images"] == 128).any()


def test_bad_options_and_rows_are_named(opts):
    with pytest.raises(ValueError, match=r"data.path or data.mixture: exactly one"):
        packed_batches.describe(dataclasses.replace(opts, path=""))
    mixture = ({"path": opts.path, "wieght": 2},)
    with pytest.raises(ValueError, match="did you mean 'weight'"):
        packed_batches.describe(dataclasses.replace(opts, path="", mixture=mixture))
    held = chat_layout.open_tokenizer(opts.tokenizer)
    items = chat_layout.apply_chat_template([chat_layout.MessagePart("none", 0)] * 2, held, 4)
    with pytest.raises(ValueError, match="12 positions and 1 images, room is for 9 and 1"):
        packed_batches.build_packed_row([items], PackingSpec(9, 4, 1), 2, held.pad)
    small = dataclasses.replace(opts, pixels=32)
    with pytest.raises(ValueError, match=r"image is 16 x 16 \(h x w\), expected data.pixels=32"):
        next(packed_batches.eval_batches(small, batch_size=2))
