"""Rows of an import in layouts that published sets use, and rows that fit no layout."""

import json

import pyarrow
import pytest
from helpers.import_sources import (
    llava,
    make_folder,
    png,
    refused,
    run,
    stored,
    talk,
)
from pyarrow import parquet

from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers import huggingface, interleaved
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.tally import Tally

pytestmark = pytest.mark.fast


def test_pictures_under_other_keys_are_read_or_refused(tmp_path):
    root = make_folder(tmp_path / "img", "a.png", "b.png")
    human = [{"role": "user", "content": "Differ?"}, {"role": "assistant", "content": "Yes"}]
    (record,) = llava(tmp_path, {"images": ["a.png", "b.png"], "messages": human}, root=root)
    assert len(record.imgs) == 2
    for key in ("image_path", "video", "audios"):
        with pytest.raises(DatasetError, match=f"has '{key}', which is not read"):
            llava(tmp_path, talk("a", "b", **{key: "a.png"}), root=root)


def test_pictures_without_a_place_go_to_the_first_turn_of_the_user(tmp_path):
    root = make_folder(tmp_path / "img", "a.png")
    turns = [("system", "Be good."), ("assistant", "Yes?"), ("user", "What?"), ("assistant", "A")]
    rows = [{"from": role, "value": text} for role, text in turns]
    (record,) = llava(tmp_path, {"image": "a.png", "conversations": rows}, root=root)
    (image,) = [s for s in record.segs if isinstance(s, records.Img)]
    assert image.role == "user"
    with pytest.raises(DatasetError, match="no turn of the user"):
        llava(tmp_path, {"image": "a.png", "conversations": rows[:2]}, root=root)


def test_image_url_is_a_place(tmp_path):
    part = lambda kind, text: {"type": kind, "text": text, "image_url": None}
    content = [part("text", "Compare"), part("image_url", None), part("text", "with")]
    messages = [[
        {"role": "user", "content": [*content, part("image_url", None)]},
        {"role": "assistant", "content": [part("text", "Same.")]},
    ]]  # fmt: skip
    folder = stored(tmp_path / "set", images=[[png(1), png(2)]], messages=messages)
    (record,) = huggingface.huggingface(folder)
    kinds = [getattr(s, "s", getattr(s, "i", None)) for s in record.segs]
    assert kinds == ["Compare", 0, "with", 1, "Same."]


@pytest.mark.parametrize("caption", [None, ""])
def test_null_and_empty_captions_are_missing_captions(tmp_path, caption):
    folder = stored(tmp_path / "set", image=[png(), png(1)], text=[caption, "b"])
    tally = Tally(missing_captions=1)
    (record,) = huggingface.huggingface(folder, tally=tally)
    assert records.text(record) == "b" and tally.budgets["missing_captions"] == 1
    captions = [json.dumps({"x": caption, "y": "b"})]
    parquet.write_table(pyarrow.table({"image": [png()], "captions": captions}), tmp_path / "a.p")
    (record,) = interleaved.bagel_t2i([tmp_path / "a.p"], "all", Tally(missing_captions=1))
    assert records.text(record) == "b"
    with pytest.raises(DatasetError, match="no caption") as error:
        list(interleaved.bagel_t2i([tmp_path / "a.p"]))
    assert str(error.value).count("--missing_captions") == 1


def test_a_list_of_captions_gives_a_record_each_and_a_struct_is_refused(tmp_path):
    folder = stored(tmp_path / "list", image=[png()], text=[["A dog runs.", "A brown dog."]])
    imported = list(huggingface.huggingface(folder))
    assert [records.text(r) for r in imported] == ["A dog runs.", "A brown dog."]
    folder = stored(tmp_path / "struct", image=[png()], text=[{"en": "A dog."}])
    with pytest.raises(DatasetError, match=r"data\.arrow:0: text: the caption is dict"):
        list(huggingface.huggingface(folder))


def test_class_numbers_become_class_names(tmp_path):
    folder = stored(tmp_path / "set", image=[png()], label=[1])
    feature = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": feature}))
    (record,) = huggingface.huggingface(folder, text_key="label")
    assert records.text(record) == "dog"


