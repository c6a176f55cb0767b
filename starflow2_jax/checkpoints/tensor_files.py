"""Read the named tensors of a file, a folder or a mapping one at a time.

Supported are a mapping of arrays, `.safetensors`, a folder of safetensors (with an index, or one
file), and PyTorch's `.pth`/`.pt`/`.bin` through `torch.load(weights_only=True)`, which runs no code
from the file. Nothing else is opened.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from starflow2_jax.runtime import json_text

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
# A slice along an inner axis is cut out of blocks of at least so many bytes, each read at once.
READ_BYTES = 1 << 22

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk (or in a mapping) that is read on request."""

    shape: tuple[int, ...]  # its shape
    dtype: np.dtype  # its dtype
    location: str  # the file it is stored in, for error messages
    # `read()` returns the tensor, `read(index)` the slice `index` of it
    read: Callable[..., np.ndarray]

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def compare(
    actual: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """Return the names and shapes that differ as `missing`, `unexpected` and `misshapen`.

    Names that would be right without a prefix are listed by that alone.
    """
    prefix = _wrapper_prefix(actual, expected)
    if prefix:
        return {
            f"of {len(actual)} names begin with {prefix!r}, which DistributedDataParallel, "
            "torch.compile or another wrapper has added; remove it from the names, such as": [
                next(name for name in actual if name.startswith(prefix))
            ]
        }
    return {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "misshapen": [
            f"{name} is {list(actual[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in actual and tuple(actual[name].shape) != tuple(shape)
        ],
    }


def _wrapper_prefix(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the prefix without which names would be those that are expected, empty if none is."""
    known = next(iter(expected), "")  # all have it, so one name shows it
    for name in actual:
        prefix = name.removesuffix(known) if name.endswith(f".{known}") else ""
        if prefix and {n.removeprefix(prefix) for n in actual} >= set(expected):
            return prefix
    return ""


def raise_problems(summary: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise a ValueError that lists up to 20 problems of each kind, unless there are none."""
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:20])}"
        + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(f"{summary}. {'; '.join(lines)}")


def to_device(tensor: StoredTensor, sharding: Any, dtype: Any) -> jax.Array:
    """Read a tensor onto devices, each slice straight to the device that needs it."""
    slices: dict[str, np.ndarray] = {}

    def read(index: Index) -> np.ndarray:
        # Devices that need the same slice request it in turn; it is read once.
        if str(index) not in slices:
            slices[str(index)] = tensor.read(index).astype(dtype, copy=False)
        return slices[str(index)]

    if sharding is None:
        return jnp.asarray(tensor.read().astype(dtype, copy=False))
    array = jax.make_array_from_callback(tensor.shape, sharding, read)
    # Without waiting, later tensors would be read while this one is still being copied.
    return array.block_until_ready()


def open_source(source: Mapping[str, Any] | str | Path) -> dict[str, StoredTensor]:
    """Return every tensor of a mapping, file or folder, by name. None of them is read yet.

    Raises:
        FileNotFoundError: There is no such file or folder, or a shard in the index is missing.
        ValueError: This kind of file is not readable, or it is truncated or damaged, or something
            in it is not a tensor.
        ImportError: This is a PyTorch file and torch is not installed; the message names the extra.
    """
    if isinstance(source, Mapping):
        return {str(name): _from_array(str(name), value) for name, value in source.items()}
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path)
    kinds = ", ".join((".safetensors", *_TORCH_SUFFIXES))
    raise ValueError(f"{path}: weights are read from a folder or from {kinds}")


