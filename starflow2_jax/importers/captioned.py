"""Importers of captioned images: WebDataset tars, image folders, and random-access sources (TFDS).

Each importer is a generator of text-to-image records in a fixed order, with one example in memory
at a time. Nothing is extracted to disk. `dataset.json` records the sha256 of the source files.
"""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError, sha256_file
from starflow2_jax.data.records import Record

VERSION = "1"  # in the manifest; raise it when equal sources would give other records
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_SUFFIX = ".txt"
MAX_CLASSES = 10_000
_MAX_CAPTION_BYTES = 1 << 20
# A gzip stream that expands more is a decompression bomb; real text compresses tenfold at most.
_MAX_EXPANSION = 200


@dataclasses.dataclass
class MissingCaptions:
    """A budget of images without a caption; the import stops when it is exceeded."""

    allowed: int = 0  # number of images that may be left out
    keys: list[str] = dataclasses.field(default_factory=list)  # the images that were left out

    def skip(self, location: str) -> None:
        """Count one image; DatasetError once more than `allowed` captions are missing."""
        self.keys.append(location)
        if len(self.keys) > self.allowed:
            raise DatasetError(
                f"{location}: no caption; expected it in a {CAPTION_SUFFIX} of the same name"
                + (f" ({len(self.keys)} missing, {self.allowed} allowed)" if self.allowed else "")
            )
        logging.warning("%s: no caption, left out (%d so far)", location, len(self.keys))


def webdataset(
    tars: Sequence[str | os.PathLike[str]], missing: MissingCaptions
) -> Iterator[Record]:
    """Yield the records of WebDataset tars (`.tar`, `.tar.gz`), in the order of the archives.

    The members of one example are adjacent and share a key, their path up to the first dot of the
    file name: `000123.jpg`, `000123.txt`. Members of other kinds are ignored; links, devices and
    paths outside the archive are errors.
    """
    for tar in tars:
        name = os.path.basename(os.fspath(tar))
        key, parts, keys = None, {}, set()
        for member_key, suffix, data in _members(tar, name):
            if member_key != key:
                if key is not None:
                    yield from _captioned(f"{name}:{key}", name, key, parts, missing)
                key, parts = member_key, {}
                if key in keys:
                    raise DatasetError(f"{name}: the members of {key!r} are not adjacent")
                keys.add(key)
            if suffix in parts:
                raise DatasetError(f"{name}: two members are called {key + suffix!r}")
            parts[suffix] = data
        if key is not None:
            yield from _captioned(f"{name}:{key}", name, key, parts, missing)


def folder(root: str | os.PathLike[str], missing: MissingCaptions) -> Iterator[Record]:
    """Yield the records of a folder of images with captions in `.txt` files of the same names.

    Subfolders are read too; the order is that of the relative paths. Links are not followed out of
    the folder.
    """
    root = pathlib.Path(root).resolve()
    files = _folder_files(root)
    previous = None
    for file in (f for f in files if f.suffix.lower() in IMAGE_SUFFIXES):
        key = file.relative_to(root).with_suffix("").as_posix()
        if key == previous:
            raise DatasetError(
                f"{root}: two images are called {key!r}, so their caption is ambiguous"
            )
        previous = key
        parts = {file.suffix.lower(): _read_capped(file, images.MAX_BYTES)}
        caption = file.with_suffix(CAPTION_SUFFIX)
        if caption in files:
            parts[CAPTION_SUFFIX] = _read_capped(caption, _MAX_CAPTION_BYTES)
        yield from _captioned(str(file), root.name, key, parts, missing)


