"""Interleaved rows: every record whole, images where they belong, the same for any hosts."""

import dataclasses

import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax.data import chat_layout, images, packed_batches, records
from starflow2_jax.data.packing import PackingSpec

pytestmark = pytest.mark.fast

SPEC = PackingSpec(seq_len=288, image_tokens=4, max_images=4)  # the longest record takes some 220


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    data, tokenizer = interleaved_dataset.make(tmp_path_factory.mktemp("rows"))
    return packed_batches.PackedBatchOptions(
        tokenizer=tokenizer, packing=SPEC, grid_side=2, path=data, pixels=16, threads=0
    )


def record_contents(batch, row, tokenizer):
    """Return the text and the image slots of each record of a row."""
    contents = []
    for number in range(1, batch["segments"][row].max() + 1):
        in_record = batch["segments"][row] == number
        is_text = in_record & (batch["image"][row] < 0)
        contents.append(
            (
                tokenizer.decode(batch["ids"][row][is_text]),
                batch["image"][row][in_record & ~is_text],
            )
        )
    return contents


def test_one_pass_has_every_record_once_and_complete(opts):
    tokenizer, visited = chat_layout.open_tokenizer(opts.tokenizer), {}
    dataset = {record.id: record for record in records.read(opts.path)}
    for batch in packed_batches.eval_batches(opts, batch_size=4):
        for row, ids in enumerate(batch["id"]):
            if not batch["mask"][row]:
                continue
            contents = record_contents(batch, row, tokenizer)
            assert len(contents) == len(ids.split("\n"))
            image = 0
            for id, (text, slots) in zip(ids.split("\n"), contents):
                record = dataset[id]
                for segment in record.segs:
                    if isinstance(segment, records.Text):
                        assert segment.s in text
                        continue
                    assert slots[:4].tolist() == [4 * image + n for n in range(4)]
                    expected = images.decode(record.imgs[segment.i].data, id)
                    np.testing.assert_array_equal(batch["images"][row, image], expected)
                    slots, image = slots[4:], image + 1
                assert id not in visited and not len(slots)
                visited[id] = True
            assert not batch["images"][row, image:].any()
    assert len(visited) == len(dataset)


def test_packing_does_not_change_a_record(opts):
    other_options = dataclasses.replace(
        opts, packing=dataclasses.replace(SPEC, max_images=3, seq_len=256)
    )
    names = ("ids", "target", "positions", "flow_positions")

    def by_id(options):
        arrays_by_id = {}
        for batch in packed_batches.eval_batches(options, batch_size=2):
            for row, ids in enumerate(batch["id"]):
                for number, id in enumerate(ids.split("\n") if ids else ()):
                    in_record = batch["segments"][row] == number + 1
                    arrays_by_id[id] = [batch[name][row][in_record] for name in names]
        return arrays_by_id

    packed, other = by_id(opts), by_id(other_options)
    assert packed.keys() == other.keys()
    for id, arrays in packed.items():
        for a, b in zip(arrays, other[id]):
            np.testing.assert_array_equal(a, b)


def test_hosts_share_the_rows_of_a_batch(opts):
    def take(hosts, step):
        shares = np.arange(4).reshape(hosts, -1).tolist()
        parts = [
            next(packed_batches.batches(opts, batch_size=4, start_step=step, rows=rows))
            for rows in shares
        ]
        return [id for part in parts for id in part["id"]], np.concatenate(
            [part["ids"] for part in parts]
        )

    for step in (0, 7):
        ids, arrays = take(1, step)
        for hosts in (2, 4):
            collected = take(hosts, step)
            assert collected[0] == ids
            np.testing.assert_array_equal(collected[1], arrays)
    assert take(1, 0)[0] != take(1, 7)[0]


def test_an_epoch_over_changing_numbers_of_hosts_loses_and_repeats_nothing(opts):
    total, order = packed_batches.describe(opts)["rows"], []
    for step in range(-(-total // 4)):
        hosts = (1, 2, 4)[step % 3]
        for rows in np.arange(4).reshape(hosts, -1).tolist():
            batch = next(packed_batches.batches(opts, batch_size=4, start_step=step, rows=rows))
            order += batch["id"]
    ids = " ".join(order[:total]).split()
    assert sorted(ids) == sorted(record.id for record in records.read(opts.path))


def test_dropped_conditions_belong_to_records_with_a_target_image_and_depend_on_the_step(opts):
    tokenizer = chat_layout.open_tokenizer(opts.tokenizer)
    text_options = dataclasses.replace(opts, drop_text=1.0)
    batch = next(packed_batches.batches(text_options, batch_size=16))
    same = next(packed_batches.batches(text_options, batch_size=16))
    np.testing.assert_array_equal(batch["ids"], same["ids"])
    dataset = {record.id: record for record in records.read(opts.path)}
    num_targets = 0
    for row, ids in enumerate(batch["id"]):
        for id, (content, _) in zip(ids.split("\n"), record_contents(batch, row, tokenizer)):
            record = dataset[id]
            has_target_image = any(isinstance(s, records.Img) and s.loss for s in record.segs)
            user_texts = [
                s.s for s in record.segs if isinstance(s, records.Text) and s.role == "user"
            ]
            assert all((text in content) != has_target_image for text in user_texts)
            num_targets += has_target_image
    assert num_targets > 3
    all_options = dataclasses.replace(opts, drop_text=0.0, drop_all=1.0)
    without_images = next(packed_batches.batches(all_options, batch_size=16))
    assert without_images["images"].any((2, 3, 4)).sum() < batch["images"].any((2, 3, 4)).sum()


def test_blank_images_are_gray(opts):
    options = dataclasses.replace(opts, blank_images=True)
    batch = next(packed_batches.eval_batches(options, batch_size=4))
    assert set(np.unique(batch["images"])) <= {0, 128} and (batch["images"] == 128).any()


def test_bad_options_and_rows_are_named(opts):
    with pytest.raises(ValueError, match=r"data.path or data.mixture: exactly one"):
        packed_batches.describe(dataclasses.replace(opts, path=""))
    mixture = ({"path": opts.path, "wieght": 2},)
    with pytest.raises(ValueError, match="did you mean 'weight'"):
        packed_batches.describe(dataclasses.replace(opts, path="", mixture=mixture))
    tokenizer = chat_layout.open_tokenizer(opts.tokenizer)
    sequence = chat_layout.apply_chat_template(
        [chat_layout.MessagePart("none", 0)] * 2, tokenizer, 4
    )
    with pytest.raises(ValueError, match="12 positions and 2 images, room is for 9 and 1"):
        packed_batches.build_packed_row([sequence], PackingSpec(9, 4, 1), 2, tokenizer.pad)
    other_size = dataclasses.replace(opts, pixels=32)
    with pytest.raises(ValueError, match=r"image is 16 x 16 \(h x w\), expected data.pixels=32"):
        next(packed_batches.eval_batches(other_size, batch_size=2))
