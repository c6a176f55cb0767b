"""Parquet, jsonl and Hugging Face sets of conversations, edits and documents -> records.

Formats, as published:
    bagel_t2i     parquet: image (bytes), captions (JSON object, name -> caption)
    bagel_edit    parquet: image_list (n images), instruction_list (n - 1 lists of paraphrases)
    llava         jsonl or one JSON list: image (path or list), conversations [{from, value}]
    obelics       parquet: images (URLs or null), texts (strings or null), metadata (JSON)
    omnicorpus    parquet: the same, metadata a list of structs with img_url_sha
    huggingface   `datasets.save_to_disk` folder: image or images, messages or conversations or text

Each is a generator that holds one row at a time. Where a set has only the names or URLs of its
images, they are looked up in a folder (`ImageRoot`) and those that are not there are counted.
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
_PLACE = "<image>"


@dataclasses.dataclass
class ImageRoot:
    """A folder with the images of a set that holds only their names or URLs.

    An image is found by its path in the folder or, where it only has a URL, by the stem of a file:
    the given name, the sha256 of the URL, its last part, or the key that img2dataset gave it (its
    tables `*.parquet` are read). A stem that two files have stands for neither.

    Attributes:
        keep_text: where an image is missing, leave out the image, not the whole record.
        missing, left_out: images that were not found; records left out for it.
    """

    path: str = ""
    keep_text: bool = False
    missing: int = 0
    left_out: int = 0

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
            for _, row in _rows(table, ("url", "key")):
                self._keys[row["url"]] = row["key"]

    def by_path(self, path: str) -> ImageBlob | None:
        """The image at a path in the folder; None, and counted, where there is none."""
        return self._read(self._files.get(path))

    def by_url(self, url: str, name: str = "") -> ImageBlob | None:
        """The image of a URL that the set also calls `name`; None, and counted, if not found."""
        base = posixpath.basename(urlsplit(url).path)
        sha = hashlib.sha256(url.encode()).hexdigest()
        stems = (posixpath.splitext(name)[0], self._keys.get(url), sha, posixpath.splitext(base)[0])
        return self._read(next((self._stems[s] for s in stems if s and self._stems.get(s)), None))

    def _read(self, file):
        if file is None:
            self.missing += 1
            return None
        return _blob(file.read_bytes(), str(file))

    def counts(self) -> dict[str, int]:
        """For the result of an import."""
        return {"missing_images": self.missing, "records_left_out": self.left_out}

    def skip(self, where: str) -> None:
        """Counts a record that is left out for a missing image."""
        self.left_out += 1
        logging.warning("%s: an image is missing, left out (%d so far)", where, self.left_out)


def bagel_t2i(files: Sequence[str | os.PathLike[str]], caption: str = "all") -> Iterator[Record]:
    """Text-to-image records of BAGEL's parquet: of every caption of an image, or the one named.

    Raises:
        DatasetError: another layout, captions that are no JSON object, no caption of that name, an
            image of another format.
    """
    for file in files:
        for where, row in _rows(file, ("image", "captions")):
            captions = _json(row["captions"], f"{where}: captions")
            if not isinstance(captions, dict) or not captions:
                raise DatasetError(f"{where}: captions is {captions!r:.80}, expected name: caption")
            if caption != "all" and caption not in captions:
                raise DatasetError(f"{where}: no caption {caption!r}; it has {sorted(captions)}")
            blob = _blob(row["image"], f"{where}: image")
            for name in captions if caption == "all" else (caption,):
                yield records.text_to_image(
                    f"{where}/{name}", _source(file), str(captions[name]), blob, {"caption": name}
                )


def bagel_edit(files: Sequence[str | os.PathLike[str]]) -> Iterator[Record]:
    """Editing records of BAGEL's parquet: image, instruction, image, ...; every image but the first
    is a target. Of the paraphrases of an instruction the first is taken.

    Raises:
        DatasetError: another layout, numbers of images and instructions that do not fit.
    """
    for file in files:
        for where, row in _rows(file, ("image_list", "instruction_list")):
            pictures, steps = row["image_list"] or [], row["instruction_list"] or []
            if len(pictures) < 2 or len(steps) != len(pictures) - 1 or not all(steps):
                raise DatasetError(
                    f"{where}: {len(pictures)} images and {len(steps)} instructions, expected n "
                    "images, at least 2, and n - 1 lists of at least one instruction"
                )
            blobs = [_blob(data, f"{where}: image {i}") for i, data in enumerate(pictures)]
            segments: list[Text | Img] = [Img(0, False, "user")]
            for i, paraphrases in enumerate(steps):
                segments += [Text(paraphrases[0], False, "user"), Img(i + 1, True, "assistant")]
            yield Record(1, where, _source(file), segments, blobs)


def llava(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Conversations of LLaVA's jsonl (or one JSON list); the answers are targets.

    Raises:
        DatasetError: a line that is no JSON object, an unknown speaker, other numbers of images and
            `<image>` places.
    """
    for file in files:
        for where, row in _json_rows(file):
            turns = row.get("conversations")
            if not isinstance(turns, list) or not turns:
                raise DatasetError(f"{where}: no conversations; its keys are {sorted(row)}")
            names = row.get("image") or []
            names = [names] if isinstance(names, str) else names
            found = [root.by_path(name) for name in names]
            record = _conversation(where, _source(file), turns, found, root)
            if record is not None:
                yield record


