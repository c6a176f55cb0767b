"""The sha256 digests of the files in a directory, stored there as `SHA256SUMS`.

Orbax restores a flipped bit without an error, so every committed checkpoint step gets a list of the
digests of its files. The format is that of coreutils (`sha256sum -c SHA256SUMS` works inside the
directory). A comment in the last line holds the digest of the lines above it, so that damage to the
list is not mistaken for damage to a file.
"""

import concurrent.futures
import functools
import hashlib
import os
import time
from collections.abc import Iterable, Iterator

from etils import epath

from starflow2_jax.runtime import atomic

SIDECAR = "SHA256SUMS"
# Seconds that are more than the resolution of any file system's clock.
_CLOCK_STEP = 3.0
_SELF_DIGEST_PREFIX = "# sha256 of the lines above: "


def files(directory: epath.Path) -> list[str]:
    """Return the relative names of all files under `directory`, sorted, without the sidecar."""

    def walk(path: epath.Path) -> Iterator[epath.Path]:
        for entry in path.iterdir():
            if entry.is_dir():
                yield from walk(entry)
            else:
                yield entry

    paths = (path for path in walk(directory) if not atomic.is_partial(path.name))
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith(SIDECAR))


def sha256_file(path: epath.PathLike) -> str:
    """Return the hex sha256 of a file. A local file that did not change is read once only."""
    path = os.fspath(path)
    if atomic.is_remote(path):
        return _sha256(path)
    status = os.stat(path)
    if time.time() - status.st_mtime < _CLOCK_STEP:
        return _sha256(path)  # it may change again without another time
    return _sha256_of_version(
        os.path.realpath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    )


@functools.lru_cache(maxsize=1 << 12)
def _sha256_of_version(path: str, *version: int) -> str:
    del version  # a file with another one is read again
    return _sha256(path)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def compute(directory: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hex sha256 of each file by its name relative to `directory`."""
    names = list(names)
    # hashlib releases the GIL, so a few threads read at once.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_file(directory / name), names)))


def write(directory: epath.Path) -> None:
    """Digest every file of `directory` and write the sidecar atomically."""
    lines = [f"{value}  {name}\n" for name, value in compute(directory, files(directory)).items()]
    text = "".join(lines)
    text += f"{_SELF_DIGEST_PREFIX}{hashlib.sha256(text.encode()).hexdigest()}\n"
    atomic.write_file(directory / SIDECAR, text)


def read(directory: epath.Path) -> dict[str, str] | None:
    """Return the stored digests by file name, or None if there is no sidecar."""
    path = directory / SIDECAR
    if not path.exists():
        return None
    text = path.read_bytes().decode("utf-8", errors="replace")
    body, prefix, self_digest = text.rpartition(_SELF_DIGEST_PREFIX)
    if not prefix or self_digest != hashlib.sha256(body.encode()).hexdigest() + "\n":
        raise ValueError(f"{path} is damaged: it does not match the digest in its own last line")
    return {name: value for value, name in (line.split("  ", 1) for line in body.splitlines())}


def mismatches(directory: epath.Path, expected: dict[str, str]) -> dict[str, str]:
    """Return `missing` or both digests for each file that differs from its expected digest."""
    present = [name for name in expected if (directory / name).exists()]
    actual = compute(directory, present)
    problems = {name: "missing" for name in expected if name not in actual}
    for name, value in actual.items():
        if value != expected[name]:
            problems[name] = f"sha256 {value}, expected {expected[name]}"
    return dict(sorted(problems.items()))
