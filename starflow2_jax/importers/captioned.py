"""Importers of captioned images: folders, and random-access sources (TFDS).

Each importer is a generator of text-to-image records in a fixed order, with one example in memory
at a time. `dataset.json` records the sha256 of the source files.
"""

import functools
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import images, records, untrusted
from starflow2_jax.data.manifest import DatasetError, sha256_file
from starflow2_jax.data.records import Record
from starflow2_jax.importers import folders
from starflow2_jax.importers.tally import CaptionError, ImageError, RowError, Tally, captions_of

VERSION = "2"  # in the manifest; raise it when equal sources would give other records
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
CAPTION_SUFFIX = ".txt"
MAX_CAPTION_BYTES = 1 << 20
MAX_CLASSES = 10_000


class ExampleFiles(NamedTuple):
    """The files of one captioned image."""

    location: str  # of the example, for error messages
    images: Mapping[str, bytes | pathlib.Path]  # bytes or file of each image, by its name
    caption: bytes | pathlib.Path | None
    other_names: Sequence[str]  # names of the other files of the same name, for error messages


def parse_example(files: ExampleFiles, id: str, src: str, tally: Tally) -> list[Record]:
    """Return the record of one image and its caption, in a list.

    Raises:
        RowError, CaptionError, ImageError: The example is no captioned image.
    """
    location = files.location
    if len(files.images) != 1:
        names = ", ".join([*files.images, *files.other_names])
        reason = "several images of one name" if files.images else "caption without an image"
        raise RowError(f"{location}: {len(files.images)} images, expected one ({names})", reason)
    ((name, data),) = files.images.items()
    caption = files.caption
    if caption is None:
        hint = f"; there is {', '.join(files.other_names)}" if files.other_names else ""
        raise CaptionError(
            f"{location}: no caption; expected it in a {CAPTION_SUFFIX} of the same name{hint}",
            "caption missing",
        )
    caption_location = f"{location}{CAPTION_SUFFIX}"
    if isinstance(caption, pathlib.Path):
        caption_location = str(caption)
        caption = untrusted.read_file(caption, MAX_CAPTION_BYTES)
    (text,) = captions_of(caption, caption_location)
    if isinstance(data, pathlib.Path):
        data = tally.read_image(data)
    return [records.text_to_image(id, src, text.strip(), tally.image(data, name))]


def folder(root: str | os.PathLike[str], tally: Tally) -> Iterator[Record]:
    """Yield the records of a folder of images with captions in `.txt` files of the same names.

    Subfolders are read too; the order is that of the relative paths. Links out of the folder and
    links to folders are errors; hidden files and files of other kinds are counted.
    """
    root = pathlib.Path(root).resolve()
    pictures: dict[str, list[pathlib.Path]] = {}
    captions: dict[str, list[pathlib.Path]] = {}
    for file in _folder_files(root, tally):
        key = file.relative_to(root).with_suffix("").as_posix()
        is_caption = file.suffix.lower() == CAPTION_SUFFIX
        files = captions if is_caption else pictures
        # File systems differ in the Unicode form of names: captions are matched in any.
        files.setdefault(unicodedata.normalize("NFC", key) if is_caption else key, []).append(file)

    list_names = functools.cache(_names_by_stem)

    def rows() -> Iterator[tuple[str, ExampleFiles]]:
        for key, files in pictures.items():
            texts = captions.pop(unicodedata.normalize("NFC", key), [])
            # Only for an image without a caption its folder is looked at.
            names = [] if texts else list_names(files[0].parent)[files[0].stem.lower()]
            other_names = sorted(name for name in names if name != files[0].name)
            if len(texts) > 1:
                texts = [file for file in texts if file == files[0].with_suffix(CAPTION_SUFFIX)]
            image_files = {str(file): file for file in files}
            caption = texts[0] if texts else None
            yield key, ExampleFiles(str(files[0]), image_files, caption, other_names)

    def parse(key: str, files: ExampleFiles) -> list[Record]:
        return parse_example(files, f"{root.name}/{key}", root.name, tally)

    yield from tally.parse_rows(rows(), parse)
    for files in captions.values():
        tally.pass_over("captions without an image", str(files[0]))


def _names_by_stem(folder: pathlib.Path) -> dict[str, list[str]]:
    """Return the names of the files of a folder by their stems in lower case."""
    names: dict[str, list[str]] = {}
    for file in folder.iterdir():
        names.setdefault(file.stem.lower(), []).append(file.name)
    return names


