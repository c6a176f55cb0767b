"""Importers of captioned images: every example comes once, in order, and errors are named."""

import gzip
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from helpers.import_sources import make_folder, make_tar, png
from helpers.paths import ROOT
from PIL import Image

from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers import captioned
from starflow2_jax.importers.tally import Tally
from starflow2_jax.importers.tars import webdataset

pytestmark = pytest.mark.fast

SHARED = pathlib.Path(os.environ.get("STARFLOW2_SHARED", ROOT / "../shared"))


def pairs(*captions, folder=""):
    out = []
    for k, caption in enumerate(captions):
        out += [(f"{folder}{k:03d}.png", png(k)), (f"{folder}{k:03d}.txt", caption.encode())]
    return out


def read(*tars, allowed=0):
    return list(webdataset(tars, Tally(missing_captions=allowed)))


@pytest.mark.parametrize("is_gzip", [False, True])
def test_webdataset_tars_give_records_in_order(tmp_path, is_gzip):
    name = "set.tar.gz" if is_gzip else "set.tar"
    extra = [("sub/dir.name/9.cls", b"3"), ("sub/dir.name/9.txt", b" a cat\n")]
    members = [*pairs("a dog", "ein B\u00e4r"), *extra, ("sub/dir.name/9.PNG", png(9))]
    tar = make_tar(tmp_path / name, members, "w:gz" if is_gzip else "w")
    imported = read(tar)
    assert [r.id for r in imported] == [f"{name}/000", f"{name}/001", f"{name}/sub/dir.name/9"]
    assert [records.text(r) for r in imported] == ["a dog", "ein B\u00e4r", "a cat"]
    assert imported[2].imgs[0].data == png(9)  # the original bytes
    assert imported[0].segs[1].loss and not imported[0].segs[0].loss
    assert list(tmp_path.iterdir()) == [tar]


def test_webdataset_is_streamed(tmp_path):
    tar = make_tar(tmp_path / "a.tar", [*pairs("one", "two"), ("zz.png", b"not an image")])
    stream = webdataset([tar], Tally())
    assert records.text(next(stream)) == "one"


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\e.png"])
def test_a_path_that_leads_out_of_the_archive_is_refused(tmp_path, name):
    tar = make_tar(tmp_path / "a.tar", [*pairs("one"), (name, png(1))])
    with pytest.raises(DatasetError, match=r"a\.tar.*leads out of the archive"):
        read(tar)
    assert list(tmp_path.iterdir()) == [tar]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = kind, "/etc/passwd"
    tar = make_tar(tmp_path / "a.tar", [link])
    with pytest.raises(DatasetError, match=r"a\.tar: 'link\.png' is a link"):
        read(tar)


def test_missing_captions_have_a_budget(tmp_path):
    members = [*pairs("one"), ("lost.png", png(7)), ("zz.png", png(8)), ("zz.txt", b" \n")]
    tar = make_tar(tmp_path / "a.tar", members)
    with pytest.raises(DatasetError, match=r"a\.tar:lost: no caption"):
        read(tar)
    with pytest.raises(
        DatasetError, match=r"a\.tar:zz\.txt: no caption.*2 missing captions, 1 allowed"
    ):
        read(tar, allowed=1)
    missing = Tally(missing_captions=2)
    assert len(list(webdataset([tar], missing))) == 1
    assert missing.reasons == {"caption missing": 2} and missing.budgets["missing_captions"] == 2
    assert missing.first["caption missing"].startswith("a.tar:lost: no caption")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b"GIF89a"), ("0.txt", b"x")], r"a\.tar:0\.png: not a JPEG, PNG or WebP"),
        ([("0.png", png(0)), ("0.txt", b"\xff\xfe")], r"a\.tar:0\.txt: not UTF-8"),
        ([("0.txt", b"alone")], "0 images, expected one"),
        ([("0.png", png(0)), ("0.jpg", png(0)), ("0.txt", b"x")], "2 images"),
        ([("0.png", png(0)), ("0.png", png(0))], "two members are called '0.png'"),
        ([*pairs("a", "b"), ("000.jpg", png(1))], "'000' are not adjacent"),
    ],
)
def test_errors_in_a_tar_are_named(tmp_path, members, message):
    with pytest.raises(DatasetError, match=message):
        read(make_tar(tmp_path / "a.tar", members))


