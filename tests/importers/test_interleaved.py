"""Importers of parquet, jsonl and Hugging Face datasets, on small files in published formats."""

import hashlib
import io
import json

import numpy as np
import pyarrow
import pytest
from absl import flags
from PIL import Image
from pyarrow import parquet

from starflow2_jax import prepare
from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError

pytestmark = pytest.mark.fast


def encoded(value, fmt="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 12, 3), value, np.uint8)).save(out, format=fmt)
    return out.getvalue()


def run(capsys, *argv):
    values = flags.FlagValues()
    prepare.define(values)
    values(["prepare", *map(str, argv), "--json"])
    prepare.main("import", [], values)
    return json.loads(capsys.readouterr().out)


def table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def segments_of(record):
    """Return texts as (role, text, loss), and images as (role, gray value, loss)."""
    content = lambda s: (
        s.s
        if isinstance(s, records.Text)
        else int(np.asarray(Image.open(io.BytesIO(record.imgs[s.i].data)))[0, 0, 0])
    )
    return [(s.role, content(s), s.loss) for s in record.segs]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bagel_t2i_gives_a_record_for_each_caption(tmp_path, capsys):
    captions = [json.dumps({"short": f"s{i}", "long": f"l{i}"}) for i in range(3)]
    file = table(tmp_path / "a.parquet", image=[encoded(i) for i in range(3)], captions=captions)
    argv = ("--format", "bagel_t2i", "--source", file)
    assert run(capsys, *argv, "--out", tmp_path / "all")["records"] == 6
    imported = list(records.read(tmp_path / "all"))
    assert segments_of(imported[3]) == [("user", "l1", False), ("assistant", 1, True)]
    assert imported[3].id == "a.parquet:1/long" and imported[3].meta == {"caption": "long"}
    run(capsys, *argv, "--caption", "short", "--out", tmp_path / "short")
    imported = records.read(tmp_path / "short")
    assert [records.text(r) for r in imported] == ["s0", "s1", "s2"]
    with pytest.raises(DatasetError, match=r"a.parquet:0: no caption 'tall'; it has"):
        run(capsys, *argv, "--caption", "tall", "--out", tmp_path / "tall")
    assert not (tmp_path / "tall").exists()


def test_bagel_edit_gives_editing_records(tmp_path, capsys):
    pictures = [[encoded(1), encoded(2)], [encoded(3), encoded(4, "JPEG"), encoded(5)]]
    instructions = [[["make it red", "redden"]], [["one"], ["two"]]]
    file = table(tmp_path / "e.parquet", image_list=pictures, instruction_list=instructions)
    run(capsys, "--format", "bagel_edit", "--source", file, "--out", tmp_path / "out")
    first, second = records.read(tmp_path / "out")
    assert segments_of(first) == [
        ("user", 1, False), ("user", "make it red", False), ("assistant", 2, True),
    ]  # fmt: skip
    assert [s[2] for s in segments_of(second)] == [False, False, True, False, True]
    bad = table(tmp_path / "bad.parquet", image_list=[[encoded(1)] * 3], instruction_list=[[["x"]]])
    with pytest.raises(DatasetError, match=r"bad.parquet:0: 3 images and 1 instructions"):
        run(capsys, "--format", "bagel_edit", "--source", bad, "--out", tmp_path / "bad")


@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_llava_gives_conversations(tmp_path, capsys, kind):
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    (root / "coco/1.png").write_bytes(encoded(1))
    (root / "2.png").write_bytes(encoded(2))
    human, gpt = (lambda v: {"from": "human", "value": v}), (lambda v: {"from": "gpt", "value": v})
    rows = [
        {"id": 7, "image": "coco/1.png", "conversations": [human("<image>\nWhat?"), gpt("A dot.")]},
        {"conversations": [human("Hello"), gpt("Hi"), human("Bye"), gpt("Bye.")]},
        {"image": ["coco/1.png", "2.png"], "conversations": [human("Differ?"), gpt("Yes")]},
        {"image": "other/1.png", "conversations": [human("<image>What?"), gpt("Gone")]},
    ]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(rows)) if kind == "list" else jsonl(file, *rows)
    argv = ("--format", "llava", "--source", file, "--image_root", root)
    result = run(capsys, *argv, "--out", tmp_path / "out")
    assert (result["records"], result["missing_images"], result["records_left_out"]) == (3, 1, 1)
    first, second, third = records.read(tmp_path / "out")
    assert segments_of(first) == [
        ("user", 1, False),
        ("user", "What?", False),
        ("assistant", "A dot.", True),
    ]
    assert [s[2] for s in segments_of(second)] == [False, True, False, True] and not second.imgs
    assert segments_of(third)[:3] == [
        ("user", 1, False),
        ("user", 2, False),
        ("user", "Differ?", False),
    ]
    result = run(capsys, *argv, "--missing_images", "image", "--out", tmp_path / "kept")
    assert (result["records"], result["missing_images"], result["records_left_out"]) == (4, 1, 0)
    assert segments_of(records.read(tmp_path / "kept")[3])[0] == ("user", "What?", False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"t.jsonl:0: no conversations or messages; its keys are \['text'\]"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0: speaker 'bot'"),
        (
            {"conversations": [{"from": "gpt", "value": "<image>"}]},
            "0 images for 1 placeholders <image>",
        ),
        ([1], "t.jsonl:0: Expected `object`, got `int`"),
    ],
)
def test_errors_in_llava_are_named(tmp_path, capsys, row, message):
    file = jsonl(tmp_path / "t.jsonl", {"a": 1}, row)
    file.write_text(file.read_text().split("\n", 1)[1])
    if isinstance(row, list):
        file.write_text("\n".join(["", json.dumps(row)]))
    with pytest.raises(DatasetError, match=message):
        run(capsys, "--format", "llava", "--source", file, "--out", tmp_path / "out")
    file.write_text("{half")
    with pytest.raises(DatasetError, match=r"t.jsonl:0: not JSON"):
        run(capsys, "--format", "llava", "--source", file, "--out", tmp_path / "out")


