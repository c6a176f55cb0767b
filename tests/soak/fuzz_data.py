"""The readers of datasets, sources of imports, chats, weights and records, and their inputs."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from soak.fuzz_trials import NAME, Reader
from soak.mutations import change_bytes, change_value, changed_json, to_json
from starflow2_jax.data import (
    array_store,
    images,
    manifest,
    packing,
    plan_files,
    records,
    untrusted,
)
from starflow2_jax.evaluation.benchmarks import layouts
from starflow2_jax.evaluation.benchmarks.items import Item
from starflow2_jax.importers import captioned, huggingface, interleaved, tars
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.tally import Tally
from starflow2_jax.inference import prompts

PIXELS = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)


def encoded(form: str = "PNG", **options: Any) -> bytes:
    """Return a small image in a format."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form, **options)
    return buffer.getvalue()


def write(folder: Path, name: str, data: bytes) -> Path:
    """Write an input and return its path."""
    path = folder / f"{NAME}_{name}"
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------ images and records


def _make_image(rng: random.Random, folder: Path) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(12)
    form = rng.choice(("PNG", "JPEG", "WEBP"))
    return change_bytes(encoded(form, exif=exif), rng)


def _image_problem(pixels: np.ndarray) -> str:
    is_rgb = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
    return "" if is_rgb else f"{pixels.dtype} {pixels.shape}"


def _record() -> records.Record:
    blob = records.image_blob(encoded(), "seed")
    return records.text_to_image("a", "b", "a red circle", blob, {"label": 1})


def _make_record(rng: random.Random, folder: Path) -> bytes | None:
    data = records.encode(_record())
    if rng.random() < 0.4:
        return change_bytes(data, rng)
    try:
        return msgspec.msgpack.encode(change_value(msgspec.msgpack.decode(data), rng))
    except (OverflowError, ValueError, TypeError):
        return None


def _read_record(data: bytes) -> records.Record:
    record = records.decode(data, NAME)
    records.check(record, NAME, pixels=True)
    return record


def record_problem(record: records.Record) -> str:
    """Return what is wrong with a record that was accepted."""
    try:
        records.encode(record)
        records.check(record, "the record")
        untrusted.clean_text(records.text(record), "its text")
    except manifest.DatasetError as error:
        return str(error)
    return ""


def _make_arrays(rng: random.Random, folder: Path) -> bytes | None:
    row = {"mean": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.arange(3, dtype=np.int32)}
    data = array_store.encode("a", row)
    if rng.random() < 0.5:
        return change_bytes(data, rng)
    try:
        return msgspec.msgpack.encode(change_value(msgspec.msgpack.decode(data), rng))
    except (OverflowError, ValueError, TypeError):
        return None


def _arrays_problem(row: tuple[str, dict[str, np.ndarray]]) -> str:
    infinite = [name for name, array in row[1].items() if not np.isfinite(array).all()]
    return f"{infinite} are not finite" if infinite else ""


def _make_manifest(rng: random.Random, folder: Path) -> Path | None:
    source = folder / f"{NAME}_set"
    records.write(source, [_record()], classes=["a", "b"])
    stored = json.loads((source / manifest.FILE_NAME).read_text())
    data = changed_json(stored, rng)
    if data is None:
        return None
    (source / manifest.FILE_NAME).write_bytes(data)
    return source


def _make_index(rng: random.Random, folder: Path) -> tuple[Path, str]:
    spec = packing.PackingSpec(64, 4)
    plan = packing.pack([10, 20, 30, 40], [1, 0, 1, 0], spec)
    file = folder / f"{NAME}.npz"
    arrays = {name: getattr(plan, name) for name in packing._ARRAYS}
    plan_files.store([str(file)], "{}", arrays)
    file.write_bytes(change_bytes(file.read_bytes(), rng))
    return file, "{}"


def _read_index(value: tuple[Path, str]) -> packing.PackingPlan:
    return packing._load(str(value[0]), value[1], 4, packing.PackingSpec(64, 4))


# -------------------------------------------------------------------------------------- importers