def examples(
    source: Sequence[Mapping[str, Any]],
    src: str,
    *,
    image_key: str,
    text_key: str | None = None,
    label_key: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Iterator[Record]:
    """Yield the records of a random-access source of dicts, such as `tfds.data_source`.

    Encoded images are stored unchanged, and uint8 [H, W, 1 or 3] as PNG. The caption is `text_key`
    or, without it, "a photo of a ..." with the name of the class `label_key`. The number of that
    class goes to `meta.label`.
    """
    if text_key is None and label_key is None:
        raise DatasetError(f"{src}: no caption; name a text feature or a class feature")
    for index in range(len(source)):
        row, location = source[index], f"{src} example {index}"
        for key in (image_key, text_key, label_key):
            if key is not None and key not in row:
                raise DatasetError(f"{location}: no key {key!r}; its keys are {sorted(row)}")
        meta: dict[str, Any] = {}
        if label_key is not None:
            label = int(row[label_key])
            if class_names is None or not 0 <= label < len(class_names):
                raise DatasetError(f"{location}: {label_key} is {label}, not one of the classes")
            meta["label"] = label
        if text_key is not None:
            text = row[text_key]
            caption = text.decode("utf-8") if isinstance(text, bytes) else str(text)
        else:
            noun = class_names[meta["label"]].replace("_", " ")
            caption = f"a photo of {'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
        blob = records.image_blob(_encoded(row[image_key], location), location)
        yield records.text_to_image(f"{src}-{index:08d}", src, caption, blob, meta)


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
    for file in _folder_files(root):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    return {root.name: digest.hexdigest()}


def _members(tar: str | os.PathLike[str], name: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, suffix and bytes of the image and caption files of a tar, checked."""
    end = 0
    try:
        with open(tar, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            limit = _MAX_EXPANSION * os.path.getsize(tar) + (1 << 20)
            stream = _BoundedStream(gzip.GzipFile(fileobj=file) if is_gzip else file, limit, name)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    _check_member(member, name)
                    end = member.offset_data + member.size
                    if member.isfile():
                        yield from _member(archive, member, name)
            blocks = -(-end // tarfile.BLOCKSIZE) + 1
            if stream.count < blocks * tarfile.BLOCKSIZE:
                # tarfile takes the end of the file, or half a header, for the end of the archive.
                raise DatasetError(f"{name}: truncated after byte {end}: no end-of-archive block")
    except FileNotFoundError as error:
        raise DatasetError(f"{tar}: no such file") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DatasetError(f"{name}: damaged archive after byte {end}: {error}") from error


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, name: str
) -> Iterator[tuple[str, str, bytes]]:
    directory, _, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    suffix = (dot + suffix).lower()
    if not stem or suffix not in (*IMAGE_SUFFIXES, CAPTION_SUFFIX):
        return
    cap = _MAX_CAPTION_BYTES if suffix == CAPTION_SUFFIX else images.MAX_BYTES
    if member.size > cap:
        raise DatasetError(f"{name}: {member.name!r} has {member.size} bytes, at most {cap}")
    yield posixpath.join(directory, stem), suffix, archive.extractfile(member).read()


class _BoundedStream:
    """A readable stream of at most `limit` bytes, which stops decompression bombs."""

    def __init__(self, stream: BinaryIO, limit: int, name: str):
        self._stream, self._limit, self._name, self.count = stream, limit, name, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        if self.count > self._limit:
            raise DatasetError(
                f"{self._name}: expands to more than {_MAX_EXPANSION} times its size"
            )
        return data


def _check_member(member: tarfile.TarInfo, name: str) -> None:
    parts = pathlib.PurePosixPath(member.name.replace("\\", "/")).parts
    if ".." in parts or member.name.startswith("/") or (parts and parts[0].endswith(":")):
        raise DatasetError(f"{name}: the path {member.name!r} leads out of the archive")
    if not (member.isfile() or member.isdir()):
        raise DatasetError(
            f"{name}: {member.name!r} is a link or a device; only files and folders are read"
        )


def _captioned(
    location: str, src: str, key: str, parts: dict[str, bytes], missing: MissingCaptions
) -> Iterator[Record]:
    image_suffixes = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if len(image_suffixes) != 1:
        raise DatasetError(
            f"{location}: {len(image_suffixes)} images, expected one ({', '.join(parts)})"
        )
    if CAPTION_SUFFIX not in parts:
        missing.skip(location)
        return
    try:
        caption = parts[CAPTION_SUFFIX].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{location}{CAPTION_SUFFIX}: not UTF-8: {error}") from error
    if not caption:
        missing.skip(location)
        return
    (suffix,) = image_suffixes
    blob = records.image_blob(parts[suffix], location + suffix)
    yield records.text_to_image(f"{src}/{key}", src, caption, blob)


def _folder_files(root: pathlib.Path) -> list[pathlib.Path]:
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    files = sorted(
        (f for f in root.rglob("*") if f.suffix.lower() in (*IMAGE_SUFFIXES, CAPTION_SUFFIX)),
        key=lambda f: f.relative_to(root).as_posix(),
    )
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise DatasetError(f"{file}: a link that leads out of {root}")
    if not any(f.suffix.lower() in IMAGE_SUFFIXES for f in files):
        raise DatasetError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _read_capped(file: pathlib.Path, cap: int) -> bytes:
    if file.stat().st_size > cap:
        raise DatasetError(f"{file}: {file.stat().st_size} bytes, at most {cap} allowed")
    return file.read_bytes()


def _encoded(image: Any, location: str) -> bytes:
    if isinstance(image, bytes):
        return image
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DatasetError(
            f"{location}: the image is {pixels.dtype} {pixels.shape}, expected encoded bytes or "
            "uint8 [H, W, 1 or 3]"
        )
    return images.encode_png(pixels)