def test_a_column_of_classes_numbers_them(tmp_path):
    folder = stored(tmp_path / "set", image=[png(), png()], label=[1, 0], kind=[0, 2])
    names = {"label": ["cat", "dog"], "kind": ["x", "y", "z"]}
    features = {name: {"names": values} for name, values in names.items()}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    argv = ("--format", "huggingface", "--source", folder)
    result, imported = run(tmp_path, *argv, "--label", "label")
    assert result["classes"] == 2 and [record.meta["label"] for record in imported] == [1, 0]
    assert [records.text(record) for record in imported] == ["a photo of a dog", "a photo of a cat"]
    _, imported = run(tmp_path, *argv, "--label", "kind", "--text_key", "label")
    assert [(records.text(r), r.meta["label"]) for r in imported] == [("dog", 0), ("cat", 2)]
    message = refused(tmp_path, *argv, "--label", "breed")
    assert "no such column of classes; classes are in label, kind" in message
    message = refused(tmp_path, "--format", "folder", "--source", folder, "--label", "label")
    assert "only none and caption" in message


def test_an_instruction_is_a_text_or_a_list_of_paraphrases(tmp_path):
    for instruction in (["make it blue"], [["make it blue", "blue!"]]):
        columns = {"image_list": [[png(1), png(2)]], "instruction_list": [instruction]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.p")
        (record,) = interleaved.bagel_edit([tmp_path / "a.p"])
        assert records.text(record) == "make it blue"


def documents(tmp_path, *rows, root=None, tally=None):
    columns = {
        "images": [row[0] for row in rows],
        "texts": [row[1] for row in rows],
        "metadata": [row[2] for row in rows],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "docs.parquet")
    images_root = ImageRoot(str(root or ""), tally=tally or Tally())
    return list(interleaved.obelics([tmp_path / "docs.parquet"], images_root)), images_root


def test_a_bad_url_is_a_missing_image(tmp_path):
    imported, root = documents(tmp_path, (["http://[bad/a.png", None], [None, "x"], "[null, null]"))
    assert not imported and (root.missing, root.left_out) == (1, 1)


@pytest.mark.parametrize(
    "row",
    [
        (["http://h/a.png", None], [None, "x"], "null"),
        (["http://h/a.png", None], [None, "x"], "[3, null]"),
        (["http://h/a.png", None], [None, "x"], "[null"),
        (None, [None, "x"], "[null, null]"),
        (["http://h/a.png", None], ["both", "x"], "[null, null]"),
    ],
)
def test_document_rows_of_wrong_types_are_named(tmp_path, row):
    good = ([None], ["x"], "[null]")
    with pytest.raises(DatasetError, match=r"docs\.parquet:1"):
        documents(tmp_path, good, row)
    assert len(documents(tmp_path, good, row, tally=Tally(bad_rows=1))[0]) == 1


def test_a_null_file_name_is_no_name(tmp_path):
    root = make_folder(tmp_path / "img", "a.png")
    metadata = '[{"formatted_filename": null}, null]'
    (record,), _ = documents(tmp_path, (["http://h/a.png", None], [None, "x"], metadata), root=root)
    assert len(record.imgs) == 1


def test_two_urls_never_share_an_image(tmp_path):
    root = make_folder(tmp_path / "img", "photo.png")
    row = lambda site: ([f"https://{site}.example/photo.png", None], [None, "x"], "[null, null]")
    imported, images_root = documents(tmp_path, row("a"), row("b"), root=root)
    assert len(imported) == 1 and images_root.missing == 1


def test_a_url_of_img2dataset_is_the_image_of_its_key_or_missing(tmp_path):
    root = make_folder(tmp_path / "img", "00000/000000001.png", "00000/000000002.png")
    urls = ["https://a.example/000000002.png", "https://a.example/other.png"]
    columns = {
        "url": urls,
        "key": ["000000001", "000000002"],
        "status": ["failed_to_download", "success"],
    }
    parquet.write_table(pyarrow.table(columns), root / "00000.parquet")
    parquet.write_table(pyarrow.table({"a": [1]}), root / "another.parquet")
    row = lambda url: ([url, None], [None, "x"], "[null, null]")
    imported, images_root = documents(tmp_path, *map(row, urls), root=root)
    assert [r.id for r in imported] == ["docs.parquet:1"] and images_root.missing == 1
    assert imported[0].imgs[0].data == png(1)


def test_an_empty_answer_has_a_budget(tmp_path):
    tally = Tally(bad_rows=3)
    rows = [talk("a", ""), talk("a", None), talk("the text <image> itself", "b"), talk("a", "b")]
    assert len(llava(tmp_path, *rows, tally=tally)) == 1
    assert tally.reasons == {"no answer": 2, "images and their places differ": 1}
