"""Schema v1 of a record, and dataset folders of records.

One schema serves text, captioning, questions, text-to-image, editing and interleaved reasoning: a
list of segments, each text or a reference to an image, with a role and a loss flag. Records contain
text and the original image bytes, never tokens or pixels. msgpack nests, stores raw bytes and
cannot execute code; msgspec refuses unknown fields and values out of bounds, and names the field.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from starflow2_jax.data import images, manifest, shards
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest, Scalar, Sha256

Role = Literal["none", "system", "user", "assistant"]
Side = Annotated[int, Meta(ge=1, le=images.MAX_SIDE)]


class ImageBlob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An encoded image with its original bytes; h and w are its size before EXIF orientation."""

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
    """A training example. `src` names its source; `meta` holds any scalars.

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


def image_blob(data: bytes, location: str) -> ImageBlob:
    """Wrap the bytes of a JPEG, PNG or WebP file, which error messages call `location`."""
    fmt, height, width = images.header(data, location)
    return ImageBlob(fmt, height, width, data, hashlib.sha256(data).hexdigest())


def text_to_image(
    id: str, src: str, caption: str, image: ImageBlob, meta: dict[str, Scalar] | None = None
) -> Record:
    """Return the record of a captioned image: the image is the target."""
    segments = [Text(caption, False, "user"), Img(0, True, "assistant")]
    return Record(1, id, src, segments, [image], meta or {})


def encode(record: Record) -> bytes:
    """Check a record against the schema and encode it; equal records give equal bytes.

    A DatasetError names the record's id and the path of the wrong field, such as `$.segs[0].i`.
    """
    # Struct constructors do not validate; decoding does.
    location = f"record {getattr(record, 'id', '?')!r}"
    try:
        data = _encoder.encode(record)
    except (ValueError, TypeError) as error:  # lone surrogates, values of other types
        raise DatasetError(f"{location}: {error}") from error
    decode(data, location)
    return data


def decode(data: bytes, location: str) -> Record:
    """Decode a payload; a DatasetError names `location` and the path of the wrong field."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise DatasetError(f"{location}: {error}") from error


def check(record: Record, location: str, pixels: bool = False) -> None:
    """Check what the schema cannot express: image indices, headers, hashes, at least one target.

    With `pixels`, also decode every image. A DatasetError names `location` and segment or image.
    """
    for number, segment in enumerate(record.segs):
        if isinstance(segment, Img) and segment.i >= len(record.imgs):
            raise DatasetError(
                f"{location}: $.segs[{number}].i is {segment.i}, but there are "
                f"{len(record.imgs)} images"
            )
        if isinstance(segment, Text) and "\0" in segment.s:
            raise DatasetError(f"{location}: $.segs[{number}].s has a NUL character")
    if not any(segment.loss for segment in record.segs):
        raise DatasetError(f"{location}: no segment has loss=True, so the record has no target")
    for number, blob in enumerate(record.imgs):
        field = f"{location}: $.imgs[{number}]"
        fmt, height, width = images.header(blob.data, field)
        if (fmt, height, width) != (blob.fmt, blob.h, blob.w):
            raise DatasetError(
                f"{field}: declared {blob.fmt} of {blob.h} x {blob.w} (h x w), "
                f"the image is {fmt} of {height} x {width}"
            )
        if hashlib.sha256(blob.data).hexdigest() != blob.sha256:
            raise DatasetError(f"{field}: sha256 of the data is not the declared {blob.sha256}")
        if pixels:
            images.decode(blob.data, field)


def text(record: Record) -> str:
    """Return all text segments of a record, one a line."""
    return "\n".join(segment.s for segment in record.segs if isinstance(segment, Text))


def target_index(record: Record, location: str) -> int:
    """Return the index in `record.imgs` of the image that is a target, which must be one."""
    targets = [s.i for s in record.segs if isinstance(s, Img) and s.loss]
    if len(targets) != 1 or targets[0] >= len(record.imgs):
        raise DatasetError(f"{location}: expected one image with loss=True, found {len(targets)}")
    return targets[0]


def target_image(record: Record, location: str) -> np.ndarray:
    """Decode the one image that is a target: uint8 [H, W, 3]."""
    return images.decode(record.imgs[target_index(record, location)].data, location)


