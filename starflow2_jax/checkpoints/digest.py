"""sha256 digests of a directory, kept in it as `SHA256SUMS`.

Orbax restores a flipped bit without a word, so every committed checkpoint step gets a list of the
digests of its files. The format is that of coreutils (`sha256sum -c SHA256SUMS` works inside the
directory); a comment in the last line carries the digest of the lines above it, so that damage to
the list is not mistaken for damage to a file.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable, Iterator

from etils import epath

SIDECAR = "SHA256SUMS"
_SELF = "# sha256 of the lines above: "


def files(directory: epath.Path) -> list[str]:
    """Relative names of all files under `directory`, sorted, without the sidecar itself."""

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
    """Hex sha256 by relative file name. hashlib releases the GIL, so a few threads read at once."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(directory / name), names)))


def write(directory: epath.Path) -> None:
    """Digests every file of `directory` and writes the sidecar in one step.

    On a local disk: a file beside it, flushed, then renamed. In an object store a written object
    appears as a whole, so that a plain write does.
    """
    lines = [f"{value}  {name}\n" for name, value in compute(directory, files(directory)).items()]
    text = "".join(lines)
    text += f"{_SELF}{hashlib.sha256(text.encode()).hexdigest()}\n"
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
    """The digests by file name, or None where there is no sidecar.

    Raises:
      ValueError: the sidecar itself is damaged.
    """
    path = directory / SIDECAR
    if not path.exists():
        return None
    text = path.read_bytes().decode("utf-8", errors="replace")
    body, found, own = text.rpartition(_SELF)
    if not found or own != hashlib.sha256(body.encode()).hexdigest() + "\n":
        raise ValueError(f"{path} is damaged: it does not match the digest in its own last line")
    return {name: value for value, name in (line.split("  ", 1) for line in body.splitlines())}


def mismatches(directory: epath.Path, expected: dict[str, str]) -> dict[str, str]:
    """What is wrong, by relative file name: `missing` or the two digests; empty if all is well."""
    present = [name for name in expected if (directory / name).exists()]
    actual = compute(directory, present)
    wrong = {name: "missing" for name in expected if name not in actual}
    for name, value in actual.items():
        if value != expected[name]:
            wrong[name] = f"sha256 {value}, expected {expected[name]}"
    return dict(sorted(wrong.items()))
