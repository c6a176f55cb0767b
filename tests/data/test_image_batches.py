"""Image batches: batch k depends on the options and k alone."""

import os
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from ml_collections import ConfigDict

from starflow2_jax.data import array_store, chat_layout, image_batches, images, records, shards
from starflow2_jax.data.manifest import DatasetError, Importer


def make_records(count, name="r", side=8, captions=None):
    for k in range(count):
        pixels = np.full((side, side, 3), k % 256, np.uint8)
        blob = records.image_blob(images.encode_png(pixels), "x")
        caption = captions[k] if captions else f"picture {k}"
        yield records.text_to_image(f"{name}{k}", "test", caption, blob, {"label": k % 3})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 22 records in several shards."""
    path = tmp_path_factory.mktemp("pipeline") / "data"
    records.write(path, make_records(22), classes=["a", "b", "c"], shard_bytes=1500)
    return str(path)


def take(cfg, count, **kwargs):
    return list(islice(image_batches.batches({"threads": 0, "pixels": 8, **cfg}, **kwargs), count))


def share(rows, host, hosts):
    """Return the rows of a batch that a host makes if every host takes one block."""
    return range(rows * host // hosts, rows * (host + 1) // hosts)


def ids(batches):
    return [batch["id"] for batch in batches]


def flat(lists):
    return [item for row in lists for item in row]


@pytest.mark.fast
def test_a_batch_has_images_labels_and_tokens(folder):
    cfg = {"path": folder, "labels": True, "text": "bytes", "text_length": 12, "shuffle": False}
    first, second = take(cfg, 2, batch_size=4)
    assert first["id"] == ["r0", "r1", "r2", "r3"]
    assert first["image"].dtype == np.uint8 and first["image"].shape == (4, 8, 8, 3)
    assert (first["image"][:, 0, 0, 0] == [0, 1, 2, 3]).all()
    assert first["label"].dtype == np.int32 and first["label"].tolist() == [0, 1, 2, 0]
    assert first["tokens"].dtype == np.int32 and first["tokens"].shape == (4, 12)
    assert bytes(first["tokens"][2, :9].astype(np.uint8) - 1) == b"picture 2"
    assert (first["tokens"][2, 9:] == 0).all()
    assert second["id"] == ["r4", "r5", "r6", "r7"]
    assert set(take({"path": folder}, 1, batch_size=4)[0]) == {"id", "image"}


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_example_once(folder, shuffle):
    # 11 batches of 6 are 3 epochs of 22: batches reach across the end of an epoch.
    order = flat(ids(take({"path": folder, "shuffle": shuffle}, 11, batch_size=6)))
    epochs = [order[k : k + 22] for k in (0, 22, 44)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"r{k}" for k in range(22))
    assert (epochs[0] != epochs[1] and epochs[1] != epochs[2]) == shuffle
    assert (epochs[0] == [f"r{k}" for k in range(22)]) != shuffle


def test_seeds_give_unrelated_orders(folder):
    epochs = []
    for seed in (0, 1):
        order = flat(ids(take({"path": folder, "seed": seed}, 22, batch_size=2)))
        epochs += [tuple(order[:22]), tuple(order[22:])]
    # grain alone would repeat the second epoch of seed 0 as the first of seed 1.
    assert len(set(epochs)) == 4


@pytest.mark.fast
@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(folder, hosts):
    cfg = {"path": folder, "labels": True}
    global_batches = take(cfg, 8, batch_size=8)
    parts = [take(cfg, 8, batch_size=8, rows=share(8, p, hosts)) for p in range(hosts)]
    for step, batch in enumerate(global_batches):
        assert flat(part[step]["id"] for part in parts) == batch["id"]
        for name in ("image", "label"):
            joined = np.concatenate([part[step][name] for part in parts])
            assert (joined == batch[name]).all()


def test_a_host_reads_its_own_rows_only(folder, monkeypatch):
    read = []
    original = shards.Payloads.__getitem__

    def counting(self, index):
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(shards.Payloads, "__getitem__", counting)
    take({"path": folder}, 3, batch_size=8, rows=share(8, 1, 4))
    assert len(read) == 6


@pytest.mark.fast
@pytest.mark.parametrize("threads", [0, 3])
def test_start_step_equals_skipping(folder, threads):
    cfg = {"path": folder, "threads": threads}
    assert ids(take(cfg, 9, batch_size=5))[4:] == ids(take(cfg, 5, batch_size=5, start_step=4))


def test_a_run_resumes_on_another_number_of_hosts(folder):
    cfg = {"path": folder}
    uninterrupted = ids(take(cfg, 6, batch_size=4))
    resumed = [ids(take(cfg, 3, batch_size=4, start_step=3, rows=share(4, p, 2))) for p in (0, 1)]
    assert [a + b for a, b in zip(*resumed)] == uninterrupted[3:]


def test_a_mixture_follows_its_weights(folder, tmp_path):
    records.write(tmp_path / "b", make_records(7, "b"), classes=["a", "b", "c"])
    entries = [{"path": folder, "weight": 3.0}, {"path": str(tmp_path / "b"), "weight": 1.0}]
    cfg = {"mixture": entries, "labels": True}
    order = flat(ids(take(cfg, 25, batch_size=16)))
    assert 90 <= sum(name[0] == "b" for name in order) <= 110
    counts = Counter(order)
    assert max(counts[f"b{k}"] for k in range(7)) - min(counts[f"b{k}"] for k in range(7)) <= 1
    assert ids(take(cfg, 2, batch_size=16, start_step=3)) == ids(take(cfg, 5, batch_size=16))[3:]
    assert image_batches.describe({**cfg, "pixels": 8})["records"] == 29


def test_one_record_fills_a_batch(tmp_path):
    records.write(tmp_path / "one", make_records(1))
    assert ids(take({"path": str(tmp_path / "one")}, 2, batch_size=2)) == [["r0", "r0"]] * 2


@pytest.mark.parametrize("hosts", [1, 2])
def test_eval_batches_pass_once_in_order(folder, hosts):
    cfg = {"path": folder, "pixels": 8, "threads": 2, "labels": True}
    parts = [
        list(image_batches.eval_batches(cfg, batch_size=8, rows=share(8, p, hosts)))
        for p in range(hosts)
    ]
    assert [len(part) for part in parts] == [3] * hosts
    order, mask = [], []
    for step in range(3):
        for part in parts:
            batch = part[step]
            assert len(batch["id"]) == 8 // hosts == len(batch["mask"]) == len(batch["image"])
            assert batch["mask"].dtype == np.float32
            order += batch["id"]
            mask += batch["mask"].tolist()
    assert order == [f"r{k}" for k in range(22)] + [""] * 2
    assert mask == [1.0] * 22 + [0.0] * 2


def test_eval_batches_of_a_mixture_are_one_folder_after_the_other(folder, tmp_path):
    records.write(tmp_path / "b", make_records(3, "b"))
    cfg = {"mixture": [{"path": folder}, {"path": str(tmp_path / "b")}], "pixels": 8}
    order = flat(ids(image_batches.eval_batches(cfg, batch_size=5)))
    assert order == [f"r{k}" for k in range(22)] + ["b0", "b1", "b2"]


@pytest.mark.fast
def test_describe_gives_records_classes_and_fingerprints(folder):
    description = image_batches.describe({"path": folder, "pixels": 8})
    assert description["records"] == 22 and description["classes"] == ["a", "b", "c"]
    assert len(description["fingerprints"]) == 1 and description["features"] == []


def test_images_of_another_size_need_resize(folder):
    with pytest.raises(DatasetError, match=r"id 'r0'.*8 x 8 .h x w., expected data.pixels=16"):
        take({"path": folder, "pixels": 16, "shuffle": False}, 1, batch_size=2)
    batch = take({"path": folder, "pixels": 16, "resize": "center_crop"}, 1, batch_size=2)[0]
    assert batch["image"].shape == (2, 16, 16, 3)


def test_text_that_does_not_fit_is_named(folder):
    cfg = {"path": folder, "text": "bytes", "text_length": 9, "shuffle": False}
    take(cfg, 2, batch_size=5)
    with pytest.raises(DatasetError, match=r"id 'r10'.*10 bytes, but text_length is 9"):
        take(cfg, 3, batch_size=5)


def test_byte_tokens():
    assert chat_layout.byte_tokens("a\u00e9", 5).tolist() == [98, 196, 170, 0, 0]
    assert chat_layout.byte_tokens("", 2).tolist() == [0, 0]
    assert chat_layout.byte_tokens("\x01", 1).tolist() == [2]
    with pytest.raises(DatasetError, match="a NUL character"):
        chat_layout.byte_tokens("\x00", 1)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"pixel": 8}, r"data\.pixel: unknown key; did you mean 'pixels'"),
        ({"path": "", "pixels": 8}, "exactly one"),
        ({"resize": "stretch"}, r"data\.resize is 'stretch'"),
        ({"text": "bytes"}, r"data\.text_length"),
        ({"text": "features"}, r"data\.features"),
        ({"pixels": 0}, r"data\.pixels"),
        ({"skip_bad": -1}, r"data\.skip_bad"),
        ({"path": "", "mixture": [{"path": "x", "wieght": 1}]}, "did you mean 'weight'"),
    ],
)
def test_wrong_options_are_named(folder, cfg, message):
    with pytest.raises(ValueError, match=message):
        image_batches.batches({"path": folder, "pixels": 8, **cfg}, batch_size=2)


def test_options_may_be_a_config_dict_with_none(folder):
    cfg = ConfigDict({"path": folder, "pixels": 8, "latents": "", "features": "", "text": "none"})
    assert len(next(image_batches.batches(cfg, batch_size=2))["id"]) == 2
    take({"path": folder, "latents": None, "mixture": None}, 1, batch_size=2)


def test_rows_outside_the_batch_are_refused(folder):
    for rows in ([4, 6], [-1], []):
        with pytest.raises(ValueError, match=r"are not of a batch of batch_size=6"):
            take({"path": folder}, 1, batch_size=6, rows=rows)


def test_hosts_may_make_rows_in_any_pattern(folder):
    """On a TPU slice the mesh follows the wires, not the hosts."""
    cfg, batches = {"path": folder}, take({"path": folder}, 3, batch_size=8)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7], [7]):
        for step, batch in enumerate(take(cfg, 3, batch_size=8, rows=rows)):
            assert batch["id"] == [batches[step]["id"][row] for row in rows]
    masked = list(image_batches.eval_batches({**cfg, "pixels": 8}, batch_size=8, rows=[1, 6]))
    assert [batch["row"].tolist() for batch in masked] == [[1, 6], [9, 14], [17, 22]]
    assert masked[-1]["mask"].tolist() == [1.0, 0.0]


def test_an_epoch_may_change_the_number_of_hosts(folder):
    """Read with 1, 2, 4, then 2 hosts: every record comes once, in the order of a single host."""
    cfg, order, step = {"path": folder}, [], 0
    for hosts, steps in ((1, 3), (2, 2), (4, 4), (2, 2)):
        parts = [
            take(cfg, steps, batch_size=4, start_step=step, rows=share(4, host, hosts))
            for host in range(hosts)
        ]
        order += [id for batch in zip(*parts) for part in batch for id in part["id"]]
        step += steps
    assert sorted(order[:22]) == sorted(f"r{k}" for k in range(22))
    assert order == flat(ids(take(cfg, 11, batch_size=4)))


def test_labels_need_classes(tmp_path, folder):
    records.write(tmp_path / "plain", make_records(3))
    with pytest.raises(DatasetError, match="has no classes"):
        take({"path": str(tmp_path / "plain"), "labels": True}, 1, batch_size=2)
    records.write(tmp_path / "other", make_records(3), classes=["x", "y", "z"])
    entries = [{"path": folder}, {"path": str(tmp_path / "other")}]
    with pytest.raises(DatasetError, match="different classes"):
        take({"mixture": entries, "labels": True}, 1, batch_size=2)


@pytest.fixture
def with_bad_records(tmp_path):
    """Write 20 records; the images of numbers 3 and 11 are truncated."""

    def produce():
        for k, record in enumerate(make_records(20, side=40)):
            if k in (3, 11):
                data = record.imgs[0].data[:60]
                blob = records.image_blob(data, "x")
                record = records.text_to_image(record.id, "test", "bad", blob)
            yield record

    records.write(tmp_path / "data", produce())
    return {"path": str(tmp_path / "data"), "pixels": 40}


@pytest.mark.fast
def test_a_bad_record_stops_by_default(with_bad_records):
    with pytest.raises(DatasetError, match=r"shard-00000-of-00001.*record 3 .id 'r3'.*decoded"):
        take({**with_bad_records, "shuffle": False, "threads": 2}, 3, batch_size=4)


def test_bad_records_within_the_budget_are_counted_once(with_bad_records, caplog):
    cfg = {**with_bad_records, "skip_bad": 2, "shuffle": False}
    batches = take(cfg, 15, batch_size=4)  # three epochs
    assert batches[0]["id"] == ["r0", "r1", "r2", "r4"] == batches[10]["id"]
    logged = [message for message in caplog.messages if "skipped" in message]
    assert len(logged) == 2 and "'r3'" in logged[0] and "2 of 2" in logged[1]
    with pytest.raises(DatasetError, match=r"2 bad records, more than data\.skip_bad=1.*'r11'"):
        take({**cfg, "skip_bad": 1}, 5, batch_size=4)
    masks = [b["mask"].tolist() for b in image_batches.eval_batches(cfg, batch_size=10)]
    assert flat(masks) == [float(k not in (3, 11)) for k in range(20)]


def rows(dataset, width=2, change=None):
    for k, record in enumerate(dataset):
        arrays = {
            "latent_mean": np.full((4, width), k, np.float32),
            "latent_logvar": np.full((4, width), -k, np.float32),
            "text": np.full((3, 5), k, np.float32),
        }
        yield (change(k) if change else record.id), arrays


def write_features(path, dataset, **kwargs):
    importer = Importer("test", "1")
    return array_store.write(
        path, rows(dataset, **kwargs), dataset.manifest, importer=importer, features={"vae": "x"}
    )


def test_latents_and_text_features_replace_images_and_texts(folder, tmp_path):
    dataset = records.read(folder)
    arrays_manifest = write_features(tmp_path / "f", dataset)
    assert [s.records for s in arrays_manifest.shards] == [
        s.records for s in dataset.manifest.shards
    ]
    arrays_folder = str(tmp_path / "f")
    cfg = {
        "path": folder,
        "latents": arrays_folder,
        "features": arrays_folder,
        "text": "features",
        "labels": True,
    }
    batch = take({**cfg, "pixels": 0, "shuffle": False}, 2, batch_size=3)[1]
    assert set(batch) == {"id", "latent_mean", "latent_logvar", "text", "label"}
    assert batch["id"] == ["r3", "r4", "r5"]
    assert batch["latent_mean"].shape == (3, 4, 2) and batch["latent_mean"].dtype == np.float32
    assert batch["latent_mean"][:, 0, 0].tolist() == [3, 4, 5]
    assert batch["latent_logvar"][:, 0, 0].tolist() == [-3, -4, -5]
    assert batch["text"].shape == (3, 3, 5) and batch["text"][:, 0, 0].tolist() == [3, 4, 5]
    assert batch["label"].tolist() == [0, 1, 2]
    mixed = take({"path": folder, "features": arrays_folder, "text": "features"}, 1, batch_size=3)[
        0
    ]
    assert set(mixed) == {"id", "image", "text"}
    description = image_batches.describe({**cfg, "pixels": 0})
    assert description["features"][0]["vae"] == "x"
    assert description["features"][0]["arrays"]["text"] == {"dtype": "float32", "shape": [3, 5]}


def test_features_of_another_dataset_are_refused(folder, tmp_path):
    records.write(tmp_path / "other", make_records(22, "o"))
    other = records.read(tmp_path / "other")
    write_features(tmp_path / "f", other)
    with pytest.raises(DatasetError, match="made from the dataset"):
        take({"path": folder, "latents": str(tmp_path / "f")}, 1, batch_size=2)


def test_rows_of_other_records_are_refused(folder, tmp_path):
    dataset = records.read(folder)
    write_features(tmp_path / "f", dataset, change=lambda k: f"r{k if k != 1 else 9}")
    cfg = {"path": folder, "latents": str(tmp_path / "f"), "labels": True, "shuffle": False}
    with pytest.raises(DatasetError, match=r"record 1.*\['r9', 'r1'\]"):
        take(cfg, 1, batch_size=2)


def test_too_few_rows_or_odd_shapes_write_nothing(folder, tmp_path):
    dataset = records.read(folder)
    for source, message in (
        (list(rows(dataset))[:-1], "21 rows for a dataset of 22"),
        ([*rows(dataset), *rows(dataset)], "more rows than the 22"),
        ([*list(rows(dataset))[:3], *rows(dataset, width=3)], "row 'r0': arrays are"),
    ):
        with pytest.raises(DatasetError, match=message):
            array_store.write(
                tmp_path / "f", source, dataset.manifest, importer=Importer("t", "1"), features={}
            )
        assert os.listdir(tmp_path) == []
    with pytest.raises(DatasetError, match="not finite"):
        array_store.encode("x", {"a": np.array([np.nan], np.float32)})
    with pytest.raises(DatasetError, match="float64"):
        array_store.encode("x", {"a": np.zeros(2)})
    payload = array_store.encode("x", {"a": np.zeros((2, 2), np.float32)})
    with pytest.raises(DatasetError, match="here: a has 16 bytes"):
        array_store.decode(payload.replace(b"\x92\x02\x02", b"\x92\x02\x03"), "here")
    infinite = np.array([np.inf], np.float32).tobytes()
    with pytest.raises(DatasetError, match="here: a has values that are not finite"):
        array_store.decode(payload.replace(bytes(16), infinite + bytes(12)), "here")
