"""Importers of conversations, edits and documents: parquet and jsonl.

Formats, as published:
    bagel_t2i     parquet: image (bytes), captions (JSON object, name -> caption)
    bagel_edit    parquet: image_list (n images), instruction_list (n - 1 lists of paraphrases)
    llava         jsonl or one JSON list: image or images (path or list), and conversations
                  [{from, value}] or messages [{role, content}]
    obelics       parquet: images (URLs or null), texts (strings or null), metadata (JSON)
    omnicorpus    parquet: the same, metadata a list of structs with img_url_sha

Each importer is a generator with one row in memory at a time. A row is checked against a schema
before it is used. If a dataset contains only the names or URLs of its images, they are looked up in
a folder (`ImageRoot`), and missing ones are counted.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from starflow2_jax.data import records
from starflow2_jax.data.records import ImageBlob, Img, Record, Text
from starflow2_jax.importers import tables
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.tally import (
    CaptionError,
    RowError,
    Tally,
    captions_of,
    text_of,
)

_ROLES = {"human": "user", "gpt": "assistant"}
_PLACEHOLDER = "<image>"
_PLACES = "images and their places differ"
_MEDIA_KEY = re.compile("image|img|picture|photo|video|audio", re.IGNORECASE)


class Part(msgspec.Struct):
    """A part of a turn: {type: text, text}, {type: image} or {type: image_url}."""

    type: str | None = None
    text: str | None = None


class Turn(msgspec.Struct):
    """A turn of a conversation, {from, value} or {role, content}."""

    speaker: str | None = msgspec.field(name="from", default=None)
    role: str | None = None
    value: str | list[str | Part] | None = None
    content: str | list[str | Part] | None = None


class Conversation(msgspec.Struct):
    """The keys of a conversation that are read, apart from its images."""

    messages: list[Turn] | None = None
    conversations: list[Turn] | None = None

    @property
    def turns(self) -> list[Turn]:
        """The turns, by whichever key there is."""
        return self.messages or self.conversations or []


class ImagePaths(msgspec.Struct):
    """The images of a row of LLaVA's json: paths in a folder."""

    image: str | list[str] | None = None
    images: str | list[str] | None = None


class EditRow(msgspec.Struct):
    """A row of BAGEL's editing parquet."""

    image_list: list[bytes]
    instruction_list: list[str | list[str]]


class DocumentRow(msgspec.Struct):
    """A row of a parquet of documents: a URL or a text in each slot."""

    images: list[str | None]
    texts: list[str | None]


class ImageName(msgspec.Struct):
    """The metadata of an image of a document."""

    formatted_filename: str | None = None
    img_url_sha: str | None = None


def bagel_t2i(
    files: Sequence[str | os.PathLike[str]], caption: str = "all", tally: Tally | None = None
) -> Iterator[Record]:
    """Yield text-to-image records of BAGEL's parquet: of every caption, or of that name only."""
    tally = tally or Tally()

    def parse(location: str, row: Mapping[str, Any]) -> list[Record]:
        captions = tables.decode_json(row["captions"], dict[str, Any], f"{location}: captions")
        if not captions:
            raise CaptionError(f"{location}: captions is empty", "caption missing")
        if caption != "all" and caption not in captions:
            raise CaptionError(
                f"{location}: no caption {caption!r}; it has {sorted(captions)}", "caption missing"
            )
        blob = tally.image(row["image"], f"{location}: image")
        parsed = []
        for name in captions if caption == "all" else (caption,):
            try:
                texts = captions_of(captions[name], f"{location}/{name}")
            except CaptionError as error:
                tally.leave_out(error)
                continue
            for k, text in enumerate(texts):
                id = f"{location}/{name}" + (f"/{k}" if k else "")
                meta = {"caption": name}
                parsed.append(records.text_to_image(id, _source(location), text, blob, meta))
        return parsed

    yield from tally.parse_rows(tables.parquet_rows(files, ("image", "captions")), parse)