def examples(
    source: Sequence[Mapping[str, Any]],
    src: str,
    *,
    image_key: str,
    text_key: str | None = None,
    label_key: str | None = None,
    class_names: Sequence[str] | None = None,
    tally: Tally | None = None,
) -> Iterator[Record]:
    """Yield the records of a random-access source of dicts, such as `tfds.data_source`.

    Encoded images are stored unchanged, and uint8 [H, W, 1 or 3] as PNG. The caption is `text_key`
    or, without it, "a photo of a ..." with the name of the class `label_key`. The number of that
    class goes to `meta.label`.
    """
    if text_key is None and label_key is None:
        raise DatasetError(f"{src}: no caption; name a text feature or a class feature")
    tally = tally or Tally()

    def parse(location: str, index: int) -> list[Record]:
        row = source[index]
        for key in (image_key, text_key, label_key):
            if key is not None and key not in row:
                raise DatasetError(f"{location}: no key {key!r}; its keys are {sorted(row)}")
        meta: dict[str, Any] = {}
        if label_key is not None:
            label = row[label_key]
            is_number = isinstance(label, int | np.integer) and not isinstance(label, bool)
            if class_names is None or not is_number or not 0 <= label < len(class_names):
                raise RowError(
                    f"{location}: {label_key} is {label!r:.80}, not one of the classes",
                    "label is no class",
                )
            meta["label"] = int(label)
        if text_key is not None:
            captions = captions_of(row[text_key], location)
        else:
            captions = [photo_of(class_names[meta["label"]])]
        blob = tally.image(_encoded(row[image_key], location), location)
        ids = [f"{src}-{index:08d}" + (f"/{k}" if k else "") for k in range(len(captions))]
        return [
            records.text_to_image(id, src, caption, blob, meta)
            for id, caption in zip(ids, captions)
        ]

    rows = ((f"{src} example {index}", index) for index in range(len(source)))
    yield from tally.parse_rows(rows, parse)


def photo_of(class_name: str) -> str:
    """Return the caption of an image of which only the class is known."""
    noun = class_name.replace("_", " ")
    return f"a photo of {'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def tfds(
    name: str, split: str, data_dir: str | None, label_key: str | None
) -> tuple[Sequence[Mapping[str, Any]], list[str] | None, str]:
    """Open a TensorFlow Datasets set stored as array_record, without TensorFlow.

    Returns the source for `examples` (images still encoded), the class names of `label_key` or
    None, and the full name with version.
    """
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(
            name, data_dir=data_dir, file_format="array_record", try_gcs=False
        )
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        # Do not repeat the error's own message, which lists every existing set.
        raise DatasetError(f"TFDS has no set {name!r}, and there is none in {data_dir}") from error
    if not builder.info.splits:
        raise DatasetError(f"TFDS set {name!r}: not prepared as array_record in {builder.data_dir}")
    features = builder.info.features
    skip = {
        key: tensorflow_datasets.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tensorflow_datasets.features.Image)
    }
    source = builder.as_data_source(split=split, decoders=skip)
    names = None
    if label_key is not None:
        if label_key not in features or not hasattr(features[label_key], "names"):
            raise DatasetError(f"{name}: {label_key!r} is not a class label of {sorted(features)}")
        names = list(features[label_key].names)
    return source, names, builder.info.full_name + f":{split}"


def label_by_caption(
    make: Callable[[], Iterator[Record]],
) -> tuple[list[str], Iterator[Record]]:
    """Make a class of each distinct caption, in sorted order. Calls `make` twice.

    Returns the captions and the records, each with its class number in `meta.label`.
    """
    captions: set[str] = set()
    for record in make():
        captions.add(records.text(record))
        if len(captions) > MAX_CLASSES:
            raise DatasetError(
                f"--label caption: more than {MAX_CLASSES} distinct captions; these are not classes"
            )
    classes = sorted(captions)
    number = {caption: k for k, caption in enumerate(classes)}

    def labeled() -> Iterator[Record]:
        for record in make():
            meta = {**record.meta, "label": number[records.text(record)]}
            yield Record(record.v, record.id, record.src, record.segs, record.imgs, meta)

    return classes, labeled()


def folder_hashes(root: str | os.PathLike[str]) -> dict[str, str]:
    """Return one sha256 of the names and contents of a folder's images and captions."""
    root, digest = pathlib.Path(root).resolve(), hashlib.sha256()
    for file in _folder_files(root, Tally()):
        name = os.fsencode(file.relative_to(root).as_posix())
        digest.update(name + f"\0{sha256_file(file)}\n".encode())
    return {root.name: digest.hexdigest()}


def _folder_files(root: pathlib.Path, tally: Tally) -> list[pathlib.Path]:
    files = folders.list_files(root, (*IMAGE_SUFFIXES, CAPTION_SUFFIX), tally)
    if all(f.suffix.lower() == CAPTION_SUFFIX for f in files):
        counts = f"; it has {tally.summary()}" if tally.reasons else ""
        raise DatasetError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}){counts}")
    return files


def _encoded(image: Any, location: str) -> bytes:
    if isinstance(image, bytes):
        return image
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(
            f"{location}: the image is {pixels.dtype} {pixels.shape}, expected encoded bytes or "
            "uint8 [H, W, 1 or 3]",
            "image cannot be read",
        )
    return images.encode_png(pixels)
