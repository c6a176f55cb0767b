"""Importer of Hugging Face datasets, as `datasets.save_to_disk` writes them.

A folder has Arrow files with the columns image or images, and messages, conversations, or a
caption. A row is checked against a schema before it is used.
"""

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from starflow2_jax.data import records, untrusted
from starflow2_jax.data.manifest import DatasetError, sha256_file
from starflow2_jax.data.records import ImageBlob, Record
from starflow2_jax.importers import tables
from starflow2_jax.importers.captioned import photo_of
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.interleaved import Conversation, conversation_record
from starflow2_jax.importers.tally import ImageError, RowError, Tally, captions_of

_MAX_JSON_BYTES = 64 << 20


class StoredImage(msgspec.Struct):
    """An image of a `datasets` column."""

    data: bytes | None = msgspec.field(name="bytes", default=None)
    path: str | None = None


class StoredImages(msgspec.Struct):
    """The images of a row of a `datasets` folder."""

    image: StoredImage | bytes | None = None
    images: list[StoredImage | bytes | None] | StoredImage | None = None


class _DataFile(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    data_files: list[_DataFile] = msgspec.field(name="_data_files")


def huggingface(
    folder: str | os.PathLike[str],
    *,
    image_key: str = "image",
    text_key: str | None = None,
    label_key: str | None = None,
    tally: Tally | None = None,
) -> Iterator[Record]:
    """Yield the records of a folder written by `datasets.save_to_disk`.

    With a column `messages` or `conversations`, these are conversations over `images` (or `image`);
    otherwise text-to-image pairs of `image_key` and `text_key` (by default `text` or `caption`). A
    caption that is a class number becomes the name of the class. The number of the class
    `label_key` goes to `meta.label`; without a caption, its name is in "a photo of a ...".
    """
    folder, tally = pathlib.Path(folder), tally or Tally()
    classes = class_names(folder)
    parse = functools.partial(
        _stored_row, folder.name, image_key, text_key, label_key, classes, tally
    )
    for file in data_files(folder):
        yield from tally.parse_rows(tables.arrow_rows(file), parse)


def _stored_row(
    src: str,
    image_key: str,
    text_key: str | None,
    label_key: str | None,
    classes: Mapping[str, Sequence[str]],
    tally: Tally,
    location: str,
    row: Mapping[str, Any],
) -> list[Record]:
    """Return the records of a row of a `datasets` folder."""
    turns = tables.convert(row, Conversation, location).turns
    if turns and label_key is None:
        stored = tables.convert(row, StoredImages, location)
        one = stored.images if isinstance(stored.images, StoredImage) else stored.image
        several = stored.images if isinstance(stored.images, list) else []
        blobs = [
            _stored_image(image, f"{location}: image {i}", tally)
            for i, image in enumerate(several or ([one] if one is not None else []))
        ]
        return conversation_record(location, turns, blobs, ImageRoot(tally=tally), src)
    column = next((k for k in (text_key, "text", "caption") if k and k in row), None)
    meta = {} if label_key is None else {"label": _class_number(label_key, classes, row, location)}
    if column is None and label_key is not None and image_key in row and not text_key:
        captions = [photo_of(classes[label_key][meta["label"]])]
    elif column is None or image_key not in row or (text_key and column != text_key):
        raise DatasetError(
            f"{location}: expected messages, conversations, or {image_key!r} and "
            f"{text_key or 'text or caption'!r}; its columns are {sorted(row)}"
        )
    else:
        value = row[column]
        if column in classes and isinstance(value, int):
            value = classes[column][_class_number(column, classes, row, location)]
        captions = captions_of(value, f"{location}: {column}")
    image = tables.convert(row[image_key], StoredImage | bytes | None, f"{location}: {image_key}")
    blob = _stored_image(image, f"{location}: {image_key}", tally)
    ids = [location + (f"/{k}" if k else "") for k in range(len(captions))]
    return [records.text_to_image(id, src, text, blob, meta) for id, text in zip(ids, captions)]


def _class_number(
    column: str, classes: Mapping[str, Sequence[str]], row: Mapping[str, Any], location: str
) -> int:
    """Return the number of a row's class, which RowError says is none of the column's classes."""
    value, count = row.get(column), len(classes[column])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise RowError(f"{location}: {column} is {value!r:.80}, not a class", "label is no class")
    return value


def data_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Return the Arrow files of a folder written by `datasets.save_to_disk`, in their order."""
    folder = pathlib.Path(folder)
    splits = folder / "dataset_dict.json"
    if splits.exists():
        data = untrusted.read_file(splits, _MAX_JSON_BYTES)
        names = untrusted.decode_json(data, str(splits), dict[str, list[str]]).get("splits") or []
        example = f"; name one: {folder}/{names[0]}" if names else ""
        raise DatasetError(f"{folder}: has the splits {names}{example}")
    state = folder / "state.json"
    if not state.exists():
        raise DatasetError(f"{folder}: no state.json; expected a folder of datasets.save_to_disk")
    data = untrusted.read_file(state, _MAX_JSON_BYTES)
    entries = untrusted.decode_json(data, str(state), _State).data_files
    # A base name alone, so that a state cannot point outside its folder.
    return [folder / os.path.basename(entry.filename) for entry in entries]


def class_names(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Return the names of the classes of every column that holds class numbers."""
    file = pathlib.Path(folder) / "dataset_info.json"
    if not file.exists():
        return {}
    info = untrusted.decode_json(untrusted.read_file(file, _MAX_JSON_BYTES), str(file))
    features = info.get("features") if isinstance(info, dict) else None
    classes = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and all(isinstance(n, str) for n in names):
            classes[name] = names
    return classes


def folder_hashes(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the sha256 of each data file of a folder written by `datasets.save_to_disk`."""
    files = data_files(folder)
    for file in files:
        untrusted.check_regular(file)
    return {file.name: sha256_file(file) for file in files}


def _stored_image(image: StoredImage | bytes | None, location: str, tally: Tally) -> ImageBlob:
    """Return the image of a `datasets` column."""
    data = image.data if isinstance(image, StoredImage) else image
    if data is None and image is not None:
        raise ImageError(
            f"{location}: the dataset has a path instead of the image; save it with its bytes",
            "image is a path",
        )
    return tally.image(data, location)
