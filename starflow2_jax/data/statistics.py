"""Statistics of a dataset: sizes, formats, caption lengths, tags and classes."""

import statistics
from collections import Counter
from typing import Any

from starflow2_jax.data import records


def describe(dataset: records.Dataset) -> dict[str, Any]:
    """Count records, segments, image sizes and formats, caption lengths, tags and classes."""
    sizes, formats, classes, tags = Counter(), Counter(), Counter(), Counter()
    targets = {"text": 0, "image": 0}
    lengths, image_bytes = [], 0
    for record in dataset:
        lengths.append(len(records.text(record).encode()))
        for blob in record.imgs:
            sizes[f"{blob.h}x{blob.w}"] += 1
            formats[blob.fmt] += 1
            image_bytes += len(blob.data)
        for segment in record.segs:
            targets["text" if isinstance(segment, records.Text) else "image"] += segment.loss
        if "label" in record.meta:
            classes[record.meta["label"]] += 1
        if "tag" in record.meta:
            tags[record.meta["tag"]] += 1
    manifest = dataset.manifest
    return {
        "records": len(dataset),
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "importer": manifest.importer.name,
        "images": sum(sizes.values()),
        "image_bytes": image_bytes,
        "image_sizes_h_w": dict(sizes.most_common(20)),
        "image_formats": dict(formats.most_common()),
        "targets": targets,
        "caption_bytes": {
            "least": min(lengths),
            "median": int(statistics.median(lengths)),
            "most": max(lengths),
        },
        "tags": dict(sorted(tags.items())),
        "classes": {name: classes[number] for number, name in enumerate(manifest.classes or [])},
    }