def write(
    path: str | os.PathLike[str],
    records: Iterable[Record],
    *,
    importer: Importer | None = None,
    sources: dict[str, str] | Callable[[], dict[str, str]] | None = None,
    classes: list[str] | None = None,
    shard_bytes: int = shards.SHARD_BYTES,
    overwrite: bool = False,
    leave_out: Callable[[DatasetError], None] | None = None,
    left_out: Callable[[], dict[str, int]] | None = None,
) -> Manifest:
    """Write a dataset folder of checked records, and return its manifest.

    The folder appears only when it is complete; an error leaves the disk unchanged.

    Args:
        records: in the order to store; may be a generator, since only one record is in memory.
        sources: sha256 of each source file, or a function called after the last record.
        classes: names of the classes that `meta["label"]` numbers.
        shard_bytes: a new shard starts after this many payload bytes.
        overwrite: replace an existing dataset folder.
        leave_out: called with the error of a record that fails, which is left out unless this
            function raises; by default it stops the writing.
        left_out: called after the last record, the counts of what was left out by reason.

    Raises:
        DatasetError: a record that fails schema or `check`, a repeated id, a label outside
            `classes`, no records, or an existing `path`.
    """

    def payloads() -> Iterator[bytes]:
        ids: set[str] = set()
        for index, record in enumerate(records):
            location = f"record {index} (id {getattr(record, 'id', '?')!r})"
            try:
                data = encode(record)
                check(record, location)
                _check_id_and_label(record, location, ids, classes)
            except DatasetError as error:
                if leave_out is None:
                    raise
                leave_out(error)
                continue
            yield data

    def make_manifest(written: list[manifest.Shard]) -> Manifest:
        return manifest.make(
            "records",
            written,
            importer or Importer("records.write", "1"),
            sources=sources() if callable(sources) else sources,
            classes=classes,
            left_out=left_out() if left_out else None,
        )

    return shards.write(
        path, payloads(), make_manifest, shard_bytes=shard_bytes, overwrite=overwrite
    )


class Dataset:
    """The records of a dataset folder: `len`, `[i]`, iteration in order; safe in threads."""

    def __init__(self, path: str | os.PathLike[str]):
        self.manifest = manifest.load(path)
        self._payloads = shards.Payloads(path, self.manifest)

    def __len__(self) -> int:
        return len(self._payloads)

    def __getitem__(self, index: int) -> Record:
        return decode(self._payloads[index], self._payloads.location(index))

    def __iter__(self) -> Iterator[Record]:
        return (decode(data, self.location(i)) for i, data in enumerate(self._payloads))

    def location(self, index: int) -> str:
        """Return shard and index of a record, for error messages."""
        return self._payloads.location(index)


def read(path: str | os.PathLike[str]) -> Dataset:
    """Open a dataset folder, after a check of the manifest and the sizes of the shards."""
    return Dataset(path)


def validate(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield one line for each problem: schema, checks, image decoding, repeated ids, labels."""
    dataset = read(path)
    ids: set[str] = set()
    for index in range(len(dataset)):
        try:
            record = dataset[index]
            location = f"{dataset.location(index)} (id {record.id!r})"
            check(record, location, pixels=True)
            _check_id_and_label(record, location, ids, dataset.manifest.classes)
        except DatasetError as error:
            yield str(error)


def verify(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield one line for each shard whose sha256 changed, and for each damaged record."""
    problems = list(manifest.verify(path, manifest.load(path)))
    yield from problems
    if problems:
        dataset = read(path)
        for index in range(len(dataset)):
            try:
                dataset[index]
            except DatasetError as error:
                yield str(error)


def _check_id_and_label(
    record: Record, location: str, ids: set[str], classes: list[str] | None
) -> None:
    """Check that the id is new, add it to `ids`, and check the class number."""
    if record.id in ids:
        raise DatasetError(f"{location}: this id came before; ids must be unique in a dataset")
    ids.add(record.id)
    label = record.meta.get("label")
    if classes is not None and (type(label) is not int or not 0 <= label < len(classes)):
        raise DatasetError(
            f"{location}: meta.label is {label!r}, expected a class number from 0 to "
            f"{len(classes) - 1}"
        )
