"""Schema v1 of a record, and dataset folders of records.

One shape serves text, captioning, questions, text-to-image, editing and interleaved reasoning: a
list of segments, each text or a reference to an image, with a role and a loss flag. Records hold
text and the original image bytes, never tokens or pixels. msgpack nests, holds raw bytes and cannot
execute code; msgspec refuses unknown fields and values out of bounds, with the path of the field.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from starflow2_jax.data import images, manifest as manifest_lib, shards as shards_lib
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest, Scalar, Sha256

Role = Literal["none", "system", "user", "assistant"]
Side = Annotated[int, Meta(ge=1, le=images.MAX_SIDE)]


class ImageBlob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An encoded image as it came; h and w are those of its header, before EXIF orientation."""

    fmt: images.Format
    h: Side
    w: Side
    data: Annotated[bytes, Meta(max_length=images.MAX_BYTES)]
    sha256: Sha256


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text", tag_field="t"):
    """A text segment; with `loss` its tokens are targets."""

    s: Annotated[str, Meta(max_length=1_000_000)]
    loss: bool
    role: Role = "none"


class Img(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image", tag_field="t"):
    """An image segment, an index into `Record.imgs`; with `loss` its patches are targets."""

    i: Annotated[int, Meta(ge=0)]
    loss: bool
    role: Role = "none"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One training example. `src` names where it came from; `meta` is free, scalars only.

    `meta["label"]` is the class number of class-conditional training.
    """

    v: Literal[1]
    id: Annotated[str, Meta(min_length=1, max_length=1024)]
    src: Annotated[str, Meta(max_length=4096)]
    segs: Annotated[list[Text | Img], Meta(min_length=1, max_length=8192)]
    imgs: Annotated[list[ImageBlob], Meta(max_length=4096)] = []
    meta: dict[str, Scalar] = {}


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(Record)


def image_blob(data: bytes, where: str) -> ImageBlob:
    """Wraps encoded image bytes; DatasetError naming `where` for anything but a sane image."""
    fmt, height, width = images.header(data, where)
    return ImageBlob(fmt, height, width, data, hashlib.sha256(data).hexdigest())


def text_to_image(
    id: str, src: str, caption: str, image: ImageBlob, meta: dict[str, Scalar] | None = None
) -> Record:
    """The record of a captioned picture: the user says the caption, the assistant draws."""
    segments = [Text(caption, False, "user"), Img(0, True, "assistant")]
    return Record(1, id, src, segments, [image], meta or {})


def encode(record: Record) -> bytes:
    """Checks `record` against the schema and encodes it: equal records give equal bytes.

    Raises:
      DatasetError: naming the record id and the path of the field, such as `$.segs[0].i`.
    """
    # Struct constructors do not validate; decoding does.
    data = _encoder.encode(record)
    decode(data, f"record {getattr(record, 'id', '?')!r}")
    return data


def decode(data: bytes, where: str) -> Record:
    """Decodes one payload; raises DatasetError naming `where` and the path of the wrong field."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise DatasetError(f"{where}: {error}") from error


def check(record: Record, where: str, pixels: bool = False) -> None:
    """What the schema cannot say: image indices, headers, hashes, and that something is learnt.

    Args:
      record: a record of the right schema.
      where: names it in errors.
      pixels: also decode every image.

    Raises:
      DatasetError: naming `where` and the segment or image.
    """
    for number, segment in enumerate(record.segs):
        if isinstance(segment, Img) and segment.i >= len(record.imgs):
            raise DatasetError(
                f"{where}: $.segs[{number}].i is {segment.i}, but there are "
                f"{len(record.imgs)} images"
            )
    if not any(segment.loss for segment in record.segs):
        raise DatasetError(f"{where}: no segment has loss=True, so nothing can be learnt from it")
    for number, blob in enumerate(record.imgs):
        at = f"{where}: $.imgs[{number}]"
        found = images.header(blob.data, at)
        if found != (blob.fmt, blob.h, blob.w):
            raise DatasetError(
                f"{at}: declared {blob.fmt} of {blob.h} x {blob.w} (h x w), "
                f"the image is {found[0]} of {found[1]} x {found[2]}"
            )
        if hashlib.sha256(blob.data).hexdigest() != blob.sha256:
            raise DatasetError(f"{at}: sha256 of the data is not the declared {blob.sha256}")
        if pixels:
            images.decode(blob.data, at)


def text(record: Record) -> str:
    """All text segments of a record, one a line."""
    return "\n".join(segment.s for segment in record.segs if isinstance(segment, Text))


def target(record: Record, where: str) -> int:
    """Which image is the one with loss=True; DatasetError if not exactly one is."""
    targets = [s.i for s in record.segs if isinstance(s, Img) and s.loss]
    if len(targets) != 1 or targets[0] >= len(record.imgs):
        raise DatasetError(f"{where}: expected one image with loss=True, found {len(targets)}")
    return targets[0]


def target_image(record: Record, where: str) -> np.ndarray:
    """The one image with loss=True, decoded to uint8 [H, W, 3]; DatasetError if not exactly one."""
    return images.decode(record.imgs[target(record, where)].data, where)


def write(
    path: str | os.PathLike[str],
    records: Iterable[Record],
    *,
    importer: Importer | None = None,
    sources: dict[str, str] | Callable[[], dict[str, str]] | None = None,
    classes: list[str] | None = None,
    shard_bytes: int = shards_lib.SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Writes a dataset folder: checked records in shards, `dataset.json` last.

    Returns the manifest. The folder appears only when complete; an error leaves the disk as it
    was.

    Args:
      path: folder to make.
      records: in the order to keep; may be a generator, only one record is held at a time.
      importer: what made them, for the manifest.
      sources: sha256 of each source file, or a function called after the last record.
      classes: names of the classes that `meta["label"]` numbers.
      shard_bytes: a new shard starts after this many payload bytes.
      overwrite: replace an existing dataset folder.

    Raises:
      DatasetError: a record that fails schema or `check`, a repeated id, a label outside `classes`,
        no records, or an existing `path`.
    """

    def payloads() -> Iterator[bytes]:
        seen: set[str] = set()
        for index, record in enumerate(records):
            where = f"record {index} (id {getattr(record, 'id', '?')!r})"
            data = encode(record)
            check(record, where)
            if record.id in seen:
                raise DatasetError(f"{where}: this id came before; ids are unique in a dataset")
            seen.add(record.id)
            if classes is not None:
                _check_label(record, where, len(classes))
            yield data

    def describe(shards: list[manifest_lib.Shard]) -> Manifest:
        return manifest_lib.make(
            "records",
            shards,
            importer or Importer("records.write", "1"),
            sources=sources() if callable(sources) else sources,
            classes=classes,
        )

    return shards_lib.write(
        path, payloads(), describe, shard_bytes=shard_bytes, overwrite=overwrite
    )


class Dataset:
    """The records of a dataset folder: `len`, `[i]`, iteration in order; safe in threads."""

    def __init__(self, path: str | os.PathLike[str]):
        self.manifest = manifest_lib.load(path)
        self._payloads = shards_lib.Payloads(path, self.manifest)

    def __len__(self) -> int:
        return len(self._payloads)

    def __getitem__(self, index: int) -> Record:
        return decode(self._payloads[index], self._payloads.where(index))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """Shard and index of a record, for error messages."""
        return self._payloads.where(index)


def read(path: str | os.PathLike[str]) -> Dataset:
    """Opens a dataset folder.

    Raises:
      DatasetError: no manifest, or shards of other sizes than it says; later, on access, a record
        that cannot be read or decoded, naming shard and index.
    """
    return Dataset(path)


def validate(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields one line for each problem: schema, checks, image decoding, repeated ids, labels."""
    dataset = read(path)
    classes = dataset.manifest.classes
    seen: set[str] = set()
    for index in range(len(dataset)):
        try:
            record = dataset[index]
            where = f"{dataset.where(index)} (id {record.id!r})"
            check(record, where, pixels=True)
            if record.id in seen:
                raise DatasetError(f"{where}: this id came before")
            seen.add(record.id)
            if classes is not None:
                _check_label(record, where, len(classes))
        except DatasetError as error:
            yield str(error)


def verify(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields one line for each shard whose sha256 changed, and each record that is damaged."""
    manifest = manifest_lib.load(path)
    problems = list(manifest_lib.verify(path, manifest))
    yield from problems
    if problems:
        dataset = read(path)
        for index in range(len(dataset)):
            try:
                dataset[index]
            except DatasetError as error:
                yield str(error)


def _check_label(record: Record, where: str, classes: int) -> None:
    label = record.meta.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise DatasetError(
            f"{where}: meta.label is {label!r}, expected a class number from 0 to {classes - 1}"
        )
