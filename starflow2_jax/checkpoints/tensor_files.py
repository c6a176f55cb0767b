"""Named tensors of a file, a folder or a mapping, described at once and read one at a time.

Readable: a mapping of arrays, `.safetensors`, a folder of safetensors (with an index or one file),
and PyTorch's `.pth`/`.pt`/`.bin` through `torch.load(weights_only=True)`, which runs no code of the
file. Nothing else is opened.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

INDEX_FILE = "model.safetensors.index.json"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

SAFETENSORS_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}

Index = tuple[slice, ...]
# A column is cut out of at least so much, read at once.
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Stored:
    """One tensor where it lies. `read()` gives all of it, `read(index)` the slice `index`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[..., np.ndarray]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_source(source: Mapping[str, Any] | str | Path) -> dict[str, Stored]:
    """Every tensor of a mapping, file or folder by name.

    Raises:
        FileNotFoundError: no such file or folder, or a shard that the index names is missing.
        ValueError: not a readable kind, a truncated or damaged file, or something in it that is
            not a tensor.
        ImportError: a PyTorch file where torch is not installed; says which extra has it.
    """
    if isinstance(source, Mapping):
        return {str(name): _array(str(name), value) for name, value in source.items()}
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _torch(path)
    kinds = ", ".join((".safetensors", *_TORCH_SUFFIXES))
    raise ValueError(f"{path}: weights are read from a folder or from {kinds}")


def _array(name: str, value: Any) -> Stored:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{name} is a {type(value).__name__}; expected an array")
    if type(value).__module__.partition(".")[0] == "torch":
        return _tensor(name, value, "the mapping")
    if not getattr(value, "is_fully_addressable", True):
        raise ValueError(f"{name} lies on devices of several hosts; gather it first")
    read = lambda index=(): np.asarray(value[index] if index else value)
    return Stored(tuple(value.shape), np.dtype(value.dtype), "the mapping", read)


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, none of them read yet.

    Raises:
        ValueError: the file is truncated, damaged, or holds a dtype that is not known.
    """
    import safetensors

    try:
        handle = safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error

    del handle
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)

    def stored(name: str, kind: str, shape: list[int], data_offsets: list[int]) -> Stored:
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {kind}; known are {', '.join(_DTYPES)}")
        shape, dtype, start = tuple(shape), np.dtype(_DTYPES[kind]), 8 + size + data_offsets[0]
        read = lambda index=(): _read(path, name, shape, dtype, start, index)
        return Stored(shape, dtype, str(path), read)

    return {
        name: stored(name, held["dtype"], held["shape"], held["data_offsets"])
        for name, held in header.items()
    }


def _read(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int, index: Index
) -> np.ndarray:
    """A slice of one tensor, by ordinary reads of little more than its bytes.

    Pages of a mapped file stay in the process, so that a large file would count twice.
    """
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape)]
    if any(bound.step != 1 for bound in bounds):
        raise ValueError(f"{name}: slices must have step 1, got {index}")
    whole = np.empty([len(bound) for bound in bounds], dtype)
    with path.open("rb", buffering=0) as stream:
        try:
            _fill(stream, whole, start, shape, bounds)
        except EOFError:
            raise ValueError(f"{path} ended within {name}; was it changed meanwhile?") from None
    return whole


def _fill(stream: Any, target: np.ndarray, start: int, shape: Any, bounds: list[range]) -> None:
    if not target.size:
        return
    if all(len(bound) == size for bound, size in zip(bounds[1:], shape[1:])):
        row = target.nbytes // (len(bounds[0]) if bounds else 1)
        stream.seek(start + (bounds[0].start * row if bounds else 0))
        _read_into(stream, target)
        return
    row = math.prod(shape[1:]) * target.itemsize
    if row >= READ_BYTES:
        for part, i in zip(target, bounds[0]):
            _fill(stream, part, start + i * row, shape[1:], bounds[1:])
        return
    inner = tuple(slice(bound.start, bound.stop) for bound in bounds[1:])
    step = max(READ_BYTES // row, 1)
    for first in range(0, len(target), step):
        part = target[first : first + step]
        rows = np.empty((len(part), *shape[1:]), target.dtype)
        stream.seek(start + (bounds[0].start + first) * row)
        _read_into(stream, rows)
        part[...] = rows[(slice(None), *inner)]


def _read_into(stream: Any, array: np.ndarray) -> None:
    data = memoryview(array.reshape(-1).view(np.uint8))
    while data:
        count = stream.readinto(data)
        if not count:
            raise EOFError
        data = data[count:]


def read_index(path: Path) -> dict[str, str]:
    """File by tensor name, from a `model.safetensors.index.json`.

    Raises:
        ValueError: the index cannot be parsed, names a tensor twice, or a file outside its folder.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"named twice: {', '.join(twice)}")
        return found

    try:
        files = dict(json.loads(path.read_text(), object_pairs_hook=once)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors index: {error!r}") from error
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path}: {name} is said to be in {file!r}, not a file beside it")
    return files


def _folder(path: Path) -> dict[str, Stored]:
    if (path / ".metadata").exists():
        raise ValueError(
            f"{path} is a torch.distributed checkpoint, whose index is a pickle; make a .pth of it "
            "with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
        )
    index = path / INDEX_FILE
    if index.exists():
        return _shards(path, read_index(index))
    found = sorted(path.glob("*.safetensors"))
    found = found or sorted(p for p in path.iterdir() if p.suffix in _TORCH_SUFFIXES)
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(
            f"{path}: expected {INDEX_FILE}, or one .safetensors or .pth file; found {names}"
        )
    return open_source(found[0])


def _shards(folder: Path, files: Mapping[str, str]) -> dict[str, Stored]:
    missing = sorted({f for f in files.values() if not (folder / f).exists()})
    if missing:
        raise FileNotFoundError(f"{folder / INDEX_FILE} names missing shards {', '.join(missing)}")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(files.values())):
        held = open_safetensors(folder / file)
        indexed = {name for name, at in files.items() if at == file}
        if set(held) != indexed:
            differ = ", ".join(sorted(set(held) ^ indexed)[:20])
            raise ValueError(f"{folder / file} and {INDEX_FILE} do not agree about {differ}")
        tensors.update(held)
    return tensors


def _torch(path: Path) -> dict[str, Stored]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file, which needs torch: pip install 'starflow2_jax[torch]'"
        ) from error
    import pickle

    try:
        # mmap leaves the tensors on the disk; files of before torch 1.6 cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_zip(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and is refused: {reason[:300]}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a state_dict")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: {name!r} is a {type(value).__name__}; expected a state_dict of tensors"
            )
    return {str(name): _tensor(str(name), value, str(path)) for name, value in state.items()}


def _zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _tensor(name: str, value: Any, where: str) -> Stored:
    import torch

    kind = str(value.dtype).removeprefix("torch.")
    value = value.detach()

    def read(index: Index = ()) -> np.ndarray:
        part = value[index]
        if kind == "bfloat16":
            return part.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()

    try:
        dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    except TypeError:
        raise ValueError(f"{where}: {name} has dtype {kind}, which numpy does not know") from None
    return Stored(tuple(value.shape), dtype, where, read)
