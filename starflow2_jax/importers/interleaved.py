"""Importers of conversations, edits and documents: parquet, jsonl and Hugging Face datasets.

Formats, as published:
    bagel_t2i     parquet: image (bytes), captions (JSON object, name -> caption)
    bagel_edit    parquet: image_list (n images), instruction_list (n - 1 lists of paraphrases)
    llava         jsonl or one JSON list: image (path or list), conversations [{from, value}]
    obelics       parquet: images (URLs or null), texts (strings or null), metadata (JSON)
    omnicorpus    parquet: the same, metadata a list of structs with img_url_sha
    huggingface   `datasets.save_to_disk` folder: image or images, messages or conversations or text

Each importer is a generator with one row in memory at a time. If a dataset contains only the names
or URLs of its images, they are looked up in a folder (`ImageRoot`), and missing ones are counted.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from absl import logging

from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError, sha256_file
from starflow2_jax.data.records import ImageBlob, Img, Record, Text
from starflow2_jax.importers.captioned import IMAGE_SUFFIXES

_ROLES = {"human": "user", "gpt": "assistant"}
_PLACEHOLDER = "<image>"


@dataclasses.dataclass
class ImageRoot:
    """A folder with the images of a dataset that contains only their names or URLs.

    An image is found by its path in the folder or, if it only has a URL, by the stem of a file: its
    name in the dataset, the sha256 of the URL, the last part of the URL, or the key of img2dataset
    (whose tables `*.parquet` are read). A stem that two files share finds neither.
    """

    path: str = ""
    keep_text: bool = False  # leave out a missing image only, not its whole record
    missing: int = 0  # number of missing images
    left_out: int = 0  # number of records left out because of them

    def __post_init__(self):
        self._files: dict[str, pathlib.Path] = {}
        self._stems: dict[str, pathlib.Path | None] = {}
        self._keys: dict[str, str] = {}
        if not self.path:
            return
        root = pathlib.Path(self.path).resolve()
        if not root.is_dir():
            raise DatasetError(f"--image_root {self.path}: no such folder")
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.resolve().is_relative_to(root):
                self._files[file.relative_to(root).as_posix()] = file
                self._stems[file.stem] = None if file.stem in self._stems else file
        for table in sorted(root.glob("*.parquet")):
            for _, _, row in _rows([table], ("url", "key")):
                self._keys[row["url"]] = row["key"]

    def by_path(self, path: str) -> ImageBlob | None:
        """Return the image at a path in the folder; None, counted as missing, if there is none."""
        return self._read(self._files.get(path))

    def by_url(self, url: str, name: str = "") -> ImageBlob | None:
        """Return the image of a URL, also called `name`; None, counted as missing, without one."""
        base = posixpath.basename(urlsplit(url).path)
        sha = hashlib.sha256(url.encode()).hexdigest()
        stems = (posixpath.splitext(name)[0], self._keys.get(url), sha, posixpath.splitext(base)[0])
        return self._read(next((self._stems[s] for s in stems if s and self._stems.get(s)), None))

    def _read(self, file: pathlib.Path | None) -> ImageBlob | None:
        if file is None:
            self.missing += 1
            return None
        return _blob(file.read_bytes(), str(file))

    def counts(self) -> dict[str, int]:
        """Return the counts for the result of an import."""
        return {"missing_images": self.missing, "records_left_out": self.left_out}

    def skip(self, location: str) -> None:
        """Count and log a record that is left out because of a missing image."""
        self.left_out += 1
        logging.warning("%s: an image is missing, left out (%d so far)", location, self.left_out)


def bagel_t2i(files: Sequence[str | os.PathLike[str]], caption: str = "all") -> Iterator[Record]:
    """Yield text-to-image records of BAGEL's parquet: of every caption, or of that name only."""
    for src, location, row in _rows(files, ("image", "captions")):
        captions = _json(row["captions"], f"{location}: captions")
        if not isinstance(captions, dict) or not captions:
            raise DatasetError(f"{location}: captions is {captions!r:.80}, expected name: caption")
        if caption != "all" and caption not in captions:
            raise DatasetError(f"{location}: no caption {caption!r}; it has {sorted(captions)}")
        blob = _blob(row["image"], f"{location}: image")
        for name in captions if caption == "all" else (caption,):
            id, text = f"{location}/{name}", str(captions[name])
            yield records.text_to_image(id, src, text, blob, {"caption": name})


