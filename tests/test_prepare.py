"""The prepare command runs each verb, repeats it, and reports errors."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from absl import flags
from helpers.paths import ROOT
from PIL import Image

from starflow2_jax import prepare
from starflow2_jax.data import image_batches, images, manifest, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers import procedural
from starflow2_jax.shapes import generator


def run(capsys, verb, *words):
    """Run a verb in this process and return its JSON."""
    values = flags.FlagValues()
    prepare.define(values)
    values(["prepare", *map(str, words), "--json"])
    capsys.readouterr()
    prepare.main(verb, [], values)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as archive:
        for k, caption in enumerate(["cat", "dog", "cat"]):
            pixels = np.full((8, 6, 3), 40 * k, np.uint8)
            for name, data in ((f"{k}.png", images.encode_png(pixels)), (f"{k}.txt", caption)):
                data = data if isinstance(data, bytes) else data.encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def test_shapes_are_imported_checked_and_shown(tmp_path, capsys):
    out = tmp_path / "shapes"
    words = ("--format", "shapes", "--n", 30, "--pixels", 32, "--seed", 5, "--out", out)
    result = run(capsys, "import", *words)
    assert result["records"] == 30
    assert [r.id for r in records.read(out)][:2] == ["shapes-5-00000000", "shapes-5-00000001"]
    before = (out / "dataset.json").read_bytes()
    stamp = os.stat(out / "dataset.json").st_mtime_ns

    assert run(capsys, "import", *words)["was"] == "complete"
    assert os.stat(out / "dataset.json").st_mtime_ns == stamp
    with pytest.raises(DatasetError, match="exists"):
        run(capsys, "import", *words, "--n", 31)
    assert run(capsys, "import", *words, "--overwrite")["records"] == 30
    assert (out / "dataset.json").read_bytes() == before

    for verb in ("validate", "verify"):
        assert run(capsys, verb, "--data", out)["problems"] == 0
    stats = run(capsys, "stats", "--data", out)
    assert stats["image_sizes_h_w"] == {"32x32": 30} and stats["image_formats"] == {"png": 30}
    assert stats["tags"] == dict.fromkeys(sorted(generator.TAGS), 5)
    assert stats["targets"] == {"text": 0, "image": 30}

    sheet = tmp_path / "sheet.png"
    assert run(capsys, "show", "--data", out, "--out", sheet, "--n", 10)["pictures"] == 10
    sheet_pixels = np.asarray(Image.open(sheet))
    first = images.decode(records.read(out)[0].imgs[0].data, "x")
    assert (sheet_pixels[4 : 4 + 128 : 4, 4 : 4 + 128 : 4] == first).all()
    with pytest.raises(DatasetError, match="exists"):
        run(capsys, "show", "--data", out, "--out", sheet)
    # The same command again: it may have been killed after its last file.
    assert run(capsys, "show", "--data", out, "--out", sheet, "--n", 10)["pictures"] == 10
    run(capsys, "show", "--data", out, "--out", sheet, "--overwrite")
    with pytest.raises(DatasetError, match=r"ends in \.png"):
        run(capsys, "show", "--data", out, "--out", tmp_path / "sheet.exe")
    assert sorted(os.listdir(tmp_path)) == ["shapes", "sheet.png"]


def test_shapes_can_have_classes(tmp_path, capsys):
    words = ("--format", "shapes", "--n", 12, "--tags", "single_object", "--label", "shape")
    assert run(capsys, "import", *words, "--out", tmp_path / "a")["classes"] == len(
        generator.SHAPES
    )
    stats = run(capsys, "stats", "--data", tmp_path / "a")
    assert sum(stats["classes"].values()) == 12 and list(stats["classes"]) == list(generator.SHAPES)
    for wrong, message in (
        (("--tags", "textures"), "--tags: unknown"),
        (("--tags", "colors,position=0"), "position=0: expected a whole number, 1 to 100"),
        (("--tags", "position"), "position shows two"),
        (("--label", "texture"), "unknown label 'texture'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(capsys, "import", *words, *wrong, "--out", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_tags_can_be_weighted(tmp_path, capsys):
    words = ("--format", "shapes", "--n", 12, "--pixels", 16)
    weighted = ("--tags", "colors,counting=3,position=2")
    run(capsys, "import", *words, *weighted, "--out", tmp_path / "a")
    tags = [record.meta["tag"] for record in records.read(tmp_path / "a")]
    assert tags == ["colors", "counting", "position", "counting", "position", "counting"] * 2
    assert records.read(tmp_path / "a").manifest.importer.options["tags"] == weighted[1]


def test_a_webdataset_is_imported(tmp_path, tar, capsys):
    out = tmp_path / "pets"
    words = ("--format", "webdataset", "--label", "caption", "--out", out)
    result = run(capsys, "import", *words, "--source", tmp_path / "p*.tar")
    assert result["records"] == 3 and result["classes"] == 2
    stored = records.read(out).manifest
    assert stored.classes == ["cat", "dog"]
    assert stored.sources == {"pets.tar": manifest.sha256_file(tar)}
    assert stored.importer.options["label"] == "caption"
    assert run(capsys, "import", *words, "--source", tar)["was"] == "complete"
    with tarfile.open(tar, "a") as archive:
        archive.addfile(tarfile.TarInfo("extra"))
    with pytest.raises(DatasetError, match="exists"):
        run(capsys, "import", *words, "--source", tar)
    with pytest.raises(DatasetError, match="no such file"):
        run(capsys, "import", *words, "--source", tmp_path / "nowhere.tar")
    with pytest.raises(DatasetError, match="has only none and caption"):
        run(capsys, "import", *words, "--source", tar, "--label", "shape")
    with pytest.raises(DatasetError, match="--source: expected at least one path"):
        run(capsys, "import", *words)
    with pytest.raises(DatasetError, match="--out must be given"):
        run(capsys, "import", "--format", "webdataset", "--source", tar)


@pytest.mark.fast
def test_images_without_text_are_imported_and_read(tmp_path, capsys):
    words = ("--format", "procedural", "--n", 5, "--pixels", 24, "--seed", 3)
    assert run(capsys, "import", *words, "--out", tmp_path / "a")["records"] == 5
    assert run(capsys, "import", *words, "--out", tmp_path / "a")["was"] == "complete"
    assert run(capsys, "validate", "--data", tmp_path / "a")["problems"] == 0
    assert run(capsys, "stats", "--data", tmp_path / "a")["targets"] == {"text": 0, "image": 5}
    options = {"path": str(tmp_path / "a"), "pixels": 24, "threads": 0}
    (batch,) = image_batches.eval_batches(options, batch_size=5)
    expected = [procedural.draw(procedural.image_rng(3, k), 24) for k in range(5)]
    assert (batch["image"] == np.stack(expected)).all()
    for wrong in (("--label", "caption"), ("--background", "white")):
        with pytest.raises(DatasetError, match=wrong[0]):
            run(capsys, "import", *words, *wrong, "--out", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.fast
def test_captioned_images_are_drawn_on_backgrounds(tmp_path, tar, capsys):
    words = ("--format", "webdataset", "--source", tar, "--pixels", 16, "--n", 2)
    backgrounds = ("--background", "white,random,random", "--seed", 4)
    result = run(
        capsys, "import", *words, *backgrounds, "--label", "caption", "--out", tmp_path / "a"
    )
    assert result["records"] == 6 and result["classes"] == 2
    dataset = records.read(tmp_path / "a")
    assert [r.id for r in dataset][:4] == [
        "pets.tar/0", "pets.tar/0#1", "pets.tar/0#2", "pets.tar/1",
    ]  # fmt: skip
    assert [records.text(r) for r in dataset] == ["cat"] * 3 + ["dog"] * 3
    assert dataset.manifest.importer.options == {
        "label": "caption", "missing": 0, "n": 2, "pixels": 16, "seed": 4,
        "background": "white,random,random",
    }  # fmt: skip
    same = run(
        capsys, "import", *words, *backgrounds, "--label", "caption", "--out", tmp_path / "a"
    )
    assert same["was"] == "complete"
    assert run(capsys, "import", *words, "--out", tmp_path / "b")["records"] == 2
    with pytest.raises(DatasetError, match=r"unknown \['black'\], expected white or random"):
        run(capsys, "import", *words, "--background", "black", "--out", tmp_path / "c")


@pytest.mark.fast
def test_a_bad_source_writes_nothing(tmp_path, tar, capsys):
    with tarfile.open(tar, "a") as archive:
        archive.addfile(tarfile.TarInfo("../../evil.png"))
    with pytest.raises(DatasetError, match="leads out of the archive"):
        run(capsys, "import", "--format", "webdataset", "--source", tar, "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == ["pets.tar"]


@pytest.mark.fast
def test_a_folder_is_imported(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k in range(3):
        pixels = np.full((8, 6, 3), 40 * k, np.uint8)
        (tmp_path / "in" / f"{k}.png").write_bytes(images.encode_png(pixels))
        if k:
            (tmp_path / "in" / f"{k}.txt").write_text(f"number {k}")
    words = ("--format", "folder", "--source", tmp_path / "in", "--out", tmp_path / "out")
    with pytest.raises(DatasetError, match=r"0\.png: no caption"):
        run(capsys, "import", *words)
    result = run(capsys, "import", *words, "--missing_captions", 1, "--label", "caption")
    assert result["records"] == 2 and result["classes"] == 2


def test_problems_are_listed_and_fail_the_command(tmp_path, capsys):
    run(capsys, "import", "--format", "shapes", "--n", 5, "--out", tmp_path / "a")
    (shard,) = (tmp_path / "a").glob("*.array_record")
    data = bytearray(shard.read_bytes())
    offset = data.index(records.read(tmp_path / "a")[2].imgs[0].data)
    data[offset + 60] ^= 4
    shard.write_bytes(data)
    for verb, expected in (("verify", 2), ("validate", 1)):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, verb, "--data", tmp_path / "a")
        assert stopped.value.code == 1
        result = json.loads(capsys.readouterr().out)
        assert result["problems"] == expected and "record 2" in result["first"][-1]


def test_the_command_line_runs_and_reports_errors(tmp_path):
    def command(*words):
        return subprocess.run(
            [sys.executable, "-m", "starflow2_jax.prepare", *words],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )

    out = str(tmp_path / "shapes")
    imported = command("import", "--format", "shapes", "--n", "3", "--out", out)
    assert imported.returncode == 0 and "records: 3" in imported.stdout, imported.stderr
    wrong = command("verfy", "--data", out)
    assert wrong.returncode != 0 and "verify" in wrong.stdout + wrong.stderr
    gone = command("verify", "--data", str(tmp_path / "gone"))
    assert gone.returncode == 1 and gone.stderr.startswith("error: ")
    assert "Traceback" not in gone.stderr and "gone does not exist" in gone.stderr