def _make_tar(rng: random.Random, folder: Path) -> Path:
    buffer = io.BytesIO()
    names = ["a.png", "a.txt", "b.png", "b.txt", "c.json"]
    if rng.random() < 0.3:
        names[rng.randrange(5)] = rng.choice(("/etc/x.png", "../a.png", "a\x00.txt", "x" * 300, ""))
    with tarfile.open(fileobj=buffer, mode=rng.choice(("w", "w", "w:gz"))) as archive:
        for name in names:
            data = encoded() if name.endswith("png") else b"a caption"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = tarfile.REGTYPE if rng.random() < 0.95 else rng.choice(b"12345").to_bytes()
            archive.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    return write(folder, "a.tar", data if rng.random() < 0.2 else change_bytes(data, rng))


def _read_tar(path: Path) -> list[records.Record]:
    return _imported(tars.webdataset([path], Tally()))


def _imported(rows: Any) -> list[records.Record]:
    """Return records, after the checks of `records.write`."""
    result = []
    for record in rows:
        records.encode(record)
        records.check(record, f"record {record.id!r}")
        result.append(record)
    return result


def _records_problem(rows: list[records.Record]) -> str:
    return next((text for row in rows if (text := record_problem(row))), "")


def _make_folder(rng: random.Random, folder: Path) -> Path:
    root = folder / f"{NAME}_pets"
    root.mkdir()
    (root / "a.png").write_bytes(change_bytes(encoded(), rng) if rng.random() < 0.5 else encoded())
    (root / "a.txt").write_bytes(change_bytes("a grün caption".encode(), rng))
    return root


def _read_folder(root: Path) -> list[records.Record]:
    captioned.folder_hashes(root)
    return _imported(captioned.folder(root, Tally()))


_TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "a circle"},
]
_TALKS = (
    {"id": "x", "image": "a.png", "conversations": _TALK},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                  {"role": "assistant", "content": "b"}]},
)  # fmt: skip


def _make_talks(rng: random.Random, folder: Path) -> Path | None:
    (folder / "a.png").write_bytes(encoded())
    rows = [to_json(row) for row in _TALKS]
    number = rng.randrange(2)
    rows[number] = changed_json(_TALKS[number], rng)
    if None in rows:
        return None
    text = b"\n".join(rows) if rng.random() < 0.7 else b"[" + b",".join(rows) + b"]"
    return write(folder, "talks.jsonl", text)


def _read_talks(path: Path) -> list[records.Record]:
    return _imported(interleaved.llava([path], ImageRoot(str(path.parent))))


_ROWS = {
    "bagel_t2i": {"image": encoded(), "captions": json.dumps({"a": "a circle", "b": "round"})},
    "bagel_edit": {"image_list": [encoded(), encoded()], "instruction_list": [["make it blue"]]},
    "obelics": {"images": ["http://x/a.png", None], "texts": [None, "a text"],
                "metadata": json.dumps([{"src": "http://x/a.png"}, None])},
    "omnicorpus": {"images": ["http://x/a.png", None], "texts": [None, "a text"],
                   "metadata": [{"img_url_sha": "a"}, None]},
}  # fmt: skip


def _make_parquet(rng: random.Random, folder: Path) -> tuple[str, Path] | None:
    import pyarrow
    from pyarrow import parquet

    (folder / "a.png").write_bytes(encoded())
    kind = rng.choice(tuple(_ROWS))
    row = _ROWS[kind]
    if rng.random() < 0.7:
        row = change_value(row, rng)
    try:
        table = pyarrow.Table.from_pylist([row, row])
        path = folder / f"{NAME}_a.parquet"
        parquet.write_table(table, path)
    except Exception:  # no table holds such values
        return None
    if rng.random() < 0.4:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    return kind, path


def _read_parquet(value: tuple[str, Path]) -> list[records.Record]:
    kind, path = value
    if kind == "bagel_t2i":
        return _imported(interleaved.bagel_t2i([path], "all", Tally()))
    if kind == "bagel_edit":
        return _imported(interleaved.bagel_edit([path], Tally()))
    root = ImageRoot(str(path.parent), True)
    return _imported(getattr(interleaved, kind)([path], root))


