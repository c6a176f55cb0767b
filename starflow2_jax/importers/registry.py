"""What `prepare import` reads, by --format: from flags to records and to how they are made."""

import glob
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import flags

from starflow2_jax.data import manifest
from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.data.records import Record
from starflow2_jax.importers import captioned, interleaved
from starflow2_jax.shapes import generator, holdout, tasks

PARQUET = ("bagel_t2i", "bagel_edit", "llava", "obelics", "omnicorpus", "huggingface")


class Source(NamedTuple):
    """What an import needs: records, how they are made, hashes of what from, classes, counts."""

    make: Callable[[], Iterator[Record]]
    importer: Importer
    hashes: dict[str, str]
    classes: list[str] | None = None
    counts: Callable[[], dict[str, int]] = dict


def _webdataset(values: flags.FlagValues) -> Source:
    tars = _paths(values)
    hashes = {os.path.basename(tar): manifest.sha256_file(tar) for tar in tars}
    if len(hashes) < len(tars):
        raise DatasetError("--source: two tar files have the same name; ids would not be unique")

    def make() -> Iterator[Record]:
        return captioned.webdataset(tars, captioned.Missing(values.missing_captions))

    importer = _importer(values, "webdataset", missing=values.missing_captions)
    return Source(make, importer, hashes)


def _folder(values: flags.FlagValues) -> Source:
    (root,) = _paths(values, most=1)

    def make() -> Iterator[Record]:
        return captioned.folder(root, captioned.Missing(values.missing_captions))

    importer = _importer(values, "folder", missing=values.missing_captions)
    return Source(make, importer, captioned.folder_hashes(root))


def _tfds(values: flags.FlagValues) -> Source:
    if len(values.source) != 1:
        raise DatasetError("--source: expected the name of one TFDS set")
    label = values.label if values.label not in ("none", "caption") else None
    source, classes, name = captioned.tfds(values.source[0], values.split, values.tfds_dir, label)

    def make() -> Iterator[Record]:
        return captioned.examples(
            source,
            name,
            image_key=values.image_key,
            text_key=values.text_key,
            label_key=label,
            class_names=classes,
        )

    keys = {"image_key": values.image_key, "text_key": values.text_key, "set": name}
    return Source(make, _importer(values, "tfds", **keys), {}, classes)


def _shapes(values: flags.FlagValues) -> Source:
    count, pixels = values.n or 10_000, values.pixels or 32
    unknown = [tag for tag in values.tags if tag not in generator.TAGS]
    if unknown or not values.tags:
        raise DatasetError(
            f"--tags: unknown {unknown}, expected some of {', '.join(generator.TAGS)}"
        )
    label = values.label if values.label not in ("none", "caption") else None

    if values.label != "none" and values.tasks != ["t2i"]:
        raise DatasetError(f"--label {values.label}: only --tasks t2i has classes")
    keep = holdout.scenes(values.withheld)

    def make() -> Iterator[Record]:
        if values.tasks == ["t2i"]:
            return generator.make_records(
                values.seed, count, pixels, tags=values.tags, label=label, keep=keep
            )
        return tasks.make_records(
            values.seed,
            count,
            pixels,
            tasks=values.tasks,
            tags=values.tags,
            withheld=values.withheld,
        )

    options = {"seed": values.seed, "n": count, "pixels": pixels, "tags": ",".join(values.tags)}
    if values.tasks != ["t2i"]:
        options["tasks"] = ",".join(values.tasks)
    if values.withheld != "none":
        options["withheld"] = values.withheld
    classes = generator.classes(label) if label else None
    return Source(make, _importer(values, "shapes", **options), {}, classes)


def _interleaved(values: flags.FlagValues) -> Source:
    kind, read = values.format, getattr(interleaved, values.format)
    if kind == "huggingface":
        (folder,) = _paths(values, most=1)
        keys = {"image_key": values.image_key, "text_key": values.text_key}
        hashes = interleaved.folder_hashes(folder)
        return Source(lambda: read(folder, **keys), _importer(values, kind, **keys), hashes)
    paths = _paths(values)
    hashes = {os.path.basename(path): manifest.sha256_file(path) for path in paths}
    if len(hashes) < len(paths):
        raise DatasetError("--source: two files have the same name; ids would not be unique")
    if kind in ("bagel_t2i", "bagel_edit"):
        options = {"caption": values.caption} if kind == "bagel_t2i" else {}
        return Source(lambda: read(paths, **options), _importer(values, kind, **options), hashes)
    root = interleaved.ImageRoot(values.image_root, values.missing_images == "image")
    options = {"image_root": values.image_root, "missing_images": values.missing_images}
    importer = _importer(values, kind, **options)
    return Source(lambda: read(paths, root), importer, hashes, None, root.counts)


def _importer(values: flags.FlagValues, name: str, **options: Any) -> Importer:
    if name not in ("tfds", "shapes") and values.label not in ("none", "caption"):
        raise DatasetError(f"--label {values.label}: a {name} import knows none and caption")
    return Importer(name, captioned.VERSION, {"label": values.label, **options})


def _paths(values: flags.FlagValues, most: int | None = None) -> list[str]:
    """Paths of --source, wildcards expanded in sorted order."""
    paths = []
    for pattern in values.source:
        found = sorted(glob.glob(pattern))
        if not found:
            raise DatasetError(f"--source {pattern}: no such file")
        paths += found
    if not paths or (most and len(paths) > most):
        raise DatasetError(f"--source: expected {'one path' if most else 'at least one path'}")
    return paths


SOURCES = {
    "webdataset": _webdataset,
    "folder": _folder,
    "tfds": _tfds,
    "shapes": _shapes,
    **dict.fromkeys(PARQUET, _interleaved),
}
