"""The prompts of public benchmarks, read from each benchmark's own files.

Every reader takes the files or the folder of `--prompts` and the folder of the source images, and
returns items in the order of the files. Names that become file names are checked, since the files
are downloads.
"""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from starflow2_jax.data import untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers import tables

_GEDIT_COLUMNS = ("key", "task_type", "instruction", "instruction_language")
# Prompt numbers of WISE's categories. The two versions have the same file names but other prompts.
_WISE_NUMBERS = {
    "wise": {"time": (401, 567), "Space": (568, 700), "Biology": (701, 800),
             "Physical Knowledge": (801, 900), "Chemistry": (901, 1000)},
    "wise_verified": {"time": (401, 520), "Space": (521, 640), "Biology": (641, 760),
                      "Physical Knowledge": (761, 880), "Chemistry": (881, 1000)},
}  # fmt: skip

# An image of an item: the path of a file, or a function that reads the bytes of a row.
Source = Path | Callable[[], bytes]


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark."""

    name: str  #: names the prompt in messages, and is unique within the benchmark
    prompt: str
    row: Mapping[str, Any] = field(default_factory=dict)  #: the prompt's row in its file
    images: tuple[Source, ...] = ()  #: what the model is shown before the prompt
    shown_source: Source | None = None  #: what the evaluator is shown as the source of an edit


def read_geneval(paths: Sequence[Path], image_root: Path) -> list[Item]:
    """Read GenEval's `evaluation_metadata.jsonl`, one JSON object with a `prompt` per line."""
    items = []
    for path in paths:
        for number, line in untrusted.read_lines(path):
            location = f"{path}, line {number + 1}"
            row = untrusted.decode_json(line, location)
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"{location}: expected an object with a text `prompt`")
            items.append(Item(f"{len(items):05}", row["prompt"], row))
    return items


def read_dpg(paths: Sequence[Path], image_root: Path) -> list[Item]:
    """Read DPG-Bench's folder `prompts/`, one text file per prompt."""
    items = []
    for path in _folder(paths, "*.txt"):
        stem = _file_name(path.stem, str(path))
        if "." in stem:
            raise ValueError(f"{path}: the evaluator cuts names at a dot; rename the prompt")
        text = untrusted.decode_text(untrusted.read_file(path, 1 << 20), str(path))
        items.append(Item(stem, text.strip()))
    return items


def read_imgedit(paths: Sequence[Path], image_root: Path) -> list[Item]:
    """Read ImgEdit's `basic_edit.json`, which maps keys to an image's path `id` and a `prompt`."""

    class Row(msgspec.Struct):
        id: str
        prompt: str

    rows = untrusted.read_json(_one_file(paths, "imgedit"), dict[str, Row])
    return [
        Item(_file_name(key, f"{paths[0]}, {key}"), row.prompt,
             images=(_inside(image_root, row.id, f"{paths[0]}, {key}"),))
        for key, row in rows.items()
    ]  # fmt: skip


def read_rise(paths: Sequence[Path], image_root: Path) -> list[Item]:
    """Read RISEBench's list of objects with `index`, `category`, `instruction` and `image`."""

    class Row(msgspec.Struct):
        index: str
        category: str
        instruction: str
        image: str

    items = []
    for row in untrusted.read_json(_one_file(paths, "rise"), list[Row]):
        location = f"{paths[0]}, {row.index}"
        category, index = _file_name(row.category, location), _file_name(row.index, location)
        image = _inside(image_root, row.image, location)
        items.append(Item(f"{category}/{index}", row.instruction, images=(image,)))
    return items


class _KrisRow(msgspec.Struct):
    ori_img: str | list[str]
    ins_en: str
    id: str | int = ""
    type: str = ""


def read_kris(paths: Sequence[Path], image_root: Path) -> list[Item]:
    """Read KRIS-Bench: its folder of `CATEGORY/annotation.json`, or BAGEL's `final_data.json`.

    The images of a category are in `IMAGE_ROOT/CATEGORY/`.
    """
    rows: list[tuple[str, str, _KrisRow]] = []
    if paths[0].is_dir():
        for path in _folder(paths, "*/annotation.json"):
            table = untrusted.read_json(path, dict[str, _KrisRow])
            rows += [(path.parent.name, id, row) for id, row in table.items()]
    else:
        table = untrusted.read_json(_one_file(paths, "kris"), list[_KrisRow])
        rows = [(row.type, str(row.id), row) for row in table]
    items = []
    for category, id, row in rows:
        location = f"{paths[0]}, {category}/{id}"
        name = f"{_file_name(category, location)}/{_file_name(id, location)}"
        names = [row.ori_img] if isinstance(row.ori_img, str) else row.ori_img
        images = tuple(_inside(image_root / category, image, location) for image in names)
        items.append(Item(name, row.ins_en, images=images))
    return items


class _WiseRow(msgspec.Struct):
    prompt: str = msgspec.field(name="Prompt")
    prompt_id: Annotated[int, msgspec.Meta(ge=1)]
    category: str = msgspec.field(name="Category", default="")


