"""Records, shards and manifests: written data are read back equal, and damage is named."""

import hashlib
import json
import os
import resource
import shutil

import msgspec
import numpy as np
import pytest

from starflow2_jax.data import images, manifest, records, shards
from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.data.records import ImageBlob, Img, Record, Text

pytestmark = pytest.mark.fast


def encoded(number: int, side: int = 8) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    return images.encode_png(pixels)


def make_records(count: int, side: int = 8):
    for k in range(count):
        blob = records.image_blob(encoded(k, side), f"picture {k}")
        yield records.text_to_image(f"r{k}", "test", f"picture {k}", blob, {"label": k % 3})


def content(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture
def dataset(tmp_path):
    """Write 40 records in several shards of about 75 KB each."""
    path = tmp_path / "data"
    records.write(path, make_records(40, side=50), shard_bytes=75_000)
    return path


def shard_files(path):
    return sorted(path.glob("*.array_record"))


def test_written_records_are_read_back(tmp_path):
    path = tmp_path / "data"
    written = records.write(path, make_records(25), classes=["a", "b", "c"], shard_bytes=2000)
    assert written.records == 25 and len(written.shards) > 2
    dataset = records.read(path)
    assert dataset.manifest == written
    assert [r.id for r in dataset] == [f"r{k}" for k in range(25)]
    assert records.encode(dataset[7]) == records.encode(list(make_records(8))[7])
    assert dataset[7].segs == [Text("picture 7", False, "user"), Img(0, True, "assistant")]
    assert sorted(os.listdir(tmp_path)) == ["data"]
    names = [s.path for s in written.shards]
    assert names[1] == f"shard-00001-of-{len(names):05d}.array_record"


def test_equal_records_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        records.write(tmp_path / name, make_records(12), sources={"z": "0" * 64, "a": "1" * 64})
    assert content(tmp_path / "a") == content(tmp_path / "b")
    text = (tmp_path / "a" / "dataset.json").read_text()
    assert str(tmp_path) not in text and text.index('"a": "1') < text.index('"z": "0')


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "data"
    records.write(path, make_records(3))
    before = content(path)
    source = make_records(5)
    with pytest.raises(DatasetError, match="exists"):
        records.write(path, source)
    assert next(source).id == "r0"  # refused before anything was read
    assert content(path) == before
    records.write(path, make_records(5), overwrite=True)
    assert len(records.read(path)) == 5

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="not a dataset folder"):
        records.write(other, make_records(5), overwrite=True)
    assert (other / "chapter.txt").read_text() == "years of work"


def test_a_failing_source_leaves_the_disk_unchanged(tmp_path):
    def broken():
        yield from make_records(3)
        raise RuntimeError("the network went away")

    path = tmp_path / "data"
    with pytest.raises(RuntimeError, match="network"):
        records.write(path, broken())
    assert os.listdir(tmp_path) == []
    records.write(path, make_records(3))
    before = content(path)
    with pytest.raises(RuntimeError, match="network"):
        records.write(path, broken(), overwrite=True)
    assert content(path) == before and os.listdir(tmp_path) == ["data"]


def test_an_empty_source_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no records"):
        records.write(tmp_path / "data", [])
    assert os.listdir(tmp_path) == []


