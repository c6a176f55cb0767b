"""The importers of `prepare import`, by --format: flags -> records and their provenance.

The shapes benchmark has its own in `shapes.importer`.
"""

import functools
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from starflow2_jax.data import manifest, untrusted
from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.data.records import Record
from starflow2_jax.importers import (
    captioned,
    huggingface,
    interleaved,
    procedural,
    redraw,
    tars,
)
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.redraw import BACKGROUNDS
from starflow2_jax.importers.tally import Tally

_MAX_BRACES = 1_000_000


class ImportSource(NamedTuple):
    """The records of an import and their provenance."""

    make: Callable[[], Iterator[Record]]  # yields the records; may be called twice
    importer: Importer  # importer and its options, for the manifest
    hashes: dict[str, str]  # sha256 of each source file
    classes: list[str] | None = None  # names of the classes
    counts: Callable[[], dict[str, int]] = dict  # of skipped data; called after the last record
    tally: Tally | None = None  # counts what is left out; cleared by `make`


def _tally(values: flags.FlagValues) -> Tally:
    return Tally(
        missing_captions=values.missing_captions,
        bad_images=values.bad_images,
        bad_rows=values.bad_rows,
        check_pixels=values.check_pixels,
    )


def _webdataset(values: flags.FlagValues) -> ImportSource:
    paths, tally = _paths(values), _tally(values)
    importer = _importer(values, "webdataset", missing=values.missing_captions)
    make = functools.partial(tars.webdataset, paths, tally)
    return ImportSource(make, importer, _file_hashes(paths), tally=tally)


def _folder(values: flags.FlagValues) -> ImportSource:
    (root,), tally = _paths(values, max_count=1), _tally(values)
    importer = _importer(values, "folder", missing=values.missing_captions)
    make = functools.partial(captioned.folder, root, tally)
    return ImportSource(make, importer, captioned.folder_hashes(root), tally=tally)


def _tfds(values: flags.FlagValues) -> ImportSource:
    if len(values.source) != 1:
        raise DatasetError("--source: expected the name of one TFDS set")
    label = values.label if values.label not in ("none", "caption") else None
    source, classes, name = captioned.tfds(values.source[0], values.split, values.tfds_dir, label)
    tally = _tally(values)
    make = functools.partial(
        captioned.examples,
        source,
        name,
        image_key=values.image_key,
        text_key=values.text_key,
        label_key=label,
        class_names=classes,
        tally=tally,
    )
    importer = _importer(
        values, "tfds", image_key=values.image_key, text_key=values.text_key, set=name
    )
    return ImportSource(make, importer, {}, classes, tally=tally)


def _huggingface(values: flags.FlagValues) -> ImportSource:
    (folder,), tally = _paths(values, max_count=1), _tally(values)
    keys = {"image_key": values.image_key, "text_key": values.text_key}
    importer = _importer(values, "huggingface", **keys)
    label = values.label if values.label not in ("none", "caption") else None
    names = huggingface.class_names(folder)
    if label is not None and label not in names:
        known = f"classes are in {', '.join(names)}" if names else "it has no columns of classes"
        raise DatasetError(f"--label {label}: {folder} has no such column of classes; {known}")
    make = functools.partial(huggingface.huggingface, folder, label_key=label, tally=tally, **keys)
    hashes, classes = huggingface.folder_hashes(folder), names[label] if label else None
    return ImportSource(make, importer, hashes, classes, tally=tally)


def _bagel_t2i(values: flags.FlagValues) -> ImportSource:
    paths, caption, tally = _paths(values), values.caption, _tally(values)
    importer = _importer(values, "bagel_t2i", caption=caption)
    make = functools.partial(interleaved.bagel_t2i, paths, caption, tally)
    return ImportSource(make, importer, _file_hashes(paths), tally=tally)


