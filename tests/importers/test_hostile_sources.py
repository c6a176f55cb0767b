"""Sources of an import that are damaged, no regular files, or of other kinds than it reads."""

import json
import os

import numpy as np
import pytest
from helpers.import_sources import (
    llava,
    make_folder,
    make_tar,
    png,
    refused,
    run,
    stored,
    talk,
)
from PIL import Image

from starflow2_jax.data import images, records, untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers import huggingface, interleaved, tars
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.tally import Tally

pytestmark = pytest.mark.fast


# --------------------------------------------------------------------------------- types and text


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [None]},
        {"conversations": 5},
        {"conversations": [{"from": 3, "value": "x"}]},
        {"conversations": [{"from": "human", "value": {"a": 1}}]},
        {"conversations": [{"from": "human", "value": [{"type": "text", "text": 5}]}]},
        {"conversations": [{"from": "human", "value": [{"type": "video", "text": None}]}]},
        talk("x", "y", image=5),
        talk("x", "y", image=[[]]),
        talk("x", "\0"),
        ["not an object"],
        None,
    ],
)
def test_rows_of_wrong_types_are_named_and_have_a_budget(tmp_path, row):
    with pytest.raises(DatasetError, match=r"THE\.jsonl:1"):
        llava(tmp_path, talk("a", "b"), row)
    tally = Tally(bad_rows=1)
    assert len(llava(tmp_path, talk("a", "b"), row, talk("c", "d"), tally=tally)) == 2
    assert sum(tally.reasons.values()) == tally.budgets["bad_rows"] == 1


def test_half_of_a_surrogate_pair_is_named_as_such():
    with pytest.raises(DatasetError, match=r"here: not JSON.*half of a surrogate pair"):
        untrusted.decode_json(b'["\\ud800"]', "here")


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": "\\ud800"}',
        b"{]",
        b'{"a": NaN}',
        b"\xff[",
        b"",
    ],
)
def test_damaged_json_names_its_file(tmp_path, data):
    file = tmp_path / "THE.jsonl"
    file.write_bytes(data)
    with pytest.raises(DatasetError, match=r"THE\.jsonl"):
        list(interleaved.llava([file], ImageRoot()))


def test_line_ends_are_line_feeds_and_a_byte_order_mark_is_no_text(tmp_path):
    row = json.dumps(talk("a\u2028b\x85c", "d\r\ne"), ensure_ascii=False)
    file = tmp_path / "THE.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"\n{row}\r\n".encode())
    (record,) = interleaved.llava([file], ImageRoot())
    assert record.id == "THE.jsonl:1"
    assert [segment.s for segment in record.segs] == ["a\u2028b\x85c", "d\ne"]
    file.write_bytes(b"\xef\xbb\xbf\n [" + row.encode() + b"]")
    assert len(list(interleaved.llava([file], ImageRoot()))) == 1


def test_text_is_valid_unicode(tmp_path):
    for text, problem in (("a \udcff", "lone surrogate at 2"), ("a\0", "NUL")):
        with pytest.raises(DatasetError, match=f"here: .*{problem}"):
            untrusted.clean_text(text, "here")
    with pytest.raises(DatasetError, match="record 'a': "):
        records.encode(records.Record(1, "a", "x", [records.Text("\ud800", True)], []))
    (name := tmp_path / "pets").mkdir()
    broken = os.fsencode(name) + b"/\xff.png"
    with open(broken, "wb") as file:
        file.write(png())
    with open(broken.replace(b".png", b".txt"), "wb") as file:
        file.write(b"one")
    assert "pets" in refused(tmp_path, "--format", "folder", "--source", name)


def test_arrow_offsets_out_of_a_buffer_are_refused(tmp_path):
    image = [{"bytes": png(), "path": None}] * 3
    folder = stored(tmp_path / "set", image=image, text=["aa", "b", "c"])
    file = folder / "data.arrow"
    content = file.read_bytes()
    # The offsets of `text`: 0, 2, 3, 4.
    offsets = np.asarray([0, 2, 3, 4], np.int32).tobytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, np.asarray([0, 2, 2**31 - 9, 4], np.int32).tobytes()))
    with pytest.raises(DatasetError, match=r"data\.arrow: not a complete Arrow file \(row 0\)"):
        list(huggingface.huggingface(folder))