def test_a_shard_that_cannot_be_read_back_is_not_published(tmp_path, monkeypatch):
    class Forgetful(shards.ArrayRecordWriter):
        def write(self, data):
            if not hasattr(self, "full"):
                self.full = True
                return super().write(data)

    monkeypatch.setattr(shards, "ArrayRecordWriter", Forgetful)
    with pytest.raises(DatasetError, match="wrote 4 records but 1 can be read"):
        records.write(tmp_path / "data", make_records(4))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_disk_unchanged(tmp_path):
    records.write(tmp_path / "data", make_records(3))
    before = content(tmp_path / "data")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DatasetError, match=r"shard 0 could not be written.*write\(\) failed"):
            records.write(tmp_path / "data", make_records(60, side=50), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["data"] and content(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda r: r.update(v=2), r"\$\.v"),
        (lambda r: r.update(colour="red"), "colour"),
        (lambda r: r.update(id=""), r"\$\.id"),
        (lambda r: r.update(segs=[]), r"\$\.segs"),
        (lambda r: r["segs"][1].update(i=-1), r"\$\.segs\[1\]\.i"),
        (lambda r: r["segs"][0].update(role="narrator"), r"\$\.segs\[0\]\.role"),
        (lambda r: r["segs"][0].pop("loss"), "loss"),
        (lambda r: r["segs"][0].update(t="audio"), "audio"),
        (lambda r: r["imgs"][0].update(fmt="gif"), r"\$\.imgs\[0\]\.fmt"),
        (lambda r: r["imgs"][0].update(h=0), r"\$\.imgs\[0\]\.h"),
        (lambda r: r["imgs"][0].update(sha256="beef"), r"\$\.imgs\[0\]\.sha256"),
        (lambda r: r["meta"].update(scene={"a": 1}), r"\$\.meta"),
    ],
)
def test_a_wrong_field_is_named_with_shard_and_index(tmp_path, change, path):
    payloads = [records.encode(r) for r in make_records(4)]
    raw = msgspec.msgpack.decode(payloads[2])
    change(raw)
    payloads[2] = msgspec.msgpack.encode(raw)
    shards.write(
        tmp_path / "data", payloads, lambda s: manifest.make("records", s, Importer("t", "1"))
    )
    dataset = records.read(tmp_path / "data")
    assert dataset[1].id == "r1"
    with pytest.raises(DatasetError, match="shard-00000-of-00001.array_record record 2.*" + path):
        dataset[2]
    (problem,) = records.validate(tmp_path / "data")
    assert "record 2" in problem


def test_a_payload_that_is_not_msgpack_is_named(tmp_path):
    with pytest.raises(DatasetError, match="here: "):
        records.decode(b"\xc1nonsense", "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segs": [Img(1, True)]}, r"segs\[0\]\.i is 1, but there are 1 images"),
        ({"segs": [Text("a", False), Img(0, False)]}, "no segment has loss=True"),
        ({"segs": [Text("a\0", True)]}, r"\$\.segs\[0\]\.s has a NUL character"),
        ({"imgs": [("h", 9)]}, "declared png of 9 x 8 .h x w., the image is png of 8 x 8"),
        ({"imgs": [("fmt", "jpeg")]}, "declared jpeg"),
        ({"imgs": [("sha256", "0" * 64)]}, "sha256"),
        ({"id": "r0"}, "id came before"),
        ({"meta": {"label": 3}}, "meta.label is 3, expected a class number from 0 to 2"),
        ({"meta": {}}, "meta.label is None"),
    ],
)
def test_the_writer_checks_more_than_the_schema(tmp_path, change, message):
    bad_records = list(make_records(3))
    if "imgs" in change:
        change = {"imgs": [msgspec.structs.replace(bad_records[2].imgs[0], **dict(change["imgs"]))]}
    bad_records[2] = msgspec.structs.replace(bad_records[2], **change)
    with pytest.raises(DatasetError, match="record 2 .*" + message):
        records.write(tmp_path / "data", bad_records, classes=["a", "b", "c"])
    assert os.listdir(tmp_path) == []


def test_writer_refuses_wrong_types(tmp_path):
    with pytest.raises(DatasetError, match=r"'x'.*\$\.segs\[0\]\.s"):
        records.write(tmp_path / "data", [Record(1, "x", "t", [Text(5, True)])])


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "unclosed"])
def test_damaged_shards_are_named(dataset, damage):
    victim = shard_files(dataset)[1]
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "missing":
        victim.unlink()
    else:
        # A writer killed before close() leaves at most whole blocks without a footer.
        victim.write_bytes(victim.read_bytes()[:65536])
    with pytest.raises(DatasetError, match=victim.name):
        records.read(dataset)
    with pytest.raises(DatasetError, match=victim.name):
        list(records.verify(dataset))


