"""Regions: patches of an object describe that object, and no others do."""

import json

import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax.data import chat_layout, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.shapes import generator, regions

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = interleaved_dataset.make(
        tmp_path_factory.mktemp("regions"), 24, 64, ["caption", "t2i"], size=640
    )
    return records.read(folders[0]), chat_layout.open_tokenizer(folders[1])


def test_patches_describe_the_object_that_they_show(folders):
    dataset, tokenizer = folders
    for record in dataset:
        image_regions = regions.find_regions(record, 0, "here")
        raw = json.loads(record.meta.get("scene") or record.meta["scenes"])
        scene = raw if isinstance(raw, dict) else raw[0]
        *objects, background = image_regions
        for item, described in zip(objects, scene["objects"], strict=True):
            number, *words = item.words.split()
            same = [(o["color"], o["shape"]) for o in scene["objects"]]
            assert generator.NUMBERS.index(number) == same.count(
                (described["color"], described["shape"])
            )
            assert words[:3] == [described["size"], described["color"], described["shape"]]
            assert " ".join(words[3:]) in (*generator.RELATIONS, "")
        if len(objects) == 2:
            first, second = (generator.Object(**o) for o in scene["objects"])
            assert objects[0].words.endswith(generator.relation(first, second) or first.shape)
        assert background.words == f" {scene['background']} background"
        region_map, ids = regions.RegionLabels(5, 16)(record, 0, tokenizer, 8, "here")
        for number, item in enumerate(scene["objects"]):
            patch = int(item["y"] * 8) * 8 + int(item["x"] * 8)
            assert region_map[patch] == number
            assert tokenizer.decode(ids[number][ids[number] >= 0]) == image_regions[number].words
        rows, columns = np.divmod(np.arange(64), 8)
        for row, column, number in zip(rows, columns, region_map):
            distance = [
                np.hypot((column + 0.5) / 8 - f.x, (row + 0.5) / 8 - f.y) - f.radius
                for f in objects
            ]
            assert number != len(objects) or min(distance) > 0.7 / 8
            assert not 0 <= number < len(objects) or distance[number] < 0.09
        assert (region_map == len(objects)).sum() > 8
        assert (ids[len(image_regions) :] == -1).all()
        assert regions.find_regions(record, 3, "here") == []


def test_records_without_scenes_are_named(folders):
    dataset, _ = folders
    bare = records.Record(1, "x", "", dataset[0].segs, dataset[0].imgs)
    with pytest.raises(DatasetError, match=r"shard 3: no scenes in its meta"):
        regions.find_regions(bare, 0, "shard 3")