def bagel_edit(
    files: Sequence[str | os.PathLike[str]], tally: Tally | None = None
) -> Iterator[Record]:
    """Yield editing records of BAGEL's parquet: image, instruction, image, ...

    Every image but the first is a target. An instruction is a text, or the first of its
    paraphrases.
    """
    tally = tally or Tally()

    def parse(location: str, values: Mapping[str, Any]) -> list[Record]:
        row = tables.convert(values, EditRow, location)
        encoded, instructions = row.image_list, row.instruction_list
        if len(encoded) < 2 or len(instructions) != len(encoded) - 1 or not all(instructions):
            raise RowError(
                f"{location}: {len(encoded)} images and {len(instructions)} instructions, "
                "expected n images, at least 2, and n - 1 lists of at least one instruction",
                "images and instructions differ",
            )
        blobs = [tally.image(data, f"{location}: image {i}") for i, data in enumerate(encoded)]
        segments: list[Text | Img] = [Img(0, False, "user")]
        for i, paraphrases in enumerate(instructions):
            text = paraphrases if isinstance(paraphrases, str) else paraphrases[0]
            text = text_of(text, f"{location}: instruction {i}")
            segments += [Text(text, False, "user"), Img(i + 1, True, "assistant")]
        return [Record(1, location, _source(location), segments, blobs)]

    columns = ("image_list", "instruction_list")
    yield from tally.parse_rows(tables.parquet_rows(files, columns), parse)