def bagel_edit(files: Sequence[str | os.PathLike[str]]) -> Iterator[Record]:
    """Yield editing records of BAGEL's parquet: image, instruction, image, ...

    Every image but the first is a target. An instruction is the first of its paraphrases.
    """
    for src, location, row in _rows(files, ("image_list", "instruction_list")):
        encoded, instructions = row["image_list"] or [], row["instruction_list"] or []
        if len(encoded) < 2 or len(instructions) != len(encoded) - 1 or not all(instructions):
            raise DatasetError(
                f"{location}: {len(encoded)} images and {len(instructions)} instructions, "
                "expected n images, at least 2, and n - 1 lists of at least one instruction"
            )
        blobs = [_blob(data, f"{location}: image {i}") for i, data in enumerate(encoded)]
        segments: list[Text | Img] = [Img(0, False, "user")]
        for i, paraphrases in enumerate(instructions):
            segments += [Text(paraphrases[0], False, "user"), Img(i + 1, True, "assistant")]
        yield Record(1, location, src, segments, blobs)


def llava(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Yield conversations of LLaVA's jsonl (or one JSON list); the answers are targets."""
    for src, location, row in _json_rows(files):
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise DatasetError(f"{location}: no conversations; its keys are {sorted(row)}")
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        blobs = [root.by_path(name) for name in names]
        yield from _conversation(location, src, turns, blobs, root)


def obelics(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Yield documents of OBELICS: texts and images in the page's order, all of them targets."""
    for src, location, row in _rows(files, ("images", "texts", "metadata")):
        metadata = _json(row["metadata"], f"{location}: metadata")
        names = [(m or {}).get("formatted_filename", "") for m in metadata]
        yield from _document(location, src, row, names, root)


def omnicorpus(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Yield documents of OmniCorpus-CC, like `obelics`; images also have an `img_url_sha`."""
    for src, location, row in _rows(files, ("images", "texts", "metadata")):
        names = [(m or {}).get("img_url_sha") or "" for m in row["metadata"]]
        yield from _document(location, src, row, names, root)


def huggingface(
    folder: str | os.PathLike[str], *, image_key: str = "image", text_key: str | None = None
) -> Iterator[Record]:
    """Yield the records of a folder written by `datasets.save_to_disk`.

    With a column `messages` or `conversations`, these are conversations over `images` (or `image`);
    otherwise text-to-image pairs of `image_key` and `text_key` (by default `text` or `caption`).
    """
    folder = pathlib.Path(folder)
    if (folder / "dataset_dict.json").exists():
        splits = _json((folder / "dataset_dict.json").read_text(), str(folder))["splits"]
        raise DatasetError(f"{folder}: has the splits {splits}; name one: {folder}/{splits[0]}")
    if not (folder / "state.json").exists():
        raise DatasetError(f"{folder}: no state.json; expected a folder of datasets.save_to_disk")
    state = _json((folder / "state.json").read_text(), str(folder))
    for entry in state["_data_files"]:
        for location, row in _arrow_rows(folder / os.path.basename(entry["filename"])):
            turns = next((row[key] for key in ("messages", "conversations") if row.get(key)), None)
            row_images = row.get("images") or ([row["image"]] if row.get("image") else [])
            if turns is not None:
                blobs = [
                    _stored_image(image, f"{location}: image {i}")
                    for i, image in enumerate(row_images)
                ]
                yield from _conversation(location, folder.name, turns, blobs, ImageRoot())
                continue
            caption = next((k for k in (text_key, "text", "caption") if k and k in row), None)
            if caption is None or image_key not in row or (text_key and caption != text_key):
                raise DatasetError(
                    f"{location}: expected messages, conversations, or {image_key!r} and "
                    f"{text_key or 'text or caption'!r}; its columns are {sorted(row)}"
                )
            blob = _stored_image(row[image_key], f"{location}: {image_key}")
            yield records.text_to_image(location, folder.name, str(row[caption]), blob)


def folder_hashes(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the sha256 of each data file of a folder written by `datasets.save_to_disk`."""
    return {file.name: sha256_file(file) for file in sorted(pathlib.Path(folder).glob("*.arrow"))}


# ------------------------------------------------------------------ conversations and documents


def _conversation(
    location: str,
    src: str,
    turns: Sequence[Mapping[str, Any]],
    blobs: Sequence[ImageBlob | None],
    root: ImageRoot,
) -> Iterator[Record]:
    """Yield the record of a conversation, unless a missing image leaves it out.

    The turns are [{from, value}] or [{role, content}], with an `<image>` placeholder for each blob.
    """
    segments: list[Text | Img] = []
    parts = [(_role(turn, f"{location}: turn {n}"), _content(turn)) for n, turn in enumerate(turns)]
    placeholders = sum(content.count(_PLACEHOLDER) for _, content in parts)
    if not placeholders and blobs:
        parts[0] = (parts[0][0], _PLACEHOLDER * len(blobs) + parts[0][1])
    elif placeholders != len(blobs):
        raise DatasetError(
            f"{location}: {len(blobs)} images for {placeholders} placeholders {_PLACEHOLDER}"
        )
    if None in blobs and not root.keep_text:
        root.skip(location)
        return
    next_blob, number = iter(blobs), 0
    for role, content in parts:
        for i, text in enumerate(content.split(_PLACEHOLDER)):
            if i and next(next_blob) is not None:
                segments.append(Img(number, False, role))
                number += 1
            if text.strip():
                segments.append(Text(text.strip(), role == "assistant", role))
    yield Record(1, location, src, segments, [blob for blob in blobs if blob is not None])


def _role(turn: Mapping[str, Any], location: str) -> str:
    speaker = turn.get("from", turn.get("role"))
    role = _ROLES.get(speaker, speaker)
    if role not in ("system", "user", "assistant"):
        raise DatasetError(
            f"{location}: speaker {speaker!r}, expected human, gpt, system, user, assistant"
        )
    return role


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("value", turn.get("content")) or ""
    if isinstance(content, str):
        return content
    return "".join(
        _PLACEHOLDER if p.get("type") == "image" else p.get("text") or "" for p in content
    )


def _document(
    location: str, src: str, row: Mapping[str, Any], names: Sequence[str], root: ImageRoot
) -> Iterator[Record]:
    """Yield the record of a document, unless a missing image leaves it out.

    Each slot of the row has a URL in `images`, with its name in `names`, or a text in `texts`.
    """
    urls, texts = row["images"], row["texts"]
    if not len(urls) == len(texts) == len(names):
        raise DatasetError(
            f"{location}: {len(urls)} images, {len(texts)} texts, {len(names)} metadata, expected "
            "one of each for every slot"
        )
    segments: list[Text | Img] = []
    blobs, complete = [], True
    for url, text, name in zip(urls, texts, names):
        if url is not None:
            blob = root.by_url(url, name)
            complete = complete and blob is not None
            if blob is not None:
                segments.append(Img(len(blobs), True))
                blobs.append(blob)
        elif text:
            segments.append(Text(text, True))
    if not segments or not (complete or root.keep_text):
        root.skip(location)
        return
    yield Record(1, location, src, segments, blobs)


# ------------------------------------------------------------------------------------------ reading


def _rows(files: Sequence[Any], columns: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (name, name:row, values) of parquet files, with a few rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    for file in files:
        name, index = os.path.basename(os.fspath(file)), 0
        try:
            with parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                missing = [column for column in columns if column not in names]
                if missing:
                    raise DatasetError(
                        f"{name}: another schema: no column {missing[0]!r}; expected "
                        f"{', '.join(columns)}, found {', '.join(names)}"
                    )
                for batch in table.iter_batches(batch_size=16, columns=list(columns)):
                    for row in batch.to_pylist():
                        yield name, f"{name}:{index}", row
                        index += 1
        except (pyarrow.ArrowException, OSError) as error:
            message = f"{name}: not a complete parquet file (row {index}): {error}"
            raise DatasetError(message) from error


def _arrow_rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name:row, values) of an Arrow stream, the format of `datasets`."""
    import pyarrow

    index = 0
    try:
        with (
            pyarrow.memory_map(os.fspath(file)) as source,
            pyarrow.ipc.open_stream(source) as table,
        ):
            for batch in table:
                for number in range(batch.num_rows):
                    yield f"{file.name}:{index}", batch.slice(number, 1).to_pylist()[0]
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: not a complete Arrow file (row {index}): {error}") from error


def _json_rows(files: Sequence[Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (name, name:line, object) of files of jsonl, or of one JSON list each."""
    for file in files:
        name = os.path.basename(os.fspath(file))
        if not os.path.exists(file):
            raise DatasetError(f"{file}: no such file")
        with open(file, encoding="utf-8") as lines:
            is_list = lines.read(1) == "["
            lines.seek(0)
            if is_list:
                rows = enumerate(_json(lines.read(), name))
            else:
                texts = ((n, line) for n, line in enumerate(lines) if line.strip())
                rows = ((n, _json(line, f"{name}:{n}")) for n, line in texts)
            for number, row in rows:
                if not isinstance(row, dict):
                    raise DatasetError(f"{name}:{number}: {row!r:.80} is not a JSON object")
                yield name, f"{name}:{number}", row


def _json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{location}: not JSON: {error}") from error


def _blob(data: Any, location: str) -> ImageBlob:
    if not isinstance(data, bytes):
        raise DatasetError(f"{location}: {type(data).__name__}, expected the bytes of an image")
    if len(data) > images.MAX_BYTES:
        raise DatasetError(f"{location}: {len(data)} bytes, at most {images.MAX_BYTES}")
    return records.image_blob(data, location)


def _stored_image(image: Any, location: str) -> ImageBlob:
    """Return the image of a `datasets` column: {bytes, path}, or bytes."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is None:
        raise DatasetError(
            f"{location}: the dataset has a path instead of the image; save it with its bytes"
        )
    return _blob(data, location)
