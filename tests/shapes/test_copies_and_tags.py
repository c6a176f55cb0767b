"""Copies, and worlds of single objects; the other records of the benchmark stay as they were."""

import hashlib
import json

import pytest

from starflow2_jax.data import images, records
from starflow2_jax.shapes import detector, tasks

pytestmark = pytest.mark.fast

SINGLE = ("single_object", "colors")


def test_other_records_never_change():
    """Records of every task equal those of the first version, which had no copies."""
    digest = hashlib.sha256()
    nine = [task for task in tasks.TASKS if task != "copy"]
    for withheld in ("none", "leave_out", "only"):
        for record in tasks.make_records(3, 90, 16, tasks=nine, withheld=withheld):
            content = (record.id, record.src, record.segs, sorted(record.meta.items()))
            digest.update(repr(content).encode())
    expected = "f883b00607a334b89e52713e56abccf48807bfd658fea8a8116503c6a4c8b04a"
    assert digest.hexdigest() == expected


def test_copies_change_nothing():
    requests, sizes = set(), set()
    for record in tasks.make_records(0, 60, 32, tasks=["copy"], withheld="leave_out"):
        source, target = (images.decode(blob.data, record.id) for blob in record.imgs)
        assert (source == target).all()
        assert [s.loss for s in record.segs] == [False, False, True]
        source_scene, target_scene = json.loads(record.meta["scenes"])
        assert source_scene == target_scene and record.meta["withheld"] == "none"
        if len(sizes) < 4:
            assert detector.judge(target, json.loads(record.meta["geneval"])).correct
        requests.add(records.text(record))
        sizes.add(len(source_scene["objects"]))
    assert len(requests) == 6 and sizes == {1, 2, 3, 4}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_tags_of_one_object_restrict_the_images_of_every_task(task):
    tags = set()
    for record in tasks.make_records(2, 24, 8, tasks=[task], tags=SINGLE, withheld="leave_out"):
        tags.add(record.meta["tag"])
        scenes = json.loads(record.meta.get("scenes") or f"[{record.meta['scene']}]")
        if task != "text":
            assert all(len(scene["objects"]) == 1 for scene in scenes)
    expected = {
        "caption": set(SINGLE), "t2i": set(SINGLE), "edit": {"recolor", "replace"},
        "question": {"color", "shape", "size", "exists", "background"}, "reason": {"zoom"},
    }  # fmt: skip
    assert tags == expected.get(task, tags)


def test_a_tag_of_two_objects_lifts_the_restriction():
    both = (*SINGLE, "position")
    edits = tasks.make_records(2, 24, 8, tasks=["edit"], tags=both)
    assert list(edits) == list(tasks.make_records(2, 24, 8, tasks=["edit"]))