def llava(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Yield conversations of LLaVA's jsonl (or one JSON list); the answers are targets."""

    def parse(location: str, data: bytes) -> list[Record]:
        values = tables.decode_json(data, dict[str, Any], location)
        turns = tables.convert(values, Conversation, location).turns
        if not turns:
            raise RowError(
                f"{location}: no conversations or messages; its keys are {sorted(values)}",
                "no conversation",
            )
        paths = tables.convert(values, ImagePaths, location)
        names = [
            [value] if isinstance(value, str) else value or []
            for value in (paths.image, paths.images)
        ]
        if names[0] and names[1] and names[0] != names[1]:
            raise RowError(f"{location}: has both image and images", _PLACES)
        _refuse_other_media(values, location)
        blobs = [root.by_path(name) for name in names[0] or names[1]]
        return conversation_record(location, turns, blobs, root)

    yield from root.tally.parse_rows(tables.json_rows(files), parse)


def _refuse_other_media(values: Mapping[str, Any], location: str) -> None:
    """Raise RowError if a row has pictures, videos or sounds under a key that is not read."""
    for key, value in values.items():
        is_media = _MEDIA_KEY.search(key) and not key.endswith(("_id", "_size", "_token"))
        if key in ("image", "images") or not is_media:
            continue
        if value and isinstance(value, str | list | dict):
            raise RowError(
                f"{location}: has {key!r}, which is not read; expected pictures in `image` or "
                "`images`",
                "media under another key",
            )


def obelics(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Yield documents of OBELICS: texts and images in the page's order, all of them targets."""

    def parse(location: str, row: Mapping[str, Any]) -> list[Record]:
        metadata = tables.decode_json(
            row["metadata"], list[ImageName | None], f"{location}: metadata"
        )
        names = [m.formatted_filename or "" if m else "" for m in metadata]
        return _document(location, row, names, root)

    yield from root.tally.parse_rows(_document_rows(files), parse)


def omnicorpus(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Yield documents of OmniCorpus-CC, like `obelics`; images also have an `img_url_sha`."""

    def parse(location: str, row: Mapping[str, Any]) -> list[Record]:
        metadata = tables.convert(row["metadata"], list[ImageName | None], f"{location}: metadata")
        names = [m.img_url_sha or "" if m else "" for m in metadata]
        return _document(location, row, names, root)

    yield from root.tally.parse_rows(_document_rows(files), parse)


def _document_rows(files: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, Any]]:
    return tables.parquet_rows(files, ("images", "texts", "metadata"))


# ------------------------------------------------------------------ conversations and documents


def _source(location: str) -> str:
    """Return the name of the file of a location, NAME:ROW."""
    return location.rpartition(":")[0]


def conversation_record(
    location: str,
    turns: Sequence[Turn],
    blobs: Sequence[ImageBlob | None],
    root: ImageRoot,
    src: str = "",
) -> list[Record]:
    """Return the record of a conversation; none if a missing image leaves it out.

    The turns have an `<image>` placeholder for each blob, or none: then the images come first in
    the first turn of the user.
    """
    parts = [
        (_role(turn, f"{location}: turn {n}"), _content(turn, f"{location}: turn {n}"))
        for n, turn in enumerate(turns)
    ]
    placeholders = sum(content.count(_PLACEHOLDER) for _, content in parts)
    if not placeholders and blobs:
        first = next((n for n, (role, _) in enumerate(parts) if role == "user"), None)
        if first is None:
            raise RowError(f"{location}: {len(blobs)} images and no turn of the user", _PLACES)
        parts[first] = ("user", _PLACEHOLDER * len(blobs) + parts[first][1])
    elif placeholders != len(blobs):
        raise RowError(
            f"{location}: {len(blobs)} images for {placeholders} placeholders {_PLACEHOLDER}",
            _PLACES,
        )
    if None in blobs and not root.keep_text:
        root.skip(location)
        return []
    segments: list[Text | Img] = []
    next_blob, number = iter(blobs), 0
    for role, content in parts:
        for i, text in enumerate(content.split(_PLACEHOLDER)):
            if i and next(next_blob) is not None:
                segments.append(Img(number, False, role))
                number += 1
            if text.strip():
                segments.append(Text(text.strip(), role == "assistant", role))
    if not any(segment.loss for segment in segments):
        raise RowError(f"{location}: no answer, so the record has no target", "no answer")
    present = [blob for blob in blobs if blob is not None]
    return [Record(1, location, src or _source(location), segments, present)]


def _role(turn: Turn, location: str) -> str:
    speaker = turn.role if turn.speaker is None else turn.speaker
    name = (speaker or "").lower()
    role = _ROLES.get(name, name)
    if role not in ("system", "user", "assistant"):
        raise RowError(
            f"{location}: speaker {speaker!r}, expected human, gpt, system, user, assistant",
            "unknown speaker",
        )
    return role


def _content(turn: Turn, location: str) -> str:
    content = turn.content if turn.value is None else turn.value
    if content is None or isinstance(content, str):
        return text_of(content or "", location)
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif part.type in ("image", "image_url"):
            texts.append(_PLACEHOLDER)
        elif part.type in ("text", None) and part.text is not None:
            texts.append(part.text)
        else:
            raise RowError(
                f"{location}, part {number}: type {part.type!r}, expected text with a text, image "
                "or image_url",
                "part of another type",
            )
    return text_of("".join(texts), location)


def _document(
    location: str, values: Mapping[str, Any], names: Sequence[str], root: ImageRoot
) -> list[Record]:
    """Return the record of a document; none if a missing image leaves it out.

    Each slot of the row has a URL in `images`, with its name in `names`, or a text in `texts`.
    """
    row = tables.convert(
        {"images": values["images"], "texts": values["texts"]}, DocumentRow, location
    )
    if not len(row.images) == len(row.texts) == len(names):
        raise RowError(
            f"{location}: {len(row.images)} images, {len(row.texts)} texts, {len(names)} metadata, "
            "expected one of each for every slot",
            "slots differ",
        )
    segments: list[Text | Img] = []
    blobs, complete = [], True
    for slot, (url, text, name) in enumerate(zip(row.images, row.texts, names)):
        if url is not None and text:
            raise RowError(
                f"{location}: slot {slot} has a URL and a text, so their order is not known",
                "image and text in one slot",
            )
        if url is not None:
            blob = root.by_url(url, name)
            complete = complete and blob is not None
            if blob is not None:
                segments.append(Img(len(blobs), True))
                blobs.append(blob)
        elif text:
            segments.append(Text(text_of(text, f"{location}: slot {slot}"), True))
    if not segments or not (complete or root.keep_text):
        root.skip(location)
        return []
    return [Record(1, location, _source(location), segments, blobs)]
