"""Importer of WebDataset tars: members are streamed, and nothing is extracted to disk."""

import functools
import gzip
import os
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from starflow2_jax.data import images
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record
from starflow2_jax.importers import captioned
from starflow2_jax.importers.captioned import CAPTION_SUFFIX, IMAGE_SUFFIXES, MAX_CAPTION_BYTES
from starflow2_jax.importers.folders import is_hidden
from starflow2_jax.importers.tally import Tally

# A gzip stream that expands more is a decompression bomb; real text compresses tenfold at most.
_MAX_EXPANSION = 200


class _Member(NamedTuple):
    """A file of a tar: its key, the rest of its name, and its bytes if it is of a known kind."""

    key: str
    suffix: str
    data: bytes | None


def webdataset(tars: Sequence[str | os.PathLike[str]], tally: Tally) -> Iterator[Record]:
    """Yield the records of WebDataset tars (`.tar`, `.tar.gz`), in the order of the archives.

    The members of one example are adjacent and share a key, their path up to the first dot of the
    file name: `000123.jpg`, `000123.txt`. Members of other kinds are counted; links, devices and
    paths outside the archive are errors.
    """
    for tar in tars:
        name = os.path.basename(os.fspath(tar))
        rows = _examples(tar, name, tally)
        yield from tally.parse_rows(rows, functools.partial(_records, name, tally))


def _examples(
    tar: str | os.PathLike[str], name: str, tally: Tally
) -> Iterator[tuple[str, tuple[str, dict[str, bytes | None]]]]:
    """Yield the location, key and files (suffix -> bytes) of every example of a tar."""
    key: str | None = None
    parts: dict[str, bytes | None] = {}
    keys = set()
    for member in _members(tar, name, tally):
        if member.key != key:
            if key is not None:
                yield f"{name}:{key}", (key, parts)
            key, parts = member.key, {}
            if key in keys:
                raise DatasetError(f"{name}: the members of {key!r} are not adjacent")
            keys.add(key)
        if member.suffix in parts:
            raise DatasetError(f"{name}: two members are called {key + member.suffix!r}")
        parts[member.suffix] = member.data
    if key is not None:
        yield f"{name}:{key}", (key, parts)


def _records(
    src: str, tally: Tally, location: str, example: tuple[str, dict[str, bytes | None]]
) -> list[Record]:
    key, parts = example
    pictures = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if not pictures and CAPTION_SUFFIX not in parts:
        for suffix in parts:
            tally.pass_over(*_other_kind(suffix, location + suffix))
        return []
    files = captioned.ExampleFiles(
        location,
        {location + suffix: parts[suffix] for suffix in pictures},
        parts.get(CAPTION_SUFFIX),
        [location + suffix for suffix in parts if suffix not in pictures],
    )
    records = captioned.parse_example(files, f"{src}/{key}", src, tally)
    for suffix in parts:
        if suffix not in (*IMAGE_SUFFIXES, CAPTION_SUFFIX):
            tally.pass_over(*_other_kind(suffix, location + suffix))
    return records


def _other_kind(suffix: str, location: str) -> tuple[str, str]:
    """Return the reason and an example for the count of a member that is not read."""
    last = "." + suffix.rpartition(".")[2]
    if suffix.count(".") > 1 and last in (*IMAGE_SUFFIXES, CAPTION_SUFFIX):
        return "names with a dot in the key (a key ends at the first dot)", location
    return f"{suffix or 'no suffix'} members", location


def _members(tar: str | os.PathLike[str], name: str, tally: Tally) -> Iterator[_Member]:
    """Yield the files of a tar, checked."""
    end = 0
    try:
        with open(tar, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            limit = _MAX_EXPANSION * os.path.getsize(tar) + (1 << 20)
            stream = _BoundedStream(gzip.GzipFile(fileobj=file) if is_gzip else file, limit, name)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    _check_member(member, name)
                    end = member.offset_data + member.size
                    if member.isfile() and is_hidden(member.name):
                        tally.pass_over("hidden files", f"{name}:{member.name}")
                    elif member.isfile():
                        yield _member(archive, member, name)
            blocks = -(-end // tarfile.BLOCKSIZE) + 1
            if stream.count < blocks * tarfile.BLOCKSIZE:
                # tarfile takes the end of the file, or half a header, for the end of the archive.
                raise DatasetError(f"{name}: truncated after byte {end}: no end-of-archive block")
    except FileNotFoundError as error:
        raise DatasetError(f"{tar}: no such file") from error
    except IsADirectoryError as error:
        raise DatasetError(f"{tar}: a folder; its tars are '{tar}/*.tar'") from error
    except DatasetError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        raise DatasetError(f"{name}: damaged archive after byte {end}: {error}") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> _Member:
    directory, _, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    suffix = (dot + suffix).lower()
    key = posixpath.join(directory, stem)
    if suffix not in (*IMAGE_SUFFIXES, CAPTION_SUFFIX):
        return _Member(key, suffix, None)
    cap = MAX_CAPTION_BYTES if suffix == CAPTION_SUFFIX else images.MAX_BYTES
    if member.size > cap:
        raise DatasetError(f"{name}: {member.name!r} has {member.size} bytes, at most {cap}")
    return _Member(key, suffix, archive.extractfile(member).read())


class _BoundedStream:
    """A readable stream of at most `limit` bytes, which stops decompression bombs."""

    def __init__(self, stream: BinaryIO, limit: int, name: str):
        self._stream, self._limit, self._name, self.count = stream, limit, name, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        if self.count > self._limit:
            raise DatasetError(
                f"{self._name}: expands to more than {_MAX_EXPANSION} times its size"
            )
        return data


def _check_member(member: tarfile.TarInfo, name: str) -> None:
    parts = pathlib.PurePosixPath(member.name.replace("\\", "/")).parts
    if ".." in parts or member.name.startswith("/") or (parts and parts[0].endswith(":")):
        raise DatasetError(f"{name}: the path {member.name!r} leads out of the archive")
    if not (member.isfile() or member.isdir()):
        raise DatasetError(
            f"{name}: {member.name!r} is a link or a device; only files and folders are read"
        )