def test_a_member_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    tar = make_tar(tmp_path / "a.tar", [("0.png", bytes(1001)), ("0.txt", b"x")])
    with pytest.raises(DatasetError, match=r"'0\.png' has 1001 bytes, at most 1000"):
        read(tar)


def test_a_gzip_bomb_is_refused(tmp_path):
    tar = tmp_path / "a.tar.gz"
    make_tar(tar, [("0.bin", bytes(30 << 20)), *pairs("one")], "w:gz")
    with pytest.raises(DatasetError, match=r"a\.tar\.gz.*expands to more than 200 times"):
        read(tar)


def test_truncated_archives_are_named(tmp_path):
    content = make_tar(tmp_path / "whole.tar", pairs("one", "two", "three")).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        # Inside a member, inside a header, and just after a member, where tarfile sees no fault.
        boundary = tar.getmembers()[2].offset
        cuts = [boundary + 520, boundary + 100, boundary]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        with pytest.raises(DatasetError, match=r"cut\.tar: (damaged|truncated)"):
            read(tmp_path / "cut.tar")
    compressed = gzip.compress(content)
    (tmp_path / "cut.tar.gz").write_bytes(compressed[: len(compressed) - 20])
    with pytest.raises(DatasetError, match=r"cut\.tar\.gz: (damaged|truncated)"):
        read(tmp_path / "cut.tar.gz")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"empty\.tar: "):
        read(tmp_path / "empty.tar")
    (tmp_path / "noise.tar").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(DatasetError, match=r"noise\.tar: damaged"):
        read(tmp_path / "noise.tar")
    with pytest.raises(DatasetError, match="no such file"):
        read(tmp_path / "nowhere.tar")


def test_a_folder_gives_records_in_order(tmp_path):
    root = make_folder(tmp_path / "pets", "b.png", "a/z.png", "a/c.png")
    (root / "notes.md").write_text("ignored")
    imported = list(captioned.folder(root, Tally()))
    assert [r.id for r in imported] == ["pets/a/c", "pets/a/z", "pets/b"]
    assert records.text(imported[0]) == "caption of a/c.png"
    hashes = captioned.folder_hashes(root)
    assert list(hashes) == ["pets"]
    (root / "b.txt").write_text("another caption")
    assert captioned.folder_hashes(root) != hashes


def test_errors_in_a_folder_are_named(tmp_path):
    root = make_folder(tmp_path / "pets", "a.png")
    (root / "b.png").write_bytes(png(1))
    with pytest.raises(DatasetError, match=r"b\.png: no caption"):
        list(captioned.folder(root, Tally()))
    assert len(list(captioned.folder(root, Tally(missing_captions=1)))) == 1
    (root / "b.webp").write_bytes(png(1))
    with pytest.raises(DatasetError, match="2 images, expected one"):
        list(captioned.folder(root, Tally(missing_captions=2)))
    with pytest.raises(DatasetError, match="no images"):
        (tmp_path / "none").mkdir()
        list(captioned.folder(tmp_path / "none", Tally()))
    with pytest.raises(DatasetError, match="no such folder"):
        list(captioned.folder(tmp_path / "nowhere", Tally()))

    outside = make_folder(tmp_path / "outside", "secret.png")
    leak = make_folder(tmp_path / "leak", "a.png")
    (leak / "b.png").symlink_to(outside / "secret.png")
    with pytest.raises(DatasetError, match=r"b\.png: a link that leads out"):
        list(captioned.folder(leak, Tally()))