def _bagel_edit(values: flags.FlagValues) -> ImportSource:
    paths, tally = _paths(values), _tally(values)
    importer = _importer(values, "bagel_edit")
    make = functools.partial(interleaved.bagel_edit, paths, tally)
    return ImportSource(make, importer, _file_hashes(paths), tally=tally)


def _with_image_root(values: flags.FlagValues) -> ImportSource:
    read, paths, tally = getattr(interleaved, values.format), _paths(values), _tally(values)
    root = ImageRoot(values.image_root, values.missing_images == "image", tally)
    importer = _importer(
        values, values.format, image_root=values.image_root, missing_images=values.missing_images
    )

    def make() -> Iterator[Record]:
        root.clear()
        return read(paths, root)

    return ImportSource(make, importer, _file_hashes(paths), counts=root.counts, tally=tally)


def _procedural(values: flags.FlagValues) -> ImportSource:
    if values.label != "none":
        raise DatasetError(f"--label {values.label}: procedural images have no classes")
    count, pixels = values.n or 10_000, values.pixels or 64
    make = functools.partial(procedural.make_records, values.seed, count, pixels)
    importer = Importer(
        "procedural",
        procedural.VERSION,
        {"seed": values.seed, "n": count, "pixels": pixels},
    )
    return ImportSource(make, importer, {})


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
        backgrounds = values.background or ["white"]
        return redraw.redraw(rows, values.pixels, backgrounds, values.seed, source.tally)

    importer = source.importer
    importer = Importer(importer.name, importer.version, {**importer.options, **options})
    return source._replace(make=make, importer=importer)


def _importer(values: flags.FlagValues, name: str, **options: Any) -> Importer:
    if name not in ("tfds", "huggingface") and values.label not in ("none", "caption"):
        raise DatasetError(f"--label {values.label}: a {name} import has only none and caption")
    # Absent unless set, so that imports without them equal those of earlier versions.
    limits = {name: values[name].value for name in ("bad_images", "bad_rows", "check_pixels")}
    options |= {name: value for name, value in limits.items() if value}
    return Importer(name, captioned.VERSION, {"label": values.label, **options})


def _paths(values: flags.FlagValues, max_count: int | None = None) -> list[str]:
    """Return the paths of --source, with wildcards expanded in sorted order.

    A path that exists is no pattern. `{00000..00012}` stands for the numbers in between.
    """
    paths = []
    for pattern in values.source:
        matches = [pattern]
        if not os.path.lexists(pattern):
            patterns = _expand_braces(pattern)
            matches = sorted(path for one in patterns for path in glob.glob(one))
        if not matches:
            raise DatasetError(f"--source {pattern}: no such file")
        paths += matches
    if not paths or (max_count and len(paths) > max_count):
        raise DatasetError(f"--source: expected {'one path' if max_count else 'at least one path'}")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """Return a pattern for each number of the first `{FIRST..LAST}`, padded as FIRST is."""
    match = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) >= _MAX_BRACES:
        raise DatasetError(f"--source {pattern}: more than {_MAX_BRACES} numbers")
    return [
        f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        for number in range(int(first), int(last) + 1)
    ]


def _file_hashes(paths: Sequence[str]) -> dict[str, str]:
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    if len(set(names)) < len(paths):
        raise DatasetError("--source: two files have the same name; ids would not be unique")
    for path in paths:
        if os.path.isdir(path):
            raise DatasetError(
                f"--source {path}: a folder, expected files; '{path}/*' names those in it"
            )
        untrusted.check_regular(path)
    return {name: manifest.sha256_file(path) for name, path in zip(names, paths)}


CAPTIONED = {"webdataset": _webdataset, "folder": _folder, "tfds": _tfds}
IMPORTERS = {
    **{name: functools.partial(_captioned, read) for name, read in CAPTIONED.items()},
    "bagel_t2i": _bagel_t2i,
    "bagel_edit": _bagel_edit,
    **dict.fromkeys(("llava", "obelics", "omnicorpus"), _with_image_root),
    "huggingface": _huggingface,
    "procedural": _procedural,
}
