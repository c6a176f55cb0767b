"""Regions: patches of an object name that object, and nothing else does."""

import json

import interleaved
import numpy as np
import pytest

from starflow2_jax.data import records, regions, tokens
from starflow2_jax.data.manifest import DatasetError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = interleaved.make(
        tmp_path_factory.mktemp("regions"), 24, 64, ["caption", "t2i"], size=640
    )
    return records.read(folders[0]), tokens.open_tokenizer(folders[1])


def test_patches_name_the_object_that_they_show(made):
    dataset, held = made
    for record in dataset:
        found = regions.find(record, 0, "here")
        told = json.loads(record.meta.get("scene") or record.meta["scenes"])
        scene = told if isinstance(told, dict) else told[0]
        assert [f.words.split() for f in found] == [
            [o["size"], o["color"], o["shape"]] for o in scene["objects"]
        ]
        shown, ids = regions.place(found, held, 8, 4, 8)
        for number, item in enumerate(scene["objects"]):
            at = int(item["y"] * 8) * 8 + int(item["x"] * 8)
            assert shown[at] == number
            assert held.decode(ids[number][ids[number] >= 0]) == found[number].words
        rows, columns = np.divmod(np.flatnonzero(shown >= 0), 8)
        for row, column, number in zip(rows, columns, shown[shown >= 0]):
            item = found[number]
            away = np.hypot((column + 0.5) / 8 - item.x, (row + 0.5) / 8 - item.y)
            assert away < max(item.radius, 0.09)
        assert (ids[len(found) :] == -1).all()
        assert regions.find(record, 3, "here") == []


def test_records_without_scenes_are_named(made):
    dataset, _ = made
    bare = records.Record(1, "x", "", dataset[0].segs, dataset[0].imgs)
    with pytest.raises(DatasetError, match=r"shard 3: no scenes in its meta"):
        regions.find(bare, 0, "shard 3")
