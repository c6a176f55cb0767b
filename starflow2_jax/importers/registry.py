"""The importers of `prepare import`, by --format: flags -> records and their provenance.

The shapes benchmark has its own in `shapes.importer`.
"""

import functools
import glob
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from starflow2_jax.data import manifest
from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.data.records import Record
from starflow2_jax.importers import captioned, interleaved, procedural, redraw
from starflow2_jax.importers.redraw import BACKGROUNDS


class ImportSource(NamedTuple):
    """The records of an import and their provenance."""

    make: Callable[[], Iterator[Record]]  # yields the records; may be called twice
    importer: Importer  # importer and its options, for the manifest
    hashes: dict[str, str]  # sha256 of each source file
    classes: list[str] | None = None  # names of the classes
    counts: Callable[[], dict[str, int]] = dict  # of skipped data; called after the last record


def _webdataset(values: flags.FlagValues) -> ImportSource:
    tars = _paths(values)

    def make() -> Iterator[Record]:
        return captioned.webdataset(tars, captioned.MissingCaptions(values.missing_captions))

    importer = _importer(values, "webdataset", missing=values.missing_captions)
    return ImportSource(make, importer, _file_hashes(tars))


def _folder(values: flags.FlagValues) -> ImportSource:
    (root,) = _paths(values, max_count=1)

    def make() -> Iterator[Record]:
        return captioned.folder(root, captioned.MissingCaptions(values.missing_captions))

    importer = _importer(values, "folder", missing=values.missing_captions)
    return ImportSource(make, importer, captioned.folder_hashes(root))


def _tfds(values: flags.FlagValues) -> ImportSource:
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

    importer = _importer(
        values, "tfds", image_key=values.image_key, text_key=values.text_key, set=name
    )
    return ImportSource(make, importer, {}, classes)


def _huggingface(values: flags.FlagValues) -> ImportSource:
    (folder,) = _paths(values, max_count=1)
    image_key, text_key = values.image_key, values.text_key

    def make() -> Iterator[Record]:
        return interleaved.huggingface(folder, image_key=image_key, text_key=text_key)

    importer = _importer(values, "huggingface", image_key=image_key, text_key=text_key)
    return ImportSource(make, importer, interleaved.folder_hashes(folder))


def _bagel_t2i(values: flags.FlagValues) -> ImportSource:
    paths, caption = _paths(values), values.caption
    importer = _importer(values, "bagel_t2i", caption=caption)
    return ImportSource(
        lambda: interleaved.bagel_t2i(paths, caption), importer, _file_hashes(paths)
    )


def _bagel_edit(values: flags.FlagValues) -> ImportSource:
    paths = _paths(values)
    importer = _importer(values, "bagel_edit")
    return ImportSource(lambda: interleaved.bagel_edit(paths), importer, _file_hashes(paths))


def _with_image_root(values: flags.FlagValues) -> ImportSource:
    read, paths = getattr(interleaved, values.format), _paths(values)
    root = interleaved.ImageRoot(values.image_root, values.missing_images == "image")
    importer = _importer(
        values, values.format, image_root=values.image_root, missing_images=values.missing_images
    )
    hashes = _file_hashes(paths)
    return ImportSource(lambda: read(paths, root), importer, hashes, counts=root.counts)


def _procedural(values: flags.FlagValues) -> ImportSource:
    if values.label != "none":
        raise DatasetError(f"--label {values.label}: procedural images have no classes")
    count, pixels = values.n or 10_000, values.pixels or 64
    make = functools.partial(procedural.make_records, values.seed, count, pixels)
    options = {"seed": values.seed, "n": count, "pixels": pixels}
    return ImportSource(make, Importer("procedural", procedural.VERSION, options), {})


def _captioned(
    read: Callable[[flags.FlagValues], ImportSource], values: flags.FlagValues
) -> ImportSource:
    """Return the records of a source of captioned images, at most --n, as --background asks."""
    unknown = [background for background in values.background if background not in BACKGROUNDS]
    if unknown:
        raise DatasetError(f"--background: unknown {unknown}, expected {' or '.join(BACKGROUNDS)}")
    source, options = read(values), {}
    if values.n is not None:
        options["n"] = values.n
    if values.background or values.pixels:
        options |= {"pixels": values.pixels, "background": ",".join(values.background)}
    if "random" in values.background:
        options["seed"] = values.seed

    def make() -> Iterator[Record]:
        rows = itertools.islice(source.make(), values.n)
        if not values.background and not values.pixels:
            return rows
        return redraw.redraw(rows, values.pixels, values.background or ["white"], values.seed)

    importer = source.importer
    importer = Importer(importer.name, importer.version, {**importer.options, **options})
    return source._replace(make=make, importer=importer)


def _importer(values: flags.FlagValues, name: str, **options: Any) -> Importer:
    if name != "tfds" and values.label not in ("none", "caption"):
        raise DatasetError(f"--label {values.label}: a {name} import has only none and caption")
    return Importer(name, captioned.VERSION, {"label": values.label, **options})


def _paths(values: flags.FlagValues, max_count: int | None = None) -> list[str]:
    """Return the paths of --source, with wildcards expanded in sorted order."""
    paths = []
    for pattern in values.source:
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise DatasetError(f"--source {pattern}: no such file")
        paths += matches
    if not paths or (max_count and len(paths) > max_count):
        raise DatasetError(f"--source: expected {'one path' if max_count else 'at least one path'}")
    return paths


def _file_hashes(paths: Sequence[str]) -> dict[str, str]:
    hashes = {os.path.basename(path): manifest.sha256_file(path) for path in paths}
    if len(hashes) < len(paths):
        raise DatasetError("--source: two files have the same name; ids would not be unique")
    return hashes


CAPTIONED = {"webdataset": _webdataset, "folder": _folder, "tfds": _tfds}
IMPORTERS = {
    **{name: functools.partial(_captioned, read) for name, read in CAPTIONED.items()},
    "bagel_t2i": _bagel_t2i,
    "bagel_edit": _bagel_edit,
    **dict.fromkeys(("llava", "obelics", "omnicorpus"), _with_image_root),
    "huggingface": _huggingface,
    "procedural": _procedural,
}