def test_captions_become_classes(tmp_path, monkeypatch):
    tar = make_tar(tmp_path / "a.tar", pairs("dog", "cat", "dog", "eel"))
    classes, labeled = captioned.label_by_caption(lambda: webdataset([tar], Tally()))
    imported = list(labeled)
    assert classes == ["cat", "dog", "eel"]
    assert [r.meta["label"] for r in imported] == [1, 0, 1, 2]
    records.write(tmp_path / "data", imported, classes=classes)
    monkeypatch.setattr(captioned, "MAX_CLASSES", 2)
    with pytest.raises(DatasetError, match="more than 2 distinct captions"):
        captioned.label_by_caption(lambda: webdataset([tar], Tally()))


def test_a_random_access_source_gives_records():
    source = [
        {"image": png(0), "label": 1, "text": b"one"},
        {"image": np.full((4, 5, 1), 7, np.uint8), "label": np.int64(0), "text": "two"},
    ]
    names = ["sea_lion", "apple"]
    imported = list(
        captioned.examples(source, "s", image_key="image", label_key="label", class_names=names)
    )
    assert [records.text(r) for r in imported] == ["a photo of an apple", "a photo of a sea lion"]
    assert [r.meta["label"] for r in imported] == [1, 0]
    assert imported[0].imgs[0].data == png(0)
    assert (images.decode(imported[1].imgs[0].data, "x") == 7).all()
    texts = captioned.examples(source, "s", image_key="image", text_key="text")
    assert [records.text(r) for r in texts] == ["one", "two"]
    with pytest.raises(DatasetError, match=r"example 0: no key 'picture'; its keys are \['image'"):
        list(captioned.examples(source, "s", image_key="picture", text_key="text"))
    with pytest.raises(DatasetError, match="no caption"):
        list(captioned.examples(source, "s", image_key="image"))
    with pytest.raises(DatasetError, match="example 0: label is 1, not one of"):
        list(captioned.examples(source, "s", image_key="image", label_key="label", class_names=[]))
    with pytest.raises(DatasetError, match="example 0: the image is float"):
        odd = [{"image": np.zeros((4, 4, 3)), "text": "x"}]
        list(captioned.examples(odd, "s", image_key="image", text_key="text"))


def test_tfds_is_read_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(4, 5, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "eel"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, download):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k in range(4):
                yield k, {"image": io.BytesIO(png(k)), "label": k % 2}

    TinyPets(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source, classes, name = captioned.tfds("tiny_pets", "train", str(tmp_path), "label")
    assert name == "tiny_pets/1.0.0:train" and classes == ["cat", "eel"]
    imported = list(
        captioned.examples(source, name, image_key="image", label_key="label", class_names=classes)
    )
    assert sorted(r.imgs[0].data for r in imported) == sorted(png(k) for k in range(4))
    assert {records.text(r) for r in imported} == {"a photo of a cat", "a photo of an eel"}
    with pytest.raises(DatasetError, match="'image' is not a class label"):
        captioned.tfds("tiny_pets", "train", str(tmp_path), "image")
    with pytest.raises(DatasetError, match="TFDS has no set 'no_such_pets'"):
        captioned.tfds("no_such_pets", "train", str(tmp_path), None)


def test_cifar_photographs_are_imported(tmp_path):
    tar = SHARED / "data" / "cifar10_test.tar"
    if not tar.exists():
        pytest.skip(f"the CIFAR photographs are not at {tar}; set STARFLOW2_SHARED")
    classes, imported = captioned.label_by_caption(lambda: webdataset([tar], Tally()))
    records.write(tmp_path / "data", imported, classes=classes)
    dataset = records.read(tmp_path / "data")
    assert len(dataset) == 1000 and len(classes) == 10
    counts = np.bincount([r.meta["label"] for r in dataset])
    assert (counts == 100).all()
    first = dataset[0]
    assert records.text(first) == classes[first.meta["label"]]
    with tarfile.open(tar) as archive:
        data = archive.extractfile("000000.jpg").read()
    assert first.imgs[0].data == data
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (records.target_image(first, "x") == expected).all()