def test_obelics_finds_images_by_name_hash_and_img2dataset_key(tmp_path, capsys):
    root, urls = tmp_path / "root", [f"https://a.org/x/{n}.jpg?s=1" for n in "pqrs"]
    (root / "00000").mkdir(parents=True)
    (root / "given.png").write_bytes(encoded(1))
    (root / f"{hashlib.sha256(urls[1].encode()).hexdigest()}.png").write_bytes(encoded(2))
    (root / "00000" / "000000012.png").write_bytes(encoded(3))
    table(root / "00000.parquet", url=[urls[2]], key=["000000012"], status=["success"])
    metadata = [{"formatted_filename": "given"}, None, {}, {}, None, {}]
    file = table(
        tmp_path / "o.parquet",
        images=[[urls[0], None, urls[1], urls[2], None, urls[3]], [None]],
        texts=[[None, "one", None, None, "two", None], ["only text"]],
        metadata=[json.dumps(metadata), "[null]"],
        general_metadata=["{}", "{}"],
    )
    argv = ("--format", "obelics", "--source", file, "--image_root", root)
    result = run(capsys, *argv, "--out", tmp_path / "out")
    assert (result["records"], result["missing_images"], result["records_left_out"]) == (1, 1, 1)
    run(capsys, *argv, "--missing_images", "image", "--out", tmp_path / "kept")
    first, second = records.read(tmp_path / "kept")
    assert [s[1] for s in segments_of(first)] == [1, "one", 2, 3, "two"]
    assert all(s[2] for s in segments_of(first)) and segments_of(second) == [
        ("none", "only text", True)
    ]


def test_omnicorpus_finds_images_by_their_sha(tmp_path, capsys):
    root = tmp_path / "root"
    root.mkdir()
    (root / "abc.png").write_bytes(encoded(9))
    sha = lambda value: {"img_url_sha": value, "width": 12, "height": 8}
    file = table(
        tmp_path / "c.parquet",
        images=[["https://x/1", None]],
        texts=[[None, "words"]],
        metadata=[[sha("abc"), None]],
        general_metadata=[{"id": "1", "url": "https://x"}],
    )
    argv = ("--format", "omnicorpus", "--source", file)
    run(capsys, *argv, "--image_root", root, "--out", tmp_path / "out")
    assert segments_of(records.read(tmp_path / "out")[0]) == [
        ("none", 9, True),
        ("none", "words", True),
    ]
    with pytest.raises(DatasetError, match=r"--image_root .*nowhere: no such folder"):
        run(capsys, *argv, "--image_root", tmp_path / "nowhere", "--out", tmp_path / "no")


