"""Model folders: `config.json`, `model.safetensors` (with an index above 5 GB), `sha256.json`.

Tensors are written and read one at a time, so that memory never holds two copies of a model. A
folder appears complete, by a rename, or not at all. Tensor names are those of our parameter tree,
joined by dots. A folder may hold the folders of other models, whose files are in `sha256.json` too.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from starflow2_jax.checkpoints import digest, hub
from starflow2_jax.checkpoints.tensor_files import (
    INDEX_FILE,
    SAFETENSORS_NAMES,
    StoredTensor,
    compare,
    open_source,
    raise_problems,
    to_device,
)
from starflow2_jax.config import upgrade
from starflow2_jax.params import (
    Tree,
    flatten,
    shardings as param_shardings,
    split as split_params,
    unflatten,
)
from starflow2_jax.runtime import atomic, json_text

CONFIG_FILE = "config.json"
# The entry of a Hugging Face config.json that holds the configuration of the experiment.
EXPERIMENT_KEY = "starflow2_jax"
TENSOR_FILE = "model.safetensors"
DIGEST_FILE = "sha256.json"
SHARD_BYTES = 5_000_000_000
# Prefix of the paths of the models that ship with the package.
PRETRAINED = "pretrained/"
ROOT = Path(__file__).parents[1]


def locate(path: str | Path) -> Path:
    """Resolve the path of a model: local, `pretrained/NAME`, or `hf://user/name[@revision]`.

    `pretrained/NAME` is the package's own model, in any working directory; a folder of that name
    in the working directory is `./pretrained/NAME`. `hf://...` is downloaded to the cache, and its
    files are compared with its `sha256.json`. Other paths are returned unchanged.

    Raises:
        OSError, ValueError: A model of the Hub cannot be downloaded, or is damaged; see `hub.pull`.
    """
    if hub.is_address(path):
        return _pull(str(path))
    return ROOT / path if str(path).startswith(PRETRAINED) else Path(path)


@functools.cache
def _pull(address: str) -> Path:
    """Return the local copy of a model of the Hub, whose own digests match."""
    pinned, folder = hub.pull(address)
    problems = verify(folder) if (folder / DIGEST_FILE).exists() else []
    if problems:
        raise ValueError(
            f"{pinned}: the repository is not the folder that was exported: {'; '.join(problems)}"
        )
    return folder


def is_folder(path: str | Path) -> bool:
    """Return True if `path` is a model folder, even a damaged one."""
    names = (DIGEST_FILE, TENSOR_FILE, INDEX_FILE)
    return (Path(path) / CONFIG_FILE).exists() and any((Path(path) / n).exists() for n in names)


# ----------------------------------------------------------------------------------------- writing


def write_folder(
    path: str | Path,
    params: Tree,
    config: Mapping[str, Any],
    *,
    folders: Mapping[str, Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model folder. If that fails, whatever was at `path` is unchanged.

    Args:
        params: nested dict of arrays (numpy or jax, wholly on this host's devices), or of
            `tensor_files.StoredTensor`s, each of which is read when it is written.
        folders: folders to copy into it, by name. They may lie in the folder that is replaced.
        overwrite: replace a folder that this function wrote before; nothing else is ever replaced.
    """
    leaves = {name.replace("/", "."): leaf for name, leaf in flatten(params).items()}
    arrays = {n: leaf for n, leaf in leaves.items() if not isinstance(leaf, StoredTensor)}
    tensors = {**leaves, **open_source(arrays)}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_tensors(
        path,
        tensors,
        {CONFIG_FILE: text},
        folders=folders,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, StoredTensor],
    texts: Mapping[str, str],
    *,
    folders: Mapping[str, Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder of safetensors, text files, copied folders and the digests of all files.

    A folder with just these contents is left as it is: a process may have been killed after it had
    written it. Arguments and errors are those of `write_folder`.
    """
    path = Path(path)
    atomic.recover(path)
    files = partial(_files, tensors, texts, folders or {}, shard_bytes)
    if path.exists() and not overwrite:
        if _holds(path, files()):
            return
        raise FileExistsError(f"{path} exists already; nothing was written over")
    if path.exists() and not (path / DIGEST_FILE).exists():
        raise FileExistsError(f"{path} is there and has no {DIGEST_FILE}; nothing was written over")
    try:
        with atomic.folder(path, overwrite=overwrite) as temporary:
            digests = {name: _write(temporary / name, parts) for name, parts in files()}
            text = json.dumps(digests, indent=2) + "\n"
            _write(temporary / DIGEST_FILE, iter([text.encode()]))
    except OSError as error:
        full = "the disk is full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        size = sum(stored.bytes for stored in tensors.values())
        reason = f"{path} could not be written ({size} bytes of tensors): {full}{error}"
        raise OSError(error.errno, reason) from error


def _assign_shards(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> list[list[str]]:
    """Return the sorted names in each file. Only a tensor above the limit exceeds it."""
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


def _files(
    tensors: Mapping[str, StoredTensor],
    texts: Mapping[str, str],
    folders: Mapping[str, Path],
    shard_bytes: int,
) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yield the name and the parts of every file of a folder, small ones first."""
    shards = _assign_shards(tensors, shard_bytes)
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = [TENSOR_FILE] if count == 1 else files
    for file, text in texts.items():
        yield file, iter([text.encode()])
    if count > 1:
        index = {
            "metadata": {"total_size": sum(stored.bytes for stored in tensors.values())},
            "weight_map": {n: file for file, names in zip(files, shards) for n in names},
        }
        yield INDEX_FILE, iter([(json.dumps(index, indent=2) + "\n").encode()])
    for name, source in folders.items():
        for inner in digest.files(epath.Path(source)):
            yield f"{name}/{inner}", _read_parts(Path(source) / inner)
    for file, names in zip(files, shards):
        yield file, safetensors_parts({n: tensors[n] for n in names})


def _read_parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while part := stream.read(1 << 22):
            yield part


def _write(path: Path, parts: Iterator[Any]) -> str:
    """Write a file. Return its sha256."""
    sha256 = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
            sha256.update(part)
    return sha256.hexdigest()


def _holds(path: Path, files: Iterator[tuple[str, Iterator[Any]]]) -> bool:
    """Return True if a folder holds these files, undamaged, and no others."""
    try:
        stored = read_digests(path)
    except (OSError, ValueError):
        return False
    for name, parts in files:
        sha256 = hashlib.sha256()
        if name not in stored:
            return False
        for part in parts:
            sha256.update(part)
        if stored.pop(name) != sha256.hexdigest():
            return False
    return not stored and not verify(path)


def safetensors_parts(tensors: Mapping[str, StoredTensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file: its header, then each tensor as it is read.

    The library's own writer needs all tensors of a file in memory at once.
    """
    # Larger dtypes first keeps every tensor aligned.
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
    """Return the configuration that `write_folder` stored."""
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; is {path} a model folder?")
    check(path, lambda name: name == CONFIG_FILE)  # before it is used
    from starflow2_jax.data import untrusted  # needs msgspec, which sampling alone does not

    config = upgrade(untrusted.read_json(file, dict[str, Any]))
    if EXPERIMENT_KEY in config:
        config[EXPERIMENT_KEY] = upgrade(config[EXPERIMENT_KEY])
        if not (Path(path) / DIGEST_FILE).exists():
            _warn_of_missing_digests(Path(path))
    return config


@functools.cache  # one warning, however often a command reads the configuration
def _warn_of_missing_digests(path: Path) -> None:
    message = "%s has no %s, which every exported folder has: its files are used unchecked"
    logging.warning(message, path, DIGEST_FILE)


def read_digests(path: str | Path) -> dict[str, str]:
    """Return the sha256 of every file of a model folder, by its name relative to the folder."""
    file = Path(path) / DIGEST_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; is {path} a model folder?")
    try:
        stored = json_text.decode(file.read_bytes(), str(file))
        digests = {str(name): str(value) for name, value in stored.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a list of digests: {error}") from error
    outside = [n for n in digests if Path(n).is_absolute() or ".." in Path(n).parts]
    if outside:
        raise ValueError(f"{file} names {outside[0]!r}, which is not in its folder")
    return digests


def verify(path: str | Path, needs_check: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Compare the files of a model folder, and of folders in it, with the lists of their digests.

    Args:
        path: the folder.
        needs_check: which files to compare, by their names in the folder; by default all.

    Returns:
        Every problem. Folders that were exported before version 2 of the list, which names only the
        files beside it, are compared with a list of their own if they have one.
    """
    path, expected = Path(path), read_digests(path)
    listed = {name.split("/")[0] for name in expected if "/" in name}
    names = [name for name in digest.files(epath.Path(path)) if name != DIGEST_FILE]
    expected = {name: value for name, value in expected.items() if needs_check(name)}
    names = [name for name in names if needs_check(name)]
    required = [
        name
        for name in names
        if name.split("/")[0] in listed
        or ("/" not in name and (name == CONFIG_FILE or name.endswith(".safetensors")))
    ]
    problems = [f"{name} is not in {DIGEST_FILE}" for name in required if name not in expected]
    for name, problem in digest.mismatches(epath.Path(path), expected).items():
        problems.append(
            f"{name} is missing (by {DIGEST_FILE})"
            if problem == "missing"
            else f"{name} has {problem} by {DIGEST_FILE}: one of the two is damaged"
        )
    for inner in sorted({name.split("/")[0] for name in names if "/" in name} - listed):
        if (path / inner / DIGEST_FILE).exists():
            problems += [f"{inner}/{problem}" for problem in verify(path / inner)]
    return problems


def check(path: str | Path, needs_check: Callable[[str], bool] = lambda name: True) -> None:
    """Raise an error that names every damaged file of a model folder with a list of digests.

    Args:
        path: the folder.
        needs_check: which files to compare, by their names in the folder; by default all.

    Raises:
        FileNotFoundError: Files are missing.
        ValueError: Files are damaged.
    """
    path = Path(path)
    problems = verify(path, needs_check) if (path / DIGEST_FILE).exists() else []
    if problems:
        absent = all(" is missing (by " in text for text in problems)
        kind = FileNotFoundError if absent else ValueError
        raise kind(f"{path} is damaged: {'; '.join(problems)}")


def open_folder(path: str | Path, tree: Tree, *, check_digests: bool = True) -> dict[str, Any]:
    """Return a model folder, which holds exactly `tree`, as tensors that are read on request.

    With `check_digests`, every file is read through first to compare its sha256.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    if check_digests:
        read_digests(path)  # a model folder has them
        check(path)
    stored = open_source(path)
    expected = {name.replace("/", "."): spec.shape for name, spec in flatten(tree).items()}
    raise_problems(f"{path} does not hold the declared model", compare(stored, expected))
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
        tree: the declared tree; the folder must contain exactly these weights.
        subtrees: names of the top-level subtrees to read; all of them by default.
        check_digests: read every file through first and compare its sha256.
    """
    opened = open_folder(path, tree, check_digests=check_digests)
    if subtrees is not None:
        opened = split_params(opened, tuple(subtrees))[0]
        tree = split_params(tree, tuple(subtrees))[0]
    shardings = flatten(param_shardings(tree, mesh, layout)) if mesh is not None else {}
    leaves = {}
    for name, tensor in flatten(opened).items():
        target = np.dtype(tensor.dtype if dtype is None else dtype)
        if target.itemsize == 8 and not jax.config.jax_enable_x64:
            raise ValueError(f"{path}: {name} is {target}; enable jax_enable_x64 or give a dtype")
        leaves[name] = to_device(tensor, shardings.get(name), target)
    return unflatten(leaves)
