"""Model folders: `config.json`, `model.safetensors` (with an index above 5 GB), `sha256.json`.

Tensors are written and read one at a time, so that a model never lies twice in memory; a folder
appears whole, by a rename, or not at all. Tensor names are our tree's, joined by dots.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.checkpoints.tensor_files import (
    INDEX_FILE,
    SAFETENSORS_NAMES,
    Stored,
    open_source,
)
from starflow2_jax.config import upgrade
from starflow2_jax.params import (
    Tree,
    flatten,
    shardings as param_shardings,
    split as split_params,
    unflatten,
)

CONFIG_FILE = "config.json"
# The entry of a published model's config.json that holds the experiment which trained it.
EXPERIMENT_KEY = "starflow2_jax"
TENSOR_FILE = "model.safetensors"
DIGEST_FILE = "sha256.json"
SHARD_BYTES = 5_000_000_000
# What a path of the package's own models begins with, and where they are.
PRETRAINED = "pretrained/"
ROOT = Path(__file__).parents[1]


def locate(path: str | Path) -> Path:
    """The folder of a path: of `pretrained/NAME` the package's own, in any working directory.

    A folder of that name in the working directory is `./pretrained/NAME`.
    """
    return ROOT / path if str(path).startswith(PRETRAINED) else Path(path)


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a model folder, whole or damaged."""
    own = (DIGEST_FILE, TENSOR_FILE, INDEX_FILE)
    return (Path(path) / CONFIG_FILE).exists() and any((Path(path) / n).exists() for n in own)


# ----------------------------------------------------------------------------------------- writing