def _make_arrow(rng: random.Random, folder: Path) -> Path | None:
    import pyarrow

    source = folder / f"{NAME}_set"
    source.mkdir()
    image = {"bytes": encoded(), "path": None}
    row = rng.choice(({"image": image, "text": "a"}, {"images": [image], "messages": _TALK}))
    if rng.random() < 0.5:
        row = change_value(row, rng)
    try:
        table = pyarrow.Table.from_pylist([row, row, row])
        with pyarrow.ipc.new_stream(source / f"{NAME}.arrow", table.schema) as writer:
            writer.write_table(table)
    except Exception:  # no table holds such values
        return None
    files = {
        "state.json": {"_data_files": [{"filename": f"{NAME}.arrow"}]},
        "dataset_info.json": {"features": {"text": {"names": ["a", "b"]}}},
    }
    for name, value in files.items():
        (source / name).write_text(json.dumps(value))
    part = rng.choice((*files, *[f"{NAME}.arrow"] * 4))
    if part in files:
        data = changed_json(files[part], rng)
        if data is None:
            return None
        (source / part).write_bytes(data)
    else:
        (source / part).write_bytes(change_bytes((source / part).read_bytes(), rng))
    return source


def _read_arrow(source: Path) -> list[records.Record]:
    huggingface.folder_hashes(source)
    return _imported(huggingface.huggingface(source))


# ------------------------------------------------------------------------------- chats and prompts

_CHAT = [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                      {"type": "text", "text": "what?"}]},
         {"role": "assistant", "content": "a circle"}]  # fmt: skip


def _make_chat(rng: random.Random, folder: Path) -> Path | None:
    (folder / "a.png").write_bytes(encoded())
    data = changed_json(_CHAT, rng)
    return None if data is None else write(folder, "chat.json", data)


def _read_chat(path: Path) -> list[Any]:
    return prompts.parse_prompt(prompts.read_chat(path), str(path))


def _read_batch(path: Path) -> list[Any]:
    chats = prompts.read_batch(path)
    return [part for chat in chats for part in prompts.parse_prompt(chat, str(path))]


def _parts_problem(parts: list[Any]) -> str:
    for part in parts:
        if part.kind == "text" and ("\0" in part.text or not part.text.isascii() is not None):
            return f"text {part.text[:40]!r}"
    return ""


def _make_geneval(rng: random.Random, folder: Path) -> Path | None:
    data = changed_json({"prompt": "a photo of a dog", "tag": "single_object"}, rng)
    return None if data is None else write(folder, "geneval.jsonl", data + b"\n")


def _read_geneval(path: Path) -> list[Item]:
    return layouts.read_items("geneval", [str(path)], None)


def _geneval_problem(items: list[Item]) -> str:
    try:
        for item in items:
            untrusted.clean_text(item.prompt, "its prompt")
    except manifest.DatasetError as error:
        return str(error)
    return ""


READERS = (
    Reader("images", _make_image, lambda data: images.decode(data, NAME), _image_problem, 150),
    Reader("records", _make_record, _read_record, record_problem, 150),
    Reader("arrays", _make_arrays, lambda d: array_store.decode(d, NAME), _arrays_problem, 150),
    Reader("manifests", _make_manifest, records.read),
    Reader("indexes", _make_index, _read_index, cases=100),
    Reader("tars", _make_tar, _read_tar, _records_problem, 100),
    Reader("folders", _make_folder, _read_folder, _records_problem, 60),
    Reader("llava", _make_talks, _read_talks, _records_problem, 100),
    Reader("parquet", _make_parquet, _read_parquet, _records_problem, 60),
    Reader("huggingface", _make_arrow, _read_arrow, _records_problem, 60),
    Reader("chats", _make_chat, _read_chat, _parts_problem, 100),
    Reader("batches", _make_chat, _read_batch, _parts_problem, 60),
    Reader("geneval", _make_geneval, _read_geneval, _geneval_problem, 60),
)