def read_wise(paths: Sequence[Path], image_root: Path, *, version: str = "wise") -> list[Item]:
    """Read WISE's lists of objects with `Prompt` and `prompt_id`, in one or several files."""
    items = []
    for path in paths:
        for row in untrusted.read_json(path, list[_WiseRow]):
            low, high = _WISE_NUMBERS[version].get(row.category, (1, row.prompt_id))
            if not low <= row.prompt_id <= high:
                raise ValueError(
                    f"{path}: prompt {row.prompt_id} is of {row.category}, which has {low} to "
                    f"{high} in {version}; the file belongs to the other version of WISE"
                )
            items.append(Item(str(row.prompt_id), row.prompt))
    return items


def read_gedit(paths: Sequence[Path], image_root: Path) -> list[Item]:
    """Read the parquet files of GEdit-Bench, or a folder with them."""
    items = []
    for path in _folder(paths, "*.parquet"):
        for index, (location, row) in enumerate(tables.parquet_rows([path], _GEDIT_COLUMNS)):
            task, language, key = (
                _file_name(row[name], location)
                for name in ("task_type", "instruction_language", "key")
            )
            raw, display = (
                functools.partial(_parquet_image, path, index, column)
                for column in ("input_image_raw", "input_image")
            )
            name, prompt = f"{task}/{language}/{key}", str(row["instruction"])
            items.append(Item(name, prompt, images=(raw,), shown_source=display))
    return items


def _parquet_image(path: Path, index: int, column: str) -> bytes:
    """Return the encoded image in one row of a parquet file of the `datasets` library."""
    first, rows = _row_group(path, index)
    value = rows[index - first].get(column)
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"{path}, row {index}: {column} holds no image")
    return data


def _row_group(path: Path, index: int) -> tuple[int, list[dict[str, Any]]]:
    from pyarrow import parquet

    first = 0
    with parquet.ParquetFile(path) as table:
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if index < first + count:
                return first, _read_row_group(path, group)
            first += count
    raise ValueError(f"{path}: no row {index}")


@functools.lru_cache(maxsize=1)
def _read_row_group(path: Path, group: int) -> list[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        data = table.read_row_group(group, columns=["input_image", "input_image_raw"])
    data.validate(full=True)  # offsets beyond a buffer would be followed out of it
    return data.to_pylist()


# ------------------------------------------------------------------------------- checks and hashes


def check_names(items: Sequence[Item], location: str) -> list[Item]:
    """Return items with clean texts; ValueError if there are none, or if a name occurs twice."""
    if not items:
        raise ValueError(f"{location}: the file contains no prompt")
    name, count = Counter(item.name for item in items).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{location}: prompt {name!r} occurs {count} times")
    texts = [untrusted.clean_text(item.prompt, f"{location}, {item.name}") for item in items]
    return [dataclasses.replace(item, prompt=text) for item, text in zip(items, texts)]


def replace_texts(items: Sequence[Item], rewrites: Sequence[Item], location: str) -> list[Item]:
    """Return items with the texts of other ones, which must have the same names in any order."""
    texts = {item.name: item.prompt for item in rewrites}
    for item in items:
        if item.name not in texts:
            raise ValueError(f"{location}: no rewritten text for prompt {item.name!r}")
    if len(texts) != len(items):
        raise ValueError(f"{location}: {len(texts)} prompts, expected {len(items)}")
    return [dataclasses.replace(item, prompt=texts[item.name]) for item in items]


def sha256(texts: Sequence[str]) -> str:
    """Return the sha256 of a file; of several, or of a folder, that of their names and digests."""
    paths = [Path(text).expanduser() for text in texts]
    files = [file for path in paths for file in ([path] if path.is_file() else _prompt_files(path))]
    if len(files) == 1:
        return hashlib.sha256(files[0].read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(paths[0]).as_posix() if paths[0].is_dir() else file.name
        digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _prompt_files(folder: Path) -> list[Path]:
    endings = (".txt", ".parquet", ".json", ".jsonl")
    return sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())


def _folder(paths: Iterable[Path], pattern: str) -> list[Path]:
    """Return the files, and those that match a pattern in the folders, sorted."""
    files = []
    for path in paths:
        matches = sorted(path.glob(pattern)) if path.is_dir() else [path]
        if not matches:
            raise ValueError(f"{path}: no {pattern} in this folder")
        files += matches
    return files


def _one_file(paths: Sequence[Path], name: str) -> Path:
    if len(paths) != 1:
        raise ValueError(f"--prompts: {name} has one file, got {len(paths)}")
    return paths[0]


def _file_name(text: Any, location: str) -> str:
    """Return a text that becomes a file's name; ValueError if it would leave its folder."""
    if (
        not isinstance(text, str)
        or not text
        or text.startswith(".")
        or {"/", "\\", "\0"} & set(text)
    ):
        raise ValueError(f"{location}: {text!r} cannot be the name of a file")
    return untrusted.clean_text(text, location)


def _inside(root: Path, name: str, location: str) -> Path:
    """Return a path below `root`."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)):
        raise DatasetError(f"{location}: the image {name!r} is outside of {root}")
    return path