def write_folder(
    path: str | Path,
    params: Tree,
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model folder.

    Args:
        params: nested dict of arrays (numpy or jax, wholly on this host's devices), or of
            `sources.Stored` that are read when their turn comes.
        config: anything JSON can hold; read back by `read_config`.
        shard_bytes: largest size of one file's tensors.
        overwrite: replace a folder that this function wrote before; nothing else is ever replaced.

    Raises:
        FileExistsError: something is at `path`.
        OSError: it could not be written, e.g. the disk is full; what was there is as before.
    """
    flat = {name.replace("/", "."): leaf for name, leaf in flatten(params).items()}
    held = {name: leaf for name, leaf in flat.items() if isinstance(leaf, Stored)}
    tensors = {**open_source({n: leaf for n, leaf in flat.items() if n not in held}), **held}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_tensors(path, tensors, {CONFIG_FILE: text}, shard_bytes=shard_bytes, overwrite=overwrite)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Stored],
    texts: Mapping[str, str],
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder of safetensors, text files and the digests of all of them.

    Raises:
        FileExistsError, OSError: as `write_folder`.
    """
    path = Path(path)
    if path.exists() and not (overwrite and (path / DIGEST_FILE).exists()):
        what = f"is there and has no {DIGEST_FILE}" if overwrite else "exists already"
        raise FileExistsError(f"{path} {what}; nothing was written over")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_files(temporary, tensors, texts, shard_bytes)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except OSError as error:
        full = "the disk is full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        size = sum(stored.bytes for stored in tensors.values())
        reason = f"{path} could not be written ({size} bytes of tensors): {full}{error}"
        raise OSError(error.errno, reason) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plan(tensors: Mapping[str, Stored], shard_bytes: int) -> list[list[str]]:
    """Names in each file, in order of name; only a tensor larger than the limit exceeds it."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = tensors[name].bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_files(
    folder: Path, tensors: Mapping[str, Stored], texts: Mapping[str, str], shard_bytes: int
) -> None:
    shards = _plan(tensors, shard_bytes)
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = [TENSOR_FILE] if count == 1 else files
    digests = {}
    for file, names in zip(files, shards):
        digests[file] = _write(folder / file, safetensors_parts({n: tensors[n] for n in names}))
    texts = dict(texts)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(stored.bytes for stored in tensors.values())},
            "weight_map": {n: file for file, names in zip(files, shards) for n in names},
        }
        texts[INDEX_FILE] = json.dumps(index, indent=2) + "\n"
    for file, text in texts.items():
        digests[file] = _write(folder / file, iter([text.encode()]))
    _write(folder / DIGEST_FILE, iter([(json.dumps(digests, indent=2) + "\n").encode()]))


def _write(path: Path, parts: Iterator[Any]) -> str:
    """Write and flush a file; its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def safetensors_parts(tensors: Mapping[str, Stored]) -> Iterator[Any]:
    """The bytes of a safetensors file: its header, then each tensor as it is read.

    The library's own writer wants all tensors of a file in memory at once.

    Raises:
        ValueError: a dtype that the format does not have, or a tensor that is not as announced.
    """
    # Wider numbers first keeps every tensor aligned.
    names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    end = 0
    for name in names:
        stored = tensors[name]
        if stored.dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"{name} has dtype {stored.dtype}, which safetensors does not hold")
        start, end = end, end + stored.bytes
        kind, shape = SAFETENSORS_NAMES[stored.dtype], list(stored.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        array, stored = tensors[name].read(), tensors[name]
        if array.shape != stored.shape or array.dtype != stored.dtype:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, "
                f"announced as {stored.dtype}{list(stored.shape)}"
            )
        yield memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


# ----------------------------------------------------------------------------------------- reading


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration that was given to `write_folder`.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: the file is not a JSON object.
    """
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; is {path} a model folder?")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected an object")
    config = upgrade(config)
    if EXPERIMENT_KEY in config:
        config[EXPERIMENT_KEY] = upgrade(config[EXPERIMENT_KEY])
    return config


def verify(path: str | Path) -> list[str]:
    """What is wrong with a model folder's files, by its list of digests; empty if nothing is.

    Raises:
        FileNotFoundError: there is no list.  ValueError: it cannot be read.
    """
    file = Path(path) / DIGEST_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; is {path} a model folder?")
    try:
        expected = {str(k): str(v) for k, v in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a list of digests: {error}") from error
    held = sorted(held.name for held in Path(path).glob("*.safetensors"))
    problems = [f"{name} is not in {DIGEST_FILE}" for name in held if name not in expected]
    for name, digest in expected.items():
        if not (Path(path) / name).exists():
            problems.append(f"{name} is missing")
            continue
        with (Path(path) / name).open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != digest:
            problems.append(f"{name} has sha256 {actual}, expected {digest}")
    return problems


def open_folder(path: str | Path, tree: Tree, *, check_digests: bool = True) -> dict[str, Any]:
    """The tree of a model folder as tensors that are read when asked for.

    Args:
        tree: declared ParamSpecs; the folder must hold exactly these.
        check_digests: read every file through first and compare its sha256.

    Raises:
        FileNotFoundError: no model folder, or a shard is missing.
        ValueError: a damaged file (named), or missing, unexpected and misshapen names, listed
            together.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    problems = verify(path) if check_digests else []
    if problems:
        absent = all(text.endswith("is missing") for text in problems)
        kind = FileNotFoundError if absent else ValueError
        raise kind(f"{path} is damaged: {'; '.join(problems)}")
    stored = open_source(path)
    _compare(path, stored, {name.replace("/", "."): w for name, w in flatten(tree).items()})
    return unflatten({name.replace(".", "/"): tensor for name, tensor in stored.items()})


def read_folder(
    path: str | Path,
    tree: Tree,
    mesh: Mesh | None = None,
    layout: str = "dp",
    dtype: Any = None,
    *,
    subtrees: Sequence[str] | None = None,
    check_digests: bool = True,
) -> dict[str, Any]:
    """Read the parameters of a model folder, each slice straight to the device that needs it.

    Args:
        tree: the declared Weights; the folder must contain exactly these.
        mesh: devices that the parameters are placed on; the default device if None.
        layout: name of the sharding layout on `mesh`.
        dtype: dtype of the result; by default the dtype of the files.
        subtrees: names of the top-level subtrees to read; all of them by default.
        check_digests: read every file through first and compare its sha256.

    Raises:
        FileNotFoundError, ValueError: as `open_folder`; also float64 without jax_enable_x64, and a
            layout that does not fit a weight.
    """
    opened = open_folder(path, tree, check_digests=check_digests)
    if subtrees is not None:
        opened = split_params(opened, tuple(subtrees))[0]
        tree = split_params(tree, tuple(subtrees))[0]
    stored = flatten(opened)
    where = flatten(param_shardings(tree, mesh, layout)) if mesh is not None else {}
    leaves = {}
    for name, tensor in stored.items():
        target = np.dtype(tensor.dtype if dtype is None else dtype)
        if target.itemsize == 8 and not jax.config.jax_enable_x64:
            raise ValueError(f"{path}: {name} is {target}; enable jax_enable_x64 or give a dtype")
        leaves[name] = _place(tensor, where.get(name), target)
    return unflatten(leaves)


def _place(tensor: Stored, sharding: Any, dtype: np.dtype) -> jax.Array:
    if sharding is None:
        return jnp.asarray(tensor.read().astype(dtype, copy=False))
    read = lambda index: tensor.read(index).astype(dtype, copy=False)
    return jax.make_array_from_callback(tensor.shape, sharding, read)


def _compare(path: Path, stored: Mapping[str, Stored], declared: Mapping[str, Any]) -> None:
    problems = {
        "missing": [name for name in declared if name not in stored],
        "unexpected": [name for name in stored if name not in declared],
        "misshapen": [
            f"{name} is {list(stored[name].shape)}, expected {list(weight.shape)}"
            for name, weight in declared.items()
            if name in stored and stored[name].shape != tuple(weight.shape)
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(n)} {kind}: {', '.join(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"{path} does not hold the declared model. {text}")
