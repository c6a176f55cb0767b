"""The README's writer of records, run as it stands there."""

import pathlib
import re

import numpy as np
import pytest
from helpers.paths import ROOT

from starflow2_jax.data import image_batches, images, records
from starflow2_jax.data.manifest import DatasetError

README = ROOT / "README.md"


def block(language):
    """The one block of a language in the section on the user's own data."""
    section = README.read_text().split("\n## Your own data\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.S)
    return found


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The folder in which the README's lines and code were used."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine").mkdir()
    pathlib.Path("mine/rows.jsonl").write_text(block("json"))
    for k, name in enumerate(("red", "blue", "near")):
        pixels = np.full((24, 16, 3), 40 * k, np.uint8)
        pathlib.Path(f"mine/{name}.png").write_bytes(images.encode_png(pixels))
    code = block("python")
    assert len(code.strip().splitlines()) <= 21
    exec(compile(code, "README.md", "exec"), {})
    return tmp_path


def test_the_writer_makes_every_kind_of_record(written):
    assert list(records.validate("data/mine")) == []
    found = {record.id: record for record in records.read("data/mine")}
    assert list(found) == ["draw", "caption", "question", "edit", "reason"]
    shape = {
        name: "".join(
            ("T" if isinstance(s, records.Text) else "I") if s.loss else type(s).__name__[0].lower()
            for s in record.segs
        )
        for name, record in found.items()
    }
    assert shape == {"draw": "tI", "caption": "itT", "question": "itT", "edit": "itI",
                     "reason": "itTIT"}  # fmt: skip
    for record in found.values():
        assert [s.role == "assistant" for s in record.segs] == [s.loss for s in record.segs]
        assert [s.i for s in record.segs if isinstance(s, records.Img)] == [
            *range(len(record.imgs))
        ]
    blob = found["draw"].imgs[0]
    assert found["draw"] == records.text_to_image("draw", "my-set", "a red circle", blob)


def test_pictures_are_read_by_the_pipeline_and_captions_alone_are_named(written):
    options = {"path": "data/mine", "pixels": 16, "resize": "center_crop", "threads": 0}
    batches = image_batches.eval_batches(options, batch_size=1)
    assert next(batches)["image"].shape == (1, 16, 16, 3)
    with pytest.raises(DatasetError, match=r"'caption'.*expected one image with loss=True"):
        next(batches)
