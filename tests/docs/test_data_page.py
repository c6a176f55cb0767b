"""Tests of docs/data.md: its program that writes records, run exactly as it is printed there."""

import pathlib

import numpy as np
import pytest
from helpers.markdown import blocks
from helpers.paths import ROOT

from starflow2_jax.data import image_batches, images, records
from starflow2_jax.data.manifest import DatasetError

PAGE = ROOT / "docs" / "data.md"


def first_block(language):
    """Return the text of the first block of a language on the page."""
    return next(block.text for block in blocks(PAGE) if block.language == language)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Run the page's program on its lines and some images; return the dataset's folder."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("my_data").mkdir()
    pathlib.Path("my_data/rows.jsonl").write_text(first_block("json"))
    for i, name in enumerate(("red", "blue", "near")):
        pixels = np.full((24, 16, 3), 40 * i, np.uint8)
        pathlib.Path(f"my_data/{name}.png").write_bytes(images.encode_png(pixels))
    code = first_block("python")
    assert len(code.strip().splitlines()) <= 21
    exec(compile(code, PAGE.name, "exec"), {})
    return "data/my_data"


def test_the_program_writes_every_kind_of_record(dataset):
    assert list(records.validate(dataset)) == []
    by_id = {record.id: record for record in records.read(dataset)}
    assert list(by_id) == ["draw", "caption", "question", "edit", "reason"]
    # Texts and images in order, as capitals where the segment has a loss.
    segments = {
        name: "".join(
            ("T" if isinstance(s, records.Text) else "I") if s.loss else type(s).__name__[0].lower()
            for s in record.segs
        )
        for name, record in by_id.items()
    }
    assert segments == {"draw": "tI", "caption": "itT", "question": "itT", "edit": "itI",
                        "reason": "itTIT"}  # fmt: skip
    for record in by_id.values():
        assert [s.role == "assistant" for s in record.segs] == [s.loss for s in record.segs]
        indices = [s.i for s in record.segs if isinstance(s, records.Img)]
        assert indices == [*range(len(record.imgs))]
    blob = by_id["draw"].imgs[0]
    assert by_id["draw"] == records.text_to_image("draw", "my-set", "a red circle", blob)


def test_image_batches_read_the_records_and_name_one_that_has_no_image_to_draw(dataset):
    options = {"path": dataset, "pixels": 16, "resize": "center_crop", "threads": 0}
    batches = image_batches.eval_batches(options, batch_size=1)
    assert next(batches)["image"].shape == (1, 16, 16, 3)
    with pytest.raises(DatasetError, match=r"'caption'.*expected one image with loss=True"):
        next(batches)