def _from_array(name: str, value: Any) -> StoredTensor:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{name} is a {type(value).__name__}; expected an array")
    if type(value).__module__.partition(".")[0] == "torch":
        return _from_torch(name, value, "the mapping")
    if not getattr(value, "is_fully_addressable", True):
        raise ValueError(f"{name} is on devices of several hosts; gather it first")

    def read(index: Index = ()) -> np.ndarray:
        return np.asarray(value[index] if index else value)

    return StoredTensor(tuple(value.shape), np.dtype(value.dtype), "the mapping", read)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file. None of them is read yet."""
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
        header = json_text.decode(stream.read(size), str(path))
    header.pop("__metadata__", None)

    def stored(name: str, kind: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {kind}; known are {', '.join(_DTYPES)}")
        dtype, start = np.dtype(_DTYPES[kind]), 8 + size + data_offsets[0]

        def read(index: Index = ()) -> np.ndarray:
            return _read(path, name, tuple(shape), dtype, start, index)

        return StoredTensor(tuple(shape), dtype, str(path), read)

    return {
        name: stored(name, entry["dtype"], entry["shape"], entry["data_offsets"])
        for name, entry in header.items()
    }


def _read(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int, index: Index
) -> np.ndarray:
    """Read a slice of one tensor, by ordinary reads of little more than its bytes.

    A mapped file's pages would stay in the process, so that a large file would count twice.
    """
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape)]
    if any(bound.step != 1 for bound in bounds):
        raise ValueError(f"{name}: slices must have step 1, got {index}")
    array = np.empty([len(bound) for bound in bounds], dtype)
    with path.open("rb", buffering=0) as stream:
        try:
            _fill(stream, array, start, shape, bounds)
        except EOFError:
            raise ValueError(f"{path} ended within {name}; was it changed meanwhile?") from None
    return array


def _fill(stream: Any, target: np.ndarray, start: int, shape: Any, bounds: list[range]) -> None:
    """Read the slice `bounds` of a tensor that starts at byte `start` into `target`."""
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
    """Return the file of each tensor, from a `model.safetensors.index.json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(f"named twice: {', '.join(repeated)}")
        return dict(pairs)

    try:
        index = json_text.decode(path.read_bytes(), str(path), object_pairs_hook=unique)
        files = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors index: {error!r}") from error
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{path}: {name} is said to be in {file!r}, which is not in its folder"
            )
    return files


def _open_folder(path: Path) -> dict[str, StoredTensor]:
    if (path / ".metadata").exists():
        raise ValueError(
            f"{path} is a torch.distributed checkpoint, whose index is a pickle; make a .pth of it "
            "with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
        )
    index = path / INDEX_FILE
    if index.exists():
        return _open_shards(path, read_index(index))
    files = sorted(path.glob("*.safetensors"))
    files = files or sorted(p for p in path.iterdir() if p.suffix in _TORCH_SUFFIXES)
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise ValueError(
            f"{path}: expected {INDEX_FILE}, or one .safetensors or .pth file; found {names}"
        )
    return open_source(files[0])


def _open_shards(folder: Path, files: Mapping[str, str]) -> dict[str, StoredTensor]:
    missing = sorted({f for f in files.values() if not (folder / f).exists()})
    if missing:
        raise FileNotFoundError(f"{folder / INDEX_FILE} names missing shards {', '.join(missing)}")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        stored = open_safetensors(folder / file)
        indexed = {name for name, shard in files.items() if shard == file}
        if set(stored) != indexed:
            differ = ", ".join(sorted(set(stored) ^ indexed)[:20])
            raise ValueError(f"{folder / file} and {INDEX_FILE} do not agree about {differ}")
        tensors.update(stored)
    return tensors


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file, which needs torch: pip install 'starflow2_jax[torch]'"
        ) from error

    try:
        # mmap leaves the tensors on disk. Files from before torch 1.6 are no zip and cannot be
        # mapped.
        with path.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of many kinds, whatever bytes are damaged
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
    return {str(name): _from_torch(str(name), value, str(path)) for name, value in state.items()}


def _from_torch(name: str, value: Any, location: str) -> StoredTensor:
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
        raise ValueError(
            f"{location}: {name} has dtype {kind}, which numpy does not know"
        ) from None
    return StoredTensor(tuple(value.shape), dtype, location, read)