def obelics(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """Documents of OBELICS: texts and images in the page's order, all of them targets.

    Raises:
        DatasetError: another layout, or lists of different lengths.
    """
    for file in files:
        for where, row in _rows(file, ("images", "texts", "metadata")):
            about = _json(row["metadata"], f"{where}: metadata")
            names = [(m or {}).get("formatted_filename", "") for m in about]
            yield from _document(where, _source(file), row, names, root)


def omnicorpus(files: Sequence[str | os.PathLike[str]], root: ImageRoot) -> Iterator[Record]:
    """The same of OmniCorpus-CC, whose images are also known by `img_url_sha`.

    Raises:
        DatasetError: as `obelics`.
    """
    for file in files:
        for where, row in _rows(file, ("images", "texts", "metadata")):
            names = [(m or {}).get("img_url_sha") or "" for m in row["metadata"]]
            yield from _document(where, _source(file), row, names, root)


def huggingface(
    folder: str | os.PathLike[str], *, image_key: str = "image", text_key: str | None = None
) -> Iterator[Record]:
    """Records of a folder that `datasets.save_to_disk` wrote.

    With a column `messages` or `conversations` they are conversations over `images` (or `image`),
    else text-to-image pairs of `image_key` and `text_key` (by default `text` or `caption`).

    Raises:
        DatasetError: no such folder, several splits, no column of these, images without bytes.
    """
    folder = pathlib.Path(folder)
    if (folder / "dataset_dict.json").exists():
        splits = _json((folder / "dataset_dict.json").read_text(), str(folder))["splits"]
        raise DatasetError(f"{folder}: holds the splits {splits}; name one: {folder}/{splits[0]}")
    if not (folder / "state.json").exists():
        raise DatasetError(f"{folder}: no state.json; expected a folder of datasets.save_to_disk")
    state = _json((folder / "state.json").read_text(), str(folder))
    for entry in state["_data_files"]:
        for where, row in _arrow_rows(folder / os.path.basename(entry["filename"])):
            talk = next((row[key] for key in ("messages", "conversations") if row.get(key)), None)
            several = row.get("images") or ([row["image"]] if row.get("image") else [])
            if talk is not None:
                blobs = [_held(image, f"{where}: image {i}") for i, image in enumerate(several)]
                yield _conversation(where, folder.name, talk, blobs, ImageRoot())
                continue
            caption = next((k for k in (text_key, "text", "caption") if k and k in row), None)
            if caption is None or image_key not in row or (text_key and caption != text_key):
                raise DatasetError(
                    f"{where}: expected messages, conversations, or {image_key!r} and "
                    f"{text_key or 'text or caption'!r}; its columns are {sorted(row)}"
                )
            blob = _held(row[image_key], f"{where}: {image_key}")
            yield records.text_to_image(where, folder.name, str(row[caption]), blob)


def folder_hashes(folder: str | os.PathLike[str]) -> dict[str, str]:
    """sha256 of the data files of a folder that `datasets.save_to_disk` wrote."""
    return {file.name: sha256_file(file) for file in sorted(pathlib.Path(folder).glob("*.arrow"))}


# ------------------------------------------------------------------------------- shapes of records


def _conversation(where, src, turns, found, root) -> Record | None:
    """Turns [{from, value}] or [{role, content}] with `<image>` places, and their images."""
    segments: list[Text | Img] = []
    parts = [(_role(turn, f"{where}: turn {n}"), _content(turn)) for n, turn in enumerate(turns)]
    places = sum(content.count(_PLACE) for _, content in parts)
    if not places and found:
        parts[0] = (parts[0][0], _PLACE * len(found) + parts[0][1])
    elif places != len(found):
        raise DatasetError(f"{where}: {len(found)} images for {places} places {_PLACE}")
    if None in found and not root.keep_text:
        root.skip(where)
        return None
    kept, number = [blob for blob in found if blob is not None], 0
    place = iter(found)
    for role, content in parts:
        for i, text in enumerate(content.split(_PLACE)):
            if i and next(place) is not None:
                segments.append(Img(number, False, role))
                number += 1
            if text.strip():
                segments.append(Text(text.strip(), role == "assistant", role))
    return Record(1, where, src, segments, kept)


def _role(turn: Mapping[str, Any], where: str) -> str:
    said = turn.get("from", turn.get("role"))
    role = _ROLES.get(said, said)
    if role not in ("system", "user", "assistant"):
        raise DatasetError(
            f"{where}: speaker {said!r}, expected human, gpt, system, user, assistant"
        )
    return role


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("value", turn.get("content")) or ""
    if isinstance(content, str):
        return content
    return "".join(_PLACE if p.get("type") == "image" else p.get("text") or "" for p in content)


def _document(where, src, row, names, root) -> Iterator[Record]:
    urls, texts = row["images"], row["texts"]
    if not len(urls) == len(texts) == len(names):
        raise DatasetError(
            f"{where}: {len(urls)} images, {len(texts)} texts, {len(names)} metadata, expected one "
            "of each a slot"
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
        root.skip(where)
        return
    yield Record(1, where, src, segments, blobs)


# ------------------------------------------------------------------------------------------ reading


def _rows(file: Any, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name:row, values) of a parquet file, a few rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    name, index = os.path.basename(os.fspath(file)), 0
    try:
        with parquet.ParquetFile(file) as table:
            missing = [column for column in columns if column not in table.schema_arrow.names]
            if missing:
                raise DatasetError(
                    f"{name}: another layout: no column {missing[0]!r}; expected "
                    f"{', '.join(columns)}, found {', '.join(table.schema_arrow.names)}"
                )
            for batch in table.iter_batches(batch_size=16, columns=list(columns)):
                for row in batch.to_pylist():
                    yield f"{name}:{index}", row
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{name}: not a whole parquet file (row {index}): {error}") from error


def _arrow_rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of an Arrow stream, as `datasets` keeps it."""
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
        raise DatasetError(f"{file}: not a whole Arrow file (row {index}): {error}") from error


def _json_rows(file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name:line, object) of jsonl, or of one JSON list."""
    name = os.path.basename(os.fspath(file))
    if not os.path.exists(file):
        raise DatasetError(f"{file}: no such file")
    with open(file, encoding="utf-8") as lines:
        if lines.read(1) == "[":
            lines.seek(0)
            rows = enumerate(_json(lines.read(), name))
        else:
            lines.seek(0)
            rows = ((n, _json(line, f"{name}:{n}")) for n, line in enumerate(lines) if line.strip())
        for number, row in rows:
            if not isinstance(row, dict):
                raise DatasetError(f"{name}:{number}: {row!r:.80} is no JSON object")
            yield f"{name}:{number}", row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{where}: not JSON: {error}") from error


def _blob(data: Any, where: str) -> ImageBlob:
    if not isinstance(data, bytes):
        raise DatasetError(f"{where}: {type(data).__name__}, expected the bytes of an image")
    if len(data) > images.MAX_BYTES:
        raise DatasetError(f"{where}: {len(data)} bytes, at most {images.MAX_BYTES}")
    return records.image_blob(data, where)


def _held(image: Any, where: str) -> ImageBlob:
    """An image of `datasets`: {bytes, path}."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is None:
        raise DatasetError(f"{where}: the set holds a path, not the image; save it with its bytes")
    return _blob(data, where)


def _source(file: Any) -> str:
    return os.path.basename(os.fspath(file))