def test_a_stem_of_two_files_finds_neither(tmp_path, capsys):
    for name in "ab":
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "1.png").write_bytes(encoded(5))
    columns = dict(images=[["https://x/1.png", None]], texts=[[None, "t"]], metadata=["[{}, null]"])
    file = table(tmp_path / "o.parquet", **columns)
    argv = ("--format", "obelics", "--source", file, "--image_root", tmp_path / "root")
    result = run(capsys, *argv, "--missing_images", "image", "--out", tmp_path / "out")
    assert result["missing_images"] == 1


def save_to_disk(folder, **columns):
    """Write a folder as `datasets.save_to_disk` does."""
    folder.mkdir()
    data, name = pyarrow.table(columns), "data-00000-of-00001.arrow"
    with pyarrow.ipc.new_stream(folder / name, data.schema) as stream:
        stream.write_table(data, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_huggingface_pairs_and_conversations(tmp_path, capsys):
    image_column = [{"bytes": encoded(i), "path": None} for i in range(3)]
    pairs = save_to_disk(tmp_path / "pairs", image=image_column, text=["a", "b", "c"])
    run(capsys, "--format", "huggingface", "--source", pairs, "--out", tmp_path / "out")
    imported = records.read(tmp_path / "out")
    assert segments_of(imported[2]) == [("user", "c", False), ("assistant", 2, True)]
    question = [{"type": "image", "text": None}, {"type": "text", "text": "?"}]
    answer = [{"type": "text", "text": "!"}]
    messages = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]]
    chats = save_to_disk(tmp_path / "chats", messages=messages, images=[[image_column[1]]])
    run(capsys, "--format", "huggingface", "--source", chats, "--out", tmp_path / "talk")
    assert segments_of(records.read(tmp_path / "talk")[0]) == [
        ("user", 1, False), ("user", "?", False), ("assistant", "!", True),
    ]  # fmt: skip


def test_errors_in_a_huggingface_folder_are_named(tmp_path, capsys):
    read = lambda path: run(
        capsys, "--format", "huggingface", "--source", path, "--out", tmp_path / "out"
    )
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DatasetError, match=r"has the splits \['train', 'test'\]; name one"):
        read(tmp_path / "splits")
    with pytest.raises(DatasetError, match=r"no state.json"):
        read(tmp_path)
    paths = save_to_disk(tmp_path / "paths", image=[{"bytes": None, "path": "/x.png"}], text=["a"])
    with pytest.raises(DatasetError, match=r"has a path instead of the image"):
        read(paths)
    other = save_to_disk(
        tmp_path / "other", image=[{"bytes": encoded(1), "path": None}], words=["a"]
    )
    with pytest.raises(DatasetError, match=r"its columns are \['image', 'words'\]"):
        read(other)
    data = other / "data-00000-of-00001.arrow"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"not a complete Arrow file"):
        read(other)
    assert not (tmp_path / "out").exists()


def test_another_schema_and_a_truncated_parquet_are_named(tmp_path, capsys):
    file = table(tmp_path / "a.parquet", image=[encoded(1)], caption=["x"])
    argv = ("--format", "bagel_t2i", "--source", file, "--out", tmp_path / "out")
    message = r"a.parquet: another schema: no column 'captions'; .* found image, caption"
    with pytest.raises(DatasetError, match=message):
        run(capsys, *argv)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"a.parquet: not a complete parquet file"):
        run(capsys, *argv)
    table(file, image=[b"GIF89a"], captions=['{"a": "b"}'])
    with pytest.raises(DatasetError, match=r"a.parquet:0: image: "):
        run(capsys, *argv)
    table(file, image=[encoded(1)], captions=["plain words"])
    with pytest.raises(DatasetError, match=r"a.parquet:0: captions: not JSON"):
        run(capsys, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bagel_t2i", "bagel_edit", "obelics", "omnicorpus"])
def test_every_parquet_format_names_the_column_that_it_misses(tmp_path, capsys, kind):
    file = table(tmp_path / "a.parquet", url=["x"], score=[1.0])
    argv = ("--format", kind, "--source", file, "--out", tmp_path / "out")
    argv += () if kind.startswith("bagel") else ("--image_root", tmp_path)
    with pytest.raises(DatasetError, match=r"a.parquet: another schema: no column '.*found .*url"):
        run(capsys, *argv)
    assert not (tmp_path / "out").exists()