def test_damaged_state_files_are_named(tmp_path):
    folder = stored(tmp_path / "set", image=[png()], text=["a"])
    for name, text in (("state.json", "{"), ("state.json", '{"_data_files": 3}')):
        (folder / name).write_text(text)
        with pytest.raises(DatasetError, match=r"state\.json"):
            list(huggingface.huggingface(folder))
    (folder / "dataset_dict.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"dataset_dict\.json"):
        list(huggingface.huggingface(folder))


# --------------------------------------------------------------------------------- files and links


def test_only_regular_files_are_read(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png")
    os.mkfifo(root / "9.png")
    assert "9.png: not a regular file" in refused(tmp_path, "--format", "folder", "--source", root)
    os.mkfifo(tmp_path / "a.tar")
    for source in (tmp_path / "a.tar", "/dev/zero"):
        argv = ("--format", "webdataset", "--source", source)
        assert "not a regular file" in refused(tmp_path, *argv)
    with pytest.raises(DatasetError, match=r"9\.png: not a regular file"):
        ImageRoot(str(root))


def test_sizes_are_checked_before_the_bytes(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    with file.open("wb") as large:
        large.truncate(images.MAX_BYTES + 1)
    monkeypatch.setattr("builtins.open", None)
    with pytest.raises(DatasetError, match=r"large\.png: \d+ bytes, at most"):
        untrusted.read_file(file, images.MAX_BYTES)


def test_reading_takes_the_memory_of_the_file_alone(tmp_path):
    (tmp_path / "a.json").write_text("1")
    assert untrusted.read_file(tmp_path / "a.json", 1 << 60) == b"1"


def test_hidden_files_are_passed_over(tmp_path):
    hidden = ("._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", ".x/b.png")
    root = make_folder(tmp_path / "pets", "a.png", *hidden)
    result, (record,) = run(tmp_path, "--format", "folder", "--source", root)
    assert record.id == "pets/a" and result["left_out"]["hidden files"] == 5
    members = [(name, png()) for name in ("a.png", *hidden)]
    tar = make_tar(tmp_path / "a.tar", [*members[:1], ("a.txt", b"one"), *members[1:]])
    result, (record,) = run(tmp_path, "--format", "webdataset", "--source", tar)
    assert result["left_out"] == {"hidden files": 4}


def test_links_to_folders_are_refused(tmp_path):
    make_folder(tmp_path / "other", "0.png")
    root = make_folder(tmp_path / "pets", "a.png")
    (root / "part2").symlink_to(tmp_path / "other")
    argv = ("--format", "folder", "--source", root)
    assert "part2: a link to a folder" in refused(tmp_path, *argv)
    (root / "part2").unlink()
    (root / "part2").symlink_to(tmp_path / "nothing")
    assert "part2: a link to nothing" in refused(tmp_path, *argv)


def test_other_kinds_of_files_are_counted(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png", "b.gif", "c.bmp", "d.tiff", "e.avif")
    image = Image.new("RGB", (4, 4))
    for name in ("f.jfif", "g.JPE"):
        image.save(root / name, "JPEG")
        (root / name).with_suffix(".TXT").write_text("\ufeffa\r\nb")
    result, imported = run(tmp_path, "--format", "folder", "--source", root)
    assert [r.id for r in imported] == ["pets/a", "pets/f", "pets/g"]
    assert records.text(imported[1]) == "a\nb"
    kinds = {f"{suffix} files": 1 for suffix in (".gif", ".bmp", ".tiff", ".avif")}
    assert result["left_out"] == {**kinds, "captions without an image": 4}
    manifest = json.loads((tmp_path / result["out"] / "dataset.json").read_text())
    assert manifest["left_out"] == result["left_out"]


def test_a_dotted_key_is_counted(tmp_path):
    pair = lambda key: [(f"{key}.png", png()), (f"{key}.txt", b"x")]
    tar = make_tar(tmp_path / "a.tar", [*pair("a"), *pair("b_0.75_crop")])
    result, imported = run(tmp_path, "--format", "webdataset", "--source", tar)
    assert len(imported) == 1 and list(result["left_out"].values()) == [2]
    assert "first dot" in next(iter(result["left_out"]))
    tar = make_tar(tmp_path / "b.tar", pair("b_0.75_crop"))
    message = refused(tmp_path, "--format", "webdataset", "--source", tar)
    assert "no records" in message and "first dot" in message


def test_a_path_that_exists_is_no_pattern(tmp_path):
    root = make_folder(tmp_path / "[2024] fotos", "a.png")
    assert len(run(tmp_path, "--format", "folder", "--source", root)[1]) == 1
    for number in range(3):
        make_tar(tmp_path / f"{number:03d}.tar", [("a.png", png()), ("a.txt", b"x")])
    argv = ("--format", "webdataset", "--source")
    assert len(run(tmp_path, *argv, tmp_path / "{000..002}.tar")[1]) == 3
    assert "a folder" in refused(tmp_path, *argv, root)


def test_names_in_another_unicode_form_match(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png")
    (root / "a\u0308.png").write_bytes(png())
    (root / "\u00e4.txt").write_text("an umlaut")
    assert len(run(tmp_path, "--format", "folder", "--source", root)[1]) == 2


def test_a_missing_caption_says_what_is_there(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png")
    (root / "b.png").write_bytes(png())
    (root / "b.json").write_text("{}")
    assert "there is b.json" in refused(tmp_path, "--format", "folder", "--source", root)


# ----------------------------------------------------------------------------------------- budgets


def test_bad_images_have_a_budget(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png", "b.png", "c.png", "d.png")
    (root / "b.png").write_bytes(b"<html>404</html>")
    (root / "c.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    truncated = images.encode_png(noise)[:3000]
    (root / "d.png").write_bytes(truncated)
    argv = ("--format", "folder", "--source", root)
    message = refused(tmp_path, *argv)
    assert f"{root}/b.png: " in message and "--bad_images" in message
    result, imported = run(tmp_path, *argv, "--bad_images", 2)
    assert [r.id for r in imported] == ["pets/a", "pets/d"] and result["bad_images"] == 2
    result, imported = run(tmp_path, *argv, "--bad_images", 3, "--check_pixels")
    assert [r.id for r in imported] == ["pets/a"] and result["bad_images"] == 3


def test_missing_captions_are_counted_in_the_result(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png", "b.png")
    (root / "b.txt").write_text(" \n")
    argv = ("--format", "folder", "--source", root)
    assert run(tmp_path, *argv, "--missing_captions", 1)[0]["missing_captions"] == 1
    assert "b" in refused(tmp_path, *argv)


def test_a_caption_alone_has_a_budget(tmp_path):
    tar = make_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("b.png", png()), ("b.txt", b"y")])
    tally = Tally(bad_rows=1)
    assert len(list(tars.webdataset([tar], tally))) == 1
    assert tally.reasons == {"caption without an image": 1}


def test_nothing_left_says_why(tmp_path):
    (tmp_path / "img").mkdir()
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(talk("<image>What?", "x", image="a.png")))
    argv = ("--format", "llava", "--source", file, "--image_root", tmp_path / "img")
    message = refused(tmp_path, *argv)
    assert "images missing: 1; is --image_root right?" in message
