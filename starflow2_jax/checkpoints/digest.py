"""The sha256 digests of the files in a directory, stored there as `SHA256SUMS`.

Orbax restores a flipped bit without an error, so every committed checkpoint step gets a list of the
digests of its files. The format is that of coreutils (`sha256sum -c SHA256SUMS` works inside the
directory). A comment in the last line holds the digest of the lines above it, so that damage to the
list is not mistaken for damage to a file.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable, Iterator

from etils import epath

SIDECAR = "SHA256SUMS"
_SELF_DIGEST_PREFIX = "# sha256 of the lines above: "


def files(directory: epath.Path) -> list[str]:
    """Return the relative names of all files under `directory`, sorted, without the sidecar."""

    def walk(path: epath.Path) -> Iterator[epath.Path]:
        for entry in path.iterdir():
            if entry.is_dir():
                yield from walk(entry)
            else:
                yield entry

    names = (path.relative_to(directory).as_posix() for path in walk(directory))
    return sorted(name for name in names if not name.startswith(SIDECAR))


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def compute(directory: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hex sha256 of each file by its name relative to `directory`."""
    names = list(names)
    # hashlib releases the GIL, so a few threads read at once.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(directory / name), names)))


def write(directory: epath.Path) -> None:
    """Digest every file of `directory` and write the sidecar atomically.

    A local sidecar is written under a temporary name, flushed and renamed. An object store shows a
    written object only when it is complete, so a plain write suffices there.
    """
    lines = [f"{value}  {name}\n" for name, value in compute(directory, files(directory)).items()]
    text = "".join(lines)
    text += f"{_SELF_DIGEST_PREFIX}{hashlib.sha256(text.encode()).hexdigest()}\n"
    target = directory / SIDECAR
    if "://" in os.fspath(directory):
        target.write_text(text)
        return
    temporary = directory / f"{SIDECAR}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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