def test_a_shard_of_the_right_size_without_records_is_named(dataset):
    victim = shard_files(dataset)[1]
    victim.write_bytes(bytes(victim.stat().st_size))
    opened = records.read(dataset)
    first = opened.manifest.shards[0].records
    assert opened[0].id == "r0"
    with pytest.raises(DatasetError, match=f"{victim.name} record 0"):
        opened[first]
    assert victim.name in next(iter(records.verify(dataset)))


def test_every_flipped_bit_is_detected(dataset):
    victim = shard_files(dataset)[1]
    original = victim.read_bytes()
    opened = records.read(dataset)
    start, count = opened.manifest.shards[0].records, opened.manifest.shards[1].records
    rng = np.random.default_rng(0)
    for _ in range(6):
        data = bytearray(original)
        # Into the payload of a record: image bytes are the bulk of it.
        needle = opened[start + int(rng.integers(count))].imgs[0].data
        position = original.index(needle[100:200]) + int(rng.integers(100))
        data[position] ^= 1 << int(rng.integers(8))
        victim.write_bytes(data)
        problems = list(records.verify(dataset))
        assert "sha256" in problems[0] and victim.name in problems[0]
        assert len(problems) == 2 and f"{victim.name} record " in problems[1]
        with pytest.raises(DatasetError, match=victim.name):
            list(records.read(dataset))
    victim.write_bytes(original)
    assert list(records.verify(dataset)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(records=41), "`records` is 41 but its shards add up to 40"),
        (lambda m: m.update(colour=1), "colour"),
        (lambda m: m["shards"][0].update(path="../x.array_record"), r"shards\[0\].path"),
        (lambda m: m.update(kind="arrays"), "a dataset of arrays"),
        (lambda m: m.update(v=2), r"\$.v"),
    ],
)
def test_a_wrong_manifest_is_named(dataset, change, message):
    file = dataset / "dataset.json"
    raw = json.loads(file.read_text())
    del raw["sha256"]  # as in a folder of an earlier version
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(DatasetError, match=r"dataset\.json.*" + message):
        records.read(dataset)


def test_a_flipped_bit_of_a_manifest_is_named(dataset):
    file = dataset / "dataset.json"
    intact, expected = file.read_bytes(), manifest.load(dataset)
    rng = np.random.default_rng(0)
    for position in range(len(intact)):
        data = bytearray(intact)
        data[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            assert manifest.load(dataset) == expected  # of a space between two fields
        except DatasetError as error:
            assert "dataset.json" in str(error)
    file.write_bytes(b'{"features":' * 100_000)
    with pytest.raises(DatasetError, match=r"dataset\.json: not a valid manifest"):
        manifest.load(dataset)


def test_a_manifest_of_an_earlier_version_is_read(dataset):
    file = dataset / "dataset.json"
    expected = manifest.load(dataset)
    raw = json.loads(file.read_text())
    assert raw.pop("sha256") == manifest.fingerprint(expected)
    file.write_text(json.dumps(raw))
    assert manifest.load(dataset) == expected


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        records.read(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"has no dataset\.json"):
        records.read(tmp_path)


def test_validate_decodes_every_image(tmp_path):
    data = encoded(0, 40)
    broken = data[:300] + bytes(len(data) - 300)
    blob = ImageBlob("png", 40, 40, broken, hashlib.sha256(broken).hexdigest())
    record = Record(1, "bad", "t", [Img(0, True)], [blob])
    # The header is intact, so only decoding shows it.
    records.write(tmp_path / "data", [*make_records(2), record])
    (problem,) = records.validate(tmp_path / "data")
    assert "'bad'" in problem and "cannot be decoded" in problem
    assert list(records.verify(tmp_path / "data")) == []


def test_moved_and_copied_datasets_stay_valid(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    assert list(records.verify(tmp_path / "copy")) == []
